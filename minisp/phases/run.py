"""What a run has besides the model: where records wait, who takes part, who is told.

Everything that a phase finishes is a record, see `minisp.store.names`. A phase that finds records goes on from them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from minisp.errors import NumericalError
from minisp.methods.reconstruction import Fit
from minisp.methods.statistics import Statistics
from minisp.models.structures import Structure
from minisp.ranks import Ranks
from minisp.store.names import Record
from minisp.store.records import Memory, Scratch
from minisp.store.tiers import Room, Tiers

Progress = Callable[[str, int, int], None]
"""Called with the phase, the steps done and the steps in all."""


class Phase(str, Enum):
    """The phases of a run that the plan counts apart, as they are called where a person reads them."""

    TEXT = "calibration text"
    SWEEP = "saliency sweep"
    HEAD = "head"
    DECISION = "decision"
    TRIALS = "trial cuts"
    TRIAL_OUTPUTS = "trial outputs"
    REFIT = "refit"
    REFIT_SWEEP = "refit sweep"
    UPDATE = "update"
    WRITING = "writing"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Result:
    """What became of one structure.

    Attributes:
        kept: (n,) int64 sorted, the units that stay.
        fit: how the refit of its consumer's weight went.
    """

    structure: Structure
    kept: Tensor
    fit: Fit

    @property
    def cut(self) -> bool:
        """Whether units go."""
        return len(self.kept) < self.structure.num_units


@dataclass(frozen=True)
class Run:
    """What a phase works with besides the model.

    Attributes:
        shared: records of the whole run: statistics and results.
        own: records of this process's windows: states and gradients.
        ranks: the processes of the run.
        progress: told about every step.
    """

    shared: Scratch
    own: Tiers
    ranks: Ranks
    progress: Progress

    @classmethod
    def in_memory(cls, progress: Progress = lambda phase, done, total: None) -> "Run":
        """One process, whose records wait in memory."""
        memory = Memory()
        return cls(memory, Tiers(memory, torch.device("cpu"), Room(device=2**63)), Ranks(), progress)

    def once(self, name: str, make: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> None:
        """Make a shared record unless it is there. The first process computes its tensors and facts.

        All processes call this together, and all can read the record afterwards.
        """
        # All processes ask together: a slow one must not take what the first has just written for an earlier run's.
        if self.ranks.most(not self.shared.has(name)):
            if self.ranks.first:
                tensors, facts = make()
                with self.shared.writing(name, **facts) as append:
                    for key, tensor in tensors.items():
                        append(key, tensor)
                self.shared.settle()
            self.ranks.wait()

    def save_if_due(self, *names: str) -> None:
        """Every few minutes, write these records to this process's folder. A killed run resumes from there."""
        # All processes decide together, and drop older records only after all have written: so one boundary is there
        # in every folder.
        if self.ranks.most(self.own.due):
            self.own.save(*names)
            self.ranks.wait()
            self.own.forget(*names)

    def statistics(
        self, structure: Structure, *, gram: bool, outputs: int = 0, device: torch.device | str = "cpu"
    ) -> Statistics:
        """The statistics that the saliency sweep has left of a structure, see `Statistics.from_tensors`."""
        name = Record.STATISTICS.of(structure.layer, structure.name)
        return Statistics.from_tensors(
            lambda key: self.shared.read(name, key, ahead=key.startswith("gram_")),
            structure.columns,
            gram=gram,
            outputs=outputs,
            device=torch.device(device),
        )

    def keep_statistics(self, structure: Structure, statistics: Statistics) -> None:
        """Make a structure's finalized statistics a record."""
        self.keep(Record.STATISTICS.of(structure.layer, structure.name), statistics.tensors())

    def keep(self, name: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Make tensors with their keys a shared record."""
        with self.shared.writing(name) as append:
            for key, tensor in tensors:
                append(key, tensor)

    def result(self, structure: Structure) -> Result:
        """What became of a structure."""
        name = Record.RESULT.of(structure.layer, structure.name)
        return Result(structure, self.shared.read(name, "kept"), Fit.from_facts(self.shared.facts(name)))

    def weight(self, structure: Structure) -> Tensor | None:
        """The consumer's new weight (d, n·c), in the stored dtype; None where the old one is to be sliced."""
        name = Record.RESULT.of(structure.layer, structure.name)
        return self.shared.read(name, "weight") if "weight" in self.shared.keys(name) else None

    def has_result(self, structure: Structure) -> bool:
        """Whether it is known what became of a structure."""
        return self.shared.has(Record.RESULT.of(structure.layer, structure.name))

    def keep_result(self, result: Result, weight: Tensor | None) -> None:
        """Make what became of a structure a record, with the consumer's new weight where it has one."""
        name = Record.RESULT.of(result.structure.layer, result.structure.name)
        with self.shared.writing(name, **result.fit.facts()) as append:
            append("kept", result.kept)
            if weight is not None:
                append("weight", weight)


@contextmanager
def naming(place: object, what: str = "") -> Iterator[None]:
    """Within the block, a numerical failure says of which structure, or linear map, it is."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{place}{what}: {error}") from error
