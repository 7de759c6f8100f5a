"""Measurements: what runs how fast on which machine, as CSV files under `results/`."""
