"""What may teach, what a student starts from, and what is recorded of both; on a tiny ConvNet and 32-pixel images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.students import CARS, PETS, distilled, images_of, kept, world
from vtzoo import data as D
from vtzoo import talk
from vtzoo.artifact import go_live, open_ref
from vtzoo.crops import Crops
from vtzoo.delta import Delta
from vtzoo.errors import Mismatch, Network, NotFound, UsageError, VtzooError
from vtzoo.faculty import School, lessons_of
from vtzoo.files import sha256
from vtzoo.recipe import Recipe
from vtzoo.results import Distilled
from vtzoo.targets import Lesson
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.export.safetensors import export_safetensors
from vtzoo.verbs.fold import fold_ref
from vtzoo.zoo import Zoo


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of images; deltas a, b (pets) and c (cars) with merges of them, as entries and as files."""
    return world(tmp_path_factory.mktemp("distill"))


def _distil(place: Path, name: str, teacher: str = "pets/a", **changes: Any) -> tuple[Distilled, dict[str, Any]]:
    return distilled(place, name, [teacher], **changes)


@pytest.mark.parametrize("teacher", ["pets/a", "{}/a.safetensors", "{}/folded", "pets/folded"])
def test_a_teacher_is_known_by_its_own_file(place: Path, teacher: str) -> None:
    """Entries, delta files and folded folders teach, and the lineage names the digest of the file they came from."""
    ref = teacher.format(place)
    path = open_ref(ref, Zoo(place / "zoo")).path
    assert path is not None
    _, lineage = _distil(place, f"known/{teacher.replace('{}/', 'by-path-')}".removesuffix(".safetensors"), ref)
    assert lineage["teachers"] == [sha256(path)]
    assert lineage["lessons"][0]["data"] == f"sha256:{D.open_data(place / 'pets', split='train').digest}"


def test_two_delta_files_have_answers_of_their_own(place: Path) -> None:
    """The second teacher's student doesn't learn the first one's answers; the pixels that it sees are the same."""
    before, pixels = kept(place), kept(place, "pixels")
    _distil(place, "own/b", f"{place}/b.safetensors", views=2, recipe={"crop_area": 0.5, "epochs": 2})
    first = kept(place) - before
    _distil(place, "own/a", f"{place}/a.safetensors", views=2, recipe={"crop_area": 0.5, "epochs": 2})
    second = kept(place) - before - first
    assert len(first) == len(second) == 2
    assert len(kept(place, "pixels") - pixels) <= 2


def test_other_pixels_under_the_same_names_are_answered_anew(place: Path) -> None:
    """Two folders whose files have equal names and sizes are two data sets."""
    _distil(place, "pixels/one")
    before = kept(place)
    _, lineage = _distil(place, "pixels/other", data=str(place / "pets2"))
    assert len(kept(place) - before) == 1
    one = Zoo(place / "zoo").resolve("pixels/one").facts["lineage"]
    assert lineage["lessons"][0]["data"] != one["lessons"][0]["data"]


@pytest.mark.parametrize(("data", "classes", "task"), [("pets", PETS, "pets"), ("cars", CARS, "cars")])
def test_a_merge_teaches_with_the_head_whose_classes_are_the_datas(
    place: Path, data: str, classes: tuple[str, ...], task: str
) -> None:
    """Of several tasks the one of the images is taught; the student has its classes."""
    _, lineage = _distil(place, f"merge/{data}", "both", data=str(place / data))
    assert lineage["lessons"][0]["teacher_tasks"] == [task]
    live = go_live(open_ref(f"merge/{data}", Zoo(place / "zoo")))
    assert live.task is not None
    assert (live.task.name, live.task.classes) == (task, classes)


def test_a_merge_teaches_features_without_a_head(place: Path) -> None:
    """A loss without logits needs no task, and any images will do."""
    _, lineage = _distil(place, "merge/features", "both", loss="feature", data=str(place / "zoo" / ".." / "pets2"))
    assert lineage["lessons"][0]["teacher_tasks"] == [""]


def test_a_task_is_asked_for_where_several_fit(place: Path) -> None:
    """Two tasks with the same classes: the refusal names them, `task` chooses, and each has answers of its own."""
    with pytest.raises(UsageError, match="pets, pets2") as refusal:
        _distil(place, "several/none", "twice")
    assert refusal.value.hint == "choose one with --task pets"
    before = kept(place)
    for task in ("pets", "pets2"):
        lineage = _distil(place, f"several/{task}", "twice", task=task)[1]
        assert lineage["lessons"][0]["teacher_tasks"] == [task]
    assert len(kept(place) - before) == 2


@pytest.mark.parametrize(
    ("teacher", "changes", "error", "said"),
    [
        ("both", {"data": "vtzoo:fashion"}, Mismatch, "pets, cars"),
        ("both", {"task": "pest"}, NotFound, "pest"),
        ("pets/a", {"task": "cars"}, NotFound, "cars"),
        ("pets/folded", {"task": "cars"}, NotFound, "cars"),
        ("conv", {"task": "cars", "loss": "feature"}, NotFound, "cars"),
        ("pets/a", {"recipe": {"cutmix": 0.2, "sampling": "balanced"}}, UsageError, "cutmix, sampling"),
        ("pets/a", {"recipe": {"augment": "strong"}}, UsageError, "augment=strong"),
        ("pets/a", {"recipe": {"head_lr": 1e-2, "label_smoothing": 0.1}}, UsageError, "head_lr, label_smoothing"),
        ("pets/a", {"recipe": {"limit": 2}}, UsageError, "too few"),
        ("pets/a", {"student": "test_vit[img_size=48]"}, UsageError, "48"),
        ("pets/a", {"student": "pets/a"}, UsageError, "is a delta"),
        ("pets/a", {"student": "test_resnet.r160_in1k"}, Network, "test_resnet.r160_in1k"),
        ("pets/a", {"student": "test_resnet[pretrained=true]"}, Network, "test_resnet"),
        ("pets/a", {"student": "vit[depth=9]"}, Mismatch, "weights of vit"),
        ("pets/a", {"student": "vit[embed_dim=32]"}, Mismatch, "weights of vit"),
        ("vit", {"loss": "feature", "teacher_size": 64}, UsageError, "own size"),
        ("conv", {"loss": "feature", "teacher_size": 0}, UsageError, "teacher_size=0"),
        ("pets/a", {"views": 0}, UsageError, "views=0"),
        ("pets/a", {"student": "test_vit[num_classes=3]"}, UsageError, "num_classes"),
        ("pets/a", {"student": "test_vit[in_chans=1]"}, UsageError, "in_chans"),
        ("pets/a", {"student": "test_vit[embed_dim=101]"}, UsageError, "divisible"),
        ("pets/a", {"student": "test_vit[act_layer=nope]"}, UsageError, "nope"),
        ("pets/a", {"student": "test_vit[img_size=-8]"}, UsageError, "-8"),
        ("pets/a", {"student": "vit[pretrained=flase]"}, UsageError, "flase"),
    ],
)
def test_what_would_be_ignored_or_can_not_be_is_refused(
    place: Path, teacher: str, changes: dict[str, Any], error: type[VtzooError], said: str
) -> None:
    """A knob without effect, a task that is not there, weights that can't be had: refused by name, before any work."""
    before = kept(place)
    with pytest.raises(error, match=said) as refusal:
        _distil(place, "x/y", teacher, **changes)
    assert refusal.value.hint
    assert kept(place) == before


@pytest.mark.parametrize("student", ["test_vit", "test_vit[img_size=32]", "vit", "test_resnet", "conv"])
def test_a_student_is_built_at_the_size_that_was_asked_for(place: Path, student: str) -> None:
    """Transformers are built for it, and every kept student runs at it and says so."""
    name = f"sized/{student.partition('[')[0]}{len(student)}"
    _distil(place, name, student=student, recipe={"epochs": 1})
    zoo = Zoo(place / "zoo")
    assert go_live(open_ref(name, zoo)).preprocess.input_size == (3, 32, 32)
    assert evaluate(ref=name, data=str(place / "pets"), zoo=zoo, split="val").metrics["pets"]["images"] == 4


@pytest.mark.parametrize(
    ("student", "start"),
    [
        ("conv", "pretrained"), ("conv[pretrained=false]", "random"), ("test_efficientnet", "random"), ("vit", "pretrained"),
        ("pets/folded", "pretrained"), ("pets/folded[drop_rate=0.5]", "pretrained"),
    ],
)  # fmt: skip
def test_a_students_start_is_said_and_recorded(
    place: Path, student: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry starts from its weights, a bare architecture from random ones: in the talk, the report and the lineage."""
    heard: list[str] = []
    monkeypatch.setattr(talk, "say", heard.append)
    name = f"start/{len(student)}-{student.partition('[')[0]}-{start}"
    made, lineage = _distil(place, name, student=student)
    assert any(start in line for line in heard)
    assert made.report["start"] == lineage["student"]["start"] == start
    if student.startswith("conv"):
        own, kept = load_file(place / "conv.safetensors"), load_file(made.path)
        assert all(torch.equal(own[n], kept[n]) for n in own) == (start == "pretrained")
    if student.startswith("pets"):  # a model of the zoo, its classifier included
        own, kept = load_file(place / "folded" / "model.safetensors"), load_file(made.path)
        assert all(torch.equal(own[n], kept[n]) for n in own)


def test_a_bare_architecture_is_not_the_entry_that_begins_like_it(place: Path) -> None:
    """`vit_tiny_patch16_224` is timm's architecture, though the catalogue's `vit_tiny_patch16_224.…` starts so."""
    made, _ = _distil(place, "start/bare", student="vit_tiny_patch16_224[depth=1,embed_dim=24]", recipe={"image_size": 32})  # fmt: skip
    assert made.report["start"] == "random"


def test_labels_are_counted_as_the_teacher_counts_them(place: Path) -> None:
    """A teacher whose classes stand in another order than the folders is taught from, label by name."""
    zoo = Zoo(place / "zoo")
    delta = Delta.open(place / "a.safetensors")
    turned = delta.with_(
        tasks=(type(t := delta.task())(name=t.name, classes=t.classes[::-1], preprocess=t.preprocess),)
    )
    turned.save(place / "turned.safetensors")
    images = D.open_data(place / "pets", split="train")

    def lesson(*names: str) -> Lesson:
        teachers = [open_ref(f"{place}/{n}.safetensors", zoo) for n in names]
        school = School(teachers=teachers, crops=Crops(), needs=frozenset({"logits"}), recipe=Recipe())
        return lessons_of(school, {"": str(place / "pets")}, None)[0]

    aligned = lesson("turned").images
    assert aligned.classes == ("dog", "cat")
    assert [aligned.classes[y] for y in aligned.labels] == [images.classes[y] for y in images.labels]
    with pytest.raises(Mismatch, match="orders"):
        lesson("turned", "a")


def test_broken_images_are_left_out_of_the_final_measure_too(place: Path, tmp_path: Path) -> None:
    """With skip_bad a broken validation image does not cost the trained student."""
    images = images_of(tmp_path / "pets", PETS, 5)
    (images / "val" / "cat" / "0.bmp").write_bytes(b"no picture")
    made, _ = _distil(place, "skipped", data=str(images), skip_bad=True)
    assert set(made.metrics) == {"pets", "pets (teacher)"}


def test_a_file_outside_the_zoo_is_never_looked_up_in_it(place: Path, tmp_path: Path) -> None:
    """A delta or folded folder of nobody's zoo is evaluated, folded and copied out from where it lies."""
    zoo = Zoo.init(tmp_path / "zoo")
    add_backbone(name="conv", arch="test_efficientnet", weights=place / "conv.safetensors", zoo=zoo)
    for ref, path in ((f"{place}/a.safetensors", place / "a.safetensors"), (f"{place}/folded", place / "folded" / "model.safetensors")):  # fmt: skip
        assert evaluate(ref=ref, data=str(place / "pets"), zoo=zoo, split="val").path == str(path)
        copied = export_safetensors(ref=ref, out=tmp_path / f"{path.stem}.safetensors", zoo=zoo)
        assert Path(copied.path).read_bytes() == path.read_bytes()
    fold_ref(ref=f"{place}/a.safetensors", out=tmp_path / "folded", zoo=zoo, name="kept")
    assert zoo.resolve("kept").facts["lineage"]["parents"] == [f"sha256:{sha256(place / 'a.safetensors')}"]
