"""The Gram update for GPUs with a tensor memory accelerator (sm_90, sm_100): 16-bit inputs, wide matrices.

The same sums as `cross.cross_update_kernel`, on rectangular tiles whose operands the copy engine brings to shared
memory while the matrix units multiply: no addresses in registers, only a (128, 256) float32 accumulator.
Arithmetic per byte from the second-level cache: 2·128·256/(2·(128 + 256)) = 85 FLOPs, against 64 of a 128-tile.

What reaches that cache from memory depends on the order of the tiles. The 132 programs that an H100 runs at once walk
through the tokens side by side: together they read the columns of X that their tiles cover. In groups of 16 rows of
tiles, columns outermost, that is 16·128 + 9·256 columns, near the least for 132 tiles (a square). Derived for 8192
tokens: 1.1 GB at m = 11008 and 7 GB at 28672, 0.4 and 2.3 ms of copying beside 1.3 and 8.5 ms of products at the peak
rate; row by row it would be 1.9 and 30 GB. Expected of the peak: 55 to 68 %.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

CAPABILITIES = ((9, 0), (10, 0))
# Columns are twice as wide as rows. GROUP, even, is the number of rows of tiles that are gone through together.
TILE = {"TILE_R": 128, "TILE_T": 64, "GROUP": 16}
# 197 KB of shared memory: four stages of (64, 128) and (64, 256) 16-bit tiles.
OPTIONS = {"num_warps": 8, "num_stages": 4}


@triton.jit
def _staircase(i_tile):
    """(row, column) of tile `i_tile` where row r of tiles has ⌊r/2⌋ + 1 columns, counted row by row."""
    # Rows 2k and 2k + 1 have k + 1 tiles each and start at k(k + 1): k = ⌊(√(4i + 1) − 1)/2⌋, put right by integers.
    pair = ((tl.sqrt(4.0 * i_tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    pair = tl.where(pair * (pair + 1) > i_tile, pair - 1, pair)
    pair = tl.where((pair + 1) * (pair + 2) <= i_tile, pair + 1, pair)
    rest = i_tile - pair * (pair + 1)
    second = rest > pair
    return 2 * pair + second.to(tl.int32), tl.where(second, rest - pair - 1, rest)


@triton.jit
def _place(i_tile, num_rows, GROUP: tl.constexpr):
    """(row, column) of tile `i_tile` on the staircase, when groups of GROUP rows are counted columns first.

    The first row of a group, r = 2p, has p + 1 columns: these the whole group has, and they are counted column by
    column. What its further rows have more is a staircase again, which begins two rows below.
    """
    row, _ = _staircase(i_tile)
    first_row = row // GROUP * GROUP
    pair = first_row // 2
    height = tl.minimum(num_rows - first_row, GROUP)
    rest = i_tile - pair * (pair + 1)
    further = rest - (pair + 1) * height
    more_rows, more_cols = _staircase(tl.maximum(further, 0))
    is_common = further < 0
    i_row = first_row + tl.where(is_common, rest % height, 2 + more_rows)
    return i_row, tl.where(is_common, rest // height, pair + 1 + more_cols)


@triton.jit
def _add_lower(d_gram, b_tile, first_row, first_col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Add a (ROWS, COLS) tile to G where it is on or below the diagonal; what lies above keeps its value."""
    o_row, o_col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    is_lower = o_col - o_row <= first_row - first_col
    b_gram = d_gram.load([first_row, first_col])
    d_gram.store([first_row, first_col], b_gram + tl.where(is_lower, b_tile, 0.0))


@triton.jit
def gram_update_tma_kernel(
    d_row, d_col, d_gram, num_tokens, num_rows, TILE_R: tl.constexpr, TILE_T: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """One program adds the tokens' contribution to one (TILE_R, 2·TILE_R) tile of G, which has num_rows rows of them.

    d_row and d_col describe X (T, m) in blocks of (TILE_T, TILE_R) and (TILE_T, 2·TILE_R), d_gram G in blocks of
    (TILE_R, TILE_R/2); beyond the edges they read zeros and write nothing.
    """
    i_row, i_col = _place(tl.program_id(0), num_rows, GROUP)
    first_row, first_col = i_row * TILE_R, i_col * 2 * TILE_R
    b_sum = tl.zeros((TILE_R, 2 * TILE_R), tl.float32)
    for start in range(0, num_tokens, TILE_T):
        b_row = d_row.load([start, first_row])
        b_col = d_col.load([start, first_col])
        b_sum = tl.dot(tl.trans(b_row), b_col, b_sum)
    # A quarter of the columns at a time, through shared memory: 205 registers on sm_90, where the addresses of whole or
    # half tiles spill at 255.
    COLS: tl.constexpr = TILE_R // 2
    b_left, b_right = tl.split(tl.permute(tl.reshape(b_sum, (TILE_R, 2, TILE_R)), (0, 2, 1)))
    b_0, b_1 = tl.split(tl.permute(tl.reshape(b_left, (TILE_R, 2, COLS)), (0, 2, 1)))
    b_2, b_3 = tl.split(tl.permute(tl.reshape(b_right, (TILE_R, 2, COLS)), (0, 2, 1)))
    _add_lower(d_gram, b_0, first_row, first_col, TILE_R, COLS)
    _add_lower(d_gram, b_1, first_row, first_col + COLS, TILE_R, COLS)
    _add_lower(d_gram, b_2, first_row, first_col + 2 * COLS, TILE_R, COLS)
    _add_lower(d_gram, b_3, first_row, first_col + 3 * COLS, TILE_R, COLS)


def serves(gram: Tensor, x: Tensor) -> bool:
    """Whether the copy engine can reach G and x (T, m): a GPU that has one, 16-bit x, rows on 16-byte borders."""
    return (
        x.is_cuda
        and torch.version.cuda is not None
        and gram.data_ptr() % 16 == 0
        and gram.shape[0] % 4 == 0
        and torch.cuda.get_device_capability(x.device) in CAPABILITIES
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.stride(1) == 1
        and x.data_ptr() % 16 == 0
        and x.stride(0) % 8 == 0
        # Rows that overlap are no matrix to the copy engine.
        and x.stride(0) >= x.shape[1]
    )


def gram_update_(gram: Tensor, x: Tensor) -> None:
    """Add XᵀX to the lower triangle of G; arguments as for `gram.gram_update_`, which has checked them."""
    num_tokens, width = x.shape
    num_rows = -(-width // TILE["TILE_R"])
    pairs, odd = divmod(num_rows, 2)
    tiles = (pairs + odd) * (pairs + 1)
    tile, tokens = TILE["TILE_R"], TILE["TILE_T"]
    descriptors = (
        TensorDescriptor.from_tensor(x, [tokens, tile]),
        TensorDescriptor.from_tensor(x, [tokens, 2 * tile]),
        TensorDescriptor.from_tensor(gram, [tile, tile // 2]),
    )
    with torch.cuda.device_of(gram):
        gram_update_tma_kernel[(tiles,)](*descriptors, num_tokens, num_rows, **TILE, **OPTIONS)
