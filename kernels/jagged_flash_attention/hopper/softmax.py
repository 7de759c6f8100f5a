# mypy: allow-untyped-defs, allow-incomplete-defs
"""Softmax over tiles of finite scores that come one after the other, in few instructions.

What the probabilities of a row are relative to, its shift, need not be the maximum seen so far, only near it: it
cancels when the output is divided by the sum. So a row's shift is raised only when a score passes it by more than 8
powers of two, as in FlashAttention-4. Mostly no row of a warp needs that, and then the warp neither talks about maxima
nor multiplies what it has added up. Whether a row's shift is raised depends on its own scores alone, so a user's result
doesn't depend on who shares the tile. Sums stay apart in the threads until the end.

The compiler decides branches for a whole program only, therefore the assembly. It doesn't know that a warp votes there,
and could, but doesn't, copy it to where warps part: tests/kernels/test_jagged_compiles.py counts the votes.

Names: a tensor in quads is one of (rows, columns) in the layout of wgmma's result, taken as (rows, columns / 8, 4, 2),
where a thread has all of the second and the last dimension, and one of the third. `b_*4` are in quads, or, one number
for a thread's columns, (rows, 4).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit  # pragma: no cover
def in_quads(x):
    """(rows, columns) as (rows, columns / 8, 4, 2)."""
    return x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.jit  # pragma: no cover
def from_quads(x, layout: gl.constexpr):
    """(rows, columns / 8, 4, 2) as (rows, columns) in the layout it came from."""
    return gl.convert_layout(x.reshape([x.shape[0], x.shape[1] * 8]), layout, assert_trivial=True)


@gluon.jit  # pragma: no cover
def spread(x):
    """(rows, 4), for columns in quads."""
    return x.expand_dims(1).expand_dims(3)


@gluon.jit  # pragma: no cover
def sum_of_thread(x):
    """Over a thread's columns in quads: (rows, 4)."""
    return gl.sum(gl.sum(x, 3), 1)


@gluon.jit  # pragma: no cover
def max_of_thread(x):
    """Over a thread's columns in quads: (rows, 4)."""
    return gl.max(gl.max(x, 3), 1)


@gluon.jit  # pragma: no cover
def mask_scores(b_s, i_m, i_n, h, CAUSAL: gl.constexpr):
    """-inf where a query does not see a history key.

    In quads, so that a thread compares one number a row with constants.
    """
    BM: gl.constexpr = b_s.shape[0]
    BN: gl.constexpr = b_s.shape[1]
    layout_s: gl.constexpr = b_s.type.layout
    b_s4 = in_quads(b_s)
    layout: gl.constexpr = b_s4.type.layout
    o_8 = gl.arange(0, BN // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
    o_2 = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    o_4 = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))
    o_n = o_8.expand_dims(0).expand_dims(2).expand_dims(3) * 8 + o_2.expand_dims(0).expand_dims(1).expand_dims(2)
    end = h - i_n
    if CAUSAL:
        o_m = gl.arange(0, BM, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
        end = gl.minimum(i_m - i_n + 1 + o_m, end).expand_dims(1).expand_dims(2).expand_dims(3)
    b_s4 = gl.where(o_n < end - o_4.expand_dims(0).expand_dims(1).expand_dims(3) * 2, b_s4, float("-inf"))
    return from_quads(b_s4, layout_s)


@gluon.jit  # pragma: no cover
def begin_softmax(b_s, scale_log2):
    """Of the first tile: probabilities in quads, sums and shifts (rows, 4).

    A row that sees nothing in the first tile sees nothing at all, and has a sum of zero.
    """
    layout_s: gl.constexpr = b_s.type.layout
    b_max = gl.max(b_s, 1)
    b_shift = gl.where(b_max == float("-inf"), 0.0, b_max) * scale_log2
    b_p4 = in_quads(gl.exp2(b_s * scale_log2 - b_shift[:, None]))
    # (rows,) as (rows, 4).
    b_shift4 = max_of_thread(in_quads(b_shift[:, None] + gl.zeros(b_s.shape, gl.float32, layout_s)))
    return b_p4, sum_of_thread(b_p4), b_shift4


@gluon.jit  # pragma: no cover
def raise_shift(b_top4, b_shift4, scale_log2):
    """New shift, decay of what was added up before, and whether either is new in this warp; all (rows, 4).

    b_top4: the highest score of the thread's columns, not scaled.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .pred p, q;
        .reg .f32 a, b, c, d, e, f;
        mul.f32 a, $6, $10;
        mul.f32 b, $7, $11;
        add.f32 c, $0, 0f41000000;  // 8, the room that is left
        add.f32 d, $1, 0f41000000;
        setp.gt.f32 p, a, c;
        setp.gt.or.f32 p, b, d, p;
        mov.f32 $2, 0f3F800000;
        mov.f32 $3, 0f3F800000;
        mov.b32 $4, 0;
        mov.b32 $5, 0;
        vote.sync.any.pred p, p, 0xffffffff;
        @!p bra.uni done;
        shfl.sync.bfly.b32 e, a, 1, 31, 0xffffffff;
        shfl.sync.bfly.b32 f, b, 1, 31, 0xffffffff;
        max.f32 a, a, e;
        max.f32 b, b, f;
        shfl.sync.bfly.b32 e, a, 2, 31, 0xffffffff;
        shfl.sync.bfly.b32 f, b, 2, 31, 0xffffffff;
        max.f32 a, a, e;
        max.f32 b, b, f;
        setp.gt.f32 p, a, c;
        setp.gt.f32 q, b, d;
        selp.f32 a, a, $0, p;
        selp.f32 b, b, $1, q;
        sub.f32 c, $0, a;
        sub.f32 d, $1, b;
        ex2.approx.ftz.f32 $2, c;
        ex2.approx.ftz.f32 $3, d;
        mov.f32 $0, a;
        mov.f32 $1, b;
        mov.b32 $4, 1;
        mov.b32 $5, 1;
        done:
        }
        """,
        # 0 and 1: shift, 2 and 3: decay, 4 and 5: whether new; 6 and 7: top, 8 and 9: shift, 10 and 11: scale
        "=&f,=&f,=&f,=&f,=&r,=&r,f,f,0,1,f,f",
        [b_top4, b_shift4, scale_log2],
        dtype=(gl.float32, gl.float32, gl.int32), is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit  # pragma: no cover
def next_probabilities(b_s, b_shift4, scale_log2):
    """Of a further tile: probabilities in quads, new shift, and what `raise_shift` says of the old ones."""
    b_s4 = in_quads(b_s)
    b_shift4, b_decay4, b_new4 = raise_shift(max_of_thread(b_s4), b_shift4, scale_log2)
    return gl.exp2(b_s4 * scale_log2 - spread(b_shift4)), b_shift4, b_decay4, b_new4


def _rescaling(num: int) -> tuple[str, str]:
    """Assembly and constraints: num accumulators times their decays, if the first flag is set."""
    products = "".join(f"mul.f32 ${i}, ${i}, ${2 * num + i}; " for i in range(num))
    assembly = f"{{ .reg .pred p; setp.ne.s32 p, ${3 * num}, 0; @!p bra.uni done; {products} done: }}"
    tied = [str(i) for i in range(num)]
    return assembly, ",".join(["=&f"] * num + tied + ["f"] * num + ["r"] * num)


RESCALE_16, RESCALE_16_CONSTRAINTS = (gl.constexpr(x) for x in _rescaling(16))
RESCALE_32, RESCALE_32_CONSTRAINTS = (gl.constexpr(x) for x in _rescaling(32))


@gluon.jit  # pragma: no cover
def rescale(b_acc, b_decay4, b_new4):
    """b_acc * b_decay4, if the shift of any row of the warp is new."""
    layout_acc: gl.constexpr = b_acc.type.layout
    b_acc4 = in_quads(b_acc)
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, b_acc4.type.layout))
    b_decay4 = spread(gl.convert_layout(b_decay4, layout, assert_trivial=True))
    b_new4 = spread(gl.convert_layout(b_new4, layout, assert_trivial=True))
    if b_acc.shape[1] >= 64:
        b_acc4 = gl.inline_asm_elementwise(
            RESCALE_32, RESCALE_32_CONSTRAINTS, [b_acc4, b_decay4, b_new4], dtype=gl.float32, is_pure=False, pack=32
        )
    else:
        b_acc4 = gl.inline_asm_elementwise(
            RESCALE_16, RESCALE_16_CONSTRAINTS, [b_acc4, b_decay4, b_new4], dtype=gl.float32, is_pure=False, pack=16
        )
    return from_quads(b_acc4, layout_acc)


@gluon.jit  # pragma: no cover
def end_softmax(b_sum4, b_shift4, layout_row: gl.constexpr):
    """Shifts and sums of rows, (rows,). A row's four shifts are equal."""
    b_sum = gl.convert_layout(gl.sum(b_sum4, 1), layout_row)
    return gl.convert_layout(gl.max(b_shift4, 1), layout_row), b_sum


@gluon.jit  # pragma: no cover
def log2(x):
    """Approximate, for sums: of the rows that are stored they are no less than 2 ** -8."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit  # pragma: no cover
def reciprocal(x):
    """Approximate, like `log2` for sums."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)
