"""The benchmark's opponent does what the paper says: a comparison with a wrong opponent would prove nothing."""

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, M, D = 3, 24, 8


def _load(name: str) -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


naive = _load("naive")


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=D,
        intermediate_size=M,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(0, 50, (6, 16))


def test_score_and_gram_equal_a_float64_computation(model: LlamaForCausalLM, windows: Tensor) -> None:
    scores, grams = naive.collect(model, windows, batch_size=2)

    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def remember(layer: int) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            inputs[layer], outputs[layer] = args[0].detach(), output

        return hook

    exact = model.double()
    for i, mlp in enumerate(naive.mlps(exact)):
        mlp.down_proj.register_forward_hook(remember(i))
    expected_scores = torch.zeros(LAYERS, M, dtype=torch.float64)
    expected_grams = torch.zeros(LAYERS, M, M, dtype=torch.float64)
    for batch in windows.split(2):
        logits = exact(input_ids=batch).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten()).backward()
        for i, mlp in enumerate(naive.mlps(exact)):
            x = inputs[i].flatten(0, 1)
            # g = ∂L/∂x = (∂L/∂y) W_down, taken from the output's side of down_proj.
            gradient = outputs[i].grad
            assert gradient is not None
            g = gradient.flatten(0, 1) @ mlp.down_proj.weight
            expected_scores[i] += (x * g).abs().sum(0).detach()
            expected_grams[i] += x.T @ x
    torch.testing.assert_close(torch.stack(scores).double(), expected_scores, rtol=1e-4, atol=1e-7)
    # Rounding of a sum of products is relative to the sum of their magnitudes, not to what is left after cancelling.
    atol = 1e-5 * float(expected_grams.max())
    torch.testing.assert_close(torch.stack(grams).double(), expected_grams, rtol=1e-4, atol=atol)


def test_batch_size_changes_no_selection(model: LlamaForCausalLM, windows: Tensor) -> None:
    scores, grams = naive.collect(model, windows, batch_size=1)
    batched_scores, batched_grams = naive.collect(model, windows, batch_size=3)
    for one, three in zip(grams, batched_grams, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-5)
    # The loss is a mean over the batch, so gradients are a third; a ranking does not see the scale.
    for one, three in zip(scores, batched_scores, strict=True):
        torch.testing.assert_close(one, 3 * three, rtol=1e-3, atol=1e-6)


def test_ranking_is_global_and_leaves_no_layer_empty() -> None:
    scores = [torch.tensor([0.1, 0.2]), torch.tensor([5.0, 1.0, 7.0, 3.0]), torch.tensor([0.3, 2.0])]
    assert [kept.tolist() for kept in naive.rank(scores, 0.5)] == [[1], [0, 2, 3], [1]]
    assert [kept.tolist() for kept in naive.rank(scores, 1.0)] == [[0, 1], [0, 1, 2, 3], [0, 1]]


def test_ridge_equals_least_squares_in_float64() -> None:
    x = torch.randn(200, M, dtype=torch.float64)
    x[:, M // 2 :] += x[:, : M // 2]
    weight = torch.randn(D, M, dtype=torch.float64)
    kept = torch.randperm(M)[:15].sort().values
    gram = x.T @ x
    damping = 0.03
    refitted = naive.ridge(gram.float(), weight.float(), kept, damping)

    # min ‖X_S W'ᵀ − X Wᵀ‖² + λ ‖W'‖² as ordinary least squares, with √λ·I below X_S and zeros below the target.
    root = math.sqrt(damping * gram.diagonal().mean())
    tall = torch.cat([x[:, kept], root * torch.eye(len(kept), dtype=torch.float64)])
    target = torch.cat([x @ weight.T, torch.zeros(len(kept), D, dtype=torch.float64)])
    expected = torch.linalg.lstsq(tall, target).solution.T
    torch.testing.assert_close(refitted.double(), expected, rtol=1e-4, atol=1e-5)


def test_keeping_everything_changes_nothing(model: LlamaForCausalLM, windows: Tensor) -> None:
    before = model(input_ids=windows).logits.detach()
    result = naive.minify_naive(model, windows, 1.0, batch_size=3)
    assert [len(kept) for kept in result.kept] == [M] * LAYERS
    assert torch.equal(model(input_ids=windows).logits, before)


def test_refitting_on_all_units_changes_almost_nothing(model: LlamaForCausalLM, windows: Tensor) -> None:
    before = model(input_ids=windows).logits.detach()
    _, grams = naive.collect(model, windows, batch_size=3)
    for mlp, gram in zip(naive.mlps(model), grams, strict=True):
        naive.prune(mlp, gram, torch.arange(M), 1e-7)
    assert (model(input_ids=windows).logits - before).norm() <= 1e-2 * before.norm()


def test_pruned_model_has_the_kept_rows_and_refitted_columns(model: LlamaForCausalLM, windows: Tensor) -> None:
    _, grams = naive.collect(model, windows, batch_size=2)
    gates = [mlp.gate_proj.weight.detach().clone() for mlp in naive.mlps(model)]
    downs = [mlp.down_proj.weight.detach().clone() for mlp in naive.mlps(model)]
    result = naive.minify_naive(model, windows, 0.5, batch_size=2)
    assert sum(len(kept) for kept in result.kept) == LAYERS * M // 2
    for mlp, kept, gram, gate, down in zip(naive.mlps(model), result.kept, grams, gates, downs, strict=True):
        assert torch.equal(mlp.gate_proj.weight, gate[kept])
        expected = naive.ridge(gram, down, kept, naive.DAMPING) if len(kept) < M else down
        torch.testing.assert_close(mlp.down_proj.weight, expected)
    assert torch.isfinite(model(input_ids=windows).logits).all()


def test_perplexity_is_the_exponential_of_the_models_own_loss(model: LlamaForCausalLM, windows: Tensor) -> None:
    expected = model(input_ids=windows, labels=windows).loss.exp().item()
    assert naive.perplexity(model, windows) == pytest.approx(expected, rel=1e-5)
