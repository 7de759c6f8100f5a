"""Pre-norm transformer block on a jagged sequence.

Shapes: `S` tokens of the joined sequence, `W` model width, `H` heads, `D` head dim.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.layers.mixers import Mixer


class SwiGLU(nn.Module):
    """Gated feed-forward `W_out (silu(x W_gate) * x W_up)` (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate_and_up = nn.Linear(width, 2 * hidden_width, bias=False)
        self.out = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x_SW: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x_SW).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class JaggedBlock(nn.Module):
    """`x + mix(norm(x))`, then `x + ffn(norm(x))`, on `(S, W)` values.

    Args:
        mixer: how tokens of a user meet: attention, or mean pooling for comparison.
        width, num_heads, head_dim, ffn_width: sizes; `num_heads * head_dim` need not be `width`.
        dropout: probability on both residual branches.
        compiled: whether `torch.compile` fuses what is done token by token; the mixer is called as it is.
    """

    def __init__(
        self,
        mixer: Mixer,
        *,
        width: int,
        num_heads: int,
        head_dim: int,
        ffn_width: int,
        dropout: float,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.mixer = mixer
        self.mixer_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * num_heads * head_dim, bias=False)
        self.mixer_out = nn.Linear(num_heads * head_dim, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width)
        self.ffn = SwiGLU(width, ffn_width)
        self.dropout = nn.Dropout(dropout)
        self.compiled = compiled

    def forward(self, x_SW: Tensor, context: object) -> Tensor:
        before, after = _compiled_halves() if self.compiled else (_before_mixing, _after_mixing)
        qkv_S3HD = before(self, x_SW).unflatten(-1, (3, self.num_heads, self.head_dim))
        mixed_SHD = self.mixer(*torch.unbind(qkv_S3HD, dim=1), context)
        return after(self, x_SW, mixed_SHD.flatten(1))


def _before_mixing(block: JaggedBlock, x_SW: Tensor) -> Tensor:
    return block.qkv(block.mixer_norm(x_SW))


def _after_mixing(block: JaggedBlock, x_SW: Tensor, mixed_SE: Tensor) -> Tensor:
    x_SW = x_SW + block.dropout(block.mixer_out(mixed_SE))
    return x_SW + block.dropout(block.ffn(block.ffn_norm(x_SW)))


@functools.cache
def _compiled_halves() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Compiled once for all blocks; for any number of tokens, since every batch has another."""
    return torch.compile(_before_mixing, dynamic=True), torch.compile(_after_mixing, dynamic=True)
