"""A dual encoder's prompts at work: shipped without the text tower, and tuned on each image at test time."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.families import perturb
from vtzoo import build
from vtzoo.artifact import Live, open_ref
from vtzoo.delta import stored
from vtzoo.errors import NotFoldable, UsageError
from vtzoo.fingerprint import fingerprint_of
from vtzoo.graft import tensors_of
from vtzoo.installed import head_state
from vtzoo.live import extract, inject
from vtzoo.spec import BackboneCard, Preprocess, Task
from vtzoo.test_time import Config, Tuner, asked, speaking, tuner
from vtzoo.tunable import tunable
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.export.onnx import export_onnx
from vtzoo.verbs.fold import fold_ref
from vtzoo.verbs.predict import predict
from vtzoo.zoo import Zoo
from vtzoo_cli._main import main

NAMES = ("cat", "dog", "emu")
TEXT = {"width": 12, "heads": 2, "layers": 2, "context_length": 20}
TRUNK = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
ARGS = {"trunk": "vit_base_patch32_clip_224", "trunk_args": TRUNK, "embed_dim": 20, "text": TEXT}
SQUARE = Preprocess(input_size=(3, 32, 32))


def picture(seed: int) -> Image.Image:
    """Coloured noise of 40 x 36 pixels."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (36, 40, 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A zoo with a narrow dual encoder, `dual`, and deltas on it that were moved at random."""
    folder = tmp_path_factory.mktemp("towers")
    made = Zoo.init(folder / "zoo")
    torch.manual_seed(0)
    model = timm.create_model("clip", **ARGS)
    save_file(model.state_dict(), folder / "dual.safetensors")
    digest = made.add_object(folder / "dual.safetensors")
    card = BackboneCard(name="dual", arch="clip", source=f"object:sha256:{digest}", fingerprint=fingerprint_of(model),
        head=(), features=20, preprocess=SQUARE, model_args=ARGS)  # fmt: skip
    made.put("backbones", "dual", {**card.json(), "digest": digest, "size_bytes": 1})
    for spec in ("coop", "maple", "upt", "vl-prompt", "lora[targets=text.qkv]", "zero-shot"):
        _keep(made, card, spec, moved=spec != "zero-shot")
    _keep(made, card, "linear", name="moved", moved=True)
    _keep(made, card, "zero-shot", name="wordless", templates=("{} texture.",))
    _keep(made, card, "zero-shot", name="two", templates=("a photo of a {}.", "{} alone.", "art of the {}."))
    _keep(made, card, "coop", name="several", multilabel=True)
    return made


def _keep(
    zoo: Zoo, card: BackboneCard, spec: str, *, name: str = "", moved: bool = False,
    templates: tuple[str, ...] = ("a photo of a {}.",), multilabel: bool = False,
) -> None:  # fmt: skip
    model = build("dual", zoo=zoo)
    model.speak(NAMES, templates)
    inject(model, spec)
    if moved:
        perturb({**tensors_of(model), **head_state(model)}, scale=0.05)
    task = Task(name="t", classes=NAMES, preprocess=SQUARE, words=NAMES, templates=templates, multilabel=multilabel)
    delta = extract(model, tasks=[task], backbone=card)
    digest, size = stored(delta, zoo)
    facts = {"digest": digest, "size_bytes": size, "method": spec, "backbone": "dual", "tasks": ["t"]}
    zoo.put("deltas", f"t/{name or spec.partition('[')[0]}", facts)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two test images of each class."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate(NAMES * 2):
        path = folder / "test" / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return folder


@pytest.mark.parametrize("method", ["maple", *(pytest.param(m, marks=pytest.mark.slow) for m in ("upt", "vl-prompt"))])
def test_shipped_without_a_text_tower(method: str, zoo: Zoo, tmp_path: Path) -> None:
    """It doesn't fold, and says why; as ONNX it computes what the whole encoder does, and none of its tensors is the text tower's."""
    with pytest.raises(NotFoldable, match=f"{method}: no: .* no stock architecture does"):
        fold_ref(ref=f"t/{method}", out=tmp_path / "folded", zoo=zoo)
    report = export_onnx(ref=f"t/{method}", out=tmp_path / "m.onnx", zoo=zoo).report
    assert not report["folded"]
    assert report["max_rel"] < 1e-4
    held = onnx.load(tmp_path / "m.onnx").graph.initializer
    assert not [t.name for t in held if "text" in t.name or TEXT["width"] in t.dims]
    image = tmp_path / "one.png"
    picture(0).save(image)
    shipped = predict(ref=str(tmp_path / "m.onnx"), images=image, zoo=zoo, top=3).predictions[0]["top"]
    whole = ready(f"t/{method}", zoo, Config(views=1)).live
    with torch.no_grad():
        wanted = whole.model(tuner_view(whole)).softmax(-1)[0]
    assert {c["class"]: c["probability"] for c in shipped} == pytest.approx(
        dict(zip(NAMES, wanted.tolist(), strict=True)), abs=1e-5
    )


def tuner_view(live: Live) -> Tensor:
    """The first picture as a network sees it."""
    return Tuner(live, Config(views=1), [nn.Parameter(torch.zeros(1))], deep=False)._views(picture(0))


def ready(ref: str, zoo: Zoo, config: Config) -> Tuner:
    """A delta to be tuned on each image."""
    return tuner(speaking(open_ref(ref, zoo), None), config)


def by_hand(model: nn.Module, prompts: Sequence[nn.Parameter], views: Tensor, share: float, lr: float) -> Tensor:
    """The paper's: the surest views, one step of AdamW from rest, the prediction of the first view."""
    with torch.no_grad():
        chances = model(views).softmax(-1)
        surprise = -(chances * chances.log()).sum(-1)
        kept = sorted(range(len(views)), key=lambda i: float(surprise[i]))[: math.floor(share * len(views))]
    mean = model(views[kept]).softmax(-1).mean(0)
    gradients = torch.autograd.grad(-(mean * mean.log()).sum(), prompts)
    with torch.no_grad():
        for p, g in zip(prompts, gradients, strict=True):
            p.copy_(p * (1 - lr * 0.01) - lr * g / (g.abs() + 1e-8))
        return model(views[:1])[0]


@pytest.mark.parametrize("method", ["coop", "maple", "upt", "zero-shot"])
def test_tuned_as_the_paper_says(method: str, zoo: Zoo) -> None:
    """One step in float64 gives the logits of the formula; prompts among words alone, in both towers, and a template's words."""
    made = ready(f"t/{method}", zoo, Config(views=8, keep=0.4, lr=0.02))
    made.live.model.double()
    before = [p.clone() for p in made.prompts]
    untuned = made.live.model(made._views(picture(3))[:1])[0].detach()
    found = made._tuned(made._views(picture(3))).detach()
    assert any(not torch.equal(p, b) for p, b in zip(made.prompts, before, strict=True))
    with torch.no_grad():
        for p, b in zip(made.prompts, before, strict=True):
            p.copy_(b)
    wanted = by_hand(made.live.model, made.prompts, made._views(picture(3)), 0.4, 0.02)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)
    assert float((found - untuned).abs().max()) > 1e-4


def test_only_prompts_are_tuned(zoo: Zoo) -> None:
    """All that coop or maple have learned, and nothing else; of a zero-shot delta the words in front of the name."""
    for method, names in (
        ("coop", {"text.token_embedding.coop.context"}),
        ("maple", {f"maple.{n}" for n in ("prompts", "weight", "bias")}),
    ):
        made = ready(f"t/{method}", zoo, Config())
        own = dict(made.live.model.named_parameters())
        assert {n for n, p in own.items() if any(p is q for q in made.prompts)} == names
        assert made.deep == (method == "maple")
    for name, count in (("zero-shot", 4), ("two", 4 + 3)):
        made = ready(f"t/{name}", zoo, Config())
        assert [p.shape for p in made.prompts] == [(count, 12)]


def test_words_start_as_words(zoo: Zoo) -> None:
    """Before a step the logits are those of zero-shot with these templates."""
    for name in ("zero-shot", "two"):
        ref = open_ref(f"t/{name}", zoo)
        made = tuner(speaking(ref, None), Config(views=1))
        weight = made.live.model.get_classifier().layer()[0]
        assert torch.allclose(weight, ref.delta.head("t")["clip_head.weight"], atol=1e-5)


def test_nothing_is_kept_from_one_image_for_the_next(zoo: Zoo) -> None:
    """Prompts are bit for bit what they were; an image gets the same answer in any order, another one with other crops."""
    made = ready("t/coop", zoo, Config(views=6, keep=0.5, lr=0.05))
    before = [p.detach().clone() for p in made.prompts]
    first = made(picture(1))
    made(picture(2))
    assert torch.equal(made(picture(1)), first)
    assert all(torch.equal(p, b) for p, b in zip(made.prompts, before, strict=True))
    assert all(p.grad is None for p in made.prompts)
    for other in (Config(views=6, keep=0.5, lr=0.05, seed=1), Config(views=6, keep=0.5, lr=0.05, augmix=True)):
        assert not torch.equal(ready("t/coop", zoo, other)(picture(1)), first)


def test_the_prompts_are_put_back_when_it_fails(zoo: Zoo) -> None:
    """A fault in the middle of an image leaves no tuned prompts behind."""
    made = ready("t/coop", zoo, Config(views=4, keep=0.5, steps=2))
    before = made.prompts[0].detach().clone()
    calls: list[int] = []

    def broken(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:  # the first step is taken
            raise RuntimeError("out of memory")

    hook = made.live.model.get_classifier().register_forward_hook(broken)
    made._start  # noqa: B018 - computed before anything is counted
    with pytest.raises(RuntimeError, match="out of memory"):
        made(picture(0))
    hook.remove()
    assert torch.equal(made.prompts[0], before)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("moved", "has learned more than words"),
        ("wordless", "the template '{} texture.' has no words in front of the name"),
        ("several", "makes one class surer, and an image here has several"),
    ],
)
def test_what_has_no_words_to_tune_is_refused(name: str, why: str, zoo: Zoo) -> None:
    """A classifier that was trained, a template that begins with the name, images with several labels."""
    with pytest.raises(UsageError) as refusal:
        ready(f"t/{name}", zoo, Config())
    assert why in str(refusal.value)


def test_what_has_no_text_tower_is_refused(zoo: Zoo, tmp_path: Path, pictures: Path) -> None:
    """A folded delta has nothing that is told words; what else may be tuned, is said."""
    fold_ref(ref="t/coop", out=tmp_path / "folded", zoo=zoo)
    with pytest.raises(UsageError, match="is no delta with one"):
        evaluate(ref=str(tmp_path / "folded"), data=str(pictures), zoo=zoo, test_time="tpt")
    with pytest.raises(UsageError, match="nothing for test time is called 'tent'"):
        asked("tent")
    with pytest.raises(UsageError, match="no knob 'view'"):
        asked("tpt[view=3]")


def test_lora_in_the_text_tower_is_no_prompt(zoo: Zoo) -> None:
    """With LoRA on the text tower it is the words that are tuned, not LoRA."""
    made = ready("t/lora", zoo, Config(views=4, keep=0.5))
    assert [p.shape for p in made.prompts] == [(4, 12)]
    with torch.no_grad():
        assert torch.allclose(
            made.live.model.get_classifier().layer()[0],
            open_ref("t/lora", zoo).delta.head("t")["clip_head.weight"],
            atol=1e-5,
        )


def test_on_the_command_line(zoo: Zoo, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`vtzoo eval` and `vtzoo predict` with --test-time agree image by image, and say what was tuned."""
    spec = "tpt[views=5,keep=0.5,lr=0.05]"

    def run(*words: str) -> dict[str, Any]:
        assert main([*words, "--test-time", spec, "--zoo", str(zoo.root), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    metrics = run("eval", "t/coop", "--data", str(pictures))["metrics"]["t"]
    said = run("predict", "t/coop", str(pictures / "test"), "--top", "1")["predictions"]
    assert metrics["test_time"] == spec
    assert metrics["images"] == len(said) == 6
    right = [p["top"][0]["class"] == Path(p["image"]).parent.name for p in said]
    assert metrics["top1"] == pytest.approx(sum(right) / 6)
    plain = evaluate(ref="t/coop", data=str(pictures), zoo=zoo).metrics["t"]
    assert abs(plain["loss"] - metrics["loss"]) > 1e-4


def test_a_bare_encoder_is_tuned(zoo: Zoo, pictures: Path) -> None:
    """Named the data's own classes, it is what a zero-shot delta is."""
    found = [
        evaluate(ref=ref, data=str(pictures), zoo=zoo, test_time="tpt[views=4,keep=0.5]").metrics[task]
        for ref, task in (("dual", "zero-shot"), ("t/zero-shot", "t"))
    ]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)


def test_tunable_of_a_model_at_hand() -> None:
    """The same without a zoo: the words of a dual encoder that only knows names."""
    torch.manual_seed(0)
    model = timm.create_model("clip", **ARGS).speak(NAMES).eval().requires_grad_(requires_grad=False)
    prompts, deep = tunable(model, Task(name="t", classes=NAMES))
    assert not deep
    assert torch.equal(prompts[0], model.text.token_embedding._parameters["weight"][[320, 1125, 539, 320]])
