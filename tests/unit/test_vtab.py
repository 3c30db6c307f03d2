"""VTAB-1k: its layouts are read, its means are those of the tables."""

from pathlib import Path

import pytest
from PIL import Image

from vtzoo import data as D
from vtzoo.errors import Corrupt, NotFound
from vtzoo.vtab import GROUPS, TASKS, means


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task as research code lays it out, with three classes of which the training images lack one."""
    folder = tmp_path / "dtd"
    (folder / "images").mkdir(parents=True)
    lines: dict[str, list[str]] = {"train800.txt": [], "val200.txt": [], "test.txt": []}
    for i, (name, label) in enumerate(
        [("train800.txt", 0), ("train800.txt", 1), ("val200.txt", 1), ("test.txt", 2), ("test.txt", 0)]
    ):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / "images" / f"an image {i}.png")
        lines[name].append(f"images/an image {i}.png {label}\n")
    for name, own in lines.items():
        (folder / name).write_text("".join(own))
    (folder / "train800val200.txt").write_text("".join(lines["train800.txt"] + lines["val200.txt"]))
    return folder


def test_lists_say_which_image_is_where(task: Path) -> None:
    """Splits and labels are those of the lists, and every split knows all classes."""
    found = {s: D.open_data(task, split=s) for s in ("train", "val", "test")}
    assert {s: i.labels for s, i in found.items()} == {"train": (0, 1), "val": (1,), "test": (2, 0)}
    assert {i.classes for i in found.values()} == {("0", "1", "2")}
    assert found["val"][0][0].getpixel((0, 0)) == (80, 0, 0)
    assert len({i.digest for i in found.values()}) == 3


def test_broken_lists_are_said(task: Path) -> None:
    """A line without a number, and a list that is missing beside others."""
    (task / "test.txt").unlink()
    with pytest.raises(NotFound, match=r"no test\.txt"):
        D.open_data(task, split="test")
    (task / "val200.txt").write_text("images/1.png five\n")
    with pytest.raises(Corrupt, match="a line 'images"):
        D.open_data(task, split="train")


def test_labels_are_a_part_of_the_images(task: Path) -> None:
    """Other labels for the same files are other images: nothing that was trained on the first is taken for theirs."""
    before = {s: D.open_data(task, split=s).digest for s in ("train", "val")}
    (task / "train800.txt").write_text("images/an image 0.png 1\nimages/an image 1.png 0\n")
    after = {s: D.open_data(task, split=s).digest for s in ("train", "val")}
    assert before["train"] != after["train"]
    assert before["val"] == after["val"]


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("train800.txt", "images/an image 0.png 1", r"train800\.txt has images/an image 0\.png twice"),
        ("val200.txt", "images/an image 3.png 0", r"val200\.txt and test\.txt share 1 images"),
        ("test.txt", "images/nowhere.png 0", r"test\.txt has 1 images that aren't there, first images/nowhere\.png"),
    ],
)
def test_an_image_stands_in_one_line(task: Path, name: str, line: str, said: str) -> None:
    """Twice in a list the last label would count, in two lists the training would see what is measured; it must be there."""
    with (task / name).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(Corrupt, match=said):
        D.open_data(task, split="train")


def test_splits_of_data_sets_on_the_hub_may_bear_vtabs_names(tmp_path: Path) -> None:
    """`datasets` reads a folder of Parquet files whose splits are called train800, val200 and test."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for split, count in (("train800", 4), ("val200", 2), ("test", 6)):
        images = [Image.new("RGB", (8, 8), (i * 20, 0, 0)) for i in range(count)]
        rows = {"image": images, "label": [i % 2 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / f"{split}.parquet")
    files = "\n".join(f"  - split: {s}\n    path: {s}.parquet" for s in ("train800", "val200", "test"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}\n---\n")
    name = f"hfds/{tmp_path / 'set'}@{tmp_path / 'cache'}"
    sizes = {s: len(D.open_data(name, split=s)) for s in ("train", "val", "test")}
    assert sizes == {"train": 4, "val": 2, "test": 6}
    assert D.open_data(name, split="val").classes == ("a", "b")


def test_both_means() -> None:
    """Seven, four and eight tasks: the mean of groups weighs four as much as eight; with a task too few there is none."""
    assert [len(own) for own in GROUPS.values()] == [7, 4, 8]
    by_task = {t: {"natural": 0.8, "specialized": 0.9, "structured": 0.5}[g] for g, own in GROUPS.items() for t in own}
    found = means(by_task)
    assert found is not None
    assert found.tasks == pytest.approx((7 * 0.8 + 4 * 0.9 + 8 * 0.5) / 19)
    assert found.groups == pytest.approx((0.8 + 0.9 + 0.5) / 3)
    assert means({t: 0.5 for t in TASKS if t != "dtd"}) is None
