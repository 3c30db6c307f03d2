"""What the embedded ViT knows: a linear probe on its frozen features, beside the same network at random and its teacher.

    python benchmarks/bench_embedded.py [DATA[@N] …]

Each DATA is a folder train|val|test/CLASS/* or vtzoo:NAME (default: the embedded tasks), of which N training images are
used, drawn anew for each of three seeds; the learning rate is chosen on the validation images. Top-1 on the test images,
mean of the seeds. Writes results/embedded.json.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from _probe import probed
from _results import keep

from vtzoo import data as D
from vtzoo.artifact import resolved_card
from vtzoo.backbone import build_card, sized
from vtzoo.zoo import Zoo

HEAD = ("task", "training images", "network", "test top-1, mean", "by seed")
VIT, TEACHER = "vit_embedded_64", "tf_efficientnet_lite0"
SEEDS, EPOCHS = 3, 20
LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
NETWORKS = (
    ("ViT, 64 px", VIT, 64, True),
    ("ViT at random, 64 px", VIT, 64, False),
    ("teacher, 64 px", TEACHER, 64, True),
    ("teacher, 128 px", TEACHER, 128, True),
)


def accuracy(network: str, pixels: int, pretrained: bool, data: str, limit: int) -> list[float]:
    """Test top-1 of each seed's probe."""
    zoo = Zoo.find()
    card, args = sized(resolved_card(network, zoo), pixels)
    torch.manual_seed(0)
    model = build_card(card, zoo=zoo, pretrained=pretrained, **args)
    heads = probed(model, card.preprocess, data, limit=limit, seeds=SEEDS, lrs=LRS, epochs=EPOCHS)
    return [head.test for head in heads]


def main() -> None:
    """Print rows as they come and keep them."""
    found: dict[str, dict[str, Any]] = {}
    rows: list[tuple[str, ...]] = []
    for asked in sys.argv[1:] or [f"vtzoo:{name}" for name in D.embedded_tasks()]:
        data, _, limit = asked.partition("@")
        task = Path(data).name
        for label, network, pixels, pretrained in NETWORKS:
            scores = accuracy(network, pixels, pretrained, data, int(limit or 0))
            found.setdefault(task, {})[label] = scores
            shown = f"{statistics.fmean(scores):.3f}", " ".join(f"{s:.3f}" for s in scores)
            rows.append((task, limit or "all", label, *shown))
            print("  ".join(rows[-1]), flush=True)
    where = "other images" if sys.argv[1:] else "what the package carries"
    keep(__doc__ or "", f"linear probes on {where}", HEAD, rows, found)


if __name__ == "__main__":
    main()
