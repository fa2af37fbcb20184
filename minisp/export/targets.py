"""Export: a finished checkpoint, a result of minisp or any model that it supports, in the form that a server loads.

Weights go from file to file a tensor at a time; what a target cannot express is refused before anything is written.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from minisp.config import MinifyConfig
from minisp.errors import ConfigError, UnsupportedModelError
from minisp.export import gguf, hf, nemotron_nas, padded
from minisp.export.gguf_tensors import DTYPES
from minisp.export.source import Source
from minisp.models.structures import structures_of
from minisp.phases.decide import kept_sizes, step_of
from minisp.phases.run import Progress
from minisp.units import megabytes


@dataclass(frozen=True)
class Target:
    """A form that a server loads.

    Attributes:
        check: called with the source; raises a `MinispError` where the target cannot express it.
        write: called with (source, out, progress), and for `gguf` with `dtype` too; takes what was checked.
    """

    check: Callable[[Source], None]
    write: Callable[..., None]


TARGETS = {
    "hf": Target(hf.check, hf.write),
    "hf-per-layer": Target(hf.check_per_layer, hf.write_per_layer),
    "padded": Target(padded.check, padded.write),
    "gguf": Target(gguf.check, gguf.write),
    "nemotron-nas": Target(nemotron_nas.check, nemotron_nas.write),
}
"""Name → target."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        source, target: from where, and in which form.
        out: the folder, or the GGUF file.
        bytes: of the weight files.
        widths: the MLP width of every layer of the source.
    """

    source: Path
    target: str
    out: Path
    bytes: int
    widths: tuple[int, ...]

    def table(self) -> Table:
        """What was written, for the terminal."""
        table = Table(title=escape(f"Export: {self.source.name} to {self.target}"), show_header=False)
        table.add_column(style="bold")
        table.add_column()
        low, high = min(self.widths), max(self.widths)
        table.add_row("layers", f"{len(self.widths)}, MLP width {low if low == high else f'{low} to {high}'}")
        table.add_row("weights", megabytes(self.bytes))
        table.add_row("written to", escape(str(self.out)))
        return table

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "source": str(self.source), "out": str(self.out), "widths": list(self.widths)}


def export(
    folder: str | Path,
    target: str,
    out: str | Path,
    *,
    dtype: str | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Exported:
    """Write a checkpoint folder in the form of a target.

    Args:
        folder: a Hugging Face folder of a family that minisp knows.
        target: a key of `TARGETS`.
        out: a new or empty folder, or a new file for `gguf`.
        dtype: for `gguf`: f32, f16, bf16 or q8_0; None keeps what is stored.
        progress: called with (phase, done, total).

    Raises:
        MinispError: one of its subclasses; nothing is then left at `out`. `UnsupportedModelError` says what the target
            cannot express and which one can.
    """
    if target not in TARGETS:
        raise ConfigError(f"Export target: expected one of {', '.join(TARGETS)}, got {target!r}. Choose one of them.")
    if dtype is not None and target != "gguf":
        raise ConfigError(
            f"Option dtype: expected none for the target {target}, which keeps the stored values, got {dtype!r}. Leave "
            "it out, or export to gguf."
        )
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"Option dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}. Choose one of them.")
    source = Source.open(Path(folder).expanduser())
    if source.has_uneven_heads:
        _check_heads(target)
    TARGETS[target].check(source)
    TARGETS[target].write(source, out, progress, **({} if dtype is None else {"dtype": dtype}))
    path = Path(out).expanduser().absolute()
    files = [path] if path.is_file() else path.glob("*.safetensors")
    size = sum(file.stat().st_size for file in files)
    return Exported(source.checkpoint.folder, target, path, size, tuple(source.widths))


def check_planned(folder: str | Path, target: str, config: MinifyConfig) -> None:
    """Refuse before a run what the target may not be able to express of its result; reads no weights.

    Args:
        folder: the dense checkpoint.
        target: a key of `TARGETS`.
        config: the run's options.

    Raises:
        MinispError: as `export` would, for the result.
    """
    source = Source.open(Path(folder).expanduser())
    structures = structures_of(source.model, source.family, config.structures)
    cut = config.cuts and config.keep < 1
    varied = cut and config.widths == "per-layer"
    if cut and "attention" in config.structures and (varied or not source.family.attention.has_head_dim):
        # Whatever the widths are.
        _check_heads(target)
        return
    sizes = [x.num_units for x in structures]
    if varied:
        # A layer may keep any multiple of the step, or all that it has.
        sizes[: len(config.structures)] = [step_of(x, structures, config) for x in structures if x.layer == 0]
    elif cut:
        sizes = kept_sizes(structures, [torch.zeros(x.num_units) for x in structures], config)
    planned = {(x.layer, x.name): size for x, size in zip(structures, sizes, strict=True)}
    resized = [replace(x, num_units=planned.get((x.layer, x.name), x.num_units)) for x in source.structures]
    TARGETS[target].check(replace(source, structures=resized))


def output_beside(out: Path, target: str) -> Path:
    """Where the export of the result at `out` goes: `OUT.gguf`, or the folder `OUT-TARGET`."""
    return out.with_name(f"{out.name}.gguf" if target == "gguf" else f"{out.name}-{target}")


def _check_heads(target: str) -> None:
    if target != "hf-per-layer":
        raise UnsupportedModelError(
            f"Target {target}: expected as many heads in every layer as config.json says, got layers that had other "
            "numbers of heads cut. Use hf-per-layer (a modelling file), or minify with --widths uniform."
        )
