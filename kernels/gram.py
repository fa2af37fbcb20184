"""The streaming Gram update G += XᵀX: lower triangle only, mirrored once at the end.

Shapes: T tokens, m width. G is symmetric, so only the square tiles on and below the diagonal are computed: half the
work of a GEMM. Nothing above the diagonal is read or written before `mirror_`, which overwrites it.
Numerics: 16-bit products are exact in float32 and sums are float32; float32 inputs are multiplied at IEEE precision
(no TF32).
Traffic: a launch reads and writes the triangle once, which T tokens amortise; but the tensor cores truncate their
sums, a bias that grows with the tokens per accumulator. `TOKENS_PER_LAUNCH` stands between the two.
Wide 16-bit matrices on sm_90 and sm_100 go to `gram_tma`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisp.kernels import gram_tma

TOKENS_PER_LAUNCH = 16384
# Below this width, tiles of 128 are too few to occupy every multiprocessor of a large GPU.
NARROW = 3072


@triton.jit
def _triangle(i_tile):
    """(row, column), row >= column, of tile `i_tile` when the lower triangle is counted row by row."""
    # Row r starts at r(r + 1)/2, so r = ⌊(√(8i + 1) − 1)/2⌋; the float32 root may miss by one, the integers decide.
    row = ((tl.sqrt(8.0 * i_tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > i_tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= i_tile, row + 1, row)
    return row, i_tile - row * (row + 1) // 2


@triton.jit
def gram_update_kernel(
    p_gram, p_x, num_tokens, width, stride_token, stride_unit, TILE: tl.constexpr, TILE_T: tl.constexpr
):
    """One program adds the tokens' contribution to one (TILE, TILE) tile of G; TILE_T tokens per step."""
    i_row, i_col = _triangle(tl.program_id(0))
    o_row = (i_row * TILE + tl.arange(0, TILE)).to(tl.int64)
    o_col = (i_col * TILE + tl.arange(0, TILE)).to(tl.int64)
    o_token = tl.arange(0, TILE_T).to(tl.int64)
    p_row = p_x + o_token[:, None] * stride_token + o_row[None, :] * stride_unit
    p_col = p_x + o_token[:, None] * stride_token + o_col[None, :] * stride_unit
    step = tl.full((), TILE_T, tl.int64) * stride_token
    b_sum = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, num_tokens, TILE_T):
        is_token = (o_token < num_tokens - start)[:, None]
        b_row = tl.load(p_row, mask=is_token & (o_row < width)[None, :], other=0.0)
        b_col = tl.load(p_col, mask=is_token & (o_col < width)[None, :], other=0.0)
        b_sum = tl.dot(tl.trans(b_row), b_col, b_sum, input_precision="ieee")
        p_row += step
        p_col += step
    p_tile = p_gram + o_row[:, None] * width + o_col[None, :]
    is_lower = (o_row < width)[:, None] & (o_row[:, None] >= o_col[None, :])
    tl.store(p_tile, tl.load(p_tile, mask=is_lower, other=0.0) + b_sum, mask=is_lower)


@triton.jit
def mirror_kernel(p_gram, width, TILE: tl.constexpr):
    """One program copies one (TILE, TILE) tile below the diagonal to its place above; the diagonal stays."""
    i_row, i_col = _triangle(tl.program_id(0))
    o_row = (i_row * TILE + tl.arange(0, TILE)).to(tl.int64)
    o_col = (i_col * TILE + tl.arange(0, TILE)).to(tl.int64)
    is_lower = (o_row < width)[:, None] & (o_row[:, None] > o_col[None, :])
    b_tile = tl.load(p_gram + o_row[:, None] * width + o_col[None, :], mask=is_lower, other=0.0)
    p_upper = p_gram + o_col[:, None] * width + o_row[None, :]
    tl.store(p_upper, tl.trans(b_tile), mask=(o_row < width)[None, :] & (o_col[:, None] < o_row[None, :]))


def gram_update_(gram: Tensor, x: Tensor) -> None:
    """Add XᵀX to the lower triangle of G, in place.

    Args:
        gram: (m, m) float32, contiguous. Entries above the diagonal are neither read nor written.
        x: (T, m) bfloat16, float16 or float32, any strides, on the device of `gram`. T may be 0.

    Raises:
        ValueError: a shape, dtype, layout or device other than these.
    """
    _check_gram(gram)
    if x.ndim != 2 or x.shape[1] != gram.shape[0] or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"gram_update_: expected x of shape (T, {gram.shape[0]}) in bfloat16, float16 or float32, got "
            f"{tuple(x.shape)} {x.dtype}. Reshape or cast it."
        )
    if x.device != gram.device:
        raise ValueError(f"gram_update_: expected x on {gram.device} like gram, got {x.device}. Move one of them.")
    width = gram.shape[0]
    options = config(width, x.dtype, unit_stride=x.stride(1) == 1)
    with torch.cuda.device_of(gram):
        for chunk in x.split(TOKENS_PER_LAUNCH):
            if chunk.numel() and width >= NARROW and gram_tma.serves(gram, chunk):
                gram_tma.gram_update_(gram, chunk)
            elif chunk.numel():
                gram_update_kernel[(_num_tiles(width, options["TILE"]),)](
                    gram, chunk, chunk.shape[0], width, chunk.stride(0), chunk.stride(1), **options
                )


def mirror_(gram: Tensor) -> Tensor:
    """Copy the lower triangle of `gram`, (m, m) float32 contiguous, onto the upper one, in place; returns `gram`.

    Raises:
        ValueError: another shape, dtype or layout.
    """
    _check_gram(gram)
    if gram.numel():
        with torch.cuda.device_of(gram):
            mirror_kernel[(_num_tiles(gram.shape[0], 64),)](gram, gram.shape[0], TILE=64, num_warps=4)
    return gram


def config(width: int, dtype: torch.dtype, *, unit_stride: bool = True) -> dict[str, int]:
    """Tile sizes and launch options of `gram_update_kernel`: fixed by shape, for tuning would run on the live G.

    All fit the 99 KB of shared memory of the smallest supported GPU (sm_86, sm_89, sm_120). Where neighbouring units
    are not neighbours in memory (`unit_stride` false), the addresses of a large tile would not fit the registers.
    """
    if dtype == torch.float32 or not unit_stride:
        return {"TILE": 64, "TILE_T": 32, "num_warps": 8, "num_stages": 2}
    if width < NARROW:
        return {"TILE": 64, "TILE_T": 64, "num_warps": 4, "num_stages": 3}
    return {"TILE": 128, "TILE_T": 64, "num_warps": 8, "num_stages": 3}


def _num_tiles(width: int, tile: int) -> int:
    rows = -(-width // tile)
    return rows * (rows + 1) // 2


def _check_gram(gram: Tensor) -> None:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.dtype != torch.float32 or not gram.is_contiguous():
        raise ValueError(
            f"Gram matrix: expected a contiguous square float32 matrix, got {tuple(gram.shape)} {gram.dtype} with "
            f"strides {gram.stride()}. Allocate it with torch.zeros(m, m)."
        )
