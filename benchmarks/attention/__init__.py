"""Attention kernels side by side: time, memory and accuracy by provider, shape and mode.

    python -m benchmarks.attention --output rows.csv --plot plots
    python -m benchmarks.attention --shapes S1,L2 --providers varlen,jagged_flash --modes forward
    python -m benchmarks.attention --shape name=X,users=64,heads=4,head_dim=64,mean=300,max=2048,window=256
    python -m benchmarks.attention --device cpu --shapes tiny

`shapes.py` has the batches and what they cost at least, `providers.py` the kernels, `../timing.py` says how time and
memory are taken, `accuracy.py` how results are judged, `rows.py` what the columns are,
`../rows.py` what rows of all comparisons share.
"""
