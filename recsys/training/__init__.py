"""Training: the loop, its pipeline and metrics, run directories and checkpoints."""
