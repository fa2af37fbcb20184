"""The result as a Hugging Face folder: weights, config, modelling file, tokenizer, model card and manifest."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import minisp
from minisp.export.modeling import FILE_NAME, modeling_source, sized_config
from minisp.export.tensors import (
    ChangesIn,
    WeightOf,
    checkpoint_entries,
    checkpoint_tensors,
    module_entries,
    module_tensors,
)
from minisp.models.skeleton import size_keys
from minisp.models.stream import Stream
from minisp.models.structures import UNITS
from minisp.phases.run import Result
from minisp.report.figures import plot_layers
from minisp.report.report import MinifyReport, load_line
from minisp.store.checkpoint import Checkpoint
from minisp.store.files import sha256
from minisp.store.writer import MANIFEST_NAME, MARKER, write_json, write_tensors

PLOT_NAME = "minisp.png"
# Small files of a checkpoint that stay valid when the MLP gets narrower. Code is never copied.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE",
)


def write(
    stream: Stream, results: Sequence[Result], weight_of: WeightOf, changes_in: ChangesIn, folder: Path | None
) -> tuple[dict[str, str], bool]:
    """Write the result of a run: weights, config and, where layers differ, the modelling file.

    A streamed checkpoint is read again, and cut and refitted layer after layer. A model in memory has been cut already:
    its config is told.

    Args:
        results: of every structure; none where only values change.
        changes_in: what else becomes of the parameters of a layer.
        folder: None writes nothing.

    Returns:
        Name of each weight file → its SHA-256, and whether the result needs a modelling file.
    """
    model, checkpoint = stream.model, stream.checkpoint
    structures, sizes = [r.structure for r in results], [len(r.kept) for r in results]
    keys = size_keys(stream.family, model.config, structures, sizes)
    if checkpoint is None:
        for key, value in keys.items():
            setattr(model.config, key, value)
    if folder is None:
        return {}, False
    if checkpoint is None:
        tensors = module_tensors(model)
        digests = write_tensors(folder, module_entries(tensors), tensors)
        raw_config = {**model.config.to_dict(), "dtype": str(model.dtype).removeprefix("torch.")}
    else:
        entries = checkpoint_entries(checkpoint, model, results)
        digests = write_tensors(folder, entries, checkpoint_tensors(checkpoint, model, results, weight_of, changes_in))
        raw_config = checkpoint.raw_config
    config, needs_code = sized_config(model, raw_config, keys, {structure.name for structure in structures})
    write_json(folder / "config.json", config)
    if needs_code:
        (folder / FILE_NAME).write_text(modeling_source(model, stream.family), encoding="utf-8")
    return digests, needs_code


def describe(
    folder: Path, report: MinifyReport, checkpoint: Checkpoint | None, tokenizer: Any, digests: Mapping[str, str]
) -> None:
    """Add tokenizer, model card, plot and manifest.

    Args:
        digests: file name → SHA-256 of what has been hashed while it was written: the weights.
    """
    if checkpoint is not None:
        copy_companions(checkpoint.folder, folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if report.layers:
        plot_layers(report, folder / PLOT_NAME)
    _write_card(folder, report)
    # No times and no paths: two runs with one seed write the same bytes.
    facts = {
        "source": {"name": report.plan.model, "fingerprint": checkpoint.fingerprint() if checkpoint else None},
        "model_type": report.plan.model_type,
        "parameters": {"before": report.plan.parameters, "after": report.parameters},
        "bytes": {"before": report.plan.bytes, "after": report.bytes},
        "needs_code": report.needs_code,
        "config": report.plan.config.as_dict(),
        "calibration": {"description": list(report.calibration), "fingerprint": report.calibration_fingerprint},
        "layers": [asdict(layer) for layer in report.layers],
        "maps": [asdict(item) for item in report.maps],
    }
    written = [path for path in sorted(folder.iterdir()) if path.name != MARKER]
    checksums = {path.name: digests.get(path.name) or sha256(path) for path in written}
    write_json(folder / MANIFEST_NAME, {"minisp_version": minisp.__version__, **facts, "sha256": checksums})


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer and generation settings from the source checkpoint, less the code that they point to."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        # A file that is no JSON object was refused when the tokenizer was loaded.
        values = json.loads(settings.read_text("utf-8"))
        if values.pop("auto_map", None) is not None:
            write_json(settings, values)


def _write_card(folder: Path, report: MinifyReport) -> None:
    name = report.plan.model
    title, done = _zeros(report) if report.maps else _units(report)
    # A folder's name is no model that anyone could look up.
    base = [f"base_model: {json.dumps(name)}"] if "/" in name else []
    lines = [
        "---",
        "library_name: transformers",
        *base,
        "tags: [minisp, pruned]",
        "---",
        f"# {name}, {title}",
        "",
        f"Made from {name} by minisp {minisp.__version__}: {done}. Nothing was trained.",
        "",
        f"Calibration: {'; '.join(report.calibration)}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = {load_line('path/to/this/folder', needs_code=report.needs_code)}",
        "```",
        "",
        f"Per-layer sizes, residuals and checksums: `{MANIFEST_NAME}`.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _units(report: MinifyReport) -> tuple[str, str]:
    """What a card says of units that were cut: a title, and what was done."""
    config, share, kept = report.plan.config, report.parameters / report.plan.parameters, []
    for kind in report.plan.units:
        mine = [layer for layer in report.layers if layer.structure == kind]
        kept.append(f"{sum(x.kept for x in mine):,} of {sum(x.width for x in mine):,} {UNITS[kind]}")
    refit = (
        f"what reads them refitted in closed form (ridge, λ {config.damping}, shrinking to {config.shrink_to}, on "
        f"the {config.refit_on} model's activations{', drift corrected' if config.corrects else ''})"
        if config.reconstruct and share < 1
        else "no weight changed"
    )
    by = f"{config.saliency} saliency" if config.method == "taylor" else f"costs by the method {config.method}"
    return f"{share:.0%} of its parameters", f"{' and '.join(kept)} kept ({by}, {config.widths} widths), {refit}"


def _zeros(report: MinifyReport) -> tuple[str, str]:
    """The same of weights that were set to zero."""
    config = report.plan.config
    weights, zeros = (sum(getattr(x, name) for x in report.maps) for name in ("weights", "zeros"))
    share, maps = f"{zeros / weights:.0%} zeros", len(report.maps)
    done = f"{zeros:,} of {weights:,} weights in {maps} linear maps set to 0 ({config.method}, {config.pattern})"
    return f"{share} ({config.pattern})", done
