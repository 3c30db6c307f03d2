"""Recipes by name: training knobs that belong together, with where they are from, their checkpoint and how they choose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtzoo.errors import NotFound, did_you_mean

HEADS = "fine-tuning/head"
"""The group of the methods that train nothing but a head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A recipe.

    Attributes:
        about: what it is for.
        source: where its numbers are from.
        checkpoint: the weights that those who publish it start from; empty where it is of none.
        departs: what is done otherwise here.
        knobs: of `vtzoo.recipe.Recipe`; what is not in it keeps its default.
        rates: peak learning rates by method, by its group ("parameter/bias") or the group's first word; others keep their own.
        heads: knobs over those, where nothing but a head is trained.
        normalisation: of the pixels.
        selection: which weights are kept.
    """

    about: str
    source: str
    checkpoint: str = ""
    departs: str = ""
    knobs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rates: Mapping[str, float] = field(default_factory=dict[str, float])
    heads: Mapping[str, Any] = field(default_factory=dict[str, Any])
    normalisation: str = "the checkpoint's own mean and standard deviation"
    selection: str = "the last epoch; the test images are looked at once, at the end"

    def over(self, methods: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Its knobs for a stack of methods, each a name and a group; of several learning rates the lowest."""
        bodies = [(name, group) for name, group in methods if group != HEADS]
        if not bodies:
            return {**self.knobs, **self.heads}
        rates = [self._rate(*each) for each in bodies]
        return {**self.knobs, **({"lr": min(r for r in rates if r)} if all(rates) else {})}

    def _rate(self, name: str, group: str) -> float | None:
        return next((self.rates[k] for k in (name, group, group.partition("/")[0]) if k in self.rates), None)


_SHARED: dict[str, Any] = {
    "epochs": 100, "batch_size": 64, "warmup_epochs": 10.0, "weight_decay": 1e-4, "drop_path": 0.1, "patience": 0,
    "optimizer": "adamw", "clip_norm": 0.0,
}  # fmt: skip
_PLUS: dict[str, Any] = {**_SHARED, "min_lr_fraction": 1e-3, "label_smoothing": 0.0}
_RATES = {"adapter": 1e-3, "parameter": 1e-3, "prompt": 1e-2, "ssf": 1e-2, "bitfit": 1e-2, "norm": 1e-2, "noah": 1e-3}
_ORIGINAL = "vit_base_patch16_224.orig_in21k"
_CROPS: dict[str, Any] = {
    "warmup_epochs": 1.0, "min_lr_fraction": 0.0, "augment": "crop", "crop_area": 0.08, "shots": 16, "patience": 0, "clip_norm": 0.0,
}  # fmt: skip
"""What CoOp's data and schedule have in common with all that is built on its code."""
_COOP: dict[str, Any] = {**_CROPS, "epochs": 200, "batch_size": 32, "weight_decay": 5e-4, "optimizer": "sgd"}
_STEPWISE = "the rate changes with each step, not each epoch, and warms up from a hundredth of it, not at 1e-5"
_SGD = f"{_STEPWISE}; Nesterov's momentum; float32 where the code has fp16"
_BY_SHOTS = "the published epochs are 50 for 1 shot, 100 for 2 and 4, 200 for 8 and 16: say --epochs with --set shots"
_RESNET, _VIT = "clip:RN50.openai", "clip:ViT-B-16.openai"

PRESETS: Mapping[str, Preset] = {
    "default": Preset(
        about="any task: the defaults of the knobs, learning rate and weight decay by method",
        source="this project's measurements",
    ),
    "vtab": Preset(
        about="VTAB-1k: 1,000 images of a task, resized and no more",
        source="Steitz & Roth 2024 (Adapter+, arXiv:2406.06820); 1e-2 for prompts, SSF, BitFit and norms from the grid of Mai et al. "
        "2024 (arXiv:2409.16434)",
        checkpoint=_ORIGINAL,
        knobs={**_PLUS, "augment": "none", "framing": "squash"},
        rates=_RATES,
        heads={"drop_path": 0.0},
        departs="heads alone are trained without stochastic depth, so that the backbone runs once",
    ),
    "fgvc": Preset(
        about="fine-grained classes, some thousand images",
        source="Steitz & Roth 2024 (Adapter+, arXiv:2406.06820), with the rates of vtab",
        checkpoint=_ORIGINAL,
        knobs={**_PLUS, "augment": "crop", "crop_area": 0.08},
        rates=_RATES,
        heads={"drop_path": 0.0},
        departs="heads alone are trained without stochastic depth",
    ),
    "few-shot": Preset(
        about="16 images of each class; --set shots=4 for another number",
        source="Zhang et al. 2022 (NOAH, arXiv:2206.04673), its scripts for LoRA, adapters and VPT",
        checkpoint=_ORIGINAL,
        knobs={
            **_SHARED,
            "min_lr_fraction": 2e-3,
            "label_smoothing": 0.1,
            "augment": "strong",
            "crop_area": 0.08,
            "shots": 16,
        },
        rates={"adapter": 5e-3, "parameter": 5e-3, "prompt": 5e-3},
        heads={"drop_path": 0.0},
        departs="the checkpoint's normalisation where the scripts have ImageNet's; no mixup and cutmix, for which few images make no whole batch; heads "
        "alone without stochastic depth",
    ),
    "coop": Preset(
        about="prompts of the text tower (coop, prograd, plot), upt and clip-adapter, 16 images of each class",
        source="Zhou et al. 2022 (CoOp, arXiv:2109.01134), its code for few shots",
        checkpoint=_RESNET,
        knobs={**_COOP, "lr": 2e-3},
        departs=f"{_BY_SHOTS}; {_SGD}",
    ),
    "kgcoop": Preset(
        about="kgcoop, from known classes to new ones",
        source="Yao et al. 2023 (KgCoOp, arXiv:2303.13283), its code from base classes to new ones",
        checkpoint=_VIT,
        knobs={**_COOP, "lr": 2e-3, "epochs": 100, "batch_size": 128},
        departs=_SGD,
    ),
    "cocoop": Preset(
        about="cocoop, from known classes to new ones",
        source="Zhou et al. 2022 (CoCoOp, arXiv:2203.05557), its code",
        checkpoint=_VIT,
        knobs={**_COOP, "lr": 2e-3, "epochs": 10, "batch_size": 1},
        departs=_SGD,
    ),
    "maple": Preset(
        about="prompts of both towers, maple and vl-prompt, from known classes to new ones",
        source="Khattak et al. 2023 (MaPLe, arXiv:2210.03117), its code from base classes to new ones",
        checkpoint=_VIT,
        knobs={**_COOP, "lr": 3.5e-3, "epochs": 5, "batch_size": 4},
        departs=f"{_SGD}; from one data set to others the code has --lr 2.6e-3 --epochs 2",
    ),
    "task-residual": Preset(
        about="task-residual, 16 images of each class",
        source="Yu et al. 2023 (TaskRes, arXiv:2211.10277), its code",
        checkpoint=_RESNET,
        knobs={**_COOP, "lr": 2e-3, "batch_size": 256, "optimizer": "adamw"},
        departs=f"AdamW where the code has Adam with weight decay in the gradient; 100 epochs for 1, 2 and 4 shots: say --epochs; {_STEPWISE}",
    ),
    "tip-adapter": Preset(
        about="caches of features that are trained, tip-adapter-f and ape, 16 images of each class",
        source="Zhang et al. 2022 (Tip-Adapter, arXiv:2207.09519), its code",
        checkpoint=_RESNET,
        knobs={
            **_CROPS,
            "lr": 1e-3,
            "head_lr": 1e-3,
            "epochs": 20,
            "batch_size": 256,
            "weight_decay": 1e-2,
            "warmup_epochs": 0.0,
            "crop_area": 0.5,
            "optimizer": "adamw",
        },
        departs="AdamW's own eps of 1e-8, not 1e-4; the last epoch is kept, where the code keeps the one that is best on the test images",
    ),
    "clip-lora": Preset(
        about="lora[rank=2,alpha=1,rs=true,dropout=0.25,targets=qkv|text.qkv] on both towers, 16 images of each of 100 classes",
        source="Zanella & Ben Ayed 2024 (CLIP-LoRA, arXiv:2405.18541), its code",
        checkpoint=_VIT,
        knobs={
            **_CROPS,
            "lr": 2e-4,
            "epochs": 160,
            "batch_size": 32,
            "weight_decay": 1e-2,
            "min_lr_fraction": 5e-3,
            "warmup_epochs": 0.0,
            "optimizer": "adamw",
        },
        departs="epochs where the code counts 500 steps for each shot, so of n classes 16,000 / n epochs: say --epochs; float32 where it has fp16",
    ),
}


def preset(name: str) -> Preset:
    """The recipe of that name.

    Raises:
        NotFound: there is none.
    """
    if name not in PRESETS:
        close, known = did_you_mean(name, PRESETS), f"known: {', '.join(sorted(PRESETS))}"
        raise NotFound(f"no recipe is called '{name}'", close if close == known else f"{close} {known}")
    return PRESETS[name]
