"""The report of a run: a record of plain values, its table for the terminal, and its JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from minisp.methods.sparse import SparsityFacts
from minisp.models.stream import Stream
from minisp.models.structures import UNITS
from minisp.phases.run import Run
from minisp.phases.shots import sparse_results
from minisp.plan.plan import Plan, plan_dict
from minisp.report.meter import Meter, peak_resident
from minisp.report.saliency import Saliency, saliency_of
from minisp.text.calibration import Calibration
from minisp.units import as_text, megabytes, millions


@dataclass(frozen=True)
class StructureReport:
    """One structure of a layer: units before and after, its residual with and without refitting, its solve.

    `structure` is its name in the layer, `width` the number of its units before. `damping_curve` lists (damping,
    cross-validated relative residual) where damping was chosen; `backward_error` and `shift` are those of
    `minisp.ops.cholesky.Solved`; `drift_explained` is the share of the drift that was corrected. `saliency` is the
    distribution of the scores, before trial cuts scale them.
    """

    layer: int
    structure: str
    width: int
    kept: int
    residual: float
    residual_sliced: float
    damping: float
    damping_curve: tuple[tuple[float, float], ...]
    backward_error: float
    shift: float
    drift_explained: float
    saliency: Saliency


@dataclass(frozen=True)
class MapReport(SparsityFacts):
    """One linear map with zeros: what is true of them, where they are, and `cost` as for `Sparse`."""

    layer: int
    path: str
    cost: float | None


@dataclass(frozen=True)
class MinifyReport:
    """What `minify` did.

    Attributes:
        plan: what it set out to do; `plan.config` are the options.
        layers: one record per structure, in the order in which they compute; none where weights were set to zero.
        maps: one line per linear map where weights were set to zero; none where units were cut.
        kept: per structure (n,) int64, the units that stayed.
        parameters: number of parameters after.
        bytes: size of the written weights, or of the model in memory.
        calibration: what the calibration consisted of; `calibration_fingerprint` is its SHA-256.
        seconds: wall time by phase.
        memory: by phase, the most memory that had been taken when it ended, in bytes: of the GPU where one computes,
            else of this process.
        peak_rss: highest resident memory of this process so far, in bytes.
        peak_device_memory: highest GPU memory allocated, in bytes; None without a GPU.
        out: the folder written, or None.
        needs_code: whether the result has a modelling file, because layers differ in size.
        load_line: the Python expression that loads the folder; None where nothing was written.
        model: the model pruned in place, where one was passed or nothing was written.
    """

    plan: Plan
    layers: tuple[StructureReport, ...]
    maps: tuple[MapReport, ...]
    kept: tuple[Tensor, ...] = field(repr=False)
    parameters: int
    bytes: int
    calibration: tuple[str, ...]
    calibration_fingerprint: str
    seconds: dict[str, float]
    memory: dict[str, int]
    peak_rss: int
    peak_device_memory: int | None
    out: Path | None
    needs_code: bool
    load_line: str | None
    model: nn.Module | None = field(repr=False)

    def __str__(self) -> str:
        """The result's table and the lines below it as text."""
        return as_text(report_table(self), summary_lines(self))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON. It leaves out `kept`, `needs_code` and `model`."""
        return {
            "plan": plan_dict(self.plan),
            "layers": [asdict(layer) for layer in self.layers],
            "maps": [asdict(item) for item in self.maps],
            "parameters": self.parameters,
            "bytes": self.bytes,
            "calibration": list(self.calibration),
            "calibration_fingerprint": self.calibration_fingerprint,
            "seconds": self.seconds,
            "memory": self.memory,
            "peak_rss": self.peak_rss,
            "peak_device_memory": self.peak_device_memory,
            "out": str(self.out) if self.out else None,
            "load_line": self.load_line,
        }


def make_report(
    stream: Stream, plan: Plan, run: Run, calibration: Calibration, meter: Meter, out: Path | None, *, needs_code: bool
) -> MinifyReport:
    """Gather the report of a run whose results will stand at `out`, with a modelling file or without."""
    config = plan.config
    results = [run.result(structure) for structure in stream.structures] if config.cuts else []
    sparse = sparse_results(run, plan.maps, config.shots)
    layers = tuple(
        StructureReport(
            layer=result.structure.layer,
            structure=result.structure.name,
            width=result.structure.num_units,
            kept=len(result.kept),
            saliency=saliency_of(run.statistics(result.structure, gram=False).score(config.saliency), result.kept),
            **result.fit.facts(),
        )
        for result in results
    )
    cut = sum((r.structure.num_units - len(r.kept)) * r.structure.parameters for r in results)
    on_gpu = stream.device.type == "cuda"
    return MinifyReport(
        plan=plan,
        layers=layers,
        maps=tuple(MapReport(**asdict(x.facts), layer=x.found.layer, path=x.found.path, cost=x.cost) for x in sparse),
        kept=tuple(r.kept for r in results),
        parameters=plan.parameters - cut,
        bytes=sum(p.numel() * p.element_size() for p in stream.model.parameters()),
        calibration=calibration.description,
        calibration_fingerprint=calibration.fingerprint,
        seconds=meter.seconds,
        memory=meter.device if on_gpu else meter.resident,
        peak_rss=peak_resident(),
        peak_device_memory=torch.cuda.max_memory_allocated(stream.device) if on_gpu else None,
        out=out,
        needs_code=needs_code,
        load_line=load_line(out, needs_code=needs_code) if out is not None else None,
        model=stream.model if stream.checkpoint is None else None,
    )


def load_line(folder: str | Path, *, needs_code: bool) -> str:
    """The Python expression that loads a result with transformers; `needs_code`: it has a modelling file."""
    trust = ", trust_remote_code=True" if needs_code else ""
    name = json.dumps(str(folder), ensure_ascii=False)
    return f"AutoModelForCausalLM.from_pretrained({name}{trust})"


def report_table(report: MinifyReport) -> Table:
    """The result as a table for the terminal."""
    plan = report.plan
    table = Table(title=escape(f"Result: {plan.model}"), title_justify="left")
    for name in ("", "before", "after", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    rows: list[tuple[str, int, int, str, str]] = []
    for name in plan.units if plan.config.cuts else ():
        mine = [layer for layer in report.layers if layer.structure == name]
        units, kept = sum(layer.width for layer in mine), sum(layer.kept for layer in mine)
        rows.append((UNITS[name], units, kept, f"{units:,}", f"{kept:,}"))
    rows.append(
        ("parameters", plan.parameters, report.parameters, millions(plan.parameters), millions(report.parameters))
    )
    rows.append(("weights", plan.bytes, report.bytes, megabytes(plan.bytes), megabytes(report.bytes)))
    if report.maps:
        weights, zeros = (sum(getattr(x, name) for x in report.maps) for name in ("weights", "zeros"))
        text = f"{weights - zeros:,} not 0"
        rows.insert(0, (f"weights in {len(report.maps)} linear maps", weights, weights - zeros, f"{weights:,}", text))
    for name, before, after, before_text, after_text in rows:
        table.add_row(name, before_text, after_text, f"{after / before:.3f}")
    cut = [layer for layer in report.layers if layer.kept < layer.width]
    if cut:
        sliced = sum(layer.residual_sliced for layer in cut) / len(cut)
        refitted = sum(layer.residual for layer in cut) / len(cut)
        table.add_row(
            f"mean residual of {len(cut)} structures",
            f"{sliced:.3f} sliced",
            f"{refitted:.3f} refitted",
            f"{refitted / sliced:.3f}" if sliced else "",
        )
        low, high = min(layer.damping for layer in cut), max(layer.damping for layer in cut)
        table.add_row("damping", "", f"{low:.1e}" if low == high else f"{low:.1e} to {high:.1e}", "")
        table.add_row("largest backward error", "", f"{max(layer.backward_error for layer in cut):.1e}", "")
    return table


def summary_lines(report: MinifyReport) -> list[str]:
    """What the table has no room for: calibration, time, memory, and how to load the result."""
    phases = ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())
    lines = [f"calibration: {'; '.join(report.calibration)}", f"time: {phases}"]
    lines.append(f"peak memory: {peak_memory_line(report)}")
    if report.out is not None:
        lines.append(f"written to {report.out}")
        lines.append(f"load it with: {report.load_line}")
    return lines


def peak_memory_line(report: MinifyReport) -> str:
    """The measured peaks beside the planned one."""
    planned = megabytes(report.plan.peak_memory)
    if report.peak_device_memory is None:
        return f"{megabytes(report.peak_rss)} of the process (planned {planned})"
    return (
        f"{megabytes(report.peak_device_memory)} on the GPU (planned {planned}), {megabytes(report.peak_rss)} beside it"
    )
