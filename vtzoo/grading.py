"""How a student does beside its teachers: what it keeps of their accuracy, how often it says the same, and what it costs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vtzoo.probing import evaluating
from vtzoo.score import brief, measure


def graded(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is measured of a student and of its teachers on the same images.

    Beside what `vtzoo eval` measures the student has `retention`, its top-1 over theirs; `agreement`, the share of images on which both
    decide the same (Stanton et al. 2021, arXiv:2106.05945); and `kl`, KL(teacher || student) in nats, mean over the images.

    Args:
        student: logits [n, classes].
        teacher: the same of the teachers together.
        labels: [n].
    """
    ours, theirs = brief(measure(student, labels)), brief(measure(teacher, labels))
    same = (student.argmax(-1) == teacher.argmax(-1)).double().mean().item()
    apart = F.kl_div(student.double().log_softmax(-1), teacher.double().log_softmax(-1), reduction="batchmean", log_target=True)  # fmt: skip
    kept = ours["top1"] / theirs["top1"] if theirs["top1"] else None
    more = {"retention": kept, "agreement": same, "kl": apart.item()}
    return {**ours, **{k: v if v is None else round(v, 4) for k, v in more.items()}}, theirs


def cost(model: nn.Module, size: tuple[int, int, int]) -> dict[str, int]:
    """A network's parameters, and the multiply-adds of one image of this size by torch's own count.

    Convolutions and matrix products are counted, attention's among them; norms, activations and additions are not.
    """
    like = next(model.parameters())
    x = torch.zeros(1, *size, device=like.device, dtype=like.dtype)
    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(x)
    return {"params": sum(p.numel() for p in model.parameters()), "macs": counted.get_total_flops() // 2}


def lines(metrics: Mapping[str, Mapping[str, Any]], tasks: list[str]) -> list[dict[str, Any]]:
    """A report's table: a line for each task."""
    found: list[dict[str, Any]] = []
    for task in tasks:
        own = metrics[task]
        line = {
            "task": task,
            "images": own["images"],
            "top1": own["top1"],
            "teacher": metrics[f"{task} (teacher)"]["top1"],
        }
        if alone := metrics.get(f"{task} (no teacher)"):
            line["no_teacher"] = alone["top1"]
        found.append(line | {k: own[k] for k in ("retention", "agreement", "kl", "ece")})
    return found
