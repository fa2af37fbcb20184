"""The parts of gpu_suite.py that measure passes over activations, which memory bounds: see gpu_parts.py.

Floors are bytes at the copy bandwidth, two for every 16-bit element that is read or written.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from gpu_bench import Bench, Contenders, Figures, line, ratio
from torch import Tensor
from torch.nn import functional

from minisp import ops
from minisp.kernels import cross_entropy as cross_entropy_kernel
from minisp.kernels import saliency as saliency_kernel
from minisp.ops import portable

# Widths at which torch.compile runs too: each compilation takes some ten seconds.
COMPILED = (4096, 11008, 24)


def saliency(bench: Bench) -> Iterator[Figures]:
    """The fused pass against autograd with a hook, the same op by op, and torch.compile. Floor: 12 bytes per element;
    expected 72 to 85 % of the copy bandwidth and, autograd moving 54 bytes and more, ×3.5 to 4 of it. The forward
    activation beside it: 6 bytes, 70 to 82 %, ×1.6 of two operations.
    """
    tokens, rows, summary = bench.shapes(8192, 16), [], []
    for width in bench.shapes((1536, 4096, 11008, 14336, 28672), (24,)):
        sources = [bench.randn(tokens, width) for _ in range(3)]
        work = [source.clone() for source in sources]
        contenders = saliency_contenders(bench, *work)
        row = {"m": width, "T": tokens, **bench.race(contenders, before=partial(_restore, work, sources))}
        forward = bench.race(_forward_contenders(*sources))
        row |= {f"forward: {name}": found for name, found in forward.items()}
        rows.append(row)
        if row["minisp"]:
            row["bytes_per_s"] = 12 * tokens * width / row["minisp"][1]
            ratios = [ratio(row, name) for name in list(contenders)[1:] if row[name]]
            text = ", ".join([f"{row['bytes_per_s'] / 1e12:.2f} TB/s", *ratios])
            summary.append(line(f"saliency m = {width}", text))
        if forward["minisp"]:
            rate = 6 * tokens * width / forward["minisp"][1] / 1e12
            text = f"{rate:.2f} TB/s, {ratio(forward, 'op by op')}"
            summary.append(line(f"activation m = {width}", text))
        yield {"rows": rows, "summary": summary}


def _restore(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def saliency_contenders(bench: Bench, gate: Tensor, up: Tensor, grad: Tensor) -> Contenders:
    """Of the backward pass; minisp's overwrites its arguments."""
    contenders: Contenders = {
        "minisp": partial(saliency_kernel.activation_backward_, gate, up, grad, "silu"),
        "autograd with a hook": partial(autograd_saliency, gate, up, grad),
        "op by op": partial(eager_saliency, gate, up, grad),
    }
    if gate.shape[1] in COMPILED:
        contenders["torch.compile"] = partial(bench.compiled(eager_saliency), gate, up, grad)
    return contenders


def _forward_contenders(gate: Tensor, up: Tensor, out: Tensor) -> Contenders:
    return {
        "minisp": partial(saliency_kernel.activation, gate, up, "silu", out=out),
        "op by op": lambda: functional.silu(gate) * up,
    }


def autograd_saliency(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """What a user writes: the forward under autograd, a hook on x, the backward."""
    z, u = gate.detach().requires_grad_(), up.detach().requires_grad_()
    sums = []

    def hook(g: Tensor) -> None:
        product = x.detach().float() * g.float()
        sums.append(torch.stack([product.abs().sum(0), product.square().sum(0), product.sum(0)]))

    x = functional.silu(z) * u
    x.register_hook(hook)
    return *torch.autograd.grad(x, (z, u), grad), *sums


def eager_saliency(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """What autograd and the hook compute, op by op."""
    sigmoid = torch.sigmoid(gate)
    value = gate * sigmoid
    x = value * up
    product = x.float() * grad.float()
    sums = torch.stack([product.abs().sum(0), product.square().sum(0), product.sum(0)])
    return x, torch.ops.aten.silu_backward(grad * up, gate), grad * value, sums


def cross_entropy(bench: Bench) -> Iterator[Figures]:
    """The cross entropy's gradient against the same in PyTorch. Floor: 6 bytes per bfloat16 logit (read twice, written
    once); expected 75 to 85 % of the copy bandwidth, and ×4 to 6 of the operations one by one.
    """
    rows, summary = [], []
    tokens = bench.shapes(4096, 8)
    for vocabulary in bench.shapes((32000, 128256), (50,)):
        logits = bench.randn(tokens, vocabulary)
        targets = torch.randint(vocabulary, (tokens,), device=bench.device)
        contenders: Contenders = {
            "minisp": partial(cross_entropy_kernel.cross_entropy_gradient, logits, targets),
            "PyTorch": partial(portable.cross_entropy_gradient, logits, targets[:, None]),
        }
        row = {"V": vocabulary, "T": tokens, **bench.race(contenders)}
        rows.append(row)
        if row["minisp"]:
            rate = 6 * logits.numel() / row["minisp"][1] / 1e12
            text = f"{rate:.2f} TB/s, {ratio(row, 'PyTorch')}"
            summary.append(line(f"cross entropy V = {vocabulary}", text))
        yield {"rows": rows, "summary": summary}


def norms(bench: Bench) -> Iterator[Figures]:
    """RMSNorm and rotary, forward and backward: transformers' eager modules, torch's fused norm, and minisp's ops.
    Floor of a norm: x read and written, then x and the gradient read and one written, 10 bytes an element; transformers
    moves some 60. Rotary: 8 bytes an element of queries and keys, transformers some 50. Expected 75 % of the copy
    bandwidth for minisp, ×5 of transformers.
    """
    figures: Figures = {"norm": [], "rotary": [], "summary": []}
    tokens = bench.shapes(8192, 16)
    for hidden in bench.shapes((4096, 8192), (32,)):
        x, grad = bench.randn(tokens, hidden).requires_grad_(), bench.randn(tokens, hidden)
        row = {"d": hidden, "T": tokens, **bench.race(_norm_contenders(bench, x, grad))}
        figures["norm"].append(row)
        figures["summary"].append(line(f"RMSNorm d = {hidden}", _pass_text(row, 10 * x.numel())))
        yield figures
    for heads, groups in bench.shapes(((32, 32), (64, 8)), ((4, 2),)):
        length, dim = bench.shapes((2048, 128), (8, 16))
        batch = tokens // length
        query = bench.randn(batch, heads, length, dim).requires_grad_()
        key = bench.randn(batch, groups, length, dim).requires_grad_()
        row = {"H": heads, "H_kv": groups, "T": tokens, **bench.race(_rotary_contenders(bench, query, key))}
        figures["rotary"].append(row)
        text = _pass_text(row, 8 * (query.numel() + key.numel()))
        figures["summary"].append(line(f"rotary, {heads} heads on {groups}", text))
        yield figures


def _pass_text(row: Figures, num_bytes: int) -> str:
    rate = f"{num_bytes / row['minisp'][1] / 1e12:.2f} TB/s, " if row.get("minisp") else ""
    return rate + ratio(row, "transformers")


def _norm_contenders(bench: Bench, x: Tensor, grad: Tensor) -> Contenders:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = LlamaRMSNorm(x.shape[-1], eps=1e-5).to(bench.device, bench.half).requires_grad_(False)
    shape = (x.shape[-1],)
    return {
        "transformers": lambda: torch.autograd.grad(module(x), x, grad),
        "F.rms_norm": lambda: torch.autograd.grad(functional.rms_norm(x, shape, module.weight, 1e-5), x, grad),
        "minisp": lambda: torch.autograd.grad(ops.rms_norm(x, module.weight, 1e-5), x, grad),
    }


def _rotary_contenders(bench: Bench, query: Tensor, key: Tensor) -> Contenders:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cosine, sine = (bench.randn(1, query.shape[2], query.shape[3]) for _ in range(2))
    gradients = torch.randn_like(query), torch.randn_like(key)
    return {
        "transformers": lambda: torch.autograd.grad(
            apply_rotary_pos_emb(query, key, cosine, sine), (query, key), gradients
        ),
        "minisp": lambda: torch.autograd.grad(ops.rotary(query, key, cosine, sine), (query, key), gradients),
    }
