"""Real images of many tasks, in batches of mixed tasks: what a file of many tasks is verified with beside noise."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtzoo.errors import NotFound, did_you_mean
from vtzoo.onnx.looks import CALIBRATE, LARGEST, Look, looks
from vtzoo.onnx.mixtures import Mixture
from vtzoo.spec import Preprocess, Task


@dataclass(frozen=True, slots=True)
class Gallery:
    """Images by the number of their task, read anew each time."""

    looks: Mapping[int, Look]

    def __len__(self) -> int:
        return sum(len(look.images) for look in self.looks.values())

    def of(self, task: int) -> Iterator[Tensor]:
        """One task's images [3, h, w], as the network takes them."""
        look = self.looks[task]
        return (look.transform(look.images[i][0]) for i in range(len(look.images)))

    def __iter__(self) -> Iterator[Mixture]:
        """Batches of all tasks' images, mixed at random; those of one task in the order of `of`."""
        every = torch.cat([torch.full((len(look.images),), task) for task, look in self.looks.items()])
        order = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
        rows = {task: self.of(task) for task in self.looks}
        for tasks in order.split(LARGEST):
            yield Mixture(torch.stack([next(rows[t]) for t in tasks.tolist()]), tasks)


def gallery(data: str | Mapping[str, str], tasks: Sequence[Task], preprocess: Preprocess) -> Gallery:
    """Open images to verify with.

    Args:
        data: of each task by name, of some or all of them; or the same for all. Labels don't matter.
        tasks: by number.
        preprocess: what becomes of the images.

    Raises:
        NotFound: a task that isn't there, or no such images.
        UsageError: no images.
        Corrupt: a broken one.
    """
    names = [t.name for t in tasks]
    given = dict.fromkeys(names, data) if isinstance(data, str) else data
    if unknown := [n for n in given if n not in names]:
        raise NotFound(f"--data: no task is called '{unknown[0]}'", did_you_mean(unknown[0], names))
    opened = {text: looks(text, preprocess, CALIBRATE)[1] for text in dict.fromkeys(given.values())}
    return Gallery({names.index(n): opened[text] for n, text in given.items()})
