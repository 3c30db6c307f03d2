"""What the contract tests share: which pairs are supported, and one prepared delta for each spec and family.

A `Case` is what a perturbed delta gave on one model; every test builds fresh models of its own and compares.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import vtzoo.methods
from tests import families
from vtzoo import knobs, registry
from vtzoo.delta import Delta
from vtzoo.graft import tensors_of
from vtzoo.installed import head_state
from vtzoo.live import extract, inject
from vtzoo.methods._protocol import composes, learns
from vtzoo.spec import Task

TASK = Task(name="t", classes=tuple("abcde"[: families.CLASSES]))
SUPPORT: dict[str, dict[str, str]] = yaml.safe_load(
    (Path(vtzoo.methods.__file__).parent / "_support.yaml").read_text(encoding="utf-8")
)
WORKS = ("folds", "live")
METHODS = [
    m
    for m in registry.names("methods")
    if not composes(registry.load("methods", m)) and learns(registry.load("methods", m))
]  # those others are made of, and that hold something
STILL = ("ape", "tip-adapter")  # keep images, and train nothing unless told to
FAMILIES = families.names()

VARIANTS = {
    "adapter[placement=houlsby]": ("vit", "swin", "mixer", "convnext"),
    "adapter[placement=houlsby,ranks=attn:3|*.0.mlp:0]": ("vit", "beit"),
    "adapter[placement=intermediate,drop_path=0]": ("vit", "swin"),
    "adapter[placement=pfeiffer,init=zero,act=relu]": ("vit", "beit"),
    "adaptformer[rank=3,scale=2,dropout=0]": ("vit", "resnet"),
    "adapter-bias[targets=conv]": ("regnet", "nfnet", "mobilenetv4", "vit"),
    "arc[rank=5,init=xavier]": ("vit", "cait", "convnext"),
    "arc[rank=3,targets=conv]": ("resnet", "vit", "hybrid"),
    "bi-lora[rank=3,scale=2]": ("vit", "beit", "regnet", "resnet"),
    "boft[block=4,factors=3]": ("vit", "swinv2", "regnet", "nfnet"),
    "compacter[rank=6,order=2]": ("vit", "mixer", "convnext"),
    "consolidator[groups=9]": ("vit", "regnet", "nfnet"),
    "consolidator[groups=4,targets=depthwise|qkv]": ("pvt",),
    "consolidator[targets=depthwise]": ("convnext",),
    "fact-tk[rank=5,scale=2]": ("vit", "beit", "pvt", "regnet"),
    "fact-tt[rank=3,scale=2]": ("vit", "swinv2", "mixer", "resnet"),
    "fact-tt[targets=conv]": ("mobilenetv4", "nfnet", "vit"),
    "fourierft[n=50,alpha=20,init_std=1]": ("vit", "eva02"),
    "e2vpt[share=false,keys=2,prune_tokens=0.5,prune_segments=0.3]": ("vit", "swin", "beit", "pvt"),
    "conv-adapter[at=residual,reduce=2]": ("resnet", "swin", "convnext"),
    "conv-adapter[form=sequential,kernel=5,act=gelu]": ("nfnet", "efficientnet", "swin"),
    "convpass[attention_only=true]": ("vit-reg", "swinv2"),
    "convpass[rank=3,scale=2]": ("vit", "swin", "pvt"),
    "dtl[fusion=3,rank=3,start=0,beta=2]": ("vit-reg", "cait", "swin", "resnet"),
    "full[targets=*norm*|pos_embed]": ("vit", "vit-reg"),
    "full[targets=mlp]": ("swinv2", "convnext"),
    "gps[k=3,bias=false]": ("vit", "swinv2", "nfnet", "convnext"),
    "glora[a=vector,b=vector,c=lora,d=vector,e=none,rank=3]": ("vit", "beit", "resnet", "nfnet"),
    "glora[a=constant,b=constant,c=vector,d=constant,e=constant,targets=qkv|fc1]": ("vit", "swin"),
    "hydra[rank=3,scale=2,targets=qkv|fc1]": ("vit", "beit", "swinv2"),
    "hydra[rank=3,targets=spatial]": ("regnet", "nfnet"),
    "ia3[outputs=conv,inputs=[]]": ("vit", "convnext", "mobilenetv4"),
    "ia3[outputs=[],inputs=conv|linear]": ("vit", "beit", "convnext"),
    "ia3[outputs=proj|qkv,inputs=fc2]": ("swinv2", "maxvit"),
    "kadaptation[order=8,scale=3,targets=auto|mlp]": ("vit", "swinv2", "eva02", "convnext"),
    "loha[rank=1,alpha=5]": ("vit", "beit", "swin"),  # narrow enough to be a branch of these narrow linears
    "loha[rank=3,targets=conv]": ("regnet", "mobilenetv4", "convnext", "nfnet"),
    "lokr[rank=3,alpha=5]": ("vit", "swinv2", "resnet"),
    "lokr[rank=1,alpha=5,decompose_both=true]": ("vit", "beit", "nfnet"),
    "lokr[rank=2,factor=3,targets=conv]": ("mobilenetv4", "regnet", "vit"),
    "lora[qkv=qv,rank=3,alpha=5]": ("vit", "beit", "swin", "swinv2", "dinov3"),
    "lora[dora=true,alpha=5]": ("vit", "beit", "nfnet", "resnet"),
    "lora[dora=true,qkv=qv,rs=true]": ("vit", "swinv2"),
    "lora[dynamic=true,plus=4]": ("vit", "resnet"),
    "lora[init=pissa,alpha=3]": ("vit", "swin", "regnet", "eva02"),
    "lora[ranks=fc1:2|qkv:5]": ("vit", "beit"),
    "lora[ranks=*blocks.0.*:0]": ("vit", "swin", "convnext"),
    "lora[targets=conv,rank=2]": ("resnet", "nfnet", "efficientnet", "convnext", "mobilenetv4", "hybrid", "vit"),
    "lst[reduction=2,heads=6,join=replace]": ("vit", "cait", "swin", "resnet"),
    "maple[tokens=3,init=,depth=1]": ("dual",),
    "mlp-head[layers=3,hidden=7]": ("vit", "resnet"),
    "mlp-head[hidden=5,skip=true]": ("vit", "resnet"),
    "oft[block=8,share=true]": ("vit", "beit", "regnet"),
    "oft[block=5,eps=0.3]": ("vit", "nfnet"),
    "oft[targets=depthwise]": ("convnext", "mobilenetv4"),
    "mona[rank=5]": ("vit", "swin", "swinv2", "mixer"),
    "partial[blocks=2]": ("vit", "swin", "efficientnet"),
    "pixel-prompt[kind=patch,size=5]": ("vit", "eva02", "resnet"),
    "pixel-prompt[kind=full]": ("vit-reg", "siglip", "swin"),
    "repadapter[groups=1,rank=3]": ("vit", "swinv2", "mobilenetv4"),
    "repadapter[targets=conv,groups=1]": ("resnet", "vit"),
    "residual[kind=series]": ("resnet", "efficientnet", "nfnet", "mobilenetv4", "convnext"),
    "residual[targets=depthwise]": ("convnext", "mobilenetv4", "efficientnet"),
    "rlrr[init=kaiming]": ("vit", "swin", "beit"),
    "sct[fraction=0.4,targets=fc1]": ("vit", "convnext"),
    "sct[fraction=0.5,targets=spatial]": ("resnet",),
    "shira[mask=magnitude,fraction=0.1]": ("vit", "nfnet"),
    "shira[mask=gradient]": ("vit", "beit"),
    "shira[mask=snip,targets=conv]": ("vit", "mobilenetv4"),
    "spt[budget=1500,rank=2]": ("vit", "beit", "regnet", "nfnet"),
    "spt[budget=0.02,rank=0]": ("swin", "resnet"),
    "side-tuning[width=4,alpha=0.3]": ("vit", "swin", "efficientnet"),
    "ssf[init_std=0.02]": ("vit", "swinv2", "resnet"),
    "ssf[targets=norm]": ("vit", "resnet"),
    "svft[pattern=plain]": ("vit", "eva02", "resnet"),
    "svft[pattern=random,bands=1]": ("vit", "convnext"),
    "svft[pattern=topk,bands=1,targets=*attn.proj]": ("vit", "swinv2"),
    "vera[rank=4,start=0.7,seed=3]": ("vit", "eva02", "convnext", "regnet"),  # narrow enough to be a branch
    "gated-vpt[tokens=2,gate=0.5]": ("vit", "eva02"),
    "sa2vp[rank=3,scale=1]": ("vit", "beit"),
    "upt[tokens=2]": ("dual",),
    "kgcoop[per_class=true,weight=2]": ("dual",),
    "prograd[init=,context=3,position=middle]": ("dual",),
    "cocoop[init=,context=3,reduction=2]": ("dual",),
    "plot[prompts=2,context=3,position=front,entropy=0.05]": ("dual",),
    "vl-prompt[vision=3,depth=1]": ("dual",),
    "vit-adapter[groups=1,ratio=0.5,conv=6]": ("vit", "beit"),
    "vpt-deep[tokens=1]": ("vit", "dinov3", "swinv2"),
    "vpt-deep[tokens=3,lengths=*.0*:5]": ("vit", "eva02", "beit", "swin"),
    "vqt[tokens=3]": ("vit", "dinov3"),
    "vpt-shallow[tokens=3]": ("vit", "vit-reg", "eva02", "clip"),
}
STARTS = {  # knobs that change what the docstring says of the default
    "adapter[placement=pfeiffer,init=zero,act=relu]": "yes",
    "arc[rank=5,init=xavier]": "no",
    "fourierft[n=50,alpha=20,init_std=1]": "no",
    "rlrr[init=kaiming]": "no",
    "lst[reduction=2,heads=6,join=replace]": "no",
    "prograd[init=,context=3,position=middle]": "no",
    "ssf[init_std=0.02]": "no",
}
STACKS = ("lora+ssf+bitfit", "ssf+lora", "lora+adapter", "full+repadapter+lora+lora")
A_FEW = ("vit", "beit", "swinv2", "nfnet", "resnet")
COMMON = ("vit", "resnet", "beit", "swin", "convnext")  # a method's first two of these run in `make test`
BASIC = ("lora", "ssf", "adapter")  # and these on every family; the whole table, in `make test-all`, takes too long
FIRST = 1  # on so many of its families a variant runs in `make test`


def works(method: str, family: str) -> bool:
    """Whether the support table says so."""
    return SUPPORT.get(method, {}).get(family, "") in WORKS


def home(method: str) -> str:
    """A family that a method works on, the plainest one."""
    return next(f for f in ("vit", "resnet", "dual") if works(method, f))


def quick(method: str, family: str) -> bool:
    """Whether a pair runs in `make test`: every method on two families or more, every family with three methods."""
    order = [f for f in (*COMMON, *FAMILIES) if works(method, f)]
    return method in BASIC or family in order[:2]


def pairs() -> list[Any]:
    """(method, family) that the support table says works."""
    return [marked(m, f, quick(m, f)) for m in METHODS for f in FAMILIES if works(m, f)]


def by_family() -> list[Any]:
    """The same pairs; in `make test` the basic methods on every family, for what depends on the family alone."""
    return [marked(m, f, m in BASIC) for m in METHODS for f in FAMILIES if works(m, f)]


def stacks() -> list[Any]:
    """Every ordered pair of methods on a ViT; in `make test` those with the first of the basic methods."""
    fit = [m for m in METHODS if works(m, "vit")]
    pairs = [(a, b) for a in fit for b in fit]
    return [pytest.param(a, b, marks=() if BASIC[0] in (a, b) else pytest.mark.slow) for a, b in pairs]


def refusals() -> list[Any]:
    """(method, family) that the table says are refused; in `make test` two families for each of a method's reasons."""
    found, seen = list[Any](), Counter[tuple[str, str]]()
    for method, family in ((m, f) for m in METHODS for f in FAMILIES if not works(m, f)):
        reason = re.sub(r"\b[A-Z]\w+", "*", SUPPORT[method][family])  # a network's class apart
        seen[method, reason] += 1
        found.append(marked(method, family, seen[method, reason] <= 2))
    return found


def marked(spec: str, family: str, quick: bool = True) -> Any:
    """The parameters of one test, which runs in `make test` when quick."""
    return pytest.param(spec, family, id=f"{spec}-{family}", marks=() if quick else pytest.mark.slow)


def everything(*, stacks_on: Iterable[str] = A_FEW) -> list[Any]:
    """All supported pairs, the variants, and the stacks on a few families or more."""
    variants = [marked(spec, f, i < FIRST) for spec, where in VARIANTS.items() for i, f in enumerate(where)]
    on = [(spec, f) for spec in STACKS for f in stacks_on]
    fit = [marked(s, f) for s, f in on if all(SUPPORT[p].get(f) in WORKS for p in s.split("+"))]
    return pairs() + variants + fit


def bare(family: str, **changes: Any) -> nn.Module:
    """A fresh tiny backbone in float64."""
    return families.build(family, **changes)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The output in evaluation mode, without a graph."""
    with torch.no_grad():
        return model.eval()(x)


def relative(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|a|."""
    return float((a - b).abs().max() / a.abs().max())


def fresh(spec: str, family: str, **changes: Any) -> nn.Module:
    """A tiny backbone with a delta as `inject` starts it."""
    return inject(bare(family, **changes), spec, batches=families.labelled(family))


def perturbed(spec: str, family: str, **changes: Any) -> nn.Module:
    """A fresh model with a delta of which no tensor, nor the head, is at its start."""
    model = fresh(spec, family, **changes)
    families.perturb(tensors_of(model))
    families.perturb(head_state(model), seed=2)
    return model


def identity(spec: str) -> str:
    """What the docstrings say of a fresh delta with these knobs, the weakest of a stack: yes, nearly or no."""
    if spec in STARTS:
        return STARTS[spec]
    docs = [" ".join(registry.card("methods", p.name).doc.split()) for p in knobs.parse(spec)]
    said = {re.search(r"Identity at init: (\w+)", doc)[1] for doc in docs}
    return next(word for word in ("no", "nearly", "yes") if word in said)


@dataclass(frozen=True)
class Case:
    """One spec on one family: images, the bare output, the output with the perturbed delta, and the delta."""

    x: Tensor
    bare: Tensor
    live: Tensor
    delta: Delta


@cache
def case(spec: str, family: str) -> Case:
    """The prepared case of a spec on a family (shared, never changed)."""
    x = families.batch(family)
    model = perturbed(spec, family)
    return Case(x, logits(bare(family), x), logits(model, x), extract(model, tasks=[TASK]))
