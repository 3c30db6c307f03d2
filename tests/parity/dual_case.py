"""The open_clip model of `clip_case` as a dual encoder here, told the class names, bare or with a perturbed delta."""

from collections.abc import Sequence
from typing import Any

import timm
from torch import Tensor, nn

import vtzoo.dual  # noqa: F401 - registers the architecture
from tests import families
from tests.parity.clip_case import CONFIGS, NAMES, TEMPLATE, made
from vtzoo.clip_config import read
from vtzoo.clip_names import converted
from vtzoo.folding import fold
from vtzoo.graft import tensors_of
from vtzoo.live import extract, inject


def dual(kind: str = "clip", templates: Sequence[str] = (TEMPLATE,)) -> Any:
    """A fresh dual encoder with the weights of `made`, that was told the class names."""
    args = read(CONFIGS[kind])
    model: Any = timm.create_model("clip", **args).double().eval().requires_grad_(False)
    model.load_state_dict(dict(converted(made(kind).state_dict(), args)))
    return model.speak(NAMES, templates)


def taught(
    spec: str, kind: str = "clip", templates: Sequence[str] = (TEMPLATE,)
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A dual encoder with a perturbed delta, and its tensors."""
    model = inject(dual(kind, templates), spec)
    families.perturb(tensors_of(model))
    return model.eval(), {n: t.detach() for n, t in tensors_of(model).items()}


def folded(model: nn.Module, kind: str = "clip") -> nn.Module:
    """The plain image classifier that a delta and its backbone come to."""
    base = {n: t for n, t in dual(kind).state_dict().items() if not n.startswith("clip_head.")}
    found = fold(base, extract(model, task="t"))
    args = {**read(CONFIGS[kind]), **found.all_args, "num_classes": len(NAMES)}
    made: Any = timm.create_model("clip", **args).double().eval()
    made.load_state_dict(dict(found))
    return made
