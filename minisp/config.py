"""The options of one minification: one frozen record, validated in one place, passed whole."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from minisp.checks import is_damping, is_positive_integer, require, require_choice, require_flag
from minisp.errors import ConfigError
from minisp.resources import Resources
from minisp.units import parse_count, parse_size

Method = Literal["taylor", "surgeon", "sparsegpt", "wanda", "magnitude"]
Pattern = Literal["structured", "rows-columns", "2:4", "4:8", "unstructured"]
SaliencyScore = Literal["taylor", "fisher", "signed"]
Widths = Literal["per-layer", "uniform"]
Labels = Literal["text", "sampled", "both"]
Allocation = Literal["score", "measured"]
RefitOn = Literal["dense", "pruned"]
Shrinkage = Literal["original", "zero"]
Damping = float | Literal["auto"]
StructureName = Literal["mlp", "attention", "queries"]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class MinifyConfig:
    """What to cut, how to judge it, how to refit it, and on how much text.

    Args:
        keep: share of the parameters of the structures that is kept over all layers, in (0, 1]; a budget that rounding
            never exceeds. With MLPs alone, the share of their units.
        target_size: bytes of the weights that the result has at most, such as 90MB, instead of `keep`.
        target_params: parameters that it has at most, such as 110M, instead of `keep`.
        method: `taylor`, Taylor saliency and ridge refit (the paper); `surgeon`, costs and updates from a
            Kronecker-factored curvature (the LLM Surgeon); `sparsegpt`, `wanda`, `magnitude`, for patterns of zeros.
        pattern: what goes: `structured`, whole units, so that the model gets smaller; all others leave zeros in the
            linear maps of attention and MLPs, of which `keep` is the share that stays: `rows-columns` of each map,
            `2:4` and `4:8` of neighbouring inputs, `unstructured` single weights.
        shots: in how many equal steps the surgeon removes, with a curvature of its own for each.
        gradient_damping: λ of the curvature's gradient side, relative to its mean diagonal, above 0; that of its input
            side is `damping`.
        structures: what may be cut: `mlp`, MLP units; `attention`, key/value groups with their queries; `queries`,
            equally many query heads of every group. Either of the last two may stand beside `mlp`.
        saliency: score of a unit from p = x·g per token t: `taylor` mean |p|, `fisher` mean p², `signed` |mean p|.
        labels: of the loss whose gradient g is: `text`, the calibration text's next tokens; `sampled`, one drawn from
            the model's own distribution for each token (the true Fisher information instead of the empirical one);
            `both`, the sum of the two in one backward pass.
        widths: `per-layer` lets one global ranking set every layer's width; `uniform` gives all layers the same.
        allocation: what widths per layer follow: `score`, the scores as they are; `measured`, the scores of each layer
            scaled by what a trial cut of it does to the model's output.
        alignment: widths are multiples of it (or untouched); None picks the largest power of two that is at
            most a 32nd of the width, and at most 128.
        tp: tensor-parallel degree of the server: widths are multiples of `alignment` times it, and groups of heads
            multiples of it, so that every device gets an equal and aligned part. Part of the budget too.
        min_keep: no layer keeps less than this fraction of its units, or than `keep` where that is less, in [0, 1];
            rounded down to the alignment where the budget has no room for more.
        refit_on: what the kept units are refitted on: `dense`, the dense model's activations; `pruned`, those of the
            already pruned layers below, in a sweep of its own.
        correct_drift: after a refit on the dense model's activations, let every layer take over what it can of the
            drift that the pruned layers below have left, in a sweep of its own.
        correction_damping: ridge λ of that correction, relative to the mean diagonal of its Gram matrix, above 0.
        damping: ridge λ relative to the mean diagonal of the Gram matrix, at least 0; `auto` chooses it per layer by
            generalised cross-validation.
        shrink_to: where the ridge pulls the refitted weights: `original` (their old values) or `zero` (the paper).
        reconstruct: refit the kept columns; False only slices.
        num_windows: calibration windows, generic ones included.
        generic: share of the calibration windows that is generic text, in [0, 1): written by the model itself, where it
            fits in memory whole, and Python's documentation and source code; it bounds what is lost on text unlike
            yours. 0 turns it off; a text that names builtin: sources says itself how much of them it wants.
        saliency_windows: calibration windows, evenly spread, that saliency is computed on, at most `num_windows`; the
            others then add to the Gram matrices alone, for half of the work. None takes all.
        window: tokens per calibration window.
        batch: windows computed at once; None picks about 512 tokens on a CPU and 8192 on a GPU.
        dtype: compute type; `auto` is bfloat16 where the device has it, else float32.
        device: torch device string; `auto` is the first GPU, else the CPU.
        seed: seeds the text that the model writes itself and every other random choice.

    Raises:
        ConfigError: a value outside its range.
    """

    keep: float = 0.8
    target_size: str | None = None
    target_params: str | None = None
    method: Method = "taylor"
    pattern: Pattern = "structured"
    shots: int = 1
    gradient_damping: float = 0.1
    structures: tuple[StructureName, ...] = ("mlp",)
    saliency: SaliencyScore = "fisher"
    labels: Labels = "both"
    widths: Widths = "per-layer"
    allocation: Allocation = "score"
    alignment: int | None = None
    tp: int = 1
    min_keep: float = 0.1
    refit_on: RefitOn = "dense"
    correct_drift: bool = True
    damping: Damping = 0.05
    correction_damping: float = 1.0
    shrink_to: Shrinkage = "original"
    reconstruct: bool = True
    num_windows: int = 128
    generic: float = 0.25
    saliency_windows: int | None = None
    window: int = 512
    batch: int | None = None
    dtype: DtypeName = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("method", self.method, Method)
        require_choice("pattern", self.pattern, Pattern)
        require_choice("saliency", self.saliency, SaliencyScore)
        require_choice("labels", self.labels, Labels)
        require_choice("widths", self.widths, Widths)
        require_choice("allocation", self.allocation, Allocation)
        require_choice("refit_on", self.refit_on, RefitOn)
        require_choice("shrink_to", self.shrink_to, Shrinkage)
        require_choice("dtype", self.dtype, DtypeName)
        _require_structures(self.structures)
        require("keep", self.keep, "a number in (0, 1]", lambda v: 0 < v <= 1)
        require("min_keep", self.min_keep, "a number in [0, 1]", lambda v: 0 <= v <= 1)
        require("generic", self.generic, "a number in [0, 1)", lambda v: 0 <= v < 1)
        require("damping", self.damping, "a finite number, at least 0, or 'auto'", is_damping)
        require(
            "correction_damping", self.correction_damping, "a finite number above 0", lambda v: 0 < v < float("inf")
        )
        require("gradient_damping", self.gradient_damping, "a finite number above 0", lambda v: 0 < v < float("inf"))
        for name in ("correct_drift", "reconstruct"):
            require_flag(name, getattr(self, name))
        for name in ("num_windows", "window", "shots", "tp"):
            require(name, getattr(self, name), "a whole number, at least 1", is_positive_integer)
        for name in ("alignment", "batch", "saliency_windows"):
            value = getattr(self, name)
            if value is not None:
                require(name, value, "a whole number, at least 1, or None", is_positive_integer)
        if self.saliency_windows is not None and self.saliency_windows > self.num_windows:
            raise ConfigError(
                f"Option saliency_windows: expected at most num_windows ({self.num_windows}), got "
                f"{self.saliency_windows}. Pass fewer, or leave it out to take all."
            )
        require("seed", self.seed, "a whole number in [0, 2**63)", lambda v: isinstance(v, int) and 0 <= v < 2**63)
        self._require_target()
        self._require_method()

    def _require_target(self) -> None:
        if self.target_size is not None:
            require("target_size", self.target_size, "a size such as 90MB", lambda v: parse_size(v) > 0)
        if self.target_params is not None:
            require("target_params", self.target_params, "a count such as 110M", lambda v: parse_count(v) > 0)
        if self.target_size is not None and self.target_params is not None:
            raise ConfigError("Options target_size and target_params: expected one of them, got both. Leave one out.")
        if not self.cuts and (self.target_size or self.target_params):
            raise ConfigError(
                f"Option pattern: expected structured beside a target, got {self.pattern}, which leaves all weights "
                "where they are. Pass keep instead."
            )

    def _require_method(self) -> None:
        """Options that exclude each other by method and pattern."""
        served = METHODS[self.method]
        if self.pattern not in served:
            raise ConfigError(
                f"Option pattern: expected one of {', '.join(served)}, which method {self.method} has, got "
                f"{self.pattern!r}. Pass one of them, or method='surgeon', which has all."
            )
        if not self.cuts and self.keep == 1:
            raise ConfigError(f"Option keep: expected less than 1 with pattern {self.pattern}, got 1. Pass that.")
        group = group_of(self.pattern)
        if group is not None and self.keep != group[0] / group[1]:
            raise ConfigError(
                f"Option keep: expected {group[0] / group[1]}, the share that pattern {self.pattern} keeps, got "
                f"{self.keep}. Pass that."
            )
        if self.shots > 1 and (self.method != "surgeon" or self.cuts):
            raise ConfigError(
                f"Option shots: expected 1 with method {self.method} and pattern {self.pattern}, got {self.shots}. "
                "Leave it out, or pass method='surgeon' and a pattern of zeros."
            )
        if self.method == "surgeon" and (self.saliency_windows is not None or self.damping in ("auto", 0)):
            raise ConfigError(
                "Option method: expected a damping above 0 and no saliency_windows with surgeon, got "
                f"damping={self.damping!r} and saliency_windows={self.saliency_windows}. Leave both out."
            )

    @property
    def sees_gradients(self) -> bool:
        """Whether a sweep forms gradients: SparseGPT and Wanda look at inputs alone, and magnitude at weights."""
        return self.method in ("taylor", "surgeon")

    @property
    def cuts(self) -> bool:
        """Whether whole units go; else zeros stay where weights went."""
        return self.pattern == "structured"

    @property
    def measures(self) -> bool:
        """Whether trial cuts decide the widths."""
        return (
            self.allocation == "measured" and self.method == "taylor" and self.widths == "per-layer" and self.keep < 1
        )

    @property
    def collects_gram(self) -> bool:
        """Whether the saliency sweep collects Gram matrices.

        It does with keep=1 too, where nothing is refitted: a later run with another ratio reuses them.
        """
        return self.refit_on == "dense" or self.measures or not self.refit_sweep or self.method == "surgeon"

    @property
    def corrects(self) -> bool:
        """Whether drift is corrected."""
        return self.refit_on == "dense" and self.correct_drift and self.reconstruct and self.keep < 1 and self.cuts

    @property
    def refit_sweep(self) -> bool:
        """Whether a second sweep refits or corrects layers on what the pruned layers below them produce."""
        return self.corrects or (self.refit_on == "pruned" and self.reconstruct and self.keep < 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for manifests and reports."""
        return asdict(self)

    def identity(self) -> dict[str, dict[str, Any]]:
        """The options in two parts: those that the statistics depend on, and those that only the results do."""
        values = self.as_dict()
        # Of the text itself a run keeps the windows, and compares them.
        del values["generic"]
        if self.method != "taylor":
            # Later shots see what earlier ones removed: no statistics serve other options.
            return {"statistics": {**values, "gram": self.collects_gram}, "results": {}}
        results = {name: values.pop(name) for name in RESULT_OPTIONS}
        return {"statistics": {**values, "gram": self.collects_gram}, "results": results}


# The patterns that each method has.
METHODS: dict[str, tuple[str, ...]] = {
    "taylor": ("structured",),
    "surgeon": get_args(Pattern),
    **dict.fromkeys(("sparsegpt", "wanda", "magnitude"), ("2:4", "4:8", "unstructured")),
}


def group_of(pattern: str) -> tuple[int, int] | None:
    """(n, m) of a pattern "n:m", which keeps at most n of every m neighbouring inputs; None for the others."""
    kept, colon, size = pattern.partition(":")
    return (int(kept), int(size)) if colon else None


# What can change without new statistics.
RESULT_OPTIONS = (
    "keep", "saliency", "widths", "allocation", "alignment", "tp", "min_keep", "refit_on", "correct_drift", "damping",
    "correction_damping", "shrink_to", "reconstruct",
)  # fmt: skip


def split_options(**options: Any) -> tuple[MinifyConfig, Resources]:
    """Keyword options, sorted into the two records; an unknown name raises `ConfigError` with the known ones."""
    known = [[field.name for field in fields(record)] for record in (MinifyConfig, Resources)]
    unknown = sorted(set(options) - set(known[0]) - set(known[1]))
    if unknown:
        raise ConfigError(
            f"Unknown option {', '.join(unknown)}: expected one of {', '.join(known[0] + known[1])}. Check the "
            "spelling."
        )
    target = options.get("target_size") or options.get("target_params")
    if target and options.get("keep", MinifyConfig.keep) != MinifyConfig.keep:
        raise ConfigError(
            f"Option keep: expected it to be left out beside a target, got keep={options['keep']} and {target!r}. Pass "
            "one of them."
        )
    if isinstance(options.get("structures"), list):
        # As command lines and files bring it.
        options["structures"] = tuple(options["structures"])
    method, resources = ({name: options[name] for name in names if name in options} for names in known)
    return MinifyConfig(**method), Resources(**resources)


def _require_structures(names: Any) -> None:
    allowed = get_args(StructureName)
    if not isinstance(names, tuple) or not names or len(set(names)) < len(names) or not set(names) <= set(allowed):
        raise ConfigError(
            f"Option structures: expected a tuple of one or more of {', '.join(allowed)}, each once, got {names!r}. "
            "Check the spelling."
        )
    if {"attention", "queries"} <= set(names):
        raise ConfigError(
            "Option structures: expected one of attention and queries, which both cut query heads, got both. Leave one "
            "out."
        )
