"""RMSNorm, forward and backward, each in one pass over memory.

Shapes: T rows, d columns. With r = (mean x² + eps)^(−1/2) and s = offset + w:  y = x r ⊙ s. Backward from g = ∂L/∂y,
with h = g ⊙ s:  ∂L/∂x = r (h − x r² mean(h ⊙ x)). All arithmetic is float32.

Floor: 2 elements of traffic per element forward, 3 backward, 10 bytes together in bfloat16. Derived: at 85 % of a copy
bandwidth of 3 TB/s, 8192 rows of d = 4096 take 0.05 and 0.08 ms. tests/models/test_layer_budget.py counts what a whole
layer moves.
A program holds whole rows in registers, so that the second reading of x costs nothing. Short rows, as of one head's
dimensions, share a program: each has too few bytes to keep in flight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile: 16 bytes of bfloat16 for each of 256 threads.
TILE_ELEMENTS = 2048
# 32 elements a thread, of x and of g, are what registers hold.
ELEMENTS_PER_THREAD = 32
WIDEST = 16384


@triton.jit
def rms_norm_kernel(
    p_x, p_weight, p_out, p_inverse, num_rows, width, eps, offset, TILE_T: tl.constexpr, TILE_D: tl.constexpr
):  # fmt: skip
    """One program: TILE_T rows."""
    o_row = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    o_col = tl.arange(0, TILE_D)
    place = o_row[:, None] * width + o_col[None, :]
    mask = (o_row < num_rows)[:, None] & (o_col < width)[None, :]
    b_x = tl.load(p_x + place, mask=mask, other=0.0).to(tl.float32)
    b_scale = offset + tl.load(p_weight + o_col, mask=o_col < width, other=0.0).to(tl.float32)
    b_inverse = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / width + eps)
    b_out = b_x * b_inverse[:, None] * b_scale[None, :]
    tl.store(p_out + place, b_out.to(p_out.dtype.element_ty), mask=mask)
    tl.store(p_inverse + o_row, b_inverse, mask=o_row < num_rows)


@triton.jit
def rms_norm_backward_kernel(
    p_grad, p_x, p_weight, p_inverse, p_out, num_rows, width, offset, TILE_T: tl.constexpr, TILE_D: tl.constexpr
):  # fmt: skip
    """One program: TILE_T rows."""
    o_row = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    o_col = tl.arange(0, TILE_D)
    place = o_row[:, None] * width + o_col[None, :]
    mask = (o_row < num_rows)[:, None] & (o_col < width)[None, :]
    b_x = tl.load(p_x + place, mask=mask, other=0.0).to(tl.float32)
    b_scale = offset + tl.load(p_weight + o_col, mask=o_col < width, other=0.0).to(tl.float32)
    b_scaled = tl.load(p_grad + place, mask=mask, other=0.0).to(tl.float32) * b_scale[None, :]
    b_inverse = tl.load(p_inverse + o_row, mask=o_row < num_rows, other=0.0)
    b_along = b_inverse * b_inverse * tl.sum(b_scaled * b_x, 1) / width
    b_out = b_inverse[:, None] * (b_scaled - b_x * b_along[:, None])
    tl.store(p_out + place, b_out.to(p_out.dtype.element_ty), mask=mask)


def tile(width: int) -> dict[str, int]:
    """Rows and columns of a tile for rows of this width, and the warps that hold it."""
    columns = max(16, triton.next_power_of_2(width))
    rows = max(1, TILE_ELEMENTS // columns)
    warps = min(16, max(4, rows * columns // (ELEMENTS_PER_THREAD * 32)))
    return {"TILE_T": rows, "TILE_D": columns, "num_warps": warps}


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of every row.

    Args:
        hidden: (T, d) bfloat16, float16 or float32, contiguous, 0 < d ≤ `WIDEST`. T may be 0.
        weight: (d,), dtype and device as `hidden`.
        eps: added to the mean square.
        offset: added to the weight.

    Returns:
        (T, d) like `hidden`, and the reciprocal root mean squares (T,) float32.

    Raises:
        ValueError: a shape, dtype, layout or device other than these.
    """
    _check(weight, hidden)
    num_rows, width = hidden.shape
    out = torch.empty_like(hidden)
    inverse = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    if num_rows:
        options = tile(width)
        with torch.cuda.device_of(hidden):
            rms_norm_kernel[(-(-num_rows // options["TILE_T"]),)](
                hidden, weight, out, inverse, num_rows, width, eps, offset, **options
            )
    return out, inverse


def rms_norm_backward(grad: Tensor, hidden: Tensor, weight: Tensor, inverse: Tensor, offset: float) -> Tensor:
    """∂L/∂hidden (T, d) for grad = ∂L/∂out (T, d); the rest as `rms_norm` took and gave it.

    Raises:
        ValueError: a shape, dtype, layout or device other than these.
    """
    _check(weight, hidden, grad)
    num_rows, width = hidden.shape
    out = torch.empty_like(hidden)
    if num_rows:
        options = tile(width)
        with torch.cuda.device_of(hidden):
            rms_norm_backward_kernel[(-(-num_rows // options["TILE_T"]),)](
                grad, hidden, weight, inverse, out, num_rows, width, offset, **options
            )
    return out


def _check(weight: Tensor, *rows: Tensor) -> None:
    for tensor in rows:
        fits = (tensor.shape, tensor.dtype, tensor.device) == (rows[0].shape, weight.dtype, weight.device)
        fits = fits and tensor.ndim == 2 and tensor.shape[1:] == weight.shape and 0 < tensor.shape[1] <= WIDEST
        known = tensor.dtype in (torch.bfloat16, torch.float16, torch.float32)
        if not (fits and known and tensor.is_contiguous() and weight.is_contiguous()):
            raise ValueError(
                f"RMSNorm: expected contiguous rows (T, d), 0 < d ≤ {WIDEST}, and a weight (d,), all bfloat16, float16 "
                f"or float32, got {tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()} on "
                f"{tensor.device} and {tuple(weight.shape)} {weight.dtype} on {weight.device}. Convert or copy them."
            )
