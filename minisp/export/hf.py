"""Targets `hf` and `hf-per-layer`: the checkpoint as a Hugging Face folder, with a config written for its class."""

from pathlib import Path

from minisp.errors import UnsupportedModelError
from minisp.export.modeling import FILE_NAME, modeling_source, sized_config
from minisp.export.source import Content, Source, write_folder
from minisp.export.tensors import checkpoint_entries, checkpoint_tensors
from minisp.models.skeleton import size_keys
from minisp.phases.run import Progress


def check(source: Source) -> None:
    """Refuse what the stock class cannot express.

    Raises:
        UnsupportedModelError: the layers differ in width.
    """
    if not source.is_uniform:
        raise UnsupportedModelError(
            f"Target hf: expected layers of one width, which is what the stock class can have, got widths from "
            f"{min(source.widths)} to {max(source.widths)}. Use hf-per-layer (a modelling file), padded (stock class, "
            "zeros up to the largest width), or gguf; or minify with --widths uniform."
        )


def write(source: Source, out: Path, progress: Progress) -> None:
    """Write a folder for the stock class, which every server of the family loads.

    Raises:
        OutputError, CheckpointError: see `write_folder`.
    """
    write_folder(source, "hf", _content(source, {}), out, progress)


def check_per_layer(source: Source) -> None:
    """Refuse what needs no modelling file.

    Raises:
        UnsupportedModelError: all layers have one width.
    """
    if source.is_uniform:
        raise UnsupportedModelError(
            f"Target hf-per-layer: expected layers of different widths, got {source.widths[0]} in all of them. Use hf: "
            "the stock class loads such a model everywhere, without a modelling file."
        )


def write_per_layer(source: Source, out: Path, progress: Progress) -> None:
    """Write a folder with a modelling file, which transformers, vLLM and SGLang load with `trust_remote_code`.

    Raises:
        OutputError, CheckpointError: see `write_folder`.
    """
    files = {FILE_NAME: modeling_source(source.model, source.family)}
    write_folder(source, "hf-per-layer", _content(source, files), out, progress)


def _content(source: Source, files: dict[str, str]) -> Content:
    """Every tensor is copied under its own name: a result of minisp already has the names that its class reads."""
    keys = size_keys(source.family, source.checkpoint.config, source.structures, source.widths)
    config, _ = sized_config(source.model, source.checkpoint.raw_config, keys, {"mlp"})
    return Content(
        config=config,
        entries=checkpoint_entries(source.checkpoint, source.model, []),
        tensors=checkpoint_tensors(source.checkpoint, source.model, []),
        files=files,
    )
