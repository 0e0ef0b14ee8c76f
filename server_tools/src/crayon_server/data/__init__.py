"""Data sets that models and pools are trained and judged on."""
