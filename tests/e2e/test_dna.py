"""Students that are searched for: from a teacher on tiny images to a stock network in the zoo."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.e2e.students import PETS, distilled, images_of, world
from vtzoo import talk
from vtzoo.artifact import go_live, open_ref
from vtzoo.errors import Interrupted, Mismatch, UsageError
from vtzoo.fit import checkpoint_path
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo
from vtzoo_cli._main import main

TINY = "steps=2,width=8,depths=1|2,kernels=3"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of pets and cars, deltas for both, and their merge."""
    return world(tmp_path_factory.mktemp("dna"))


def _searches(root: Path) -> set[Path]:
    return set((root / ".vtzoo" / "cache" / "searches").glob("*"))


def test_a_vit_teaches_a_network_that_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line: a search under a budget, the usual distilling, and a folder that plain timm builds; the baseline begins where the student did."""
    zoo, pets = Zoo.init(tmp_path / "zoo"), str(images_of(tmp_path / "pets", PETS, 0))
    train(backbone="vit_embedded_64", data=pets, method="linear", name="pets/vit", zoo=zoo, recipe={"epochs": 0})
    line = ["distill", "--teacher", "pets/vit", "--data", pets, "--views", "1", "--json", "--zoo", str(zoo.root)]
    line += ["--student", f"dna[macs=0.01,{TINY}]", "--epochs", "0", "--baseline", "--name", "pets/dna"]
    assert main(line) == 0
    out, err = capsys.readouterr()
    made = json.loads(out)["report"]
    assert made["macs"] <= 0.01 * made["teacher_macs"]
    assert made["start"] == "random"
    assert [(r["stage"], r["depth"], r["kernel"]) for r in made["search"]] == [(s, d, 3) for s in (1, 2, 3, 4) for d in (1, 2)]  # fmt: skip
    taken = [r for r in made["search"] if r["chosen"]]
    assert f"depths={'|'.join(str(r['depth']) for r in taken)}" in made["student"]
    assert made["student"] in err
    assert main(["export", "timm", "pets/dna", str(tmp_path / "out"), "--zoo", str(zoo.root)]) == 0
    plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert [len(s.blocks) for s in plain.stages] == [r["depth"] for r in taken]
    live, x = go_live(open_ref("pets/dna", zoo)).model, torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(plain(x), live(x))
    metrics = json.loads(out)["metrics"]
    assert metrics["pets"]["loss"] == metrics["pets (no teacher)"]["loss"]


@pytest.mark.parametrize("depths", ["1", pytest.param("1|2", marks=pytest.mark.slow)])
def test_latency_is_kept_as_measured(place: Path, depths: str) -> None:
    """Whole networks are timed; the one that is taken keeps the budget, and is the best rated of those that do."""
    student = f"dna[latency_ms=50,macs=0.9,steps=2,width=8,depths={depths},kernels=3]"
    made, lineage = distilled(place, f"dna/{len(depths)}", ["pets/a"], student=student)
    measured = made.report["measured"]
    own = [m for m in measured if m["chosen"]]
    assert len(own) == 1
    assert 0 < own[0]["ms"] <= 50
    assert own[0]["rating"] == min(m["rating"] for m in measured)
    assert own[0]["rating"] == pytest.approx(sum(r["rating"] for r in made.report["search"] if r["chosen"]))
    assert all(r["ms"] > 0 for r in made.report["search"])
    assert lineage["student"] == {"from": "convnext_atto", "start": "random", "search": student}


@pytest.mark.slow
def test_less_than_the_quickest_takes_is_refused(place: Path, said: list[str]) -> None:
    """As measured on this machine, before anybody is asked; nothing is left behind."""
    before = _searches(place / "zoo")
    with pytest.raises(UsageError, match=r"ms, not 0\.001") as refusal:
        distilled(place, "dna/no", ["pets/a"], student="dna[latency_ms=0.001,width=8,depths=1,kernels=3]")
    assert refusal.value.hint
    assert _searches(place / "zoo") == before
    assert not any(line.startswith("search:") for line in said)


def test_another_budget_trains_nothing_again(place: Path, said: list[str]) -> None:
    """Ratings are kept for all budgets, what was chosen for each; the same line finds the same network, which begins with the same weights, or with another one's."""
    first, _ = distilled(place, "again/a", ["pets/a"], student=f"dna[params=0.9,images=99,{TINY}]")
    assert sum(line.startswith("search:") for line in said) == 1
    before = _searches(place / "zoo")
    other, _ = distilled(place, "again/b", ["pets/a"], student=f"dna[macs=0.3,images=99,{TINY}]")
    assert [r["rating"] for r in other.report["search"]] == [r["rating"] for r in first.report["search"]]
    assert len(_searches(place / "zoo") - before) == 1
    again, _ = distilled(place, "again/c", ["pets/a"], student=f"dna[params=0.9,images=99,{TINY}]")
    assert sum(line.startswith("search:") for line in said) == 1
    assert any("made before" in line for line in said)
    assert again.report["student"] == first.report["student"]
    one, two = (go_live(open_ref(n, Zoo(place / "zoo"))).model.state_dict() for n in ("again/a", "again/c"))
    assert all(torch.equal(t, two[n]) for n, t in one.items())
    given = {"init": "fna", "init_from": "again/a", "recipe": {"seed": 7}}
    distilled(place, "again/d", ["pets/a"], student=f"dna[params=0.9,images=98,{TINY}]", **given)
    three = go_live(open_ref("again/d", Zoo(place / "zoo"))).model.state_dict()
    assert torch.equal(three["stem.0.weight"], one["stem.0.weight"])


def test_one_network_is_found_for_many_tasks(place: Path) -> None:
    """All tasks' images are looked at with the first teacher's trunk, and the student has a classifier for each."""
    both = {"pets": str(place / "pets"), "cars": str(place / "cars")}
    distilled(place, "many/dna", ["both"], data=both, student=f"dna[params=0.9,{TINY}]")
    for task in ("pets", "cars"):
        assert go_live(open_ref("many/dna", Zoo(place / "zoo")), task).model.num_classes == 2


@pytest.mark.parametrize("when", ["in the search", "in the training"])
def test_a_search_that_is_stopped_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Stopped in a stage, nothing is kept, and the same line begins again; stopped later, --resume goes on with the very network."""
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        epochs = sum(line.startswith("epoch 1 ") for line in lines)
        if text.startswith("epoch 1 ") and epochs == (2 if when == "in the search" else 5):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(talk, "say", say)
    name, zoo, before = f"stopped/{when[-6:]}", Zoo(place / "zoo"), _searches(place / "zoo")
    given: dict[str, Any] = {"student": f"dna[params=0.9,images={300 + len(when)},{TINY}]", "recipe": {"epochs": 2}}
    with pytest.raises(Interrupted) as stop:
        distilled(place, name, ["pets/a"], **given)
    going = checkpoint_path(zoo.root, name, "student").exists()
    assert going == (when == "in the training")
    assert ("--resume" in stop.value.hint) == going
    assert len(_searches(zoo.root) - before) == (2 if going else 0)
    monkeypatch.setattr(talk, "say", lines.append)
    made, _ = distilled(place, name, ["pets/a"], resume=going, **given)
    assert made.report["epochs"] == 2
    assert made.report["student"] == next(line for line in lines if line.startswith("found "))[6:].partition("]")[0] + "]"  # fmt: skip


@pytest.mark.parametrize(
    ("student", "changes", "error", "said_"),
    [
        ("dna", {}, UsageError, "how small"),
        ("dna[macs=2]", {}, UsageError, "less than 1"),
        (f"dna[params=0.0001,{TINY}]", {}, UsageError, "of the parameters, not 0.01%"),
        ("dna[macs=0.5]", {"init_from": "vit"}, UsageError, "not how"),
        ("dna[macs=0.5]", {"recipe": {"image_size": 16}}, UsageError, "16 pixels"),
        ("dna[macs=0.5]", {"teachers": ["shallow"], "loss": "feature"}, Mismatch, "fewer than 4 depths"),
    ],
)
def test_what_can_not_be_searched_for_is_refused(place: Path, student: str, changes: dict, error: Any, said_: str) -> None:  # fmt: skip
    """Wishes that are none, budgets below everything, tiny images, teachers of few depths; nothing is written."""
    zoo = Zoo(place / "zoo")
    if "shallow" not in {e.name for e in zoo.entries("models")}:
        distilled(place, "shallow", ["pets/a"], student="test_vit[depth=2]")
    given = {"teachers": ["pets/a"], **changes}
    before = _searches(zoo.root)
    with pytest.raises(error, match=said_) as refusal:
        distilled(place, "dna/no", given.pop("teachers"), student=student, **given)
    assert refusal.value.hint
    assert _searches(zoo.root) == before
