"""A ladder of ratios from one calibration: what each costs in perplexity, and which is the smallest that a gate bears.

The statistics of one sweep serve all ratios. Each ratio then takes a selection and a refit, and a measurement.

    sweep ► keep 0.9 ► keep 0.8 ► … ► measured side by side ► table, CSV, figure, JSON
"""

import csv
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from minisp import fast
from minisp.config import MinifyConfig, split_options
from minisp.errors import ConfigError, GateError, OutputError
from minisp.evaluate.measure import Comparison, Measurement, Protocol, compare, tokenize
from minisp.phases.run import Progress
from minisp.store.checkpoint import Checkpoint
from minisp.store.claim import holds_records
from minisp.store.hub import local_folder
from minisp.store.writer import MANIFEST_NAME, publish_json, read_json, write_json
from minisp.units import megabytes, millions

CSV_NAME, JSON_NAME, FIGURE_NAME, IDENTITY_NAME = "frontier.csv", "frontier.json", "frontier.png", "sweep.json"
FILES = (CSV_NAME, JSON_NAME, FIGURE_NAME)
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class Gate:
    """What a result has to bear: perplexity over that of the dense model, the geometric mean over all texts.

    Attributes:
        max_ratio: the most that is borne.
        confirmed_on: text name → (T,) tokens that neither calibrated nor chose; the rung that is chosen has to hold on
            them too.
    """

    max_ratio: float
    confirmed_on: Mapping[str, Tensor]


@dataclass(frozen=True)
class Rung:
    """One ratio: the share kept, its folder, and how it compares with the dense model."""

    keep: float
    folder: Path
    compared: Comparison

    @property
    def ratio(self) -> float:
        """Perplexity over that of the dense model: the geometric mean over all texts."""
        return self.compared.perplexity_ratio()


@dataclass(frozen=True)
class Frontier:
    """What a sweep found.

    Attributes:
        model: name of the dense model; dense: what was found of it.
        rungs: in the order in which they were asked for.
        chosen: the smallest rung that holds the gate; None without a gate.
        confirmed: its ratio on the texts that confirm; None without a gate.
    """

    model: str
    dense: Measurement
    rungs: tuple[Rung, ...]
    chosen: Rung | None = None
    confirmed: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rungs = [
            {
                "keep": rung.keep,
                "folder": str(rung.folder),
                "parameters": rung.compared.second.parameters,
                "bytes": rung.compared.second.bytes,
                **rung.compared.ratios_dict(),
            }
            for rung in self.rungs
        ]
        chosen = None if self.chosen is None else self.chosen.keep
        return {
            "model": self.model,
            "dense": asdict(self.dense),
            "rungs": rungs,
            "chosen": chosen,
            "confirmed_ratio": self.confirmed,
        }

    def table(self) -> Table:
        """One line for every ratio."""
        table = Table(title="Sweep over ratios", title_justify="left")
        texts = list(self.dense.perplexity)
        speeds = list(self.rungs[0].compared.ratios)
        for name in ("keep", "parameters", "weights", *texts, "mean ratio", *(f"{kind} speed" for kind in speeds)):
            table.add_column(name, justify="right")
        dense = [f"{self.dense.perplexity[text].value:.3f}" for text in texts]
        weights = megabytes(self.dense.bytes)
        table.add_row("dense", millions(self.dense.parameters), weights, *dense, "1.000", *("×1.00" for _ in speeds))
        for rung in self.rungs:
            found = rung.compared.second
            ratios = [f"×{rung.compared.perplexity_ratio(text):.3f}" for text in texts]
            faster = [f"×{rung.compared.ratios[kind].median:.2f}" for kind in speeds]
            mark = " ◄" if rung is self.chosen else ""
            name, mean = f"{rung.keep:g}{mark}", f"{rung.ratio:.3f}"
            table.add_row(name, millions(found.parameters), megabytes(found.bytes), *ratios, mean, *faster)
        return table


def sweep(
    model: str | Path,
    *,
    out: str | Path,
    texts: Mapping[str, str],
    keeps: Sequence[float] = KEEPS,
    gate: float | None = None,
    calibration: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> Frontier:
    """Minify a checkpoint at several ratios from one calibration, and measure all of them side by side.

    Ratios that an earlier call with the same options has finished in `out` are taken as they are.

    Args:
        model: a Hugging Face folder, a hub id or a GGUF file.
        out: folder; each ratio gets a folder in it, such as keep-0.8, beside a table, a figure and JSON.
        texts: name → text to measure perplexity on. With a gate, the first half of each chooses, the second confirms.
        keeps: the ratios.
        gate: the most perplexity over that of the dense model that is borne, such as 1.1: chooses the smallest rung.
        calibration, progress, **options: as for `minisp.fast.minify`; `speed=True` measures tokens per second too, and
            `protocol` says how perplexity is measured.

    Raises:
        GateError: no ratio holds the gate; all results stay.
        OutputError: a folder of `out` holds something else.
        MinispError: as for `minify` and `measure`.
    """
    speed, protocol = options.pop("speed", False), options.pop("protocol", Protocol())
    _check(keeps, gate, options)
    target, source = Path(out).expanduser().absolute(), local_folder(model)
    tokens, confirming = _halves(tokenize(source, texts), gate)
    work = target / ".statistics"
    fingerprint = Checkpoint.open(source).fingerprint()
    _claim(target, {"source": fingerprint, "calibration": _named(calibration), "options": options})
    folders = [target / f"keep-{keep:g}" for keep in keeps]
    for keep, folder in zip(keeps, folders, strict=True):
        # The manifest is written last.
        if not (folder / MANIFEST_NAME).is_file():
            own = {**options, "scratch": str(work), "reuse": work.is_dir() and holds_records(work)}
            fast.minify(model, keep=keep, out=folder, calibration=calibration, progress=progress, **own)
    config = split_options(**options)[0]
    compared = compare([source, *folders], tokens, protocol, speed=speed, config=config, progress=progress)
    rungs = tuple(Rung(*found) for found in zip(keeps, folders, compared, strict=True))
    frontier = Frontier(Path(model).name, compared[0].first, rungs)
    if gate is not None:
        frontier = _choose(frontier, source, Gate(gate, confirming), protocol, config)
    _write(frontier, target)
    shutil.rmtree(work, ignore_errors=True)
    return frontier


def _check(keeps: Sequence[float], gate: float | None, options: Mapping[str, Any]) -> None:
    """Refuse what a sweep cannot do before anything runs."""
    own = ("keep", "out", "scratch", "reuse", "resume", "target_size", "target_params")
    if found := [name for name in own if options.get(name)]:
        raise ConfigError(f"Sweep: expected no {', '.join(found)}, which it sets itself, got one. Leave it out.")
    if options.get("method", "taylor") != "taylor":
        raise ConfigError(
            f"Sweep: expected method taylor, whose statistics serve every ratio, got {options['method']}. Run minify "
            "for each ratio."
        )
    if not keeps or len(set(keeps)) < len(keeps) or not all(0 < keep < 1 for keep in keeps):
        raise ConfigError(f"Sweep: expected different ratios between 0 and 1, got {list(keeps)}. Pass such ratios.")
    if gate is not None and not 1 <= gate < float("inf"):
        raise ConfigError(f"Gate: expected a ratio of perplexities, at least 1, got {gate}. Pass one such as 1.1.")
    for keep in keeps:
        split_options(keep=keep, **options)


def _claim(target: Path, identity: dict[str, Any]) -> None:
    """Say whose the folder is, or make sure that it is this sweep's."""
    path = target / IDENTITY_NAME
    plain = json.loads(json.dumps(identity, sort_keys=True, default=str))
    if path.is_file():
        if read_json(path) != plain:
            raise OutputError(
                f"Output {target}: expected a new folder, or one of a sweep with the same model, text and options, got "
                "that of another sweep. Choose another folder, or repeat that sweep's options."
            )
        return
    if target.exists() and any(target.iterdir()):
        raise OutputError(f"Output {target}: expected a new or empty folder, got one with content. Choose another one.")
    target.mkdir(parents=True, exist_ok=True)
    publish_json(path, plain)


def _named(calibration: Any) -> Any:
    """What tells one calibration text from another: the names of files, or a digest of what was passed itself."""
    if isinstance(calibration, Tensor):
        return hashlib.sha256(calibration.numpy().tobytes()).hexdigest()
    return calibration if isinstance(calibration, str | Path | Mapping | None) else repr(list(calibration))


def _halves(tokens: Mapping[str, Tensor], gate: float | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tokens to measure on, and those that confirm a choice: the second halves, where there is a gate."""
    if gate is None:
        return dict(tokens), {}
    return (
        {name: ids[: len(ids) // 2] for name, ids in tokens.items()},
        {name: ids[len(ids) // 2 :] for name, ids in tokens.items()},
    )


def _choose(frontier: Frontier, source: Path, gate: Gate, protocol: Protocol, config: MinifyConfig) -> Frontier:
    """The frontier with the smallest rung that holds on the texts that chose and on those that confirm."""
    confirmed: list[str] = []
    for rung in sorted(frontier.rungs, key=lambda rung: rung.compared.second.bytes):
        if rung.ratio > gate.max_ratio:
            continue
        (pair,) = compare([source, rung.folder], gate.confirmed_on, protocol, speed=False, config=config)
        if (ratio := pair.perplexity_ratio()) <= gate.max_ratio:
            return replace(frontier, chosen=rung, confirmed=ratio)
        confirmed.append(f"{rung.keep:g} holds where it was chosen ({rung.ratio:.3f}), not elsewhere ({ratio:.3f})")
    best = min(frontier.rungs, key=lambda rung: rung.ratio)
    raise GateError(
        f"Gate: expected a ratio whose perplexity is at most {gate.max_ratio:g} times the dense model's, got none of "
        f"{len(frontier.rungs)}: the best is keep {best.keep:g} with {best.ratio:.3f}"
        f"{'; ' + '; '.join(confirmed) if confirmed else ''}. Allow more, or add larger ratios; the results stay."
    )


def _write(frontier: Frontier, target: Path) -> None:
    """The JSON, the CSV and the figure of a sweep."""
    write_json(target / JSON_NAME, frontier.as_dict())
    texts, speeds = list(frontier.dense.perplexity), list(frontier.rungs[0].compared.ratios)
    with open(target / CSV_NAME, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        names = [f"perplexity ratio {text}" for text in texts]
        writer.writerow(["keep", "parameters", "bytes", *names, "mean ratio", *(f"{kind} speed" for kind in speeds)])
        for rung in frontier.rungs:
            found, ratios = rung.compared.second, [rung.compared.perplexity_ratio(text) for text in texts]
            faster = [rung.compared.ratios[kind].median for kind in speeds]
            writer.writerow([rung.keep, found.parameters, found.bytes, *ratios, rung.ratio, *faster])
    plot_frontier(frontier, target / FIGURE_NAME)


def plot_frontier(frontier: Frontier, path: Path) -> None:
    """Draw perplexity ratios over the share of bytes into a PNG; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    rungs = sorted(frontier.rungs, key=lambda rung: rung.compared.second.bytes)
    shares = [rung.compared.second.bytes / frontier.dense.bytes for rung in rungs] + [1.0]
    for text in frontier.dense.perplexity:
        axis.plot(shares, [rung.compared.perplexity_ratio(text) for rung in rungs] + [1.0], "o-", label=text)
    for share, rung in zip(shares, rungs, strict=False):
        axis.annotate(f"keep {rung.keep:g}", (share, rung.ratio), textcoords="offset points", xytext=(4, 6), fontsize=8)
    axis.set(xlabel="weights, share of the dense model's bytes", ylabel="perplexity over dense", title=frontier.model)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
