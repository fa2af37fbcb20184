"""`build`: minify, hold the result against its gates, export it, and publish all of it at once.

Each step ends with a rename inside a hidden folder beside the output, so that a build that was killed goes on after
its last finished step, and inside the first one goes on as `minify` does with `resume`.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from minisp import fast
from minisp.errors import ConfigError, MinispError, OutputError
from minisp.evaluate.measure import check_texts, tokenize
from minisp.export.targets import check_planned, export
from minisp.phases.run import Progress
from minisp.recipes import gates
from minisp.recipes.gates import Outcome
from minisp.recipes.inputs import Inputs, gather, recipe_sha256, versions
from minisp.recipes.recipe import MANIFEST_NAME, Recipe, load
from minisp.store.checkpoint import Checkpoint
from minisp.store.files import sha256
from minisp.store.writer import check_output, publish, publish_json, read_json, write_json

IDENTITY, SCRATCH, PARTS = "minisp-build-identity.json", "scratch", "parts"
# What decides the bytes of an output, by its place in the manifest.
DECIDING = ("recipe", "inputs", "versions")


@dataclass(frozen=True)
class Built:
    """What stands at the output.

    Attributes:
        out: the folder.
        manifest: what its manifest says: recipe, inputs, versions, gates, and checksums of the outputs.
        unchanged: it stood there already, and nothing was done.
    """

    out: Path
    manifest: dict[str, Any]
    unchanged: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"built": True, "unchanged": self.unchanged, "out": str(self.out), **self.manifest}

    def table(self) -> Table:
        """Gates and outputs, for the terminal."""
        table = Table(title=escape(f"Build: {self.out.name}"), show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column()
        for values in self.manifest["gates"]:
            facts = {key: value for key, value in values.items() if key != "holds"}
            limit, value = Outcome(**facts).words()
            text = f" of {facts['text']}" if facts["text"] else ""
            table.add_row(escape(f"{facts['gate']}{text}"), f"{value}, at most {limit}")
        for name in Recipe.model_validate(self.manifest["recipe"]).names():
            table.add_row("written", escape(str(self.out / name)))
        return table

    def lines(self) -> list[str]:
        """What was done, in a sentence."""
        done = "nothing has changed since it was built, nothing was done" if self.unchanged else "all gates hold"
        return [f"{self.out}: {done}. Checksums of inputs and outputs: {MANIFEST_NAME}."]


def build(recipe_file: str | Path, out: str | Path | None = None, *, progress: Progress | None = None) -> Built:
    """Make what a recipe describes, or nothing.

    Args:
        recipe_file: YAML, see `minisp.recipes.recipe.Recipe`.
        out: folder to write, which must be new, empty, or what this recipe built before. None takes the recipe's name
            without its suffix, beside it.
        progress: called with (phase, done, total).

    Raises:
        GateError: the model does not pass a gate; nothing is left.
        OutputError: something else is at `out`, or it cannot be written.
        MinispError: any other of its subclasses, as for `minify` and `export`; nothing is then left at `out`.
    """
    _check_alone()
    path = Path(recipe_file).expanduser().absolute()
    recipe = load(path)
    target = Path(out).expanduser().absolute() if out is not None else path.with_suffix("")
    inputs = gather(recipe, path.parent)
    facts = {"recipe": recipe.plain(), "inputs": dict(inputs.digests), "versions": versions()}
    if (earlier := _earlier(target)) is not None:
        _check_same(target, earlier, facts)
        _discard(_workshop_path(target))
        return Built(target, earlier, unchanged=True)
    # The tokenizer and the texts of the gates are checked before hours of work, and so is all that a plan can see.
    tokens = tokenize(inputs.folder, inputs.texts) if inputs.texts else {}
    check_texts(Checkpoint.open(inputs.folder), tokens, gates.protocol(recipe.gates))
    planned = fast.plan(inputs.folder, **recipe.options())
    for one in recipe.export:
        check_planned(inputs.folder, one.to, planned.config)
    check_output(target, planned.bytes_after)
    with _workshop(target, recipe, facts) as workshop:
        told: Progress = progress or (lambda phase, done, total: None)
        model = _minified(recipe, inputs, workshop, progress)
        sizes = gates.size_gates(recipe.gates, model)
        gates.check(sizes, reached="The model was minified; its perplexity was not measured.")
        quality = gates.perplexity_gates(recipe.gates, inputs.folder, model, tokens, planned.config, told)
        gates.check([*sizes, *quality], reached="The model was minified and measured; nothing was exported.")
        for one in recipe.export:
            place = model.with_name(one.file_name(recipe.name))
            if not place.exists():
                export(model, one.to, place, dtype=one.dtype, progress=told)
        manifest = {
            **facts,
            "recipe_sha256": recipe_sha256(facts["recipe"]),
            "seed": planned.config.seed,
            "computed": {"device": planned.device, "dtype": planned.dtype},
            "gates": [outcome.as_dict() for outcome in (*sizes, *quality)],
        }
        return Built(target, _published(recipe, manifest, model.parent, target), unchanged=False)


def _check_alone() -> None:
    """Raise `ConfigError` where this is one of several processes, as torchrun starts them."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"Build: expected one process, got {os.environ['WORLD_SIZE']}. Run minisp minify with several processes, "
            "or build with one."
        )


def _minified(recipe: Recipe, inputs: Inputs, workshop: Path, progress: Progress | None) -> Path:
    """The folder of the minified model: made, finished, or found."""
    folder = workshop / PARTS / recipe.name
    if not folder.exists():
        fast.minify(
            inputs.folder,
            out=folder,
            calibration=inputs.calibration,
            scratch=str(workshop / SCRATCH),
            resume=True,
            progress=progress,
            **recipe.options(),
        )
    return folder


def _published(recipe: Recipe, manifest: dict[str, Any], parts: Path, target: Path) -> dict[str, Any]:
    """Add the checksums of the outputs and the manifest, and let the output appear; returns the manifest."""
    for path in parts.iterdir():
        # An export that an earlier recipe wanted.
        if path.name not in recipe.names():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    manifest = {**manifest, "outputs": _digests(parts)}
    write_json(parts / MANIFEST_NAME, manifest)
    publish(parts, target)
    return manifest


def _digests(folder: Path) -> dict[str, str]:
    """File, as seen from the folder → SHA-256, of all files but the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {x.relative_to(folder).as_posix(): sha256(x) for x in files if x != folder / MANIFEST_NAME}


def _earlier(target: Path) -> dict[str, Any] | None:
    """The manifest of what was built at `target`; None where nothing was."""
    values = read_json(target / MANIFEST_NAME)
    return values if isinstance(values, dict) else None


def _check_same(target: Path, earlier: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raise `OutputError` where the output is not what this recipe, from these inputs, would give now."""
    changed = [
        f"{part}.{key}"
        for part in DECIDING
        for key in sorted({*earlier.get(part, {}), *facts[part]})
        if earlier.get(part, {}).get(key) != facts[part].get(key)
    ]
    if changed:
        raise OutputError(
            f"Output {target}: expected what this recipe built, got what was built from other values of "
            f"{', '.join(changed[:10])}. Delete the folder, or choose another one by --out."
        )
    found, wanted = _digests(target), earlier.get("outputs", {})
    if touched := [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]:
        raise OutputError(
            f"Output {target}: expected the files that were built there, got others, or changed ones: "
            f"{', '.join(touched[:10])}. Delete the folder, or choose another one by --out."
        )


def _workshop_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.build")


@contextmanager
def _workshop(target: Path, recipe: Recipe, facts: dict[str, Any]) -> Iterator[Path]:
    """The hidden folder of a build, nobody else's within the block, with what an earlier build of this model finished.

    It goes when the block ends, unless the build was stopped, or could not write.
    """
    workshop = _workshop_path(target)
    (workshop / PARTS).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(workshop, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A build that ends removes its folder: what was locked must still be the one that is there.
            taken = os.fstat(descriptor).st_ino != workshop.stat().st_ino
        except OSError:
            taken = True
        if taken:
            raise OutputError(
                f"Output {target}: expected to be the only build of it, but another process builds there. Wait for it, "
                "or choose another output."
            )
        _take_over(workshop, recipe, facts)
        try:
            yield workshop
        except OutputError:
            raise
        except MinispError:
            _discard(workshop)
            raise
        _discard(workshop)
    finally:
        os.close(descriptor)


def _take_over(workshop: Path, recipe: Recipe, facts: dict[str, Any]) -> None:
    """Keep what lies in the workshop only where it belongs to the same model; other gates and exports may be wanted."""
    making = {key: value for key, value in facts["recipe"].items() if key not in ("gates", "export")}
    inputs = {key: value for key, value in facts["inputs"].items() if not key.startswith("gates/")}
    identity = {"recipe": making, "inputs": inputs, "versions": facts["versions"]}
    if read_json(workshop / IDENTITY) != identity:
        _clear(workshop)
        (workshop / PARTS).mkdir()
        publish_json(workshop / IDENTITY, identity)
    for path in (workshop / PARTS).iterdir():
        # What a killed step left; the names of the finished ones are known.
        if path.name.endswith(".partial") and path.name not in recipe.names():
            shutil.rmtree(path, ignore_errors=True)


def _clear(workshop: Path) -> None:
    """Empty a workshop, first of what says whose it is: a folder half removed must not pass for a finished one."""
    (workshop / IDENTITY).unlink(missing_ok=True)
    for path in workshop.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _discard(workshop: Path) -> None:
    """Remove a workshop, where there is one; its own build may be removing it too."""
    (workshop / IDENTITY).unlink(missing_ok=True)
    shutil.rmtree(workshop, ignore_errors=True)
