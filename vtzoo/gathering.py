"""What comes into a network's classifiers when it sees labelled images: features, in evaluation mode."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vtzoo.errors import UsageError
from vtzoo.probing import evaluating
from vtzoo.sensitivity import Batches


@torch.no_grad()
def gathered(model: nn.Module, names: Sequence[str], batches: Batches) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of some modules, [images, width] by name, and the labels [images].

    Args:
        model: any; its modes and torch's random numbers stay as they were.
        names: of modules that get one row for each image.
        batches: inputs and labels [n].

    Raises:
        UsageError: there is no image.
    """
    like, labels = next(model.parameters()), list[Tensor]()
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def note(own: list[Tensor]) -> Callable[..., None]:
        return lambda _, args: own.append(args[0].detach())

    hooks = [model.get_submodule(n).register_forward_pre_hook(note(own)) for n, own in found.items()]
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]):  # loaders draw a seed
            for inputs, classes in batches:
                model(inputs.to(like.device, like.dtype))
                labels.append(classes.to(like.device))
    finally:
        for hook in hooks:
            hook.remove()
    if not labels:
        raise UsageError("there are no labelled images to take features of", "give batches that can be read again")
    return {n: torch.cat(own) for n, own in found.items()}, torch.cat(labels)
