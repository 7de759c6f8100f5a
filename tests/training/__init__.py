"""Tests of recsys.training."""
