"""Many tasks in one network give each image what its own network gives it, whatever the method and the family.

`make test` has a few pairs; `make test-all` every method on its families, and the basic methods together on every family.
"""

import pytest
import torch
from torch import Tensor, nn

from tests import families
from tests.contract.cases import BASIC, FAMILIES, METHODS, STACKS, SUPPORT, VARIANTS, WORKS, case, marked
from vtzoo.classifier import head_names
from vtzoo.live import attach
from vtzoo.mixing import Member, Mixed

PAD = -1e30
QUICK = {
    ("vpt-deep", "vit"), ("vpt-shallow", "vit"), ("bitfit", "beit"), ("full", "resnet"), ("lora", "swinv2"), ("dtl", "vit"), ("vqt", "vit"),
    ("conv-adapter", "convnext"), ("pixel-prompt", "vit"), ("mlp-head", "vit"), ("adaptformer", "swin"), ("lst", "resnet"),
}  # fmt: skip
PAIRS = sorted(
    {(m, f) for m in METHODS for f in ("vit", "swin", "beit", "resnet", "convnext") if SUPPORT[m].get(f) in WORKS}
    | {(s, fs[0]) for s, fs in VARIANTS.items()}
    | {(s, "vit") for s in STACKS}
    | QUICK
)


@pytest.mark.parametrize(("spec", "family"), [marked(s, f, (s, f) in QUICK) for s, f in PAIRS])
def test_a_delta_beside_others(spec: str, family: str) -> None:
    """A method's images, and those of a low-rank delta and of two further copies of the backbone, in one batch."""
    _same(family, [spec, "lora", "", spec])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_basic_methods_together(family: str) -> None:
    """Three deltas in one batch, on every family."""
    _same(family, [m for m in BASIC if SUPPORT[m].get(family) in WORKS])


@pytest.mark.parametrize(
    ("spec", "family", "apart"),
    [
        ("lora", "vit", ()), ("adapter", "convnext", ()), ("mlp-head", "vit", ()), ("dtl", "vit", ()), ("vpt-deep", "vit", ("blocks.0", "blocks.1")),
        ("norm", "vit", ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm")),
        ("lora", "beit", ("blocks.0.attn", "blocks.1.attn")), ("vpt-shallow", "vit", ("",)),
    ],
)  # fmt: skip
def test_what_a_delta_has_to_itself(spec: str, family: str, apart: tuple[str, ...]) -> None:
    """Grafts that leave their host alone share it; others have the host, the module that reads it, or the whole network."""
    assert _mixed(family, [spec, "lora"])[0].apart[0] == apart


def test_a_task_without_images_and_an_image_without_task() -> None:
    """Tasks may be absent from a batch; the row of an image of no task is NaN."""
    mixed, alone = _mixed("vit", ["lora", "bitfit", "vpt-deep"])
    x = families.batch("vit", 3)
    none = torch.zeros(0, dtype=torch.int64)
    y = mixed(x, [none, torch.tensor([2]), torch.tensor([0])])
    assert bool(y[1].isnan().all())
    _near(y[2], alone[1](x[2:])[0])
    _near(y[0], alone[2](x[:1])[0])


def test_classes_that_a_task_lacks() -> None:
    """They are never the largest, and have no share of a softmax."""
    mixed, _ = _mixed("resnet", ["lora", "ssf"], classes=(2, 5))
    y = mixed(families.batch("resnet", 2), [torch.tensor([1]), torch.tensor([0])])
    assert y.shape == (2, 5)
    assert bool((y[1, 2:] == PAD).all())
    assert bool((y[0] > PAD).all())
    assert float(y[1].softmax(0)[2:].sum()) == 0


def _same(family: str, specs: list[str]) -> None:
    mixed, alone = _mixed(family, specs)
    count = 2 * len(specs) + 1
    x = families.batch(family, count)
    tasks = torch.arange(count).flip(0) % len(specs)
    y = mixed(x, [(tasks == t).nonzero()[:, 0] for t in range(len(specs))])
    for i, task in enumerate(tasks.tolist()):
        _near(y[i], alone[task](x[i : i + 1])[0])


@torch.no_grad()
def _mixed(family: str, specs: list[str], classes: tuple[int, ...] = ()) -> tuple[Mixed, list[nn.Module]]:
    """All in one, and each alone; "" is the backbone with a head of its own."""
    pairs = [(_one(family, s, i, classes), _one(family, s, i, classes)) for i, s in enumerate(specs)]
    members = [Member(m, [{n: m.get_submodule(n) for n in head_names(m)}]) for m, _ in pairs]
    lead = families.build(family).requires_grad_(requires_grad=False)
    return Mixed(lead, members, PAD).eval(), [m for _, m in pairs]


def _one(family: str, spec: str, seed: int, classes: tuple[int, ...]) -> nn.Module:
    model = families.build(family)
    if spec:
        attach(model, case(spec, family).delta)
    if classes:
        torch.manual_seed(seed)
        model.reset_classifier(classes[seed])  # type: ignore[operator] - a method of timm models
        model.double()
    return model.eval().requires_grad_(requires_grad=False)


def _near(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).abs().max()) <= 1e-10 * float(wanted.abs().max())
