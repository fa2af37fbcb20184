"""The streaming Gram update G += XᵀX: lower triangle only, mirrored once at the end.

Shapes: T tokens, m width. G is symmetric, so only the square tiles on and below the diagonal are computed: half the
work of a GEMM. What lies above the diagonal keeps its value until `mirror_`, which overwrites it. Kernel, numerics
(how float32 is multiplied) and split-K are those of `cross`, with X on both sides. Wide 16-bit matrices go to
`gram_tma` on sm_90 and sm_100.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisp.kernels import cross, gram_tma

# Up to this width the smaller tiles of the pointer kernel fill a GPU better: at 4096 they are 528, two full rounds of
# 2 · 132 programs on an H100, where 272 tiles of `gram_tma` are two rounds of 132 and a third for 8.
NARROW = 4096


@triton.jit
def mirror_kernel(p_gram, width, TILE: tl.constexpr):
    """One program copies one (TILE, TILE) tile on or below the diagonal to its place above; the diagonal stays."""
    i_row, i_col = cross.triangle(tl.program_id(0))
    o_row = (i_row * TILE + tl.arange(0, TILE)).to(tl.int64)
    o_col = (i_col * TILE + tl.arange(0, TILE)).to(tl.int64)
    is_inside = (o_row < width)[:, None] & (o_col < width)[None, :]
    b_tile = tl.load(p_gram + o_row[:, None] * width + o_col[None, :], mask=is_inside, other=0.0)
    # A tile on the diagonal is written over itself, its lower half with what it holds: no mask differs from element to
    # element, which would forbid vectors of 16 bytes.
    b_upper = tl.where(o_col[:, None] < o_row[None, :], tl.trans(b_tile), b_tile)
    is_inside = (o_col < width)[:, None] & (o_row < width)[None, :]
    tl.store(p_gram + o_col[:, None] * width + o_row[None, :], b_upper, mask=is_inside)


def gram_update_(gram: Tensor, x: Tensor, *, input_precision: str = "ieee") -> None:
    """Add XᵀX to the lower triangle of G, in place.

    Args:
        gram: (m, m) float32, contiguous. Entries above the diagonal keep their values.
        x: (T, m) bfloat16, float16 or float32, any strides, on the device of `gram`. T may be 0.
        input_precision: "ieee", "tf32" or "tf32x3", for float32 inputs; see `cross`.

    Raises:
        ValueError: a shape, dtype, layout, device or precision other than these.
    """
    cross.check_accumulator(gram, (len(gram), len(gram)) if gram.ndim else ())
    cross.check_tokens("x", x, gram, (len(x) if x.ndim else 0, len(gram)))
    cross.check_precision(input_precision)
    if len(gram) > NARROW and gram_tma.serves(gram, x):
        for chunk in x.split(cross.TOKENS_PER_LAUNCH):
            if len(chunk):
                gram_tma.gram_update_(gram, chunk)
    else:
        cross.add_product_(gram, x, x, input_precision=input_precision, lower=True)


def mirror_(gram: Tensor) -> Tensor:
    """Copy the lower triangle of `gram`, (m, m) float32 contiguous, onto the upper one, in place; returns `gram`.

    Raises:
        ValueError: another shape, dtype or layout.
    """
    cross.check_accumulator(gram, (len(gram), len(gram)) if gram.ndim else ())
    if gram.numel():
        rows = -(-len(gram) // 64)
        with torch.cuda.device_of(gram):
            mirror_kernel[(rows * (rows + 1) // 2,)](gram, len(gram), TILE=64, num_warps=4)
    return gram
