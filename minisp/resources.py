"""What a run may use, and where it keeps what waits."""

from dataclasses import dataclass

from minisp.checks import is_positive_integer, require, require_flag
from minisp.units import parse_size


@dataclass(frozen=True)
class Resources:
    """What a run may use, and where it keeps what waits. Nothing here changes the result of a given text but rounding.

    Args:
        host_memory: most main memory that the whole process may take, as 16GB or 2GiB; a run whose plan needs more is
            refused. None plans with half of what is free.
        device_memory: the same for the GPU's memory, where one computes.
        segment: consecutive layers held at once; None picks what fits (fewer need less memory and more recomputing).
        scratch: folder for what waits on disk; it keeps the statistics for later runs. None takes a hidden folder
            beside the output, which goes when the run ends well.
        resume: continue a run that was stopped, if there is one, to the same bits.
        reuse: take the statistics that an earlier run left in `scratch`. The model, the windows, dtype and device must
            be the same; how units are chosen and refitted may differ, where the Gram matrices that both need were
            collected (they are not for `refit_on` pruned with `allocation` score).

    Raises:
        ConfigError: a value outside its range.
    """

    host_memory: str | None = None
    device_memory: str | None = None
    segment: int | None = None
    scratch: str | None = None
    resume: bool = False
    reuse: bool = False

    def __post_init__(self) -> None:
        for name in ("host_memory", "device_memory"):
            if (value := getattr(self, name)) is not None:
                require(
                    name,
                    value,
                    "a size above 0 in KB, MB, GB, KiB, MiB or GiB, such as 16GB",
                    lambda v: parse_size(v) > 0,
                )
        if self.segment is not None:
            require("segment", self.segment, "a whole number, at least 1, or None", is_positive_integer)
        if self.scratch is not None:
            require("scratch", self.scratch, "a path", lambda v: bool(str(v)))
        for name in ("resume", "reuse"):
            require_flag(name, getattr(self, name))
