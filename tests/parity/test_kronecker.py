"""loha, lokr, vera and norm beside PEFT's; kadaptation, and layers that are read, beside the papers' formulas; in float64."""

import functools
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import families
from tests.contract.cases import bare, case, fresh, logits, perturbed, relative
from tests.parity.rewrites import by_weights
from vtzoo.delta import Delta
from vtzoo.folding import fold
from vtzoo.graft import tensors_of
from vtzoo.installed import head_state
from vtzoo.live import extract
from vtzoo.methods import lokr

peft = pytest.importorskip("peft")

NAMES = {  # of our tensors, what PEFT calls them
    "loha": {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"},
    "lokr": {"w1": "lokr_w1", "w1a": "lokr_w1_a", "w1b": "lokr_w1_b", "w2": "lokr_w2", "w2a": "lokr_w2_a", "w2b": "lokr_w2_b"},
    "vera": {"b": "vera_lambda_b", "d": "vera_lambda_d"},
    "norm": {"weight": "weight", "bias": "bias"},
}  # fmt: skip
CASES = [  # scales that float32 holds exactly, which PEFT's loha rounds to
    ("loha[rank=1,alpha=5]", "vit", {"r": 1, "alpha": 5}),  # as a branch
    ("loha[rank=4,alpha=5]", "vit", {"r": 4, "alpha": 5}),  # in the weight
    ("loha[rank=1,alpha=3]", "swin", {"r": 1, "alpha": 3}),
    ("loha[rank=4,alpha=5]", "resnet", {"r": 4, "alpha": 5}),
    ("loha[rank=4,alpha=2]", "regnet", {"r": 4, "alpha": 2}),
    ("loha[rank=2,alpha=5,targets=linear|depthwise]", "convnext", {"r": 2, "alpha": 5}),
    ("lokr[rank=8,alpha=5]", "vit", {"r": 8, "alpha": 5}),
    ("lokr[rank=3,alpha=5]", "vit", {"r": 3, "alpha": 5}),
    ("lokr[rank=1,alpha=5,decompose_both=true]", "vit", {"r": 1, "alpha": 5, "decompose_both": True}),
    ("lokr[rank=2,alpha=3,factor=3]", "swin", {"r": 2, "alpha": 3, "decompose_factor": 3}),
    ("lokr[rank=8,alpha=5]", "resnet", {"r": 8, "alpha": 5}),
    ("lokr[rank=1,alpha=5,decompose_both=true]", "resnet", {"r": 1, "alpha": 5, "decompose_both": True}),
    ("lokr[rank=1,alpha=2,factor=4]", "regnet", {"r": 1, "alpha": 2, "decompose_factor": 4}),
    ("lokr[rank=2,alpha=5,targets=linear|depthwise]", "convnext", {"r": 2, "alpha": 5}),
    ("vera[rank=3,seed=2]", "vit", {"r": 3}),  # as a branch
    ("vera[rank=40,seed=2]", "vit", {"r": 40}),  # in the weight
    ("vera[rank=3,start=0.7]", "swin", {"r": 3}),
    ("norm", "vit", {}),
    ("norm", "resnet", {}),
]


def _config(method: str, sites: list[str], knobs: dict[str, Any]) -> Any:
    kinds = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig, "vera": peft.VeraConfig, "norm": peft.LNTuningConfig}
    return kinds[method](target_modules="|".join(map(re.escape, sites)), **knobs)  # a list would match ends of names


@torch.no_grad()
def _theirs(method: str, ours: nn.Module, family: str, knobs: dict[str, Any]) -> nn.Module:
    """PEFT's model with our tensors on the same layers; of vera with our random matrices too."""
    tensors = tensors_of(ours)
    sites = sorted({n.rpartition(f".{method}.")[0] for n in tensors})
    model = peft.get_peft_model(bare(family), _config(method, sites, knobs)).double().eval()
    layers = dict(model.base_model.model.named_modules())
    for name, value in tensors.items():
        site, _, short = name.rpartition(f".{method}.")
        layer = layers[site].ln_tuning_layers["default"] if method == "norm" else layers[site]
        place = getattr(layer, NAMES[method][short])
        place = place if method == "norm" else place["default"]
        place.copy_(value.reshape(place.shape))
        if method == "vera":
            for short in "AB":
                getattr(layer, f"vera_{short}")["default"] = getattr(ours.vera, short)
    model.base_model.model.load_state_dict(head_state(ours), strict=False)
    return model


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, at norms
@pytest.mark.parametrize(("spec", "family", "knobs"), CASES)
def test_pefts(spec: str, family: str, knobs: dict[str, Any], agree) -> None:
    """With the same tensors both give the same logits attached, and the same weights and logits folded."""
    method, x = spec.partition("[")[0], families.batch(family)
    ours = perturbed(spec, family)
    theirs = _theirs(method, ours, family, knobs)
    live = logits(ours, x)
    assert relative(logits(bare(family), x), live) > 1e-3
    attached = relative(live, logits(theirs, x))
    folded = dict(fold(bare(family).state_dict(), extract(ours)))
    plain = bare(family)
    plain.load_state_dict(folded)
    merged = theirs.merge_and_unload()
    state = merged.state_dict()
    assert {n for n in folded if n in state} == set(state)
    weights = max(relative(folded[n], t) for n, t in state.items() if t.is_floating_point() and t.abs().max() > 0)
    agree(
        f"{spec} on {family}",
        "PEFT",
        1e-12,
        attached=attached,
        weights=weights,
        folded=relative(live, logits(plain, x)),
        merged=relative(live, logits(merged, x)),
    )


def test_sizes_split_as_pefts() -> None:
    """lokr factors a size as PEFT does, for every size to 400 and factor to 20, and for none."""
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 401):
        assert lokr.split(size) == factorization(size)
        assert all(lokr.split(size, f) == factorization(size, f) for f in range(1, 21))


def _added(change):
    """The weight plus a matrix [out, fan_in]."""

    def edit(here, own, site):
        return {"weight": here["weight"] + change(own, site).reshape(here["weight"].shape)}

    return edit


@pytest.mark.parametrize("family", ["beit", "eva02", "nfnet", "swinv2"])
def test_loha_by_its_formula(family: str, agree) -> None:
    """The product of two products, entry by entry, where weights are read and where they are standardised."""

    def change(own, _site):
        return 2.5 * torch.einsum("or,ri,os,si->oi", own["B1"], own["A1"], own["B2"], own["A2"])

    agree(f"loha on {family}", "rewrite", **by_weights("loha[rank=2,alpha=5]", family, _added(change)))


@pytest.mark.parametrize("family", ["beit", "dinov3", "nfnet", "swinv2"])
def test_lokr_by_its_formula(family: str, agree) -> None:
    """Blocks of w2, each times an entry of w1, laid out like w1."""

    def change(own, site):
        w2 = own["w2"] if "w2" in own else own["w2a"] @ own["w2b"]
        return 2.5 * torch.cat([torch.cat([entry * w2 for entry in row], 1) for row in own["w1"]])

    agree(f"lokr on {family}", "rewrite", **by_weights("lokr[rank=2,alpha=5]", family, _added(change)))


@pytest.mark.parametrize("family", ["vit", "beit", "swinv2", "resnet"])
def test_vera_by_its_formula(family: str, agree) -> None:
    """The first columns and rows of two matrices, drawn anew by numpy, scaled by d and b."""
    widest = {"out": 0, "in": 0}
    for site in case("vera[rank=4,seed=5]", family).delta.parts[0].sites:
        out, fan_in = site.shape[0], int(np.prod(site.shape[1:]))
        widest = {"out": max(widest["out"], out), "in": max(widest["in"], fan_in)}
    shapes = ((4, widest["in"]), (widest["out"], 4))
    (deep, wide), (tall, flat) = shapes
    A = np.random.RandomState(10).uniform(-((6 / wide) ** 0.5), (6 / wide) ** 0.5, (deep, wide))
    B = np.random.RandomState(11).uniform(-((6 / flat) ** 0.5), (6 / flat) ** 0.5, (tall, flat))
    A, B = (torch.from_numpy(m.astype(np.float32)).double() for m in (A, B))

    def change(own, site):
        fan_in = int(np.prod(site.shape[1:]))
        return own["b"].diag() @ B[: site.shape[0]] @ own["d"].diag() @ A[:, :fan_in]

    agree(f"vera on {family}", "rewrite", **by_weights("vera[rank=4,seed=5]", family, _added(change)))


@pytest.mark.parametrize(
    ("spec", "family"),
    [(f"kadaptation[order={n},scale=3]", f) for n, f in ((8, "vit"), (6, "vit"), (32, "beit"), (4, "swinv2"), (8, "hiera"), (12, "resnet"), (5, "nfnet"))],
)  # fmt: skip
def test_kadaptation_by_its_formula(spec: str, family: str, agree) -> None:
    """The sum of Kronecker products, each of q, k and v by itself; A is that of the layer's order, which divides its sizes."""
    largest = int(spec.partition("order=")[2].partition(",")[0])

    def change(own, site):
        parts, n, _ = own["u"].shape
        rows, columns = site.shape[0] // parts, int(np.prod(site.shape[1:]))
        assert parts == (3 if site.name.endswith("qkv") else 1)
        assert n == max(k for k in range(1, largest + 1) if rows % k == 0 and columns % k == 0)
        products = [
            [torch.kron(own[f"A{n}"][i], torch.outer(own["u"][p, i], own["v"][p, i])) for i in range(n)]
            for p in range(parts)
        ]
        return 3 * torch.cat([functools.reduce(torch.add, part) for part in products])

    agree(f"{spec} on {family}", "rewrite", **by_weights(spec, family, _added(change)))


def test_kadaptation_stands_in_attentions() -> None:
    """By default its sites are the layers of the attentions; in a network without any, those of the blocks."""
    names = {s.last for s in case("kadaptation", "vit").delta.parts[0].sites}
    assert names == {"qkv", "proj"}
    assert len(case("kadaptation", "mixer").delta.parts[0].sites) == len(case("lora", "mixer").delta.parts[0].sites)


def _short(model: nn.Module) -> dict[str, Tensor]:
    """The tensors at fc2 of the first block, [32, 128], and shared ones."""
    return {
        n.rpartition(".")[2]: t.detach()
        for n, t in tensors_of(model).items()
        if ".fc2." not in n or n.startswith("blocks.0.")
    }


def _fills(value: Tensor, bound: float) -> bool:
    """Whether a tensor looks uniform in +- bound."""
    reached = 0.9 * bound < float(value.abs().max()) <= bound
    return reached and abs(float(value.std()) - bound / 3**0.5) < 0.15 * bound


def test_starts_are_as_said() -> None:
    """What is zero and what is uniform in which bounds at the start, PEFT's where it has the method."""
    own = _short(fresh("loha[rank=16,targets=fc2]", "vit"))
    assert not own.pop("A2").any()
    assert all(_fills(own[n], b) for n, b in {"B1": 1 / 4, "B2": 1 / 4, "A1": 128**-0.5}.items())
    own = _short(fresh("lokr[rank=3,targets=fc2]", "vit"))  # 4 * 8 by 8 * 16
    assert not own["w1"].any()
    assert all(_fills(own[n], b) for n, b in {"w2a": 3**-0.5, "w2b": 1 / 4}.items())
    own = _short(fresh("lokr[rank=2,decompose_both=true,targets=fc2]", "vit"))
    assert not own["w1a"].any()
    assert own["w1b"].any()
    model = fresh("vera[targets=fc2]", "vit")
    own = _short(model)
    assert set(own) == {"b", "d"}
    assert not own["b"].any()
    assert (own["d"] == torch.tensor(0.1).double()).all()
    assert _fills(model.vera.A, (6 / 128) ** 0.5)
    assert _fills(model.vera.B, (6 / 256) ** 0.5)
    own = _short(fresh("kadaptation[order=8,targets=fc2]", "vit"))
    assert not own["u"].any()
    assert _fills(own["v"], 1 / 4)
    assert _fills(own["A8"], (3 / 8) ** 0.5)


def test_no_file_holds_veras_matrices(tmp_path) -> None:
    """A saved delta holds b and d alone; the seed tells A and B, and another gives others."""
    spec = "vera[rank=4,seed=3,targets=qkv]"
    case(spec, "vit").delta.save(tmp_path / "a.safetensors")
    names = {n.rpartition(".")[2] for n in Delta.open(tmp_path / "a.safetensors").tensors if not n.startswith("@")}
    assert names == {"b", "d"}
    three, again, four = (fresh(f"vera[rank=4,seed={s},targets=qkv]", "vit").vera.A for s in (3, 3, 4))
    assert torch.equal(three, again)
    assert not torch.equal(three, four)
