"""What the records of a run are called, and which of them are states, and which ones serve later runs."""

import re
from enum import Enum


class Record(Enum):
    """What a record holds; its name says of which layer or structure, as in `statistics_0007_mlp`, or of the run.

    STATES and GRADIENT: the hidden states that enter a layer, and the gradient there, one tensor per micro-batch.
    PARTIAL: sums of an unfinished sweep. STATISTICS: those of a structure. TRIALS: the states of all trial cuts that
    enter a layer. RESULT: what became of a structure. PRUNED and DENSE: the states that enter a layer in the pruned
    model, and in the dense one beside it. FACTOR: sums of one side of a linear map, for one shot. THRESHOLD: the cost
    up to which weights go in a shot. SPARSE: a linear map's weight after so many shots. WINDOWS, WRITTEN, RATIOS: the
    calibration windows, what the model wrote of them, and what the trial cuts gave.
    """

    WINDOWS = "windows"
    WRITTEN = "written"
    STATES = "states"
    GRADIENT = "gradient"
    PARTIAL = "partial"
    STATISTICS = "statistics"
    TRIALS = "trials"
    RATIOS = "ratios"
    PRUNED = "pruned"
    DENSE = "dense"
    FACTOR = "factor"
    THRESHOLD = "threshold"
    SPARSE = "sparse"
    RESULT = "result"

    def of(self, layer: int, part: str = "") -> str:
        """The name of the record of a layer, or of a part of it."""
        return f"{self.value}_{layer:04d}{f'_{part}' if part else ''}"


OF_THE_RUN = (Record.WINDOWS, Record.WRITTEN, Record.RATIOS)


def names_of(*kinds: Record) -> "re.Pattern[str]":
    """What the names of all records of these kinds match."""
    whole = [kind.value if kind in OF_THE_RUN else rf"{kind.value}_\d{{4,}}(_[\w.]+)?" for kind in kinds]
    return re.compile("|".join(whole))


ANY = names_of(*Record)
# States can be computed again from the weights.
STATES = names_of(Record.STATES, Record.GRADIENT, Record.TRIALS, Record.PRUNED, Record.DENSE)
# What a later run with another ratio can use; everything else goes when a run ends well.
REUSABLE = names_of(Record.STATISTICS, Record.WINDOWS, Record.WRITTEN)
# What an unfinished sweep has left, which a later run with another ratio can go on from.
SWEEP = names_of(Record.PARTIAL, Record.STATES, Record.GRADIENT)
