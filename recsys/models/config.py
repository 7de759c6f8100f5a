"""Sizes of a model."""

from dataclasses import dataclass, field
from enum import Enum

from recsys.checks import at_least, between


class MixerKind(Enum):
    """How the tokens of a user meet in a block."""

    attention = "attention"
    target = "target"
    mean_pool = "mean_pool"


class Precision(Enum):
    """Arithmetic of the dense part; tables and optimizer states are float32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class ModelConfig:
    """The ranking model; the presets are `configs/model/*.yaml`."""

    name: str = "tiny"
    """Name of the preset, for run directories and reports."""

    embedding_dim: int = 32
    """Embedding dimension of every table not named in `embedding_dims`; a multiple of 4."""

    embedding_dims: dict[str, int] = field(default_factory=dict)
    """Embedding dimension by table name."""

    width: int = 64
    """Width of the residual stream."""

    num_layers: int = 2
    """Jagged transformer blocks."""

    num_heads: int = 2
    """Attention heads."""

    head_dim: int = 32
    """Width of a head, 16 to 256."""

    ffn_width: int = 128
    """Hidden width of the SwiGLU feed-forward."""

    mixer: MixerKind = MixerKind.attention
    """`target`: candidates attend to the history, which doesn't attend to itself. `mean_pool` replaces attention by the
    mean over the same visible tokens, for comparison."""

    max_history: int = 256
    """Longest history in events; longer ones are cut to their newest events."""

    num_time_buckets: int = 64
    """Log-spaced buckets (two per doubling of seconds) of event age and gap."""

    dropout: float = 0.0
    """Probability on the residual branches."""

    context_width: int = 32
    """Width that pooled context and dense features are projected to."""

    cross_layers: int = 2
    """Low-rank DCN-v2 cross layers."""

    cross_rank: int = 32
    """Rank of a cross layer."""

    head_widths: list[int] = field(default_factory=lambda: [64])
    """Hidden widths of each task's head."""

    learning_rate: float = 2e-3
    """Peak rate of the dense optimizer that suits this size: wider models want smaller ones. `configs/optimizer`
    takes `optimizer.dense.lr` from it."""

    precision: Precision = Precision.auto
    """`auto`: bf16 autocast on CUDA, fp32 on a CPU."""

    compiled: bool = False
    """Whether `torch.compile` fuses what the blocks do token by token: norms, activations, residuals. The first steps
    wait for it, about a minute."""

    def __post_init__(self) -> None:
        for name in (
            "width",
            "num_layers",
            "num_heads",
            "ffn_width",
            "max_history",
            "context_width",
            "cross_layers",
            "cross_rank",
        ):
            at_least(f"model.{name}", getattr(self, name), 1)
        between("model.head_dim", self.head_dim, 16, 256)
        at_least("model.learning_rate", self.learning_rate, 0.0)
        at_least("model.num_time_buckets", self.num_time_buckets, 2)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout is {self.dropout}: allowed are 0 <= dropout < 1")
        for width in self.head_widths:
            at_least("model.head_widths", width, 1)
        for table, dim in [("embedding_dim", self.embedding_dim), *self.embedding_dims.items()]:
            if dim < 4 or dim % 4:
                raise ValueError(f"model: {table} has embedding dimension {dim}: allowed are multiples of 4")
