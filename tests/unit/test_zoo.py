import json
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from filelock import SoftFileLock

from vtzoo import catalogue, files
from vtzoo.catalogue import INDEX, Index, dump, parse
from vtzoo.errors import Conflict, Corrupt, Mismatch, NotFound, Resources, UsageError, VtzooError
from vtzoo.objects import held
from vtzoo.refs import Entry
from vtzoo.spec import BackboneCard
from vtzoo.zoo import Zoo

ROOT = Path(__file__).parents[2]
A = "a" * 64


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """A new zoo."""
    return Zoo.init(tmp_path / "zoo")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 200 kB."""
    if (
        sys.platform != "linux"
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(tmp_path)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("no permission to mount a small file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def delta(zoo: Zoo, content: bytes = b"delta", **facts: object) -> dict:
    """Facts of a delta whose object is stored."""
    return {"digest": zoo.add_object(content), "size_bytes": len(content), **facts}


def listing(folder: Path) -> set[str]:
    """Every file below a folder, the index's copies left out."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and ".vtzoo/index" not in p.as_posix()}


# ------------------------------------------------------------------------------------------------------ which zoo
def test_find_prefers_the_given_path_then_the_environment_then_the_nearest_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--zoo wins over $VTZOO_ZOO, that over the nearest folder upward, that over the user's data folder."""
    for name in ("given", "named", "near"):
        Zoo.init(tmp_path / name)
    inside = tmp_path / "near" / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    monkeypatch.setenv("VTZOO_ZOO", str(tmp_path / "named"))
    assert Zoo.find(tmp_path / "given").root == tmp_path / "given"
    assert Zoo.find().root == tmp_path / "named"
    monkeypatch.delenv("VTZOO_ZOO")
    assert Zoo.find().root == tmp_path / "near"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Zoo.find().root.is_relative_to(tmp_path)
    assert Zoo.find().root.name == "vtzoo"


def test_find_passes_catalogues_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose index is marked `catalogue: true` is never taken for a place to write."""
    Zoo.init(tmp_path)
    (tmp_path / "repo").mkdir()
    files.atomic_text(tmp_path / "repo" / INDEX, dump(Index(catalogue=True)))
    monkeypatch.delenv("VTZOO_ZOO", raising=False)
    monkeypatch.chdir(tmp_path / "repo")
    assert Zoo.find().root == tmp_path
    monkeypatch.chdir(ROOT / "tests")
    assert Zoo.find().root != ROOT


def test_find_survives_a_removed_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the current folder deleted, the user's data folder is used."""
    monkeypatch.delenv("VTZOO_ZOO", raising=False)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert Zoo.find().root.name == "vtzoo"


def test_find_refuses_a_path_without_a_zoo(tmp_path: Path) -> None:
    """A mistyped --zoo is NotFound with the command that makes one, and nothing is made; likewise a user who isn't there."""
    with pytest.raises(NotFound, match="does not exist"):
        Zoo.find("~nobody-of-this-name/zoo")
    with pytest.raises(NotFound) as caught:
        Zoo.find(tmp_path / "typo")
    assert caught.value.hint == f"make it a zoo: vtzoo init {tmp_path / 'typo'}"
    with pytest.raises(NotFound):
        Zoo(tmp_path / "typo").put("deltas", "a", {"digest": A})
    with pytest.raises(NotFound):
        Zoo(tmp_path / "typo").add_object(b"x")
    assert list(tmp_path.iterdir()) == []


def test_the_environment_s_zoo_is_made_at_the_first_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$VTZOO_ZOO may name a folder that does not exist yet: reading shows the catalogue, writing makes it."""
    monkeypatch.setenv("VTZOO_ZOO", str(tmp_path / "new" / "zoo"))
    found = Zoo.find()
    assert all(e.builtin for e in found.entries())
    assert list(tmp_path.iterdir()) == []
    found.put("deltas", "a", delta(found))
    assert [e.name for e in Zoo(tmp_path / "new" / "zoo").entries("deltas")] == ["a"]


def test_init_makes_an_empty_zoo_once(tmp_path: Path) -> None:
    """A new zoo has an index in which git can merge; making it twice is Conflict unless that is said to be fine."""
    made = Zoo.init(tmp_path / "a" / "b")
    assert (made.root / INDEX).read_text() == "backbones: {}\ndeltas: {}\nmodels: {}\nschema: 1\n"
    with pytest.raises(Conflict, match="is a zoo already"):
        Zoo.init(tmp_path / "a" / "b")
    assert Zoo.init(tmp_path / "a" / "b", exist_ok=True).index() == {"backbones": {}, "deltas": {}, "models": {}}


# -------------------------------------------------------------------------------------------------------- objects
def test_objects_are_named_by_content_read_only_and_idempotent(zoo: Zoo, tmp_path: Path) -> None:
    """A file and equal bytes are one object; adding again changes nothing; the source stays."""
    (tmp_path / "w.bin").write_bytes(b"weights")
    digest = zoo.add_object(tmp_path / "w.bin")
    path = zoo.object(digest)
    before = path.stat()
    assert (
        zoo.add_object(b"weights")
        == zoo.add_object(str(tmp_path / "w.bin"))
        == digest
        == files.sha256_bytes(b"weights")
    )
    assert path == zoo.root / ".vtzoo" / "objects" / "sha256" / digest[:2] / digest
    assert (path.read_bytes(), stat.S_IMODE(before.st_mode)) == (b"weights", 0o444)
    assert path.stat().st_ino == before.st_ino
    assert listing(zoo.root) == {INDEX, f".vtzoo/objects/sha256/{digest[:2]}/{digest}"}


def test_adding_heals_a_damaged_object(zoo: Zoo) -> None:
    """An object whose bytes no longer fit its name is written anew when its content is added again."""
    path = zoo.object(zoo.add_object(b"weights"))
    path.chmod(0o644)
    path.write_bytes(b"weight?")
    zoo.add_object(b"weights")
    assert path.read_bytes() == b"weights"


def test_objects_refuse_hostile_digests_and_say_what_is_missing(zoo: Zoo) -> None:
    """A digest never becomes a path before it is checked; a missing object is NotFound."""
    for digest in ("../../etc/passwd", "", "/" * 64, A.upper(), f"sha256:{A}"):
        with pytest.raises(UsageError):
            zoo.object(digest)
    with pytest.raises(NotFound, match="aaaaaaaaaaaa"):
        zoo.object(A)
    with pytest.raises(NotFound):
        zoo.add_object(zoo.root / "nothing")
    with pytest.raises(UsageError):
        zoo.add_object(zoo.root)
    assert listing(zoo.root) == {INDEX}


def test_discard_takes_back_only_what_this_zoo_stored(zoo: Zoo) -> None:
    """A job that fails half-way removes its own objects, not those that were there or are referred to."""
    old, used = zoo.add_object(b"old"), delta(zoo, b"used")
    zoo.put("deltas", "used", used)
    job = Zoo(zoo.root)
    job.discard([job.add_object(b"old"), job.add_object(b"new"), used["digest"]])
    assert {p.name for p in zoo.root.rglob("*") if len(p.name) == 64} == {old, used["digest"]}


# -------------------------------------------------------------------------------------------------------- entries
def test_put_resolve_rename_remove(zoo: Zoo) -> None:
    """An entry is published with its date and command, found by prefix and digest, renamed, and removed with its object."""
    facts = delta(zoo, tasks=("fashion",), metrics={"fashion": {"top1": 0.9}})
    zoo.command = "vtzoo train --name fashion/lora"
    entry = zoo.put("deltas", "fashion/lora", facts)
    made = {"created": entry.facts["created"], "command": "vtzoo train --name fashion/lora"}
    assert entry == Entry("deltas", "fashion/lora", {**made, **facts, "tasks": ["fashion"]})
    assert abs(datetime.fromisoformat(made["created"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert zoo.resolve("fashion") == zoo.resolve(f"fashion/lora@sha256:{facts['digest'][:6]}") == entry
    moved = zoo.rename(entry, "fashion/best")
    assert [e for e in zoo.entries("deltas") if not e.builtin] == [moved]
    zoo.remove(moved)
    assert listing(zoo.root) == {INDEX}


def test_objects_live_as_long_as_an_entry_refers_to_them(zoo: Zoo) -> None:
    """A shared object stays until its last entry goes; replacing frees the old one."""
    shared, config = delta(zoo, b"w"), zoo.add_object(b"{}")
    one = zoo.put("deltas", "one", shared)
    two = zoo.put("models", "two", {"files": {"model.safetensors": shared["digest"], "config.json": config}})
    zoo.remove(one)
    assert zoo.object(shared["digest"]).read_bytes() == b"w"
    zoo.remove(two)
    assert listing(zoo.root) == {INDEX}
    zoo.put("deltas", "one", delta(zoo, b"first"))
    second = delta(zoo, b"second")
    zoo.put("deltas", "one", second, replace=True)
    assert listing(zoo.root) == {INDEX, f".vtzoo/objects/sha256/{second['digest'][:2]}/{second['digest']}"}


def test_put_refuses_taken_names_and_leaves_nothing(zoo: Zoo) -> None:
    """A name exists once in the whole zoo; the refused entry's new object is gone again, the old one is not."""
    kept = delta(zoo, b"old")
    zoo.put("deltas", "x", kept)
    before = listing(zoo.root), (zoo.root / INDEX).read_bytes()
    with pytest.raises(Conflict, match="'x' exists already") as caught:
        zoo.put("deltas", "x", delta(zoo, b"new"))
    assert caught.value.hint == "choose another name, or: vtzoo rm x"
    with pytest.raises(Conflict):
        zoo.put("models", "x", {"files": {"m": zoo.add_object(b"new")}}, replace=True)
    with pytest.raises(Conflict, match="catalogue"):
        zoo.put("deltas", "resnet18.a1_in1k", delta(zoo, b"new"))
    with pytest.raises(UsageError):
        zoo.put("deltas", "../x", delta(zoo, b"new"))
    for name in ("x", "resnet18.a1_in1k"):
        with pytest.raises(Conflict):
            zoo.check_free("deltas", name)
    zoo.check_free("deltas", "y")
    assert (listing(zoo.root), (zoo.root / INDEX).read_bytes()) == before


def test_put_refuses_a_missing_object(zoo: Zoo) -> None:
    """The index never names an object that is not there."""
    with pytest.raises(NotFound, match="object aaaaaaaaaaaa"):
        zoo.put("deltas", "x", {"digest": A})
    assert zoo.index()["deltas"] == {}


def test_put_refuses_facts_that_are_no_plain_values(zoo: Zoo) -> None:
    """What JSON and YAML can't hold is refused before anything is written."""
    before = (zoo.root / INDEX).read_bytes()
    for value in (Path("x"), b"x", {1, 2}, "\ud800", object()):
        with pytest.raises(UsageError, match="no plain JSON value"):
            zoo.put("deltas", "x", {"digest": zoo.add_object(b"x"), "extra": value})
    deep: list = []
    for _ in range(20):
        deep = [deep]
    with pytest.raises(UsageError, match="levels deep"):
        zoo.put("deltas", "x", {"digest": zoo.add_object(b"x"), "extra": deep})
    assert (zoo.root / INDEX).read_bytes() == before
    assert listing(zoo.root) == {INDEX}


def test_own_entries_hide_the_catalogue_s_and_removing_shows_them_again(zoo: Zoo) -> None:
    """A backbone added under a catalogue's name is used instead of it; the catalogue itself can't be changed."""
    builtin = zoo.resolve("resnet18.a1_in1k")
    assert builtin.builtin
    own = zoo.put(
        "backbones", "resnet18.a1_in1k", {"arch": "resnet18", "source": f"object:sha256:{zoo.add_object(b'w')}"}
    )
    assert zoo.resolve("resnet18.a1_in1k") == own
    zoo.remove(own)
    assert zoo.resolve("resnet18.a1_in1k") == builtin
    for refused in (lambda: zoo.remove(builtin), lambda: zoo.rename(builtin, "mine")):
        with pytest.raises(UsageError, match="built-in catalogue"):
            refused()


def test_handed_out_facts_are_copies(zoo: Zoo) -> None:
    """Changing what was read changes nothing for the next reader."""
    zoo.resolve("resnet18.a1_in1k").facts["mean"].append("x")
    assert "x" not in zoo.resolve("resnet18.a1_in1k").facts["mean"]


def test_stale_entries_are_noticed(zoo: Zoo) -> None:
    """An entry that someone replaced or removed since it was read is not removed or renamed blindly."""
    entry = zoo.put("deltas", "x", delta(zoo, b"1"))
    zoo.put("deltas", "y", delta(zoo, b"2"))
    with pytest.raises(Conflict):
        zoo.rename(entry, "y")
    with pytest.raises(UsageError):
        zoo.rename(entry, "../y")
    zoo.put("deltas", "x", delta(zoo, b"3"), replace=True)
    with pytest.raises(Conflict, match="changed by someone else"):
        zoo.remove(entry)
    zoo.remove(zoo.resolve("x"))
    with pytest.raises(NotFound, match="is gone"):
        zoo.rename(entry, "z")


def test_metrics_that_are_no_numbers_do_not_block_removal(zoo: Zoo) -> None:
    """NaN in the metrics survives the index and still equals itself."""
    zoo.put("deltas", "x", delta(zoo, metrics={"t": {"ece": float("nan"), "loss": float("inf")}}))
    zoo.remove(zoo.resolve("x"))
    assert zoo.index()["deltas"] == {}


# ------------------------------------------------------------------------------------------- at once, and in trouble
MANY = """
import sys
from vtzoo.zoo import Zoo
zoo = Zoo(sys.argv[1])
for i in range(12):
    name = f"{sys.argv[2]}/{i}"
    entry = zoo.put("deltas", name, {"digest": zoo.add_object(name.encode())})
    if i % 3 == 0:
        zoo.rename(entry, f"{name}-moved")
    zoo.put("deltas", "shared", {"digest": zoo.add_object(b"shared")}, replace=True)
"""


def test_two_processes_lose_no_update(zoo: Zoo) -> None:
    """Two processes writing one zoo at once end with every entry of both and every object in place."""
    running = [subprocess.Popen([sys.executable, "-c", MANY, str(zoo.root), who]) for who in ("a", "b")]
    assert [p.wait(60) for p in running] == [0, 0]
    found = zoo.index()["deltas"]
    assert set(found) == {f"{w}/{i}{'-moved' * (i % 3 == 0)}" for w in "ab" for i in range(12)} | {"shared"}
    for facts in found.values():
        assert files.sha256(zoo.object(facts["digest"])) == facts["digest"]
    assert not [name for name in listing(zoo.root) if name.endswith(".tmp")]


def test_threads_lose_no_update(zoo: Zoo) -> None:
    """One Zoo shared by threads keeps every entry too."""
    facts = [delta(zoo, f"{i}".encode()) for i in range(8)]
    threads = [threading.Thread(target=zoo.put, args=("deltas", f"t{i}", facts[i])) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(zoo.index()["deltas"]) == 8


def test_a_writer_without_lock_is_not_overwritten(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where locks do nothing, an index changed between reading and replacing is read again: no update is lost."""
    facts, other = delta(zoo, b"mine"), Zoo(zoo.root)
    monkeypatch.setattr(SoftFileLock, "acquire", lambda self, **_: None)
    monkeypatch.setattr(SoftFileLock, "release", lambda self: None)
    original, theirs = Zoo._put, [delta(other, b"theirs")]

    def meanwhile(self: Zoo, sections: dict, entry: Entry, *, replace: bool) -> object:
        result = original(self, sections, entry, replace=replace)
        if theirs and self is zoo:
            other.put("deltas", "theirs", theirs.pop())
        return result

    monkeypatch.setattr(Zoo, "_put", meanwhile)
    zoo.put("deltas", "mine", facts)
    assert set(zoo.index()["deltas"]) == {"mine", "theirs"}


def test_a_held_lock_is_conflict(zoo: Zoo) -> None:
    """A zoo that another program writes refuses after the wait (5); what was stored stays loose until that is done."""
    waiting = Zoo(zoo.root, lock_timeout_s=0.05)
    facts = delta(waiting)
    with (
        SoftFileLock(zoo.root / ".vtzoo" / "writer"),
        pytest.raises(Conflict, match=f"is being written by process {os.getpid()}") as caught,
    ):
        waiting.put("deltas", "x", facts)
    assert caught.value.exit_code == 5
    assert zoo.index()["deltas"] == {}
    waiting.put("deltas", "x", facts)


def test_control_c_in_put_leaves_nothing(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while the index is written leaves the old index and no object."""
    facts, before = delta(zoo), (zoo.root / INDEX).read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        zoo.put("deltas", "x", facts)
    assert (zoo.root / INDEX).read_bytes() == before
    assert listing(zoo.root) == {INDEX}


def test_full_disk_leaves_the_zoo_as_it_was(small_disk: Path) -> None:
    """An object or an index that does not fit is Resources (7); the zoo's files are what they were."""
    zoo = Zoo.init(small_disk / "zoo")
    zoo.put("deltas", "x", delta(zoo))
    before, index = listing(small_disk), (zoo.root / INDEX).read_bytes()
    with pytest.raises(Resources):
        zoo.add_object(random.Random(0).randbytes(300_000))
    with pytest.raises(Resources) as caught:
        zoo.put("deltas", "y", delta(zoo, b"y", note=["n" * 60_000] * 5))
    assert caught.value.exit_code == 7
    assert (listing(small_disk), (zoo.root / INDEX).read_bytes()) == (before, index)


def test_read_only_zoo_is_read_but_not_written(small_disk: Path) -> None:
    """On a read-only disk everything can be listed; each write says that it can't."""
    zoo = Zoo.init(small_disk / "zoo")
    entry = zoo.put("deltas", "x", delta(zoo))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert zoo.resolve("x") == entry
    for write in (lambda: zoo.add_object(b"new"), lambda: zoo.remove(entry), lambda: zoo.rename(entry, "y")):
        with pytest.raises(VtzooError, match="can't write") as caught:
            write()
        assert "choose another place" in caught.value.hint


def test_a_catalogue_is_read_only(tmp_path: Path) -> None:
    """An index marked `catalogue: true` can be listed and is never written."""
    files.atomic_text(tmp_path / INDEX, dump(Index(catalogue=True)))
    zoo = Zoo.find(tmp_path)
    for write in (lambda: zoo.add_object(b"x"), lambda: zoo.put("deltas", "x", {"digest": A})):
        with pytest.raises(UsageError, match="is a catalogue"):
            write()
    with pytest.raises(UsageError):
        zoo.check_free("deltas", "x")
    assert listing(tmp_path) == {INDEX}


def test_a_file_in_the_zoo_s_place_is_refused(tmp_path: Path) -> None:
    """A zoo can't be made inside a file or where the index is a folder."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError):
        Zoo.init(tmp_path / "file")
    (tmp_path / INDEX).mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        Zoo(tmp_path).entries()


def test_links_out_of_a_zoo_are_not_followed(zoo: Zoo, tmp_path: Path) -> None:
    """A zoo from elsewhere whose folders or objects are links is neither read nor written through them."""
    entry = zoo.put("deltas", "x", delta(zoo))
    outside, path = tmp_path / "outside", zoo.object(entry.digest)
    outside.mkdir()
    path.rename(outside / "w")
    path.symlink_to(outside / "w")
    with pytest.raises(Corrupt, match="is a symbolic link"):
        zoo.object(entry.digest)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(Corrupt, match="is no ordinary file"):
        zoo.object(entry.digest)
    path.unlink()
    for name in ("objects", "incoming"):
        inside = zoo.root / ".vtzoo" / name
        inside.rename(tmp_path / name)
        inside.symlink_to(outside)
        with pytest.raises(Corrupt, match="is a symbolic link"):
            zoo.add_object(b"new")
        with pytest.raises(Corrupt if name == "objects" else NotFound):
            zoo.object(entry.digest)
        inside.unlink()
        (tmp_path / name).rename(inside)
    assert {p.name for p in outside.iterdir()} == {"w"}
    zoo.remove(entry)


def test_a_zoo_s_root_may_be_a_link(zoo: Zoo, tmp_path: Path) -> None:
    """Where a zoo lies is its owner's business."""
    (tmp_path / "link").symlink_to(zoo.root)
    linked = Zoo(tmp_path / "link")
    linked.put("deltas", "x", delta(linked))
    assert zoo.object(zoo.resolve("x").digest).is_file()


# ------------------------------------------------------------------------------------------------- the index as text
CORRUPT = {
    "empty": (b"", 1, "empty"),
    "only a comment": (b"# nothing\n", 1, "empty"),
    "not YAML": (b"schema: 1\ndeltas: {a\n", 3, "did not find"),
    "tab": (b"schema: 1\ndeltas:\n\ta: 1\n", 3, "cannot start any token"),
    "not UTF-8": (b"schema: 1\n# \xff\n", 2, "not UTF-8"),
    "control character": (b"schema: 1\ndeltas: {}\n# \x01\n", 3, "control characters"),
    "key twice": (b"schema: 1\nmodels: {}\nmodels: {}\n", 3, "'models' stands twice"),
    "entry twice": (b"schema: 1\ndeltas:\n  a: {digest: %b}\n  a: {digest: %b}\n" % (b"a" * 64, b"b" * 64), 4, "twice"),
    "fact twice": (b"schema: 1\ndeltas:\n  a:\n    digest: x\n    digest: y\n", 5, "'digest' stands twice"),
    "a list": (b"- a\n", 1, "a map with schema"),
    "a word": (b"hello\n", 1, "a map with schema"),
    "no schema": (b"deltas: {}\n", 1, "write 'schema: 1'"),
    "strange schema": (b"deltas: {}\nschema: one\n", 2, "the schema is 'one'"),
    "schema yes": (b"schema: yes\n", 1, "the schema is True"),
    "unknown section": (b"schema: 1\ndelta: {}\n", 2, "did you mean deltas"),
    "section no map": (b"schema: 1\ndeltas: [a]\n", 2, "no map of names"),
    "entry no map": (b"schema: 1\ndeltas:\n  a: 5\n", 3, "'a' has no map of facts"),
    "hostile name": (b"schema: 1\ndeltas:\n  ../a: {digest: x}\n", 3, "no legal name"),
    "number as name": (b"schema: 1\ndeltas:\n  12: {digest: x}\n", 3, "the key 12 is no text"),
    "list as name": (b"schema: 1\ndeltas:\n  ? [a]\n  : {digest: x}\n", 3, "is no text"),
    "hostile digest": (b"schema: 1\ndeltas:\n  a: {digest: ../../x}\n", 3, "no sha256"),
    "no digest": (b"schema: 1\ndeltas:\n  a: {tasks: []}\n", 3, "'digest' is missing"),
    "hostile member": (b"schema: 1\nmodels:\n  m:\n    files: {../x: %b}\n" % (b"a" * 64), 3, "no legal file name"),
    "python tag": (b"schema: 1\ndeltas:\n  a: !!python/object/apply:os.system [true]\n", 3, "no anchors and no tags"),
    "standard tag": (b"schema: 1\ndeltas: !!map {}\n", 2, "no anchors and no tags"),
    "anchor": (b"schema: 1\ndeltas: &a {}\n", 2, "no anchors and no tags"),
    "alias": (b"schema: 1\ndeltas: *a\n", 2, "no aliases"),
    "merge key": (b"schema: 1\ndeltas:\n  <<: {a: {}}\n", 3, "must stand in quotes"),
    "second document": (b"schema: 1\n---\nschema: 1\n", 2, "a second document"),
    "endless word": (
        b"schema: 1\n# x\ndeltas:\n  a: {digest: %b}\n" % (b"a" * 70_000),
        4,
        "a word of 70000 characters",
    ),
    "broken number": (b"schema: 1\ndeltas:\n  a: {digest: 0b_}\n", 3, "no number"),
    "endless number": (b"schema: 1\ndeltas:\n  a: {params: " + b"9" * 9999 + b"}\n", 3, "no number"),
    "deep list": (b"schema: 1\ndeltas: " + b"[" * 100_000, 2, "levels deep"),
    "deep map": (b"schema: 1\ndeltas: " + b"{a: " * 100_000, 2, "levels deep"),
    "deep blocks": (b"schema: 1\nmodels:\n" + b"- " * 100_000, 3, "levels deep"),
    "deep keys": (b"schema: 1\nmodels: " + b"{? " * 100_000, 2, "is no text"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_index_names_file_line_and_reason(case: str, zoo: Zoo) -> None:
    """A damaged or hostile index is Corrupt with its line, is never run, and never overwritten."""
    data, line, reason = CORRUPT[case]
    (zoo.root / INDEX).write_bytes(data)
    with pytest.raises(Corrupt) as caught:
        zoo.entries()
    assert f"{zoo.root / INDEX}, line {line}: " in caught.value.message
    assert reason in caught.value.message
    assert "\n" not in caught.value.message + caught.value.hint
    with pytest.raises(Corrupt):
        zoo.put("deltas", "x", {"digest": A})
    assert (zoo.root / INDEX).read_bytes() == data


@pytest.mark.parametrize("case", CORRUPT)
def test_the_plain_python_reader_refuses_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without libyaml each damaged index is Corrupt too, at the same line or the one where the mistake began."""
    monkeypatch.setattr(catalogue, "_Loader", yaml.SafeLoader)
    data, line, _ = CORRUPT[case]
    with pytest.raises(Corrupt) as caught:
        parse(data, Path(INDEX))
    assert caught.value.message.startswith((f"{INDEX}, line {line}: ", f"{INDEX}, line {line - 1}: "))


@pytest.mark.parametrize(
    "data", [b"a" * ((32 << 20) + 9), b"schema: 1\ndeltas: [%b]\n" % (b"[]," * 1_000_001)], ids=["bytes", "values"]
)
def test_an_index_is_read_with_limits(data: bytes, zoo: Zoo) -> None:
    """One of more bytes or values than any real one is refused before it becomes much of anything."""
    (zoo.root / INDEX).write_bytes(data)
    with pytest.raises(Corrupt, match="has more than"):
        zoo.index()


def test_git_conflict_marks_are_explained(zoo: Zoo) -> None:
    """An index with git's marks says that both sides are to be kept."""
    (zoo.root / INDEX).write_text("schema: 1\ndeltas:\n<<<<<<< HEAD\n  a: {}\n=======\n  b: {}\n>>>>>>> x\n")
    with pytest.raises(Corrupt) as caught:
        zoo.entries()
    assert "keep both sides" in caught.value.hint


def test_newer_schema_asks_for_an_upgrade(zoo: Zoo) -> None:
    """An index of a later vtzoo is Mismatch, not damage."""
    (zoo.root / INDEX).write_text("schema: 2\nthings: []\n")
    with pytest.raises(Mismatch) as caught:
        zoo.entries()
    assert "pip install -U vtzoo" in caught.value.hint


def test_hand_written_index_is_read_kindly(zoo: Zoo) -> None:
    """Windows line ends, a byte order mark, unquoted dates and empty sections are fine."""
    text = f"\ufeffschema: 1\r\nbackbones:\r\ndeltas:\r\n  a: {{digest: {A}, created: 2025-01-01}}\r\n"
    (zoo.root / INDEX).write_bytes(text.encode())
    assert zoo.index() == {"backbones": {}, "deltas": {"a": {"digest": A, "created": "2025-01-01"}}, "models": {}}


def test_index_text_is_sorted_one_fact_a_line(zoo: Zoo) -> None:
    """The same content gives the same text in any order of making, one line a fact, without aliases or folding."""
    size = [3, 224, 224]
    facts = {"source": "hf-hub:a/b", "arch": "vit", "input_size": size, "also": size, "good_for": "x " * 200 + "x"}
    index = Index()
    index.sections["backbones"] = {"b": facts, "a": dict(reversed(facts.items())), "1": facts, "yes": facts}
    text = dump(index)
    assert parse(text.encode(), Path(INDEX)) == index
    assert "input_size: [3, 224, 224]\n" in text
    assert text.count("\n") == 4 * 6 + 4
    assert [line for line in text.splitlines() if line.startswith("  ") and line[2] != " "] == [
        "  '1':", "  a:", "  b:", "  'yes':",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the catalogue
def test_catalogue_is_complete() -> None:
    """Some seventy backbones have source, licence, size, preprocessing and use; an embedded one is a resource."""
    found = {e.name: e for e in catalogue.builtin()}
    assert len(found) >= 70
    for entry in found.values():
        card = BackboneCard.of(entry.name, entry.facts)
        hub = "hf-hub:" if card.arch == "clip" else f"hf-hub:timm/{entry.name}"
        assert card.source.startswith((hub, "package:vtzoo.embedded/")), entry.name
        assert (card.arch == "clip") == entry.name.startswith("clip/") == bool(card.model_args.get("text")), entry.name
        assert card.license, entry.name
        assert card.good_for, entry.name
        assert card.params > 1_000_000, entry.name
        assert card.features >= 192, entry.name
        assert len(card.preprocess.input_size) == len(card.preprocess.mean) == len(card.preprocess.std) == 3, entry.name
    assert found["tf_efficientnet_lite0"].facts["mean"] == [0.5, 0.5, 0.5]
    json.dumps([e.facts for e in found.values()])


def test_catalogue_file_is_in_canonical_form() -> None:
    """The shipped file is what writing its content gives, below its comment."""
    path = catalogue.builtin_path()
    assert path is not None
    text = path.read_text(encoding="utf-8")
    index = parse(text.encode(), path)
    assert index.catalogue
    assert text.endswith("\n" + dump(index))


@pytest.mark.slow
def test_catalogue_is_what_the_script_makes() -> None:
    """`zoo_index.yaml` was not edited by hand and fits the installed timm."""
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "make_catalogue.py"), "--check"], check=False)
    assert done.returncode == 0


def test_only_what_is_as_it_was_read_is_replaced(tmp_path: Path) -> None:
    """Replacing an entry as it was read is refused when someone has changed or removed it since; what they made stays."""
    zoo = Zoo.init(tmp_path / "zoo")
    read = zoo.put("deltas", "x", {"digest": zoo.add_object(b"1")})
    theirs = zoo.put("deltas", "x", {"digest": zoo.add_object(b"2")}, replace=True)
    with pytest.raises(Conflict, match="meanwhile"):
        zoo.put("deltas", "x", {"digest": zoo.add_object(b"3")}, replace=read)
    assert zoo.resolve("x").facts == theirs.facts
    zoo.put("deltas", "x", {"digest": zoo.add_object(b"3")}, replace=theirs)
    zoo.remove(zoo.resolve("x"))
    with pytest.raises(NotFound):
        zoo.put("deltas", "x", {"digest": zoo.add_object(b"4")}, replace=theirs)
    assert list(held(zoo.root)) == []


def test_what_would_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text, an index or a number of values beyond what is read is refused before it is written; a long command is left out."""
    zoo = Zoo.init(tmp_path / "zoo")
    monkeypatch.setattr(catalogue, "LIMIT_BYTES", 1_000_000)
    monkeypatch.setattr(catalogue, "_VALUE_LIMIT", 1000)
    digest = zoo.add_object(b"1")
    for facts in (
        {"note": "x" * 70_000},
        {"deep": {"x" * 70_000: 1}},
        {"many": ["x" * 60_000] * 20},
        {"many": [1] * 100_000},
    ):
        with pytest.raises(UsageError):
            zoo.put("deltas", "x", {"digest": digest, **facts})
        digest = zoo.add_object(b"1")
    zoo.command = "x" * 70_000
    zoo.put("deltas", "x", {"digest": digest, "note": "x" * 65_536, "many": [1] * 900})
    monkeypatch.setattr("vtzoo.catalogue.recall", lambda _data: None)
    catalogue._content.cache_clear()
    assert "command" not in zoo.index()["deltas"]["x"]
