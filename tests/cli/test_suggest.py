"""suggest and sensitivity, on small backbones of the zoo."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.contract.cases import SUPPORT
from vtzoo import data as D
from vtzoo import registry
from vtzoo.backbone import build
from vtzoo.errors import NotFound, UsageError
from vtzoo.installed import head_state
from vtzoo.live import inject, trainable
from vtzoo.sensitivity import scores
from vtzoo.verbs.sensitivity import sensitivity_of
from vtzoo.verbs.suggest import suggest
from vtzoo.zoo import Zoo

VIT = {"arch": "vit_tiny_patch16_224", "input_size": [3, 24, 32]}
VIT_ARGS = {"img_size": [24, 32], "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CNN = {"arch": "test_resnet", "input_size": [3, 64, 64]}
CNN_ARGS = {"channels": [8, 16, 16, 24], "stem_width": 8, "layers": [2, 1, 1, 1]}
EMBEDDED = "vit_embedded_64"


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A zoo with a tiny ViT and a tiny ResNet, whose weights are nowhere."""
    made = Zoo.init(tmp_path_factory.mktemp("nets"))
    made.put("backbones", "tiny-vit", {**VIT, "model_args": VIT_ARGS, "source": "hf-hub:nobody/nothing"})
    made.put("backbones", "tiny-cnn", {**CNN, "model_args": CNN_ARGS, "source": "hf-hub:nobody/nothing"})
    return made


@pytest.fixture(scope="module")
def found(nets: Zoo) -> dict:
    """What is suggested for the tiny ViT within 2,000 parameters."""
    return suggest(backbone="tiny-vit", budget=2000, classes=5, zoo=nets).report


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of six noisy images each, of different colours."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
        (root / "train" / name).mkdir(parents=True)
        for i in range(6):
            pixels = (np.array(colour) + draw.integers(-40, 40, (64, 64, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{i}.png")
    return root


def test_every_method_is_told_of(found: dict) -> None:
    """A method fits, or is refused with a reason; none costs more than the budget; counts and shares agree."""
    assert sorted([r["name"] for r in found["fits"]] + [r["name"] for r in found["refused"]]) == registry.names(
        "methods"
    )
    assert all(len(r["reason"]) > 10 for r in found["refused"])
    assert found["backbone_parameters"] == sum(
        p.numel() for p in build("vit_tiny_patch16_224", pretrained=False, **VIT_ARGS).parameters()
    )
    assert found["head_parameters"] == 33 * 5
    for row in found["fits"]:
        assert 0 <= row["parameters"] <= found["budget"] == 2000
        assert row["share"] == row["parameters"] / found["backbone_parameters"]
        assert row["memory_bytes"] >= 4 * found["backbone_parameters"] + 16 * row["parameters"]


def test_branches_that_start_at_zero_are_no_obstacle(nets: Zoo) -> None:
    """The last norm of a ResNet's branch starts at zero and lets no gradient through: entries are counted as if it did."""
    rows = {r["name"]: r for r in suggest(backbone="tiny-cnn", budget=800, zoo=nets).report["fits"]}
    assert (rows["spt"]["spec"], rows["spt"]["parameters"]) == ("spt[budget=800]", 800)


def test_what_folds_stands_first(found: dict) -> None:
    """The order is: what folds before what doesn't, then the larger before the smaller; what folds was measured elsewhere."""
    order = [("yes", "when", "no").index(r["folds"]) for r in found["fits"]]
    assert order == sorted(order)
    sizes = [r["parameters"] for r in found["fits"] if r["folds"] == "no"]
    assert sizes == sorted(sizes, reverse=True)
    for row in found["fits"]:
        assert (row["folds"] == "yes") is (SUPPORT[row["name"]]["vit"] == "folds" and row["name"] != "mlp-head"), row
        assert row["about_folding"]


def test_suggested_specs_can_be_injected(found: dict, nets: Zoo) -> None:
    """Each spec trains exactly as many parameters as was said, beside a plain head's."""
    for row in found["fits"]:
        model = build("tiny-vit", zoo=nets, pretrained=False, num_classes=5)
        plain = sum(p.numel() for p in head_state(model).values())
        inject(model, row["spec"], batches=[(torch.randn(4, 3, 24, 32), torch.arange(4) % 2)])
        assert sum(p.numel() for p in trainable(model).values()) - plain == row["parameters"], row["spec"]


def test_the_knob_is_turned_as_far_as_the_budget_goes(found: dict) -> None:
    """One more would be too many; a default that is too large is turned down; a budget is spent whole."""
    rows = {r["name"]: r for r in found["fits"]}
    per_rank = 2 * sum(i + o for i, o in ((32, 96), (32, 32), (32, 128), (128, 32)))
    assert rows["lora"]["spec"] == f"lora[rank={2000 // per_rank}]"
    assert rows["lora"]["default_parameters"] == 8 * per_rank > 2000
    assert rows["vpt-deep"]["spec"] == f"vpt-deep[tokens={2000 // (2 * 32)}]"
    assert rows["vpt-deep"]["default_parameters"] == 2 * 10 * 32
    assert (rows["spt"]["spec"], rows["spt"]["parameters"]) == ("spt[budget=2000]", 2000)
    assert (rows["norm"]["spec"], rows["norm"]["parameters"]) == ("norm", 5 * 64)
    assert rows["linear"]["parameters"] == 0


def test_reasons_are_the_methods_own_or_the_budget(found: dict) -> None:
    """A method for maps says so on a ViT; one that is too large says how large its smallest delta is."""
    reasons = {r["name"]: r["reason"] for r in found["refused"]}
    assert "convolutions" in reasons["residual"]
    assert reasons["full"] == f"{found['backbone_parameters']} parameters at the least, and the budget is 2000"


def test_more_images_need_more_memory(nets: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory grows evenly with the batch; a linear head needs the least of all."""
    monkeypatch.setattr(registry, "names", lambda _kind: ["linear", "lora"])
    memory = {}
    for count in (1, 2, 3):
        rows = suggest(backbone="tiny-vit", budget=2000, classes=5, zoo=nets, batch_size=count).report["fits"]
        memory[count] = {r["name"]: r["memory_bytes"] for r in rows}
    for name in ("linear", "lora"):
        assert memory[2][name] - memory[1][name] == memory[3][name] - memory[2][name] > 0
    assert memory[1]["linear"] < memory[1]["lora"]


def test_a_convolutional_network(nets: Zoo) -> None:
    """On a ResNet what needs convolutions fits, and what needs tokens is refused in its own words."""
    report = suggest(backbone="tiny-cnn", budget=0.3, classes=2, zoo=nets).report
    assert report["budget"] == int(0.3 * report["backbone_parameters"])
    rows = {r["name"]: r for r in report["fits"]}
    assert rows["residual"]["folds"] == "yes"
    assert "prompts don't fit" in {r["name"]: r["reason"] for r in report["refused"]}["vpt-deep"]
    for name, row in rows.items():
        assert (row["folds"] == "yes") is (SUPPORT[name]["resnet"] == "folds" and name != "mlp-head"), name


def test_suggest_refuses_nonsense(nets: Zoo) -> None:
    """A budget of less than one parameter, no classes, and a backbone that nobody knows."""
    with pytest.raises(UsageError, match=r"a budget of 1e-06 is less than one of \d+ parameters"):
        suggest(backbone="tiny-vit", budget=1e-6, zoo=nets)
    with pytest.raises(UsageError, match="0 classes"):
        suggest(backbone="tiny-vit", budget=100, classes=0, zoo=nets)
    with pytest.raises(NotFound):
        suggest(backbone="nope", budget=100, zoo=nets)


def test_more_than_the_backbone_is_all_of_it(nets: Zoo) -> None:
    """However large, a budget is the backbone's own size at most: knobs are not turned until memory ends."""
    report = suggest(backbone="tiny-vit", budget=1e30, classes=2, zoo=nets).report
    assert report["budget"] == report["backbone_parameters"]
    assert all(row["parameters"] <= report["budget"] for row in report["fits"])


def test_suggest_on_the_command_line(vtzoo, nets: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON is one document with the report; the tables show specs, and reasons for what doesn't fit."""
    few = [n for n in registry.names("methods") if n in ("lora", "linear", "full", "adapter")]
    monkeypatch.setattr(registry, "names", lambda _kind: few)
    words = ("suggest", "--backbone", "tiny-vit", "--budget", "2k", "--classes", "3", "--zoo", nets.root)
    document = json.loads(vtzoo(*words, "--json").out)
    assert (document["ref"], document["report"]["budget"]) == ("tiny-vit", 2000)
    assert [r["name"] for r in document["report"]["fits"]] == ["lora", "linear", "adapter"]
    ran = vtzoo(*words)
    assert ran.code == 0
    line = next(x for x in ran.out.splitlines() if x.startswith("lora"))
    assert line.split()[0] == "lora[rank=1]"
    assert "yes" in line.split()
    assert any(x.startswith("full") and "at the least, and the budget is 2000" in x for x in ran.out.splitlines())


@pytest.mark.parametrize("budget", ["much", "0", "-1", "k", "nan", "inf", ""])
def test_a_budget_that_is_no_number(vtzoo, budget: str) -> None:
    """It is refused as usage (2), with an example, before any zoo is looked for."""
    ran = vtzoo("suggest", "--backbone", "b", f"--budget={budget}")
    assert (ran.code, ran.out) == (2, "")
    assert ran.lines == [f"error: --budget '{budget}' is no number above zero", "hint: for example --budget 0.3M"]


def test_an_unknown_backbone(vtzoo, nets: Zoo) -> None:
    """It is not found (3), by either command."""
    where = ("--zoo", nets.root)
    assert vtzoo("suggest", "--backbone", "tiny-vti", "--budget", "1M", *where).code == 3
    assert vtzoo("sensitivity", "tiny-vti", "--data", "d", *where).code == 3


def test_sensitivity_is_the_scores_by_layer(photos: Path) -> None:
    """Rows are sums of `vtzoo.sensitivity.scores` over each module, the largest first, and their shares add up to one."""
    result = sensitivity_of(ref=EMBEDDED, data=str(photos), batch_size=6, seed=3)
    report = result.report
    model = build(EMBEDDED)
    images = D.open_data(photos, split="train")
    plain = D.transforms(model.vtzoo_card.preprocess, train=False)
    wanted = scores(model, D.loader(images, plain, batch_size=6, seed=3))
    assert result.ref == EMBEDDED
    assert (report["images"], report["classes"]) == (len(images), 2)
    assert (
        report["parameters"] == sum(t.numel() for t in wanted.values()) == sum(s["parameters"] for s in report["sites"])
    )
    rows = {s["site"]: s for s in report["sites"]}
    layer = "blocks.1.mlp.fc2"
    both = [wanted[f"{layer}.{p}"] for p in ("weight", "bias")]
    assert rows[layer]["score"] == pytest.approx(sum(float(t.double().sum()) for t in both))
    assert rows[layer]["per_parameter"] == pytest.approx(rows[layer]["score"] / sum(t.numel() for t in both))
    assert rows["pos_embed"]["score"] == pytest.approx(float(wanted["pos_embed"].double().sum()))
    kinds = {n: rows[n]["kind"] for n in ("patch_embed.proj", layer, "blocks.0.norm1", "pos_embed")}
    assert kinds == {"patch_embed.proj": "conv", layer: "linear", "blocks.0.norm1": "norm", "pos_embed": "other"}
    order = [s["score"] for s in report["sites"]]
    assert order == sorted(order, reverse=True)
    assert sum(s["share"] for s in report["sites"]) == pytest.approx(1)


def test_sensitivity_on_the_command_line(vtzoo, photos: Path, nets: Zoo) -> None:
    """`--top` cuts the list, shares still being those of all; the table has a row a layer; the talk is on stderr."""
    words = ("sensitivity", EMBEDDED, "--data", photos, "--zoo", nets.root, "--top", "3")
    ran = vtzoo(*words, "--json")
    sites = json.loads(ran.out)["report"]["sites"]
    assert len(sites) == 3
    assert sum(s["share"] for s in sites) < 1
    assert "gradients on" in ran.err
    shown = vtzoo(*words).out.splitlines()
    assert [x.split()[0] for x in shown[1:4]] == [s["site"] for s in sites]
    assert shown[-1].startswith(f"{EMBEDDED}, 3.6 M parameters, on ")


def test_sensitivity_refuses(vtzoo, photos: Path, nets: Zoo) -> None:
    """Batches of one image can't be contrasted (2); nonsense is usage (2); missing data is not found (3)."""
    words = ("sensitivity", EMBEDDED, "--data", photos, "--zoo", nets.root)
    ran = vtzoo(*words, "--batch-size", "1")
    assert (ran.code, ran.out) == (2, "")
    assert "no batch holds two images of one class" in ran.err
    assert vtzoo(*words, "--top", "0").code == 2
    assert vtzoo("sensitivity", EMBEDDED, "--data", "nowhere", "--zoo", nets.root).code == 3
    with pytest.raises(UsageError, match="top=0"):
        sensitivity_of(ref=EMBEDDED, data=str(photos), top=0)
