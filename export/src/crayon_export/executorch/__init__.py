"""Programs for ExecuTorch: its official exporter's building blocks, driven from a checkpoint."""
