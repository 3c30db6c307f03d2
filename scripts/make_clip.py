"""Make a small dual encoder, and two tasks of kinds it has never seen, from package registries: `make_clip.py OUT`.

OUT/clip is a folder that open_clip opens (`local-dir:OUT/clip`); OUT/tasks/{clipart,emoji}/{train,val,test}/CLASS/*
are the tasks. Both appear whole or not at all.

    image tower   the embedded EfficientNet-Lite0 at 128 px, a linear projection to 256
    text tower    2 layers of width 256 over CLIP's tokens, taught by all-MiniLM-L6-v2
    pairs         emoji of three vendors, Open Clip Art, Tux Paint's stamps, Art4Apps' flash cards, Sweet Home 3D's
                  furniture, with the names, keywords and folders that their packages give them

First the text tower learns where the sentence encoder's embeddings point, seen from the mean of all captions (they
point to one side; otherwise the towers meet in a narrow cone); a phrase in a template is to mean what the phrase means.
Then, as in LiT (Zhai et al. 2022, arXiv:2111.07991) with the text tower locked, the image tower learns where a
drawing's captions point: its projection is a ridge regression, and CLIP's loss over the pairs chooses the temperature.
Trained further by that loss, the projection or the trunk's late stages told held-out kinds apart less well: with some
thousand pairs it learns to tell these very drawings apart.

Held out: the kinds in `_heldout.py`. No drawing filed under one, said to be one, or a kind of one by WordNet is in the
alignment, and none that looks nearly like a drawing of the tasks. The text tower has read the words, classes' names
included: it knows what a bird is, and no drawing of one has been shown beside it. The trunk knows ImageNet's photos.
"""

import argparse
import json
import logging
import math
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _gather
import _image_tower as image_tower
import _text_tower as text_tower
import torch
from _captions import different, lexicon, said, templated
from _near import Known
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

TRUNK = Path(__file__).resolve().parent.parent / "vtzoo" / "embedded" / "tf_efficientnet_lite0.safetensors"
WIDTH = 256
MODEL: dict[str, Any] = {
    "custom_text": True,
    "embed_dim": WIDTH,
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "timm_proj_bias": True,
        "image_size": image_tower.SIDE,
    },
    "text_cfg": {
        "context_length": text_tower.CONTEXT,
        "vocab_size": 49408,
        "width": WIDTH,
        "heads": 4,
        "layers": 2,
        "proj_bias": True,
    },
}
LOOK = {
    "size": image_tower.SIDE,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
LEMMAS, GLOSSES = 20_000, 4_000
ASKED = ("{}", "a drawing of a {}.", "a photo of a {}.")
LOG = logging.getLogger("make_clip")


def built() -> Any:
    """The model, its trunk as embedded, the rest as open_clip starts it."""
    import open_clip

    model = open_clip.CustomTextCLIP(**{k: v for k, v in MODEL.items() if k != "custom_text"}).eval()
    state = {k: v.float() for k, v in load_file(TRUNK).items() if not k.startswith("classifier")}
    missing, unexpected = model.visual.trunk.load_state_dict(state, strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise SystemExit(f"{TRUNK.name} does not fit: {missing}, {unexpected}")
    return model


def tokenizer() -> Any:
    """CLIP's own tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=text_tower.CONTEXT)


def teach_words(
    model: Any, sentences: text_tower.Sentences, captions: Sequence[tuple[str, ...]], words: Sequence[str], nouns: Path
) -> float:
    """Train the text tower on captions, the classes' words and a part of WordNet; gives the mean cosine it comes to."""
    spoken = different([*(text for texts in captions for text in texts), *words])
    lemmas, glosses = lexicon(nouns)
    rng = random.Random("text")
    more = different([*rng.sample(lemmas, LEMMAS), *rng.sample(glosses, GLOSSES)])
    phrases = [*spoken, *(text for text in more if text not in set(spoken))]
    LOG.info("text tower: %d phrases", len(phrases))
    embeddings = sentences(phrases)
    where = {phrase: i for i, phrase in enumerate(phrases)}
    mean = torch.stack([embeddings[[where[t] for t in texts]].mean(0) for texts in captions]).mean(0)
    targets = normalize(embeddings - mean, dim=-1)
    targets = targets @ text_tower.directions(targets[: len(spoken)], WIDTH)
    texts, rows = list(phrases), list(range(len(phrases)))
    for part, each in ((spoken, 2), (list(words), 20), (more[::3], 1)):
        again, of = templated(part, each, f"{len(part)}")
        texts += again
        rows += [where[part[i]] for i in of]
    speak = tokenizer()
    text_tower.start_from(model.text, sentences, speak)
    LOG.info("text tower: %d texts", len(texts))
    return text_tower.distil(model.text, speak(texts), targets[rows], epochs=3, lr=2e-3)


@torch.inference_mode()
def spoken_by(model: Any, phrases: Sequence[str]) -> Tensor:
    """The text tower's features [n, k], of length 1."""
    return torch.cat([normalize(model.text(part), dim=-1) for part in tokenizer()(list(phrases)).split(256)])


def align(model: Any, images: Sequence[Image.Image], captions: Sequence[tuple[str, ...]]) -> None:
    """Give the image tower the projection and the model the temperature that fit the pairs best."""
    phrases = different(text for texts in captions for text in texts)
    features, where = spoken_by(model, phrases).clone(), {phrase: i for i, phrase in enumerate(phrases)}
    means = normalize(torch.stack([features[[where[t] for t in texts]].mean(0) for texts in captions]), dim=-1)
    seen = image_tower.pooled(model.visual.trunk, images)
    projection = model.visual.head.proj
    with torch.no_grad():
        for own, value in zip(
            (projection.weight, projection.bias), image_tower.least_squares(seen, means), strict=True
        ):
            own.copy_(value)
        scale = image_tower.best_scale(projection(seen), means)
        model.logit_scale.fill_(math.log(scale))
    LOG.info("image tower: %d drawings, scale %.1f", len(images), scale)


def store(model: Any, folder: Path) -> None:
    """Write the folder that open_clip opens."""
    from vtzoo.tensors import write

    folder.mkdir(parents=True)
    write(folder / "open_clip_model.safetensors", dict(sorted(model.state_dict().items())), {"format": "pt"})
    text = json.dumps({"model_cfg": MODEL, "preprocess_cfg": LOOK}, indent=1) + "\n"
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")


@torch.inference_mode()
def zero_shot(model: Any, look: Any, task: Path) -> dict[str, float]:
    """Top-1 of the test images by template, told from the classes' names alone."""
    classes = sorted(path.name for path in (task / "test").iterdir())
    files = sorted((task / "test").rglob("*.png"))
    images = torch.stack([look(Image.open(path)) for path in files])
    features = torch.cat([model.encode_image(part, normalize=True) for part in images.split(64)])
    labels = torch.tensor([classes.index(path.parent.name) for path in files])
    found = {"chance": 1 / len(classes)}
    for template in ASKED:
        words = spoken_by(model, [template.format(name.replace("-", " ")) for name in classes])
        found[template] = ((features @ words.T).argmax(1) == labels).float().mean().item()
    return {key: round(value, 4) for key, value in found.items()}


def card(model: Path, tasks: Path, about: dict[str, Any]) -> None:
    """Measure what was stored, as open_clip opens it, and write SOURCES.json beside it."""
    import open_clip

    opened, _, look = open_clip.create_model_and_transforms(f"local-dir:{model}")
    about["zero_shot_top1"] = {path.name: zero_shot(opened.eval(), look, path) for path in sorted(tasks.iterdir())}
    LOG.info("%s", about["zero_shot_top1"])
    (model / "SOURCES.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def main(out: Path) -> None:
    """Gather, teach, align, store, measure; OUT appears at the end."""
    began = time.monotonic()
    torch.manual_seed(0)
    new = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        about = make(new)
        took = {"seconds": round(time.monotonic() - began), "cpu_seconds": round(time.process_time())}
        card(new / "clip", new / "tasks", about | took)
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def make(out: Path) -> dict[str, Any]:
    """Write OUT/tasks and OUT/clip; gives what there is to say of them."""
    model, known = built(), Known()
    with _gather.packages() as found:
        tasks = _gather.lay_out(found, out / "tasks", known)
        rows = list(_gather.to_align(found, known))
        captions, images = [said(pair) for pair, _ in rows], [image for _, image in rows]
        counts = Counter(pair.kind.split("/", 1)[0] for pair, _ in rows)
        LOG.info("%d drawings: %s", len(rows), dict(counts))
        words = sorted({name for task in tasks.values() for name in task["classes"]})
        sentences = text_tower.Sentences(next(found.folder(_gather.WHEEL[0]).rglob("model.safetensors")).parent)
        cosine = teach_words(model, sentences, captions, words, found.share("wordnet-base", "wordnet"))
        sources = found.sources()
    align(model, images, captions)
    store(model, out / "clip")
    return {
        "sources": sources,
        "pairs": dict(sorted(counts.items())),
        "phrases": len({text for texts in captions for text in texts}),
        "held_out": tasks,
        "text_cosine": round(cosine, 4),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args().out
    if asked.exists():
        parser.error(f"{asked} exists already")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(asked)
