"""The zeros of a checkpoint: counted in every linear map of its layers, and held against a pattern."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from minisp.config import Pattern
from minisp.errors import CheckpointError
from minisp.methods.sparse import SparsityFacts, sparsity_facts
from minisp.models.families import family_of, layers_path
from minisp.models.maps import LinearMap, linear_maps
from minisp.models.skeleton import skeleton
from minisp.store.checkpoint import Checkpoint


@dataclass(frozen=True)
class Zeros:
    """The zeros of a checkpoint's linear maps.

    Attributes:
        maps: each with what is true of it.
    """

    maps: tuple[tuple[LinearMap, SparsityFacts], ...]

    def total(self, name: str, path: str | None = None) -> int:
        """The sum of an attribute of `SparsityFacts` over all maps, or over those of one path."""
        return sum(getattr(facts, name) for found, facts in self.maps if path in (None, found.path))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "weights": self.total("weights"),
            "zeros": self.total("zeros"),
            "broken": self.total("broken"),
            "maps": [{"layer": found.layer, "path": found.path, **asdict(facts)} for found, facts in self.maps],
        }

    def table(self) -> Table:
        """One line for the maps of each path, in all layers together."""
        names = ("weights", "zeros", "zero_rows", "zero_columns", "groups", "broken")
        table = Table(title="Zeros in linear maps", title_justify="left")
        for name in ("", "weights", "zeros", "share", "zero rows", "zero columns", "groups", "broken groups"):
            table.add_column(name, justify="right" if name else "left")
        for path in [*dict.fromkeys(found.path for found, _ in self.maps), None]:
            weights, zeros, *rest = (self.total(name, path) for name in names)
            share = f"{zeros / weights:.1%}"
            table.add_row(path or "all", f"{weights:,}", f"{zeros:,}", share, *(f"{count:,}" for count in rest))
        return table


def zeros_of(folder: Path, pattern: Pattern) -> Zeros:
    """Count the zeros of a checkpoint, a layer at a time.

    Args:
        pattern: whose groups are counted; without groups, only zeros are.

    Raises:
        UnsupportedModelError: unknown family.
        CheckpointError: the checkpoint is damaged, or the groups of the pattern do not fill the rows.
    """
    checkpoint = Checkpoint.open(folder)
    model = skeleton(checkpoint)
    family = family_of(model.config)
    found: list[tuple[LinearMap, SparsityFacts]] = []
    for x in linear_maps(model, family):
        name = f"{layers_path(model, family)}.{x.layer}.{x.weight}"
        ((_, weight),) = checkpoint.read([checkpoint.stored_name(name, model.base_model_prefix)])
        found.append((x, sparsity_facts(weight.T if x.transposed else weight, pattern)))
    return Zeros(tuple(found))


def check(zeros: Zeros, folder: Path, pattern: Pattern, least: float) -> None:
    """Hold what was counted against what is wanted.

    Raises:
        CheckpointError: groups that break the pattern, or a smaller share of zeros than `least`.
    """
    broken, share = zeros.total("broken"), zeros.total("zeros") / zeros.total("weights")
    if broken or share < least:
        first: Sequence[str] = [str(found) for found, facts in zeros.maps if facts.broken][:1]
        where = f", the first of them in {first[0]}" if first else ""
        raise CheckpointError(
            f"{folder}: expected pattern {pattern} and at least {least:.1%} zeros, got {broken:,} groups that break it"
            f"{where}, and {share:.1%} zeros. Check that it is the result, and that nothing was trained or converted "
            "since."
        )
