"""Triton operators, one folder each. This package imports torch and triton only."""
