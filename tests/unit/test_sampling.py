"""Which images a training sees: balance, few of each class, folds, weights."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vtzoo import data as D
from vtzoo import talk
from vtzoo._images import Images
from vtzoo.errors import UsageError
from vtzoo.recipe import Recipe
from vtzoo.sampling import chosen, class_weights, places

CLASSES = ("cat", "dog", "eel")


def images(counts: tuple[int, ...], split: str = "train") -> Images:
    """So many of each class; the width of a picture is its number in its class."""
    names = [(f"{split}/{c}/{i}", y) for y, c in enumerate(CLASSES) for i in range(counts[y])]
    return Images(
        classes=CLASSES, paths=tuple(n for n, _ in names), labels=tuple(y for _, y in names), identity=list,
        load=lambda path: Image.new("RGB", (int(path.rpartition("/")[2]) + 1, 1)), where=split,
    )  # fmt: skip


def test_balanced_epochs_show_each_class_as_often() -> None:
    """A small class's images come again, all as often but for one; of a large one a part, none twice, others next time."""
    labels, recipe = images((20, 3, 9)).labels, Recipe(sampling="balanced", seed=3)
    first, second = places(labels, recipe, 0), places(labels, recipe, 1)
    assert len(first) == len(labels)
    assert sorted(Counter(labels[i] for i in first).values()) == [10, 11, 11]
    often = Counter(first)
    assert max(often[i] for i in range(20)) == 1
    assert {often[i] for i in range(20, 23)} <= {3, 4}
    assert first == places(labels, recipe, 0) != second
    assert {i for i in first if i < 20} != {i for i in second if i < 20}
    assert places(labels, replace(recipe, seed=4), 0) != first


def test_shuffled_epochs_are_the_usual_ones() -> None:
    """Unless asked for, nothing is balanced: the order is the one that seed and epoch give."""
    assert places((0, 0, 0, 1), Recipe(seed=5), 2) == D.order(4, 5, 2)


def test_few_shots(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many of each class by seed, fewer of them among more; where a class has no more all of its images, which is said."""
    said: list[str] = []
    monkeypatch.setattr(talk, "say", said.append)
    every, val = images((20, 3, 9)), images((2, 2, 2), "val")

    def paths(shots: int, seed: int = 0, limit: int = 0) -> set[str]:
        train, held = chosen(every, val, Recipe(shots=shots, seed=seed, limit=limit))
        assert held is val
        return set(train.paths)

    assert Counter(p.split("/")[1] for p in paths(2)) == {"cat": 2, "dog": 2, "eel": 2}
    assert not said
    assert paths(1) < paths(2) < paths(3)
    assert paths(2, seed=1) != paths(2)
    assert Counter(p.split("/")[1] for p in paths(5)) == {"cat": 5, "dog": 3, "eel": 5}
    assert said == ["not every class has 5 images, and all of these are taken: dog 3"]
    assert len(paths(2, limit=3)) == 3
    assert paths(2, limit=3) < paths(2)


def test_folds_share_all_images() -> None:
    """Each image of training and validation is held out once, with its share of every class, and is read as before."""
    train, val = images((20, 3, 9)), images((4, 1, 3), "val")
    held: list[str] = []
    for fold in range(4):
        rest, own = chosen(train, val, Recipe(folds=4, fold=fold))
        assert not set(rest.paths) & set(own.paths)
        assert len(rest) + len(own) == 40
        assert Counter(own.labels) == {0: 6, 1: 1, 2: 3}
        assert all(own[i][0].width == int(p.rpartition("/")[2]) + 1 for i, p in enumerate(own.paths))
        held += own.paths
        assert rest.digest != own.digest
    assert sorted(held) == sorted(train.paths + val.paths)
    first, other = (chosen(train, val, Recipe(folds=4, seed=seed))[1].paths for seed in (0, 1))
    assert first != other


def test_broken_images_are_counted_once_in_folds() -> None:
    """Those left out of either set are told with the training images."""
    train, val = images((3, 3, 3)), images((2, 2, 2), "val")
    train.skipped, val.skipped = ("a",), ("b",)
    assert [i.skipped for i in chosen(train, val, Recipe(folds=3))] == [("a", "b"), ()]


@pytest.mark.parametrize("wrong", [{"fold": 1}, {"folds": 1}, {"folds": 3, "fold": 3}, {"folds": 99}], ids=str)
def test_folds_that_there_are_not(wrong: dict[str, int]) -> None:
    """A fold beyond the last, one fold of all, more folds than images, and a fold of none are refused."""
    with pytest.raises(UsageError, match="fold"):
        chosen(images((3, 3, 3)), images((1, 1, 1), "val"), Recipe(**wrong))


def test_weights_of_classes() -> None:
    """Balanced gives each class the same share, with 1 for an image on average; by name the others stay at 1."""
    every = images((6, 2, 4))
    assert class_weights("none", every) is None
    balanced = class_weights("balanced", every)
    assert balanced is not None
    assert balanced.tolist() == pytest.approx([12 / (3 * 6), 12 / (3 * 2), 12 / (3 * 4)])
    assert balanced[list(every.labels)].mean().item() == pytest.approx(1)
    named = class_weights("eel:2.5| cat:0", every)
    assert named is not None
    assert torch.equal(named, torch.tensor([0.0, 1.0, 2.5]))
    none = class_weights("balanced", images((6, 0, 4)))
    assert none is not None
    assert none.tolist() == pytest.approx([10 / 12, 0, 10 / 8])


@pytest.mark.parametrize(
    ("said", "hint"),
    [("eal:2", "did you mean eel?"), ("equal", "write none, balanced"), ("cat:-1", "from 0"), ("cat:", "from 0")],
)
def test_weights_that_are_none(said: str, hint: str) -> None:
    """A class that isn't there and a value that is no weight are refused, with what to write."""
    with pytest.raises(UsageError) as refused:
        class_weights(said, images((3, 3, 3)))
    assert hint in refused.value.hint
