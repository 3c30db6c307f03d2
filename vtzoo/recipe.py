"""Training knobs: one frozen record that `--set`, `--config`, a method's RECIPE and a delta's header share."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a delta, head or student is trained. Values left at None are chosen by method and backbone family.

    With probe_epochs the head is trained alone first, for so many epochs more, and everything from that head on (LP-FT, Kumar
    et al. 2022, arXiv:2202.10054).

    Of each image, `views` augmentations are drawn and shown in turn; with 0 each epoch draws its own. What the frozen layers before
    the first trained one make of few views is computed once and kept on the disk where that pays (cache=auto).

    head_lr is the classifier's rate: lr where that is given, else the linear probe's, however slowly the method learns.

    Validation takes place every `eval_every` epochs and after the last one; `limit` is of training images, `eval_limit` of validation
    and of test images, the same ones whatever the seed; both take as many of each class as there are.

    Units: lr and head_lr per step of the optimiser, warmup (at most half of the training) and patience in epochs, image_size in pixels, limits in images.
    """

    epochs: Annotated[int, Field(ge=0)] = 10
    probe_epochs: Annotated[int, Field(ge=0)] = 0
    lr: Positive | None = None
    head_lr: Positive | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 32
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    min_lr_fraction: Fraction = 0.01
    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    label_smoothing: Fraction = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    ema_decay: Fraction = 0.0
    augment: Literal["none", "flip", "crop", "strong"] = "flip"
    views: Annotated[int, Field(ge=0)] = 0
    cache: Literal["auto", "off"] = "auto"
    image_size: Annotated[int, Field(ge=8)] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    patience: Annotated[int, Field(ge=0)] = 0
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    workers: Annotated[int, Field(ge=0)] = 0
    limit: Annotated[int, Field(ge=0)] = 0
    eval_limit: Annotated[int, Field(ge=0)] = 0
    eval_every: Annotated[int, Field(ge=1)] = 1
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    def __post_init__(self) -> None:
        """Refuse knobs that contradict each other."""
        if self.patience and self.eval_every > 1:
            raise ValueError("patience looks at every epoch: leave eval_every at 1")
