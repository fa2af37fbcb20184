"""A finished result as its folder describes it: the manifest that `minify` writes, and what the run took."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisp.errors import CheckpointError
from minisp.report.record import RUN_NAME
from minisp.report.report import MapReport, StructureReport
from minisp.report.saliency import LEVELS, Saliency
from minisp.store.writer import MANIFEST_NAME


@dataclass(frozen=True)
class PhaseRecord:
    """What one part of a run took: see `minisp.report.record`. What the plan does not say is None."""

    name: str
    seconds: float
    expected_seconds: float | None
    memory: int
    planned_memory: int | None


@dataclass(frozen=True)
class RunRecord:
    """What a run took, and where: `compute` are (name, value) pairs."""

    phases: tuple[PhaseRecord, ...]
    compute: tuple[tuple[str, str], ...]
    on_gpu: bool


@dataclass(frozen=True)
class WrittenResult:
    """What stands in the folder of a result.

    Attributes:
        version: of minisp.
        source: name of the model that was cut; `source_fingerprint` is None for a model in memory.
        parameters, bytes: before and after.
        needs_code: whether it loads with a modelling file of its own.
        keep: the share that stayed, of what could go; config: all options.
        calibration: sentences that say what the calibration text was; `calibration_fingerprint` its SHA-256.
        checksums: file name → SHA-256.
        run: None where nobody recorded what the run took.
    """

    folder: Path
    version: str
    source: str
    source_fingerprint: str | None
    model_type: str
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    needs_code: bool
    keep: float
    config: Mapping[str, Any]
    calibration: tuple[str, ...]
    calibration_fingerprint: str
    layers: tuple[StructureReport, ...]
    maps: tuple[MapReport, ...]
    checksums: Mapping[str, str]
    run: RunRecord | None


def read_result(folder: Path) -> WrittenResult:
    """Read what `minify` wrote about a result.

    Raises:
        CheckpointError: there is no manifest, or not one of a result, or a value in it is of the wrong kind.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: expected the folder of a result with its {MANIFEST_NAME}, found none. Name a folder that "
            "minisp minify has written."
        )
    facts = _read(path)
    if "target" in facts:
        raise CheckpointError(
            f"{path}: expected a result of minisp minify, got an export of one. Name the folder that it was made from."
        )
    record = _read(folder / RUN_NAME) if (folder / RUN_NAME).is_file() else None
    try:
        return _result(folder, facts, _run(record) if record is not None else None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: expected what this version writes into {MANIFEST_NAME} and {RUN_NAME}, got something else "
            f"({type(error).__name__}: {error}). Minify again, or use the version that wrote it."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}. Minify again.") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(facts).__name__}. Minify again.")
    return facts


def _result(folder: Path, facts: Mapping[str, Any], run: RunRecord | None) -> WrittenResult:
    fingerprint = facts["source"]["fingerprint"]
    before_after = [(int(facts[name]["before"]), int(facts[name]["after"])) for name in ("parameters", "bytes")]
    if min(size for pair in before_after for size in pair) < 1:
        raise ValueError("a size below 1")
    return WrittenResult(
        folder=folder,
        version=str(facts["minisp_version"]),
        source=str(facts["source"]["name"]),
        source_fingerprint=None if fingerprint is None else str(fingerprint),
        model_type=str(facts["model_type"]),
        parameters=before_after[0],
        bytes=before_after[1],
        needs_code=bool(facts["needs_code"]),
        keep=float(facts["config"]["keep"]),
        config=dict(facts["config"]),
        calibration=tuple(map(str, facts["calibration"]["description"])),
        calibration_fingerprint=str(facts["calibration"]["fingerprint"]),
        layers=tuple(_layer(values) for values in facts["layers"]),
        maps=tuple(_map(values) for values in facts["maps"]),
        checksums={str(name): str(digest) for name, digest in facts["sha256"].items()},
        run=run,
    )


def _layer(values: Mapping[str, Any]) -> StructureReport:
    saliency = values["saliency"]
    highest = saliency["highest_cut"]
    if not 0 < int(values["kept"]) <= int(values["width"]) or len(saliency["quantiles"]) != len(LEVELS):
        raise ValueError("units or quantiles of a layer that cannot be")
    numbers = ("residual", "residual_sliced", "damping", "backward_error", "shift", "drift_explained")
    return StructureReport(
        layer=int(values["layer"]),
        structure=str(values["structure"]),
        width=int(values["width"]),
        kept=int(values["kept"]),
        damping_curve=tuple((float(damping), float(error)) for damping, error in values["damping_curve"]),
        saliency=Saliency(
            quantiles=tuple(map(float, saliency["quantiles"])),
            lost=float(saliency["lost"]),
            highest_cut=None if highest is None else float(highest),
        ),
        **{name: float(values[name]) for name in numbers},
    )


def _map(values: Mapping[str, Any]) -> MapReport:
    counts = ("layer", "weights", "zeros", "groups", "broken", "zero_rows", "zero_columns")
    return MapReport(
        path=str(values["path"]),
        pattern=str(values["pattern"]),
        cost=None if values["cost"] is None else float(values["cost"]),
        **{name: int(values[name]) for name in counts},
    )


def _run(facts: Mapping[str, Any]) -> RunRecord:
    phases = tuple(
        PhaseRecord(
            name=str(values["name"]),
            seconds=float(values["seconds"]),
            expected_seconds=None if values["expected_seconds"] is None else float(values["expected_seconds"]),
            memory=int(values["memory"]),
            planned_memory=None if values["planned_memory"] is None else int(values["planned_memory"]),
        )
        for values in facts["phases"]
    )
    kernels = dict(facts["implementations"])
    compute = (
        ("device", str(facts["device"])),
        ("compute type", str(facts["dtype"])),
        ("windows at once", str(int(facts["batch"]))),
        ("segments of layers", str(int(facts["segments"]))),
        ("kernels", ", ".join(f"{name}: {who}" for name, who in kernels.items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in dict(facts["versions"]).items())),
    )
    return RunRecord(phases, compute, on_gpu=str(facts["device"]).startswith("cuda"))
