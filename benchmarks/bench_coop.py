"""A step of CoOp: its authors' loop on open_clip's model beside vtzoo's, on the same weights, images and class names.

    python benchmarks/bench_coop.py [--model ViT-B-32] [--classes 100] [--batch 32] [--rounds 3]

The authors' loop (github.com/KaiyangZhou/CoOp, trainers/coop.py) runs the image encoder and whole contexts in each step. Here prompts are cut behind the
longest one's end, and what the frozen image tower makes of an image is kept: once for each view. Weights are random; the first losses must
agree. Writes results/coop.json.
"""

import argparse
import statistics
import time
from typing import Any

import open_clip
import torch
from _results import keep
from torch import Tensor, nn
from torch.nn import functional as F

import vtzoo
from vtzoo.clip_names import converted
from vtzoo.identity import card_on
from vtzoo.prefix import find

WORDS = [
    "amber",
    "anchor",
    "apple",
    "arrow",
    "badge",
    "basket",
    "beacon",
    "birch",
    "bottle",
    "bridge",
    "bucket",
    "button",
    "cabin",
    "candle",
    "canyon",
    "carpet",
    "castle",
    "cedar",
    "chalk",
    "cherry",
]
HEAD = ("step", "ms", "of the authors'")


class Authors(nn.Module):
    """CoOp as its authors wrote it: context behind SOS, the class's tokens behind it, the text encoder on what comes of that."""

    before: Tensor
    behind: Tensor

    def __init__(self, model: Any, names: list[str], tokenize: Any) -> None:
        super().__init__()
        self.model, words = model, "a photo of a"
        self.ids = tokenize([f"{words} {name}." for name in names])
        with torch.no_grad():
            embedded = model.token_embedding(self.ids)
        self.register_buffer("before", embedded[:, :1])
        self.register_buffer("behind", embedded[:, 5:])
        self.context = nn.Parameter(embedded[0, 1:5].clone())

    def forward(self, images: Tensor) -> Tensor:
        """[n, 3, h, w] -> [n, classes]."""
        model = self.model
        x = torch.cat([self.before, self.context.expand(len(self.ids), -1, -1), self.behind], dim=1)
        x = model.ln_final(model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask))
        texts = x[torch.arange(len(x)), self.ids.argmax(-1)] @ model.text_projection
        return model.logit_scale.exp() * F.normalize(model.visual(images), dim=-1) @ F.normalize(texts, dim=-1).T


def main() -> None:
    """Run and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    theirs = open_clip.create_model(asked.model).eval().requires_grad_(requires_grad=False)
    names = [f"{WORDS[i % len(WORDS)]} {WORDS[i // len(WORDS)]}" for i in range(asked.classes)]
    ours: Any = vtzoo.build(f"clip:{asked.model}", pretrained=False)
    ours.load_state_dict(dict(converted(theirs.state_dict(), card_on(ours).model_args)))
    vtzoo.inject(ours.speak(names), "coop")
    images, labels = torch.randn(asked.batch, 3, 224, 224), torch.randint(asked.classes, (asked.batch,))
    prefix = find(ours)
    assert prefix is not None
    features = prefix.features(ours, images)
    runs: dict[str, tuple[nn.Module, Any]] = {
        "the authors' loop": (
            authors := Authors(theirs, names, open_clip.get_tokenizer(asked.model)),
            lambda: authors(images),
        ),
        "images in each step": (ours, lambda: ours(images)),
        "features kept": (ours, lambda: prefix.rest(ours, features)),
    }
    found: dict[str, Any] = {name: {"ms": [], "loss": 0.0} for name in runs}
    for _ in range(asked.rounds):
        for name, (model, run) in runs.items():
            started = time.perf_counter()
            loss = F.cross_entropy(run(), labels)
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
            found[name]["ms"].append(1000 * (time.perf_counter() - started))
            found[name]["loss"] = loss.item()
    losses = [own["loss"] for own in found.values()]
    assert max(losses) - min(losses) < 1e-4 * max(losses), losses
    first, rows = statistics.median(found["the authors' loop"]["ms"]), list[tuple[str, ...]]()
    for name, own in found.items():
        middle = statistics.median(own["ms"])
        rows.append((name, f"{middle:,.0f}", f"{middle / first:.3f}"))
        print(" | ".join(rows[-1]), flush=True)
    keep(__doc__ or "", f"{asked.model}, {asked.classes} classes, batch {asked.batch}", HEAD, rows, found)


if __name__ == "__main__":
    main()
