"""Zero-shot: classify by the classes' names alone (Radford et al. 2021, arXiv:2103.00020, section 3.1.2).

    logits = exp(s) f T',   T_c = the mean over templates of text(template with name_c);  f, T normalised

Shapes: none is trained; the classifier is [classes, width of the embeddings].  Folds: exactly, into a linear head over normalised features.
Identity at init: yes (it is where every other method for text towers starts).
Parameters: none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vtzoo.anatomy import Anatomy, Site
from vtzoo.graft import Graft
from vtzoo.methods._language import spoken

GROUP = "prompt/language-driven"
PAPER = "arXiv:2103.00020"
FAMILIES = ("tokens", "maps")
TRAINS = False
__all__ = ["FAMILIES", "GROUP", "PAPER", "TRAINS", "Config", "Graft", "sites"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """No knobs: names and templates belong to the task."""


def sites(anatomy: Anatomy, config: Config) -> Sequence[Site]:  # noqa: ARG001 - there is nothing to place
    """None: the text tower's own classifier is all there is."""
    spoken(anatomy, "zero-shot")
    return ()
