"""The rotary embedding of queries and keys in one launch, and, with the transposed angles, its backward.

Shapes: B windows, L tokens, H heads of D dimensions. For the halves (a, b) of a head: (a c_a − b s_a, b c_b + a s_b);
backward (a c_a + b s_b, b c_b − a s_a). All arithmetic is float32.

Floor: 2 elements of traffic per element either way, 4 bytes in bfloat16. Angles are read once a token, for all heads.
Derived: at 85 % of a copy bandwidth of 3 TB/s, 8192 tokens of 32 and 8 heads of 128 dimensions take 0.07 ms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of half a tile of heads: 16 bytes of bfloat16 for each of 128 threads.
TILE_ELEMENTS = 1024
WARPS = 4


@triton.jit
def _rotate_heads(
    p_in, p_out, num_heads, stride_in, stride_out, b_cos_a, b_cos_b, b_to_a, b_to_b, half,
    TILE_H: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    o_dim = tl.arange(0, TILE_D)
    for start in range(0, num_heads, TILE_H):
        o_head = (start + tl.arange(0, TILE_H)).to(tl.int64)
        mask = (o_head < num_heads)[:, None] & (o_dim < half)[None, :]
        place = o_head[:, None] * stride_in + o_dim[None, :]
        b_a = tl.load(p_in + place, mask=mask, other=0.0).to(tl.float32)
        b_b = tl.load(p_in + half + place, mask=mask, other=0.0).to(tl.float32)
        place = o_head[:, None] * stride_out + o_dim[None, :]
        b_new = b_a * b_cos_a[None, :] + b_b * b_to_a[None, :]
        tl.store(p_out + place, b_new.to(p_out.dtype.element_ty), mask=mask)
        b_new = b_b * b_cos_b[None, :] + b_a * b_to_b[None, :]
        tl.store(p_out + half + place, b_new.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def rotate_kernel(
    p_query, p_key, p_cos, p_sin, p_query_out, p_key_out, num_tokens, num_heads, num_kv_heads, half,
    stride_query_batch, stride_query_head, stride_query_token, stride_key_batch, stride_key_head, stride_key_token,
    stride_query_out_batch, stride_query_out_head, stride_query_out_token,
    stride_key_out_batch, stride_key_out_head, stride_key_out_token,
    stride_cos_batch, stride_cos_token, stride_sin_batch, stride_sin_token,
    BACKWARD: tl.constexpr, TILE_H: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: one token, its query and key heads TILE_H at a time."""
    i_batch = (tl.program_id(0) // num_tokens).to(tl.int64)
    i_token = (tl.program_id(0) % num_tokens).to(tl.int64)
    o_dim = tl.arange(0, TILE_D)
    is_dim = o_dim < half
    p_cos += i_batch * stride_cos_batch + i_token * stride_cos_token
    p_sin += i_batch * stride_sin_batch + i_token * stride_sin_token
    b_cos_a = tl.load(p_cos + o_dim, mask=is_dim, other=0.0).to(tl.float32)
    b_cos_b = tl.load(p_cos + half + o_dim, mask=is_dim, other=0.0).to(tl.float32)
    b_sin_a = tl.load(p_sin + o_dim, mask=is_dim, other=0.0).to(tl.float32)
    b_sin_b = tl.load(p_sin + half + o_dim, mask=is_dim, other=0.0).to(tl.float32)
    # What goes to the first half from the second, and the other way.
    b_to_a = -b_sin_a
    b_to_b = b_sin_b
    if BACKWARD:
        b_to_a = b_sin_b
        b_to_b = -b_sin_a
    _rotate_heads(
        p_query + i_batch * stride_query_batch + i_token * stride_query_token,
        p_query_out + i_batch * stride_query_out_batch + i_token * stride_query_out_token,
        num_heads, stride_query_head, stride_query_out_head, b_cos_a, b_cos_b, b_to_a, b_to_b, half, TILE_H, TILE_D,
    )  # fmt: skip
    _rotate_heads(
        p_key + i_batch * stride_key_batch + i_token * stride_key_token,
        p_key_out + i_batch * stride_key_out_batch + i_token * stride_key_out_token,
        num_kv_heads, stride_key_head, stride_key_out_head, b_cos_a, b_cos_b, b_to_a, b_to_b, half, TILE_H, TILE_D,
    )  # fmt: skip


def tile(dim: int) -> dict[str, int]:
    """Heads and half dimensions of a tile."""
    columns = max(16, triton.next_power_of_2(dim // 2))
    return {"TILE_H": max(1, TILE_ELEMENTS // columns), "TILE_D": columns, "num_warps": WARPS}


def rotate(
    query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, *, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their angles; the arguments stay what they are.

    Args:
        query, key: (B, H, L, D) and (B, H_kv, L, D), D even, dimensions contiguous.
        cosine, sine: (B or 1, L, D), dimensions contiguous. All of one dtype, bfloat16, float16 or float32.
        backward: turn by the transpose.

    Returns:
        New tensors of the same shapes, dtype and order of axes in memory.

    Raises:
        ValueError: a shape, dtype, layout or device other than these.
    """
    _check(query, key, cosine, sine)
    turned = torch.empty_like(query), torch.empty_like(key)
    batch, heads, tokens, dim = query.shape
    strides = [s for t in (query, key, *turned) for s in t.stride()[:3]]
    strides += [s for t in (cosine, sine) for s in (t.stride(0) if len(t) > 1 else 0, t.stride(1))]
    if query.numel() + key.numel():
        with torch.cuda.device_of(query):
            rotate_kernel[(batch * tokens,)](
                query, key, cosine, sine, *turned, tokens, heads, key.shape[1], dim // 2, *strides,
                BACKWARD=backward, **tile(dim),
            )  # fmt: skip
    return turned


def _check(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> None:
    known = query.dtype in (torch.bfloat16, torch.float16, torch.float32) and query.ndim == 4
    alike = len({(t.dtype, t.device) for t in (query, key, cosine, sine)}) == 1
    if known and alike and query.shape[3] % 2 == 0 and all(t.stride(-1) == 1 for t in (query, key, cosine, sine)):
        batch, _, tokens, dim = query.shape
        angles = ((1, tokens, dim), (batch, tokens, dim))
        same = key.ndim == 4 and (key.shape[0], *key.shape[2:]) == (batch, tokens, dim)
        if same and tuple(cosine.shape) in angles and tuple(sine.shape) in angles:
            return
    given = ", ".join(f"{tuple(t.shape)} {t.dtype} {t.stride()} on {t.device}" for t in (query, key, cosine, sine))
    raise ValueError(
        "Rotary embedding: expected query (B, H, L, D) and key (B, H_kv, L, D), D even, cosine and sine (B or 1, L, "
        f"D), all bfloat16, float16 or float32, dimensions contiguous, got {given}. Convert or copy them."
    )
