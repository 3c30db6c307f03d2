"""Many tasks shipped as one ONNX file: what goes in, what comes out, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.e2e.students import distilled, images_of, world
from vtzoo.artifact import go_live, open_ref
from vtzoo.errors import (
    Conflict,
    ExportMismatch,
    Mismatch,
    NotExportable,
    NotFound,
    UsageError,
    VtzooError,
    WrongBackbone,
)
from vtzoo.fingerprint import fingerprint
from vtzoo.onnx.gallery import gallery
from vtzoo.onnx.mixtures import judge, of, rows
from vtzoo.onnx.verify import Difference
from vtzoo.results import Exported
from vtzoo.spec import BackboneCard, Preprocess, Task
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.export.tasks import export_tasks
from vtzoo.verbs.merge import merge_refs
from vtzoo.verbs.predict import predict
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

FOUR = {"pets": "lora[rank=2]", "cars": "ssf[init_std=0.1]", "fruit": "adaptformer", "tools": "vpt-deep[tokens=3]"}
CLASSES = {
    "pets": ("cat", "dog"),
    "cars": ("bus", "tram", "van"),
    "fruit": ("fig", "kiwi", "lime", "pear"),
    "tools": ("axe", "saw"),
}
QUICK = {"epochs": 1, "batch_size": 8, "lr": 1e-2}
SIDE = 32
PAD = -1e30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four deltas of four methods on a ViT of one block, a fifth on another and a sixth at another size, a merge and a masked one."""
    root = tmp_path_factory.mktemp("many")
    zoo = Zoo.init(root / "zoo")
    backbone(zoo, "tiny", seed=0)
    backbone(zoo, "other", seed=1)
    for i, (name, method) in enumerate(FOUR.items()):
        images_of(root / name, CLASSES[name], i)
        train(backbone="tiny", data=str(root / name), method=method, name=f"{name}/a", zoo=zoo, recipe=QUICK)
    for name, where, more in (("cars/other", "other", {}), ("cars/large", "tiny", {"image_size": 48})):
        train(backbone=where, data=str(root / "cars"), method="lora", name=name, zoo=zoo, recipe={**QUICK, **more})
    merge_refs(refs=["pets/a", "cars/a"], method="linear", name="both", zoo=zoo)
    merge_refs(refs=["pets/a", "cars/a"], method="emr", name="masked", zoo=zoo)
    return root


def backbone(zoo: Zoo, name: str, seed: int) -> None:
    """A random ViT of one block."""
    torch.manual_seed(seed)
    args = {"depth": 1, "img_size": SIDE}
    tensors, path = timm.create_model("test_vit", num_classes=0, **args).state_dict(), zoo.root / f"{name}.safetensors"
    save_file(tensors, path)
    digest = zoo.add_object(path)
    card = BackboneCard(
        name=name, arch="test_vit", source=f"object:sha256:{digest}", fingerprint=fingerprint(tensors), model_args=args, license="MIT",
        preprocess=Preprocess(input_size=(3, SIDE, SIDE)),
    )  # fmt: skip
    zoo.put("backbones", name, {**card.json(), "digest": digest, "size_bytes": path.stat().st_size})


@pytest.fixture(scope="module")
def shipped(place: Path) -> Exported:
    """The four in one file that takes pictures."""
    refs = [f"{n}/a" for n in FOUR]
    return export_tasks(
        refs=refs, out=place / "four.onnx", embed_preprocess=True, name="four/onnx", zoo=Zoo(place / "zoo")
    )


def opened(path: str) -> onnxruntime.InferenceSession:
    """As a program without vtzoo opens it."""
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def alone(place: Path, refs: Sequence[tuple[str, str]], pictures: np.ndarray, tasks: Sequence[int]) -> list[Tensor]:
    """What each picture's own task's network gives it, one at a time, in torch."""
    lives = [go_live(open_ref(r, Zoo(place / "zoo")), t) for r, t in refs]
    mean, std = (torch.tensor(v)[:, None, None] for v in (lives[0].preprocess.mean, lives[0].preprocess.std))
    images = (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        return [lives[t].model(x[None])[0] for x, t in zip(images, tasks, strict=True)]


def near(found: np.ndarray, wanted: Tensor) -> None:
    """Within the tolerance of float32, and filled up behind the task's own classes."""
    own = torch.from_numpy(found[: len(wanted)])
    assert float((own - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    assert (found[len(wanted) :] == np.float32(PAD)).all()


def test_a_mixed_batch_is_each_task_by_itself(place: Path, shipped: Exported) -> None:
    """Four methods in one batch of any order and size, run by onnxruntime alone, give what the four deltas give one at a time."""
    session = opened(shipped.path)
    draw = np.random.default_rng(1)
    for tasks in ([2], [3, 3], [1, 3, 0, 0, 2], [3, 2, 1, 0, 0, 1, 2, 3], [1] * 4):
        pictures = draw.integers(0, 256, (len(tasks), SIDE, SIDE, 3), dtype=np.uint8)
        found = session.run(["logits"], {"image": pictures, "task_id": np.array(tasks)})[0]
        assert found.shape == (len(tasks), 4)
        for row, wanted in zip(found, alone(place, [(f"{n}/a", n) for n in FOUR], pictures, tasks), strict=True):
            near(row, wanted)


def test_an_image_of_no_task_is_nan(shipped: Exported) -> None:
    """A number that no task has gives NaN, and leaves the others' rows alone."""
    pictures = np.random.default_rng(2).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    session = opened(shipped.path)
    found, known = (session.run(None, {"image": pictures, "task_id": np.array(t)})[0] for t in ([0, 4, -1], [0, 1, 1]))
    assert np.isnan(found[1:]).all()
    np.testing.assert_array_equal(found[0], known[0])


def test_what_the_file_says_of_its_tasks(place: Path, shipped: Exported) -> None:
    """Number, name, classes, digest and licence of each, and the logit of classes that a task doesn't have."""
    said = opened(shipped.path).get_modelmeta().custom_metadata_map
    tasks = json.loads(said["vtzoo.tasks"])
    assert [(t["number"], t["name"], tuple(t["classes"])) for t in tasks] == [
        (i, n, CLASSES[n]) for i, n in enumerate(FOUR)
    ]
    zoo = Zoo(place / "zoo")
    assert [t["digest"] for t in tasks] == [zoo.resolve(f"{n}/a").facts["digest"] for n in FOUR]
    assert {t["license"] for t in tasks} == {"MIT"}
    assert not any(t["multilabel"] for t in tasks)
    assert json.loads(said["vtzoo.padding"]) == PAD


def test_the_report(place: Path, shipped: Exported) -> None:
    """A row a task with its difference and what it has to itself; size and time; the entry knows its tasks."""
    report = shipped.report
    assert [(t["task"], t["method"]) for t in report["tasks"]] == list(FOUR.items())
    assert [t["apart"] for t in report["tasks"]] == ["nothing", "4 modules", "nothing", "1 module"]
    assert 0 < report["max_rel"] == max(t["max_rel"] for t in report["tasks"]) < 1e-4
    assert report["size_bytes"] == Path(shipped.path).stat().st_size
    assert report["onnxruntime_ms"] > 0
    assert Zoo(place / "zoo").resolve("four/onnx").facts["tasks"] == list(FOUR)


def test_predict_and_eval_of_one_of_its_tasks(place: Path, shipped: Exported) -> None:
    """By `--task`, and as of the delta itself; without one, or with another, they are told which there are."""
    zoo, picture = Zoo(place / "zoo"), place / "fruit" / "val" / "kiwi" / "0.bmp"
    ours, theirs = (
        predict(ref=r, images=picture, task="fruit", zoo=zoo).predictions[0] for r in (shipped.path, "fruit/a")
    )
    assert ours["task"] == "fruit"
    assert [t["class"] for t in ours["top"]] == [t["class"] for t in theirs["top"]]
    assert [t["probability"] for t in ours["top"]] == pytest.approx([t["probability"] for t in theirs["top"]], abs=1e-5)
    found, wanted = (
        evaluate(ref=r, data=str(place / "cars"), task="cars", split="val", zoo=zoo) for r in ("four/onnx", "cars/a")
    )
    assert found.metrics["cars"]["top1"] == wanted.metrics["cars"]["top1"]
    with pytest.raises(NotFound, match="has 4 tasks: pets, cars, fruit, tools"):
        predict(ref=shipped.path, images=picture, zoo=zoo)
    with pytest.raises(NotFound, match="no task 'boats'"):
        evaluate(ref=shipped.path, data=str(place / "cars"), task="boats", zoo=zoo)


def test_real_images_of_each_task(place: Path, tmp_path: Path) -> None:
    """Each task's own images, of as many tasks as are given, or the same for all, pass in mixed batches: how many, and how often both say the same."""
    zoo, refs = Zoo(place / "zoo"), ["pets/a", "fruit/a", "cars/a"]
    some = {"cars": str(place / "cars"), "pets": str(place / "pets")}
    report = export_tasks(refs=refs, out=tmp_path / "some.onnx", data=some, zoo=zoo).report
    assert [t.get("images") for t in report["tasks"]] == [16, None, 24]
    assert [t.get("top1_agreement") for t in report["tasks"]] == [1.0, None, 1.0]
    assert report["verified_on"] == "random pictures and 40 images"
    assert report["max_rel"] == max(t["max_rel"] for t in report["tasks"]) < 1e-4
    both = export_tasks(refs=refs[:2], out=tmp_path / "one.onnx", data=str(place / "cars"), zoo=zoo).report
    assert [t["images"] for t in both["tasks"]] == [24, 24]


def test_a_gallery_mixes_tasks_and_keeps_each_in_order(place: Path) -> None:
    """Every image once, in batches of several tasks of which each one's are in its own order; twice the same."""
    tasks = [Task(name=n, classes=CLASSES[n], preprocess=Preprocess(input_size=(3, SIDE, SIDE))) for n in FOUR]
    made = gallery({"tools": str(place / "tools"), "pets": str(place / "pets")}, tasks, tasks[0].preprocess)
    batches = list(made)
    assert (len(made), sum(len(b.tasks) for b in batches)) == (32, 32)
    assert all({*b.tasks.tolist()} == {0, 3} for b in batches)
    for task in (0, 3):
        assert torch.equal(torch.stack([*of(batches, task)]), torch.stack([*made.of(task)]))
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, made, strict=True))


def test_one_wrong_answer_to_a_real_image_is_refused() -> None:
    """What noise doesn't show is judged on the images, and said by the task's name; the row counts how often both agree."""
    tasks = [Task(name=n, classes=CLASSES[n]) for n in FOUR]
    same, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    noise, real = {i: Difference((8, 8), same, same) for i in range(4)}, {2: Difference((8, 8), same, other)}
    table = rows(noise, real, tasks, [{}] * 4)
    assert (table[2]["images"], table[2]["top1_agreement"], table[2]["max_rel"]) == (2, 0.5, 1.0)
    assert "images" not in table[0]
    with pytest.raises(ExportMismatch, match="'fruit' differ"):
        judge(real, tasks, 1e-3, "")


def test_a_merge_is_one_trunk(place: Path) -> None:
    """The heads of a merge behind its one network, folded."""
    made = export_tasks(refs=["both"], out=place / "both.onnx", embed_preprocess=True, zoo=Zoo(place / "zoo"))
    assert {t["apart"] for t in made.report["tasks"]} == {"shared, folded"}
    pictures = np.random.default_rng(3).integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
    tasks = [1, 0, 1, 1, 0]
    found = opened(made.path).run(None, {"image": pictures, "task_id": np.array(tasks)})[0]
    for row, wanted in zip(found, alone(place, [("both", "pets"), ("both", "cars")], pictures, tasks), strict=True):
        near(row, wanted)


BAD: dict[str, tuple[dict[str, Any], type[VtzooError], str]] = {
    "another backbone": ({"refs": ["pets/a", "cars/other"]}, WrongBackbone, "was made for other"),
    "another size": ({"refs": ["pets/a", "cars/large"]}, Mismatch, r"input_size \(3, 48, 48\), not \(3, 32, 32\)"),
    "a task twice": ({"refs": ["pets/a", "cars/a", "both"]}, UsageError, "the task 'pets' is there twice"),
    "one task": ({"refs": ["pets/a"]}, UsageError, "has one task"),
    "a network for each": ({"refs": ["masked"]}, NotExportable, "a whole network for each task"),
    "a backbone": ({"refs": ["pets/a", "tiny"]}, UsageError, "no task's head"),
    "nothing": ({"refs": ["pets/a", "boats/a"]}, NotFound, "boats/a"),
    "an old operator set": ({"refs": ["both"], "opset": 16}, UsageError, "17 to 23"),
    "images of another task": ({"refs": ["both"], "data": {"boats": "."}}, NotFound, "no task is called 'boats'"),
    "no such images": ({"refs": ["both"], "data": {"pets": "nowhere/"}}, NotFound, "nowhere"),
    "no difference at all": ({"refs": ["both"], "tolerance": 0.0}, ExportMismatch, "'pets' differ by"),
}


@pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.slow if "difference" in f else ()) for f in BAD])
def test_what_can_not_be_leaves_nothing(place: Path, tmp_path: Path, fault: str) -> None:
    """Each fault is its documented error with a hint, and no file appears."""
    asked, kind, said = BAD[fault]
    with pytest.raises(kind, match=said) as caught:
        export_tasks(out=tmp_path / "m.onnx", zoo=Zoo(place / "zoo"), **asked)
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays(place: Path, tmp_path: Path) -> None:
    """It is not written over."""
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(Conflict):
        export_tasks(refs=["both"], out=tmp_path / "m.onnx", zoo=Zoo(place / "zoo"))
    assert (tmp_path / "m.onnx").read_text() == "mine"


@pytest.mark.slow
def test_a_merge_and_a_delta_in_operator_set_17(place: Path, tmp_path: Path) -> None:
    """A merge has the layers that it changed to itself, for both of its tasks; a delta beside it shares the backbone's."""
    zoo = Zoo(place / "zoo")
    report = export_tasks(refs=["fruit/a", "both"], out=tmp_path / "m.onnx", opset=17, zoo=zoo).report
    assert [t["apart"] for t in report["tasks"]] == ["nothing", "8 modules", "8 modules"]
    assert report["max_rel"] < 1e-4


@pytest.mark.slow
def test_one_file_beside_a_file_for_each(place: Path, tmp_path: Path) -> None:
    """With `--compare` the report has what the four files take, which is more."""
    refs = [f"{n}/a" for n in FOUR]
    report = export_tasks(refs=refs, out=tmp_path / "m.onnx", compare=True, zoo=Zoo(place / "zoo")).report
    assert report["single_files_size_bytes"] > 2 * report["size_bytes"]
    assert report["single_files_onnxruntime_ms"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.slow
def test_real_tasks_on_the_embedded_vit(tmp_path: Path) -> None:
    """Three embedded tasks, each by another method: accuracy through the one file is that of the deltas."""
    zoo = Zoo.init(tmp_path / "zoo")
    given = {"fashion": "lora[rank=4]", "emoji": "adapter", "clipart": "vpt-deep[tokens=4]"}
    recipe = {"epochs": 1, "limit": 200, "eval_limit": 40, "batch_size": 20}
    for task, method in given.items():
        train(backbone="vit_embedded_64", data=f"vtzoo:{task}", method=method, name=f"{task}/m", zoo=zoo, recipe=recipe)
    made = export_tasks(refs=[f"{t}/m" for t in given], out=tmp_path / "m.onnx", zoo=zoo)
    for task in given:
        ours, theirs = (
            evaluate(ref=r, data=f"vtzoo:{task}", task=task, zoo=zoo).metrics[task] for r in (made.path, f"{task}/m")
        )
        assert ours["top1"] == pytest.approx(theirs["top1"], abs=0.003)


@pytest.mark.slow
def test_a_convolutional_network_and_students(tmp_path: Path) -> None:
    """Deltas on a convolutional network, and a student with a classifier for each task."""
    place = world(tmp_path / "world")
    zoo = Zoo(place / "zoo")
    for i, (task, method) in enumerate({"u": "conv-adapter", "v": "ssf[init_std=0.1]", "w": "bitfit"}.items()):
        images_of(place / task, ("a", "b", "c")[: 2 + i % 2], i)
        train(
            backbone="conv",
            data=str(place / task),
            method=method,
            name=f"{task}/m",
            zoo=zoo,
            recipe={**QUICK, "image_size": 32},
        )
    deltas = export_tasks(refs=["pets/a", "u/m", "v/m", "w/m"], out=tmp_path / "m.onnx", zoo=zoo)
    assert deltas.report["max_rel"] < 1e-4
    distilled(place, "student", ["both"], data={"pets": str(place / "pets"), "cars": str(place / "cars")})
    student = export_tasks(refs=["student"], out=tmp_path / "s.onnx", zoo=zoo)
    assert {t["apart"] for t in student.report["tasks"]} == {"shared"}
    assert student.report["max_rel"] < 1e-4
    with pytest.raises(UsageError, match="is no delta"):
        export_tasks(refs=["student", "u/m"], out=tmp_path / "n.onnx", zoo=zoo)
