"""Properties of knobs, tensor files and folds, over generated input."""

import json
import tempfile
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from tests import families
from tests.contract.cases import METHODS, SUPPORT, case, fresh, identity
from vtzoo import files, knobs, registry
from vtzoo.errors import UsageError
from vtzoo.folding import fold, task_vector
from vtzoo.live import extract
from vtzoo.tensors import DTYPES, TensorFile, write

few = settings(max_examples=30, deadline=None, derandomize=True)
WORDS = st.from_regex(r"[a-z*][a-z0-9_.*]{0,8}", fullmatch=True)


# ------------------------------------------------------------------------------------------------------------- knobs


def _values(annotation: Any, default: Any) -> st.SearchStrategy[Any]:
    """Values that a knob's type allows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _numbers(
            arguments[0],
            {
                type(m).__name__: next(iter(vars_of(m).values()))
                for f in arguments[1:]
                for m in getattr(f, "metadata", ())
            },
        )
    if origin in (Union, UnionType):
        return st.one_of(_values(a, default) for a in arguments)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        each = WORDS if arguments[0] is str else _values(arguments[0], default)
        return st.lists(each, min_size=1, max_size=3).map(tuple)
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    return st.just(default) if annotation is str else _numbers(annotation, {})


def vars_of(limit: Any) -> dict[str, Any]:
    """The fields of one of annotated-types' slotted limits."""
    return {n: getattr(limit, n) for n in limit.__dataclass_fields__}


def _numbers(kind: Any, limits: dict[str, Any]) -> st.SearchStrategy[Any]:
    low, high = limits.get("Ge", limits.get("Gt")), limits.get("Le", limits.get("Lt"))
    if kind is int:
        most, step = (high if high is not None else 10**6) - ("Lt" in limits), limits.get("MultipleOf", 1)
        return st.integers((low or 0) + ("Gt" in limits), most).map(lambda n: max(step, n - n % step))
    return st.floats(
        low or 0.0,
        1e6 if high is None else high,
        exclude_min="Gt" in limits,
        exclude_max="Lt" in limits,
        allow_subnormal=False,
    )


@st.composite
def configs(draw: Any, method: str) -> Any:
    """A method's Config with every knob drawn; those that its own check refuses are passed over."""
    schema = registry.load("methods", method).Config
    default = schema()
    hints = get_type_hints(schema, include_extras=True)
    values = {n: draw(_values(a, getattr(default, n))) for n, a in hints.items() if draw(st.booleans())}
    try:
        return schema(**values)
    except ValueError:
        return default


@pytest.mark.parametrize("method", METHODS)
@few
@given(data=st.data())
def test_decode_undoes_encode(method: str, data: Any) -> None:
    """A config survives JSON, as it does in a delta's header."""
    config = data.draw(configs(method))
    stored = json.loads(json.dumps(knobs.encode(config)))
    assert knobs.decode(type(config), stored, method) == config


@pytest.mark.parametrize("method", METHODS)
@few
@given(data=st.data())
def test_config_survives_being_typed(method: str, data: Any) -> None:
    """A config written as people write it, name[knob=value,…], is read back equal."""
    config = data.draw(configs(method))
    text = {k: list(v) if isinstance(v, list) else str(v) for k, v in knobs.encode(config).items() if v is not None}
    (part,) = knobs.parse(str(knobs.Part(method, text)))
    assert knobs.decode(type(config), part.knobs, method) == config


NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,9}", fullmatch=True)
VALUE = st.from_regex(r"[A-Za-z0-9_.*:/-]{1,8}", fullmatch=True)
PARTS = st.builds(
    knobs.Part, NAMES, st.dictionaries(NAMES, VALUE | st.lists(VALUE, min_size=2, max_size=3), max_size=3)
)


@few
@given(st.lists(PARTS, min_size=1, max_size=4))
def test_parse_undoes_str(parts: list[knobs.Part]) -> None:
    """A stack of any parts, written and parsed, is the same stack."""
    assert knobs.parse("+".join(map(str, parts))) == parts


@few
@given(st.text(max_size=30))
def test_parse_understands_or_refuses(text: str) -> None:
    """Whatever is typed, the parser gives parts that can be written again, or a usage error with a hint."""
    try:
        parts = knobs.parse(text)
    except UsageError as refusal:
        assert refusal.hint
    else:
        assert knobs.parse("+".join(map(str, parts))) == parts


# ------------------------------------------------------------------------------------------------------ tensor files


@st.composite
def tensors(draw: Any) -> dict[str, Tensor]:
    """Named tensors of any dtype and small shape, empty and scalar ones included."""
    found = {}
    for name in draw(
        st.lists(st.text(min_size=1, max_size=12).filter(lambda n: n != "__metadata__"), unique=True, max_size=6)
    ):
        dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), draw(st.lists(st.integers(0, 4), max_size=3))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        found[name] = (torch.randn(shape, generator=generator) * 50).to(dtype)
    return found


@few
@given(
    given=tensors(), metadata=st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3), seed=st.randoms()
)
def test_written_file_is_a_safetensors_file(given: dict[str, Tensor], metadata: dict[str, str], seed: Any) -> None:
    """What is written, the safetensors library and TensorFile both read back bit for bit, in any order of names."""
    with tempfile.TemporaryDirectory() as folder:
        path, again = Path(folder) / "a.safetensors", Path(folder) / "b.safetensors"
        digest = write(path, given, metadata)
        with safe_open(str(path), "pt") as theirs:
            assert sorted(theirs.keys()) == sorted(given)
            assert (theirs.metadata() or {}) == metadata
            assert all(_same(theirs.get_tensor(n), t) for n, t in given.items())
        ours = TensorFile(path)
        assert ours.header.metadata == metadata
        assert all(_same(ours[n], t) and ours.shape(n) == tuple(t.shape) for n, t in given.items())
        names = list(given)
        seed.shuffle(names)
        assert write(again, {n: given[n] for n in names}, dict(reversed(metadata.items()))) == digest
        assert write(again, ours, metadata) == digest
        assert path.read_bytes() == again.read_bytes()
        assert files.sha256(path) == digest
        del ours


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------- folds

FOLDS = [(m, f) for m in METHODS for f in ("vit", "beit", "nfnet", "resnet") if SUPPORT[m][f] == "folds"]


@cache
def _eager(method: str, family: str) -> dict[str, Tensor]:
    return dict(fold(families.build(family).state_dict(), case(method, family).delta))


@few
@given(pair=st.sampled_from(FOLDS), seed=st.randoms())
def test_lazy_fold_is_the_eager_one(pair: tuple[str, str], seed: Any) -> None:
    """A fold read tensor by tensor in any order, some of them twice, gives what reading all at once gives."""
    method, family = pair
    whole = _eager(method, family)
    folded = fold(families.build(family).state_dict(), case(method, family).delta)
    for name in seed.choices(list(whole), k=12):
        assert torch.equal(folded[name], whole[name])
        assert folded.shape(name) == tuple(whole[name].shape)
    assert list(folded) == list(whole)
    assert len(folded) == len(whole)


@pytest.mark.parametrize(("method", "family"), [p for p in FOLDS if identity(p[0]) == "yes"])
def test_fold_of_a_fresh_delta_is_the_base(method: str, family: str) -> None:
    """Where a fresh delta is the identity, its fold is the base bit for bit and its task vector is zero."""
    base = families.build(family).state_dict()
    delta = extract(fresh(method, family))
    folded = fold(base, delta)
    assert list(folded) == list(base)
    assert all(torch.equal(folded[n], t) for n, t in base.items())
    vector = task_vector(base, delta)
    assert not any(vector[n].any() for n in vector)


@pytest.mark.parametrize(("method", "family"), [p for p in FOLDS if p[0] != "vpt-shallow"])
def test_base_plus_task_vector_is_the_fold(method: str, family: str) -> None:
    """Base plus task vector gives the fold, and names outside the task vector are the base's own."""
    base = families.build(family).state_dict()
    delta = case(method, family).delta
    vector, folded = task_vector(base, delta), fold(base, delta, task="")
    assert set(vector) <= set(base)
    for name, value in base.items():
        assert (
            torch.allclose(value + vector[name], folded[name], rtol=0, atol=1e-12)
            if name in vector
            else torch.equal(value, folded[name])
        )
