"""Students of several tasks, what is kept of teachers' answers, and what is measured."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from tests.e2e.students import RECIPE, distilled, kept, world
from vtzoo import data as D
from vtzoo.artifact import go_live, open_ref, resolved_card
from vtzoo.backbone import build_sized
from vtzoo.crops import Crops, normalised
from vtzoo.errors import Corrupt, Mismatch, NotFound, UsageError
from vtzoo.faculty import School, lessons_of
from vtzoo.files import header
from vtzoo.installed import head_state
from vtzoo.kept import CHECK, _crc
from vtzoo.lessons import Course
from vtzoo.losses._outputs import Outputs
from vtzoo.recipe import Recipe
from vtzoo.spec import Preprocess
from vtzoo.targets import Answers, packed, together, unpacked
from vtzoo.tensors import write
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.evaluate import evaluate
from vtzoo.verbs.export.safetensors import export_safetensors
from vtzoo.verbs.export.timm import export_timm
from vtzoo.verbs.merge import merge_refs
from vtzoo.verbs.predict import predict
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of pets and cars, deltas for both, and their merge."""
    return world(tmp_path_factory.mktemp("students"))


def _both(place: Path) -> dict[str, str]:
    return {"pets": str(place / "pets"), "cars": str(place / "cars")}


@pytest.mark.parametrize("teachers", [["both"], ["pets/a", "cars/c"]])
def test_one_student_learns_all_tasks(place: Path, teachers: list[str]) -> None:
    """Of a merge, or of an expert for each task: one trunk, a head for each, measured, predicted and copied out task by task."""
    zoo, name = Zoo(place / "zoo"), f"all/{len(teachers)}"
    made, lineage = distilled(place, name, teachers, data=_both(place), recipe={"epochs": 2}, loss="kd+0.5*feature")
    assert [line["task"] for line in made.report["tasks"]] == ["pets", "cars"]
    assert [n["teacher_tasks"] for n in lineage["lessons"]] == [["pets"], ["cars"]]
    lives = [go_live(open_ref(t, zoo), n).model for t, n in zip(teachers * 2, ("pets", "cars"), strict=False)]
    second = head_state(lives[1]) if len(teachers) == 1 else dict(lives[1].named_parameters())
    assert made.report["teacher_params"] == sum(p.numel() for p in [*lives[0].parameters(), *second.values()])
    assert zoo.resolve(name).facts["tasks"] == ["pets", "cars"]
    files = zoo.resolve(name).facts["files"].values()
    assert made.report["size_bytes"] == sum(zoo.object(digest).stat().st_size for digest in files)
    with pytest.raises(NotFound, match="2 tasks"):
        go_live(open_ref(name, zoo))
    with pytest.raises(NotFound, match="no task 'pest'"):
        evaluate(ref=name, data=str(place / "pets"), task="pest", zoo=zoo)
    for task in ("pets", "cars"):
        found = evaluate(ref=name, data=str(place / task), task=task, zoo=zoo, split="val").metrics[task]
        assert found["top1"] == pytest.approx(made.metrics[task]["top1"], abs=1e-4)
        shown = predict(ref=name, images=place / task / "val", task=task, top=1, zoo=zoo).predictions
        out = export_timm(ref=name, out=place / f"{len(teachers)}-{task}", task=task, zoo=zoo)
        plain = timm.create_model(f"local-dir:{out.path}", pretrained=True).eval()
        live = go_live(open_ref(name, zoo), task)
        x = D.transforms(live.preprocess, train=False)(D.open_image(shown[0]["image"]))[None]
        with torch.inference_mode():
            assert torch.equal(plain(x), live.model(x))
        again = evaluate(ref=out.path, data=str(place / task), zoo=zoo, split="val").metrics[task]
        assert again["top1"] == found["top1"]


def test_answers_are_the_teachers_and_no_students(place: Path) -> None:
    """Another seed, another student and another loss on the same outputs ask nobody again; another size asks for pixels alone."""
    twice = {"epochs": 2}
    distilled(place, "share/a", ["pets/a"], views=2, recipe=twice)
    answers, pixels = kept(place, "answers"), kept(place, "pixels")
    distilled(place, "share/b", ["pets/a"], views=2, recipe={**twice, "seed": 3})
    distilled(place, "share/c", ["pets/a"], views=2, student="test_resnet", loss="hard", recipe=twice)
    assert (kept(place, "answers"), kept(place, "pixels")) == (answers, pixels)
    distilled(place, "share/d", ["pets/a"], views=2, recipe={**twice, "image_size": 64})
    assert kept(place, "answers") == answers
    assert len(kept(place, "pixels") - pixels) == 2


def test_answers_in_every_step_teach_the_same(place: Path) -> None:
    """With and without files the student learns the same, but for what half precision rounds; without, nothing is written."""
    given: dict[str, Any] = {"recipe": {"epochs": 3}, "views": 2}
    first, _ = distilled(place, "online/kept", ["pets/a"], **given)
    before = kept(place, "answers")
    second, _ = distilled(place, "online/asked", ["pets/a"], views=2, recipe={"epochs": 3, "cache": "off", "seed": 0})
    assert kept(place, "answers") == before
    assert second.report["loss"] == pytest.approx(first.report["loss"], rel=1e-3)
    assert second.report["held_out_loss"] == pytest.approx(first.report["held_out_loss"], rel=1e-2)
    endless, _ = distilled(place, "online/new", ["pets/a"], views=0, recipe={"epochs": 3, "cache": "off"})
    assert endless.report["loss"] != second.report["loss"]


def test_a_damaged_file_is_asked_for_again_and_nothing_else(place: Path) -> None:
    """A file that lost its end or a bit is computed anew, the others are read; the student is the same, bit for bit."""
    before, recipe = kept(place, "answers"), {"epochs": 3, "crop_area": 0.7}
    first, _ = distilled(place, "mended/a", ["pets/a"], views=3, recipe=recipe)
    files = sorted(kept(place, "answers") - before)
    times = {f: f.stat().st_mtime_ns for f in files}
    cut, bent = files[:2]
    cut.chmod(0o644)
    cut.write_bytes(cut.read_bytes()[:-7])
    data = bytearray(bent.read_bytes())
    data[-9] ^= 1
    bent.chmod(0o644)
    bent.write_bytes(data)
    second, _ = distilled(place, "mended/b", ["pets/a"], views=3, recipe=recipe)
    changed = {f for f in files if f.stat().st_mtime_ns != times[f]}
    assert changed == {cut, bent}
    assert load_file(first.path).keys() == load_file(second.path).keys()
    assert all(torch.equal(t, load_file(second.path)[n]) for n, t in load_file(first.path).items())


def test_kept_answers_are_checked(place: Path) -> None:
    """Asked again the teachers say the same; of answers that somebody changed, whole as the file is, this is refused."""
    made, _ = distilled(place, "checked/a", ["pets/a"], views=2, check=9)
    assert made.report["check"][0]["checked"] == 9
    assert made.report["check"][0]["largest_difference"] < 2e-3
    folder = place / "zoo" / ".vtzoo" / "cache" / "targets"
    away = place / "away"
    shutil.copytree(folder, away)
    try:
        for file in kept(place, "answers"):
            _turn(file)
        with pytest.raises(Corrupt, match="answer otherwise"):
            distilled(place, "checked/b", ["pets/a"], views=2, check=9)
    finally:
        shutil.rmtree(folder)
        away.rename(folder)


def _turn(file: Path) -> None:
    """Raise one class's logits, and make the file's checksum right again."""
    tensors = dict(load_file(file))
    if "logits" in tensors:
        tensors["logits"][:, 0] += 1
        tensors[CHECK] = torch.tensor([_crc(tensors)])
        write(file, tensors, header(file).metadata)


@pytest.mark.parametrize("classes", [3, 300, 8192])
def test_answers_survive_being_kept(classes: int) -> None:
    """Logits come back to half precision at every temperature, also those of a sure teacher; features of each teacher in their order."""
    logits = 4 * torch.randn(5, classes)
    logits[0, 1] += 30
    features = [torch.randn(5, 7), *(torch.full((5, 2), float(i)) for i in range(11))]
    back = unpacked(packed([Outputs(logits, f) for f in features]), [4, 0], 12)
    for t in (1, 4, 8):
        p, q = (logits[[4, 0]] / t).softmax(-1), (back[0].logits / t).softmax(-1)
        assert (p - q).abs().max() < 2e-3
    assert all(torch.allclose(a.features, f[[4, 0]], atol=2e-3) for a, f in zip(back, features, strict=True))
    alone = unpacked(packed([Outputs(logits), Outputs(logits)]), [1], 2)
    assert [a.features for a in alone] == [None, None]
    assert torch.equal(alone[0].logits, alone[1].logits)


@pytest.mark.parametrize(("sizes", "batch"), [((7, 3), 4), ((50, 2), 8), ((5,), 1), ((4, 9, 31), 64), ((13,), 2)])
def test_an_epoch_shows_every_image_once_and_no_task_one_alone(sizes: tuple[int, ...], batch: int) -> None:
    """Whatever the sizes of the tasks and the batch: each image once, two of a task at least where it has any, and another order in each epoch."""
    order = [(number, i) for number, size in enumerate(sizes) for i in range(size)]
    given: dict[str, Any] = {
        "needs": frozenset(),
        "levels": 0,
        "preprocess": Preprocess(),
        "views": 1,
        "kept": (),
        "held": (),
    }
    course = Course(lessons=[None] * len(sizes), recipe=Recipe(batch_size=batch), order=order, **given)
    seen: list[list[tuple[int, int]]] = []
    course.batch = lambda _view, places: seen.append(list(places)) or ()
    epochs = []
    for epoch in range(2):
        seen.clear()
        assert len(list(course.batches(epoch, 0))) == course.steps
        epochs.append([place for places in seen for place in places])
        assert sorted(epochs[-1]) == order
        assert all(n != 1 for places in seen for n in Counter(number for number, _ in places).values())
        assert max(map(len, seen)) - min(map(len, seen)) <= 2 + len(sizes)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("sure", [0.0, 20.0])
def test_of_very_many_classes_the_rest_keeps_its_share(sure: float) -> None:
    """The largest 1,024 of 20,000 logits are kept; the others have the share that they had at the temperature of 4, and of a sure teacher next to it at others."""
    draw = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(4, 20_000, generator=draw)
    logits[:, 7] += sure
    back = unpacked(packed([Outputs(logits)]), range(4), 1)[0].logits
    top = logits.topk(1024).indices
    for t, near in ((1, 0.03), (2, 0.05), (4, 2e-3), (8, 0.05)) if sure else ((4, 2e-3),):
        p, q = (logits / t).softmax(-1), (back / t).softmax(-1)
        assert (p.gather(1, top).sum(-1) - q.gather(1, top).sum(-1)).abs().max() < near
    p, q = (logits / 4).log_softmax(-1), (back / 4).log_softmax(-1)
    assert (p.gather(1, top) - q.gather(1, top)).abs().max() < 5e-3


def test_teachers_of_one_task_speak_together() -> None:
    """Their probabilities are averaged, and each keeps its features."""
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    one, two = together([Outputs(a, torch.ones(4, 2)), Outputs(b, torch.zeros(4, 5))])
    assert torch.allclose(one.logits.softmax(-1), (a.softmax(-1) + b.softmax(-1)) / 2, atol=1e-6)
    assert torch.equal(one.logits, two.logits)
    assert (one.features.shape, two.features.shape) == ((4, 2), (4, 5))


@pytest.mark.parametrize("loss", ["kd", "feature", "kd+feature"])
def test_several_teachers_of_one_task(place: Path, loss: str) -> None:
    """They teach together, kept or asked, with the same result but for half precision, and what is kept is checked."""
    zoo = Zoo(place / "zoo")
    if "pets/twin" not in {e.name for e in zoo.entries("deltas")}:
        train(backbone="vit", data=str(place / "pets"), method="linear", name="pets/twin", zoo=zoo, recipe={**RECIPE})
    who, name, recipe = ["pets/a", "pets/twin"], loss.replace("+", "-"), {"epochs": 2}
    first, lineage = distilled(place, f"team/{name}", who, loss=loss, recipe=recipe, views=2, check=4)
    second, _ = distilled(place, f"team/{name}-live", who, loss=loss, recipe={**recipe, "cache": "off"}, views=2)
    assert len(lineage["teachers"]) == len(lineage["lessons"][0]["teachers"]) == 2
    assert second.report["loss"] == pytest.approx(first.report["loss"], rel=1e-3)


def test_students_with_one_trunk_and_other_heads_are_two_teachers(place: Path) -> None:
    """Two students of several tasks that differ in their heads alone have answers of their own; as students they bring their heads along."""
    zoo = Zoo(place / "zoo")
    distilled(place, "heads/base", ["both"], data=_both(place), recipe={"epochs": 2})
    for seed in (1, 2):
        given = {
            "data": _both(place),
            "student": "heads/base[drop_rate=0.1]",
            "recipe": {"epochs": 1, "seed": seed, "lr": 1e-2},
        }
        distilled(place, f"heads/{seed}", ["both"], **given)
    one, two = (zoo.resolve(f"heads/{seed}", "models").facts["files"] for seed in (1, 2))
    folder = place / "heads-folder"
    for i, files in enumerate((one, two)):
        (folder / str(i)).mkdir(parents=True)
        mixed = {**one, "heads.safetensors": files["heads.safetensors"]}
        for name, digest in mixed.items():
            (folder / str(i) / name).write_bytes(zoo.object(digest).read_bytes())
    before = kept(place)
    for i in range(2):
        distilled(place, f"heads/of-{i}", [str(folder / str(i))], data=str(place / "pets"), task="pets", check=8)
    assert len(kept(place) - before) == 2
    distilled(place, "heads/again", ["both"], data=_both(place), student="heads/1")
    live, again = (go_live(open_ref(n, zoo), "cars").model for n in ("heads/1", "heads/again"))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in live.state_dict().items())
    distilled(place, "heads/cars", ["cars/c"], data=str(place / "cars"), student="heads/1")
    single = go_live(open_ref("heads/cars", zoo)).model
    assert all(torch.equal(t, single.state_dict()[n]) for n, t in live.state_dict().items())
    everything = load_file(export_safetensors(ref="heads/1", out=place / "heads.safetensors", zoo=zoo).path)
    assert {n.split("/")[1] for n in everything if n.startswith("@head/")} == {"pets", "cars"}


def test_licences_go_on(place: Path) -> None:
    """A student's licence is its teachers' together with its own start's, and so its students' in turn; of several tasks, too, and where it is copied out."""
    zoo = Zoo(place / "zoo")
    add_backbone(
        name="closed", arch="test_efficientnet", weights=place / "conv.safetensors", license="cc-by-nc-4.0", zoo=zoo
    )
    train(backbone="closed", data=str(place / "pets"), method="linear", name="pets/closed", zoo=zoo, recipe={**RECIPE})
    distilled(place, "licence/one", ["pets/closed"])
    _, lineage = distilled(place, "licence/two", ["licence/one", "cars/c"], data=_both(place))
    assert "cc-by-nc-4.0" in lineage["licenses"]
    out = export_timm(ref="licence/two", out=place / "licence-cars", task="cars", zoo=zoo)
    assert "cc-by-nc-4.0" in json.loads(Path(out.path, "config.json").read_text())["pretrained_cfg"]["license"]


def test_the_losses_that_are_told_are_those_of_what_is_kept(place: Path) -> None:
    """With patience the best epoch is kept, and its held-out loss is the one in report and index."""
    recipe = {"epochs": 8, "patience": 2, "lr": 0.3, "optimizer": "sgd", "clip_norm": 0.0}
    made, _ = distilled(place, "patient", ["pets/a"], loss="feature", recipe=recipe)
    facts = Zoo(place / "zoo").resolve("patient").facts
    again, _ = distilled(
        place, "patient/again", ["pets/a"], loss="feature", student="patient", recipe={"epochs": 1, "lr": 1e-12}
    )
    assert facts["metrics"]["held_out_loss"] == pytest.approx(made.report["held_out_loss"], abs=1e-4)
    assert again.report["epochs"] == 1


def test_teachers_see_mixed_images_mixed(place: Path) -> None:
    """With mixup the answers are those to the mixed pixels, which the student sees."""
    school = School(
        teachers=[open_ref("pets/a", Zoo(place / "zoo"))],
        crops=Crops(mixup=1.0),
        needs=frozenset({"logits"}),
        recipe=Recipe(),
    )
    lesson = lessons_of(school, {"": str(place / "pets")}, None)[0]
    answers = Answers(lesson, place / "mixed", lesson.teachers[0].preprocess.input_size[1:])
    live = lesson.teachers[0].live
    x = normalised(answers.pixels(1, range(16)), live.preprocess)
    with torch.no_grad():
        assert torch.allclose(answers.ask(1, range(16))[0].logits, live.model(x), atol=2e-3)


def test_a_student_without_a_teacher_stands_beside_it(place: Path) -> None:
    """--baseline trains the same student on labels alone, and reports it; a loss without labels has none."""
    made, _ = distilled(
        place, "alone/a", ["both"], data=_both(place), recipe={"epochs": 1}, baseline=True, latency=True
    )
    assert made.report["latency_ms"] > 0
    assert made.report["teacher_latency_ms"] > 0
    assert set(made.metrics) >= {"pets", "pets (teacher)", "pets (no teacher)", "cars (no teacher)"}
    assert all("no_teacher" in line for line in made.report["tasks"])
    with pytest.raises(UsageError, match="without labels"):
        distilled(place, "alone/b", ["pets/a"], loss="feature", baseline=True)


def test_a_student_starts_from_its_teachers_weights(place: Path) -> None:
    """A smaller network of the family takes them over, of the folded teacher or of whom else is named, head and all; one of another family is refused."""
    zoo = Zoo(place / "zoo")
    alike, deeper = "test_efficientnet[pretrained=false]", "vit[depth=9,pretrained=false]"
    made, lineage = distilled(place, "init/same", ["pets/a"], student=alike, init="weight-selection")
    assert lineage["student"]["start"] == made.report["start"] == "weight-selection of pets/a"
    teacher = go_live(open_ref("pets/a", zoo), plain=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(go_live(open_ref("init/same", zoo)).model(x), teacher.model(x))
    distilled(place, "init/deep", ["pets/a"], student=deeper, init="net2net", init_from="vit", loss="feature")
    with torch.inference_mode():
        assert torch.equal(go_live(open_ref("init/deep", zoo)).model(x), _at(32, zoo)(x))
    for changes, error in (
        ({"student": "test_vit"}, Mismatch),
        ({"init": "net2nt"}, NotFound),
        ({"init_from": "nobody"}, NotFound),
    ):
        with pytest.raises(error):
            distilled(place, "init/no", ["pets/a"], **{"init": "weight-selection", **changes})
    with pytest.raises(UsageError, match="not how"):
        distilled(place, "init/no", ["pets/a"], init_from="vit")


def test_a_student_of_many_tasks_starts_from_a_merge(place: Path) -> None:
    """The trunk is the merge's, and so are the classifiers, in whatever order the tasks are given; the student without a teacher starts there, too."""
    zoo = Zoo(place / "zoo")
    data = dict(reversed(_both(place).items()))
    given: dict[str, Any] = {"data": data, "init": "weight-selection", "baseline": True}
    made, _ = distilled(place, "init/both", ["both"], student="test_efficientnet[pretrained=false]", **given)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        trunk = go_live(open_ref("both", zoo), "", plain=True).model(x)
        assert torch.equal(go_live(open_ref("init/both", zoo), "").model(x), trunk)
        for task in ("cars", "pets"):
            theirs = go_live(open_ref("both", zoo), task, plain=True).model(x)
            assert torch.equal(go_live(open_ref("init/both", zoo), task).model(x), theirs)
    assert made.metrics["pets (no teacher)"]["top1"] == made.metrics["pets"]["top1"]


def test_a_student_is_made_of_its_teacher(place: Path) -> None:
    """slim[…] leaves out what the tasks depend on least, of a bare backbone, too; it is kept as a stock network of other sizes."""
    zoo, given = Zoo(place / "zoo"), {"recipe": {"epochs": 1}, "baseline": True}
    train(backbone="vit", data=str(place / "pets"), method="lora[rank=2]", name="pets/vit", zoo=zoo, recipe={**RECIPE})
    made, lineage = distilled(place, "slim/half", ["pets/vit"], student="slim[macs=0.6]", **given)
    teacher = go_live(open_ref("pets/vit", zoo), plain=True)
    assert lineage["student"]["start"] == "slim[macs=0.6] of pets/vit"
    assert made.report["macs"] <= 0.6 * made.report["teacher_macs"]
    assert go_live(open_ref("slim/half", zoo)).preprocess == teacher.preprocess
    distilled(place, "slim/bare", ["pets/a", "cars/c"], data=_both(place), student="slim[depth=3]", init_from="vit")
    assert len(go_live(open_ref("slim/bare", zoo), "cars").model.blocks) == 3
    distilled(place, "slim/one", ["pets/a"], student="slim[depth=3]", init_from="vit")
    assert go_live(open_ref("slim/one", zoo)).model(torch.randn(2, 3, 32, 32)).shape == (2, 2)
    train(backbone="vit", data=str(place / "cars"), method="lora[rank=2]", name="cars/vit", zoo=zoo, recipe={**RECIPE})
    merge_refs(refs=["pets/vit", "cars/vit"], method="linear", name="vits", zoo=zoo)
    distilled(place, "slim/many", ["vits"], data=_both(place), student=f"slim[depth={len(teacher.model.blocks)}]")
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        for task in ("pets", "cars"):
            ours, theirs = (go_live(open_ref(r, zoo), task, plain=True).model(x) for r in ("slim/many", "vits"))
            assert torch.allclose(ours, theirs, atol=1e-5)
    for student, changes, said in (
        ("slim[macs=0.6]", {"init": "resize"}, "first weights already"), ("slim", {}, "how small"), ("slim[macs=2]", {}, "less than 1"),
        ("slim[depth=2]", {"recipe": {"image_size": 64}}, "32 pixels"), ("slim[depth=2]", {"loss": "feature", "data": str(place / "zoo" / "..")}, "have none"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            distilled(place, "slim/no", ["pets/vit"], student=student, **changes)


def test_first_weights_bring_their_normalisation_and_licence(place: Path) -> None:
    """A student sees pixels as the network did that its weights are of, whatever its architecture's own mean is, and bears that one's licence; its lineage has the digest."""
    zoo, weights = Zoo(place / "zoo"), place / "vit.safetensors"
    seen = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    add_backbone(name="grey", arch="test_vit", weights=weights, license="cc-by-nc-4.0", zoo=zoo, **seen)
    given = {"student": "test_vit[pretrained=false]", "init": "net2net", "init_from": "grey"}
    _, lineage = distilled(place, "init/grey", ["pets/a"], **given)
    live = go_live(open_ref("init/grey", zoo))
    assert (live.preprocess.mean, live.preprocess.std) == (seen["mean"], seen["std"])
    assert live.card.license == "apache-2.0 AND cc-by-nc-4.0"  # the teacher's, too
    assert lineage["student"]["giver"] == zoo.resolve("grey").facts["fingerprint"]


def test_a_student_by_path_and_by_prefix(place: Path) -> None:
    """A folder, the beginning of a name and a pinned name mean the model, with its weights and arguments; a delta is refused with what to do."""
    zoo = Zoo(place / "zoo")
    entry = zoo.resolve("pets/folded", "models")
    x = torch.randn(2, 3, 32, 32)
    theirs = go_live(open_ref(str(place / "folded"), zoo)).model
    for i, text in enumerate((f"{place / 'folded'}[drop_rate=0.1]", "pets/fold", entry.pinned)):
        _, lineage = distilled(place, f"refs/{i}", ["pets/a"], student=text)
        with torch.inference_mode():
            assert torch.equal(go_live(open_ref(f"refs/{i}", zoo)).model(x), theirs(x))
        assert str(place) not in str(lineage)
    for text in ("pets/a", str(place / "a.safetensors")):
        with pytest.raises(UsageError, match="is a delta") as refusal:
            distilled(place, "refs/no", ["pets/a"], student=text)
        assert "vtzoo fold" in refusal.value.hint
    with pytest.raises(NotFound):
        distilled(place, "refs/no", ["pets/a"], student="./nowhere")
    with pytest.raises(UsageError, match="NAME"):
        distilled(place, "refs/no", ["pets/a"], student="test_vit[depth=2]+x")


def _at(pixels: int, zoo: Zoo) -> torch.nn.Module:
    return build_sized(resolved_card("vit", zoo), pixels, zoo=zoo)[1]


@pytest.mark.parametrize(
    ("loss", "student"),
    [
        ("attention", "test_vit"), ("fitnet", "test_convnext"), ("review+kd", "test_efficientnet"), ("rkd+0.1*dist", "test_resnet"),
        ("token", "deit_tiny_distilled_patch16_224[depth=2,embed_dim=24,num_heads=2]"), ("kdep", "test_resnet"), ("dkd", "test_vit"),
    ],
)  # fmt: skip
def test_every_loss_teaches(place: Path, loss: str, student: str, said: list[str]) -> None:
    """Each lowers its value on the images it was shown, whatever stands on both sides."""
    name = f"taught/{loss.partition('+')[0]}"
    made, lineage = distilled(
        place, name, ["pets/a"], loss=loss, student=student, views=8, recipe={"epochs": 6, "lr": 3e-3}
    )
    losses = [float(line.split()[3]) for line in said if line.startswith("epoch ")]
    assert len(losses) == made.report["epochs"] == 6
    assert losses[-1] < losses[0]
    assert {t["function"] for t in lineage["loss"]} == {part.rpartition("*")[2] for part in loss.split("+")}


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"loss": "token"}, Mismatch, "no distillation token"),
        ({"loss": "kd+kdd"}, NotFound, "kdd"),
        ({"loss": "-1*kd"}, UsageError, "no positive factor"),
        ({"loss": "x*kd"}, UsageError, "no positive factor"),
        ({"views": 0}, UsageError, "views=0"),
        ({"recipe": {"cache": "off"}, "check": 5}, UsageError, "cache=off"),
        ({"loss": "attention", "check": 5}, UsageError, "on maps"),
        ({"recipe": {"augment": "none", "crop_area": 0.2}}, UsageError, "cuts nothing out"),
        ({"data": {"pest": "{}/pets", "cars": "{}/cars"}, "teachers": ["both"]}, NotFound, "no task 'pest'"),
        ({"resume": True}, NotFound, "no checkpoint"),
        ({"data": {"pets": "{}/pets", "planes": "{}/cars"}, "teachers": ["both", "pets/a"]}, NotFound, "planes"),
        ({"data": {"pets": "{}/pets"}, "teachers": ["pets/a", "cars/c"]}, UsageError, "cars/c has none"),
        ({"data": {"pets": "{}/pets", "cars": "{}/cars"}, "teachers": ["both"], "task": "pets"}, UsageError, "--task"),
        ({"data": {"cars": "{}/pets"}, "teachers": ["both"]}, Mismatch, "classes"),
    ],
)
def test_what_nobody_can_teach_is_refused(place: Path, changes: dict[str, Any], error: Any, said: str) -> None:
    """A loss without its output, a task without a teacher, a teacher without a task: by name, before any work."""
    given = dict(changes)
    teachers = given.pop("teachers", ["pets/a"])
    if "data" in given:
        given["data"] = {k: v.format(place) for k, v in given["data"].items()}
    before = kept(place, "answers")
    with pytest.raises(error, match=said) as refusal:
        distilled(place, "no/no", teachers, **given)
    assert refusal.value.hint
    assert kept(place, "answers") == before
