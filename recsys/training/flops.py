"""Useful floating-point operations of a step: real tokens and real mask only, recomputation not counted."""

from torch import Tensor, nn

from data.batch import Batch
from recsys.attention.interface import MaskSpec
from recsys.models.config import MixerKind, ModelConfig
from recsys.models.ranking import Interaction

# Dense bf16 peak by device name, TFLOP/s, from the vendor's data sheets.
# The first name that the device's holds counts.
_BF16_PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200 NVL": 835.0,
    "H200": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "B200": 2250.0,
}


def bf16_peak_flops(device_name: str) -> float | None:
    """Peak of the device in FLOP/s, or `None` for a device that isn't listed."""
    return next((peak * 1e12 for name, peak in _BF16_PEAK_TFLOPS.items() if name in device_name), None)


def count_visible_pairs(history: Tensor, candidates: Tensor, mask: MaskSpec) -> int:
    """Query-key pairs that the mask shows, over all users.

    Args:
        history, candidates: `(B,)` lengths on the host.
        mask: causal and window apply to history queries; a candidate sees the history and itself.
    """
    if mask.window is None:
        own = history * (history + 1) // 2 if mask.causal else history * history
    else:
        reach = history.clamp(max=mask.window)  # a query sees `reach` keys, fewer near the start (and the end)
        missing = reach * (reach - 1) // 2
        own = history * reach - missing
        if not mask.causal:
            own = 2 * own - history
    return int((own + candidates * (history + 1)).sum())


class FlopCounter:
    """FLOPs of one training step (forward and backward) of a model, from a batch's host-side lengths."""

    def __init__(self, config: ModelConfig, interaction: Interaction, mask: MaskSpec) -> None:
        tower = interaction.tower
        self.mask = mask
        self.per_joined_token = _linear_flops(tower.blocks)
        self.per_event = _linear_flops(tower.history_in)
        self.per_candidate = (
            _linear_flops(tower.candidate_in)
            + _linear_flops(interaction.heads)
            + sum(
                2 * p.numel() for name, p in interaction.cross.named_parameters() if p.dim() == 2 and "bias" not in name
            )
        )
        self.per_user = _linear_flops(interaction.context)
        self.mixer = config.mixer
        self.per_pair = 4 * config.num_heads * config.head_dim * config.num_layers

    def step(self, batch: Batch) -> float:
        """FLOPs of forward and backward; the backward of a product is two products."""
        forward = (
            self.per_joined_token * (batch.num_history + batch.num_candidates)
            + self.per_event * batch.num_history
            + self.per_candidate * batch.num_candidates
            + self.per_user * batch.num_users
        )
        if self.mixer is MixerKind.attention:
            forward += self.per_pair * count_visible_pairs(batch.history_lengths, batch.candidate_lengths, self.mask)
        elif self.mixer is MixerKind.target:
            forward += self.per_pair * int((batch.history_lengths * batch.candidate_lengths).sum())
        return 3.0 * forward


def _linear_flops(module: nn.Module) -> int:
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
