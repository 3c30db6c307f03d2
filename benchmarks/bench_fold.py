"""How equal a fold is: every foldable method on six families at real size, attached against folded and reloaded by timm.

    python benchmarks/bench_fold.py

A delta's tensors are drawn at random (a delta at its initial values would change nothing and prove nothing), and so are
the norms, biases and layer scales of a backbone without real weights (many start with branches at zero, where a wrong
fold would look right). Printed: the largest difference of the logits on four random images, float32, relative to the
largest logit, and how far the delta moves them from the bare backbone with the same head. Writes results/fold.json.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from _results import keep
from safetensors.torch import save_file
from torch import Tensor, nn

from vtzoo import registry
from vtzoo.artifact import resolved_card
from vtzoo.backbone import build_card
from vtzoo.errors import DeadTarget, NotFoldable, UsageError
from vtzoo.identity import CARD
from vtzoo.installed import head_state
from vtzoo.live import extract, inject, trainable
from vtzoo.spec import Task
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.fold import fold_ref
from vtzoo.zoo import Zoo

FAMILIES = {
    "ViT": "vit_tiny_patch16_224",
    "Swin V2": "swinv2_tiny_window8_256",
    "BEiT": "beit_base_patch16_224",
    "ConvNeXt": "convnext_atto",
    "ResNet": "resnet18",
    "EfficientNet": "tf_efficientnet_lite0",
}
STEP = 0.02
PROMPTED = ("pixel-prompt", "vpt-deep", "vpt-shallow")
PROMPTS = 1.0  # the step of tokens and pixels, whose neighbours are that large
ANY = 1e9  # no tolerance: the figure is what is wanted


def cells() -> Iterator[tuple[str, str, dict[str, Any] | str]]:
    """(family, method, {"max_abs", "max_rel"} or why it does not fold)."""
    for family, arch in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            zoo = Zoo.init(Path(folder) / "zoo")
            name = backbone(arch, zoo)
            for method in registry.names("methods"):
                yield family, method, cell(name, method, zoo, Path(folder))


def backbone(arch: str, zoo: Zoo) -> str:
    """The package's own weights, or random ones of this architecture."""
    if arch == "tf_efficientnet_lite0":
        return arch
    torch.manual_seed(0)
    path = zoo.root / "weights.safetensors"
    save_file(drawn(timm.create_model(arch, num_classes=0)).state_dict(), path)
    add_backbone(name="net", arch=arch, weights=path, zoo=zoo)
    path.unlink()
    return "net"


@torch.no_grad()
def drawn(model: nn.Module) -> nn.Module:
    """Every vector at random: scales and variances in [0.5, 1.5], the rest around zero."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.ndim == 1 and value.is_floating_point():
            positive = name.endswith(("weight", "running_var")) or "gamma" in name
            value.uniform_(0.5, 1.5) if positive else value.normal_(std=0.1)
    return model


def cell(name: str, method: str, zoo: Zoo, folder: Path) -> dict[str, Any] | str:
    """Fold one method's delta."""
    card = resolved_card(name, zoo)
    torch.manual_seed(0)
    model = build_card(card, zoo=zoo, num_classes=10)
    try:
        inject(model, method)
    except (UsageError, DeadTarget) as error:
        return f"does not apply: {error}"
    head = set(head_state(model))
    x = torch.randn(2, *card.preprocess.input_size)
    with torch.no_grad():
        shift(v for n, v in trainable(model).items() if n in head)
        bare = model.eval()(x)
        shift((v for n, v in trainable(model).items() if n not in head), PROMPTS if method in PROMPTED else STEP)
        moved = ((model(x) - bare).abs().max() / bare.abs().max()).item()
    task = Task(name="task", classes=tuple("0123456789"), preprocess=card.preprocess)
    path = folder / "delta.safetensors"
    extract(model, tasks=[task], backbone=getattr(model, CARD)).save(path)
    out = folder / method
    try:
        report = fold_ref(ref=str(path), out=out, zoo=zoo, tolerance=ANY).report
    except NotFoldable as error:
        return f"refused: {error}"
    return {"moved": moved, **{k: report[k] for k in ("max_abs", "max_rel", "tensors")}}


def shift(values: Iterable[Tensor], step: float = STEP) -> None:
    """Add noise."""
    for value in values:
        value.add_(torch.randn_like(value), alpha=step)


def main() -> None:
    """Print rows as they come and keep them."""
    found: dict[str, dict[str, Any]] = {}
    for family, method, result in cells():
        found.setdefault(family, {})[method] = result
        line = result if isinstance(result, str) else f"{result['max_rel']:.1e} (moved {result['moved']:.2f})"
        print(f"{family:14}{method:14}{line}", flush=True)
    methods = [m for m in registry.names("methods") if any(isinstance(found[f][m], dict) for f in found)]
    rows = [[family, *(shown(found[family][m]) for m in methods)] for family in found]
    keep(__doc__ or "", "largest difference, relative to the largest logit", ["", *methods], rows, found)


def shown(result: dict[str, Any] | str) -> str:
    """A figure, or nothing where the method doesn't fold."""
    return "" if isinstance(result, str) else f"{result['max_rel']:.1e}"


if __name__ == "__main__":
    main()
