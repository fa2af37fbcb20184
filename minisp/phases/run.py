"""What a run has besides the model: where records wait, who takes part, who is told.

Everything that a phase finishes is a record of its layer: `states_0007`, the hidden states that enter layer 7, and
`gradient_0007`, the gradient there, one tensor per micro-batch; `partial_…`, sums of an unfinished sweep;
`statistics_0007`; `trials_0007`, the states of all trial cuts that enter layer 7; `result_0007`; `healed_0007`, the
states that enter layer 7 in the pruned model, and `dense_0007`, those of the dense model beside it. The windows and the
ratios that the trial cuts gave are records of the run.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minisp.methods.reconstruction import Reconstruction
from minisp.methods.statistics import LayerStatistics
from minisp.ranks import Ranks
from minisp.store.records import Memory, Scratch
from minisp.store.tiers import Room, Tiers

Progress = Callable[[str, int, int], None]
"""Called with the phase, the steps done and the steps in all."""


@dataclass(frozen=True)
class Workplace:
    """What a sweep works with besides the model.

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
    def in_memory(cls, progress: Progress = lambda phase, done, total: None) -> "Workplace":
        """One process, whose records wait in memory."""
        memory = Memory()
        return cls(memory, Tiers(memory, torch.device("cpu"), Room(device=2**63)), Ranks(), progress)

    def save_if_due(self, *names: str) -> None:
        """Every few minutes, have this process's records in its folder, from which a run that is killed goes on."""
        # Together, and nobody drops the older ones before all have the newer ones: one boundary is there everywhere.
        if self.ranks.most(self.own.due):
            self.own.save(*names)
            self.ranks.wait()
            self.own.forget(*names)

    def statistics(self, layer: int, *, gram: bool, device: torch.device | str = "cpu") -> LayerStatistics:
        """The statistics of a layer that the saliency sweep has left; `gram`: with the Gram matrix."""
        name = record("statistics", layer)
        return LayerStatistics.from_tensors(
            lambda key: self.shared.read(name, key, ahead=key.startswith("gram")),
            gram=gram,
            device=torch.device(device),
        )

    def keep_statistics(self, layer: int, statistics: LayerStatistics) -> None:
        """Make a layer's finalized statistics a record."""
        with self.shared.writing(record("statistics", layer)) as append:
            for key, tensor in statistics.tensors():
                append(key, tensor)

    def result(self, layer: int, *, weights: bool = True) -> Reconstruction:
        """The reconstruction of a layer; without `weights`, its down projection is not read."""
        name = record("result", layer)
        down = self.shared.read(name, "down") if weights and "down" in self.shared.keys(name) else None
        return Reconstruction.from_facts(self.shared.facts(name), self.shared.read(name, "kept"), down)

    def keep_result(self, result: Reconstruction) -> None:
        """Make a layer's reconstruction a record."""
        with self.shared.writing(record("result", result.layer), **result.facts()) as append:
            append("kept", result.kept)
            if result.down is not None:
                append("down", result.down)


def record(kind: str, layer: int) -> str:
    """The name of a record of one layer."""
    return f"{kind}_{layer:04d}"
