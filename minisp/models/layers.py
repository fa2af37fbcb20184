"""The engine's own operations inside transformers' layers, for the length of a sweep: attention, RMSNorm, rotary.

A module or function is replaced for what it does, whatever its family and name: a norm or rotary function that computes
`reference.rms_norm` or `reference.rotary` on a probe, in float32 and to rounding, is served by `minisp.ops`. The rest,
LayerNorm for example, is left alone. Nothing is replaced for good: each module gets a forward of its own within the
block, and its class, its file and other models stay what they are.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from minisp import ops
from minisp.models.attention import fast_attention
from minisp.models.families import CausalLM, activation_kind, decoder_layers, family_of
from minisp.models.structures import heads_of, structures_of
from minisp.ops.portable import capability_of, repeats_keys

# Of a probe: rounding in float32 of sums of up to some 10⁴ terms; what computes something else is off by more.
PROBE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class NormKind:
    """How a class of RMSNorm modules stores what it needs.

    Attributes:
        eps: the attribute with the number that is added to the mean square.
        offset: 1 where the weight is stored as its difference from 1.
    """

    eps: str
    offset: float


@contextmanager
def fast_layers(model: Any) -> Iterator[None]:
    """Within the block, a transformers model computes with `minisp.ops` what they have an operation for.

    Weights are read when a module is called: parameters may be on the meta device now, and be replaced meanwhile. A
    norm whose weight wants a gradient computes as it did.
    """
    replaced: list[nn.Module] = []
    norms: dict[Any, NormKind | None] = {}
    forwards: dict[Any, FunctionType | None] = {}
    try:
        for module in model.modules():
            forward = _fast_norm(module, norms) or _with_fast_rotary(module, forwards)
            # A forward that others have put there is theirs.
            if forward is not None and "forward" not in vars(module):
                module.forward = forward
                replaced.append(module)
        with fast_attention(model.config):
            yield
    finally:
        for module in replaced:
            del module.forward


def autograd_bytes(
    model: CausalLM,
    dtype: torch.dtype,
    device: torch.device,
    structures: Sequence[str] = ("mlp",),
    *,
    tapped: bool = False,
) -> int:
    """Bytes per token that autograd keeps of one decoder layer, its structures watched, within `fast_layers`.

    In the compute type: what enters both norms (2d), queries, keys, values and output of attention ((2H + 2H_kv)·D),
    what enters norms of query and key heads where there are such ((H + H_kv)·D), and the MLP's pre-activations (2m, or
    m without a gate). In float32: one number per row of a norm, two where it is a LayerNorm, and one per query head, of
    its softmax. Keys and values count as often as attention repeats them on `device`.

    Args:
        tapped: whether all linear maps keep their inputs.
    """
    config, family = model.config, family_of(model.config)
    layer = decoder_layers(model, family)[0]
    heads, dim = heads_of(config)
    hidden: int = config.hidden_size
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    of_heads = any(p.shape == (dim,) and "norm" in name for name, p in layer.named_parameters())
    normed = (heads + kv_heads) if of_heads else 0
    repeated = heads if repeats_keys(dtype, capability_of(device)) else kv_heads
    width = max(structure.width for structure in structures_of(model, family))
    # Watched attention keeps the input of its output projection, which is a copy of what attention keeps.
    watched = heads * dim if set(structures) & {"attention", "queries"} else 0
    kept = len(family.mlp.writers)
    if tapped or activation_kind(config, family) is None:
        # The generic way: the activation function keeps its input and output, the product both factors and x.
        kept = 2 if family.mlp.gate is None else 4
    elements = watched + (4 if tapped else 2) * hidden + (2 * heads + 2 * repeated + normed) * dim + kept * width
    return elements * dtype.itemsize + 4 * (2 * 2 + heads + normed)


def _fast_norm(module: nn.Module, known: dict[Any, NormKind | None]) -> Callable[..., Tensor] | None:
    """The forward of an RMSNorm by `ops.rms_norm`; None for any other module. `known`: what probes have said so far."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(module._parameters) != 1 or module._modules:
        return None
    settings = [(n, v) for n, v in vars(module).items() if n[0] != "_" and isinstance(v, (int, float, str, tuple))]
    key = (type(module), weight.shape, str(settings))
    if key not in known:
        known[key] = norm_kind(module)
    kind = known[key]
    return None if kind is None else partial(_norm_forward, module, getattr(module, kind.eps), kind.offset)


def _norm_forward(module: nn.Module, eps: float, offset: float, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    if args or kwargs or weight.dtype != hidden.dtype or (weight.requires_grad and torch.is_grad_enabled()):
        stock: Tensor = type(module).forward(module, hidden, *args, **kwargs)
        return stock
    return ops.rms_norm(hidden, weight, eps, offset=offset)


@torch.no_grad()
def norm_kind(module: nn.Module) -> NormKind | None:
    """Whether a module with one weight (d,) is an RMSNorm over the last axis, and of which kind; None where it is not.

    Asked of a copy with a random weight, on an input as small as eps, so that eps shows.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(module._parameters["weight"].shape, generator=generator)  # type: ignore[union-attr]
    probe = copy.copy(module)
    probe._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    for name, eps in vars(module).items():
        if not isinstance(eps, float) or not 0 < eps < 1:
            continue
        hidden = torch.randn(2, 3, len(weight), generator=generator) * eps**0.5
        found = _answer(type(module).forward, probe, hidden)
        normed = hidden * (hidden.square().mean(-1, keepdim=True) + eps).rsqrt()
        for offset in (0.0, 1.0):
            if _same(found, normed * (offset + weight)):
                return NormKind(name, offset)
    return None


def _with_fast_rotary(module: nn.Module, known: dict[Any, FunctionType | None]) -> Callable[..., Any] | None:
    """The module's own forward, with rotary functions of its file by `ops.rotary`; None where it reads none."""
    forward: Any = type(module).forward
    if forward not in known:
        known[forward] = _own_forward(forward)
    own = known[forward]
    return None if own is None else partial(own, module)


def _own_forward(forward: Any) -> FunctionType | None:
    """A copy of a forward that reads other functions under the names of its file's rotary functions."""
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return None
    names = forward.__globals__
    read = [name for name in forward.__code__.co_names if name in names]
    rotary = {name: _fast_rotary(names[name]) for name in read if is_rotary(names[name])}
    if not rotary:
        return None
    own = FunctionType(forward.__code__, names | rotary, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return own


def _fast_rotary(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`ops.rotary` where a call is of its form, the stock function otherwise."""

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = not args and not kwargs and q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3
        same = q.dtype == k.dtype == cos.dtype == sin.dtype and q.shape[-1] == cos.shape[-1] == sin.shape[-1]
        return ops.rotary(q, k, cos, sin) if plain and same else stock(q, k, cos, sin, *args, **kwargs)

    return rotary


@torch.no_grad()
def is_rotary(function: Any) -> bool:
    """Whether a function (q, k, cos, sin, …) of a modelling file turns halves of heads, as `ops.rotary` does."""
    if not callable(function) or isinstance(function, type):
        return False
    try:
        # A function that transformers wraps for kernels from the hub is a module, and what it does its forward.
        parameters = list(inspect.signature(getattr(function, "forward", function)).parameters)
    except (TypeError, ValueError):
        return False
    if parameters[2:4] != ["cos", "sin"]:
        return False
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 3, 8, generator=generator) for heads in (4, 2))
    cosine, sine = (torch.randn(2, 3, 8, generator=generator) for _ in range(2))
    found = _answer(function, query.clone(), key.clone(), cosine, sine)
    expected = ops.rotary(query, key, cosine, sine, impl="torch")
    return isinstance(found, tuple) and len(found) == 2 and all(map(_same, found, expected))


def _answer(function: Callable[..., Any], *args: Any) -> Any:
    """What foreign code returns for a probe; None where it does not take it."""
    try:
        return function(*args)
    # It may raise anything: it was not written for probes.
    except Exception:
        return None


def _same(found: Any, expected: Tensor) -> bool:
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and found.dtype == expected.dtype
        and torch.allclose(found, expected, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE * float(expected.abs().max()))
    )
