"""tensors.py: lazy mappings and the streaming writer."""

import json
from pathlib import Path

import pytest
import torch

from vtzoo import files
from vtzoo.errors import Corrupt, NotFound
from vtzoo.tensors import Lazy, TensorFile, prefixed, shape_of, working, write

SOME = {"b": torch.arange(6.0).reshape(2, 3), "a.x": torch.tensor(3), "a.y": torch.ones(2, dtype=torch.bfloat16)}


def test_lazy_computes_at_each_access() -> None:
    """Nothing is computed before it is asked for, nothing is kept, shapes are known without computing."""
    calls = []
    lazy = Lazy({"a": lambda: calls.append(1) or torch.zeros(2)}, {"a": (2,)})
    assert (list(lazy), len(lazy), shape_of(lazy, "a"), calls) == (["a"], 1, (2,), [])
    assert lazy["a"] is not lazy["a"]
    assert len(calls) == 2
    with pytest.raises(KeyError):
        lazy["b"]


def test_prefixed_takes_the_prefix_off() -> None:
    """Only the names below it, under their short names."""
    below = prefixed(SOME, "a.")
    assert sorted(below) == ["x", "y"]
    assert below["x"] is SOME["a.x"]
    assert below.shape("y") == (2,)


def test_file_opens_and_reads_by_name(tmp_path: Path) -> None:
    """A written file is a mapping with shapes from its header; a name that it lacks is a KeyError."""
    write(tmp_path / "f.safetensors", SOME, {"who": "me"})
    opened = TensorFile(tmp_path / "f.safetensors")
    assert sorted(opened) == sorted(SOME)
    assert len(opened) == 3
    assert all(torch.equal(opened[n], t) for n, t in SOME.items())
    assert shape_of(opened, "b") == (2, 3)
    with pytest.raises(KeyError):
        opened["c"]


def test_tensors_lie_at_multiples_of_their_width(tmp_path: Path) -> None:
    """Whatever the names and dtypes, each tensor starts at a multiple of its item size."""
    mixed = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(1, dtype=torch.float16),
        "c": torch.ones(1),
        "d": torch.tensor(7),
    }
    write(tmp_path / "f.safetensors", mixed, {})
    header = files.header(tmp_path / "f.safetensors")
    assert all((header.data_start + header.tensors[n].start) % t.itemsize == 0 for n, t in mixed.items())


def test_cast_touches_floating_tensors_only(tmp_path: Path) -> None:
    """With a dtype given, integers keep theirs, from a plain and from a lazy mapping."""
    lazy = Lazy({n: (lambda n=n: SOME[n]) for n in SOME}, {n: tuple(t.shape) for n, t in SOME.items()})
    assert write(tmp_path / "a", SOME, {}, torch.float16) == write(tmp_path / "b", lazy, {}, torch.float16)
    opened = TensorFile(tmp_path / "a")
    assert {n: opened[n].dtype for n in opened} == {"a.x": torch.int64, "a.y": torch.float16, "b": torch.float16}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(tmp_path: Path, bad: float) -> None:
    """NaN and infinity are refused by name, and no file appears."""
    with pytest.raises(Corrupt, match="b holds NaN or infinity"):
        write(tmp_path / "f", {"a": torch.ones(2), "b": torch.tensor([1.0, bad])}, {})
    assert not list(tmp_path.iterdir())


def test_overflow_in_the_new_dtype_is_refused(tmp_path: Path) -> None:
    """A number that float16 can't hold is refused rather than written as infinity."""
    with pytest.raises(Corrupt, match="too large for F16"):
        write(tmp_path / "f", {"a": torch.tensor([1e6])}, {}, torch.float16)
    assert not list(tmp_path.iterdir())


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    """A complex tensor is refused by name."""
    with pytest.raises(Corrupt, match=r"a is torch\.complex64"):
        write(tmp_path / "f", {"a": torch.ones(1, dtype=torch.complex64)}, {})


def test_lying_shape_is_refused(tmp_path: Path) -> None:
    """A lazy mapping whose tensor comes out in another shape than announced leaves no file."""
    with pytest.raises(Corrupt, match=r"\(3,\) instead of \(2,\)"):
        write(tmp_path / "f", Lazy({"a": lambda: torch.ones(3)}, {"a": (2,)}), {})
    assert not list(tmp_path.iterdir())


def test_header_is_sorted_json(tmp_path: Path) -> None:
    """Header keys are sorted and padded to eight bytes, so that equal content gives equal bytes."""
    write(tmp_path / "f", SOME, {"z": "1", "a": "2"})
    raw = (tmp_path / "f").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    doc = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0
    assert list(doc) == sorted(doc)
    assert list(doc["__metadata__"]) == ["a", "z"]
    kinds = [("a.x", "I64", ()), ("b", "F32", (2, 3)), ("a.y", "BF16", (2,))]
    assert raw[: 8 + size] == files.safetensors_header(kinds, {"a": "2", "z": "1"})


def test_not_contiguous_tensors_are_written_as_seen(tmp_path: Path) -> None:
    """A transposed view and a tensor that requires gradients are written by value."""
    given = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, requires_grad=True)}
    write(tmp_path / "f", given, {})
    opened = TensorFile(tmp_path / "f")
    assert torch.equal(opened["a"], given["a"])
    assert torch.equal(opened["b"], given["b"].detach())


def test_damaged_file_is_refused_when_opened(tmp_path: Path) -> None:
    """A truncated file is Corrupt at once; a file that isn't there is NotFound."""
    write(tmp_path / "f", SOME, {})
    (tmp_path / "g").write_bytes((tmp_path / "f").read_bytes()[:-1])
    with pytest.raises(Corrupt):
        TensorFile(tmp_path / "g")
    with pytest.raises(NotFound):
        TensorFile(tmp_path / "h")


def test_working_precision() -> None:
    """float64 if any is, float32 otherwise, half precision included."""
    half, double = torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.float64)
    assert working(half, half) is torch.float32
    assert working(half, double) is torch.float64
