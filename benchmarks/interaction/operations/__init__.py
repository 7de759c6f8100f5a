"""What is measured: the operations, the work they can't do without, and who does them."""

from benchmarks.interaction.operations.base import OURS, PADDED, Operation, Provider
from benchmarks.interaction.operations.products import JaggedDenseBmm, JaggedJaggedBmm, JaggedScores, JaggedWeightedSum
from benchmarks.interaction.operations.rows import JaggedConcat, JaggedDenseElementwise, JaggedPool, JaggedToPadded
from benchmarks.interaction.operations.softmax import JaggedScoreSoftmax, JaggedSoftmax

__all__ = ["OPERATIONS", "OURS", "PADDED", "PROVIDERS", "Operation", "Provider"]

_ALL: tuple[type[Operation], ...] = (
    JaggedDenseBmm, JaggedJaggedBmm, JaggedScores, JaggedWeightedSum, JaggedSoftmax, JaggedScoreSoftmax,
    JaggedDenseElementwise, JaggedPool, JaggedConcat, JaggedToPadded,
)  # fmt: skip
OPERATIONS: dict[str, type[Operation]] = {operation.name: operation for operation in _ALL}
PROVIDERS = (OURS, PADDED, "torch", "nested", "fbgemm", "sll")
