"""The methods that teach both towers, beside their formulas on the open_clip model of the same weights."""

import copy

import pytest

from tests.contract.cases import logits, relative
from tests.parity import language_rewrites as r
from tests.parity.clip_case import NAMES, TEMPLATE, WIDTH, images, made, say
from tests.parity.dual_case import folded, taught


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_maple(depth: int, agree) -> None:
    """Two learned prompts in front of "of a"; deeper ones in the places of the first, the image tower's made of them."""
    spec = f"maple[depth={depth}]"
    model, own = taught(spec)
    prompts, weight, bias = (own[f"maple.{k}"] for k in ("prompts", "weight", "bias"))
    assert prompts.shape == (depth, 2, WIDTH)
    names = [f"of a {n}" for n in NAMES]
    wanted = r.maple(made(), say, images(), names, prompts, list(zip(weight, bias, strict=True)))
    agree(spec, "rewrite", logits=relative(wanted, logits(model, images())))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_vl_prompt(depth: int, agree) -> None:
    """Two learned prompts in front of "of a", three in the image tower, and deeper ones in the places of both."""
    spec = f"vl-prompt[vision=3,depth={depth}]"
    model, own = taught(spec)
    text, image = (own[f"vl_prompt.{k}"] for k in ("prompts", "vision"))
    names, deep = [f"of a {n}" for n in NAMES], [dict(enumerate(p[1:], 1)) for p in (text, image)]
    wanted = r.vl_prompt(made(), say, images(), names, text[0], deep[0], image[0], deep[1])
    agree(spec, "rewrite", logits=relative(wanted, logits(model, images())))


def test_upt(agree) -> None:
    """Prompts of both towers from one row of them."""
    model, own = taught("upt[tokens=3]")
    theirs = {"attention.qkv.": "in_proj_", "attention.proj": "out_proj", "fc": "linear", "out.": "mlp."}
    state = {n.removeprefix("upt."): t for n, t in own.items()}
    for ours, name in theirs.items():
        state = {f"{name}{n.removeprefix(ours)}" if n.startswith(ours) else n: t for n, t in state.items()}
    wanted = r.upt(made(), say, images(), NAMES, state.pop("row"), state)
    agree("upt[tokens=3]", "rewrite", logits=relative(wanted, logits(model, images())))


@pytest.mark.parametrize("targets", ["qkv", "text.qkv", "qkv|text.qkv"])
def test_lora_on_either_tower(targets: str, agree) -> None:
    """CLIP-LoRA: alpha / sqrt(rank) on queries, keys and values of one tower or both."""
    spec = f"lora[targets={targets},rank=2,alpha=1,rs=true]"
    model, own = taught(spec)
    theirs = copy.deepcopy(made())
    layers = {f"blocks.{i}": b.attn for i, b in enumerate(theirs.visual.transformer.resblocks)}
    layers |= {f"text.transformer.resblocks.{i}": b.attn for i, b in enumerate(theirs.transformer.resblocks)}
    a, b = ({n.removesuffix(f".attn.qkv.lora.{k}"): t for n, t in own.items() if n.endswith(k)} for k in "AB")
    touched = {"qkv": 3, "text.qkv": 4, "qkv|text.qkv": 7}[targets]
    assert len(a) == len(b) == touched
    r.lora({n: layers[n] for n in a}, a, b, 2**-0.5)
    wanted = r.zero_shot(theirs, say, images(), NAMES, [TEMPLATE])
    found = {"logits": logits(model, images()), "folded": logits(folded(model), images())}
    agree(spec, "rewrite", **{n: relative(wanted, x) for n, x in found.items()})
