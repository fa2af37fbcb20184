"""A result's page: what it says is what the manifest says, it stands alone, and names in it are text."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from minisp import fast
from minisp.errors import CheckpointError
from minisp.phases.run import Phase
from minisp.report import record as record_module
from minisp.report.page import Sample, result_page
from minisp.report.record import RUN_NAME, record_run
from minisp.report.report import MinifyReport
from minisp.report.result import read_result
from minisp.report.saliency import LEVELS, saliency_of
from minisp.store.writer import MANIFEST_NAME
from tests.tiny import LAYERS, save_checkpoint, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

HOSTILE = (
    "</p></style><script src='http://evil.example/x.js'>alert(1)</script><img onerror=\"x\" src=x>&amp;{{ 7 * 7 }}"
)
WINDOWS = torch.randint(64, (6, 32), generator=torch.Generator().manual_seed(0))
KINDS = {
    "units": {"keep": 0.6, "damping": "auto", "structures": ("mlp", "attention")},
    "given damping": {"keep": 0.6},
    "zeros": {"keep": 0.5, "method": "wanda", "pattern": "2:4"},
    "nothing": {"keep": 1.0},
    "costs": {"keep": 0.6, "method": "surgeon"},
}


class Page(HTMLParser):
    """Tags, attributes and text of a page, in their order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MinifyReport]:
    root = tmp_path_factory.mktemp("results")
    source = save_checkpoint(root / "source", tiny_model("llama"))
    found = {
        kind: fast.minify(source, out=root / kind, calibration=WINDOWS, dtype="float32", **options)
        for kind, options in KINDS.items()
    }
    for report in found.values():
        record_run(report)
    return found


@pytest.fixture
def folder(reports: dict[str, MinifyReport], tmp_path: Path) -> Path:
    """A copy of what a result's folder says, to be spoiled."""
    assert reports["units"].out is not None
    for name in (MANIFEST_NAME, RUN_NAME):
        (tmp_path / name).write_bytes((reports["units"].out / name).read_bytes())
    return tmp_path


def page_of(folder: Path | None, *samples: Sample) -> str:
    assert folder is not None
    return result_page(read_result(folder), samples)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_stands_alone(kind: str, reports: dict[str, MinifyReport]) -> None:
    text = page_of(reports[kind].out, Sample("a prompt", (("before", "one"), ("after", "two"))))
    found = Page(text)
    assert not set(found.tags) & {"script", "img", "iframe", "object", "embed", "base", "form", "a", "use", "image"}
    assert [value for name, value in found.attributes if name in ("src", "href", "srcset", "action")] == ["data:,"]
    assert not re.search(r"https?://|//\w|url\(|@import|javascript:", text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in found.attributes
    assert not [name for name, _ in found.attributes if name.startswith("on")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_tag_is_closed(kind: str, reports: dict[str, MinifyReport]) -> None:
    text = re.sub(r"<style>.*?</style>", "", page_of(reports[kind].out), flags=re.DOTALL)
    open_tags: list[str] = []
    for closing, tag, empty in re.findall(r"<(/?)(\w+)[^>]*?(/?)>", text):
        if closing:
            assert open_tags.pop() == tag
        elif not empty and tag not in ("meta", "link"):
            open_tags.append(tag)
    assert open_tags == []


def test_the_page_says_what_was_done(reports: dict[str, MinifyReport]) -> None:
    report = reports["units"]
    assert report.out is not None
    found = Page(page_of(report.out)).text
    config = json.loads((report.out / MANIFEST_NAME).read_text())
    kept, width = (sum(getattr(x, name) for x in report.layers if x.structure == "mlp") for name in ("kept", "width"))
    assert f"MLP units {width:,} {kept:,} {kept / width:.3f}" in found
    assert f"parameters {report.plan.parameters:,} {report.parameters:,}" in found
    assert report.load_line is not None and report.load_line in found
    for sentence in report.calibration:
        assert sentence in found
    for value in (report.calibration_fingerprint, config["source"]["fingerprint"], *config["sha256"].values()):
        assert value in found
    assert f"keep {report.plan.config.keep}" in found and "damping auto" in found
    for layer in report.layers:
        if layer.kept < layer.width:
            assert f"{layer.residual_sliced:.3f} {layer.residual:.3f} {layer.damping:g}" in found
    for phase in report.seconds:
        assert f"{phase} " in found


def test_every_layer_is_drawn(reports: dict[str, MinifyReport]) -> None:
    text = page_of(reports["given damping"].out)
    # Once for wide screens, once for phones.
    assert text.count('<rect class="bar fill0"') == 2 * LAYERS == text.count('<rect class="bar gone"')
    cut = [x for x in reports["given damping"].layers if x.kept < x.width]
    assert text.count("refitted</title>") == 2 * len(cut) == text.count("sliced</title>")
    assert "What was tried to choose the damping" not in text
    assert "What was tried to choose the damping" in page_of(reports["units"].out)
    zeros = page_of(reports["zeros"].out)
    assert "Zeros in the linear maps" in zeros and zeros.count("weights are 0</title>") == 2 * 7 * LAYERS
    assert "Residual of each layer" not in page_of(reports["nothing"].out)
    for kind, expected in (("costs", "The Surgeon chose by costs"), ("units", "Units below the dots went")):
        assert (expected in page_of(reports[kind].out)) and (expected not in page_of(reports["zeros"].out))


def strings(values: Any, spoil: Any) -> Any:
    """The same values with every string, and every name that is free, replaced."""
    if isinstance(values, dict):
        return {
            spoil(key) if key.endswith((".safetensors", ".json")) else key: strings(value, spoil)
            for key, value in values.items()
        }
    if isinstance(values, list):
        return [strings(value, spoil) for value in values]
    return spoil(values) if isinstance(values, str) else values


def test_whatever_a_folder_says_is_text(folder: Path) -> None:
    plain = Page(page_of(folder, Sample("p", (("a", "b"), ("c", "d")))))
    for name in (MANIFEST_NAME, RUN_NAME):
        # Different strings stay different, and those that decide how often something is drawn stay equal.
        facts = strings(json.loads((folder / name).read_text()), lambda text: HOSTILE + text)
        (folder / name).write_text(json.dumps(facts))
    spoiled = page_of(folder, Sample(HOSTILE, ((HOSTILE, HOSTILE), (HOSTILE, HOSTILE))))
    found = Page(spoiled)
    assert found.tags == plain.tags
    assert {name for name, _ in found.attributes} == {name for name, _ in plain.attributes}
    assert "<script" not in spoiled and "49" not in found.words[0]
    # What people read is what stood there.
    assert HOSTILE in found.text and f"{HOSTILE}source, minified" in found.text


def places(values: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """The path of every value; of a list, inside the first item alone."""
    for key in values if isinstance(values, dict) else range(len(values[:1])) if isinstance(values, list) else ():
        yield (*path, key)
        yield from places(values[key], *path, key)


@pytest.mark.parametrize("name", [MANIFEST_NAME, RUN_NAME])
@pytest.mark.parametrize("instead", [None, "words", -1, [], {}, "gone"], ids=str)
def test_a_spoiled_folder_gives_a_page_or_a_typed_error(name: str, instead: Any, folder: Path) -> None:
    whole = (folder / name).read_text()
    refused = 0
    for path in places(json.loads(whole)):
        if path[0] in ("config", "sha256", "versions", "implementations") and len(path) > 1:
            continue
        facts = json.loads(whole)
        holder = facts
        for key in path[:-1]:
            holder = holder[key]
        if instead == "gone":
            del holder[path[-1]]
        else:
            holder[path[-1]] = instead
        (folder / name).write_text(json.dumps(facts))
        try:
            page_of(folder)
        except CheckpointError as error:
            assert "Minify again" in str(error)
            refused += 1
    assert refused > 3


def test_a_folder_without_a_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / RUN_NAME).unlink()
    assert "Nobody recorded what this run took" in page_of(folder)
    for content in ("no JSON", "[]", "[" * 100_000):
        (folder / MANIFEST_NAME).write_text(content)
        with pytest.raises(CheckpointError, match="expected"):
            read_result(folder)
    (folder / MANIFEST_NAME).write_text('{"target": "gguf"}')
    with pytest.raises(CheckpointError, match="got an export"):
        read_result(folder)
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match="found none"):
        read_result(folder)


def test_the_record_holds_what_the_run_took_beside_the_plan(
    reports: dict[str, MinifyReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = reports["units"]
    assert report.out is not None
    names = ["loading", "calibration text", "saliency sweep", "decision", "refit", "writing"]
    brief = json.loads((report.out / RUN_NAME).read_text())["phases"]
    assert [phase["name"] for phase in brief] == names == list(report.memory)
    assert all(phase["expected_seconds"] is None for phase in brief)
    memory = [phase["memory"] for phase in brief]
    assert memory == sorted(memory) and memory[-1] <= report.peak_rss
    peaks = report.plan.layout.peaks
    (sweep,) = (phase for phase in brief if phase["name"] == "saliency sweep")
    part = max(sum(peaks[x].values()) for x in record_module.PARTS["saliency sweep"] if x in peaks)
    assert sweep["planned_memory"] == part + report.plan.base_memory
    monkeypatch.setattr(record_module, "LONG_SECONDS", 0.0)
    record_run(report)
    expected = {x["name"]: x["expected_seconds"] for x in json.loads((report.out / RUN_NAME).read_text())["phases"]}
    assert expected["saliency sweep"] > 0 and expected["refit"] > 0 and expected["loading"] is None
    assert f"{expected['refit']:.1f} s" in page_of(report.out)
    assert RUN_NAME not in json.loads((report.out / MANIFEST_NAME).read_text())["sha256"]


def test_every_phase_of_a_plan_is_part_of_what_is_measured() -> None:
    assert {phase for parts in record_module.PARTS.values() for phase in parts} == set(Phase)


def test_what_is_read_is_what_was_reported(reports: dict[str, MinifyReport]) -> None:
    for report in reports.values():
        assert report.out is not None
        found = read_result(report.out)
        assert found.layers == report.layers and found.maps == report.maps
        assert found.parameters == (report.plan.parameters, report.parameters)
        assert found.bytes == (report.plan.bytes, report.bytes) and found.needs_code == report.needs_code
        assert dict(found.config) == json.loads(json.dumps(report.plan.config.as_dict()))


def test_the_distribution_of_saliency() -> None:
    score = torch.arange(101, dtype=torch.float64).flip(0)
    kept = torch.arange(61)
    found = saliency_of(score, kept)
    assert found.quantiles == pytest.approx([100 * level for level in LEVELS])
    assert found.highest_cut == 39.0 and found.lost == pytest.approx(sum(range(40)) / 5050)
    whole = asdict(saliency_of(torch.zeros(4, dtype=torch.float64), torch.arange(4)))
    assert whole == {"quantiles": (0.0,) * len(LEVELS), "lost": 0.0, "highest_cut": None}


def test_units_that_went_had_less_saliency_than_units_that_stayed(reports: dict[str, MinifyReport]) -> None:
    for report in (reports["units"], reports["given damping"]):
        for layer in report.layers:
            highest = layer.saliency.highest_cut
            assert (highest is None) is (layer.kept == layer.width)
            assert highest is None or layer.saliency.quantiles[0] <= highest < layer.saliency.quantiles[-1]
            assert 0 <= layer.saliency.lost <= 1 - layer.kept / layer.width
