"""What must be known of a kind of network to take it apart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Member:
    """A tensor's dimension that goes through a group's units: dimension `dim` taken apart into `parts`, of which the `at`-th counts them."""

    name: str
    dim: int
    parts: tuple[int, ...]
    at: int = 0


@dataclass(frozen=True)
class Sizes:
    """How many blocks there are, and which share of the width and of the hidden units."""

    depth: int
    width: float
    hidden: float


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A network as it can be taken apart.

    Attributes:
        groups: "hidden" and "width": groups of units, each with all dimensions of tensors that go through them, buffers included. Any order of a
            group's units is the same function.
        rows: its blocks, stage after stage.
        spare: those that can be left out.
        steps: in how many equal parts the width comes (heads); 0 where any share will do.
        arguments: timm's, for these sizes and without these blocks.
    """

    groups: Mapping[str, Sequence[Sequence[Member]]]
    rows: Sequence[Sequence[str]]
    spare: Sequence[str]
    steps: int
    arguments: Callable[[Sizes, Sequence[str]], dict[str, Any]]

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return sum(map(len, self.rows))
