"""The building blocks of interactions side by side: time, memory and accuracy by operation, provider, shape and mode.

    python -m benchmarks.interaction --output rows.csv
    python -m benchmarks.interaction --shapes S1,M1 --operations jagged_softmax --providers ours,padded
    TRITON_INTERPRET=1 python -m benchmarks.interaction --device cpu --shapes tiny

`operations/` has the operations, what they cost at least and who does them; shapes are those of the attention bench,
`../timing.py` says how time and memory are taken, `../rows.py` how a provider fared.
"""
