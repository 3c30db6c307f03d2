"""Training that computes the frozen layers once: the same result, files that runs share, and what becomes of them."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

from vtzoo import feed, machine, talk
from vtzoo.delta import Delta
from vtzoo.errors import UsageError, VtzooError
from vtzoo.prefix import Prefix
from vtzoo.tensors import TensorFile
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

RECIPE: dict[str, Any] = {
    "epochs": 6,
    "limit": 60,
    "eval_limit": 40,
    "batch_size": 20,
    "lr": 1e-3,
    "warmup_epochs": 0.5,
    "image_size": 64,
}


def kept(zoo: Zoo) -> list[Path]:
    """The files of features, and whatever else lies beside them."""
    folder = zoo.root / ".vtzoo" / "features"
    return sorted(folder.iterdir()) if folder.exists() else []


def run(zoo: Zoo, name: str, method: str = "linear", **recipe: Any) -> dict[str, torch.Tensor]:
    """Train and give the delta's tensors."""
    made = train(backbone="tiny", data="vtzoo:fashion", method=method, name=name, zoo=zoo, recipe={**RECIPE, **recipe})
    return dict(Delta.open(Path(made.path)).tensors)


@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        ("linear", {}),
        ("mlp-head", {"augment": "none", "ema_decay": 0.9}),
        ("partial", {"augment": "crop", "views": 2}),
        ("lora[rank=2,targets=blocks.5.*]", {"probe_epochs": 1}),
        ("lst", {"augment": "none"}),
    ],
)
def test_kept_features_change_nothing(zoo: Zoo, said: list[str], method: str, recipe: dict[str, Any]) -> None:
    """With the frozen layers computed once per view the trained tensors are those that come out without."""
    cached = run(zoo, "fashion/with", method, **recipe)
    assert any(line.startswith("what 7 modules " if method == "lst" else "all before ") for line in said)
    assert kept(zoo)
    plain = run(zoo, "fashion/without", method, cache="off", **recipe)
    assert cached.keys() == plain.keys()
    assert all(torch.allclose(cached[n], plain[n], rtol=1e-5, atol=1e-6) for n in plain)


@pytest.mark.parametrize(
    "method",
    ["lora[rank=2,targets=blocks.5.mlp.fc2]+bitfit", pytest.param("adapter+ssf", marks=pytest.mark.slow)]
    + [pytest.param(f"{m}[targets=blocks.5.mlp.fc2]", marks=pytest.mark.slow) for m in ("lora", "partial")],
)
def test_recomputed_blocks_change_nothing(zoo: Zoo, method: str) -> None:
    """With activation checkpointing the delta is the same file, also where kept features come into the middle of a block."""
    made = [
        train(
            backbone="tiny", data="vtzoo:fashion", method=method, name=f"fashion/{'again' if again else 'kept'}", zoo=zoo,
            recipe={**RECIPE, "epochs": 3, "limit": 30, "checkpointing": again},
        )
        for again in (False, True)
    ]  # fmt: skip
    assert made[0].digest == made[1].digest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch.compile asks for
@pytest.mark.parametrize(
    ("method", "recipe"),
    [("lora[rank=2]", {"augment": "crop"}), ("lora[rank=2,targets=blocks.5.mlp.fc2]", {"checkpointing": True})],
)
def test_compiled_blocks_change_only_rounding(zoo: Zoo, method: str, recipe: dict[str, Any]) -> None:
    """torch.compile, with a smaller last batch, trains what runs as it is written, and the header says that it was used."""
    plain = run(zoo, "fashion/plain", method, limit=50, epochs=3, **recipe)
    fast = run(zoo, "fashion/fast", method, limit=50, epochs=3, compile=True, **recipe)
    assert all(torch.allclose(plain[n], fast[n], rtol=1e-3, atol=1e-4) for n in plain)
    headers = [Delta.open(zoo.object(zoo.resolve(n).facts["digest"])).recipe for n in ("fashion/plain", "fashion/fast")]
    assert ["compile" in h for h in headers] == [False, True]


def test_runs_share_their_features(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed, rate and head find what the first run computed; other images, of course, don't."""
    run(zoo, "first")
    before = kept(zoo)

    def never(*_: Any) -> Any:
        raise AssertionError("the features are there")

    features = Prefix.features
    monkeypatch.setattr(feed, "_write", never)
    run(zoo, "second", "linear", lr=3e-3, epochs=9)
    run(zoo, "third", "mlp-head[hidden=8]")
    with pytest.raises(AssertionError, match="are there"):
        run(zoo, "fourth", limit=40)
    assert kept(zoo) == before
    assert Prefix.features is features


def test_images_that_nobody_looks_at_have_no_features(zoo: Zoo) -> None:
    """Without validation the held-out images are left alone, also in what a dry run tells."""
    asked = {**RECIPE, "eval_on": "test"}
    plan = train(backbone="tiny", data="vtzoo:fashion", name="dry", zoo=zoo, dry_run=True, recipe=asked).plan
    run(zoo, "blind", eval_on="test")
    shapes = [tuple(TensorFile(p)["features"].shape) for p in kept(zoo)]
    assert shapes == [(60, 64)] * 2
    assert plan["features"]["size_bytes"] == 4 * 64 * 2 * 60


@pytest.mark.parametrize("recipe", [{"epochs": 2}, {"augment": "crop"}, {"mixup": 0.2}, {"cache": "off"}], ids=str)
def test_nothing_is_kept_where_it_does_not_pay(zoo: Zoo, recipe: dict[str, Any]) -> None:
    """As many views as epochs, a new view each epoch, mixed images, or the user's wish: images are fed as they are."""
    run(zoo, "plain", **recipe)
    assert not kept(zoo)


def test_a_small_disk_is_left_alone(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that would fill the disk are not kept."""
    monkeypatch.setattr(machine, "free_bytes", lambda _: 1000)
    run(zoo, "plain")
    assert not kept(zoo)


def test_a_dry_run_tells_and_keeps_nothing(zoo: Zoo, said: list[str]) -> None:
    """Where the cut is, what it costs, how long it would take and where the delta acts is told before anything is kept."""
    asked: dict[str, Any] = {"backbone": "tiny", "data": "vtzoo:fashion", "name": "dry", "zoo": zoo, "dry_run": True}
    plan = train(method="partial[targets=fc2]+linear", recipe=RECIPE, **asked).plan
    assert "all before blocks.5 runs once for each of 2 views of an image: " in said[-1]
    assert plan["features"]["views"] == 2
    assert plan["features"]["size_bytes"] == 4 * 64 * 17 * (2 * 60 + 40)
    assert plan["steps"] == 6 * 3
    assert plan["acts"] == ["partial: blocks.5.mlp.fc2", "linear: the head"]
    assert 0 < plan["seconds"] < 600
    longer = train(method="linear", recipe={**RECIPE, "epochs": 2000, "cache": "off"}, **asked).plan
    assert longer["seconds"] > 20 * plan["seconds"]
    assert longer["features"] is None
    assert (
        train(method="bitfit", recipe=RECIPE, **asked)
        .plan["acts"][0]
        .startswith("bitfit: patch_embed.proj, 6 blocks.*.norm1")
    )
    assert not kept(zoo)
    assert not list(zoo.root.rglob("*.tmp"))
    assert zoo.entries("deltas") == []


def test_features_that_could_not_be_finished_leave_nothing(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stops while features are computed finds no half of a file, and the next run computes them."""
    features = Prefix.features

    def interrupted(self: Prefix, model: Any, x: torch.Tensor) -> torch.Tensor:
        if len(x) < feed.BATCH:  # the last batch
            raise KeyboardInterrupt
        return features(self, model, x)

    monkeypatch.setattr(Prefix, "features", interrupted)
    monkeypatch.setattr(feed, "BATCH", 40)
    with pytest.raises(KeyboardInterrupt):
        run(zoo, "stopped")
    assert not kept(zoo)
    monkeypatch.setattr(Prefix, "features", features)
    assert run(zoo, "stopped")


@pytest.mark.parametrize(
    "after", ["epoch 2 ", *(pytest.param(a, marks=pytest.mark.slow) for a in ("features", "epoch 5 "))]
)
def test_killed_training_goes_on_where_it_stopped(zoo: Zoo, after: str) -> None:
    """After kill -9 at any time --resume, or the same command where there was no epoch yet, gives the same file."""
    whole = train(backbone="tiny", data="vtzoo:fashion", method="partial", name="run", zoo=zoo, recipe=RECIPE)
    zoo.remove(zoo.resolve("run"))
    for path in kept(zoo):
        path.unlink()
    command = [
        sys.executable, "-m", "vtzoo_cli", "train", "--zoo", str(zoo.root), "--backbone", "tiny", "--data",
        "vtzoo:fashion", "--method", "partial", "--name", "run", *(f"--set={k}={v}" for k, v in RECIPE.items()),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        wanted = "all before" if after == "features" else after
        next(line for line in process.stderr if line.startswith(wanted))
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    resumed = [] if after == "features" else ["--resume"]
    done = subprocess.run([*command, *resumed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert zoo.resolve("run").facts["digest"] == whole.digest


@pytest.mark.parametrize("kept_bytes", [0, 1000, None], ids=["empty", "cut off", "changed"])
def test_damaged_features_are_made_again(zoo: Zoo, said: list[str], kept_bytes: int | None) -> None:
    """A file that was cut off, or whose bytes have changed, is seen, and the result is that of a sound one."""
    first = run(zoo, "t/first")
    for path in kept(zoo):
        data = bytearray(path.read_bytes())
        data[-1000:-900] = bytes(100)
        path.write_bytes(data if kept_bytes is None else data[:kept_bytes])
    again = run(zoo, "t/again")
    assert any("is damaged" in line for line in said)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert all(p.suffix == ".safetensors" for p in kept(zoo))


def test_a_place_that_is_no_folder_is_said(zoo: Zoo) -> None:
    """Where features can't be kept because a file is in the way, it is told in the house's words."""
    (zoo.root / ".vtzoo").mkdir(exist_ok=True)
    (zoo.root / ".vtzoo" / "features").write_text("in the way")
    with pytest.raises(VtzooError):
        run(zoo, "first")


def test_other_pixels_have_other_features(zoo: Zoo, tmp_path: Path) -> None:
    """Of a data set that timm reads the names may stay while the pictures change: what was kept of the old ones isn't used."""
    for split in ("train", "validation", "test"):
        for label in ("a", "b"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(6):
                shade = 40 * i + (20 if label == "a" else 0)
                Image.new("RGB", (64, 64), (shade, 255 - shade, 0)).save(folder / f"{i}.png")
    data = f"torch/image_folder@{tmp_path / 'images'}"
    asked: dict[str, Any] = {
        "backbone": "tiny",
        "data": data,
        "zoo": zoo,
        "recipe": {**RECIPE, "limit": 0, "batch_size": 6},
    }
    first = train(name="t/first", **asked)
    assert train(name="t/same", **asked).digest == first.digest
    files = kept(zoo)
    for path in (tmp_path / "images").rglob("*.png"):
        ImageOps.invert(Image.open(path)).save(path)
    assert train(name="t/other", **asked).digest != first.digest
    assert set(kept(zoo)) > set(files)


def test_another_architecture_has_other_features(tmp_path: Path) -> None:
    """Two networks with the same tensors and another forward pass share no features."""
    made = Zoo.init(tmp_path / "zoo")
    torch.manual_seed(0)
    save_file(timm.create_model("efficientnet_lite0", num_classes=0).state_dict(), tmp_path / "w.safetensors")
    for arch in ("efficientnet_lite0", "tf_efficientnet_lite0"):
        add_backbone(
            name=f"our-{arch}",
            arch=arch,
            weights=tmp_path / "w.safetensors",
            input_size=(3, 32, 32),
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            zoo=made,
        )
        recipe = {"epochs": 2, "limit": 20, "eval_limit": 10, "augment": "none"}
        train(backbone=f"our-{arch}", data="vtzoo:fashion", name=f"t/{arch}", zoo=made, recipe=recipe)
    assert len(kept(made)) == 4


def test_backbones_without_a_fingerprint_share_no_features(zoo: Zoo, tmp_path: Path) -> None:
    """The catalogue's have none until they are loaded: two sets of weights of one architecture are told apart all the same."""
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "other.safetensors")
    add_backbone(name="other", arch="test_vit", weights=tmp_path / "other.safetensors", zoo=zoo)
    for name in ("tiny", "other"):
        facts = {k: v for k, v in zoo.resolve(name, "backbones").facts.items() if k != "fingerprint"}
        zoo.put("backbones", name, facts, replace=True)
        train(backbone=name, data="vtzoo:fashion", method="linear", name=f"t/{name}", zoo=zoo, recipe=RECIPE)
    assert len(kept(zoo)) == 2 * 3  # two views of training images, one of validation images


def test_a_forgotten_resume_is_said(zoo: Zoo, said: list[str]) -> None:
    """Whoever starts a stopped run anew is told that it could go on; other processes, and a cache, are no other run."""

    def stop(record: Mapping[str, Any]) -> None:
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    asked: dict[str, Any] = {
        "backbone": "tiny",
        "data": "vtzoo:fashion",
        "method": "bitfit",
        "name": "t/run",
        "zoo": zoo,
    }
    for watch in (stop, stop):
        with pytest.raises(KeyboardInterrupt):
            train(**asked, recipe=RECIPE, watch=watch)
    assert sum("an earlier run of t/run was stopped: --resume goes on" in line for line in said) == 1
    made = train(**asked, recipe={**RECIPE, "workers": 1, "cache": "off"}, resume=True)
    zoo.remove(zoo.resolve("t/run", "deltas"))
    assert train(**asked, recipe=RECIPE).digest == made.digest


def test_a_place_that_takes_no_files_is_met_first(zoo: Zoo, said: list[str]) -> None:
    """Before the first epoch, not after it."""
    (zoo.root / ".vtzoo" / "checkpoints").write_text("a file where the folder would be", encoding="utf-8")
    with pytest.raises(VtzooError):
        train(backbone="tiny", data="vtzoo:fashion", method="bitfit", name="t/run", zoo=zoo, recipe=RECIPE)
    assert not any(line.startswith("epoch") for line in said)


def test_the_curve_is_written_while_it_trains(zoo: Zoo) -> None:
    """Epoch by epoch in a file of JSON lines, and with a tracker; what an interrupted run had written is not written twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked: dict[str, Any] = {"backbone": "tiny", "data": "vtzoo:fashion", "name": "t/run", "zoo": zoo, "recipe": RECIPE}
    told: list[int] = []

    def stop(record: Mapping[str, Any]) -> None:
        told.append(record["epoch"])
        if told == [1, 2, 3]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(**asked, watch=stop, track=["tensorboard"])
    (path,) = (zoo.root / ".vtzoo" / "logs").glob("*.jsonl")
    assert len(path.read_text().splitlines()) == 1 + 3
    train(**asked, watch=stop, track=["tensorboard"], resume=True)
    head, *records = (json.loads(line) for line in path.read_text().splitlines())
    assert (head["name"], head["method"], head["epochs"]) == ("t/run", "linear", 6)
    assert [r["epoch"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert told == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(path.parent / "t--run")).Reload()
    assert {e.step: pytest.approx(e.value) for e in events.Scalars("loss")} == {r["epoch"]: r["loss"] for r in records}


def test_a_tracker_that_fails_ends_no_training(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that can't start is refused before the first step; one that fails on the way is told no more, and said once."""
    from accelerate.tracking import TensorBoardTracker

    asked: dict[str, Any] = {"backbone": "tiny", "data": "vtzoo:fashion", "zoo": zoo, "recipe": RECIPE}
    (zoo.root / ".vtzoo" / "logs").mkdir(parents=True)
    (zoo.root / ".vtzoo" / "logs" / "t--run").write_text("where TensorBoard's folder would be", encoding="utf-8")
    with pytest.raises(VtzooError, match="tensorboard does not start"):
        train(**asked, name="t/run", track=["tensorboard"])
    said: list[str] = []
    monkeypatch.setattr(talk, "say", said.append)

    def gone(*_args: Any, **_named: Any) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(TensorBoardTracker, "log", gone)
    train(**asked, name="t/other", track=["tensorboard"])
    assert sum("the server is gone" in line for line in said) == 1
    assert "t/other" in zoo.index()["deltas"]


def test_a_tracker_that_is_not_there_is_said_first(zoo: Zoo) -> None:
    """An unknown name, or one whose package is missing, is refused before anything is built."""
    asked: dict[str, Any] = {"backbone": "nowhere", "data": "vtzoo:fashion", "name": "t/run", "zoo": zoo}
    with pytest.raises(UsageError, match="no tracker is called 'tensorbord'"):
        train(**asked, track=["tensorbord"])
    with pytest.raises(UsageError, match="aim is not installed"):
        train(**asked, track=["aim"])


@pytest.mark.slow
def test_termination_takes_away_what_is_half_written(zoo: Zoo) -> None:
    """`kill` while features are computed ends with 130, and nothing of a file is left."""
    command = [
        sys.executable, "-m", "vtzoo_cli", "train", "--zoo", str(zoo.root), "--backbone", "tiny", "--data",
        "vtzoo:fashion", "--name", "run", "--image-size", "64", "--epochs", "4",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("all before"))
        while not list(zoo.root.rglob("*.tmp")):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    assert not kept(zoo)


def test_a_recipe_says_what_it_shows() -> None:
    """Views and cache are knobs of a recipe, so that a delta's header tells them."""
    from vtzoo.recipe import Recipe

    assert {"views", "cache"} <= {f.name for f in dataclasses.fields(Recipe)}
