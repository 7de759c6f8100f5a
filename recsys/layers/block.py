"""Pre-norm transformer block on a jagged sequence.

Shapes: `S` tokens of the joined sequence, `W` model width, `H` heads, `D` head dim.
"""

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
    """

    def __init__(
        self, mixer: Mixer, *, width: int, num_heads: int, head_dim: int, ffn_width: int, dropout: float
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

    def forward(self, x_SW: Tensor, context: object) -> Tensor:
        qkv_S3HD = self.qkv(self.mixer_norm(x_SW)).unflatten(-1, (3, self.num_heads, self.head_dim))
        mixed_SHD = self.mixer(*torch.unbind(qkv_S3HD, dim=1), context)
        x_SW = x_SW + self.dropout(self.mixer_out(mixed_SHD.flatten(1)))
        return x_SW + self.dropout(self.ffn(self.ffn_norm(x_SW)))
