"""A file of another runtime where a network of torch would stand: images in, logits out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo.spec import Preprocess

Begin = Callable[[Tensor, Tensor | None], Callable[[], Any]]
"""Images as the file takes them, and each one's task where there are many, to the runtime's own call, ready to be made: what is timed."""


class Shipped(nn.Module):
    """Called as the network that the file was made from: normalised float32 [n, 3, h, w] in, float32 [n, outputs] out.

    Where the file takes pictures, they are made again of the normalised values: these were whole numbers from 0 to 255, so
    rounding gives back the very ones. A file of many tasks is called for one of them, by number, and gives that one's classes.

    Attributes:
        form: the runtime's name.
    """

    def __init__(
        self, form: str, begin: Begin, preprocess: Preprocess, *, embedded: bool, task: int | None = None, classes: int | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.form, self.begin, self.embedded, self.task, self.classes = form, begin, embedded, task, classes
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or features of a backbone without a head."""
        return torch.as_tensor(self.bare(x)()).float()[:, : self.classes]

    def bare(self, x: Tensor, tasks: Tensor | None = None) -> Callable[[], Any]:
        """The runtime's own run on these images, ready to be called: what its time is measured by.

        `tasks` [n] gives each image's own, where there are many.
        """
        given = _pictures(x, self.mean, self.std) if self.embedded else x.float().contiguous()
        if tasks is None and self.task is not None:
            tasks = torch.full((len(x),), self.task)
        return self.begin(given, tasks)


def _pictures(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised [n, 3, h, w] back to uint8 [n, h, w, 3]."""
    return ((x * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
