"""init, ls, show, mv and rm, on a real zoo."""

import json
from pathlib import Path

import pytest

from vtzoo.errors import NotFound
from vtzoo.files import safetensors_header
from vtzoo.zoo import Zoo
from vtzoo_cli._entries import top1


def test_init_makes_a_zoo(vtzoo, tmp_path: Path) -> None:
    """`init` makes the folder and its index; a second time is a conflict."""
    ran = vtzoo("init", "new", "--json")
    assert json.loads(ran.out) == {"path": str(tmp_path / "new")}
    assert (tmp_path / "new" / "zoo_index.yaml").is_file()
    assert vtzoo("init", "new").code == 5


def test_init_here(vtzoo, tmp_path: Path) -> None:
    """Without a folder the present one becomes a zoo."""
    assert vtzoo("init").code == 0
    assert (tmp_path / "zoo_index.yaml").is_file()


def test_ls_json(vtzoo, zoo: Zoo) -> None:
    """With `--json`, ls prints one list of objects with name, section and facts."""
    found = json.loads(vtzoo("ls", "--json", "--zoo", zoo.root).out)
    by_name = {e["name"]: e for e in found}
    assert by_name["pets/lora"]["section"] == "deltas"
    assert by_name["pets/lora"]["metrics"]["test"]["top1"] == 0.75
    assert by_name["tf_efficientnet_lite0"]["section"] == "backbones"


def test_ls_shows_what_matters(vtzoo, zoo: Zoo) -> None:
    """A delta's line has method, backbone, task, size and accuracy; a backbone's parameters and licence."""
    ran = vtzoo("ls", "--zoo", zoo.root)
    line = next(x for x in ran.out.splitlines() if x.startswith("pets/lora"))
    assert line.split() == ["pets/lora", "lora[rank=2]", "tf_efficientnet_lite0", "pets", "2.0", "kB", "75.0%"]
    line = next(x for x in ran.out.splitlines() if x.startswith("pets/folded"))
    assert line.split() == ["pets/folded", "folded", "test_vit", "pets", "3.5", "MB"]
    line = next(x for x in ran.out.splitlines() if x.startswith("tf_efficientnet_lite0"))
    assert line.split()[1:5] == ["3.4", "M", "224x224", "apache-2.0"]


def test_ls_of_one_section(vtzoo, zoo: Zoo) -> None:
    """`ls models` lists the models alone, and an empty section says what to do next."""
    assert [e["name"] for e in json.loads(vtzoo("ls", "models", "--json", "--zoo", zoo.root).out)] == ["pets/folded"]
    vtzoo("init", "empty")
    assert "vtzoo train --help" in vtzoo("ls", "deltas", "--zoo", "empty").out


def test_show_reads_the_file(vtzoo, zoo: Zoo) -> None:
    """`show` has the index's facts, the delta's own header and its tensors."""
    found = json.loads(vtzoo("show", "pets/lora", "--json", "--zoo", zoo.root).out)
    assert found["header"]["tasks"][0]["classes"] == ["cat", "dog"]
    assert found["tensors"] == {"a.lora.A": {"dtype": "F32", "shape": [2, 3]}}
    assert Path(found["path"]).is_file()
    text = vtzoo("show", "pets/l", "--zoo", zoo.root).out
    assert "cat, dog" in text
    assert "lora[rank=2]" in text


def test_show_a_file_outside_a_zoo(vtzoo, zoo: Zoo, tmp_path: Path) -> None:
    """A path is shown without any zoo; a damaged one is corrupt (4)."""
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes(zoo.object(zoo.resolve("pets/lora").digest).read_bytes())
    assert json.loads(vtzoo("show", "mine.safetensors", "--json").out)["header"]["method"] == "lora[rank=2]"
    copy.write_bytes(copy.read_bytes()[:-1])
    ran = vtzoo("show", "./mine.safetensors")
    assert (ran.code, ran.out, len(ran.lines)) == (4, "", 2)


def test_show_a_file_in_the_folder_above(vtzoo, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`../x` is a path whatever it ends in; when nothing is there, that is said of the file."""
    (tmp_path / "mine").write_bytes(zoo.object(zoo.resolve("pets/lora").digest).read_bytes())
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert json.loads(vtzoo("show", "../mine", "--json").out)["header"]["method"] == "lora[rank=2]"
    assert "'../none' does not exist" in vtzoo("show", "../none").err


def test_a_backbone_that_deltas_need_stays(vtzoo, zoo: Zoo) -> None:
    """Removing the weights that deltas stand on is a conflict that names them, unless forced."""
    weights = zoo.add_object(safetensors_header([("w", "F32", (2,))], {}) + bytes(8))
    header = json.dumps({"schema": 1, "backbone": {"source": f"object:sha256:{weights}"}})
    made = zoo.add_object(safetensors_header([("a", "F32", (1,))], {"vtzoo": header}) + bytes(4))
    zoo.put("backbones", "mine", {"arch": "test_vit", "source": f"object:sha256:{weights}"})
    zoo.put("deltas", "cars/lora", {"digest": made})
    ran = vtzoo("rm", "mine", "--zoo", zoo.root)
    assert (ran.code, ran.out) == (5, "")
    assert ran.lines == ["error: 'mine' holds the weights of cars/lora", "hint: vtzoo rm mine --force"]
    zoo.put("backbones", "twin", {"arch": "test_vit", "source": f"object:sha256:{weights}"})
    assert vtzoo("rm", "twin", "--zoo", zoo.root).code == 0
    assert zoo.object(weights).is_file()
    assert vtzoo("rm", "mine", "--force", "--zoo", zoo.root).code == 0
    with pytest.raises(NotFound):
        zoo.object(weights)


def test_rm_takes_a_name_in_full(vtzoo, zoo: Zoo) -> None:
    """What is removed once is not there the second time: an entry whose name goes on otherwise stays."""
    zoo.put("deltas", "pets/lora-2", {"digest": zoo.add_object(b"2")})
    zoo.remove(zoo.resolve("pets/lora"))
    ran = vtzoo("rm", "pets/lora", "--zoo", zoo.root)
    assert ran.code == 3
    assert "vtzoo rm pets/lora-2" in ran.err
    pinned = zoo.resolve("pets/lora-2").pinned
    assert vtzoo("rm", pinned, "--zoo", zoo.root).code == 0


def test_mv_task_wants_two_names(vtzoo, zoo: Zoo) -> None:
    """`--task` without OLD=NEW is usage (2), and nothing is moved."""
    for words in ("pets", "pets=", "=dogs"):
        assert vtzoo("mv", "pets/lora", "pets/new", "--task", words, "--zoo", zoo.root).code == 2
    assert zoo.resolve("pets/lora").name == "pets/lora"


def test_mv_and_rm(vtzoo, zoo: Zoo) -> None:
    """An entry gets another name, and goes, with its object."""
    digest = zoo.resolve("pets/lora").digest
    assert json.loads(vtzoo("mv", "pets/lora", "pets/first", "--json", "--zoo", zoo.root).out) == {
        "ref": "pets/first", "was": "pets/lora", "section": "deltas",
    }  # fmt: skip
    assert vtzoo("mv", "pets/first", "pets/folded", "--zoo", zoo.root).code == 5
    assert vtzoo("mv", "pets/first", "Pets", "--zoo", zoo.root).code == 2
    assert vtzoo("rm", "pets/first", "--zoo", zoo.root).out == "removed pets/first from deltas\n"
    assert not (zoo.root / ".vtzoo" / "objects" / "sha256" / digest[:2] / digest).exists()


def test_the_catalogue_stays(vtzoo, zoo: Zoo) -> None:
    """An entry of the built-in catalogue can't be removed: usage (2)."""
    ran = vtzoo("rm", "tf_efficientnet_lite0", "--zoo", zoo.root)
    assert (ran.code, ran.out) == (2, "")


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [({}, ""), (None, ""), ({"top1": 0.5}, "50.0%"), ({"val": {"top1": 0.5}, "test": {"top1": 0.25}}, "25.0%"),
     ({"a": {"top1": 0.5}, "b": {"top1": 1.0}}, "75.0%"), ({"loss": 3.0}, "")],
)  # fmt: skip
def test_the_accuracy_in_a_list(metrics: dict[str, object] | None, shown: str) -> None:
    """The test split's accuracy, else validation's, else the mean over tasks, else nothing."""
    assert top1(metrics) == shown
