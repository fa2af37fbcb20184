"""The gradient of the cross entropy, in two passes over the logits and without a float32 copy of them.

Shapes: T tokens, V vocabulary, d hidden size. For logits z: −log softmax(z)[target] and softmax(z) − onehot(target).

Floor: 4 bytes read and 2 written per 16-bit logit; at 85 % of 3 TB/s, 262144 tokens take 20 ms with V = 32000 and 80 ms
with 128256. Operation by operation in float32 the same moves 44 bytes per logit (0.12 and 0.49 s), in some twelve
launches and a wait for the host every 2²¹ logits, 4000 and 16000 times.

Why the head's matrix product is not fused with it. Per logit, product and gradient in chunks of tokens move 10 bytes:
written, read twice, replaced, read again. With V = 128256, d = 4096 and 262144 tokens that is 0.34 TB, 0.11 s, beside
4TVd = 0.55 PFLOP, 0.79 s at 700 TFLOP/s. A fused kernel that never stores logits computes them a second time, 2TVd more
or 0.39 s, to save those 0.11 s; with V = 32000, 0.10 s to save 0.03 s. Memory needs no fusing either: chunks bound it.
They must only be long enough: T' tokens do T' FLOPs per byte of the head's weights, which are hidden from 230 on.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 bytes of bfloat16 for each of 512 threads. With 256 and twice as much for each, Triton 3.7 spills on sm_100.
TILE = {"TILE_V": 4096, "num_warps": 16}


@triton.jit
def cross_entropy_gradient_kernel(
    p_logits, p_target, p_gradient, p_loss, vocabulary, stride_token, TILE_V: tl.constexpr
):  # fmt: skip
    """One program: one token. A running maximum and sum per lane, then the gradient."""
    i_token = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_token * stride_token
    p_out = p_gradient + i_token * vocabulary
    o_word = tl.arange(0, TILE_V)
    b_max = tl.full((TILE_V,), float("-inf"), tl.float32)
    b_sum = tl.zeros((TILE_V,), tl.float32)
    for start in range(0, vocabulary, TILE_V):
        b_logit = tl.load(p_row + start + o_word, mask=o_word < vocabulary - start, other=float("-inf")).to(tl.float32)
        b_new = tl.maximum(b_max, b_logit, propagate_nan=tl.PropagateNan.ALL)
        # A lane that has seen only −∞ so far has nothing to rescale, and −∞ − (−∞) is no number.
        is_empty = b_new == float("-inf")
        b_sum = tl.where(is_empty, 0.0, b_sum * tl.exp(b_max - b_new) + tl.exp(b_logit - b_new))
        b_max = b_new
    # Not finite where a logit is not: what `max` leaves out, the sum carries.
    top = tl.max(b_max, 0)
    total = tl.sum(tl.where(b_max == float("-inf"), 0.0, b_sum * tl.exp(b_max - top)), 0)
    target = tl.load(p_target + i_token)
    tl.store(p_loss + i_token, tl.log(total) - (tl.load(p_row + target).to(tl.float32) - top))
    for start in range(0, vocabulary, TILE_V):
        is_word = o_word < vocabulary - start
        b_logit = tl.load(p_row + start + o_word, mask=is_word, other=float("-inf")).to(tl.float32)
        b_gradient = tl.exp(b_logit - top) / total - tl.where(start + o_word == target, 1.0, 0.0)
        tl.store(p_out + start + o_word, b_gradient.to(p_gradient.dtype.element_ty), mask=is_word)


def cross_entropy_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of every row.

    Args:
        logits: (T, V) bfloat16, float16 or float32, words contiguous. T may be 0.
        targets: (T,) int64 in [0, V), on the same device; not checked, for that would wait for the GPU.

    Returns:
        −log softmax(logits)[target] (T,) float32, and softmax(logits) − onehot(targets) (T, V), dtype as `logits`.

    Raises:
        ValueError: a shape, dtype, layout or device other than these.
    """
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype not in dtypes or logits.stride(1) != 1:
        raise ValueError(
            "Cross entropy: expected logits (T, V) in bfloat16, float16 or float32, words contiguous, got "
            f"{tuple(logits.shape)} {logits.dtype} with strides {logits.stride()}. Convert or copy them."
        )
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64 or targets.device != logits.device:
        raise ValueError(
            f"Cross entropy: expected targets ({len(logits)},) in int64 on {logits.device}, got "
            f"{tuple(targets.shape)} {targets.dtype} on {targets.device}. Convert them."
        )
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if len(logits):
        with torch.cuda.device_of(logits):
            cross_entropy_gradient_kernel[(len(logits),)](
                logits, targets.contiguous(), gradient, loss, logits.shape[1], logits.stride(0), **TILE
            )
    return loss, gradient
