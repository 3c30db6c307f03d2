"""Splits that are lists of files with labels, as VTAB-1k is usually laid out, with a folder for each task.

    train800.txt  val200.txt  test.txt        images/train/0001.jpg 5

Names count from the folder, labels are numbers from 0. `train800val200.txt`, which the two add up to, isn't read.
"""

from collections.abc import Mapping

from vtzoo._images import Contents, Decoder, Images, Tree
from vtzoo._layout import Split
from vtzoo.errors import Corrupt, NotFound

LISTS: dict[Split, str] = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}


def listed(tree: Tree, split: Split, side: int) -> Images | None:
    """One split of a tree that has such lists; None where it has none.

    Raises:
        NotFound: some lists are there, and this split's isn't.
        Corrupt: a line is no name and number, an image is listed twice, or there is none.
    """
    found: dict[Split, dict[str, int]] = {
        s: rows for s, name in LISTS.items() if (rows := _rows(tree, name)) is not None
    }
    if not {"train", "val"} & found.keys():
        return None
    if split not in found:
        raise NotFound(
            f"{tree.where} has no {LISTS[split]}", f"it has {', '.join(n for s, n in LISTS.items() if s in found)}"
        )
    _check(found, tree)
    count = 1 + max((label for rows in found.values() for label in rows.values()), default=-1)
    paths = tuple(sorted(found[split]))
    return Images(
        classes=tuple(str(i) for i in range(count)),
        paths=paths,
        labels=tuple(found[split][p] for p in paths),
        identity=Contents(tree, {p: str(label) for p, label in found[split].items()}),
        load=Decoder(tree, side),
        where=tree.where,
    )


def _check(lists: Mapping[Split, Mapping[str, int]], tree: Tree) -> None:
    """Refuse images that stand in two lists, which would be measured on what they were trained on, or nowhere."""
    splits, there = list(lists), set(tree.names())
    for i, split in enumerate(splits):
        for other in splits[i + 1 :]:
            if shared := sorted(lists[split].keys() & lists[other].keys()):
                names = f"{LISTS[split]} and {LISTS[other]}"
                raise Corrupt(
                    f"{tree.where}: {names} share {len(shared)} images, first {shared[0]}", "leave each in one"
                )
        if missing := sorted(lists[split].keys() - there):
            what = f"{LISTS[split]} has {len(missing)} images that aren't there, first {missing[0]}"
            raise Corrupt(f"{tree.where}: {what}", "names count from the folder of the lists")


def _rows(tree: Tree, name: str) -> dict[str, int] | None:
    """Label by file; None where there is no such list."""
    try:
        lines = tree.read(name).decode().splitlines()
    except (FileNotFoundError, IsADirectoryError, KeyError):  # a zip's has a name or not
        return None
    except UnicodeDecodeError as error:
        raise Corrupt(f"{tree.where}: {name} is not text ({error})", "write lines such as images/1.jpg 5") from error
    found: dict[str, int] = {}
    for line in filter(str.strip, lines):
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal():
            raise Corrupt(f"{tree.where}: {name} has a line '{line}'", "write lines such as images/1.jpg 5")
        if path.strip() in found:
            raise Corrupt(f"{tree.where}: {name} has {path.strip()} twice", "leave one line")
        found[path.strip()] = int(label)
    return found
