"""Tensors that a network holds under several names, such as the convolutions that CoaT's blocks share.

A delta acts on a module under its first name; a state dict lists all names, so a fold must write every one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain

from torch import nn

from vtzoo.anatomy import Site

ALSO = "also"


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """The further names of every parameter and buffer that has any, by its first."""
    found: dict[int, list[str]] = {}
    for name, value in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        found.setdefault(id(value), []).append(name)
    return {first: others for first, *others in found.values() if others}


def tied(sites: Iterable[Site], others: Mapping[str, list[str]]) -> tuple[Site, ...]:
    """The sites, each with the further names of its own tensors as a fact."""
    made: list[Site] = []
    for site in sites:
        prefix = site.key("")
        own = {n.removeprefix(prefix): more for n, more in others.items() if n.rpartition(".")[0] == site.name}
        made.append(replace(site, facts={**site.facts, ALSO: own}) if own else site)
    return tuple(made)


def further(sites: Iterable[Site]) -> dict[str, list[str]]:
    """What `tied` found, by the full first name."""
    return {site.key(n): more for site in sites for n, more in site.facts.get(ALSO, {}).items()}
