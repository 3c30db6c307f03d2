"""delta.py: the artifact and its file."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import families
from vtzoo import files
from vtzoo.delta import Delta, Part, renamed, stored
from vtzoo.errors import Corrupt, Mismatch, NotFound, UsageError
from vtzoo.folding import fold
from vtzoo.headers import read_header
from vtzoo.identity import RESIZED
from vtzoo.live import extract, inject
from vtzoo.objects import hall
from vtzoo.spec import BackboneCard, Preprocess, Task
from vtzoo.tensors import write
from vtzoo.zoo import Zoo

TASKS = (Task(name="b", classes=("x", "y", "z", "v", "w")),)
CARD = BackboneCard(
    name="tiny", arch="vit_tiny", fingerprint="sha256:" + "0" * 64, head=("head",), model_args={"depth": 2}
)


@pytest.fixture
def delta() -> Delta:
    """A small stack with a head, a resized base tensor and facts."""
    model = inject(families.build("vit"), "lora[rank=2,targets=qkv]+bitfit")
    model.__dict__[RESIZED] = {"pos_embed"}
    return extract(model, tasks=TASKS, backbone=CARD, metrics={"top1": 0.5}, lineage={"verb": "train", "seed": 3})


def test_everything_comes_back(delta: Delta, tmp_path: Path) -> None:
    """Method, parts, backbone, tasks, metrics and lineage survive the file."""
    delta.save(tmp_path / "d.safetensors")
    opened = Delta.open(tmp_path / "d.safetensors")
    for field in ("method", "parts", "backbone", "tasks", "metrics", "recipe", "lineage"):
        assert getattr(opened, field) == getattr(delta, field), field


def test_names_say_what_a_tensor_is(delta: Delta) -> None:
    """Grafts by site, heads under @head/<task>/, resized base tensors under @base/."""
    assert "blocks.0.attn.qkv.lora.A" in delta.tensors
    assert sorted(delta.head("b")) == ["head.bias", "head.weight"]
    assert list(delta.overrides) == ["pos_embed"]
    assert delta.size == sum(t.numel() for n, t in delta.tensors.items() if "lora" in n or "bitfit" in n)


def test_tasks_whose_names_are_paths_of_each_other_keep_their_heads() -> None:
    """`pets` and `pets/dogs` in one delta: each has its own head, before and after one is renamed."""
    model = inject(families.build("vit"), "bitfit")
    outer = extract(model, task="pets")
    inner = {f"@head/pets/dogs/{n}": t + 1 for n, t in outer.head("pets").items()}
    both = outer.with_(
        tensors={**outer.tensors, **inner}, tasks=(*outer.tasks, replace(outer.tasks[0], name="pets/dogs"))
    )
    for delta, name in ((both, "pets"), (renamed(both, "pets", "cats"), "cats")):
        assert sorted(delta.head(name)) == sorted(delta.head("pets/dogs")) == ["head.bias", "head.weight"]
        assert torch.equal(delta.head(name)["head.bias"] + 1, delta.head("pets/dogs")["head.bias"])
        assert fold(families.build("vit").state_dict(), delta, task=name)["head.bias"].shape == (5,)


def test_a_label_stands_once() -> None:
    """Of two outputs with one label no image could be of the second."""
    with pytest.raises(UsageError, match="'x' stands 2 times"):
        extract(inject(families.build("vit"), "bitfit"), classes=["x", "y", "x", "z", "v"])


def test_header_is_read_without_torch(delta: Delta, tmp_path: Path) -> None:
    """The document is plain JSON in the file's metadata, with the keys that DESIGN names."""
    delta.save(tmp_path / "d.safetensors")
    doc = json.loads(files.header(tmp_path / "d.safetensors").metadata["vtzoo"])
    assert set(doc) >= {"schema", "method", "config", "backbone", "tasks", "metrics", "lineage"}
    assert doc["backbone"]["fingerprint"] == CARD.fingerprint
    assert doc["tasks"][0]["classes"] == list("xyzvw")
    assert doc == delta.header()


def test_date_is_not_in_the_file(delta: Delta, tmp_path: Path) -> None:
    """Saved twice, the same delta has the same digest."""
    assert delta.save(tmp_path / "a") == delta.save(tmp_path / "b") == files.sha256(tmp_path / "a")


def test_task_is_chosen_by_name(delta: Delta) -> None:
    """The only one needs no name; an unknown one is not found, with a suggestion; of several one must be named."""
    assert delta.task().name == "b"
    with pytest.raises(NotFound, match="no task 'c'"):
        delta.task("c")
    two = delta.with_(tasks=(*TASKS, Task(name="a", classes=("p", "q"))))
    with pytest.raises(NotFound, match="2 tasks: b, a"):
        two.task()
    assert two.task("a").classes == ("p", "q")


def test_other_files_are_refused(delta: Delta, tmp_path: Path) -> None:
    """Plain safetensors, no schema: Corrupt with a reason; a newer schema: Mismatch, by name; no file: NotFound."""
    write(tmp_path / "plain", {"a": torch.ones(1)}, {"format": "pt"})
    with pytest.raises(Corrupt, match="no vtzoo delta"):
        Delta.open(tmp_path / "plain")
    write(tmp_path / "new", {}, {"vtzoo": json.dumps({**delta.header(), "schema": 99})})
    with pytest.raises(Mismatch, match="schema 99, this vtzoo knows up to 1") as caught:
        Delta.open(tmp_path / "new")
    assert caught.value.hint == "pip install -U vtzoo"
    write(tmp_path / "none", {}, {"vtzoo": json.dumps({**delta.header(), "schema": "1"})})
    with pytest.raises(Corrupt, match="schema is '1'"):
        Delta.open(tmp_path / "none")
    with pytest.raises(NotFound):
        Delta.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "3", '"x"', "null", '{"schema": 1}', '{"schema": 1, "method": "lora", "config": []}']
)
def test_garbled_headers_are_corrupt(tmp_path: Path, text: str) -> None:
    """Whatever stands where the document should be, the refusal is Corrupt, never a traceback."""
    write(tmp_path / "bad", {"a": torch.ones(1)}, {"vtzoo": text})
    with pytest.raises(Corrupt):
        Delta.open(tmp_path / "bad")


@pytest.mark.parametrize("key", ["method", "config", "backbone", "tasks", "metrics", "lineage"])
@pytest.mark.parametrize("value", [None, 3, "x", [3], {"a": 1}])
def test_wrong_kinds_in_the_header_are_corrupt(delta: Delta, tmp_path: Path, key: str, value: object) -> None:
    """A field of another kind than it should be is Corrupt, or is harmless; never a traceback."""
    write(tmp_path / "bad", {"a": torch.ones(1)}, {"vtzoo": json.dumps({**delta.header(), key: value})})
    try:
        Delta.open(tmp_path / "bad").header()
    except Corrupt as refusal:
        assert refusal.hint


def test_part_gives_its_methods_config() -> None:
    """A part's knobs decode into the method's own Config."""
    part = Part(method="lora", graft="lora", knobs={"rank": 4, "targets": ["qkv"]})
    assert part.config.rank == 4
    assert part.config.targets == ("qkv",)
    assert Part.of(part.json()) == part


def test_read_header_needs_no_tensors(delta: Delta, tmp_path: Path) -> None:
    """read_header gives the document alone."""
    delta.save(tmp_path / "d")
    assert read_header(tmp_path / "d")["method"] == "lora[rank=2,targets=qkv]+bitfit"


def test_preprocess_travels(tmp_path: Path, delta: Delta) -> None:
    """A task's preprocessing is in the header, number for number."""
    own = Preprocess(
        input_size=(3, 24, 32), mean=(0.1, 0.2, 0.3), std=(0.9, 0.8, 0.7), interpolation="bilinear", crop_pct=0.875
    )
    delta.with_(tasks=(Task(name="b", classes=("x",) * 5, preprocess=own),)).save(tmp_path / "d")
    assert Delta.open(tmp_path / "d").task().preprocess == own


def test_a_delta_is_written_on_the_zoos_own_disk(delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's folder for temporary files may be small, or not there; nothing is left on the way in."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    zoo = Zoo.init(tmp_path / "zoo")
    digest, size = stored(delta, zoo)
    assert zoo.object(digest).stat().st_size == size
    assert Delta.open(zoo.object(digest)).header() == delta.header()
    assert list(hall(zoo.root).iterdir()) == []
