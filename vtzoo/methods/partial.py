"""Partial fine-tuning: train the last blocks and what follows them (Yosinski et al. 2014, arXiv:1411.1792).

    p -> p'   for the parameters of the last `blocks` blocks and of everything between them and the head

Shapes: as the backbone's parameters; stored as replacements.  Folds: exactly.  Identity at init: yes.
Parameters: those of the last blocks and of the final norm; of them those that `targets` names.
Departs from the paper: counted from the end as in VPT's Partial-k (arXiv:2203.12119): on a convolutional network a
block is one residual unit, and a convolution between the last of them and the head counts as following.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from vtzoo.anatomy import Anatomy, Site
from vtzoo.errors import UsageError
from vtzoo.methods._replace import Replace as Graft
from vtzoo.methods._replace import chosen

GROUP = "fine-tuning/partial"
PAPER = "arXiv:1411.1792"
RECIPE = {"tokens": {"lr": 1e-3, "weight_decay": 1e-2}, "maps": {"lr": 1e-3, "weight_decay": 1e-2}}
__all__ = ["GROUP", "PAPER", "RECIPE", "Config", "Graft", "sites"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Knobs.

    Attributes:
        blocks: how many, from the end.
        targets: which of their parameters: a glob over full names, or a role or name of the layers that own them.
    """

    blocks: Annotated[int, Field(ge=1)] = 1
    targets: tuple[str, ...] = ("*",)


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:
    """Every module with chosen parameters from the first of the last blocks on, the head left out."""
    blocks = [b.name for b in anatomy.blocks]
    if config.blocks > len(blocks):
        raise UsageError(f"blocks={config.blocks}, but this backbone has {len(blocks)} blocks", "lower it, or use full")
    last = f"{blocks[-1]}."
    names = anatomy.parameter_names
    after = max(i for i, n in enumerate(names) if n.startswith(last))
    inside = tuple(f"{b}." for b in blocks[-config.blocks :])
    late = {n for i, n in enumerate(names) if i > after or n.startswith(inside)}
    if not late & (wanted := chosen(anatomy, config.targets)):
        raise UsageError(
            f"targets={'|'.join(config.targets)} names nothing in the last {config.blocks} blocks", "raise blocks"
        )
    return anatomy.params(late & wanted)
