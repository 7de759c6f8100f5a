"""Models: how looked-up features become a score per candidate and task."""
