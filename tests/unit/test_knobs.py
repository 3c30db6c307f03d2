"""knobs.py: the grammar of specs and the decoding of knobs."""

import dataclasses
from typing import Annotated, Literal

import pytest
from pydantic import Field

from vtzoo import registry
from vtzoo.errors import UsageError
from vtzoo.knobs import Part, decode, encode, one, parse


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs of every type that methods use."""

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("auto",)
    mode: Literal["a", "b"] = "a"
    on: bool = False

    def __post_init__(self) -> None:
        """Refuse one combination."""
        if self.on and self.rank > 100:
            raise ValueError("on does not go with a rank above 100")


def merge(
    deltas: object, *, density: Annotated[float, Field(gt=0, le=1)] = 0.2, scale: float = 1.0, _hidden: int = 0
) -> None:
    """A function with knobs."""


def test_parse_reads_a_stack() -> None:
    """Names, knobs, lists in both forms, in the order written."""
    assert parse("lora[rank=8,targets=qkv|proj]+ssf[targets=[a,b]]+bitfit") == [
        Part("lora", {"rank": "8", "targets": ["qkv", "proj"]}),
        Part("ssf", {"targets": ["a", "b"]}),
        Part("bitfit", {}),
    ]


@pytest.mark.parametrize(
    "spec",
    ["", " ", "+", "lora+", "lora[", "lora]", "lora[rank]", "lora[=1]", "lora[rank=1,rank=2]", "Lora x", "a[b=1]c"],
)
def test_parse_refuses(spec: str) -> None:
    """What does not follow the grammar is a usage error with an example."""
    with pytest.raises(UsageError) as refusal:
        parse(spec)
    assert refusal.value.hint


def test_one_refuses_a_stack() -> None:
    """A merge or loss is one thing."""
    assert one("ties[density=0.2]").name == "ties"
    with pytest.raises(UsageError, match="2 things"):
        one("ties+linear")


def test_decode_gives_typed_values() -> None:
    """Text becomes numbers, tuples and booleans; a word stands for a tuple of one."""
    got = decode(Config, {"rank": "4", "alpha": "2.5", "targets": "qkv", "mode": "b", "on": "true"}, "x")
    assert got == Config(rank=4, alpha=2.5, targets=("qkv",), mode="b", on=True)


def test_decode_reports_every_error_at_once() -> None:
    """Two wrong values and an unknown knob are named together, the last with the nearest name."""
    with pytest.raises(UsageError) as refusal:
        decode(Config, {"rank": "0", "mode": "c", "alpa": "1"}, "x")
    assert "rank='0'" in str(refusal.value)
    assert "mode='c'" in str(refusal.value)
    assert "no knob 'alpa' (did you mean alpha?)" in str(refusal.value)
    assert "rank, alpha, targets, mode, on" in refusal.value.hint


def test_decode_says_where_there_are_no_knobs() -> None:
    """A knob for something without knobs is refused in words, not with empty brackets."""

    @dataclasses.dataclass(frozen=True)
    class Bare:
        """No knobs."""

    with pytest.raises(UsageError, match=r"no knob 'rank' \(it has none\)"):
        decode(Bare, {"rank": "4"}, "bitfit")


@pytest.mark.parametrize(("knob", "value"), [("alpha", "inf"), ("dropout", "nan"), ("plus", "1e999")])
def test_decode_refuses_what_is_not_finite(knob: str, value: str) -> None:
    """A delta that is NaN from the start would be blamed on the learning rate."""
    with pytest.raises(UsageError, match=knob):
        decode(registry.load("methods", "lora").Config, {knob: value}, "lora")


def test_decode_passes_on_the_configs_own_check() -> None:
    """What __post_init__ refuses is a usage error in its words."""
    with pytest.raises(UsageError, match="on does not go with a rank above 100"):
        decode(Config, {"rank": "101", "on": "true"}, "x")


def test_decode_reads_a_functions_keywords() -> None:
    """A function's keyword-only parameters are its schema; underscored ones are not knobs."""
    assert decode(merge, {"density": "0.5"}, "ties") == {"density": 0.5, "scale": 1.0}
    with pytest.raises(UsageError, match="density"):
        decode(merge, {"density": "0"}, "ties")
    for hidden in ("_hidden", "deltas"):
        with pytest.raises(UsageError, match=hidden):
            decode(merge, {hidden: "1"}, "ties")


def test_encode_is_plain_json() -> None:
    """Tuples become lists, None stays."""
    assert encode(Config(targets=("a", "b"))) == {
        "rank": 8,
        "alpha": None,
        "targets": ["a", "b"],
        "mode": "a",
        "on": False,
    }


def test_part_writes_itself() -> None:
    """str() of a part is what one types."""
    assert str(Part("lora", {"rank": "8", "targets": ["a", "b"]})) == "lora[rank=8,targets=a|b]"
    assert str(Part("bitfit", {})) == "bitfit"
