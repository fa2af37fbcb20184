"""`minisp compare` and `minisp report`."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from minisp.evaluate import measure, speed
from minisp.report.record import RUN_NAME
from minisp.store.writer import MANIFEST_NAME
from tests.cli.test_app import SMALL, run
from tests.tiny import WIDTH, char_tokenizer, save_checkpoint, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

BRIEF = ("--window", "32", "--max-windows", "3", "--dtype", "float32")
WIDTHS = (WIDTH, 32, 24)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [save_checkpoint(root / f"m{width}", tiny_model("llama", intermediate_size=width)) for width in WIDTHS]


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("".join(f"sentence {i} of no consequence, then another one. " for i in range(14))[:640])
    return path


@pytest.fixture(scope="module")
def result(models: list[Path], prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("result") / "result"
    done = run("minify", models[0], "--keep", "0.6", "--out", out, "-c", prose, *SMALL, "--generic", "0", "--quiet")
    assert done.exit_code == 0, done.stderr
    return out


def test_three_models_stand_side_by_side(models: list[Path], prose: Path) -> None:
    flags = ("--text", prose, *BRIEF, "--no-builtin")
    found = json.loads(run("compare", *models, *flags, "--json").stdout)
    assert [model["name"] for model in found["models"]] == [str(model) for model in models]
    assert [model["parameters"] for model in found["models"]] == [
        tiny_model("llama", intermediate_size=width).num_parameters() for width in WIDTHS
    ]
    assert [other["name"] for other in found["to_the_first"]] == [str(model) for model in models[1:]]
    values = [model["perplexity"]["prose.txt"]["value"] for model in found["models"]]
    assert len(set(values)) == 3
    for other, value in zip(found["to_the_first"], values[1:], strict=True):
        assert other["perplexity_ratios"] == {"prose.txt": pytest.approx(value / values[0], rel=1e-9)}
        assert other["ratios"] == {}
    # Each is what it is alone.
    alone = json.loads(run("eval", models[2], *flags, "--no-speed", "--questions", "0", "--json").stdout)
    assert alone["perplexity"]["prose.txt"]["value"] == values[2]

    table = run("compare", *models, *flags).stdout
    row = next(line for line in table.splitlines() if "perplexity, prose.txt" in line)
    cells = [cell.strip() for cell in row.split("│")[2:-1]]
    ratios = [f"{value / values[0]:.3f}" for value in values]
    assert cells == [f"{values[0]:.2f}", f"{values[1]:.2f}", ratios[1], f"{values[2]:.2f}", ratios[2]]
    assert "tokens/s" not in table and "93 tokens scored in 3 windows of 32" in table


def test_python_has_texts_to_compare_on(models: list[Path]) -> None:
    found = json.loads(run("compare", *models[:2], *BRIEF, "--json").stdout)
    assert list(found["models"][0]["perplexity"]) == ["documentation", "code"]
    assert found["to_the_first"][0]["geometric_mean_perplexity_ratio"] > 0
    refused = run("compare", *models, *BRIEF, "--no-builtin")
    assert refused.exit_code == 3 and "expected a text to measure on" in refused.stderr


def test_the_speed_of_three_is_taken_in_turns(models: list[Path], prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    timed = speed.time_generation

    def noted(model: torch.nn.Module, *rest: object) -> tuple[float, float]:
        order.append(model.config.intermediate_size)  # type: ignore[union-attr, arg-type]
        return timed(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(speed, "time_generation", noted)
    monkeypatch.setattr(measure, "throughput", partial(speed.throughput, generation=speed.Generation(8, 2), budget=0.0))
    flags = ("--text", prose, *BRIEF, "--no-builtin", "--speed")
    found = json.loads(run("compare", *models, *flags, "--json").stdout)
    there, back = list(WIDTHS), list(reversed(WIDTHS))
    assert order == there + (there + back) * 3 + there
    assert [set(other["ratios"]) for other in found["to_the_first"]] == [{"prefill", "decode"}] * 2
    shown = run("compare", *models, *flags).stdout
    assert "decode tokens/s" in shown and "all in memory" in shown


def test_what_cannot_be_compared_is_refused(models: list[Path], prose: Path, tmp_path: Path) -> None:
    alone = run("compare", models[0], "--text", prose, *BRIEF)
    assert alone.exit_code == 2 and "two models or more" in alone.stderr
    tokenizer = char_tokenizer()
    other = save_checkpoint(tmp_path / "other", tiny_model("llama"), tokenizer=False)
    tokenizer.add_tokens(["sentence"])
    tokenizer.save_pretrained(other)
    refused = run("compare", models[0], models[1], other, "--text", prose, *BRIEF)
    assert refused.exit_code == 6 and "expected two models with one tokenizer" in refused.stderr
    assert str(other) in refused.stderr and refused.stdout == ""
    assert run("compare", models[0], tmp_path / "nothing", "--text", prose, *BRIEF).exit_code == 5


def test_a_report_is_one_page_that_minify_has_left_all_facts_for(result: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = run("report", result, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert f"written to {out}" in done.stdout and "MLP units" in done.stdout
    page = out.read_text("utf-8")
    phases = json.loads((result / RUN_NAME).read_text())["phases"]
    assert {"saliency sweep", "refit"} <= {phase["name"] for phase in phases}
    assert all(f"<td>{phase['name']}</td>" in page for phase in phases)
    assert "m48, minified" in page and "What the models write" not in page
    taken = run("report", result, "--out", out)
    assert taken.exit_code == 8 and out.read_text("utf-8") == page
    assert json.loads(run("report", result, "--out", tmp_path / "b.html", "--json").stdout) == {
        "out": str(tmp_path / "b.html"), "bytes": len(page.encode()), "samples": 0,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_samples_are_what_the_models_write(result: Path, models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    flags = ("--samples", "--dense", models[0], "--prompt", "one <b>day", "--new-tokens", "12", "--dtype", "float32")
    done = run("report", result, "--out", out, *flags)
    assert done.exit_code == 0, done.stderr
    page = out.read_text("utf-8")
    assert "one &lt;b&gt;day" in page and page.count('<p class="answer">') == 2
    tokenizer = char_tokenizer()
    ids = torch.tensor([tokenizer("one <b>day")["input_ids"]])
    for folder in (models[0], result):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        written = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        text = tokenizer.decode([token for token in written.tolist() if token != tokenizer.eos_token_id])
        assert text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in page.replace(
            "&#39;", "'"
        ).replace("&#34;", '"')


def test_what_cannot_be_reported_is_refused(result: Path, models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    for flags in (("--samples",), ("--dense", models[0]), ("--prompt", "a")):
        refused = run("report", result, "--out", out, *flags)
        assert refused.exit_code == 3 and "expected --samples together with --dense" in refused.stderr
    plain = run("report", models[0], "--out", out)
    assert plain.exit_code == 5 and f"with its {MANIFEST_NAME}, found none" in plain.stderr
    assert run("export", result, "--to", "padded", "--out", tmp_path / "padded", "--quiet").exit_code == 0
    exported = run("report", tmp_path / "padded", "--out", out)
    assert exported.exit_code == 5 and "got an export" in exported.stderr
    long = run("report", result, "--out", out, "--samples", "--dense", models[0], "--new-tokens", "1000")
    assert long.exit_code == 3 and "the positions this model has" in long.stderr
    assert not out.exists() and not list(tmp_path.glob("*.partial"))
