"""Where each method acts by default on a plain ViT, a Swin and a ResNet, as its paper has it: a table of its own, typed by hand.

Counts and formulas can't tell layers of one shape from each other: an adapter beside the attention instead of the MLP passes
both. `tests/parity` has the formulas.
"""

import re

import pytest

from tests import families
from tests.contract.cases import METHODS, SUPPORT, WORKS
from vtzoo import registry
from vtzoo.anatomy import survey
from vtzoo.methods._protocol import composes
from vtzoo.sensitivity import scores

DENSE = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
NORMS = {"norm1", "norm2"}
BRANCHES = {"attn", "mlp"}
BLOCK = {""}  # the whole of it
WEIGHTS = ("bi-lora", "boft", "consolidator", "fact-tk", "fact-tt", "fourierft", "glora", "loha", "lokr", "lora", "oft", "rlrr", "shira", "svft", "vera")  # fmt: skip
INSIDE: dict[str, set[str]] = {  # by the name behind the block's
    **dict.fromkeys(WEIGHTS, DENSE),
    "adapter": BLOCK,
    "adapter-bias": {"mlp.fc2"},
    "adaptformer": {"mlp"},
    "arc": {"attn.qkv", "mlp.fc1"},
    "ape": set(),
    "bitfit": DENSE | NORMS,
    "clip-adapter": set(),
    "compacter": BRANCHES,
    "convpass": BRANCHES,
    "difffit": DENSE | NORMS,
    "dtl": BLOCK,
    "e2vpt": {"attn"},
    "full": DENSE | NORMS,
    "gated-vpt": BLOCK | {"attn"},
    "gps": DENSE,
    "hydra": {"attn.proj", "mlp.fc2"},
    "ia3": {"attn.qkv", "mlp.fc2"},
    "kadaptation": {"attn.qkv", "attn.proj"},
    "linear": set(),
    "lst": BLOCK,
    "mlp-head": set(),
    "mona": BLOCK
    | {"norm1", "drop_path1"},  # the sums behind attention and MLP; what the first is added to, and its branch
    "norm": NORMS,
    "partial": DENSE | NORMS,
    "pixel-prompt": set(),
    "repadapter": {"attn.qkv", "mlp.fc1"},
    "sa2vp": BLOCK,
    "sct": {"mlp.fc2"},
    "side-tuning": set(),
    "spt": DENSE | NORMS,
    "ssf": DENSE | NORMS,
    "tip-adapter": set(),
    "tip-adapter-f": set(),
    "vit-adapter": BLOCK,
    "vpt-deep": BLOCK,
    "vpt-shallow": set(),
    "vqt": BLOCK,
}
STEM, LAST = "patch_embed.proj", "norm"
OUTSIDE: dict[str, set[str]] = {
    "bitfit": {STEM, LAST},
    "convpass": {STEM},  # tells rows from columns
    "difffit": {STEM, LAST},
    "full": {"", STEM, LAST},
    "gated-vpt": {"norm_pre"},
    "gps": {STEM},
    "lst": {LAST},
    "mona": {STEM},
    "norm": {LAST},
    "partial": {LAST},
    "pixel-prompt": {STEM},
    "sa2vp": {"patch_embed", LAST},
    "side-tuning": {STEM, LAST},
    "ssf": {STEM, LAST},
    "vit-adapter": {STEM, LAST},
    "vpt-shallow": {"norm_pre", LAST},
    "vqt": {LAST},
}
SWIN: dict[str, set[str]] = {  # where it differs: full has tables of positions, maps have their guides in the block
    "convpass": {"mlp", "norm1", "drop_path1"},
    "conv-adapter": {"norm1", "drop_path1"},
    "full": DENSE | NORMS | {"attn"},
    "partial": DENSE | NORMS | {"attn"},
    "vpt-deep": {"attn"},
}
SOME = {"partial", "spt", "vit-adapter", "dtl", "sa2vp"}  # not the same in every block


def found(method: str, family: str) -> tuple[dict[str, set[str]], set[str]]:
    """By block the names inside it, and the other names."""
    module, model = registry.load("methods", method), families.build(family)
    anatomy = survey(model, rate=lambda: scores(model, batches), batches=(batches := families.labelled(family)))
    inside: dict[str, set[str]] = {b.name: set() for b in anatomy.blocks}
    outside: set[str] = set()
    for site in module.sites(anatomy, module.Config()):
        block = next((b for b in inside if f"{site.name}.".startswith(f"{b}.")), None)
        if block is None:
            outside.add(site.name)
        else:
            inside[block].add(site.name.removeprefix(block).lstrip("."))
    return inside, outside


def acting(family: str) -> list[str]:
    """The methods that find sites there by themselves."""
    return [m for m in METHODS if SUPPORT[m][family] in WORKS and not composes(registry.load("methods", m))]


@pytest.mark.parametrize("method", acting("vit"))
def test_places_in_a_vit(method: str) -> None:
    """In every block the layers that the paper names, and no others; what lies outside the blocks too."""
    inside, outside = found(method, "vit")
    assert outside == OUTSIDE.get(method, set())
    names = set().union(*inside.values())
    assert names == INSIDE[method] or (method == "spt" and names < INSIDE[method])  # it chooses
    assert method in SOME or all(names == INSIDE[method] for names in inside.values())


@pytest.mark.parametrize("method", acting("swin"))
def test_places_in_a_swin(method: str) -> None:
    """The same layers of a window transformer's blocks."""
    inside, _ = found(method, "swin")
    assert set().union(*inside.values()) == SWIN.get(method, INSIDE.get(method))


@pytest.mark.parametrize("method", acting("resnet"))
def test_places_in_a_resnet(method: str) -> None:
    """A convolutional network's blocks stand in for a transformer's, its convolutions for the linears."""
    inside, outside = found(method, "resnet")
    names = set().union(*inside.values())
    convs = {"conv1", "conv2", "conv3", "downsample.0", "downsample.1"}
    norms = {"bn1", "bn2", "bn3", "downsample.0", "downsample.1", "downsample.2"}
    whole = {"adapter", "adaptformer", "compacter", "convpass", "dtl", "lst", "mona"}
    if method in whole | {"side-tuning"}:
        assert names <= BLOCK
        assert bool(names) or "side-tuning" in method
    elif method in ("bitfit", "difffit", "norm"):
        assert {"bn1", "bn2"} <= names <= norms
    elif method in ("full", "partial", "spt", "ssf"):
        assert {"bn1", "conv1", "bn2", "conv2"} <= names <= norms | convs
    elif INSIDE.get(method) == set():
        assert not names
    else:
        assert names
        assert names <= convs
    assert all(re.fullmatch(r"|conv1(\.\d+)?|bn1|layer\d\.\d+", n) for n in outside)
