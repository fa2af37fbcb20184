"""The checkpoint that is exported, as every target sees it: shapes and names; values are read when they are written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minisp
from minisp.export.folder import copy_companions
from minisp.models.families import CausalLM, Family, family_of, layers_path
from minisp.models.skeleton import KEYS, skeleton
from minisp.models.structures import Structure, structures_of
from minisp.phases.run import Progress
from minisp.store.checkpoint import Checkpoint
from minisp.store.files import sha256
from minisp.store.writer import MANIFEST_NAME, MARKER, Entry, check_output, output_folder, write_json, write_tensors

PHASE = "export"


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been opened.

    Attributes:
        model: its skeleton, with every parameter on the meta device in the shape that is stored.
        structures: of every layer, in order.
    """

    checkpoint: Checkpoint
    model: CausalLM
    family: Family
    structures: Sequence[Structure]

    @classmethod
    def open(cls, folder: Path) -> "Source":
        """Read the config and the shard headers.

        Raises:
            CheckpointError: there is no checkpoint, or its parts contradict each other.
            UnsupportedModelError: a family that minisp does not know, or quantised weights.
        """
        checkpoint = Checkpoint.open(folder)
        model = skeleton(checkpoint)
        family = family_of(model.config)
        return cls(checkpoint, model, family, structures_of(model, family))

    @property
    def widths(self) -> list[int]:
        """The MLP width of every layer."""
        return [structure.num_units for structure in self.structures if structure.name == "mlp"]

    @property
    def has_uneven_heads(self) -> bool:
        """Whether the layers' numbers of heads are not the config's, which the modelling file alone can express."""
        return any(KEYS[name] in self.checkpoint.raw_config for name in ("attention", "queries"))

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have one width, and the heads that the config says."""
        return len(set(self.widths)) == 1 and not self.has_uneven_heads

    @property
    def model_type(self) -> str:
        """The family's name in config.json."""
        return str(self.checkpoint.config.model_type)

    def stored(self, structure: Structure, parameter: str) -> str:
        """The stored name of a parameter of a structure's layer."""
        name = f"{layers_path(self.model, self.family)}.{structure.layer}.{parameter}"
        return self.checkpoint.stored_name(name, self.model.base_model_prefix)


@dataclass(frozen=True)
class Content:
    """What a folder is to hold besides tokenizer, generation settings and manifest.

    Attributes:
        config: of config.json.
        entries: the tensors in writing order.
        tensors: (name, value) in that order; a value may come in pieces of its rows.
        files: name → text of further files.
    """

    config: Mapping[str, Any]
    entries: Sequence[Entry]
    tensors: Iterator[tuple[str, Any]]
    files: Mapping[str, str]


def write_folder(source: Source, target: str, content: Content, out: Path, progress: Progress) -> None:
    """Write a checkpoint folder that appears at `out` only once it is complete.

    Raises:
        OutputError: `out` is taken, or cannot be written; nothing is left there.
        CheckpointError: a tensor cannot be read, or holds NaN or infinity; nothing is left at `out`.
    """
    path = check_output(out, sum(entry.num_bytes for entry in content.entries))
    with output_folder(path, remedy="run again") as folder:
        entries = list(content.entries)
        digests = write_tensors(folder, entries, _counted(content.tensors, len(entries), progress))
        write_json(folder / "config.json", content.config)
        for name, text in content.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        copy_companions(source.checkpoint.folder, folder)
        written = [file for file in sorted(folder.iterdir()) if file.name != MARKER]
        # No times and no paths: exporting twice writes the same bytes.
        manifest = {
            "minisp_version": minisp.__version__,
            "target": target,
            "source": {"name": source.checkpoint.folder.name, "fingerprint": source.checkpoint.fingerprint()},
            "widths": source.widths,
            "sha256": {file.name: digests.get(file.name) or sha256(file) for file in written},
        }
        write_json(folder / MANIFEST_NAME, manifest)


def _counted(tensors: Iterator[tuple[str, Any]], total: int, progress: Progress) -> Iterator[tuple[str, Any]]:
    """The same tensors; progress is told each time that another one begins."""
    done, last = 0, None
    for name, value in tensors:
        if name != last:
            progress(PHASE, done, total)
            done, last = done + 1, name
        yield name, value
    progress(PHASE, total, total)
