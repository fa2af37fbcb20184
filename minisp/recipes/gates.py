"""Gates: what a finished model has to pass, measured before anything is exported."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minisp.config import MinifyConfig
from minisp.errors import GateError
from minisp.evaluate.measure import Protocol, compare
from minisp.evaluate.perplexity import checkpoint_bytes
from minisp.models.skeleton import skeleton
from minisp.phases.run import Progress
from minisp.recipes.recipe import Gates
from minisp.store.checkpoint import Checkpoint
from minisp.units import megabytes, millions, parse_count, parse_size


@dataclass(frozen=True)
class Outcome:
    """One gate, measured.

    Attributes:
        gate: its key in the recipe; text: that it is about, if any.
        limit: at most this much.
        value: what was measured; for a perplexity, the ratio of the model's to the source's.
        before, after: the two perplexities, where there are any.
    """

    gate: str
    limit: float
    value: float
    text: str | None = None
    before: float | None = None
    after: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the model passes; a value that is no number does not."""
        return self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "holds": self.holds}

    def words(self) -> tuple[str, str]:
        """Limit and value as people read them."""
        shown = {"max_bytes": megabytes, "max_parameters": millions}.get(self.gate)
        return (shown(int(self.limit)), shown(int(self.value))) if shown else (f"{self.limit:g}", f"{self.value:.4f}")


def protocol(gates: Gates) -> Protocol:
    """How perplexities are measured."""
    return Protocol(window=gates.window, max_windows=gates.max_windows)


def size_gates(gates: Gates, folder: Path) -> list[Outcome]:
    """The gates on bytes and parameters of a checkpoint: no weight is read."""
    outcomes = []
    if gates.max_bytes is not None:
        outcomes.append(Outcome("max_bytes", parse_size(gates.max_bytes), checkpoint_bytes(folder)))
    if gates.max_parameters is not None:
        count = sum(p.numel() for p in skeleton(Checkpoint.open(folder)).parameters())
        outcomes.append(Outcome("max_parameters", parse_count(gates.max_parameters), count))
    return outcomes


def perplexity_gates(
    gates: Gates, source: Path, folder: Path, tokens: Mapping[str, Tensor], config: MinifyConfig, progress: Progress
) -> list[Outcome]:
    """The gates on perplexity, of the checkpoint `folder` relative to `source`.

    Args:
        tokens: text → (T,) int64.
        config: its `device` and `dtype` are used.
    """
    if not tokens:
        return []
    (both,) = compare([source, folder], tokens, protocol(gates), speed=False, config=config, progress=progress)
    return [
        Outcome(
            "max_perplexity_ratio",
            limit,
            both.perplexity_ratio(text),
            text,
            both.first.perplexity[text].value,
            both.second.perplexity[text].value,
        )
        for text, limit in gates.max_perplexity_ratio.items()
    ]


def check(outcomes: list[Outcome], *, reached: str) -> None:
    """Raise `GateError` where a gate does not hold.

    Args:
        reached: how far the build got, a sentence.
    """
    failed = [outcome for outcome in outcomes if not outcome.holds]
    if not failed:
        return
    parts = []
    for one in failed:
        limit, value = one.words()
        parts.append(f"gate {one.gate}{f' of {one.text}' if one.text else ''}: expected at most {limit}, got {value}")
    facts = {"built": False, "reached": reached, "gates": [outcome.as_dict() for outcome in outcomes]}
    says = "; ".join(parts)
    raise GateError(
        f"{says[0].upper()}{says[1:]}. {reached} Nothing was left at the output path. Change the budget, calibrate on "
        "more text like the gate's, or change the gate.",
        facts,
    )
