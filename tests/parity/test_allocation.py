"""gps and spt: what they choose and what they do with it, written anew from their papers and their authors' code.

The choosing is compared entry by entry: gradients of the contrast are taken here with plain autograd, and the choice is
made in loops.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests import families
from tests.contract.cases import case
from tests.parity.rewrites import by_weights, sites
from vtzoo.anatomy import Site
from vtzoo.classifier import head_names
from vtzoo.delta import Delta
from vtzoo.errors import UsageError
from vtzoo.graft import tensors_of
from vtzoo.live import inject, trainable
from vtzoo.methods import gps, spt

FEW = ("vit", "beit", "resnet")
GPS = [("gps[k=3]", f) for f in FEW] + [("gps", "swinv2"), ("gps[k=2,bias=false,targets=mlp]", "vit")]
SPT = [("spt[budget=1500,rank=2]", f) for f in FEW] + [
    ("spt[budget=5000,rank=64]", "vit"),
    ("spt[budget=0.03,rank=3,ratio=40]", "vit"),
    ("spt", "swinv2"),
]


def _gradients(family: str) -> dict[str, Tensor]:
    """Of the contrast (Khosla et al., eq. 2, over pairs), by name, head left out."""
    model, ((x, y),) = families.build(family), families.labelled(family)
    features = model.forward_head(model.forward_features(x), pre_logits=True).flatten(1)
    like = F.cosine_similarity(features[:, None], features[None], dim=-1) / 0.1
    losses = []
    for i in range(len(y)):
        others = [a for a in range(len(y)) if a != i]
        mates = [a for a in others if y[a] == y[i]]
        losses.append(torch.stack([like[i, others].logsumexp(0) - like[i, p] for p in mates]).mean())
    torch.stack(losses).mean().backward()
    head = tuple(head_names(model))
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not n.startswith(head)}


@pytest.mark.parametrize(("spec", "family"), GPS)
def test_gps(spec: str, family: str, agree) -> None:
    """W plus the changes, each at its neuron's input; b plus its change."""

    def edit(here, own, _site):
        weight = here["weight"].clone().flatten(1)
        for row, (places, values) in enumerate(zip(own["at"].tolist(), own["weight"].tolist(), strict=True)):
            for place, value in zip(places, values, strict=True):
                weight[row, place] += value
        found = {"weight": weight.reshape(here["weight"].shape)}
        return found | ({"bias": here["bias"] + own["bias"]} if "bias" in own else {})

    agree(f"{spec} on {family}", "rewrite", **by_weights(spec, family, edit))


@pytest.mark.parametrize(("spec", "family"), GPS)
def test_gps_chooses_like_its_authors(spec: str, family: str) -> None:
    """Of each neuron's inputs those with the largest |gradient|, by argsort as in the authors' code; every layer has them.

    (Swin V2's position MLP has neurons whose gradients are all zero, where any input will do.)
    """
    gradients = _gradients(family)
    count = int(spec.partition("k=")[2][:1] or 1)
    delta = case(spec, family).delta
    for site, own in sites(delta):
        flat = gradients[site.key("weight")].flatten(1).abs()
        wanted = flat.argsort(1)[:, -min(count, flat.shape[1]) :].sort(1).values
        assert own["at"].dtype == torch.int32
        chosen = own["at"].long()
        assert torch.equal(flat.gather(1, chosen).sort(1).values, flat.gather(1, wanted).sort(1).values), site.name
        assert torch.equal(chosen, wanted) or "cpb_mlp" in site.name
        assert all(row == sorted(set(row)) for row in chosen.tolist())
        assert ("bias" in own) is (site.bias and "bias=false" not in spec)
    if "targets" not in spec:
        layers = (torch.nn.Linear, torch.nn.Conv2d)
        model = families.build(family)
        inside = head_names(model)
        assert {s.name for s, _ in sites(delta)} == {
            n for n, m in model.named_modules() if isinstance(m, layers) and not n.startswith(inside)
        }


def test_gps_leaves_out_a_lone_weight() -> None:
    """A depthwise 1x1 convolution that standardises its weight would not notice: it is passed over, others are not."""
    facts = {"groups": 4, "stride": [1, 1], "padding": 0, "type": "ScaledStdConv2d"}
    convs = [
        Site(name="bare", kind="conv", shape=(4, 1, 1, 1), facts={**facts, "standardised": "gain"}),
        Site(name="wide", kind="conv", shape=(4, 1, 3, 3), facts={**facts, "standardised": "gain"}),
        Site(name="plain", kind="conv", shape=(4, 1, 1, 1), facts=facts),
    ]
    anatomy = SimpleNamespace(linears=[], convs=convs, select=lambda _targets, pool: pool)
    assert [s.name for s in gps.sites(anatomy, gps.Config())] == ["wide", "plain"]


@pytest.mark.parametrize(("spec", "family"), SPT)
def test_spt(spec: str, family: str, agree) -> None:
    """W plus BA (per group of a convolution), or a few entries changed; of biases and norms a few entries."""

    def edit(here, own, site):
        found = {}
        for name in ("weight", "bias"):
            if name in own:
                flat = here[name].clone().flatten()
                for place, value in zip(own[f"{name}_at"].tolist(), own[name].tolist(), strict=True):
                    flat[place] += value
                found[name] = flat.reshape(here[name].shape)
        if "A" in own:
            groups = site.facts.get("groups", 1)
            downs, ups = (
                own["A"].reshape(groups, -1, own["A"].shape[-1]),
                own["B"].reshape(groups, -1, own["B"].shape[-1]),
            )
            whole = torch.cat([up @ down for down, up in zip(downs, ups, strict=True)])
            found["weight"] = here["weight"] + whole.reshape(here["weight"].shape)
        return found

    agree(f"{spec} on {family}", "rewrite", **by_weights(spec, family, edit))


@pytest.mark.parametrize(("spec", "family"), SPT)
def test_spt_chooses_like_its_authors(spec: str, family: str) -> None:
    """Entries bought one by one in order of squared gradients: the same matrices get a LoRA, the same entries are trained."""
    knobs = dict(k.split("=") for k in spec.partition("[")[2].rstrip("]").split(",") if k)
    rank, ratio, budget = int(knobs.get("rank", 8)), float(knobs.get("ratio", 10)), float(knobs.get("budget", 0.005))
    squares = {n: g**2 for n, g in _gradients(family).items()}
    model = families.build(family)
    if budget < 1:
        budget = int(
            budget * sum(p.numel() for n, p in model.named_parameters() if not n.startswith(head_names(model)))
        )
    pool, matrices = _pool(family)
    entries = sorted(((v, n, i) for n in pool for i, v in enumerate(squares[n].flatten().tolist())), reverse=True)
    costs = {}
    for name in matrices:
        groups, weight = matrices[name], squares[name]
        out, fan_in = len(weight) // groups, weight[0].numel()
        cost = groups * min(rank, out, fan_in) * (out + fan_in)
        if cost < weight.numel():
            costs[name] = cost
    spent, counts, low = 0, dict.fromkeys(pool, 0), set()
    for _, name, _ in entries:
        if name in low:
            continue
        counts[name] += 1
        structured = name in costs and counts[name] >= costs[name] / ratio
        spent += costs[name] - counts[name] + 1 if structured else 1
        if spent > budget:
            break
        low |= {name} if structured else set()
    left = int(budget) - sum(costs[n] for n in low)
    direct = [(n, i) for _, n, i in entries if n not in low][:left]
    ours_low, ours = set(), set()
    for site, own in sites(case(spec, family).delta):
        ours_low |= {site.key("weight")} if "A" in own else set()
        ours |= {(site.key(p), i) for p in ("weight", "bias") for i in (own[f"{p}_at"].tolist() if p in own else [])}
    assert ours_low == low
    assert ours == set(direct)
    assert bool(low) is ("rank=64" not in spec and spec != "spt")  # at 64 no LoRA is smaller than its matrix
    if low:
        assert set(matrices) - low


def test_spt_counts_what_calls_for_a_lora() -> None:
    """A matrix gets its LoRA, of 8 parameters, with the third of its entries (8 / 3, rounded up), if the budget has it all."""
    few, many, vector = (torch.full((10,), 0.01 * i) for i in (1, 2, 3))
    few[:2], many[:3], vector[:1] = torch.tensor([9.0, 8]), torch.tensor([6.0, 5, 4]), 5.5
    scores = {("few", "weight"): few, ("many", "weight"): many, ("vector", "bias"): vector}
    costs = {p: 8 for p in scores if p[1] == "weight"}

    def low(budget: int, ratio: float = 3.0) -> set[str]:
        return {name for name, _ in spt._low_rank(scores, costs, budget, ratio)}

    assert low(10) == set()  # two entries, one of the vector, and 8 are 11
    assert low(11) == {"many"}
    assert low(25) == {"many"}  # the vector's ten entries come before the other's third
    assert low(26) == {"many", "few"}
    assert low(8, 4.0) == {"few"}
    assert low(2, 8.0) == set()


def test_spt_buys_nothing_without_a_gradient() -> None:
    """However large the budget, entries that the loss does not depend on stay frozen; of the others the first are bought."""
    scores = {("a", "weight"): torch.tensor([[0.0, 3], [0, 1]]), ("b", "bias"): torch.tensor([2.0, 0, 0])}
    assert spt._entries(scores, 100) == {("a", "weight"): 2, ("b", "bias"): 1}
    assert spt._entries(scores, 2) == {("a", "weight"): 1, ("b", "bias"): 1}
    assert spt._entries(scores, 1) == {("a", "weight"): 1}
    assert spt._entries({}, 100) == {}


def _pool(family: str) -> tuple[list[str], dict[str, int]]:
    """Names of the parameters that take part, and the matrices among them with their groups."""
    model = families.build(family)
    modules, names = dict(model.named_modules()), {n for n, _ in model.named_parameters()}
    blocks = ("layer",) if family == "resnet" else ("blocks.", "layers.")
    layers = torch.nn.Conv2d if family == "resnet" else torch.nn.Linear
    outside = ("cpb_mlp", "downsample") if family == "swinv2" else ()
    matrices = [
        n
        for n, m in modules.items()
        if isinstance(m, layers) and n.startswith(blocks) and not any(o in n for o in outside)
    ]
    norms = [n for n in modules if f"{n}.weight" in names and model.get_parameter(f"{n}.weight").ndim == 1]
    pool = [f"{n}.{p}" for n in [*matrices, *norms] for p in ("weight", "bias") if f"{n}.{p}" in names]
    return pool, {f"{n}.weight": getattr(modules[n], "groups", 1) for n in matrices}


@pytest.mark.parametrize("budget", ["1", "37", "3000", "0.01", "0.1"])
@pytest.mark.parametrize("family", FEW)
def test_spt_spends_its_budget(family: str, budget: str) -> None:
    """What is trained is exactly as many parameters as the knob says, a fraction counting the backbone's, head left out."""
    model = families.build(family)
    total = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(head_names(model)))
    tensors = tensors_of(inject(model, f"spt[budget={budget},rank=4]", batches=families.labelled(family)))
    wanted = int(float(budget) if float(budget) >= 1 else float(budget) * total)
    assert sum(t.numel() for t in tensors.values() if t.requires_grad) == wanted


def test_spt_with_more_than_it_can_spend() -> None:
    """A budget beyond every LoRA and every entry buys all of them, once each; none without a gradient."""
    tensors = tensors_of(inject(families.build("vit"), "spt[budget=1e9]", batches=families.labelled("vit")))
    assert {n.split(".")[-1] for n in tensors if "qkv" in n or "fc" in n} == {"A", "B", "bias", "bias_at"}
    keys = tensors["blocks.0.attn.qkv.spt.bias_at"]
    assert len(keys.unique()) == len(keys) <= 96


def test_spt_refuses_a_budget_that_buys_nothing() -> None:
    """A fraction of less than one parameter is refused with what it is a fraction of."""
    model = families.build("vit")
    with pytest.raises(UsageError, match=r"budget=1e-06 buys none of \d+ parameters") as refusal:
        inject(model, "spt[budget=0.000001]", batches=families.labelled("vit"))
    assert "raise it" in refusal.value.hint


def test_both_start_at_zero_and_a_at_lora_s_width() -> None:
    """Changes start at zero; A is Kaiming-uniform within 1 / sqrt(in), as LoRA's."""
    for spec in ("gps", "spt[budget=8000]"):
        model = inject(families.build("vit"), spec, batches=families.labelled("vit"))
        values = {n: t for n, t in trainable(model).items() if ".gps." in n or ".spt." in n}
        downs = {n: t for n, t in values.items() if n.endswith(".A")}
        assert not any(t.any() for n, t in values.items() if n not in downs)
        assert bool(downs) is (spec != "gps")
        for value in downs.values():
            bound = 1 / math.sqrt(value.shape[-1])
            assert 0.9 * bound < value.abs().max() <= bound


def test_a_delta_of_places_survives_a_file(tmp_path) -> None:
    """Places come back as int32, whatever the model's own numbers are."""
    case("gps", "vit").delta.save(tmp_path / "d.safetensors")
    opened = Delta.open(tmp_path / "d.safetensors")
    kinds = {n.rpartition(".")[2]: t.dtype for n, t in opened.tensors.items() if ".gps." in n}
    assert kinds == {"at": torch.int32, "weight": torch.float64, "bias": torch.float64}
