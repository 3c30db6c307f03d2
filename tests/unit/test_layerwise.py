"""Learning rates that fall with depth: timm's own on a whole network, and the host's layer for what hangs on it."""

from typing import Any

import pytest
import timm
import torch
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn

from vtzoo.fit import Plan, fit
from vtzoo.layerwise import shares
from vtzoo.live import inject, trainable
from vtzoo.recipe import Recipe


def timms(arch: str, decay: float) -> dict[str, float]:
    """What timm gives each parameter of a network that is fine-tuned whole."""
    model = timm.create_model(arch, num_classes=5)
    names = {id(p): n for n, p in model.named_parameters()}
    groups: list[dict[str, Any]] = param_groups_layer_decay(model, layer_decay=decay)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("arch", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet"])
def test_full_fine_tuning_has_timms_rates(arch: str) -> None:
    """Every replaced tensor learns at the share that timm gives the parameter whose place it takes; the head at all."""
    wanted = timms(arch, 0.7)
    model = timm.create_model(arch, num_classes=5).requires_grad_(requires_grad=False).eval()
    inject(model, "full")
    found = shares(model, 0.7)
    ours = {n.replace("full.", ""): found.get(n, 1.0) for n in trainable(model)}
    assert ours == pytest.approx(wanted)
    assert len(set(ours.values())) > 4


def test_deltas_have_the_layer_that_they_hang_on() -> None:
    """Branches and prompts in block 2 learn at block 2's share, and nothing is slowed with decay 1."""
    model = timm.create_model("test_vit", num_classes=5).requires_grad_(requires_grad=False).eval()
    inject(model, "lora+vpt-deep+ssf")
    found = shares(model, 0.5)
    per_block = [{found[n] for n in trainable(model) if n.startswith(f"blocks.{i}.")} for i in range(6)]
    assert per_block == [{0.5 ** (6 - i)} for i in range(6)]
    assert "head.weight" not in found
    assert shares(model, 1.0) == {}


def test_a_share_holds_at_every_step() -> None:
    """Under SGD on a constant slope a tensor with share 1/4 moves a quarter as far, warm-up and lowest rate included."""
    model = nn.ParameterDict({"slow": nn.Parameter(torch.zeros(1)), "quick": nn.Parameter(torch.zeros(1))})
    moves: list[float] = []

    def loss(own: nn.Module, _: tuple[Tensor, ...]) -> Tensor:
        slow, quick = own.get_parameter("slow"), own.get_parameter("quick")
        if quick.item():
            moves.append(slow.item() / quick.item())
        return slow.sum() + quick.sum()

    recipe = Recipe(epochs=3, lr=0.1, weight_decay=0.0, optimizer="sgd", min_lr_fraction=0.5, clip_norm=0.0)
    plan = Plan(model=model, loss=loss, batches=lambda *_: [(torch.ones(1),)] * 5, steps=5, recipe=recipe, shares={"slow": 0.25})  # fmt: skip
    history = fit(plan)
    assert len(moves) == 14
    assert moves == pytest.approx([0.25] * 14)
    assert history[0]["lr"] == pytest.approx(0.1, rel=0.3)
