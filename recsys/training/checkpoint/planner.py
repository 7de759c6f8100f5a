"""`torch.distributed.checkpoint` planners over arrays that lie in pieces on the ranks.

TorchRec gives sharded tables as ShardedTensor or DTensor, fused optimizer states in shapes of their own,
and nothing on a rank that owns no part. Here a logical array is its global shape and the boxes of it that
this rank holds, perhaps none, so that saving and loading under any two plans is one code path.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


@dataclass(frozen=True)
class Piece:
    """A box of a logical array: a view into the live tensor, and where its corner lies."""

    tensor: Tensor
    offsets: tuple[int, ...]

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size(self.offsets), sizes=self.tensor.shape)


@dataclass
class Array:
    """A logical array of the checkpoint and this rank's pieces; replicated ones are whole everywhere."""

    shape: tuple[int, ...]
    pieces: list[Piece] = field(default_factory=list)

    @classmethod
    def whole(cls, tensor: Tensor) -> "Array":
        """A replicated tensor; a scalar counts as a vector of one."""
        view = tensor.detach().as_subclass(Tensor)
        view = view.reshape(1) if view.dim() == 0 else view
        return cls(tuple(view.shape), [Piece(view, (0,) * view.dim())])

    def add(self, tensor: Tensor, offsets: tuple[int, ...]) -> None:
        """Add a piece; an empty one is nothing to write or read."""
        assert tensor.dim() == len(self.shape) == len(offsets)
        assert all(o + n <= s for o, n, s in zip(offsets, tensor.shape, self.shape, strict=True))
        if tensor.numel():
            self.pieces.append(Piece(tensor, offsets))


Arrays = Mapping[str, Array]


class ArraySavePlanner(DefaultSavePlanner):
    """Writes this rank's pieces; of replicated ones, DCP lets one rank write each."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.arrays = arrays

    def create_local_plan(self) -> SavePlan:
        """One write item for each piece."""
        items = [
            WriteItem(
                index=MetadataIndex(name, piece.chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=piece.chunk,
                    properties=TensorProperties(dtype=piece.tensor.dtype),
                    size=torch.Size(array.shape),
                ),
            )
            for name, array in self.arrays.items()
            for piece in array.pieces
        ]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The piece that a write item names."""
        return _find(self.arrays, index)


class ArrayLoadPlanner(DefaultLoadPlanner):
    """Reads into this rank's pieces whatever parts of the saved boxes overlap them."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.arrays = arrays

    def create_local_plan(self) -> LoadPlan:
        """Read items for each piece."""
        assert self.metadata is not None
        items = []
        for name, array in self.arrays.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not array.pieces:
                continue
            if not isinstance(saved, TensorStorageMetadata) or tuple(saved.size) != array.shape:
                found = tuple(saved.size) if isinstance(saved, TensorStorageMetadata) else "nothing"
                raise ValueError(f"the checkpoint holds {found} under {name}, {array.shape} was expected")
            items += create_read_items_for_chunk_list(name, saved, [piece.chunk for piece in array.pieces])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The piece that a read item fills."""
        return _find(self.arrays, index)


def _find(arrays: Arrays, index: MetadataIndex) -> Tensor:
    assert index.offset is not None
    return next(p.tensor for p in arrays[index.fqn].pieces if p.offsets == tuple(index.offset))
