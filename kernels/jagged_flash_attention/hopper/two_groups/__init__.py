"""Head dim 128: a program has a multiprocessor to itself, and two groups of warps compute."""
