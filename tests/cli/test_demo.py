"""The demo, on a tiny model in place of the one that it fetches: what it shows, and in which order it measures."""

from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from minisp.cli import demo
from minisp.config import MinifyConfig
from minisp.evaluate import measure
from minisp.evaluate.speed import Generation, throughput
from tests.tiny import save_checkpoint, tiny_model


def test_before_and_after_are_taken_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stored in 16 bits, computed in 32: the result is stored as the source is.
    source = save_checkpoint(tmp_path / "source", tiny_model("llama").bfloat16())
    monkeypatch.setattr(demo, "smollm2_135m", lambda: source)
    monkeypatch.setattr(demo, "PROTOCOL", measure.Protocol(window=32, max_windows=2))
    monkeypatch.setattr(measure, "throughput", partial(throughput, generation=Generation(8, 2), budget=0.0))
    phases: list[str] = []
    config = MinifyConfig(keep=0.7, window=32, num_windows=8, dtype="float32", alignment=1)
    result = demo.run_demo(
        tmp_path / "out", config, Console(file=StringIO()), lambda phase, done, total: phases.append(phase)
    )
    shown = StringIO()
    Console(file=shown, width=100).print(result.table())
    lines = shown.getvalue().splitlines()
    assert "Before and after" in lines[0]
    assert max(map(len, lines)) <= 100
    for kind in ("prefill", "decode"):
        ratio = result.compared.ratios[kind]
        row = next(place for place, line in enumerate(lines) if f"{kind} tokens/s" in line)
        assert f"×{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})" in lines[row]
        assert ("within noise" in lines[row + 1]) is ratio.within_noise
    # Nothing is timed while the machine does something else: the speed is the last thing.
    assert phases[-1] == "speed, in turns"
    values = result.as_dict()
    assert values["before"]["parameters"] > values["after"]["parameters"]
    assert values["before"]["bytes"] > values["after"]["bytes"]
    assert values["ratios"]["decode"]["pairs"] == values["after"]["throughput"]["turns"]
    assert result.logit_difference < 1e-4
    assert any("sign test" in line for line in result.lines())
