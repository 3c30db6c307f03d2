"""Methods of a text tower from images to exported files, on a small random dual encoder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from tests.unit.spoken import TEXT, VIT, spoken
from vtzoo.artifact import go_live, open_ref, simplest
from vtzoo.backbone import create
from vtzoo.delta import Delta, listed
from vtzoo.errors import Corrupt, ShapeMismatch, UsageError
from vtzoo.fingerprint import base_state, fingerprint
from vtzoo.live import extract, inject
from vtzoo.results import Trained
from vtzoo.spec import BackboneCard, Preprocess
from vtzoo.tensors import TensorFile
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.export.onnx import export_onnx
from vtzoo.verbs.export.program import export_program
from vtzoo.verbs.train import train
from vtzoo.verbs.zero_shot import zero_shot
from vtzoo.zoo import Zoo

METHODS = ("kgcoop", "prograd", "cocoop", "plot[context=3]")
RECIPE = {"epochs": 6, "batch_size": 10, "lr": 2e-2, "seed": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two classes of noise, bright and dark."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(50):
        place = folder / ("train" if i < 40 else "val") / ("cat", "traffic-light")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 200, (32, 32, 3)) + 50 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A zoo with a dual encoder, called `dual`."""
    folder = tmp_path_factory.mktemp("spoken")
    made, base = Zoo.init(folder / "zoo"), base_state(spoken().float())
    save_file({n: t.contiguous() for n, t in base.items()}, folder / "w.safetensors")
    digest = made.add_object(folder / "w.safetensors")
    card = BackboneCard(
        name="dual", arch="clip", source=f"object:sha256:{digest}", fingerprint=fingerprint(base), model_args=VIT, head=("clip_head",),
        preprocess=Preprocess(input_size=(3, 32, 32)),
    )  # fmt: skip
    size_bytes = (folder / "w.safetensors").stat().st_size
    made.put("backbones", "dual", {**card.json(), "digest": digest, "size_bytes": size_bytes})
    return made


def run(zoo: Zoo, data: str, method: str, name: str = "", **recipe: Any) -> Trained:
    """Train it."""
    name = name or f"t/{method.partition('[')[0]}"
    return train(backbone="dual", data=data, method=method, name=name, zoo=zoo, recipe={**RECIPE, **recipe})


@pytest.mark.parametrize("method", METHODS)
def test_trained_and_measured_again(zoo: Zoo, data: str, method: str) -> None:
    """Each learns, what is opened again measures the same, and only CoCoOp needs the text tower for that."""
    made = run(zoo, data, method)
    assert made.metrics["val"]["top1"] >= 0.8
    artifact = open_ref(made.ref, zoo)
    live, why = simplest(artifact)
    assert (live.model.text is not None) == ("cocoop" in method)
    assert bool(why) == (method in METHODS[2:])
    again = evaluate(ref=made.ref, data=data, zoo=zoo)
    assert again.metrics["t"]["top1"] == pytest.approx(made.metrics["val"]["top1"])
    assert artifact.delta is not None
    assert artifact.delta.tasks[0].words == ("cat", "traffic light")


def test_the_whole_network_in_bf16_gives_the_same(zoo: Zoo, data: str) -> None:
    """In bf16, with a LoRA on the image tower, blocks that are computed again, smoothed labels and mixed images ProGrad still learns."""
    more: dict[str, Any] = {"precision": "bf16", "checkpointing": True, "label_smoothing": 0.1, "mixup": 0.2}
    made = run(zoo, data, "prograd+lora[rank=2]", "t/whole", **more)
    assert made.metrics["val"]["top1"] >= 0.8


def test_a_loss_of_its_own_is_resumed(zoo: Zoo, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped goes on to the very file that a whole run gives: it compares with what the run began with."""
    from vtzoo import fit
    from vtzoo.errors import Interrupted

    whole = run(zoo, data, "kgcoop", "whole/kgcoop")
    step, left = fit._Run.step, [5]

    def stopped(self: Any, batch: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(fit._Run, "step", stopped)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        run(zoo, data, "kgcoop", "again/kgcoop")
    monkeypatch.setattr(fit._Run, "step", step)
    args = {"backbone": "dual", "data": data, "method": "kgcoop", "name": "again/kgcoop", "zoo": zoo, "recipe": RECIPE}
    again = train(**args, resume=True)
    mine, theirs = (Delta.open(Path(r.path)).tensors for r in (whole, again))
    assert all((mine[n] == theirs[n.replace("whole", "again")]).all() for n in mine)


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("width", -1),
        ("width", 10**9),
        ("width", "x"),
        ("count", 10**9),
        ("count", None),
        ("classes", 10**9),
        ("init", None),
    ],
)
def test_a_header_of_other_sizes_is_refused(zoo: Zoo, fact: str, value: Any) -> None:
    """What a header tells of the learned words is compared with its tensors, before anything of that size is made."""
    if not [e for e in zoo.entries("deltas") if e.name == "told/coop"]:
        zero_shot(backbone="dual", name="zero/shot", classes=["cat", "dog"], zoo=zoo)
        model = spoken().float()
        inject(model, "coop")
        card = open_ref("zero/shot", zoo).delta.backbone  # type: ignore[union-attr] - it is a delta
        listed(extract(model, task="told", backbone=card), zoo, "told/coop", {})
    artifact = open_ref("told/coop", zoo)
    assert artifact.delta is not None
    (part,) = artifact.delta.parts
    (site,) = part.sites
    garbled = replace(part, sites=(replace(site, facts={**site.facts, fact: value}),))
    with pytest.raises((Corrupt, ShapeMismatch)):
        go_live(replace(artifact, delta=artifact.delta.with_(parts=(garbled,))), whole=True)


@pytest.mark.parametrize(
    "text", [{"context_length": 60_000}, {"layers": 10**4}, {"width": -8}, {"width": "x"}, {"heads": 0}, {"evil": 1}]
)
def test_a_card_of_no_text_tower_is_refused(text: dict[str, Any]) -> None:
    """Sizes that none has, before anything of that size is made, and arguments that none takes."""
    with pytest.raises(UsageError):
        create("clip", **{**VIT, "text": {**TEXT, **text}})
    with pytest.raises(UsageError, match="no text tower is True"):
        create("clip", **{**VIT, "text": True})
    with pytest.raises(UsageError, match="no embeddings are -1 wide"):
        create("clip", **{**VIT, "embed_dim": -1})


def test_a_stack_of_two_losses_is_refused(zoo: Zoo, data: str) -> None:
    """Both would build the head, which is said first; there is no head to train alone either."""
    with pytest.raises(UsageError, match="kgcoop and prograd"):
        run(zoo, data, "kgcoop+prograd", "t/both")
    with pytest.raises(UsageError, match="no head to train alone"):
        run(zoo, data, "kgcoop", "t/probed", probe_epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_exported(zoo: Zoo, data: str, tmp_path: Path, method: str) -> None:
    """As ONNX and PT2 all run like the network, for any number of images; only CoCoOp's files hold a text tower."""
    ref = run(zoo, data, method, f"exported/{method.partition('[')[0]}", epochs=1).ref
    export_onnx(ref=ref, out=tmp_path / "m.onnx", zoo=zoo, tolerance=1e-4)
    export_program(form="pt2", ref=ref, out=tmp_path / "m.pt2", zoo=zoo, tolerance=1e-4)
    words = sum(
        t.numel() for n, t in TensorFile(zoo.object(zoo.resolve("dual").facts["digest"])).items() if "token_emb" in n
    )
    for path in (tmp_path / "m.onnx", tmp_path / "m.pt2"):
        assert (path.stat().st_size > 4 * words) == ("cocoop" in method)
