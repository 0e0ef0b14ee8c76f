"""The numbers that README and docs quote, measured on the machine they run on: `make bench`."""
