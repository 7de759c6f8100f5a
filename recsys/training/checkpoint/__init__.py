"""Checkpoints: whole or not there, checked before use, loadable under another plan and world size.

Files and names are described in `docs/checkpoints.md`.
"""

from recsys.training.checkpoint.checkpointer import Checkpointer
from recsys.training.checkpoint.collective import CheckpointError, CheckpointRefused
from recsys.training.checkpoint.state import RestoreInfo, Stateful, TrainState

__all__ = ["CheckpointError", "CheckpointRefused", "Checkpointer", "RestoreInfo", "Stateful", "TrainState"]
