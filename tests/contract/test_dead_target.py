"""Sites that are read, not called; and sites that are neither."""

import pytest
import torch
from torch import Tensor, nn

from tests import families
from tests.contract.cases import logits, relative
from vtzoo.anatomy import survey
from vtzoo.errors import DeadTarget
from vtzoo.graft import hosts, tensors_of
from vtzoo.installed import installed
from vtzoo.live import detach, inject

READ = ["beit", "eva02", "dinov3", "swinv2"]


class Unused(nn.Module):
    """A net with a linear layer that its forward never touches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, 4)
        self.used = nn.Linear(6, 10)
        self.forgotten = nn.Linear(10, 7)
        self.head = nn.Linear(10, 5)

    def get_classifier(self) -> nn.Module:
        """As timm's models have it."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        """Pool, project, classify."""
        return self.head(self.used(self.stem(x).mean((2, 3))))


@pytest.mark.parametrize("family", READ)
def test_a_hook_on_a_read_site_never_runs(family: str) -> None:
    """On these backbones a forward hook on qkv is dead: the attention reads its weight and never calls it."""
    model, ran = families.build(family), []
    sites = [m for n, m in model.named_modules() if n.endswith("attn.qkv")]
    for module in sites:
        module.register_forward_hook(lambda *_: ran.append(1))
    logits(model, families.batch(family))
    assert sites
    assert not ran
    assert not any(s.called for s in survey(model).linears if s.last == "qkv")


@pytest.mark.parametrize("family", READ)
def test_lora_lives_on_a_read_site(family: str) -> None:
    """vtzoo's lora on that very qkv trains and acts."""
    model = inject(families.build(family), "lora[targets=qkv]")
    x = families.batch(family)
    before = logits(model, x)
    families.perturb(tensors_of(model))
    assert relative(before, logits(model, x)) > 1e-3
    model(x).sum().backward()
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in tensors_of(model).values())


def test_unused_module_is_refused() -> None:
    """A site that is neither called nor read is a DeadTarget that names it, and the model is left as it was."""
    model = Unused().eval()
    with pytest.raises(DeadTarget, match="forgotten") as refusal:
        inject(model, "lora[targets=linear]")
    assert "targets" in refusal.value.hint
    assert not hosts(model)
    assert installed(model) is None
    assert type(model.forgotten) is nn.Linear


def test_living_sites_of_the_same_net_are_taken() -> None:
    """With the dead module left out the same net takes the delta."""
    model = Unused().eval()
    x = torch.randn(2, 3, 8, 8)
    before = logits(model, x)
    inject(model, "lora[targets=used]")
    families.perturb(tensors_of(model))
    assert relative(before, logits(model, x)) > 1e-4
    assert torch.equal(logits(detach(model), x), before)


def test_ssf_beside_a_dead_module_is_refused() -> None:
    """A method that takes every operation refuses too, rather than train what does nothing."""
    with pytest.raises(DeadTarget, match="forgotten"):
        inject(Unused().eval(), "ssf[targets=linear]")
