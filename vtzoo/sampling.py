"""Which images a training sees, how often, and how much each counts: folds, few per class, balance, class weights.

Each is a function of seed, epoch and the images' names and labels alone, so that a run can be repeated and resumed.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from vtzoo import talk
from vtzoo._images import Images
from vtzoo.data import mixed, order
from vtzoo.errors import UsageError, did_you_mean
from vtzoo.recipe import Recipe


def chosen(train: Images, val: Images, recipe: Recipe) -> tuple[Images, Images]:
    """The images to train and to validate on: a fold of all, of each class few, then at most `limit`.

    Raises:
        UsageError: fewer images than folds, a fold that there isn't, or what images with several labels each can't do: they are of no
            one class.
    """
    if train.several:
        _refuse_several(recipe)
    if recipe.train_on == "train+val":
        train, val = _Joined.of(train, val), replace(val, skipped=())
    train, val = _fold(train, val, recipe)
    return _few(train, recipe.shots, recipe.seed).limit(recipe.limit, recipe.seed), val


def places(labels: Sequence[int], recipe: Recipe, epoch: int) -> list[int]:
    """The images of an epoch by their place, in the order in which they are shown; as many as there are labels.

    With sampling=balanced each class is shown equally often, but for one: of a large class an epoch sees a random part, a
    small one's images come again once all of them were seen.
    """
    if recipe.sampling == "shuffled":
        return order(len(labels), recipe.seed, epoch)
    generator = torch.Generator().manual_seed(mixed(recipe.seed, epoch))

    def shuffled(items: Sequence[int]) -> list[int]:
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    classes = _by_class(labels)
    each, more = divmod(len(labels), len(classes))
    picked: list[int] = []
    for turn, label in enumerate(shuffled(sorted(classes))):
        wanted, own = each + (turn < more), list[int]()
        while len(own) < wanted:
            own += shuffled(classes[label])
        picked += own[:wanted]
    return shuffled(picked)


def class_weights(said: str, images: Images) -> Tensor | None:
    """By what each image's loss is multiplied, for its class, [classes]; None where all count the same.

    Args:
        said: "none"; "balanced", which is n / (classes * count) for n images, so that each class counts as much as another and an
            image counts 1 on average; or CLASS:WEIGHT|CLASS:WEIGHT, the others 1.
        images: of the training. Where they bear several labels each, a weight is what an image with the label counts, one without
            counting 1, and balanced is the number of those without over the number of those with it.

    Raises:
        UsageError: no such class, or no weight.
    """
    classes = images.classes
    if said == "none":
        return None
    if said == "balanced" and images.several:
        borne = images.targets.sum(0)
        return torch.where(borne > 0, (len(images) - borne) / borne.clamp(min=1), 1.0)
    if said == "balanced":
        count = Counter(images.labels)
        return torch.tensor([len(images) / (len(count) * count[i]) if count[i] else 0.0 for i in range(len(classes))])
    weights = torch.ones(len(classes))
    for part in said.split("|"):
        name, _, value = part.strip().rpartition(":")
        if name not in classes:
            hint = did_you_mean(name, classes) if name else "write none, balanced, or CLASS:WEIGHT|CLASS:WEIGHT"
            raise UsageError(f"class_weights={said}: no class is called '{name or part}'", hint)
        weights[classes.index(name)] = _weight(value, said)
    if not weights.any():
        raise UsageError(f"class_weights={said}: no class counts", "give one a weight above 0")
    return weights


def _weight(text: str, said: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"class_weights={said}: '{text}' is no weight", "write a number from 0, such as cat:2.5")
    return value


def _refuse_several(recipe: Recipe) -> None:
    usual, own = Recipe(), asdict(recipe)
    if wrong := [f"{k}={own[k]}" for k in ("shots", "sampling", "mixup", "cutmix") if own[k] != getattr(usual, k)]:
        raise UsageError(f"images with several labels each can't have {', '.join(wrong)}", "leave it out")


def _few(images: Images, shots: int, seed: int) -> Images:
    """So many of each class, a larger number's among them a smaller one's; all where a class has no more, which is said."""
    if not shots:
        return images
    classes = _by_class(images.labels)
    if short := [f"{images.classes[y]} {len(own)}" for y, own in sorted(classes.items()) if len(own) < shots]:
        talk.say(f"not every class has {shots} images, and all of these are taken: {', '.join(short)}")
    rank = _ranks(images, seed)
    return images.take(sorted(i for own in classes.values() for i in sorted(own, key=rank.__getitem__)[:shots]))


def _fold(train: Images, val: Images, recipe: Recipe) -> tuple[Images, Images]:
    """All but one fold, and that fold, of the images of training and validation together; each has its share of every class."""
    folds, fold = recipe.folds, recipe.fold
    if not folds:
        if fold:
            raise UsageError(f"fold={fold}, but the images are not in folds", "add --set folds=5")
        return train, val
    every = _Joined.of(train, val)
    if folds == 1 or folds > len(every) or fold >= folds:
        seen = f"folds={folds}, fold={fold}, {len(every)} images"
        raise UsageError(
            f"there is no such fold: {seen}", f"folds from 2 to {len(every)}, and fold from 0 to folds - 1"
        )
    rank = _ranks(every, recipe.seed)
    turns = sorted(range(len(every)), key=lambda i: (every.labels[i], rank[i]))
    held = {i for turn, i in enumerate(turns) if turn % folds == fold}
    return every.take(i for i in range(len(every)) if i not in held), replace(every.take(sorted(held)), skipped=())


@dataclass(frozen=True)
class _Joined:
    """Reads the images of two sets by their paths, which differ."""

    first: Images
    second: Images
    own: frozenset[str]

    @classmethod
    def of(cls, first: Images, second: Images) -> Images:
        joined = cls(first, second, frozenset(first.paths))
        return Images(
            classes=first.classes, paths=first.paths + second.paths, labels=first.labels + second.labels,
            identity=joined.identity, load=joined, skipped=first.skipped + second.skipped, where=first.where,
            several=first.several + second.several, exact=first.exact and second.exact,
        )  # fmt: skip

    def __call__(self, path: str) -> Image.Image:
        return (self.first if path in self.own else self.second).load(path)

    def identity(self, paths: Sequence[str]) -> Iterable[str]:
        yield from self.first.identity([p for p in paths if p in self.own])
        yield from self.second.identity([p for p in paths if p not in self.own])


def _by_class(labels: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        found.setdefault(label, []).append(i)
    return found


def _ranks(images: Images, seed: int) -> list[bytes]:
    """A random order of the images by their names, which other images don't change."""
    return [hashlib.sha256(f"{seed}/{path}".encode()).digest() for path in images.paths]
