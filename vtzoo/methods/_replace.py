"""Shared by the methods that train copies of the backbone's own parameters."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import Before, Graft, Scores, stored


def chosen(anatomy: Anatomy, targets: Iterable[str]) -> set[str]:
    """Parameters by full name: of each target those that it names or fits as a glob, else those of the layers that it names."""
    found: set[str] = set()
    for target in targets:
        hits = {n for n in anatomy.parameter_names if n == target or ("*" in target and fnmatchcase(n, target))}
        if not hits:
            owners = {s.name for s in anatomy.select([target], [*anatomy.linears, *anatomy.convs, *anatomy.norms])}
            hits = {n for n in anatomy.parameter_names if n.rpartition(".")[0] in owners}
        found |= hits
    return found


class Replace(Graft):
    """Copies of some of a module's parameters, read in their stead; of its running statistics too, where the site lists them.

    In a stack, what is replaced is the backbone's value: earlier parts keep their effect,
    p' = before + (copy - base).
    """

    calls = False
    replaces = True

    def __init__(self, site: Site, config: object = None) -> None:  # noqa: ARG002 - every graft takes both
        super().__init__()
        shapes: dict[str, list[int]] = site.facts["params"]
        statistics: dict[str, list[int]] = site.facts.get("buffers", {})
        self.edits = (*shapes, *statistics)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        for name, shape in statistics.items():
            self.register_buffer(name, torch.zeros(shape))

    def start(self, host: nn.Module, scores: Scores) -> None:  # noqa: ARG002 - the interface
        """Copy the host's values."""
        for name in self.edits:
            getattr(self, name).data.copy_(stored(host, name))

    def read(self, name: str, before: Before) -> Tensor:
        """The copy; on top of an earlier part, before + (copy - base)."""
        copy, base, now = getattr(self, name), before.base(name), before[name]
        return copy if now is base else now + (copy - base)
