"""The golden record of written weights: it holds within a machine, sees another result, and refuses another machine."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minisp.methods.selection import select
from minisp.phases import decide

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def golden(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, on the portable path and for one family."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setitem(sys.modules, "minisp._C", None)
    return importlib.import_module("golden")


def test_a_record_holds_and_another_result_is_seen(golden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = golden.all_digests(("gpt2",))
    assert sorted(found) == [f"gpt2 {recipe} model.safetensors" for recipe in ("defaults", "paper", "uniform")]
    assert len(set(found.values())) == 3
    # Through JSON, as a file would return it.
    record = json.loads(json.dumps({"machine": golden.machine(), "weights": found}))
    assert golden.check(record, golden.all_digests(("gpt2",))) == []
    monkeypatch.setattr(decide, "select", lambda scores, *rest: select([-s for s in scores], *rest))
    assert golden.check(record, golden.all_digests(("gpt2",))) == [f"differs: {name}" for name in sorted(found)]


def test_what_is_missing_or_new_is_said(golden: Any) -> None:
    record = {"machine": golden.machine(), "weights": {"a": "1", "b": "2"}}
    assert golden.check(record, {"b": "2", "c": "3"}) == ["missing: a", "new: c"]


def test_another_machine_s_record_is_refused(golden: Any) -> None:
    record = {"machine": {**golden.machine(), "torch": "0.1"}, "weights": {}}
    with pytest.raises(SystemExit, match=r"expected one of this machine, .* Record anew"):
        golden.check(record, {})
    assert golden.machine()["torch"] == torch.__version__
