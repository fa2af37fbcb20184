"""Export: a finished checkpoint, a result of minisp or any model that it supports, in the form that a server loads.

Weights go from file to file a tensor at a time; what a target cannot express is refused before anything is written.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from minisp.errors import ConfigError, UnsupportedModelError
from minisp.export import gguf, hf, nemotron_nas, padded
from minisp.export.source import Source
from minisp.phases.run import Progress
from minisp.units import megabytes

TARGETS: dict[str, Callable[..., None]] = {
    "hf": hf.write,
    "hf-per-layer": hf.write_per_layer,
    "padded": padded.write,
    "gguf": gguf.write,
    "nemotron-nas": nemotron_nas.write,
}
"""Target → what writes it: called with (source, out, progress), and `gguf` with `dtype` too."""


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
    source = Source.open(Path(folder).expanduser())
    if source.has_uneven_heads and target != "hf-per-layer":
        raise UnsupportedModelError(
            f"Target {target}: expected as many heads in every layer as config.json says, got layers that had other "
            "numbers of heads cut. Use hf-per-layer (a modelling file), or minify with --widths uniform."
        )
    TARGETS[target](source, out, progress, **({} if dtype is None else {"dtype": dtype}))
    path = Path(out).expanduser().absolute()
    files = [path] if path.is_file() else path.glob("*.safetensors")
    size = sum(file.stat().st_size for file in files)
    return Exported(source.checkpoint.folder, target, path, size, tuple(source.widths))
