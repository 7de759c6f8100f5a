"""Attention over jagged sequences: several backends behind one interface. `resolve` picks one by name."""

from recsys.attention.config import AttentionConfig, BackendName
from recsys.attention.interface import AttentionBackend, CrossLayout, JaggedLayout, MaskSpec
from recsys.attention.registry import backends, resolve

__all__ = [
    "AttentionBackend",
    "AttentionConfig",
    "BackendName",
    "CrossLayout",
    "JaggedLayout",
    "MaskSpec",
    "backends",
    "resolve",
]
