"""The tolerance policy: an error is judged by the error that plain PyTorch makes in the same precision.

See docs/numerics.md for why there is no fixed `atol`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0

# Rounding that no implementation can avoid, in units of the dtype's eps relative to the exact values: one for
# rounding the result, one for rounding probabilities (or score gradients) before the second product.
FLOOR_IN_EPS = 2.0
# Where the exact value is (nearly) zero, as all of dq is for a user of one token or under a window of one, two float32
# sums over the head dim cancel and their rounding is left: it grows with the number of terms. PyTorch adds both in the
# same order and gets an exact zero. For inputs of order one; the head dim is the size of the last dimension.
FLOOR_PER_TERM = 1 * torch.finfo(torch.float32).eps
LEAST_FLOOR = 16 * torch.finfo(torch.float32).eps

NORMS: dict[str, Callable[[Tensor], float]] = {
    "greatest": lambda x: float(x.abs().max()),
    "root-mean-square": lambda x: float(x.square().mean().sqrt()),
}


def assert_matches_reference(
    actual: Tensor,
    baseline: Tensor,
    exact: Tensor,
    *,
    factor: float,
    name: str = "result",
    lengths: Sequence[int] | None = None,
    magnitude: float = 1.0,
) -> None:
    """Assert error(actual) <= factor x error(baseline) + floor, for the whole tensor and for every sequence.

    The error is the difference from `exact`, both its greatest absolute value and its root mean square.

    Args:
        actual: what the kernel gave.
        baseline: plain PyTorch in the kernel's dtype, from the same inputs.
        exact: plain PyTorch in float64, from the same inputs.
        factor: FORWARD_FACTOR or GRADIENT_FACTOR.
        name: what is compared, for the message.
        lengths: rows of each sequence, if the first dimension is jagged; they sum to `actual.shape[0]`.
        magnitude: of what is summed and may cancel; 1 / (1 - p) under dropout, more under a scale above the usual one.
    """
    assert actual.dtype == baseline.dtype, f"{name}: {actual.dtype} compared with a {baseline.dtype} baseline"
    assert exact.dtype == torch.float64, f"{name}: the exact result must be float64, got {exact.dtype}"
    assert actual.shape == baseline.shape == exact.shape, f"{name}: {actual.shape}, expected {exact.shape}"
    if actual.numel() == 0:
        return
    not_finite = int((~torch.isfinite(actual)).sum())
    assert not_finite == 0, f"{name}: {not_finite} of {actual.numel()} values are not finite"

    parts = {"whole tensor": slice(None)}
    if lengths is not None:
        assert sum(lengths) == actual.shape[0], f"{name}: lengths sum to {sum(lengths)}, not {actual.shape[0]}"
        begin = 0
        for i, length in enumerate(lengths):
            if length > 0:
                parts[f"sequence {i} of {length} rows"] = slice(begin, begin + length)
            begin += length

    eps = torch.finfo(actual.dtype).eps
    cancellation = max(LEAST_FLOOR, FLOOR_PER_TERM * actual.shape[-1]) * magnitude
    for kind, norm in NORMS.items():
        size = norm(exact)
        for part, rows in parts.items():
            floor = FLOOR_IN_EPS * eps * max(size, norm(exact[rows])) + cancellation
            error = norm(actual[rows].double() - exact[rows])
            baseline_error = norm(baseline[rows].double() - exact[rows])
            limit = factor * baseline_error + floor
            assert error <= limit, (
                f"{name}, {part}: {kind} error {error:.3e} exceeds {limit:.3e} = "
                f"{factor} x {baseline_error:.3e} (plain PyTorch in {actual.dtype}) + {floor:.3e} (rounding)"
            )
