"""Half of a task's classes, for measuring on classes that a training has not seen (base to new; Zhou et al. 2022, arXiv:2203.05557, 4.1).

The classes in the order of their labels: the first half, rounded up, is "base", the rest is "new".
"""

from typing import Literal

from vtzoo._images import Images
from vtzoo.errors import UsageError

Which = Literal["all", "base", "new"]


def portion(images: Images, which: Which) -> Images:
    """The images of these classes, and only these classes.

    Raises:
        UsageError: there are too few classes, or images with several labels each.
    """
    if which == "all":
        return images
    count = len(images.classes)
    if images.several or count < 4:
        why = "images with several labels" if images.several else f"{count} classes"
        raise UsageError(f"{images.where} has {why}, of which there is no half to learn from", "leave classes at all")
    first = (count + 1) // 2
    wanted = range(first) if which == "base" else range(first, count)
    found = images.take(i for i, label in enumerate(images.labels) if label in wanted)
    found.classes = tuple(images.classes[i] for i in wanted)
    found.labels = tuple(label - wanted.start for label in found.labels)
    return found


def harmonic(base: float, new: float) -> float:
    """The harmonic mean of two scores; 0 where one is 0."""
    return 2 * base * new / (base + new) if base * new else 0.0
