import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from vtzoo import catalogue, files, refs
from vtzoo.catalogue import Index, dump, parse
from vtzoo.errors import Conflict, Corrupt, NotFound, UsageError, VtzooError
from vtzoo.zoo import Zoo

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=4)
TENSORS = st.dictionaries(
    TEXT.filter(lambda n: n != "__metadata__"), st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), max_size=6
)
METADATA = st.dictionaries(TEXT, TEXT, max_size=3)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)
NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,5}(/[a-z0-9][a-z0-9._-]{0,5}){0,2}", fullmatch=True)
KNOWN = refs._TYPES
FACTS = st.dictionaries(TEXT.filter(lambda k: k not in KNOWN), VALUES, max_size=4)
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def legal(name: str) -> bool:
    """Whether the validator takes a name."""
    try:
        refs.check_name(name)
    except UsageError:
        return False
    return True


@quick
@given(tensors=TENSORS, metadata=METADATA)
def test_header_reader_equals_the_library(tensors: dict, metadata: dict, tmp_path: Path) -> None:
    """Names, dtypes, shapes, metadata and bytes of any file that the library writes are read alike."""
    draw = np.random.default_rng(0)
    arrays = {n: draw.integers(0, 2, size=s).astype(DTYPES[d]) for n, (d, s) in tensors.items()}
    path = tmp_path / "w.safetensors"
    path.write_bytes(
        safetensors.numpy.save(arrays, metadata or (None if not arrays else {}))
    )  # ({}, {}) it writes broken
    found, data = files.header(path), path.read_bytes()
    assert found.metadata == metadata
    assert {n: (s.dtype, list(s.shape)) for n, s in found.tensors.items()} == {
        n: (d, s) for n, (d, s) in tensors.items()
    }
    for name, span in found.tensors.items():
        assert data[found.data_start + span.start : found.data_start + span.end] == arrays[name].tobytes()


@quick
@given(tensors=TENSORS, metadata=METADATA)
def test_header_writer_is_read_by_the_library_and_by_us(tensors: dict, metadata: dict, tmp_path: Path) -> None:
    """A header made here, followed by the data in the order given, loads in the library and in our reader."""
    arrays = {n: np.ones(s, DTYPES[d]) for n, (d, s) in tensors.items()}
    head = files.safetensors_header([(n, d, s) for n, (d, s) in tensors.items()], metadata)
    data = head + b"".join(a.tobytes() for a in arrays.values())
    loaded = safetensors.numpy.load(data)
    assert {n: (a.dtype, a.shape) for n, a in loaded.items()} == {n: (a.dtype, a.shape) for n, a in arrays.items()}
    assert all((loaded[n] == a).all() for n, a in arrays.items())
    (tmp_path / "w").write_bytes(data)
    assert files.header(tmp_path / "w").metadata == metadata


@quick
@given(data=st.binary(max_size=60), size=st.integers(0, 60))
def test_header_reads_or_refuses_any_bytes(data: bytes, size: int, tmp_path: Path) -> None:
    """Bytes of any kind, with a plausible length before them, are read or Corrupt."""
    path = tmp_path / "w"
    path.write_bytes(size.to_bytes(8, "little") + data)
    try:
        found = files.header(path)
    except Corrupt:
        return
    assert found.data_start == 8 + size
    assert max((span.end for span in found.tensors.values()), default=0) == len(data) - size


@quick
@given(table=st.dictionaries(NAMES.filter(legal), FACTS, max_size=4))
def test_index_text_gives_back_every_fact(table: dict) -> None:
    """Writing and reading an index loses nothing, and writing again gives the same text."""
    index = Index()
    index.sections["deltas"] = {name: {**facts, "digest": "a" * 64} for name, facts in table.items()}
    text = dump(index)
    found = parse(text.encode(), Path("x"))
    assert found == index
    assert json.dumps(found.sections, sort_keys=True) == json.dumps(index.sections, sort_keys=True)
    assert dump(found) == text


@quick
@given(table=st.dictionaries(NAMES.filter(legal), FACTS, max_size=3))
def test_index_reads_the_same_without_libyaml(table: dict) -> None:
    """The reader in plain Python gives what the one in C gives."""
    index = Index()
    index.sections["models"] = {name: {**facts, "files": {"m": "a" * 64}} for name, facts in table.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "_Loader", yaml.SafeLoader)
        assert parse(dump(index).encode(), Path("x")) == index


@quick
@given(data=st.binary(max_size=60) | TEXT.map(lambda t: f"schema: 1\ndeltas:\n  {t}: {{digest: {t}}}\n".encode()))
def test_index_reads_or_refuses_any_bytes(data: bytes) -> None:
    """Bytes of any kind are an index or one of our refusals, never another error."""
    said = ""
    try:
        parse(data, Path("x"))
    except VtzooError as error:
        said = error.message + error.hint
    assert "\n" not in said


@quick
@given(name=st.text(max_size=20) | NAMES)
def test_legal_names_are_safe_file_names(name: str) -> None:
    """Any name that passes stays inside its folder and is no path, on every system."""
    if legal(name):
        assert Path("/zoo", name).resolve().is_relative_to("/zoo")
        assert name.isascii()
        assert not set(name) & set('\\:*?"<>|@~ ')
        assert not refs.is_path(name)


@quick
@given(names=st.sets(NAMES.filter(legal), min_size=1, max_size=8), data=st.data())
def test_resolve_is_exact_name_else_unique_prefix(names: set[str], data: st.DataObject) -> None:
    """For any names and any beginning of one: an exact name is found, a prefix only when one name has it."""
    entries = [refs.Entry("deltas", n, {"digest": files.sha256_bytes(n.encode())}) for n in sorted(names)]
    whole = data.draw(st.sampled_from(sorted(names)))
    ref = whole[: data.draw(st.integers(1, len(whole)))]
    matching = [n for n in names if n.startswith(ref)]
    if ref in names or len(matching) == 1:
        assert refs.resolve(ref, entries).name == (ref if ref in names else matching[0])
    else:
        with pytest.raises(UsageError, match="could be"):
            refs.resolve(ref, entries)
    assert refs.resolve(f"{ref}@sha256:{files.sha256_bytes(whole.encode())}", entries).name == whole


class ZooMachine(RuleBasedStateMachine):
    """A zoo on disk does what a dict of name -> (section, contents) does."""

    names = Bundle("names")

    @initialize()
    def begin(self) -> None:
        """Start with an empty zoo."""
        self.folder = tempfile.TemporaryDirectory()
        self.zoo = Zoo.init(self.folder.name)
        self.model: dict[str, tuple[str, frozenset[bytes]]] = {}

    def teardown(self) -> None:
        """Remove the folder."""
        if hasattr(self, "folder"):
            self.folder.cleanup()

    @rule(target=names, name=st.sampled_from(["a", "a/b", "a/bc", "d", "d-e/f"]))
    def name(self, name: str) -> str:
        """Choose from few names, so that they meet."""
        return name

    @rule(
        name=names,
        section=st.sampled_from(["deltas", "models"]),
        contents=st.frozensets(st.sampled_from([b"1", b"2", b"3", b""]), min_size=1, max_size=2),
        replace=st.booleans(),
    )
    def put(self, name: str, section: refs.Section, contents: frozenset[bytes], replace: bool) -> None:
        """A put works when the name is free, or replaced in its own section."""
        digests = [self.zoo.add_object(c) for c in sorted(contents)][: 1 if section == "deltas" else None]
        kept = frozenset(sorted(contents)[: len(digests)])
        self.zoo.discard([files.sha256_bytes(c) for c in contents - kept])
        facts = (
            {"digest": digests[0]} if section == "deltas" else {"files": {f"f{i}": d for i, d in enumerate(digests)}}
        )
        old = self.model.get(name)
        if old is None or (replace and old[0] == section):
            self.zoo.put(section, name, facts, replace=replace)
            self.model[name] = (section, kept)
        else:
            with pytest.raises(Conflict):
                self.zoo.put(section, name, facts, replace=replace)

    @rule(name=names)
    def remove(self, name: str) -> None:
        """A remove works when the name is there."""
        try:
            self.zoo.remove(self._entry(name))
        except NotFound:
            assert name not in self.model
        else:
            del self.model[name]

    @rule(name=names, new=names)
    def rename(self, name: str, new: str) -> None:
        """A rename works when the name is there and the new one is free."""
        if name not in self.model:
            return
        if new in self.model:
            with pytest.raises(Conflict):
                self.zoo.rename(self._entry(name), new)
        else:
            self.zoo.rename(self._entry(name), new)
            self.model[new] = self.model.pop(name)

    def _entry(self, name: str) -> refs.Entry:
        entry = next((e for e in self.zoo.entries() if e.name == name and not e.builtin), None)
        return entry or refs.Entry("deltas", name, {})

    @invariant()
    def same_as_the_model(self) -> None:
        """Entries and object files are those of the model, and nothing else is on the disk."""
        if not hasattr(self, "folder"):
            return
        found = {n: s for s, table in self.zoo.index().items() for n in table}
        assert found == {n: s for n, (s, _) in self.model.items()}
        wanted = {files.sha256_bytes(c) for _, contents in self.model.values() for c in contents}
        there = {p.name for p in self.zoo.root.rglob("*") if p.is_file()}
        assert there - {"latest.yaml", "previous.yaml"} == wanted | {"zoo_index.yaml"}
        assert all(files.sha256(self.zoo.object(d)) == d for d in wanted)


TestZooMachine = ZooMachine.TestCase
TestZooMachine.settings = settings(max_examples=10, stateful_step_count=15, deadline=None)
