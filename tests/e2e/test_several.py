"""Images that bear several labels each: from the table beside them to training, measuring, predicting, folding."""

import csv
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from vtzoo import data as D
from vtzoo.delta import Delta
from vtzoo.errors import Corrupt, Mismatch, NotFound, UsageError
from vtzoo.results import Trained
from vtzoo.score import measure
from vtzoo.sweep_file import read
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.bring.peft import import_peft
from vtzoo.verbs.distill import distill
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.export.peft import export_peft
from vtzoo.verbs.fold import fold_ref
from vtzoo.verbs.merge import merge_refs
from vtzoo.verbs.predict import predict
from vtzoo.verbs.report import report
from vtzoo.verbs.sweep import sweep
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
RECIPE: dict[str, Any] = {"epochs": 12, "batch_size": 16, "image_size": 32, "augment": "none", "lr": 3e-3}


def picture(labels: list[str]) -> Image.Image:
    """A third of a grey picture for each colour that it has."""
    made = Image.new("RGB", (30, 30), "gray")
    for i, (name, colour) in enumerate(COLOURS.items()):
        if name in labels:
            made.paste(colour, (10 * i, 0, 10 * i + 10, 30))
    return made


def folder(root: Path, counts: dict[str, int]) -> Path:
    """So many pictures for each split, each with a table of its own; the test split's is JSON."""
    draw = random.Random(0)
    for split, count in counts.items():
        place = root / split
        place.mkdir(parents=True)
        rows = [(f"{i:02d}.png", [c for c in COLOURS if draw.random() < 0.4]) for i in range(count)]
        for name, labels in rows:
            picture(labels).save(place / name)
        if split == "test":
            lines = [json.dumps({"file_name": n, "labels": labels}) for n, labels in rows]
            (place / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
            continue
        with (place / "metadata.csv").open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["file_name", "labels"])
            writer.writerows((n, "|".join(labels)) for n, labels in rows)
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with a tiny ViT, and pictures of colours."""
    root = tmp_path_factory.mktemp("several")
    zoo = Zoo.init(root / "zoo")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), root / "tiny.safetensors")
    add_backbone(name="tiny", arch="test_vit", weights=root / "tiny.safetensors", zoo=zoo)
    folder(root / "colours", {"train": 64, "val": 16, "test": 16})
    return root


def run(place: Path, name: str, method: str = "lora[rank=4]", **recipe: Any) -> Trained:
    """Train on the colours."""
    data, zoo = str(place / "colours"), Zoo(place / "zoo")
    return train(backbone="tiny", data=data, method=method, name=name, zoo=zoo, recipe={**RECIPE, **recipe})


@pytest.fixture(scope="module")
def made(place: Path) -> Trained:
    """A delta that tells colours."""
    return run(place, "colours/a", class_weights="balanced", label_smoothing=0.05)


def test_each_label_is_learned_by_itself(place: Path, made: Trained) -> None:
    """A delta learns them, says in its header that there may be several, and evaluation gives what training measured."""
    assert made.metrics["test"]["map"] > 0.95
    assert made.metrics["test"]["micro_f1"] > 0.85
    task = Delta.open(Path(made.path)).task()
    assert task.multilabel
    assert task.classes == ("blue", "green", "red")
    zoo = Zoo(place / "zoo")
    assert list(zoo.resolve("colours/a").facts["metrics"]) == ["map"]
    found = evaluate(ref="colours/a", data=str(place / "colours"), zoo=zoo).metrics["colours"]
    assert found["map"] == pytest.approx(made.metrics["test"]["map"], abs=1e-4)
    assert found["images"] == 16


def test_kept_features_learn_the_same(place: Path) -> None:
    """A head on features that were computed once becomes the one that is trained on the images."""
    kept, plain = (run(place, f"colours/{c}", "linear", cache=c, folds=2) for c in ("auto", "off"))
    ours, theirs = (dict(Delta.open(Path(m.path)).tensors) for m in (kept, plain))
    assert all(torch.allclose(ours[n], theirs[n], rtol=1e-5, atol=1e-6) for n in theirs)


def test_a_sweep_chooses_by_average_precision(place: Path, tmp_path: Path) -> None:
    """The rate that is better on the validation images is trained again; table, standings and page say what was measured."""
    recipe = {**RECIPE, "epochs": 2, "eval_on": "val+test"}
    recipe.pop("lr")
    content = {
        "name": "colours", "tasks": {"colours": str(place / "colours")}, "backbones": "tiny", "methods": ["linear"],
        "recipe": recipe, "grid": {"lr": [1e-9, 0.03]}, "final": {"seeds": [1]},
    }  # fmt: skip
    found = sweep(spec=read(yaml.safe_dump(content), "spec"), zoo=Zoo(place / "zoo"), jobs=1)
    *search, final = found.report["rows"]
    assert search[0]["val_map"] < search[1]["val_map"]
    assert (final["recipe.lr"], final["seed"]) == (0.03, 1)
    assert found.report["standings"][0]["mean"] == final["map"]
    report(refs=[found.path], out=tmp_path / "page.html", zoo=Zoo(place / "zoo"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "mean mAP" in page
    assert "mean top-1" not in page


def test_all_probable_labels_are_predicted(place: Path, made: Trained, tmp_path: Path) -> None:
    """As many labels as the image has, each above one half, none for a grey image; and from the fold as from the delta."""
    zoo, paths = Zoo(place / "zoo"), [tmp_path / f"{n}.png" for n in ("two", "none")]
    for path, labels in zip(paths, (["red", "blue"], []), strict=True):
        picture(labels).save(path)
    two, none = (p["top"] for p in predict(ref="colours/a", images=paths, zoo=zoo).predictions)
    assert {t["class"] for t in two} == {"red", "blue"}
    assert none == []
    assert len(predict(ref="colours/a", images=paths, zoo=zoo, top=1).predictions[0]["top"]) == 1
    fold_ref(ref="colours/a", out=tmp_path / "folded", zoo=zoo)
    again = predict(ref=str(tmp_path / "folded"), images=paths, zoo=zoo).predictions
    assert [{t["class"] for t in p["top"]} for p in again] == [{"red", "blue"}, set()]


def test_merges_keep_what_a_task_is(place: Path, made: Trained) -> None:
    """Merged without images the task stays what it was; with images, which merges compare by class, it is refused."""
    zoo, other = Zoo(place / "zoo"), str(place / "colours")
    run(place, "second/a", epochs=1)
    merge_refs(refs=["colours/a", "second/a"], method="linear", name="both", zoo=zoo)
    assert 0 <= evaluate(ref="both", data=other, task="colours", zoo=zoo).metrics["colours"]["map"] <= 1
    with pytest.raises(UsageError, match="several labels"):
        merge_refs(refs=["colours/a", "second/a"], method="regmean", name="x", data=[other, other], zoo=zoo)
    with pytest.raises((Mismatch, UsageError), match="several labels"):
        distill(teachers=["colours/a"], student="test_vit", data=other, name="s", zoo=zoo)


def test_peft_and_back(place: Path, tmp_path: Path) -> None:
    """Through PEFT's form a task stays one of several labels."""
    zoo, data = Zoo(place / "zoo"), str(place / "colours")
    run(place, "colours/large", epochs=1, limit=16, image_size=160)
    export_peft(ref="colours/large", out=tmp_path / "peft", zoo=zoo)
    import_peft(folder=tmp_path / "peft", backbone="tiny", name="colours/back", zoo=zoo)
    refs = ("colours/large", "colours/back")
    ours, theirs = (evaluate(ref=r, data=data, zoo=zoo).metrics["colours"]["map"] for r in refs)
    assert theirs == pytest.approx(ours)


@pytest.mark.parametrize(
    ("method", "recipe", "said"),
    [
        ("lora", {"shots": 2}, "shots=2"), ("lora", {"sampling": "balanced"}, "sampling=balanced"), ("lora", {"mixup": 0.2}, "mixup"),
        ("linear[weight_decay=[0.0,1e-2]]", {}, "probes"), ("gps", {}, "chooses by classes"),
    ],
)  # fmt: skip
def test_what_needs_one_class_is_refused(place: Path, method: str, recipe: dict[str, Any], said: str) -> None:
    """Few of each class, balance, mixing, probes side by side and methods that contrast classes say that they can't."""
    with pytest.raises(UsageError, match=said):
        run(place, "colours/x", method, **recipe)


def test_a_task_and_its_data_agree(place: Path, made: Trained, tmp_path: Path) -> None:
    """One class an image is not what a task of several labels is measured on."""
    for colour in COLOURS:
        (tmp_path / "test" / colour).mkdir(parents=True)
        picture([colour]).save(tmp_path / "test" / colour / "1.png")
    with pytest.raises(Mismatch, match="one class each"):
        evaluate(ref="colours/a", data=str(tmp_path), zoo=Zoo(place / "zoo"))


def test_without_folders_a_hash_splits(tmp_path: Path) -> None:
    """One table above all images, zipped or not: 80/10/10 by name; labels are part of the digest."""
    plain = folder(tmp_path / "all", {"": 60})
    parts = [D.open_data(plain, split=s, several=True) for s in D.SPLITS]
    assert sum(map(len, parts)) == 60
    assert len(parts[0]) > 40
    row = parts[0].several[0]
    assert parts[0].targets[0].nonzero().flatten().tolist() == list(row)
    zipped = D.open_data(shutil.make_archive(str(tmp_path / "zip"), "zip", plain), split="train", several=True)
    assert zipped.digest == parts[0].digest
    assert zipped.several == parts[0].several
    table = plain / "metadata.csv"
    text = table.read_text(encoding="utf-8")
    first = parts[0].paths[0]
    line = next(t for t in text.splitlines() if t.startswith(first))
    table.write_text(
        text.replace(line, f"{first},red|green|blue" if "red|" not in line else f"{first},blue"), encoding="utf-8"
    )
    assert D.open_data(plain, split="train", several=True).digest != zipped.digest


@pytest.mark.parametrize(
    ("table", "error", "said"),
    [
        ("file_name,labels\n00.png,red|blue\n", UsageError, "1 images have no row in the table, first 01.png"),
        ("file_name,labels\n00.png,red|blue\n01.png,\n02.png,\n", UsageError, "1 rows have no image, first 02.png"),
        ("file_name,labels\n00.png,red|blue\n00.png,\n01.png,\n", UsageError, "00.png stands twice"),
        ("file_name,labels\n00.png,red\n01.png,\n", UsageError, "has 1 labels"),
        ("file_name,labels\n00.png,red,blue\n01.png,\n", Corrupt, "row 1 has 3 cells, the header 2"),
        ("name,labels\n00.png,red\n", Corrupt, "no table of file_name and labels"),
        ("file_name,caption\n00.png,a dog\n", UsageError, "no class folders"),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, table: str, error: type[Exception], said: str) -> None:
    """What stands on one side only, twice, or nowhere is told by name; a table of something else is passed over."""
    for name in ("00.png", "01.png"):
        picture([]).save(tmp_path / name)
    (tmp_path / "metadata.csv").write_text(table, encoding="utf-8")
    with pytest.raises(error, match=said):
        D.open_data(tmp_path, split="train", several=True)


def test_a_split_that_is_missing(tmp_path: Path) -> None:
    """A split without a folder is not found, and validation images come out of the training's."""
    made = folder(tmp_path / "two", {"train": 30})
    assert len(D.open_data(made, split="train", several=True)) + len(D.open_data(made, split="val", several=True)) == 30
    with pytest.raises(NotFound, match="test"):
        D.open_data(made, split="test", several=True)
    with pytest.raises(UsageError, match="several labels each"):
        D.open_data(made, split="train")


def test_precision_and_f1_by_hand() -> None:
    """Average precision counts equal scores as one step, F1 is at probability one half, and a label that no image bears is left out."""
    logits = torch.tensor([[2.0, 1.0, -1.0], [1.0, 1.0, 1.0], [0.5, -2.0, -1.0], [-1.0, -3.0, -1.0]])
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found = measure(logits, labels)
    first, second = (1 / 1 + 2 / 3) / 2, (1 / 2 + 2 / 4) / 2
    assert found["map"] == pytest.approx((first + second) / 2)
    assert found["micro_f1"] == pytest.approx(2 * 3 / (6 + 4))
    assert found["macro_f1"] == pytest.approx((2 * 2 / (3 + 2) + 2 * 1 / (2 + 2)) / 2)
