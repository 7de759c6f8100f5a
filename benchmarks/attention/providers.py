"""The kernels that are compared, one class each.

A provider is made for a batch, outside the timed region; what it makes there is shared by the layers of a model
(plans, masks). Its call is timed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.attention.shapes import Batch, Inputs
from kernels.score_pitch import count_scores
from recsys.attention import JaggedLayout, MaskSpec, backends
from recsys.attention.interface import Request


class Provider(ABC):
    """Attention over a batch: q, k, v in the provider's own layout to the output in the same."""

    name: ClassVar[str]
    is_ours: ClassVar[bool] = False
    """Not a peer that ours is compared with."""

    @staticmethod
    @abstractmethod
    def absent(device: torch.device) -> str | None:
        """Why it can't run on this device at all (not installed, needs CUDA); None when it can."""

    @staticmethod
    @abstractmethod
    def refuses(batch: Batch) -> str | None:
        """Why it can't do this shape; None when it can."""

    @abstractmethod
    def __init__(self, batch: Batch) -> None: ...

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def convert(self, inputs: Inputs) -> Inputs:
        """The inputs in the provider's layout, made outside the timed region."""
        return inputs

    def restore(self, results: Sequence[Tensor]) -> Sequence[Tensor]:
        """`(out,)` or `(out, dq, dk, dv)` as `(L, H, D)` for the comparison with the reference."""
        return results


def _cannot_import(module: str) -> str | None:
    """Why a module can't be imported; None when it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a binary package that doesn't fit this machine raises anything
        return f"{module} can't be imported ({type(error).__name__}: {error})"
    return None


def _cuda_only(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"it runs on CUDA, not on {device.type}"


def _refuses_masks(batch: Batch, kv_heads: bool = False, targets: bool = False, window: bool = False) -> str | None:
    """Why a provider that knows only the named kinds of shapes can't do this one."""
    shape = batch.shape
    if shape.kv_heads != shape.heads and not kv_heads:
        return "fewer heads of keys than of queries"
    if shape.targets and not targets:
        return "candidates"
    if shape.window and not window:
        return "a window"
    return None


class BackendProvider(Provider):
    """One of the project's attention backends."""

    @classmethod
    def absent(cls, device: torch.device) -> str | None:  # type: ignore[override]
        return backends()[cls.name].unavailable(device)

    @classmethod
    def refuses(cls, batch: Batch) -> str | None:  # type: ignore[override]
        request = Request(batch.device, batch.dtype, batch.shape.head_dim, _mask_spec(batch), dropout_p=0.0)
        return _refuses_masks(batch, targets=True, window=True) or backends()[cls.name].refuses(request)

    def __init__(self, batch: Batch) -> None:
        self.backend = backends()[self.name]
        self.mask = _mask_spec(batch)
        # A layout of its own: it keeps masks of B x S x S, which must go when this provider does.
        self.layout = JaggedLayout(batch.offsets, batch.max_seqlen, batch.total, count_scores(batch.lengths))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.backend(q, k, v, self.layout, self.mask)


def _mask_spec(batch: Batch) -> MaskSpec:
    if batch.num_targets is None:
        return MaskSpec(causal=batch.shape.causal, window=batch.window)
    return MaskSpec(
        causal=batch.shape.causal,
        window=batch.window,
        num_targets=batch.num_targets,
        total_targets=sum(batch.targets),
        max_targets=max(batch.targets),
    )


class Dense(BackendProvider):
    """Pad, explicit softmax."""

    name = "dense"


class Sdpa(BackendProvider):
    """Pad, torch's `scaled_dot_product_attention`."""

    name = "sdpa"


class Varlen(BackendProvider):
    """torch's varlen FlashAttention-2."""

    name = "varlen"


class Jagged(BackendProvider):
    """Ours, unfused: shows what fusing buys."""

    name = "jagged"
    is_ours = True


class Flex(Provider):
    """torch's FlexAttention, compiled, all users in one sequence under a document mask."""

    name = "flex"
    BLOCK = 128

    @staticmethod
    def absent(device: torch.device) -> str | None:
        return _cuda_only(device) or _cannot_import("torch.nn.attention.flex_attention")

    @staticmethod
    def refuses(batch: Batch) -> str | None:
        return None

    def __init__(self, batch: Batch) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        # Each shape is compiled for itself. Without a reset their number would pass Dynamo's limit of
        # recompilations, after which it runs the L x L scores eagerly.
        torch.compiler.reset()
        self.attend: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        self.block_mask = flex_block_mask(batch, self.BLOCK)
        self.has_shared_heads = batch.shape.kv_heads != batch.shape.heads

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = self.attend(q, k, v, block_mask=self.block_mask, enable_gqa=self.has_shared_heads)
        return out[0].transpose(0, 1)


def flex_block_mask(batch: Batch, block: int, rows_at_once: int = 4096) -> Any:
    """The `BlockMask` of a batch's users in one sequence of `L` tokens.

    `create_block_mask` does the same from the whole `(L, L)` mask, several times 10 GB for 100,000 tokens.
    """
    from torch.nn.attention.flex_attention import BlockMask

    user, is_candidate = _tokens(batch)
    causal, window, has_candidates = batch.shape.causal, batch.window, batch.shape.targets > 0

    def sees(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same_user = user[i] == user[j]
        visible = same_user
        if causal:
            visible = visible & (j <= i)
        if window is not None:
            visible = visible & ((i - j).abs() < window)
        if has_candidates:
            visible = (visible | (same_user & is_candidate[i])) & ~is_candidate[j] | (i == j)
        return visible

    total, num_blocks = batch.total, -(-batch.total // block)
    rows_at_once -= rows_at_once % block
    keys = torch.arange(num_blocks * block, device=batch.device)
    some, full = [], []
    for first in range(0, num_blocks * block, rows_at_once):
        rows = torch.arange(first, min(first + rows_at_once, num_blocks * block), device=batch.device)
        is_token = (rows[:, None] < total) & (keys[None, :] < total)
        i, j = rows[:, None].clamp_max(total - 1), keys[None, :].clamp_max(total - 1)
        seen = sees(i, i, i, j) & is_token
        counts = seen.view(-1, block, num_blocks, block).sum(dim=(1, 3))
        some.append((counts > 0) & (counts < block * block))
        full.append(counts == block * block)
    return BlockMask.from_kv_blocks(
        *_listed(torch.cat(some)),
        *_listed(torch.cat(full)),
        BLOCK_SIZE=block,
        mask_mod=sees,
        seq_lengths=(total, total),
    )


def _tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Of every token its user (int32), and whether it is a candidate (bool): `(L,)` each."""
    lengths = torch.tensor(batch.lengths, device=batch.device)
    history = lengths - torch.tensor(batch.targets, device=batch.device)
    user = torch.repeat_interleave(torch.arange(len(batch.lengths), device=batch.device), lengths)
    position = torch.arange(batch.total, device=batch.device) - batch.offsets[user]
    return user.to(torch.int32), position >= history[user]


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """`(rows, columns)` bool as a `BlockMask` wants it: how many per row, and which, those first."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


class FlashAttention4(Provider):
    """FlashAttention-4 (CuTe DSL), which runs on Hopper too."""

    name = "fa4"

    @staticmethod
    def absent(device: torch.device) -> str | None:
        return _cuda_only(device) or _cannot_import("flash_attn.cute")

    @staticmethod
    def refuses(batch: Batch) -> str | None:
        if batch.dtype not in (torch.float16, torch.bfloat16):
            return f"{batch.dtype}"
        return _refuses_masks(batch, kv_heads=True, window=True)

    def __init__(self, batch: Batch) -> None:
        from flash_attn.cute import flash_attn_varlen_func

        self.attend = flash_attn_varlen_func
        reach = None if batch.window is None else batch.window - 1
        self.keywords = {
            "cu_seqlens_q": batch.offsets,
            "cu_seqlens_k": batch.offsets,
            "max_seqlen_q": batch.max_seqlen,
            "max_seqlen_k": batch.max_seqlen,
            "causal": batch.shape.causal,
            "window_size": (reach, None if batch.shape.causal else reach),
        }

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _lse = self.attend(q, k, v, **self.keywords)
        return out


class Sll(Provider):
    """FBGEMM's multi-head jagged flash attention.

    It takes `(H, L, D)`, knows no mask and no scale of the scores, and divides the output by `max_seqlen`: the
    scale goes into q beforehand, and the factor is taken back in the comparison.
    """

    name = "sll"

    @staticmethod
    def absent(device: torch.device) -> str | None:
        return _no_triton(device) or _cannot_import("fbgemm_gpu.sll.triton")

    @staticmethod
    def refuses(batch: Batch) -> str | None:
        return "a causal mask" if batch.shape.causal else _refuses_masks(batch)

    def __init__(self, batch: Batch) -> None:
        from fbgemm_gpu.sll.triton import multi_head_jagged_flash_attention

        self.attend = multi_head_jagged_flash_attention
        self.offsets, self.max_seqlen, self.scale = batch.offsets, batch.max_seqlen, batch.scale

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v, self.offsets, self.max_seqlen)

    def convert(self, inputs: Inputs) -> Inputs:
        q, k, v, dout = (
            x.detach().transpose(0, 1).contiguous()
            for x in (inputs.q.detach() * self.scale, inputs.k, inputs.v, inputs.dout)
        )
        return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)

    def restore(self, results: Sequence[Tensor]) -> Sequence[Tensor]:
        factors = (1.0, self.scale, 1.0, 1.0)  # dq is that of the scaled q
        return [
            x.detach().transpose(0, 1).float() * (self.max_seqlen * factor)
            for x, factor in zip(results, factors, strict=False)
        ]


def _no_triton(device: torch.device) -> str | None:
    """Why a Triton kernel can't run on this device."""
    problem = _cannot_import("kernels.jagged_flash_attention")
    if problem is not None:
        return problem
    from kernels.jagged import unavailable_reason

    return unavailable_reason(device)


class JaggedFlash(Provider):
    """Ours, as one layer alone uses it: whatever it prepares for a batch is made in every call."""

    name = "jagged_flash"
    is_ours = True

    @staticmethod
    def absent(device: torch.device) -> str | None:
        return _no_triton(device)

    @staticmethod
    def refuses(batch: Batch) -> str | None:
        return None  # what it can't do it says itself

    def __init__(self, batch: Batch) -> None:
        from kernels.jagged_flash_attention import jagged_flash_attention

        self.attend = jagged_flash_attention
        self.batch = batch
        self.keywords: dict[str, Any] = {
            "causal": batch.shape.causal,
            "window": batch.window,
            "num_targets": batch.num_targets,
        }

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v, self.batch.offsets, self.batch.max_seqlen, **self.keywords)


class JaggedFlashShared(JaggedFlash):
    """Ours, as the layers of a model use it: the schedule of the batch is made once, before."""

    name = "jagged_flash_shared"

    def __init__(self, batch: Batch) -> None:
        from kernels.jagged import Schedule

        super().__init__(batch)
        self.keywords["schedule"] = Schedule(
            batch.offsets, batch.total, batch.max_seqlen, num_targets=batch.num_targets
        )


_ALL: tuple[type[Provider], ...] = (
    Dense, Sdpa, Varlen, Flex, FlashAttention4, Sll, Jagged, JaggedFlash, JaggedFlashShared,
)  # fmt: skip
PROVIDERS: dict[str, type[Provider]] = {provider.name: provider for provider in _ALL}


def flash_attention_version() -> str | None:
    """Version of the installed FlashAttention-4; None where there is none."""
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None
