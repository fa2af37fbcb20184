"""Checks of options, each of which raises a `ConfigError` that says expected, got and remedy."""

from collections.abc import Callable
from typing import Any, get_args

from minisp.errors import ConfigError


def is_positive_integer(value: Any) -> bool:
    """Whether it is a whole number, at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_damping(value: Any) -> bool:
    """Whether it is a finite number, at least 0, or "auto"."""
    return value == "auto" or bool(0 <= value < float("inf"))


def require(name: str, value: Any, expected: str, holds: Callable[[Any], bool]) -> None:
    """Raise `ConfigError` where an option's value does not hold, or where asking raises."""
    try:
        ok = not isinstance(value, bool) and bool(holds(value))
    except (TypeError, ValueError, OverflowError):
        ok = False
    if not ok:
        raise ConfigError(f"Option {name}: expected {expected}, got {value!r}. Pass such a value.")


def require_flag(name: str, value: Any) -> None:
    """Raise `ConfigError` where an option is neither True nor False."""
    if not isinstance(value, bool):
        raise ConfigError(f"Option {name}: expected True or False, got {value!r}. Pass one of them.")


def require_choice(name: str, value: Any, choices: Any) -> None:
    """Raise `ConfigError` where an option is none of the words of a Literal."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(f"Option {name}: expected one of {', '.join(allowed)}, got {value!r}. Check the spelling.")
