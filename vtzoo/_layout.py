"""Which images of a tree belong to a split, and which classes they have: by folders, else by a hash of each name."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from vtzoo._images import Contents, Decoder, Images, Tree
from vtzoo.errors import NotFound, UsageError

Split = Literal["train", "val", "test"]
ALIASES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def labelled(tree: Tree, every: list[str], split: Split, side: int) -> Images:
    """One split of a tree whose folders are classes; `every` is all of its images' names.

    Raises:
        UsageError: no class, one class, or splits whose classes differ.
        NotFound: a split layout without this split.
    """
    layout = _layout(every)
    if layout:
        _check_splits({s: {n: n.split("/", 2)[1] for n in names} for s, names in layout.items()}, tree.where)
    else:
        _check_classes({n.split("/", 1)[0] for n in every if "/" in n}, tree.where, loose=len(every))
    names = members(layout, [n for n in every if "/" in n], split, tree.where)
    chosen = {n: n.split("/", 2)[1 if layout else 0] for n in names}
    classes = tuple(sorted({c for s in layout or [""] for c in _names(every, layout, s)}))
    return _images(tree, chosen, classes, side)


def members(layout: Mapping[str, Sequence[str]], every: Sequence[str], split: Split, where: str) -> list[str]:
    """The images of a split: its folder's (a tenth of `train` where there is no `val`), or by a hash of each name.

    Args:
        layout: images by split; empty where no folders say.
        every: all images, where no folders say.
        split: which.
        where: what to call the tree.

    Raises:
        NotFound: a split layout without this split.
    """
    if not layout:
        return [n for n in every if _tenth(n, "train", "val", "test") == split]
    if split in ("train", "val") and "val" not in layout and "train" in layout:
        return [n for n in layout["train"] if _tenth(n, "train", "val", "train") == split]
    if split not in layout:
        raise NotFound(f"{where} has no '{split}' folder", f"it has {', '.join(layout)}")
    return list(layout[split])


def unlabelled(tree: Tree, split: Split, side: int) -> Images:
    """One split of any tree of images, all labels -1; 2 % are held out as `val` where there is no such folder.

    Raises:
        NotFound: `test` is wanted and there is no such folder.
    """
    every = tree.names()
    layout = _layout(every)
    names = layout[split] if split in layout else [n for s in layout for n in layout[s] if s != "test"] or every
    if split not in layout or (split == "train" and "val" not in layout):
        if split == "test":
            raise NotFound(f"{tree.where} has no 'test' folder", "unlabelled images are split into train and val only")
        names = [n for n in names if (_hash(n) % 50 == 0) == (split == "val")]
    return _images(tree, dict.fromkeys(names, ""), (), side)


def _images(tree: Tree, chosen: dict[str, str], classes: tuple[str, ...], side: int) -> Images:
    paths = sorted(chosen)
    place = {c: i for i, c in enumerate(classes)}
    return Images(
        classes=classes,
        paths=tuple(paths),
        labels=tuple(place.get(chosen[n], -1) for n in paths),
        identity=Contents(tree),
        load=Decoder(tree, side),
        where=tree.where,
    )


def _layout(every: list[str]) -> dict[str, list[str]]:
    """Names by split, if the top folders are splits with classes below; empty otherwise."""
    layout: dict[str, list[str]] = {}
    for name in sorted(every):
        split = ALIASES.get(name.split("/", 1)[0].lower(), "")
        if split and name.count("/") >= 2:
            layout.setdefault(split, []).append(name)
    return layout


def _names(every: list[str], layout: dict[str, list[str]], split: str) -> set[str]:
    return {n.split("/", 2)[1] for n in layout[split]} if layout else {n.split("/", 1)[0] for n in every if "/" in n}


def _check_splits(by_split: dict[str, dict[str, str]], where: str) -> None:
    first, *others = by_split
    classes = set(by_split[first].values())
    _check_classes(classes, f"{where}/{first}")
    for other in others:
        differing = sorted(classes ^ set(by_split[other].values()))
        if differing:
            raise UsageError(
                f"{where}: {first} and {other} don't have the same classes ({', '.join(differing[:5])})",
                "give every split one folder, with images, for each class",
            )


def _check_classes(classes: Collection[str], where: str, loose: int = 0) -> None:
    if not classes:
        found = f"{loose} images but no class folders" if loose else "no images"
        raise UsageError(f"{where} holds {found}", "lay images out as CLASS/* or train|val|test/CLASS/*")
    if len(classes) == 1:
        raise UsageError(f"{where} has one class only ({', '.join(classes)})", "a task needs two classes or more")


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _tenth(name: str, most: str, ninth: str, last: str) -> str:
    """80/10/10 by name alone."""
    return {8: ninth, 9: last}.get(_hash(name) % 10, most)
