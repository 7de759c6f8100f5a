"""Head dims 32 and 64: several programs share a multiprocessor, each of one group of warps that computes."""
