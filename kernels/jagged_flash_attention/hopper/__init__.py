"""Kernels for Hopper (compute capability 9.x) in Gluon; ../tuning.py says which calls they serve."""
