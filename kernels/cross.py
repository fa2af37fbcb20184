"""Streaming products of two activations, C += XᵀY, and the kernel that the Gram update shares with them.

Shapes: T tokens, X (T, m), Y (T, d), C (m, d) float32.
Numerics: 16-bit products are exact in float32 and sums are float32.
`input_precision` says how float32 inputs are multiplied: "ieee" exactly as float32, on the ordinary units; "tf32" with
10 bits of mantissa, on the matrix units; "tf32x3" as three such products, close to float32. 16-bit inputs ignore it.
Floor: 2Tmd FLOPs (Tm² on a triangle), 2T(m + d) bytes of 16-bit input and 8md bytes of C a launch.
For 16-bit XᵀY, cuBLAS is expected to be faster on an H100 (derived: 650 TFLOP/s against 420 to 500 here, whose operands
do not come by the copy engine): `minisp.ops` takes it where both serve.
Split-K: where tiles are fewer than the programs that a GPU runs at once, several programs share a tile's tokens. The
first adds to C, the others write partial sums, and a second kernel adds those in order: no atomics, and the same bits
from the same shapes on the same GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRECISIONS = ("ieee", "tf32", "tf32x3")
# Tensor cores truncate their sums, a bias that grows with the tokens per launch; reading and writing C costs less of
# the time the more tokens share it.
TOKENS_PER_LAUNCH = 16384
# Two programs run at once on a multiprocessor of sm_90 (at most 128 registers, which tests/kernels holds, and 98 KB
# each); elsewhere they take turns.
PROGRAMS_PER_MULTIPROCESSOR = 2
# With fewer tokens, a split spends more time on its partial sums (128 KB written and read again) than on products.
TOKENS_PER_SPLIT = 1024


@triton.jit
def triangle(i_tile):
    """(row, column), row >= column, of tile `i_tile` when the lower triangle is counted row by row."""
    # Row r starts at r(r + 1)/2, so r = ⌊(√(8i + 1) − 1)/2⌋; the float32 root may miss by one, the integers decide.
    row = ((tl.sqrt(8.0 * i_tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > i_tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= i_tile, row + 1, row)
    return row, i_tile - row * (row + 1) // 2


@triton.jit
def _place(i_tile, num_cols, LOWER: tl.constexpr, TILE: tl.constexpr):
    """First row and first column of a tile of C."""
    if LOWER:
        i_row, i_col = triangle(i_tile)
    else:
        tiles_wide = tl.cdiv(num_cols, TILE)
        i_row, i_col = i_tile // tiles_wide, i_tile % tiles_wide
    return i_row * TILE, i_col * TILE


@triton.jit
def _add_columns(
    p_out, b_sum, first_row, first_col, num_rows, num_cols, LOWER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Add a (ROWS, COLS) tile to C where it lies in C; with LOWER, what lies above the diagonal keeps its value."""
    o_row = (first_row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    o_col = (first_col + tl.arange(0, COLS))[None, :]
    is_inside = (o_row < num_rows) & (o_col < num_cols)
    p_tile = p_out + o_row * num_cols + o_col
    # A mask that differs from element to element would forbid vectors of 16 bytes: above the diagonal, zeros are added.
    if LOWER:
        is_lower = tl.arange(0, COLS)[None, :] - tl.arange(0, ROWS)[:, None] <= first_row - first_col
        b_sum = tl.where(is_lower, b_sum, 0.0)
    tl.store(p_tile, tl.load(p_tile, mask=is_inside, other=0.0) + b_sum, mask=is_inside)


@triton.jit
def _halves(b_tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of the columns of a (ROWS, COLS) tile."""
    return tl.split(tl.permute(tl.reshape(b_tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def _add_tile(p_out, b_sum, first_row, first_col, num_rows, num_cols, LOWER: tl.constexpr, TILE: tl.constexpr):
    """Add a (TILE, TILE) tile to C, a quarter of its columns at a time: registers cannot hold all addresses."""
    QUARTER: tl.constexpr = TILE // 4
    b_left, b_right = _halves(b_sum, TILE, TILE)
    b_0, b_1 = _halves(b_left, TILE, TILE // 2)
    b_2, b_3 = _halves(b_right, TILE, TILE // 2)
    _add_columns(p_out, b_0, first_row, first_col, num_rows, num_cols, LOWER, TILE, QUARTER)
    _add_columns(p_out, b_1, first_row, first_col + QUARTER, num_rows, num_cols, LOWER, TILE, QUARTER)
    _add_columns(p_out, b_2, first_row, first_col + 2 * QUARTER, num_rows, num_cols, LOWER, TILE, QUARTER)
    _add_columns(p_out, b_3, first_row, first_col + 3 * QUARTER, num_rows, num_cols, LOWER, TILE, QUARTER)


@triton.jit
def cross_update_kernel(
    p_out, p_x, p_y, p_partial, num_tokens, tokens_per_split, num_rows, num_cols,
    stride_x_token, stride_x_unit, stride_y_token, stride_y_unit,
    LOWER: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    """Program (i, s) sums the tokens of split s for the (TILE, TILE) tile i of C, TILE_T tokens per step.

    Split 0 adds its sum to C; split s > 0 writes it to p_partial (splits − 1, tiles, TILE, TILE). With LOWER, C is
    square, only its tiles on and below the diagonal are computed, and what lies above the diagonal keeps its value.
    """
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    first_row, first_col = _place(i_tile, num_cols, LOWER, TILE)
    o_row = first_row.to(tl.int64) + tl.arange(0, TILE)
    o_col = first_col.to(tl.int64) + tl.arange(0, TILE)
    first = i_split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, num_tokens)
    o_token = first.to(tl.int64) + tl.arange(0, TILE_T)
    p_left = p_x + o_token[:, None] * stride_x_token + o_row[None, :] * stride_x_unit
    p_right = p_y + o_token[:, None] * stride_y_token + o_col[None, :] * stride_y_unit
    b_sum = tl.zeros((TILE, TILE), tl.float32)
    for start in range(first, last, TILE_T):
        is_token = start + tl.arange(0, TILE_T) < last
        b_left = tl.load(p_left, mask=is_token[:, None] & (o_row < num_rows)[None, :], other=0.0)
        b_right = tl.load(p_right, mask=is_token[:, None] & (o_col < num_cols)[None, :], other=0.0)
        b_sum = tl.dot(tl.trans(b_left), b_right, b_sum, input_precision=PRECISION)
        p_left += tl.full((), TILE_T, tl.int64) * stride_x_token
        p_right += tl.full((), TILE_T, tl.int64) * stride_y_token
    if i_split == 0:
        _add_tile(p_out, b_sum, first_row, first_col, num_rows, num_cols, LOWER, TILE)
    else:
        i_partial = (i_split - 1).to(tl.int64) * tl.num_programs(0) + i_tile
        o_inner = tl.arange(0, TILE)
        tl.store(p_partial + i_partial * TILE * TILE + o_inner[:, None] * TILE + o_inner[None, :], b_sum)


@triton.jit
def add_partials_kernel(
    p_out, p_partial, num_partials, num_rows, num_cols, LOWER: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """One program adds up the partial sums of one tile, first to last, and adds the result to C."""
    i_tile = tl.program_id(0)
    o_inner = tl.arange(0, TILE)
    p_next = p_partial + i_tile.to(tl.int64) * TILE * TILE + o_inner[:, None] * TILE + o_inner[None, :]
    b_sum = tl.zeros((TILE, TILE), tl.float32)
    for _ in range(num_partials):
        b_sum += tl.load(p_next)
        p_next += tl.num_programs(0).to(tl.int64) * TILE * TILE
    first_row, first_col = _place(i_tile, num_cols, LOWER, TILE)
    _add_tile(p_out, b_sum, first_row, first_col, num_rows, num_cols, LOWER, TILE)


def cross_update_(cross: Tensor, x: Tensor, y: Tensor, *, input_precision: str = "ieee") -> None:
    """Add XᵀY to C, in place.

    Args:
        cross: C (m, d) float32, contiguous.
        x, y: (T, m) and (T, d) of one dtype (bfloat16, float16, float32), any strides, on the device of C. T may be 0.
        input_precision: "ieee", "tf32" or "tf32x3", for float32 inputs; see the module.

    Raises:
        ValueError: a shape, dtype, layout, device or precision other than these.
    """
    check_accumulator(cross, tuple(cross.shape) if cross.ndim == 2 else (0, 0))
    for name, side, width in (("x", x, cross.shape[0]), ("y", y, cross.shape[1])):
        check_tokens(name, side, cross, (len(x) if x.ndim else 0, width))
    if x.dtype != y.dtype:
        raise ValueError(f"Product: expected x and y of one dtype, got {x.dtype} and {y.dtype}. Cast one of them.")
    check_precision(input_precision)
    add_product_(cross, x, y, input_precision=input_precision, lower=False)


def add_product_(out: Tensor, x: Tensor, y: Tensor, *, input_precision: str, lower: bool) -> None:
    """Launch the kernels on arguments that have been checked; with `lower`, on and below the diagonal alone.

    Partial sums take at most 2 · (multiprocessors) tiles of float32: 17 MB on an H100.
    """
    if out.numel() == 0:
        return
    # Multiples of 16 are what the compiler is told about, and what it needs to load 16 bytes at a time.
    sizes = (*out.shape, x.stride(0), y.stride(0), x.data_ptr(), y.data_ptr(), out.data_ptr())
    aligned = x.stride(1) == y.stride(1) == 1 and all(size % 16 == 0 for size in sizes)
    options = config(x.dtype, aligned=aligned, input_precision=input_precision)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    precision = input_precision if x.dtype == torch.float32 else "ieee"
    rows, cols = (-(-n // options["TILE"]) for n in out.shape)
    tiles = rows * (rows + 1) // 2 if lower else rows * cols
    with torch.cuda.device_of(out):
        for start in range(0, len(x), TOKENS_PER_LAUNCH):
            part = slice(start, start + TOKENS_PER_LAUNCH)
            left, right = x[part], y[part]
            splits, tokens = split_tokens(tiles, len(left), multiprocessors(out.device))
            partial = out.new_empty(max(splits - 1, 0), tiles, options["TILE"], options["TILE"])
            cross_update_kernel[(tiles, splits)](
                out, left, right, partial, len(left), tokens, *out.shape, *left.stride(), *right.stride(),
                LOWER=lower, PRECISION=precision, **options, **launch,
            )  # fmt: skip
            if splits > 1:
                add_partials_kernel[(tiles,)](
                    out, partial, splits - 1, *out.shape, LOWER=lower, TILE=options["TILE"], num_warps=8
                )


def config(dtype: torch.dtype, *, aligned: bool = True, input_precision: str = "ieee") -> dict[str, int]:
    """Tile sizes and launch options: fixed, for tuning would run on the live accumulator.

    All fit the 99 KB of shared memory of the smallest supported GPU (sm_86, sm_89, sm_120). Where rows are not whole
    vectors of 16 bytes (`aligned` false: odd widths, units apart), every element has an address, and those of a large
    tile would not fit the registers; nor would the operands of IEEE products on the ordinary units, nor the parts of a
    threefold product.
    """
    if dtype != torch.float32 and aligned:
        return {"TILE": 128, "TILE_T": 64, "num_warps": 8, "num_stages": 3}
    if input_precision == "tf32" and aligned:
        return {"TILE": 128, "TILE_T": 32, "num_warps": 8, "num_stages": 3}
    return {"TILE": 64, "TILE_T": 32, "num_warps": 8, "num_stages": 2}


def split_tokens(tiles: int, num_tokens: int, processors: int) -> tuple[int, int]:
    """How many programs share a tile's tokens so that all fill the GPU once, and how many tokens each of them sums."""
    wanted = min(PROGRAMS_PER_MULTIPROCESSOR * processors // tiles, num_tokens // TOKENS_PER_SPLIT)
    tokens = -(-num_tokens // max(wanted, 1))
    # No split begins within a step: 64 is the longest.
    tokens = -(-tokens // 64) * 64
    return -(-num_tokens // tokens), tokens


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def check_accumulator(out: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless `out` is a contiguous float32 matrix of this shape."""
    if out.ndim != 2 or tuple(out.shape) != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"Accumulator: expected a contiguous float32 matrix{f' of shape {shape}' if out.ndim == 2 else ''}, got "
            f"{tuple(out.shape)} {out.dtype} with strides {out.stride()}. Allocate it with torch.zeros(rows, columns)."
        )


def check_tokens(name: str, x: Tensor, out: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless `x` is (T, width) in a known dtype where `out` is."""
    if x.ndim != 2 or tuple(x.shape) != shape or x.dtype not in DTYPES:
        raise ValueError(
            f"Product: expected {name} of shape {shape} in bfloat16, float16 or float32, got {tuple(x.shape)} "
            f"{x.dtype}. Reshape or cast it."
        )
    if x.device != out.device:
        raise ValueError(f"Product: expected {name} on {out.device} like its sum, got {x.device}. Move one of them.")


def check_precision(input_precision: str) -> None:
    """Raise `ValueError` unless the precision is known."""
    if input_precision not in PRECISIONS:
        raise ValueError(
            f"Product: expected a precision of {', '.join(PRECISIONS)}, got {input_precision!r}. Pass one."
        )
