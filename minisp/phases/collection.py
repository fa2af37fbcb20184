"""What a sweep collects: sums over tokens, each of a part of a layer, and what adds to them while layers compute."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from minisp.ranks import Ranks


class Place(Protocol):
    """What sums are of: part of a layer, whose text names it."""

    @property
    def layer(self) -> int: ...


class Sums(Protocol):
    """Sums over tokens."""

    def sum_over_(self, ranks: Ranks) -> None: ...

    def finalize_(self, whose: object) -> object: ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]: ...


K = TypeVar("K", bound=Place)
S = TypeVar("S", bound=Sums)


@dataclass(frozen=True)
class Collection(Generic[K, S]):
    """What a sweep collects.

    Attributes:
        what: a person is told that is collected.
        keys: of the sums, in the order of the layers.
        name: of the record of a key's sums.
        empty: sums of no tokens.
        restored: the sums of which `Sums.tensors` were stored, given what reads the tensor of a key.
        watch: within it, what passes is added to the sums of a segment's keys.
    """

    what: str
    keys: Sequence[K]
    name: Callable[[K], str]
    empty: Callable[[K], S]
    restored: Callable[[K, Callable[[str], Tensor]], S]
    watch: Callable[[Mapping[K, S]], AbstractContextManager[Any]]

    def within(self, segment: range) -> list[K]:
        """The keys of a segment's layers."""
        return [key for key in self.keys if key.layer in segment]
