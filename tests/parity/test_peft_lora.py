"""lora beside PEFT's, in float64: the same A and B give the same output, unfolded and folded."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import families
from vtzoo.folding import fold
from vtzoo.graft import rates, tensors_of
from vtzoo.live import extract, inject

peft = pytest.importorskip("peft")

RANK, ALPHA = 3, 5.0
CASES: dict[str, tuple[str, dict]] = {
    "vit": ("", {}),
    "vit-qkv": (",targets=qkv", {}),
    "swin": ("", {}),
    "resnet": ("", {}),
    "convnext-pointwise": (",targets=linear", {}),
    "vit-dora": (",dora=true", {"use_dora": True}),
    "resnet-dora": (",dora=true", {"use_dora": True}),
    "vit-rs": (",rs=true", {"use_rslora": True}),
    "resnet-rs": (",rs=true", {"use_rslora": True}),
    "vit-ranks": (",ranks=fc1:2|proj:5", {"rank_pattern": {"mlp.fc1": 2, "attn.proj": 5}}),
}


def _ours(family: str, spec: str) -> nn.Module:
    model = inject(families.build(family), spec)
    families.perturb(tensors_of(model))
    return model


def _theirs(family: str, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float64, **knobs) -> nn.Module:
    """PEFT's LoRA on the same layers of the same net, with the same A, B and magnitudes."""
    sites = sorted({n.rpartition(".lora.")[0] for n in tensors})
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=sites, lora_dropout=0.0, **knobs)
    model = peft.get_peft_model(families.build(family, dtype=dtype), config).to(dtype).eval()
    layers = dict(model.base_model.model.named_modules())
    with torch.no_grad():
        for site in sites:
            down, up = layers[site].lora_A["default"].weight, layers[site].lora_B["default"].weight
            down.copy_(tensors[f"{site}.lora.A"].reshape(down.shape))
            up.copy_(tensors[f"{site}.lora.B"].reshape(up.shape))
            if f"{site}.lora.m" in tensors:
                length = layers[site].lora_magnitude_vector["default"].weight
                length.copy_(tensors[f"{site}.lora.m"].reshape(length.shape))
    return model


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


@pytest.fixture(params=sorted(CASES))
def pair(request):
    """What it is called, family, images, our model and PEFT's."""
    family, (knobs, theirs) = request.param.split("-")[0], CASES[request.param]
    spec = f"lora[rank={RANK},alpha={ALPHA}{knobs}]"
    ours = _ours(family, spec)
    return f"{spec} on {family}", family, families.batch(family), ours, _theirs(family, tensors_of(ours), **theirs)


@torch.no_grad()
def test_attached_outputs_agree(pair, agree) -> None:
    """Unfolded, both give the same logits, which are not the base's."""
    spec, family, x, ours, theirs = pair
    agree(spec, "PEFT", 1e-12, attached=_difference(ours(x), theirs(x)))
    assert _difference(ours(x), families.build(family)(x)) > 1e-3


@torch.no_grad()
def test_folded_outputs_and_weights_agree(pair, agree) -> None:
    """Folded, both give the same weights and logits, and those of the unfolded model."""
    spec, family, x, ours, theirs = pair
    live = ours(x)
    folded = dict(fold(families.build(family).state_dict(), extract(ours)))
    plain = families.build(family)
    plain.load_state_dict(folded)
    merged = theirs.merge_and_unload()
    worst = max(_difference(folded[n], t) for n, t in merged.state_dict().items() if t.abs().max() > 0)
    agree(spec, "PEFT", 1e-12, weights=worst, folded=_difference(live, plain(x)), merged=_difference(live, merged(x)))


def test_start_is_the_same_distribution() -> None:
    """A fresh A is Kaiming-uniform with PEFT's bound 1 / sqrt(in), B is zero, so both start as the base."""
    model = inject(families.build("vit"), "lora[rank=16,targets=fc1]")
    tensors = tensors_of(model)
    bound = 1 / math.sqrt(32)
    for name, value in tensors.items():
        if name.endswith(".A"):
            assert bound * 0.95 < value.abs().max() <= bound
            assert abs(value.std() - bound / math.sqrt(3)) < 0.1 * bound
        else:
            assert not value.any()


@pytest.mark.parametrize(
    ("spec", "family", "site", "fan_in"),
    [("lora[qkv=qv]", "vit", "blocks.0.attn.qkv", 32), ("lora[targets=conv]", "regnet", "s1.b1.conv2.conv", 72)],
)
def test_start_of_a_part_is_as_wide(spec: str, family: str, site: str, fan_in: int) -> None:
    """Each part of a fused qkv and each group of a convolution starts with the bound of its own inputs."""
    value = tensors_of(inject(families.build(family), spec))[f"{site}.lora.A"]
    assert 0.9 / math.sqrt(fan_in) < value.abs().max() <= 1 / math.sqrt(fan_in)


def test_magnitudes_start_as_lengths_and_pissa_with_the_weight() -> None:
    """m is the rows' length; PiSSA's product is the weight's best approximation of its rank, and changes nothing at first."""
    base = families.build("vit")
    weight, x = base.blocks[0].attn.qkv.weight.detach(), families.batch("vit")
    tensors = tensors_of(inject(families.build("vit"), "lora[dora=true]"))
    assert torch.allclose(tensors["blocks.0.attn.qkv.lora.m"], weight.norm(dim=1))
    model = inject(families.build("vit"), "lora[rank=4,alpha=2,init=pissa,qkv=qv]")
    tensors = {n.rpartition(".")[2]: t for n, t in tensors_of(model).items() if n.startswith("blocks.0.attn.qkv")}
    u, s, v = torch.linalg.svd(weight[64:])
    assert torch.allclose(0.5 * tensors["B"][1] @ tensors["A"][1], (u[:, :4] * s[:4]) @ v[:4])
    assert torch.equal(tensors["A"], tensors["A0"])
    with torch.no_grad():
        assert torch.equal(model(x), base(x))


@torch.no_grad()
def test_pissa_is_pefts(agree) -> None:
    """With the same moved A and B, PiSSA gives what PEFT's does, which wants float32 and changes the base instead."""
    ours = inject(families.build("vit", dtype=torch.float32), "lora[rank=3,alpha=5,init=pissa]")
    families.perturb(tensors_of(ours))
    theirs = _theirs("vit", tensors_of(ours), torch.float32, init_lora_weights="pissa")
    x = families.batch("vit", dtype=torch.float32)
    for name, value in tensors_of(ours).items():  # ours keeps its start beside A and B: it must be the unmoved one
        if name.endswith("0"):
            value.copy_(
                tensors_of(inject(families.build("vit", dtype=torch.float32), "lora[rank=3,alpha=5,init=pissa]"))[name]
            )
    agree("lora[init=pissa]", "PEFT, float32", 1e-5, attached=_difference(ours(x), theirs(x)))


def test_lora_plus_is_pefts() -> None:
    """B learns `plus` times as fast as A, as PEFT's optimizer for LoRA+ has it; heads and A at the recipe's rate."""
    from peft.optimizers import create_loraplus_optimizer

    ours = inject(families.build("vit"), "lora[plus=16]")
    theirs = _theirs("vit", tensors_of(_ours("vit", "lora[rank=3]")))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    names = {id(p): n for n, p in theirs.named_parameters()}
    fast = {names[id(p)].split(".")[-3] for g in optimizer.param_groups if g["lr"] == 16e-3 for p in g["params"]}
    assert fast == {"lora_B"}
    found = rates(ours)
    assert found == {n: 16.0 for n in tensors_of(ours) if n.endswith(".B")}


def test_dynamic_ranks_are_nested() -> None:
    """While training the branch is that of the first b rows, b from 1 to rank; in evaluation it is whole."""
    model = inject(families.build("vit"), "lora[rank=4,targets=fc1,dynamic=true]")
    families.perturb(tensors_of(model))
    layer, x = model.blocks[0].mlp.fc1, torch.randn(2, 32, dtype=torch.float64)
    with torch.no_grad():
        child = layer.lora
        cut = [F.linear(x, layer.weight + child.B[:, :b] @ child.A[:b], layer.bias) for b in range(1, 5)]
        assert torch.allclose(layer(x), cut[3])
        layer.train()
        drawn = {next(b for b in range(4) if torch.allclose(y, cut[b])) for y in (layer(x) for _ in range(40))}
    assert drawn == {0, 1, 2, 3}


@pytest.mark.parametrize("family", ["beit", "eva02", "swinv2", "dinov3"])
def test_peft_is_dead_where_ours_lives(family: str) -> None:
    """These attentions read qkv's weight and never call it: PEFT's LoRA there has no effect and no gradient; ours has."""
    x = families.batch(family)
    with torch.no_grad():
        bare = families.build(family)(x)
    ours = _ours(family, f"lora[rank={RANK},alpha={ALPHA},targets=qkv]")
    theirs = _theirs(family, tensors_of(ours))
    with torch.no_grad():
        assert torch.equal(theirs(x), bare)
        assert _difference(bare, ours(x)) > 1e-3
    ours(x).sum().backward()
    assert all(t.grad.abs().max() > 0 for t in tensors_of(ours).values())
    assert any(p.requires_grad for p in theirs.parameters())
    assert not theirs(x).requires_grad
    with torch.no_grad():  # and merging what had no effect changes the output after all
        assert _difference(bare, theirs.merge_and_unload()(x)) > 1e-3
