"""Distil EfficientNet-Lite0 into a small ViT at 64 px and write vtzoo/embedded/vit_embedded_64.safetensors (float16).

    python scripts/make_vit.py WORK [--epochs N] [--last N] [--views N]

WORK/corpus is fetched (`fetch_corpus.py`) unless it is there; WORK/zoo keeps the teacher's answers, the checkpoint and the
student, so that the same command goes on where it was stopped. No labels are used: the student learns the teacher's pooled
features ("feature" loss), both looking at the same crop; first at a random half of the student's patches, which makes each
step cheaper, in the last epochs at all of them (Li et al. 2022, FLIP, arXiv:2212.00794). What it has seen is listed in
NOTICE-vit_embedded_64.txt beside it.
"""

import argparse
import json
import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fetch_corpus
from make_lite0 import halve
from safetensors.torch import load_file

from vtzoo import talk
from vtzoo.fit import checkpoint_path
from vtzoo.tensors import write
from vtzoo.verbs.distill import distill
from vtzoo.zoo import Zoo

OUT = Path(__file__).resolve().parent.parent / "vtzoo" / "embedded" / "vit_embedded_64.safetensors"
TEACHER, NAME = "tf_efficientnet_lite0", "vit-embedded-64"
STUDENT = "vit_tiny_patch16_224[img_size=64,patch_size=8,depth=8,global_pool=avg,patch_drop_rate=0.5]"
RECIPE = {"optimizer": "muon", "lr": 2e-2, "batch_size": 64, "warmup_epochs": 0.3, "precision": "bf16", "workers": 2}
LAST_LR = 4e-3
LOG = logging.getLogger("make_vit")


def main(work: Path, epochs: int, last: int, views: int) -> None:
    """Fetch, distil, store."""
    corpus = work / "corpus"
    if not (corpus / "SOURCES.json").is_file():
        fetch_corpus.main(corpus)
    zoo = Zoo.init(work / "zoo", exist_ok=True)
    stages = {f"{NAME}-half": (STUDENT, epochs, RECIPE["lr"]), NAME: (f"{NAME}-half[patch_drop_rate=0]", last, LAST_LR)}
    for name, (student, passes, lr) in stages.items():
        if name not in {entry.name for entry in zoo.entries("models")}:
            going = checkpoint_path(zoo.root, name, "student").is_file()
            made = distill(
                teachers=[TEACHER], student=student, data=str(corpus), loss="feature", name=name, zoo=zoo, views=views,
                teacher_size=128, recipe={**RECIPE, "epochs": passes, "lr": lr}, resume=going,
            )  # fmt: skip
            LOG.info("%s", json.dumps(made.report))
    entries = [zoo.resolve(name, "models") for name in stages]
    state, lineage = halve(load_file(zoo.object(entries[-1].digest))), [entry.facts["lineage"] for entry in entries]
    about = {"source": f"distilled from {TEACHER} by scripts/make_vit.py", "views": str(lineage[0]["views"])}
    about |= {"epochs": " + ".join(str(one["recipe"]["epochs"]) for one in lineage)}
    write(OUT, {k: state[k] for k in sorted(state)}, {"format": "pt", "arch": "vit_tiny_patch16_224", **about})
    OUT.with_name(f"NOTICE-{OUT.stem}.txt").write_text(notice(json.loads((corpus / "SOURCES.json").read_text())))
    LOG.info("%s: %.2f MB", OUT.name, OUT.stat().st_size / 1e6)


def notice(sources: list[dict[str, Any]]) -> str:
    """Say what the weights were made from: one line per package of images."""
    total = sum(source["count"] for source in sources)
    lines = [
        f"  {' '.join(filter(None, (s['package'], s.get('version'))))}: {s['count']} ({s['license']})" for s in sources
    ]
    return f"""\
{OUT.name}

A vision transformer distilled from tf_efficientnet_lite0.safetensors (Apache License 2.0, see its notice) by
scripts/make_vit.py, Apache License 2.0 like the rest of vtzoo. No image and no label is part of it: it learned the
teacher's features of {total} pictures taken from these packages (pictures used, licences as the packages state them):

{chr(10).join(lines)}
"""


def steps(items: Iterable[object], label: str, total: int) -> Iterator[object]:
    """Log every tenth of a long loop."""
    every = max(1, math.ceil(total / 10))
    for i, item in enumerate(items):
        if i % every == 0:
            LOG.info("%s: %d/%d", label, i, total)
        yield item


def parsed() -> Any:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--last", type=int, default=1)
    parser.add_argument("--views", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    talk.install(LOG.info, steps)
    asked = parsed()
    main(asked.work, asked.epochs, asked.last, asked.views)
