"""The harness of benchmarks/peers.py, with no peer installed: budgets, files handed over, rows, tables, loading."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.tiny import tiny_model

WORKERS = ("optipfair", "torch_pruning", "fmchisel", "minisp")


@pytest.fixture
def peers(script: Any) -> Any:
    return script("peers")


def cell(place: int, keep: float, **values: Any) -> dict[str, Any]:
    measured = {"seconds": 7.4, "peak_bytes": 900 << 20, "parameters": 118_300_000, "loads": "stock"}
    return {"spec": {"keep": keep}, "keep": keep, "place": place, **measured, **values}


def made_up() -> dict[str, Any]:
    rows = {
        "80% minisp: defaults": cell(6, 0.8, perplexity={"text": 11.5, "novel": 24.0}, loads="own code"),
        "90% minisp: defaults": cell(6, 0.9, perplexity={"text": 10.5, "novel": 21.0}, loads="own code"),
        "80% OptiPFair: static": cell(0, 0.8, perplexity={"text": 1500.0, "novel": 40.0}),
        "80% fmchisel: OSSCAR": {"keep": 0.8, "place": 4, "error": "no such package"},
    }
    return {"tokens": 65536, "dense": {"perplexity": {"text": 10.0, "novel": 20.0}}, "rows": rows}


def test_the_page_has_ratios_costs_and_failures(script: Any) -> None:
    page = "".join(script("tables").peers(made_up()))
    assert "| OptiPFair: static |  | 150 · 2.000 |" in page
    assert "| minisp: defaults | 1.050 · 1.050 | 1.150 · 1.200 |" in page
    assert "7 · 900 · 118.3 · own code" in page
    assert page.endswith("\n80% fmchisel: OSSCAR failed: no such package\n")


def test_the_printed_table_names_what_failed(peers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    peers.show(made_up())
    printed = " ".join(capsys.readouterr().out.split())
    assert "1.200" in printed and "failed" in printed
    assert printed.index("90% minisp") < printed.index("80% OptiPFair") < printed.index("80% minisp")


def test_windows_reach_a_worker_as_they_are(script: Any, tmp_path: Path) -> None:
    windows = torch.randint(0, 50_000, (3, 16))
    save_file({"windows": windows}, tmp_path / "windows.safetensors")
    found = script("peer_worker").read_windows(tmp_path / "windows.safetensors")
    assert torch.equal(found, windows) and found.dtype == torch.int64


@pytest.mark.parametrize("total", [96, 1536, 46080])
def test_shares_are_turned_into_the_units_that_were_meant(script: Any, total: int) -> None:
    worker = script("peer_worker")
    for count in range(total):
        share = worker.truncates_to(count, total)
        # As OptiPFair and Torch-Pruning compute, from a percentage that goes and from a ratio that goes.
        assert int(100 * share / 100 * total) == count
        assert int(total * (1 - (1 - share))) == count


def test_a_uniform_width_is_within_half_a_unit_of_the_budget(script: Any) -> None:
    model = argparse.Namespace(config=argparse.Namespace(intermediate_size=1536))
    widths = [script("peer_worker").uniform_width(model, keep) for keep in (0.9, 0.8, 0.7)]
    assert widths == [1382, 1229, 1075]


def test_another_budget_is_refused(peers: Any) -> None:
    peers.check_budget([1382, 1382], 0.9, 1536)
    peers.check_budget([1536, 1216], 0.9, 1536)
    for widths in ([1382, 1300], [1536, 1536]):
        with pytest.raises(SystemExit, match="Expected 2765 ± 64 MLP units"):
            peers.check_budget(widths, 0.9, 1536)


def test_another_dense_model_is_refused(peers: Any) -> None:
    peers.check_same_model(3.2001, 3.2)
    peers.check_same_model(None, 3.2)
    for loss in (3.25, float("nan")):
        with pytest.raises(SystemExit, match="reads another model"):
            peers.check_same_model(loss, 3.2)


def test_rows_are_measured_once_and_failures_again(peers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured, written = [], []

    def measure(result: Any, spec: dict[str, Any], *_: Any) -> dict[str, Any]:
        measured.append((spec["worker"], spec["keep"]))
        return {"error": "out of memory"} if spec["keep"] == 0.8 and len(measured) < 3 else {"seconds": 1.0}

    monkeypatch.setattr(peers, "measure_row", measure)
    monkeypatch.setattr(peers.harness, "write_json", lambda name, result: written.append(len(result["rows"])))
    arguments = argparse.Namespace(keep=[0.9, 0.8], only=["optipfair: static"])
    result: dict[str, Any] = {"rows": {}}
    for _ in range(3):
        peers.fill(result, arguments, tmp_path, "peers_test")
    assert measured == [("peer_optipfair.py", 0.9), ("peer_optipfair.py", 0.8), ("peer_optipfair.py", 0.8)]
    assert written == [1, 2, 2]
    assert [list(row) for row in result["rows"].values()] == [["spec", "keep", "place", "seconds"]] * 2


@pytest.mark.parametrize("worker", WORKERS)
def test_workers_say_what_they_want_without_their_peer(
    script: Any, worker: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [worker, "--help"])
    with pytest.raises(SystemExit) as stopped:
        script(f"peer_{worker}").main()
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--windows" in said
    variants = {variant for _, file, variant in script("peers").PEERS.values() if file == f"peer_{worker}.py"}
    assert variants and all(variant in said for variant in variants)


def test_packages_are_pinned_and_name_no_place(script: Any) -> None:
    environments = script("peer_environments")
    for name in environments.ENVIRONMENTS:
        steps = environments.described(name)
        assert any(word.startswith(f"{name}==") for step in steps for word in step)
        assert not any("/" in word for step in steps for word in step)


def test_a_stock_folder_loads_and_other_widths_are_rebuilt(script: Any, tmp_path: Path) -> None:
    evaluate, model = script("peer_evaluate"), tiny_model("llama")
    model.save_pretrained(tmp_path / "stock")
    loaded, how, error = evaluate.load(tmp_path / "stock")
    assert (how, error) == ("stock", "")
    mlp = model.model.layers[1].mlp
    for name in ("gate_proj", "up_proj"):
        getattr(mlp, name).weight = nn.Parameter(getattr(mlp, name).weight[:20].clone())
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :20].clone())
    model.save_pretrained(tmp_path / "ragged")
    ids = torch.arange(10)[None]
    rebuilt, how, error = evaluate.load(tmp_path / "ragged")
    assert how == "no" and error and str(tmp_path) not in error
    assert torch.equal(rebuilt.eval()(ids).logits, model(ids).logits)
    assert not torch.allclose(loaded.eval()(ids).logits, model(ids).logits)
