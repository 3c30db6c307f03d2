"""Shared by the methods that train copies of the backbone's own parameters."""

import torch
from torch import Tensor, nn

from vtzoo.anatomy import Site
from vtzoo.graft import Before, Graft, stored


class Replace(Graft):
    """Copies of some of a module's parameters, read in their stead.

    In a stack, what is replaced is the backbone's value: earlier parts keep their effect,
    p' = before + (copy - base).
    """

    calls = False

    def __init__(self, site: Site, config: object = None) -> None:  # noqa: ARG002 - every graft takes both
        super().__init__()
        shapes: dict[str, list[int]] = site.facts["params"]
        self.edits = tuple(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def start(self, host: nn.Module) -> None:
        """Copy the host's values."""
        for name in self.edits:
            getattr(self, name).data.copy_(stored(host, name))

    def read(self, name: str, before: Before) -> Tensor:
        """The copy; on top of an earlier part, before + (copy - base)."""
        copy, base, now = self._parameters[name], before.base(name), before[name]
        assert copy is not None
        return copy if now is base else now + (copy - base)
