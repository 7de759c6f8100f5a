"""Which attention backends there are, and which one a config means."""

from __future__ import annotations

import logging

import torch

from recsys.attention.config import BackendName
from recsys.attention.dense import Dense
from recsys.attention.interface import BACKENDS, AttentionBackend
from recsys.attention.jagged import Jagged
from recsys.attention.jagged_flash import JaggedFlash
from recsys.attention.sdpa import Sdpa
from recsys.attention.varlen import Varlen

log = logging.getLogger(__name__)

BACKENDS.update({backend.name: backend for backend in (JaggedFlash(), Varlen(), Jagged(), Sdpa(), Dense())})


def backends() -> dict[str, AttentionBackend]:
    """Every backend by name, without `auto`."""
    return dict(BACKENDS)


def resolve(name: str | BackendName, device: torch.device | str) -> AttentionBackend:
    """The backend that `name` means on `device`.

    `auto` is `jagged_flash` on CUDA and `sdpa` elsewhere, and the log says which; any other name is that
    backend or an error.

    Raises:
        ValueError: no such backend, or it can't run on `device`; the message names those that can.
    """
    device = torch.device(device)
    name = name.value if isinstance(name, BackendName) else name
    allowed = [member.value for member in BackendName]
    if name not in allowed:
        raise ValueError(f"there is no attention backend '{name}': allowed are {', '.join(allowed)}")
    chosen = ("jagged_flash" if device.type == "cuda" else "sdpa") if name == "auto" else name
    backend = BACKENDS[chosen]
    reason = backend.unavailable(device)
    if reason is not None:
        usable = ", ".join(n for n, b in BACKENDS.items() if b.unavailable(device) is None)
        meant = f"'{chosen}' (chosen by auto)" if name == "auto" else f"'{chosen}'"
        raise ValueError(f"attention backend {meant} can't run on {device}: {reason}. Usable on this device: {usable}")
    if name == "auto":
        log.info("attention backend auto on %s: %s (%s)", device.type, chosen, backend.summary)
    return backend
