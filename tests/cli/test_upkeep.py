"""gc, fsck and du, on a real zoo."""

import json
import os
import time
from pathlib import Path

import pytest

from vtzoo.catalogue import INDEX
from vtzoo.files import safetensors_header
from vtzoo.objects import place
from vtzoo.zoo import Zoo


@pytest.fixture
def sound(tmp_path: Path) -> Zoo:
    """A zoo with one delta of which all that is said is so."""
    said = {"schema": 1, "method": "linear", "backbone": {"name": "b", "fingerprint": "f"}, "tasks": [{"name": "pets"}]}
    data = safetensors_header([("x", "U8", (4,))], {"vtzoo": json.dumps(said)}) + b"1234"
    zoo = Zoo.init(tmp_path / "sound")
    zoo.put("deltas", "pets/lora", {"digest": zoo.add_object(data), "size_bytes": len(data), "tasks": ["pets"]})
    return zoo


def loose(zoo: Zoo, hours: float = 48) -> str:
    """An object that nobody refers to, stored that long ago."""
    digest = zoo.add_object(b"loose")
    then = time.time() - hours * 3600
    os.utime(place(zoo.root, digest), (then, then))
    return digest


def test_gc_tells_first_and_sweeps_then(vtzoo, zoo: Zoo) -> None:
    """A dry run names what would go; the run takes it; a second one finds nothing."""
    digest = loose(zoo)
    told = json.loads(vtzoo("gc", "--dry-run", "--json", "--zoo", zoo.root).out)
    path = str(place(zoo.root, digest).relative_to(zoo.root))
    assert [(f["kind"], f["path"], f["size_bytes"]) for f in told["removed"]] == [("loose", path, 5)]
    assert place(zoo.root, digest).is_file()
    assert "freed 5 B in 1 places" in vtzoo("gc", "--zoo", zoo.root).out
    assert not place(zoo.root, digest).exists()
    assert vtzoo("gc", "--zoo", zoo.root).out.strip() == "nothing to sweep up"


def test_gc_leaves_what_is_younger_than_its_grace(vtzoo, zoo: Zoo) -> None:
    """The time of grace is a number with a unit; anything else is a usage error in two lines."""
    digest = loose(zoo, hours=3)
    assert vtzoo("gc", "--zoo", zoo.root).code == 0
    assert place(zoo.root, digest).is_file()
    ran = vtzoo("gc", "--zoo", zoo.root, "--grace", "soon")
    assert ran.code == 2
    assert ran.err.splitlines() == [
        "error: 'soon' is no time",
        "hint: write a number and s, m, h or d, as in --grace 1h",
    ]
    assert vtzoo("gc", "--zoo", zoo.root, "--grace", "2.5h").code == 0
    assert not place(zoo.root, digest).exists()


def test_du_counts_entries_and_the_rest(vtzoo, zoo: Zoo) -> None:
    """Each entry's bytes, and the bytes that no entry keeps by kind."""
    loose(zoo)
    found = json.loads(vtzoo("du", "--json", "--zoo", zoo.root).out)
    sizes = {e["name"]: e["size_bytes"] for e in found["entries"]}
    assert sizes["pets/lora"] == zoo.object(zoo.resolve("pets/lora").digest).stat().st_size
    assert found["others"]["loose"] == 5
    assert "objects of no entry (vtzoo gc)" in vtzoo("du", "--zoo", zoo.root).out


def test_fsck_finds_and_rebuilds(vtzoo, sound: Zoo) -> None:
    """A damaged index is told of with what to type (4); that makes it again, with the old one put aside."""
    assert vtzoo("fsck", "--zoo", sound.root).code == 0
    before = sound.index()
    (sound.root / INDEX).write_bytes((sound.root / INDEX).read_bytes()[:-40] + b"{")
    ran = vtzoo("fsck", "--zoo", sound.root)
    assert ran.code == 4
    assert "vtzoo fsck --rebuild" in ran.out
    ran = vtzoo("fsck", "--rebuild", "--zoo", sound.root)
    assert ran.code == 0
    assert sound.index() == before
    assert len(list(sound.root.glob(f"{INDEX}.*"))) == 1


def test_fsck_names_the_entry_that_lost_its_file(vtzoo, sound: Zoo) -> None:
    """An entry without its object is an error of that entry, and costs exit code 4."""
    sound.object(sound.resolve("pets/lora").digest).unlink()
    ran = vtzoo("fsck", "--zoo", sound.root, "--json")
    assert ran.code == 4
    assert [(f["kind"], f["what"]) for f in json.loads(ran.out)] == [("error", "pets/lora")]


def test_a_lost_index_is_told_with_what_to_type(vtzoo, zoo: Zoo) -> None:
    """Where the index was deleted every verb says so, and how to have it again."""
    (zoo.root / INDEX).unlink()
    ran = vtzoo("ls", "--zoo", zoo.root)
    assert ran.code == 4
    assert ran.err.splitlines()[1] == "hint: vtzoo fsck --rebuild"
    assert vtzoo("fsck", "--zoo", zoo.root, "--rebuild").code == 0
    assert vtzoo("ls", "--zoo", zoo.root).code == 0
