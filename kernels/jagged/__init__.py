"""What the operators on jagged tensors share: the schedule of a batch, launches, reading and writing tiles, checks."""

from kernels.jagged.checks import check_offsets
from kernels.jagged.launch import unavailable_reason
from kernels.jagged.schedule import Schedule

__all__ = ["Schedule", "check_offsets", "unavailable_reason"]
