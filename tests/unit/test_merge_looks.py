"""Merges, searches, heads and reports that look at images: on a tiny network, with images that are random."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tests import families
from tests.contract.merge_cases import random_deltas
from vtzoo.delta import Delta
from vtzoo.errors import Conflict, Corrupt, Mismatch, NotFoldable, NotFound, ShapeMismatch, UsageError, WrongBackbone
from vtzoo.evidence import grams
from vtzoo.fingerprint import fingerprint
from vtzoo.folding import fold
from vtzoo.graft import tensors_of
from vtzoo.heads import STRENGTHS, classifier, linear_head, ridge
from vtzoo.installed import head_state
from vtzoo.interference import interference
from vtzoo.live import attach, extract, inject
from vtzoo.masks import packed, unpacked
from vtzoo.merges._chain import correcting, steps
from vtzoo.merges._whole import Whole
from vtzoo.merges.surgery import surgery
from vtzoo.merging import look, merge, plan
from vtzoo.search import evolve, judge
from vtzoo.spec import BackboneCard, Preprocess, Task
from vtzoo.stage import accuracies, logits, opened, refit, scene
from vtzoo.tensors import TensorFile, write
from vtzoo.verbs.fold import fold_ref
from vtzoo.verbs.merge import merge_refs, unmerge
from vtzoo.zoo import Zoo

SPECS = ("lora", "ssf", "bitfit")
CLASSES, SIZE = "abcde", 48


@cache
def base():
    """The weights of a tiny network that timm knows (shared, never changed)."""
    torch.manual_seed(0)
    return dict(timm.create_model("test_vit", num_classes=0, img_size=SIZE).state_dict())


@cache
def made_by(spec, task):
    """A delta of it, none of whose tensors is at its start (shared, never changed)."""
    model = timm.create_model("test_vit", num_classes=len(CLASSES), img_size=SIZE)
    model.load_state_dict(base(), strict=False)
    inject(model.requires_grad_(requires_grad=False).eval(), spec)
    families.perturb(tensors_of(model), seed=len(spec))
    families.perturb(head_state(model), seed=len(spec))
    shape = Preprocess(
        input_size=(3, SIZE, SIZE), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0
    )
    return extract(model, tasks=[Task(name=task, classes=tuple(CLASSES), preprocess=shape)])


def put(zoo, name, delta, source):
    """Keep a delta in a zoo that has its backbone's weights."""
    card = BackboneCard(
        name="tiny", arch="test_vit", source=source, fingerprint=fingerprint(base()), head=("head",),
        model_args={"img_size": SIZE}, preprocess=delta.tasks[0].preprocess,
    )  # fmt: skip
    path = zoo.root / "new.safetensors"
    delta.with_(backbone=card).save(path)
    zoo.put("deltas", name, {"digest": zoo.add_object(path), "tasks": [t.name for t in delta.tasks], "size_bytes": 1})
    path.unlink()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A zoo with a tiny backbone and three deltas of it, and each task's images: (zoo, refs, folders)."""
    root = tmp_path_factory.mktemp("looks")
    zoo = Zoo.init(root / "zoo")
    write(root / "base.safetensors", base(), {})
    source = f"object:sha256:{zoo.add_object(root / 'base.safetensors')}"
    draw = torch.Generator().manual_seed(0)
    for spec in SPECS:
        put(zoo, f"{spec}/a", made_by(spec, spec), source)
        for split, count in (("train", 3), ("val", 2), ("test", 2)):
            for name in CLASSES:
                folder = root / spec / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=draw, dtype=torch.uint8)
                    Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    for name, spec in (("one", "lora"), ("two", "lora[rank=3]")):
        put(zoo, f"pair/{name}", made_by(spec, name), source)
    return zoo, [f"{s}/a" for s in SPECS], [str(root / s) for s in SPECS]


def staged(world, method="linear", *, split="train", labelled=False, heads=True, told=None, limit=10):
    """The plan of a merge and its scene."""
    zoo, refs, folders = world
    deltas = [Delta.open(zoo.object(zoo.resolve(r).digest)) for r in refs]
    made = plan(deltas, method, base=base(), evidence=told)
    return made, scene(made, opened(folders, deltas, split=split, labelled=labelled, limit=limit), heads=heads)


def count_of(zoo):
    """How many entries and objects."""
    return len(zoo.entries()), len([p for p in zoo.root.rglob("*") if p.is_file()])


# --------------------------------------------------------------------------------------------------------------- scenes
def test_experts_on_the_stage_are_the_deltas_alone(world):
    """What the plain network says as one task's expert is what the delta's own fold says."""
    made, stage = staged(world)
    for task, delta in enumerate(made.deltas):
        stage.load_expert(task)
        seen = stage.logits(task, stage.features(task))
        tensors = fold(base(), delta, task=delta.tasks[0].name)
        stage.model.load_state_dict({n: tensors[n] for n in stage.model.state_dict()})
        weight, bias = linear_head(delta.head(delta.tasks[0].name), "it")
        assert torch.allclose(seen, F.linear(stage.features(task), weight, bias), atol=1e-5)


def test_adamerging_descends(world):
    """The entropy of the merge is lower with the coefficients that were found, which are neither all alike nor outside of 0 to 1."""
    told = [{} for _ in SPECS]
    made, stage = staged(world, "adamerging[steps=30,lr=0.05]", told=told)
    stage.load()
    before = judge(stage, "entropy")()
    look(made, stage)
    values = torch.stack([v for own in told for v in own.values()])
    assert 0 <= float(values.min()) < float(values.max()) <= 1
    stage.load()
    assert judge(stage, "entropy")() < before


def test_adamerging_takes_the_gradient_of_the_coefficients(world):
    """One step of Adam moves each task's coefficient by lr against the sign of a difference quotient."""
    told = [{} for _ in SPECS]
    made, stage = staged(world, "adamerging[by=task,steps=1,lr=0.001,batch=10]", told=told)
    whole, found = made.whole, []

    def entropy(coefs):
        stage.load(
            lambda n: made.ground[n] + sum(c * whole.read(t, n) for t, c in enumerate(coefs) if n in whole.names[t])
        )
        return 3 * judge(stage, "entropy")()

    for task in range(3):
        high, low = ([0.3 + (s if t == task else 0) for t in range(3)] for s in (1e-2, -1e-2))
        found.append(entropy(high) - entropy(low))
    look(made, stage)
    for own, slope in zip(told, found, strict=True):
        (value,) = {round(float(v), 6) for v in own.values()}
        assert value == pytest.approx(0.3 - math.copysign(1e-3, slope), abs=1e-5)


def test_greedy_soup_is_no_worse_than_its_best(world):
    """It holds the best delta and those that don't lower the mean accuracy: recomputed here by hand."""
    told = [{} for _ in SPECS]
    made, stage = staged(world, "greedy-soup", split="val", labelled=True, told=told)
    look(made, stage)
    joined = [float(next(iter(own.values()))) for own in told]
    assert set(joined) <= {0.0, 1.0}
    assert sum(joined)
    stage.load()
    best = sum(stage.accuracy(t) for t in range(3))
    for task in (t for t in range(3) if joined[t]):
        one = [{n: torch.tensor(float(t == task)) for n in made.whole.shapes} for t in range(3)]
        for own, other in zip(told, one, strict=True):
            own.update(other)
        stage.load()
        assert best >= sum(stage.accuracy(t) for t in range(3)) or sum(joined) == 1
        break


def test_adamerging_has_the_same_bits_in_any_order(world):
    """Coefficients and network are those of the same tasks the other way round."""
    found = []
    for turn in (1, -1):
        zoo, refs, folders = world
        told = [{} for _ in SPECS]
        deltas = [Delta.open(zoo.object(zoo.resolve(r).digest)) for r in refs[::turn]]
        made = plan(deltas, "adamerging[steps=5,lr=0.05]", base=base(), evidence=told)
        look(made, scene(made, opened(folders[::turn], deltas, split="train", labelled=False, limit=10), heads=True))
        found.append({n: made.tensor(n) for n in made.whole.shapes})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_running_statistics_are_of_those_that_joined():
    """A delta that a greedy soup leaves out gives it no statistics either."""
    ground, (a, b) = random_deltas(2, {"bn1.running_mean": (7,), "blocks.0.a.weight": (5, 4)})
    sites = [
        replace(s, facts={"params": {}, "buffers": s.facts["params"]}) if s.name == "bn1" else s
        for s in a.parts[0].sites
    ]
    a, b = (d.with_(parts=(replace(d.parts[0], sites=tuple(sites)),)) for d in (a, b))
    told = [dict.fromkeys(ground, torch.tensor(v)) for v in (1.0, 0.0)]
    made = plan([a, b], "greedy-soup", base=ground, evidence=told)
    for name, place in (("bn1.running_mean", "bn1.full.running_mean"), ("blocks.0.a.weight", "blocks.0.a.full.weight")):
        assert torch.allclose(made.tensor(name), a.tensors[place], atol=1e-6), name


def test_regmean_plus_sees_the_merged_network(world):
    """The Gram of each matrix, in the end, is that of its inputs in the merged network; of the first it is the backbone's own."""
    told = [{} for _ in SPECS]
    made, stage = staged(world, "regmean-plus", heads=False, told=told)
    look(made, stage)
    stage.load()
    for task, own in enumerate(told):
        images = stage.images[task]
        wanted = grams(stage.model, [(images, torch.zeros(len(images)))])
        assert own
        for name, gram in own.items():
            assert torch.allclose(gram, wanted[name], rtol=1e-3, atol=1e-3 * float(wanted[name].abs().max())), name


# --------------------------------------------------------------------------------------------------------------- search
def test_a_search_finds_what_a_grid_of_merges_finds(world):
    """The scale of `--search scale` is the one of all merges by that factor that agrees best with the experts."""
    zoo, refs, folders = world
    found = merge_refs(refs=refs, method="linear", name="searched", data=folders, search="scale", zoo=zoo)
    (scale,) = found.report["searched"]["found"]
    made, stage = staged(world)
    bad, seen = judge(stage, "agreement"), {}
    for factor in (0.1, 0.3, 0.6, 1.0, 1.5, 3.0, scale):
        scaled = plan(made.deltas, "linear", base=base(), layers=f"*:{factor}")
        stage.load(scaled.tensor)
        seen[factor] = bad()
    assert min(seen, key=seen.get) == scale
    merged = Delta.open(found.path)
    assert merged.lineage["searched"]["what"] == "scale"
    wanted = plan(made.deltas, "linear", base=base(), layers=f"*:{scale}")
    assert all(torch.allclose(fold(base(), merged, task="")[n], wanted.tensor(n), atol=1e-6) for n in made.whole.shapes)


@pytest.mark.parametrize("what", ["layers", "coef"])
@pytest.mark.parametrize(
    "by", ["agreement", *(pytest.param(b, marks=pytest.mark.slow) for b in ("entropy", "accuracy"))]
)
def test_searches_end_no_worse_than_they_begin(world, what, by, monkeypatch):
    """Layers and coefficients, by each measure, in few tries: the value found is at most that of the plain merge."""
    monkeypatch.setattr("vtzoo.search.TRIES", 8)
    zoo, refs, folders = world
    split = "val" if by == "accuracy" else "train"
    made, stage = staged(world, split=split, labelled=by == "accuracy")
    stage.load()
    plainly = judge(stage, by)()
    found = merge_refs(refs=refs, method="linear", name=f"{what}/{by}", data=folders, search=what, by=by, zoo=zoo)
    assert found.report["searched"]["value"] <= plainly + 1e-6
    assert len(found.report["searched"]["found"]) == (3 if what == "coef" else len(set(made.whole.depths.values())))


def test_cma_es_finds_a_valley():
    """On a bowl away from the start the best point comes near to its bottom, and the same seed tries the same points."""

    def bowl(point):
        return sum((p - b) ** 2 for p, b in zip(point, (0.4, 1.9, 0.8), strict=True))

    trials = evolve(bowl, 3, 120)
    assert trials[0][0] == (1.0, 1.0, 1.0)
    assert min(v for _, v in trials) < 0.01
    assert trials == evolve(bowl, 3, 120)


# ---------------------------------------------------------------------------------------------------------------- heads
@pytest.mark.parametrize("prior", [False, True])
def test_ridge_is_leave_one_out(prior):
    """The strength is the one whose error, each image left out in a fit of its own, is lowest; weight and bias are that fit's."""
    draw = torch.Generator().manual_seed(0)
    x, start = torch.randn(14, 6, generator=draw).double(), torch.randn(3, 6, generator=draw).double()
    y = x @ torch.randn(6, 3, generator=draw).double() + torch.randn(14, 3, generator=draw)
    start = start if prior else 0 * start
    mean = torch.linalg.svdvals(x - x.mean(0)).square().mean()

    def fit(x, y, strength):
        away = x - x.mean(0)
        rest = y - x @ start.T
        step = torch.linalg.solve(
            away.T @ away + strength * mean * torch.eye(6).double(), away.T @ (rest - rest.mean(0))
        )
        weight = start + step.T
        return weight, y.mean(0) - weight @ x.mean(0)

    def left_out(strength):
        errors = []
        for i in range(len(x)):
            rows = [j for j in range(len(x)) if j != i]
            weight, bias = fit(x[rows], y[rows], strength)
            errors.append((weight @ x[i] + bias - y[i]).square().mean())
        return torch.stack(errors).mean()

    best = min(STRENGTHS, key=left_out)
    weight, bias = fit(x, y, best)
    found = ridge(x, y, start if prior else None)
    assert torch.allclose(found[0].double(), weight, atol=1e-5)
    assert torch.allclose(found[1].double(), bias, atol=1e-5)


def test_a_fitted_classifier_is_sure_where_it_can_be():
    """On classes far apart it errs nowhere, and the labels' probabilities are near 1 rather than those of one-hot targets."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    x = torch.eye(3)[labels] @ torch.randn(3, 8, generator=draw) * 5 + 0.1 * torch.randn(30, 8, generator=draw)
    logits = F.linear(x, *classifier(x, labels, 3))
    assert (logits.argmax(-1) == labels).all()
    assert F.cross_entropy(logits, labels) < 0.05


def test_refitted_heads_answer_as_the_experts_do(world):
    """On the merge's own features they come nearer to the experts' logits than the old heads do; only heads change."""
    made, stage = staged(world)
    zoo, refs, folders = world
    merged = Delta.open(merge_refs(refs=refs, method="linear", name="plain/heads", zoo=zoo).path)
    fitted = refit(stage, made, merged, "expert")
    assert all(torch.equal(fitted.tensors[n], merged.tensors[n]) for n in merged.tensors if not n.startswith("@head/"))
    for task, delta in enumerate(made.deltas):
        stage.load_expert(task)
        wanted = stage.logits(task, stage.features(task))
        stage.load()
        seen, name = stage.features(task), delta.tasks[0].name
        errors = [(F.linear(seen, *linear_head(d.head(name), name)) - wanted).square().mean() for d in (fitted, merged)]
        assert errors[0] < errors[1]
    found = merge_refs(refs=refs, method="linear", name="refitted", data=folders, refit_heads="expert", zoo=zoo)
    lineage = Delta.open(found.path).lineage
    assert lineage["heads"] == "refitted by expert"
    assert [(f["task"], f["images"]) for f in lineage["heads_images"]] == [(s, 15) for s in SPECS]


def test_surgery_brings_features_back(world):
    """The bias of merged features becomes smaller, as the formula says; a network that is its own is left as it is."""
    _, stage = staged(world)
    stage.load_expert(0)
    wanted = stage.features(0)
    assert not surgery(wanted, wanted, steps=20)[1].any()
    stage.load()
    seen = stage.features(0)
    down, up = surgery(seen, wanted, steps=300)
    assert down.shape == (16, seen.shape[1])
    assert up.shape == (seen.shape[1], 16)
    assert (seen - (seen @ down.T).relu() @ up.T - wanted).abs().mean() < 0.5 * (seen - wanted).abs().mean()


def test_surgery_stands_in_the_heads(world, tmp_path):
    """Nothing but heads differs from the merge without it, and they say W (z - U relu(D z)) + b; the entry is used as any other."""
    zoo, refs, folders = world
    page = tmp_path / "r.html"
    spec = "linear+surgery[rank=3,steps=50]"
    path = merge_refs(refs=refs, method=spec, name="cut", data=folders, report=page, zoo=zoo).path
    got, plain = Delta.open(path), Delta.open(merge_refs(refs=refs, method="linear", name="uncut", zoo=zoo).path)
    assert {n for n in got.tensors if not n.startswith("@head/")} == {n for n in plain.tensors if "@head/" not in n}
    assert all(torch.equal(got.tensors[n], plain.tensors[n]) for n in plain.tensors if not n.startswith("@head/"))
    assert got.method == spec
    assert [f["task"] for f in got.lineage["heads_images"]] == list(SPECS)
    assert got.lineage["heads"] == "corrected by surgery[rank=3,steps=50]"
    _, stage = staged(world, limit=256)
    wanted = []
    for task in range(3):
        stage.load_expert(task)
        wanted.append(stage.features(task))
    stage.load()
    model = timm.create_model("test_vit", num_classes=len(CLASSES), img_size=SIZE)
    model.load_state_dict(base(), strict=False)
    attach(model.eval(), got.with_(backbone=replace(got.backbone, fingerprint="")), task="ssf", check=False)
    seen, (weight, bias) = stage.features(1), linear_head(plain.head("ssf"), "ssf")
    down, up = surgery(seen, wanted[1], rank=3, steps=50)
    said = F.linear(seen - (seen @ down.T).relu() @ up.T, weight, bias)
    assert torch.allclose(logits(got, "ssf", seen), said, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(model(stage.images[1]), said, atol=1e-4)
    made, stage = staged(world, split="test", labelled=True)
    assert json.loads(page.with_suffix(".json").read_text())["accuracy"] == accuracies(stage, made, got)
    with pytest.raises(NotFoldable, match="head is not linear"):
        fold_ref(ref="cut", out=tmp_path / "f", task="ssf", zoo=zoo)


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("linear+surgery", {}, "surgery needs images of every task"),
        ("linear+surgery", {"refit_heads": "expert"}, "both fit the heads"),
        ("surgery+linear", {}, "wrong order"),
        ("surgery+surgery", {}, "corrects heads 2 times"),
        ("emr+surgery", {}, "corrects the features of one"),
    ],
)
def test_surgery_that_can_not_be_is_refused(world, method, more, said):
    """Without images, beside another way to fit heads, in the wrong place, and twice."""
    zoo, refs, folders = world
    before = count_of(zoo)
    data = folders if more else ()
    with pytest.raises(UsageError, match=said):
        merge_refs(refs=refs, method=method, name="never", data=data, zoo=zoo, **more)
    with pytest.raises(UsageError, match="corrects heads by images"):
        merge([Delta.open(zoo.object(zoo.resolve(r).digest)) for r in refs], "surgery", base=base())
    assert count_of(zoo) == before


def test_surgery_is_the_same_in_any_number_of_threads(world):
    """One thread and two give the same bits."""
    made, stage = staged(world)
    zoo, refs, _ = world
    plain = Delta.open(merge_refs(refs=refs, method="linear", name="threads", zoo=zoo).path)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(refit(stage, made, plain, correcting(steps("linear+surgery[steps=20]"))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0].tensors[n], found[1].tensors[n]) for n in found[0].tensors if "@head/" in n)


def test_a_head_that_can_not_be_corrected_is_refused_first(world, capsys):
    """A perceptron is found before anything is merged, also by a dry run."""
    zoo, _, folders = world
    put(
        zoo,
        "mlp/a",
        made_by("bitfit+mlp-head[hidden=4]", "lora"),
        Delta.open(zoo.object(zoo.resolve("lora/a").digest)).backbone.source,
    )
    before = count_of(zoo)
    for more in (
        {"method": "linear+surgery"},
        {"method": "linear", "search": "scale"},
        {"method": "ties", "refit_heads": "expert"},
    ):
        for dry_run in (True, False):
            with pytest.raises(NotFoldable, match="not one linear layer"):
                merge_refs(refs=["mlp/a"], name="never", data=folders[:1], zoo=zoo, dry_run=dry_run, **more)
    assert "merging" not in capsys.readouterr().err
    assert count_of(zoo) == before


def test_a_task_leaves_a_merge_whose_heads_were_corrected(world, capsys):
    """The rest is merged and corrected anew, and nothing else is said."""
    zoo, refs, folders = world
    spec = "linear+surgery[steps=5]"
    merge_refs(refs=refs, method=spec, name="three", data=folders, zoo=zoo)
    capsys.readouterr()
    rest = unmerge(ref="three", tasks=["ssf"], name="rest", data=[folders[0], folders[2]], zoo=zoo)
    assert "deltas' own" not in capsys.readouterr().err
    wanted = merge_refs(refs=[refs[0], refs[2]], method=spec, name="two", data=[folders[0], folders[2]], zoo=zoo)
    assert Path(rest.path).read_bytes() == Path(wanted.path).read_bytes()


# -------------------------------------------------------------------------------------------------------------- reports
def test_a_report_has_what_each_task_is_worth(world, tmp_path):
    """The JSON beside the page has each task's accuracy alone and merged; the page names every delta and every matrix."""
    zoo, refs, folders = world
    page = tmp_path / "r.html"
    found = merge_refs(refs=refs, method="ties", name="reported", data=folders, report=page, zoo=zoo)
    facts, text = json.loads(page.with_suffix(".json").read_text()), page.read_text()
    made, stage = staged(world, "ties", split="test", labelled=True)
    assert facts["accuracy"] == accuracies(stage, made, Delta.open(found.path))
    assert all(0 <= row["merged"] <= 1 and row["images"] == 10 for row in facts["accuracy"])
    assert all(ref in text for ref in refs)
    matrices = [t for t in facts["interference"] if any(k["rank"] is not None for k in t["tasks"])]
    assert matrices
    assert all(t["tensor"].removesuffix(".weight") in text for t in matrices)
    assert "http" not in text  # nothing is fetched
    with pytest.raises(Conflict):
        merge_refs(refs=refs, method="ties", name="again", report=page, zoo=zoo)
    with pytest.raises(UsageError, match=r"no \.html"):
        merge_refs(refs=refs, method="ties", name="again", report=tmp_path / "r.pdf", zoo=zoo)


def test_a_page_goes_where_the_merge_does_not_come(world, tmp_path, monkeypatch):
    """When publishing fails neither page nor JSON stays, and no entry is new."""
    zoo, refs, _ = world

    def fail(*_):
        raise Conflict("taken", "choose another")

    monkeypatch.setattr("vtzoo.verbs.merge.publish", fail)
    before = len(zoo.entries())
    with pytest.raises(Conflict):
        merge_refs(refs=refs, method="linear", name="unpublished", report=tmp_path / "r.html", zoo=zoo)
    assert not list(tmp_path.iterdir())
    assert len(zoo.entries()) == before


def test_interference_of_known_vectors():
    """Equal vectors agree and overlap wholly, opposite ones conflict everywhere, and directions apart do neither."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(12, 2, generator=draw) @ torch.randn(2, 9, generator=draw)
    left = torch.linalg.svd(a)[0]
    apart = left[:, 2:4] @ torch.randn(2, 9, generator=draw)
    name, shapes = "blocks.0.x.weight", {"blocks.0.x.weight": (12, 9), "blocks.1.b": (3,)}
    rows = [{name: t, "blocks.1.b": torch.ones(3)} for t in (a, a.clone(), -2 * a, apart)]
    first, *_ = [t for t in interference(Whole(rows, (1.0,) * 4, shapes)) if t["tensor"] == name]
    pair = {(p["a"], p["b"]): p for p in first["pairs"]}
    assert pair[0, 1]["cosine"] == pytest.approx(1)
    assert pair[0, 2]["cosine"] == pytest.approx(-1)
    assert (pair[0, 1]["conflict"], pair[0, 2]["conflict"]) == (0, 1)
    assert pair[0, 2]["overlap"] == pytest.approx(1)
    assert first["tasks"][2]["norm"] == pytest.approx(2 * first["tasks"][0]["norm"])
    assert 1 < first["tasks"][0]["rank"] <= 2
    wide = {
        (p["a"], p["b"]): p
        for p in interference(Whole([{name: a.T}, {name: apart.T}], (1.0, 1.0), {name: (9, 12)}))[0]["pairs"]
    }
    assert wide[0, 1]["overlap"] is not None


# ------------------------------------------------------------------------------------------------------ keeping, undoing
def test_cat_is_kept_as_a_lora_without_loss(world):
    """Two LoRAs set side by side fold to the sum of both, in a file of their ranks added."""
    zoo, _, _ = world
    a, b = made_by("lora", "one"), made_by("lora[rank=3]", "two")
    found = merge_refs(refs=["pair/one", "pair/two"], method="cat", name="pair/cat", zoo=zoo)
    merged = Delta.open(found.path)
    assert merged.parts[0].method == "lora"
    assert {s.facts["rank"] for s in merged.parts[0].sites} == {11}
    assert found.report["kept"]["cut_off"] < 1e-6
    whole, parts = fold(base(), merged, task="", check=False), [fold(base(), d, task="", check=False) for d in (a, b)]
    for name, own in base().items():
        wanted = parts[0][name] + parts[1][name] - own
        assert (whole[name] - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_cat_is_kept_as_a_lora_only_where_nothing_is_lost(world):
    """After a step that makes matrices of full rank the sum is kept whole."""
    zoo, _, _ = world
    found = merge_refs(refs=["pair/one", "pair/two"], method="dare+cat", name="pair/dropped", zoo=zoo)
    assert "kept" not in found.report
    assert [p.method for p in Delta.open(found.path).parts] == ["full"]


def test_keeping_needs_a_rank_where_there_is_none(world):
    """A method without a rank is refused with what to type; with one, the report says what was cut off, and the file is smaller."""
    zoo, refs, _ = world
    before = count_of(zoo)
    with pytest.raises(NotFoldable) as caught:
        merge_refs(refs=refs, method="linear", name="kept/none", keep="lora", zoo=zoo)
    assert "lora[rank=16]" in caught.value.hint
    for wrong in ("lora[rank=0]", "lora[rank=x]", "lora[alpha=1]", "ssf"):
        with pytest.raises(UsageError):
            merge_refs(refs=refs, method="linear", name="kept/none", keep=wrong, zoo=zoo)
    assert count_of(zoo) == before
    thin = merge_refs(refs=refs, method="linear", name="kept/two", keep="lora[rank=2]", zoo=zoo)
    full = merge_refs(refs=refs, method="linear", name="kept/all", zoo=zoo)
    assert 0 < thin.report["kept"]["cut_off"] < 1
    assert thin.report["merged_norm"] == pytest.approx(full.report["merged_norm"], rel=1e-6)
    assert Path(thin.path).stat().st_size < Path(full.path).stat().st_size


@pytest.mark.parametrize("method", ["linear", "ties", "tsv", "emr"])
def test_leaving_one_out_is_the_merge_of_the_rest(world, method):
    """Without a task a merge is, byte for byte, what the rest would have made, with their own weights."""
    zoo, refs, _ = world
    merge_refs(refs=refs, method=method, name=f"all/{method}", coef=(1, 0.5, 2), zoo=zoo)
    made = unmerge(ref=f"all/{method}", tasks=["ssf"], name=f"rest/{method}", zoo=zoo)
    rest = [refs[0], refs[2]]
    wanted = merge_refs(refs=rest, method=method, name=f"wanted/{method}", coef=(1, 2), zoo=zoo)
    assert zoo.resolve(made.ref).digest == zoo.resolve(wanted.ref).digest


@pytest.mark.parametrize("method", ["linear", "task-arithmetic[scale=0.7]"])
def test_a_sum_is_undone_without_the_others(world, method):
    """Where the deltas that stay are gone, the one that leaves is subtracted from a sum or a mean; other merges are refused."""
    zoo, refs, _ = world
    name = method.partition("[")[0]
    lone = Zoo.init(zoo.root.parent / f"lone-{name}")
    for ref in ("ssf/a",):
        lone.put(
            "deltas", ref, {**zoo.resolve(ref).facts, "digest": lone.add_object(zoo.object(zoo.resolve(ref).digest))}
        )
    lone.add_object(zoo.root.parent / "base.safetensors")
    for spec in (method, "tsv"):
        made = merge_refs(
            refs=refs, method=spec, name=f"gone-{name}/{spec.partition('[')[0]}", coef=(1, 0.5, 2), zoo=zoo
        )
        lone.put("deltas", made.ref, {**zoo.resolve(made.ref).facts, "digest": lone.add_object(Path(made.path))})
    with pytest.raises(UsageError, match="can't be undone"):
        unmerge(ref=f"gone-{name}/tsv", tasks=["ssf"], name="rest", zoo=lone)
    rest = Delta.open(unmerge(ref=f"gone-{name}/{name}", tasks=["ssf"], name="rest", zoo=lone).path)
    assert [t.name for t in rest.tasks] == ["lora", "bitfit"]
    wanted = Delta.open(
        merge_refs(refs=[refs[0], refs[2]], method=method, name=f"gone/{name}-rest", coef=(1, 2), zoo=zoo).path
    )
    a, b = (fold(base(), d, task="") for d in (rest, wanted))
    assert all((a[n] - b[n]).abs().max() <= 3e-6 * b[n].abs().max() for n in b)


def test_what_was_cut_off_cannot_be_subtracted(world, tmp_path):
    """A merge kept at a rank is merged again at that rank, and refused where the rest of its deltas are gone."""
    zoo, refs, _ = world
    made = merge_refs(refs=refs, method="linear", name="thin/all", keep="lora[rank=2]", zoo=zoo)
    rest = unmerge(ref="thin/all", tasks=["ssf"], name="thin/rest", zoo=zoo)
    wanted = merge_refs(refs=[refs[0], refs[2]], method="linear", name="thin/wanted", keep="lora[rank=2]", zoo=zoo)
    assert zoo.resolve(rest.ref).digest == zoo.resolve(wanted.ref).digest
    lone = Zoo.init(tmp_path / "lone")
    for ref in ("ssf/a", made.ref):
        facts = zoo.resolve(ref).facts
        lone.put("deltas", ref, {**facts, "digest": lone.add_object(zoo.object(zoo.resolve(ref).digest))})
    with pytest.raises(UsageError, match="can't be undone"):
        unmerge(ref="thin/all", tasks=["ssf"], name="rest", zoo=lone)


def test_what_cannot_leave_is_refused(world):
    """No merge, no such task, or nothing left: each is said, and no entry is new."""
    zoo, refs, _ = world
    merge_refs(refs=refs[:2], method="linear", name="few", zoo=zoo)
    before = count_of(zoo)
    for ref, tasks, error in (
        (refs[0], ["lora"], UsageError), ("few", ["birds"], NotFound), ("few", ["lora", "ssf"], UsageError),
    ):  # fmt: skip
        with pytest.raises(error) as caught:
            unmerge(ref=ref, tasks=tasks, name="left", zoo=zoo)
        assert caught.value.hint
    assert count_of(zoo) == before


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"method": "adamerging"}, UsageError, "needs images"),
        ({"method": "greedy-soup"}, UsageError, "needs labelled images"),
        ({"search": "scale"}, UsageError, "--search needs images"),
        ({"refit_heads": "expert"}, UsageError, "--refit-heads needs images"),
        ({"search": "depth"}, UsageError, "not known"),
        ({"search": "scale", "by": "luck"}, UsageError, "not known"),
        ({"method": "linear", "data": "some"}, UsageError, "looks at no images"),
        ({"search": "scale", "data": "one"}, UsageError, "1 times --data for 3 deltas"),
        ({"method": "emr", "search": "scale", "data": "some"}, UsageError, "a search looks at one"),
        ({"method": "tall", "keep": "lora[rank=2]"}, UsageError, "a LoRA has none"),
        ({"method": "core+adamerging"}, UsageError, "replaces weights by coordinates"),
        ({"search": "scale", "by": "accuracy", "data": "other"}, Mismatch, "which the task"),
    ],
)
def test_refused_before_anything_is_computed(world, change, error, said, tmp_path):
    """Images that lack, are too many, or are of other classes, and words that are no choice, with a hint and nothing new in the zoo."""
    zoo, refs, folders = world
    strange = tmp_path / "strange"
    for split in ("train", "val"):
        for name in ("x", "y"):
            (strange / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(strange / split / name / "0.png")
    data = {"some": folders, "one": folders[:1], "other": [str(strange)] * 3}
    given = {**change, **({"data": data[change["data"]]} if "data" in change else {})}
    before = count_of(zoo)
    with pytest.raises(error, match=said) as caught:
        merge_refs(**{"refs": refs, "method": "linear", "name": "refused", "zoo": zoo, **given})
    assert caught.value.hint
    assert count_of(zoo) == before


def test_bits_are_packed_and_unpacked():
    """Any number of entries, eight to a byte."""
    for shape in ((1,), (8,), (3, 5), (2, 3, 7)):
        bits = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
        row = packed(bits)
        assert len(row) == -(-bits.numel() // 8)
        assert torch.equal(unpacked(row, shape), bits)


# ---------------------------------------------------------------------------------------------------------- folded models
def test_a_folded_model_merges_as_the_delta_it_was_made_of(world, tmp_path):
    """A folded entry and a folder, beside a delta, give the tensors of the merge of the deltas; its own task and head travel."""
    zoo, refs, _ = world
    fold_ref(ref=refs[0], out=tmp_path / "one", zoo=zoo, name="folded/lora")
    wanted = Delta.open(merge_refs(refs=refs[:2], method="ties", name="folds/wanted", zoo=zoo).path)
    for i, ref in enumerate(("folded/lora", str(tmp_path / "one"))):
        made = Delta.open(merge_refs(refs=[ref, refs[1]], method="ties", name=f"folds/{i}", zoo=zoo).path)
        assert [t.name for t in made.tasks] == ["lora", "ssf"]
        a, b = (fold(base(), d, task="", check=False) for d in (made, wanted))
        assert all((a[n] - b[n]).abs().max() <= 2e-6 * max(1.0, float(b[n].abs().max())) for n in base())
        assert all(torch.equal(made.head("lora")[n], wanted.head("lora")[n]) for n in wanted.head("lora"))


def test_folded_models_that_are_no_backbones_kin_are_refused(world, tmp_path):
    """A config without a backbone, and a tensor of another shape, are said with what to do."""
    zoo, refs, _ = world
    fold_ref(ref=refs[0], out=tmp_path / "one", zoo=zoo)
    config = json.loads((tmp_path / "one/config.json").read_text())
    tensors = load_file(tmp_path / "one/model.safetensors")
    for name, facts, changed, error in (
        ("nameless", {**config, "vtzoo": {}}, {}, NotFound),
        ("other", config, {"blocks.0.mlp.fc1.weight": torch.zeros(3, 5)}, ShapeMismatch),
        ("stranger", {**config, "vtzoo": {**config["vtzoo"], "fingerprint": "sha256:" + "0" * 64}}, {}, WrongBackbone),
        ("more", config, {"reg_token": torch.zeros(1, 2, 64)}, ShapeMismatch),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(facts))
        save_file(tensors | changed, tmp_path / name / "model.safetensors")
        with pytest.raises(error) as caught:
            merge_refs(refs=[str(tmp_path / name), refs[1]], method="linear", name="refused", zoo=zoo)
        assert caught.value.hint


# ---------------------------------------------------------------------------------------------------------------- pieces
@pytest.mark.parametrize("spec", ["linear", "task-arithmetic", "ties", "consensus", "emr", "tall", "cat+lines"])
def test_pieces_give_the_bits_of_the_whole(spec, tmp_path, monkeypatch):
    """From files, in pieces of 1,000 entries, a merge has the bits of the one whose task vectors are read whole."""
    monkeypatch.setattr("vtzoo.merges._chain.PIECES", 1000)
    monkeypatch.setattr("vtzoo.merges._whole.BLOCK", 700)
    base_, deltas = random_deltas(3, {"blocks.0.a.weight": (61, 53), "blocks.1.b.bias": (1999,)})
    write(tmp_path / "base.safetensors", base_, {})
    for i, delta in enumerate(deltas):
        delta.save(tmp_path / f"{i}.safetensors")
    opened_ = [Delta.open(tmp_path / f"{i}.safetensors") for i in range(3)]
    made = plan(opened_, spec, base=TensorFile(tmp_path / "base.safetensors"), coef=(1, 0.5, -2))
    assert all(made.whole.in_pieces(n) for n in made.whole.shapes)
    whole = plan(deltas, spec, base=base_, coef=(1, 0.5, -2))
    assert not any(whole.whole.in_pieces(n) for n in whole.whole.shapes)
    for name in made.whole.shapes:
        assert torch.equal(made.tensor(name), whole.tensor(name)), name
    assert made.whole.norms() == pytest.approx(whole.whole.norms())


def test_nan_is_found_in_a_piece(tmp_path, monkeypatch):
    """A NaN far into a tensor of a file stops a merge in pieces, with the delta and the tensor in the message."""
    monkeypatch.setattr("vtzoo.merges._chain.PIECES", 1000)
    base_, deltas = random_deltas(2, {"a.weight": (61, 53)})
    deltas[1].tensors["a.full.weight"][60, 52] = math.nan
    write(tmp_path / "base.safetensors", base_, {})
    save_file({n: t.contiguous() for n, t in deltas[1].tensors.items()}, tmp_path / "1.safetensors")
    broken = deltas[1].with_(tensors=TensorFile(tmp_path / "1.safetensors"))
    deltas[0].save(tmp_path / "0.safetensors")
    made = plan(
        [Delta.open(tmp_path / "0.safetensors"), broken], "linear", base=TensorFile(tmp_path / "base.safetensors")
    )
    with pytest.raises(Corrupt, match=r"delta 2 \(t1\): NaN or infinity in a.weight"):
        made.tensor("a.weight")
