"""The engine's operations inside transformers' layers: same function, own kernels, and gone afterwards."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as interleaved_rotary
from transformers.models.llama import modeling_llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from minisp import fast, ops
from minisp.methods.statistics import Statistics
from minisp.models.attention import fast_attention
from minisp.models.layers import NormKind, autograd_bytes, fast_layers, is_rotary, norm_kind
from minisp.models.skeleton import frozen
from minisp.models.stream import Stream
from minisp.models.watch import watch
from minisp.ops import reference
from minisp.phases import refit, sweep, trials
from tests.tiny import LAYERS, MODEL_TYPES, VOCABULARY, tiny_model

LENGTH = 60
# Of a layer: norms, and rotary calls.
PER_LAYER = {"qwen3": (4, 1), "llama": (2, 1), "mistral": (2, 1), "qwen2": (2, 1), "opt": (0, 0), "gpt2": (0, 0)}


def run(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their sum of squares at the embeddings."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits.float().square().sum(), embedded)
    return logits.detach(), gradient


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each operation is called within the block."""
    calls: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("causal_attention", "rms_norm", "rotary"):
            patch.setattr(ops, name, counting(name, getattr(ops, name)))
        yield calls


def ids_for(model: Any) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (2, LENGTH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_family_computes_the_same_with_them(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family).to(dtype)
    ids = ids_for(model)
    with frozen(model):
        stock = run(model, ids)
        with fast_layers(model), counted(monkeypatch) as calls:
            ours = run(model, ids)
        exact = run(model.double(), ids)
    norms, rotary = PER_LAYER[family]
    expected = {"causal_attention": LAYERS, "rms_norm": norms * LAYERS + bool(norms), "rotary": rotary * LAYERS}
    assert calls == {name: count for name, count in expected.items() if count}
    for mine, theirs, true in zip(ours, stock, exact, strict=True):
        bound = 2 * (theirs.double() - true).norm() + torch.finfo(dtype).eps * true.norm()
        assert (mine.double() - true).norm() <= bound


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_without_gradients_too(family: str) -> None:
    model = tiny_model(family)
    ids = ids_for(model)
    with torch.no_grad():
        stock = model(input_ids=ids).logits
        with fast_layers(model):
            ours = model(input_ids=ids).logits
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_nothing_stays_even_after_an_error(family: str) -> None:
    model, other = tiny_model(family), tiny_model(family)
    attention = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="boom"), fast_layers(model):
        assert any("forward" in vars(module) for module in model.modules()) == bool(PER_LAYER[family][0])
        assert not any("forward" in vars(module) for module in other.modules())
        raise RuntimeError("boom")
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation == attention


def test_what_a_forward_reads_is_the_files_own_outside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    stock = modeling_llama.apply_rotary_pos_emb
    with fast_layers(model):
        assert modeling_llama.apply_rotary_pos_emb is stock
    with counted(monkeypatch) as calls:
        run(model, ids_for(model))
    assert not calls


def test_a_norm_whose_weight_wants_a_gradient_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids = ids_for(model)
    with fast_layers(model), counted(monkeypatch) as calls:
        model(input_ids=ids).logits.square().sum().backward()
    assert not calls["rms_norm"] and calls["rotary"]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_weight_that_is_replaced_meanwhile_is_the_one_that_counts() -> None:
    model = tiny_model("llama")
    norm = model.model.layers[0].input_layernorm
    hidden, weight = torch.randn(3, model.config.hidden_size), torch.randn(model.config.hidden_size)
    with frozen(model), fast_layers(model):
        norm.weight = nn.Parameter(weight, requires_grad=False)
        expected = reference.rms_norm(hidden, weight, norm.variance_epsilon)
        torch.testing.assert_close(norm(hidden), expected, rtol=1e-5, atol=1e-5)
        # Stored in another type than the hidden state's: as the model's own code has it.
        norm.weight = nn.Parameter(weight.double(), requires_grad=False)
        assert norm(hidden).dtype == torch.float64


class Centred(Qwen3RMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class Gated(Qwen3RMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states) * (1 if gate is None else gate)


class Failing(Qwen3RMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        raise RuntimeError("needs a GPU")


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (Qwen3RMSNorm(24, eps=1e-3), NormKind("variance_epsilon", 0.0)),
        (GemmaRMSNorm(24), NormKind("eps", 1.0)),
        (nn.RMSNorm(24, eps=1e-6), NormKind("eps", 0.0)),
        (Centred(24), None),
        (Failing(24), None),
        (nn.LayerNorm(24, bias=False), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms_are_known_by_what_they_do(module: nn.Module, kind: NormKind | None) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    assert norm_kind(module) == kind
    assert norm_kind(module.to("meta")) == kind
    assert torch.equal(torch.get_rng_state(), state)
    assert before.keys() == module.state_dict().keys()


def test_a_call_of_another_form_goes_to_the_stock_function(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Gated(8).requires_grad_(False))
    model.config = tiny_model("llama").config  # type: ignore[assignment]
    hidden, gate = torch.randn(3, 8), torch.randn(3, 8)
    expected = model[0](hidden, gate)
    with fast_layers(model), counted(monkeypatch) as calls:
        assert torch.equal(model[0](hidden, gate), expected)
        assert not calls
        model[0](hidden)
        assert calls["rms_norm"] == 1


def test_rotary_functions_are_known_by_what_they_do() -> None:
    assert is_rotary(modeling_llama.apply_rotary_pos_emb)
    assert not is_rotary(modeling_llama.rotate_half)
    assert not is_rotary(interleaved_rotary)
    assert not is_rotary(lambda q, k, cos, sin: (q * cos[:, None], k * cos[:, None]))
    assert not is_rotary(lambda q, k, cos, sin: None)


def kept_bytes(model: Any, dtype: torch.dtype) -> float:
    """Bytes per token and layer that autograd holds after a forward through all layers, their MLPs watched."""
    stream = Stream.from_module(model.to(dtype))
    ids = ids_for(model)
    (width,) = {structure.num_units for structure in stream.structures}
    found: list[Tensor] = []
    with frozen(model):
        hidden, calls = stream.embed(ids).requires_grad_(), stream.calls(ids)
        shared = [*model.parameters(), *(t for c in calls for t in c.kwargs.get("position_embeddings") or ())]
        statistics = {i: Statistics.empty(width, gram=False, device=stream.device) for i in range(LAYERS)}
        with saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t), fast_layers(model):
            leaving = hidden
            for index in range(LAYERS):
                with watch(stream.layers[index], stream.structures[index], model.config, statistics[index]):
                    leaving = stream.run_layer(index, leaving, calls)
    # The watched MLP keeps its pre-activations itself, on its node of the graph.
    nodes, seen = [leaving.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [t for t in (getattr(node, "gate", None), getattr(node, "up", None)) if isinstance(t, Tensor)]
            nodes += [following for following, _ in node.next_functions]
    others = {t.untyped_storage().data_ptr() for t in shared}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return sum(size for place, size in storages.items() if place not in others) / (LAYERS * ids.numel())


LARGER: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 8, "num_key_value_heads": 2},
    "qwen3": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "opt": {},
    "gpt2": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", LARGER)
def test_what_autograd_keeps_is_what_the_plan_says(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, **LARGER[family])
    planned = autograd_bytes(model, dtype, torch.device("cpu"))
    measured = kept_bytes(model, dtype)
    assert measured <= planned <= 1.05 * measured


@pytest.mark.parametrize("family", [family for family, (norms, _) in PER_LAYER.items() if norms])
def test_a_whole_run_keeps_the_same_units_and_weights(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"keep": 0.6, "calibration": ids, "alignment": 4}
    ours, stock = tiny_model(family), tiny_model(family)
    with counted(monkeypatch) as calls:
        fast.minify(ours, **options)
    assert calls["rms_norm"] and calls["rotary"]
    for phase in (trials, refit, sweep):
        monkeypatch.setattr(phase, "fast_layers", lambda model: fast_attention(model.config))
    with counted(monkeypatch) as calls:
        fast.minify(stock, **options)
    assert not calls["rms_norm"] and not calls["rotary"]
    for (name, mine), (_, theirs) in zip(ours.state_dict().items(), stock.state_dict().items(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=name)
