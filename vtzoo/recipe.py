"""Training knobs: one frozen record that `--set`, `--config`, a method's RECIPE and a delta's header share."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from vtzoo import knobs
from vtzoo.presets import preset

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a delta, head or student is trained. Values left at None are chosen by method and backbone family.

    `preset` names the recipe that gives the knobs which nobody set; see `vtzoo.presets`.

    With probe_epochs the head is trained alone first, for so many epochs more, and everything from that head on (LP-FT, Kumar
    et al. 2022, arXiv:2202.10054).

    Of each image, `views` augmentations are drawn and shown in turn; with 0 each epoch draws its own. What the frozen layers before
    the first trained one make of few views is computed once and kept on the disk where that pays (cache=auto).

    Random crops (augment=crop, strong) take `crop_area` of the picture or more; 0 leaves that to `augment`, see `vtzoo.data.transforms`.

    head_lr is the classifier's rate: lr where that is given, else the linear probe's, however slowly the method learns.

    `drop_path` is the backbone's stochastic depth: the last block is left out for so many images, those before it for fewer (Huang
    et al. 2016, arXiv:1603.09382). framing=squash shows the whole picture, resized to the input's shape, in place of the checkpoint's
    own resizing and crop; the delta keeps it.

    With `layer_decay` each layer learns at that share of the rate of the one above it (`vtzoo.layerwise`). `sampling`, `class_weights`,
    `shots` (of each class), and `fold` of `folds` say which images are seen, how often, and how much they count (`vtzoo.sampling`).
    classes=base trains on the first half of the classes alone, so that the others can show how it generalises (`vtzoo.portions`).
    train_on=train+val trains on the validation images, too, once the knobs are chosen, and measures the test images alone.

    In several processes (torchrun), batch_size is of all together; each keeps the whole frozen network (parallel=ddp) or a part (fsdp).

    With `checkpointing` (of activations, not of the run) the backward pass computes each block again: one forward pass more, and of
    activations each block's input alone is kept; with `compile` blocks run through torch.compile while training (`vtzoo.blocks`).

    Validation takes place every `eval_every` epochs and after the last one; `limit` is of training images, `eval_limit` of validation
    and of test images, the same ones whatever the seed; both take as many of each class as there are. eval_on=val leaves the test images
    alone, as a search for knobs should; eval_on=test spares the validation where nothing is chosen by it.

    Units: lr and head_lr per step of the optimiser, warmup (at most half of the training) and patience in epochs, image_size in pixels, limits in images.
    """

    preset: str = "default"
    epochs: Annotated[int, Field(ge=0)] = 10
    probe_epochs: Annotated[int, Field(ge=0)] = 0
    lr: Positive | None = None
    head_lr: Positive | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
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
    crop_area: Fraction = 0.0
    framing: Literal["own", "squash"] = "own"
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    views: Annotated[int, Field(ge=0)] = 0
    cache: Literal["auto", "off"] = "auto"
    image_size: Annotated[int, Field(ge=8)] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    patience: Annotated[int, Field(ge=0)] = 0
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    workers: Annotated[int, Field(ge=0)] = 0
    limit: Annotated[int, Field(ge=0)] = 0
    eval_limit: Annotated[int, Field(ge=0)] = 0
    eval_every: Annotated[int, Field(ge=1)] = 1
    eval_on: Literal["val", "test", "val+test"] = "val+test"
    shots: Annotated[int, Field(ge=0)] = 0
    classes: Literal["all", "base", "new"] = "all"
    folds: Annotated[int, Field(ge=0)] = 0
    fold: Annotated[int, Field(ge=0)] = 0
    train_on: Literal["train", "train+val"] = "train"
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    class_weights: str = "none"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        """Refuse knobs that contradict each other, and a preset that there isn't."""
        preset(self.preset)
        if self.patience and self.eval_every > 1:
            raise ValueError("patience looks at every epoch: leave eval_every at 1")
        if self.patience and not self.validates:
            raise ValueError("patience looks at validation images, and none are measured")
        if self.train_on == "train+val" and self.folds:
            raise ValueError("train_on=train+val leaves no validation images for folds")

    @property
    def validates(self) -> bool:
        """Whether validation images are measured."""
        return self.train_on == "train" and self.eval_on != "test"


def read(user: Mapping[str, Any], methods: Sequence[tuple[str, str]]) -> Recipe:
    """The recipe of what a user set, over the knobs of the preset among it.

    Args:
        user: knobs, as text or values.
        methods: name and group of each method of the stack, by which presets choose a learning rate.

    Raises:
        NotFound: no such preset.
        UsageError: unknown knobs or wrong values.
    """
    chosen = preset(str(user.get("preset", "default")))
    found = knobs.decode(Recipe, {**chosen.over(methods), **user}, "recipe")
    assert isinstance(found, Recipe)
    return found


def facts_of(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of the result.

    How the work is shared out, and what is computed once or twice, is none of it: a run may go on in more processes, or with less memory.
    """
    without = {"parallel", "checkpointing", "workers", "cache"} | (set() if recipe.compile else {"compile"})
    return {k: v for k, v in asdict(recipe).items() if k not in without}
