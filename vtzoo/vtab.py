"""VTAB-1k (Zhai et al. 2019, arXiv:1910.04867): its 19 tasks in three groups, both means, and what others have published.

The mean over 19 tasks weighs each task alike, the mean of three means each group; tables mix them up, and they differ by some points.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

GROUPS: Mapping[str, tuple[str, ...]] = {
    "natural": ("caltech101", "cifar", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397"),
    "specialized": ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
    "structured": (
        "clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori", "smallnorb_azi", "smallnorb_ele",
    ),
}  # fmt: skip
"""Tasks by group, under the names of the folders that research code shares."""
TASKS = frozenset(task for own in GROUPS.values() for task in own)
BENCH, TUNED = "V-PETL Bench (NeurIPS 2024)", "Mai et al. 2024 (arXiv:2409.16434)"
PUBLISHED: Mapping[str, tuple[tuple[float, float, str], ...]] = {
    "full": ((65.57, 69.0, BENCH),),
    "linear": ((52.94, 57.6, BENCH),),
    "adapter": ((71.44, 73.9, BENCH), (73.21, 75.2, TUNED)),
    "vpt-shallow": ((64.85, 67.8, BENCH),),
    "vpt-deep": ((69.43, 72.0, BENCH),),
    "bitfit": ((62.05, 65.2, BENCH), (72.18, 74.5, TUNED)),
    "lora": ((72.25, 74.6, BENCH), (72.91, 75.2, TUNED)),
    "adaptformer": ((72.32, 74.7, BENCH), (73.72, 76.0, TUNED)),
    "ssf": ((73.10, 75.7, BENCH), (72.98, 75.1, TUNED)),
    "noah": ((73.25, 75.5, BENCH),),
    "fact-tt": ((73.67, 75.9, TUNED),),
    "fact-tk": ((73.39, 75.7, TUNED),),
    "repadapter": ((73.84, 76.1, BENCH), (73.56, 75.8, TUNED)),
    "hydra": ((74.21, 76.5, BENCH),),
    "lst": ((71.70, 74.3, BENCH),),
    "dtl": ((74.58, 76.8, BENCH),),
    "gps": ((75.18, 77.5, BENCH),),
    "sct": ((73.59, 76.0, BENCH),),
    "convpass": ((74.23, 76.4, TUNED),),
    "difffit": ((72.03, 74.1, TUNED),),
}
"""By method: mean over 19 tasks and mean of three groups, in per cent, with a ViT-B/16 of ImageNet-21k; the recipe makes much of it."""


@dataclass(frozen=True, slots=True)
class Means:
    """In fractions: over tasks, over groups, and by group."""

    tasks: float
    groups: float
    by_group: Mapping[str, float]


def means(by_task: Mapping[str, float]) -> Means | None:
    """Both means of a method that has all 19 tasks; None where one is missing or another is among them."""
    if set(by_task) != TASKS:
        return None
    own = {group: statistics.fmean(by_task[t] for t in tasks) for group, tasks in GROUPS.items()}
    return Means(statistics.fmean(by_task.values()), statistics.fmean(own.values()), own)
