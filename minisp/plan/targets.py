"""What share to keep so that the result has a wanted size: solved from shapes alone, before anything runs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from math import floor

from minisp.config import MinifyConfig
from minisp.errors import ConfigError
from minisp.models.structures import Structure
from minisp.store.checkpoint import DTYPE_OF, Checkpoint
from minisp.units import megabytes, millions, parse_count, parse_size

# Bytes by which the headers of the weight files may grow: shapes have fewer digits, names may be longer.
HEADERS = 8192
# A share of the structures is written with so many digits, rounded down: the result is never above the target.
DIGITS = 9


def with_target(
    config: MinifyConfig, structures: Sequence[Structure], parameters: int, bytes_: int, checkpoint: Checkpoint | None
) -> MinifyConfig:
    """The options with the share `keep` that a target leads to; as they are, where there is none.

    Args:
        parameters: of the whole model; bytes_: of its weights, as stored.
        checkpoint: says in what type the structures are stored; None takes the mean over the model.

    Raises:
        ConfigError: the model is no larger than the target, or what cannot be cut is as large.
    """
    if config.target_size is None and config.target_params is None:
        return config
    cuttable = sum(x.num_units * x.parameters for x in structures)
    show: Callable[[int], str]
    if config.target_params is not None:
        name, wanted, whole = "target_params", parse_count(config.target_params), parameters
        item, show = 1, millions
    else:
        assert config.target_size is not None
        name, wanted, whole = "target_size", parse_size(config.target_size), bytes_ + HEADERS
        item, show = _item(structures, parameters, bytes_, checkpoint), megabytes
    least = whole - cuttable * item
    if not least < wanted < whole:
        more = "" if set(config.structures) & {"attention", "queries"} else ", or cut attention too (structures)"
        raise ConfigError(
            f"Option {name}: expected more than {show(least)}, which is what lies outside of the structures that may "
            f"be cut ({', '.join(config.structures)}), and less than {show(whole)}, which the model has, got "
            f"{show(wanted)}. Pass such a target{more}."
        )
    removed = -(-(whole - wanted) // item)
    keep = Fraction(floor(Fraction(cuttable - removed, cuttable) * 10**DIGITS), 10**DIGITS)
    return replace(config, keep=float(keep))


def _item(structures: Sequence[Structure], parameters: int, bytes_: int, checkpoint: Checkpoint | None) -> int:
    """Bytes that a removed parameter takes at least."""
    if checkpoint is None:
        return max(1, bytes_ // parameters)
    tails = tuple({part.parameter for x in structures for part in x.slices})
    return min(DTYPE_OF[place.dtype].itemsize for name, place in checkpoint.tensors.items() if name.endswith(tails))
