"""Targets: the result is never above what was asked for, and close to it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minisp import fast
from minisp.errors import ConfigError
from minisp.evaluate.perplexity import checkpoint_bytes
from minisp.plan.targets import HEADERS
from tests.tiny import MODEL_TYPES, save_checkpoint, tiny_model
from tests.toys import windows

FEW = "ignore:.* calibration tokens are few:UserWarning"
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(FEW)]
IDS = windows(4, 16)
WIDE: dict[str, dict[str, int]] = {
    **{name: {"intermediate_size": 512} for name in ("llama", "mistral", "qwen2", "qwen3")},
    "opt": {"ffn_dim": 512},
    "gpt2": {"n_inner": 512},
}


@pytest.mark.parametrize("structures", [("mlp",), ("mlp", "attention")])
@pytest.mark.parametrize("widths", ["per-layer", "uniform"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_parameters_are_never_above_the_target_and_within_a_hundredth(
    model_type: str, widths: str, structures: tuple[str, ...]
) -> None:
    model = tiny_model(model_type, **WIDE[model_type])
    before = sum(p.numel() for p in model.parameters())
    for share in (0.75,):
        wanted = round(share * before)
        options: dict[str, Any] = {"calibration": IDS, "alignment": 1, "min_keep": 0.0}
        copy = tiny_model(model_type, **WIDE[model_type])
        report = fast.minify(copy, target_params=str(wanted), widths=widths, structures=structures, **options)
        after = sum(p.numel() for p in copy.parameters())
        assert after == report.parameters <= wanted
        assert after > 0.99 * wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_weight_files_are_never_above_the_target(dtype: str, tmp_path: Path) -> None:
    model = tiny_model("llama", intermediate_size=2048)
    source = save_checkpoint(tmp_path / "dense", model.to(getattr(torch, dtype)))
    before = checkpoint_bytes(source)
    for share in (0.6,):
        wanted, out = round(share * before), tmp_path / f"{share}"
        report = fast.minify(source, out=out, target_size=f"{wanted / 1e3:.3f}KB", alignment=1, calibration=IDS)
        assert report.bytes == checkpoint_bytes(out) <= wanted
        assert checkpoint_bytes(out) > 0.99 * wanted - HEADERS
        assert report.plan.bytes_after <= wanted + HEADERS
        assert f"at most {wanted / 1e3:.3f}KB" in str(report.plan)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_params": "1k"}, "target_params: expected more than 4,464, .* and less than 11,376, .* got 1,000"),
        ({"target_params": "1M"}, "less than 11,376, which the model has, got 1.0M"),
        ({"target_size": "1KB"}, "target_size: expected more than"),
        ({"target_size": "-3"}, "target_size: expected a size such as 90MB, got '-3'"),
        ({"target_params": "many"}, "target_params: expected a count such as 110M, got 'many'"),
        ({"target_params": "9k", "target_size": "40KB"}, "expected one of them, got both"),
        ({"target_params": "9k", "keep": 0.7}, "keep: expected it to be left out beside a target"),
        ({"target_params": "9k", "method": "wanda", "pattern": "unstructured"}, "pattern: expected structured"),
    ],
)
def test_a_target_that_cannot_be_is_refused_with_what_can(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        fast.plan(tiny_model("llama"), window=16, **options)


def test_a_target_decides_the_same_as_the_share_that_it_leads_to() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    first = fast.minify(model, calibration=IDS, target_params="10k", alignment=1)
    second = fast.minify(other, calibration=IDS, keep=first.plan.config.keep, alignment=1)
    assert [x.tolist() for x in first.kept] == [x.tolist() for x in second.kept]
    assert 0 < first.plan.config.keep < 1
