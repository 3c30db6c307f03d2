"""What a merge can learn from a task's images: the Gram of each matrix's inputs, or how much each weight matters.

Both look at a plain model, the task's own delta folded in, and need no labels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vtzoo.probing import evaluating

Batches = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def grams(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """X' X [in * kh * kw] of all inputs X of every linear and dense convolution, by the weight's name.

    Seen is any product with the very weight, whatever module makes it; weights that are changed before they are used
    (weight standardisation) have none. Over the number of images, in float32; the model's modes stay as they were.

    Args:
        model: a plain network.
        batches: (images [n, 3, h, w], anything).
    """
    found: dict[str, Tensor] = {}
    like, count = next(model.parameters()), 0

    def add(name: str, seen: Tensor) -> None:
        rows = seen.reshape(-1, seen.shape[-1]).float()
        gram = rows.mT @ rows
        found[name] = found[name] + gram if name in found else gram

    with evaluating(model), Products({id(p): n for n, p in model.named_parameters()}, add):
        for images, _ in batches:
            model(images.to(like.device, like.dtype))
            count += len(images)
    return {n: g.div_(max(count, 1)).cpu() for n, g in found.items()}


class Products(TorchFunctionMode):
    """While active, what every linear map and convolution by one of some weights is about to multiply is shown first.

    Args:
        names: of the weights, by `id`.
        show: gets a weight's name and its inputs as rows, [images, ..., in * kh * kw].
    """

    def __init__(self, names: Mapping[int, str], show: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._names, self._show = names, show

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Look at the arguments, and let the function do its work."""
        given = kwargs or {}
        if (look := _ROWS.get(function)) is not None:
            name, seen = look(self._names, *args, **given)
            if seen is not None:
                self._show(name, seen)
        return function(*args, **given)


Seen = tuple[str, Tensor | None]


def _linear(names: Mapping[int, str], input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Seen:  # noqa: A002 - torch's word
    name = names.get(id(weight), "")
    return name, input if name else None


def _conv(
    names: Mapping[int, str], input: Tensor, weight: Tensor, bias: Tensor | None = None,  # noqa: A002, ARG001 - as torch has them
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Seen:  # fmt: skip
    name = names.get(id(weight), "")
    if not name or groups > 1 or isinstance(padding, str):
        return name, None
    columns = F.unfold(input, weight.shape[2:], dilation=dilation, padding=padding, stride=stride)
    return name, columns.mT


_ROWS: dict[Callable[..., Any], Callable[..., Seen]] = {F.linear: _linear, F.conv2d: _conv}


def fisher(model: nn.Module, batches: Batches, seed: int = 0) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of every parameter, by name: the mean squared gradient of log p(y | x).

    y is drawn from the model's own prediction for x, one draw an image. The model's modes, flags and gradients stay as they
    were.

    Args:
        model: a plain network with its task's head.
        batches: (images [n, 3, h, w], anything).
        seed: of the draws.
    """
    named, like = dict(model.named_parameters()), next(model.parameters())
    flags, draw, count = {n: p.requires_grad for n, p in named.items()}, torch.Generator().manual_seed(seed), 0
    found = {n: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for n, p in named.items()}
    try:
        model.requires_grad_()
        with evaluating(model), torch.enable_grad():
            for image in (x for images, _ in batches for x in images.to(like.device, like.dtype).split(1)):
                logs = model(image).float().log_softmax(-1)
                label = int(torch.multinomial(logs[0].detach().exp().cpu(), 1, generator=draw))
                slopes = torch.autograd.grad(logs[0, label], list(named.values()), allow_unused=True)
                for name, slope in zip(named, slopes, strict=True):
                    if slope is not None:
                        found[name] += slope.float().square()
                count += 1
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(flags[name])
    return {n: f.div_(max(count, 1)).cpu() for n, f in found.items()}
