"""What keeps a zoo in order: sweeping, looking over, making the index again, counting bytes, and a large index."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vtzoo import remembered
from vtzoo.catalogue import INDEX, Index, dump, parse
from vtzoo.copies import copies
from vtzoo.errors import Conflict, Corrupt, Mismatch, NotFound, UsageError
from vtzoo.files import safetensors_header, sha256
from vtzoo.fsck import look, rebuild
from vtzoo.leftovers import collect, leftovers, shares
from vtzoo.objects import hall, held, place
from vtzoo.zoo import Zoo

HEADER = {
    "schema": 1, "method": "lora[rank=8]", "config": {}, "backbone": {"name": "vit", "fingerprint": f"sha256:{'5' * 64}"},
    "tasks": [{"name": "fashion"}], "metrics": {"test": {"top1": 0.9, "loss": 0.3}},
}  # fmt: skip


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """An empty zoo."""
    return Zoo.init(tmp_path / "zoo")


def made(zoo: Zoo, name: str, **facts: object) -> str:
    """Publish a delta whose file says of itself what the index says; gives its digest."""
    said = {**HEADER, "recipe": {"name": name}}
    data = safetensors_header([("x", "U8", (4,))], {"vtzoo": json.dumps(said)}) + name.encode()[:4].ljust(4)
    digest = zoo.add_object(data)
    own = {"method": "lora[rank=8]", "backbone": "vit", "fingerprint": f"sha256:{'5' * 64}", "tasks": ["fashion"]}
    zoo.put("deltas", name, {"digest": digest, "size_bytes": len(data), "metrics": {"top1": 0.9}, **own, **facts})
    return digest


def aged(path: Path, hours: float) -> Path:
    """Make a file look as if it had been written that long ago."""
    then = time.time() - hours * 3600
    os.utime(path, (then, then))
    return path


def errors(zoo: Zoo) -> dict[str, str]:
    """What is lost, by entry."""
    return {f.what: f.said for f in look(zoo) if f.kind == "error"}


# ------------------------------------------------------------------------------------------------------------ sweeping
def test_gc_takes_old_loose_objects_and_halves_only(zoo: Zoo) -> None:
    """What an entry keeps stays, what is young stays, the rest goes; a dry run takes nothing."""
    kept = made(zoo, "kept")
    old, young = zoo.add_object(b"old"), zoo.add_object(b"young")
    for digest in (kept, old):
        aged(place(zoo.root, digest), 30)
    half = hall(zoo.root) / "0123456789abcdef.tmp"
    half.write_bytes(b"half")
    beside = zoo.root / f".{INDEX}.0123456789abcdef.tmp"
    beside.write_bytes(b"half")
    for path in (half, beside):
        aged(path, 30)
    wanted = {place(zoo.root, old), half, beside}
    assert {f.path for f in collect(zoo, dry_run=True)} == wanted
    assert all(path.exists() for path in wanted)
    assert {f.path for f in collect(zoo)} == wanted
    assert {digest for digest, _ in held(zoo.root)} == {kept, young}
    assert not half.exists()
    assert not beside.exists()
    assert {f.path for f in collect(zoo, grace_s=0)} == {place(zoo.root, young)}
    assert [digest for digest, _ in held(zoo.root)] == [kept]


def test_gc_spares_what_was_stored_again(zoo: Zoo) -> None:
    """Storing content that lies there loose makes it young: whoever did is about to publish it."""
    digest = zoo.add_object(b"w")
    aged(place(zoo.root, digest), 30)
    Zoo(zoo.root).add_object(b"w")
    assert collect(zoo) == []
    assert place(zoo.root, digest).is_file()


def test_gc_without_grace_takes_what_a_wrong_clock_dated(zoo: Zoo) -> None:
    """An object of tomorrow is as young as can be: left with any grace, taken with none."""
    digest = zoo.add_object(b"w")
    aged(place(zoo.root, digest), -30)
    assert collect(zoo, grace_s=1) == []
    assert [f.path.name for f in collect(zoo, grace_s=0)] == [digest]


def test_gc_of_a_damaged_index_takes_nothing(zoo: Zoo) -> None:
    """Where it isn't known what the index keeps, nothing is loose."""
    digest = made(zoo, "x")
    aged(place(zoo.root, digest), 30)
    (zoo.root / INDEX).write_text("deltas: {")
    with pytest.raises(Corrupt):
        collect(zoo, grace_s=0)
    (zoo.root / INDEX).unlink()
    with pytest.raises(Corrupt, match="has lost its"):
        collect(Zoo(zoo.root, create=True), grace_s=0)
    assert place(zoo.root, digest).is_file()


def test_answers_and_runs_go_when_asked(zoo: Zoo) -> None:
    """What can be made again is counted, and swept up only when its kind is named."""
    for name in ("cache/targets/a", "checkpoints/b", "logs/c"):
        path = zoo.root / ".vtzoo" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"1234")
    assert collect(zoo, grace_s=0) == []
    assert {f.kind: f.size_bytes for f in leftovers(zoo, ["answers"])} == {"answers": 4}
    assert {f.path.name for f in collect(zoo, ["answers", "runs"], grace_s=0)} == {"cache", "checkpoints", "logs"}
    assert not (zoo.root / ".vtzoo" / "cache").exists()


def test_shares_count_what_an_entry_alone_keeps(zoo: Zoo) -> None:
    """Two entries with one object share its bytes: neither frees them by going."""
    one = made(zoo, "one")
    size = place(zoo.root, one).stat().st_size
    zoo.put("models", "two", {"files": {"m.safetensors": one, "config.json": zoo.add_object(b"{}")}})
    found = {s.entry.name: (s.size_bytes, s.alone_bytes) for s in shares(zoo)}
    assert found == {"one": (size, 0), "two": (size + 2, 2)}


# -------------------------------------------------------------------------------------------------------- looking over
def test_a_sound_zoo_has_no_findings(zoo: Zoo) -> None:
    """Nothing is said of a zoo in which all is well."""
    made(zoo, "x")
    assert look(zoo) == []


def test_what_is_lost_is_told_by_entry(zoo: Zoo) -> None:
    """A missing, a cut and a foreign object are errors of their entries; a writable one and leftovers are notes."""
    paths = {name: place(zoo.root, made(zoo, name)) for name in ("gone", "cut", "link", "writable")}
    paths["gone"].unlink()
    paths["cut"].chmod(0o644)
    paths["cut"].write_bytes(paths["cut"].read_bytes()[:-1])
    paths["link"].unlink()
    paths["link"].symlink_to("/etc/hostname")
    paths["writable"].chmod(0o644)
    zoo.add_object(b"loose")
    assert set(errors(zoo)) == {"gone", "cut", "link"}
    assert "is missing" in errors(zoo)["gone"]
    assert "are said to be there" in errors(zoo)["cut"]
    assert "no ordinary file" in errors(zoo)["link"]
    assert {f.what for f in look(zoo) if f.kind == "note"} >= {"writable", "loose"}


def test_sizes_are_those_of_all_files_but_the_signature(zoo: Zoo) -> None:
    """A signed delta is whole, and so is a model two of whose files are equal."""
    made(zoo, "signed", signature=f"sha256:{zoo.add_object(b'signature')}")
    equal = zoo.add_object(b"12")
    zoo.put("models", "m", {"files": {"a.json": equal, "b.json": equal}, "size_bytes": 4})
    assert look(zoo) == []


def test_a_delta_without_its_backbone_is_noted(zoo: Zoo) -> None:
    """The weights that a delta stands on are no object of its own; that they are gone is told all the same."""
    weights = zoo.add_object(b"w")
    said = {**HEADER, "backbone": {**HEADER["backbone"], "source": f"object:sha256:{weights}"}}
    data = safetensors_header([], {"vtzoo": json.dumps(said)})
    zoo.put("deltas", "x", {"digest": zoo.add_object(data), "method": "linear", "tasks": ["fashion"]})
    zoo.put("backbones", "b", {"arch": "resnet18", "source": f"object:sha256:{weights}"})
    assert look(zoo) == []
    zoo.remove(zoo.resolve("b", "backbones"), force=True)
    assert [(f.kind, f.what) for f in look(zoo)] == [("note", "x")]
    assert "the backbone that it stands on are not here" in look(zoo)[0].said


def test_no_zoo_is_not_found(tmp_path: Path) -> None:
    """A folder that never was a zoo is NotFound, for looking and for rebuilding."""
    for verb in (look, rebuild):
        with pytest.raises(NotFound):
            verb(Zoo(tmp_path))


# ---------------------------------------------------------------------------------------------------- the index, again
@pytest.mark.parametrize("harm", ["deleted", "cut", "emptied"])
def test_a_lost_index_comes_back_from_its_copy(zoo: Zoo, harm: str) -> None:
    """Names, dates, commands, models and backbones: all that the last index said is there again, the damaged one is put aside."""
    made(zoo, "a")
    zoo.put("models", "m", {"files": {"config.json": zoo.add_object(b"{}")}})
    zoo.put("backbones", "b", {"arch": "resnet18", "source": f"object:sha256:{zoo.add_object(b'w')}"})
    before, path = zoo.index(), zoo.root / INDEX
    data = path.read_bytes()
    if harm == "deleted":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2 - 3] if harm == "cut" else b"")
    with pytest.raises(Corrupt):
        zoo.index()
    with pytest.raises(Corrupt):
        Zoo.init(zoo.root, exist_ok=harm != "deleted").index()
    assert [f.what for f in look(zoo)] == ["index"]
    told = rebuild(zoo)
    assert zoo.index() == before
    assert look(zoo) == []
    assert (told.aside is not None) == (harm != "deleted")
    assert told.aside is None or told.aside.read_bytes() == data[: len(data) // 2 - 3] * (harm == "cut")


def test_without_copies_deltas_say_what_they_are(zoo: Zoo) -> None:
    """With the index and its copies gone, deltas are entries again, under names of their tasks; the rest stays loose."""
    digest, before = made(zoo, "fashion/lora"), zoo.index()["deltas"]["fashion/lora"]
    zoo.put("models", "m", {"files": {"config.json": zoo.add_object(b"{}")}})
    for path in [zoo.root / INDEX, *copies(zoo.root)]:
        path.unlink()
    told = rebuild(zoo)
    name = f"recovered/fashion-{digest[:12]}"
    assert told.found == {name: "header"}
    assert zoo.index()["deltas"] == {name: {k: v for k, v in before.items() if k != "created"}}
    assert [f.what for f in look(zoo)] == ["loose"]


def test_rebuilding_leaves_out_what_is_lost(zoo: Zoo) -> None:
    """An entry whose object is gone is not listed again, and is named."""
    gone = made(zoo, "gone")
    made(zoo, "there")
    place(zoo.root, gone).unlink()
    told = rebuild(zoo)
    assert (told.kept, told.lost) == (1, ["gone"])
    assert set(zoo.index()["deltas"]) == {"there"}


def test_facts_that_a_merge_lost_come_back_from_the_file(zoo: Zoo) -> None:
    """A delta of which the index says too little is told as a note, and mended; what the index does say stays."""
    made(zoo, "x")
    before = zoo.index()
    kept = {k: v for k, v in before["deltas"]["x"].items() if k not in ("method", "tasks")}
    zoo.put("deltas", "x", {**kept, "metrics": {"top1": 0.5}}, replace=True)
    assert [(f.kind, f.said) for f in look(zoo)] == [
        ("note", "the index lacks its method and tasks, its file has that")
    ]
    rebuild(zoo)
    assert zoo.index()["deltas"]["x"] == {**before["deltas"]["x"], "metrics": {"top1": 0.5}}
    assert look(zoo) == []


def test_rebuilding_a_sound_zoo_changes_nothing(zoo: Zoo) -> None:
    """The same entries, the same text."""
    made(zoo, "x")
    before = (zoo.root / INDEX).read_bytes()
    rebuild(zoo)
    assert (zoo.root / INDEX).read_bytes() == before


def test_what_is_added_while_the_index_is_made_again_is_in_it(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that adds an entry meanwhile waits for its turn."""
    from vtzoo import fsck

    made(zoo, "x")
    other = Zoo(zoo.root, lock_timeout_s=0.1)
    digest, listed = other.add_object(b"y"), fsck._listed

    def adding(where: Zoo) -> object:
        found = listed(where)
        with pytest.raises(Conflict, match="is being written by"):
            other.put("deltas", "y", {"digest": digest})
        return found

    monkeypatch.setattr(fsck, "_listed", adding)
    assert rebuild(zoo).kept == 1


@pytest.mark.parametrize("whose", ["newer", "catalogue", "link"])
def test_what_is_not_ours_to_make_again_stays(zoo: Zoo, tmp_path: Path, whose: str) -> None:
    """An index of a newer vtzoo, a catalogue and a link to a file elsewhere are refused, and are as they were."""
    made(zoo, "x")
    path = zoo.root / INDEX
    if whose == "newer":
        path.write_text(path.read_text().replace("schema: 1", "schema: 99"))
    elif whose == "catalogue":
        path.write_text(f"catalogue: true\n{path.read_text()}")
    else:
        path.rename(tmp_path / "mine")
        path.symlink_to(tmp_path / "mine")
    before = path.read_bytes()
    with pytest.raises((Mismatch, UsageError)):
        rebuild(zoo)
    assert path.read_bytes() == before
    assert [p.name for p in zoo.root.glob(f"{INDEX}*")] == [INDEX]


def test_what_is_put_aside_does_not_go_through_a_link(zoo: Zoo, tmp_path: Path) -> None:
    """The name is known before: in a stranger's zoo it may be a link already."""
    made(zoo, "x")
    mine, path = tmp_path / "mine", zoo.root / INDEX
    mine.write_text("mine")
    path.write_text("ssh-rsa: a stranger's key")
    aside = path.with_name(f"{INDEX}.old-{sha256(path)[:8]}")
    aside.symlink_to(mine)
    assert rebuild(zoo).aside == aside
    assert mine.read_text() == "mine"
    assert aside.read_text() == "ssh-rsa: a stranger's key"


def test_an_index_changed_by_hand_is_copied_before_it_is_changed_again(zoo: Zoo) -> None:
    """What a person wrote into the index is in its copies, too."""
    made(zoo, "x")
    path = zoo.root / INDEX
    path.write_text(path.read_text().replace("top1: 0.9", "top1: 0.8"))
    made(zoo, "y")
    assert "top1: 0.8" in copies(zoo.root)[1].read_text()


def test_copies_are_not_written_through_links(zoo: Zoo, tmp_path: Path) -> None:
    """A stranger's zoo whose copies are links to files elsewhere leaves those as they are."""
    made(zoo, "x")
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for path in (zoo.root / ".vtzoo" / "index" / f"{name}.yaml" for name in ("latest", "previous")):
        path.unlink()
        path.symlink_to(mine)
    assert copies(zoo.root) == []
    made(zoo, "y")
    made(zoo, "z")
    assert mine.read_text() == "mine"
    assert len(copies(zoo.root)) == 2


# ------------------------------------------------------------------------------------------------------- large indexes
def large(count: int) -> Index:
    """An index with that many deltas, some with facts of every form."""
    odd = {
        "text": "two\nlines: # and more",
        "flat": {"a": 1},
        "deep": {"a": {"b": [1, "x", None]}},
        "nan": float("nan"),
    }
    index = Index()
    for i in range(count):
        index.sections["deltas"][f"t{i:05d}/lora"] = {
            "digest": f"{i:064x}",
            "tasks": [f"t{i}"],
            **(odd if i % 7 == 0 else {}),
        }
    return index


def test_adding_to_a_large_index_gives_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying the lines of entries that stay gives what writing everything gives: after adding, changing, removing."""
    index = large(500)
    text = dump(index)
    assert len(text) > remembered.LARGE_BYTES
    index.sections["deltas"]["t00007/lora"]["tasks"] = ["other"]
    index.sections["deltas"]["0"] = {"digest": "a" * 64}
    index.sections["deltas"][f"{'a' * 90}/{'b' * 90}"] = {"digest": "a" * 64}  # written as "? name"
    index.sections["models"]["null"] = {"files": {"config.json": "b" * 64}}
    del index.sections["deltas"]["t00100/lora"]
    spliced = dump(index, text.encode())
    monkeypatch.setattr("vtzoo.catalogue.recall", lambda _data: None)
    assert spliced == dump(index)
    monkeypatch.undo()
    assert dump(index, spliced.encode()) == spliced
    assert parse(spliced.encode(), Path("x")).sections.keys() == index.sections.keys()


def test_only_what_was_written_here_is_copied(tmp_path: Path) -> None:
    """An index that a person changed is written anew from its content, comments and odd forms and all."""
    index = large(300)
    by_hand = "# a comment\n" + dump(index).replace("tasks: [t1]", "tasks: ['t1']")
    seen = parse(by_hand.encode(), tmp_path / INDEX)
    assert dump(seen, by_hand.encode()) == dump(index)


def test_a_damaged_memory_is_no_memory(tmp_path: Path) -> None:
    """A remembered file that was cut or changed is read as if it weren't there."""
    data = dump(large(300)).encode()
    before = parse(data, tmp_path / "a").sections
    path = remembered._place(data)
    text = path.read_bytes()
    for harm in (text[:-5], text.replace(b"t00001", b"t99999"), b"", b"\xff"):
        path.chmod(0o600)
        path.write_bytes(harm)
        assert json.dumps(parse(data, tmp_path / repr(len(harm))).sections) == json.dumps(before)


@pytest.mark.skipif(os.name == "nt", reason="files have no numbered owners there")
def test_only_ones_own_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another user wrote is not believed, and what was remembered of one index not of another."""
    one, other = (dump(large(count)).encode() for count in (300, 301))
    assert remembered.recall(one) != remembered.recall(other)
    remembered._place(other).write_bytes(remembered._place(one).read_bytes())
    assert remembered.recall(other) is None
    assert remembered.recall(one) is not None
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert remembered.recall(one) is None


def test_memory_keeps_the_last_few(tmp_path: Path) -> None:
    """The folder doesn't grow with every change."""
    for i in range(12):
        remembered.remember(b"x" * remembered.LARGE_BYTES + str(i).encode(), "{}")
    assert len(list(remembered._folder().iterdir())) <= 8


# -------------------------------------------------------------------------------------------------------- many at once
ADDING = """
import fcntl, sys
fcntl.flock = fcntl.lockf = lambda *_: None
from vtzoo.zoo import Zoo
zoo = Zoo(sys.argv[1], lock_timeout_s=120)
for i in range(int(sys.argv[3])):
    name = f"{sys.argv[2]}/{i}"
    zoo.put("deltas", name, {"digest": zoo.add_object(name.encode())})
"""


def test_eight_processes_lose_nothing_where_flock_lies(zoo: Zoo) -> None:
    """Eight processes add fifty entries each while `flock` says yes to everyone: four hundred entries, each with its object."""
    running = [subprocess.Popen([sys.executable, "-c", ADDING, str(zoo.root), f"p{n}", "50"]) for n in range(8)]
    assert [process.wait(120) for process in running] == [0] * 8
    found = zoo.index()["deltas"]
    assert len(found) == 400
    assert all(sha256(zoo.object(facts["digest"])) == facts["digest"] for facts in found.values())
    assert {digest for digest, _ in held(zoo.root)} == {facts["digest"] for facts in found.values()}


HOLDING = """
import os, signal, sys
from vtzoo.zoo import Zoo
zoo = Zoo(sys.argv[1])
with zoo._locked():
    print("held", flush=True)
    signal.pause()
"""


def test_a_mark_that_says_nothing_is_taken_over(zoo: Zoo) -> None:
    """Its maker died between making and writing it: after two seconds nobody waits for it any longer."""
    (zoo.root / ".vtzoo" / "writer").touch()
    start = time.monotonic()
    made(zoo, "x")
    assert 1 < time.monotonic() - start < 10
    assert not (zoo.root / ".vtzoo" / "writer").exists()


def test_a_killed_writer_leaves_no_lock(zoo: Zoo) -> None:
    """The mark of a writer that was killed is taken over at once; that of one who lives is waited for."""
    with subprocess.Popen([sys.executable, "-c", HOLDING, str(zoo.root)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(Conflict, match=f"is being written by process {holder.pid}"):
            Zoo(zoo.root, lock_timeout_s=0.2).put("deltas", "x", {"digest": zoo.add_object(b"x")})
        holder.kill()
    start = time.monotonic()
    made(zoo, "y")
    assert time.monotonic() - start < 5
