"""What a recipe names, found on disk, and what it is made of: checksums of every input, versions of what computes."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import minisp
from minisp.errors import ConfigError
from minisp.evaluate.measure import builtin_texts
from minisp.export.folder import COMPANIONS
from minisp.recipes.recipe import Recipe
from minisp.store.checkpoint import INDEX_NAME, Checkpoint
from minisp.store.files import sha256
from minisp.store.hub import local_folder
from minisp.text.builtin import BUILTIN_PREFIX
from minisp.text.corpora import HUB_PREFIX, load_text
from minisp.text.mixture import check_sources


@dataclass(frozen=True)
class Inputs:
    """What a build reads.

    Attributes:
        folder: the source's checkpoint.
        calibration: (source, weight) of every text, as `minisp.fast.minify` takes it; None is generic text alone.
        texts: text of a gate, as the recipe names it → the text.
        digests: input, by its place in the recipe → SHA-256 in hexadecimal digits. A data set of the hub has none.
    """

    folder: Path
    calibration: list[tuple[str, float]] | None
    texts: Mapping[str, str]
    digests: Mapping[str, str]


def gather(recipe: Recipe, base: Path) -> Inputs:
    """Find the inputs of a recipe that lies in the folder `base`, and read all of them once for their checksums.

    Raises:
        CheckpointError, CalibrationError: an input is missing or damaged.
        ConfigError: a gate's text calibrates too, so that the gate would prove nothing.
    """
    named = base / Path(recipe.source).expanduser()
    folder = local_folder(named if named.exists() else recipe.source)
    sources = [(_located(text.source, base), text.weight) for text in recipe.calibration]
    check_sources(source for source, _ in sources)
    digests = {f"source/{path.name}": sha256(path) for path in _files(Checkpoint.open(folder))}
    calibrates = {}
    for text, (source, _) in zip(recipe.calibration, sources, strict=True):
        if not source.startswith((HUB_PREFIX, BUILTIN_PREFIX)):
            calibrates[f"calibration/{text.source}"] = sha256(Path(source))
    texts, gates = {}, {}
    for name in recipe.gates.max_perplexity_ratio:
        texts[name] = _gate_text(name, base)
        gates[f"gates/{name}"] = hashlib.sha256(texts[name].encode()).hexdigest()
        if not name.startswith(BUILTIN_PREFIX) and sha256(Path(_located(name, base))) in calibrates.values():
            raise ConfigError(
                f"Key gates.max_perplexity_ratio: expected texts that do not calibrate, got {name}, which does. Gate "
                "on another text."
            )
    return Inputs(folder, sources or None, texts, {**digests, **calibrates, **gates})


def versions() -> dict[str, str]:
    """Of what decides the bytes of a result."""
    others = {name: version(name) for name in ("torch", "transformers")}
    return {"minisp": minisp.__version__, "python": platform.python_version(), **others}


def recipe_sha256(recipe: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the plain values of a recipe, whatever the file looks like."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _located(source: str, base: Path) -> str:
    """A source as it can be opened from anywhere."""
    return source if source.startswith((HUB_PREFIX, BUILTIN_PREFIX)) else str(base / Path(source).expanduser())


def _gate_text(name: str, base: Path) -> str:
    if not name.startswith(BUILTIN_PREFIX):
        return load_text(_located(name, base))
    own = builtin_texts()
    if (key := name.removeprefix(BUILTIN_PREFIX)) not in own:
        known = ", ".join(f"{BUILTIN_PREFIX}{text}" for text in own)
        raise ConfigError(f"Key gates.max_perplexity_ratio: expected a file or one of {known}, got {name}. Name one.")
    return own[key]


def _files(checkpoint: Checkpoint) -> list[Path]:
    """The files of a checkpoint that are read."""
    names = {place.file for place in checkpoint.tensors.values()} | {"config.json", INDEX_NAME, *COMPANIONS}
    return [path for name in sorted(names) if (path := checkpoint.folder / name).is_file()]
