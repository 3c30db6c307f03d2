"""Sweeps and reports: each run once, whatever is killed, the table of all of them, and the page."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from vtzoo import data as D
from vtzoo import rows, sweep_file
from vtzoo.engines import local
from vtzoo.errors import Conflict, Corrupt, NotFound, UsageError, VtzooError
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.report import report
from vtzoo.verbs.sweep import sweep
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

SPEC = """
name: small
tasks: {fashion: 'vtzoo:fashion'}
backbones: tiny
methods: [linear, bitfit]
recipe: {epochs: 2, limit: 40, eval_limit: 40, batch_size: 20, image_size: 64}
"""
LONG = SPEC.replace("[linear, bitfit]", "[bitfit]").replace("epochs: 2", "epochs: 12")


def read(text: str) -> sweep_file.Sweep:
    """A spec."""
    return sweep_file.read(text, "spec")


def killer(zoo: Zoo, pids: Callable[[], list[int]]) -> threading.Thread:
    """Kills a run as soon as it has written its first checkpoint."""

    def work() -> None:
        folder = zoo.root / ".vtzoo" / "checkpoints"
        while not list(folder.glob("*.safetensors")):
            time.sleep(0.01)
        for pid in pids():
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_sweep_is_done_once_and_goes_on(zoo: Zoo, tmp_path: Path) -> None:
    """Its runs are deltas of the zoo and rows of a table; a second call makes those only that are missing."""
    table = tmp_path / "all.parquet"
    first = sweep(spec=read(SPEC), zoo=zoo, jobs=1, table=table)
    assert (first.report["runs"], first.report["made"]) == (2, 2)
    names = {e.name for e in zoo.entries("deltas")}
    assert {n.rpartition("-")[0] for n in names} == {"fashion/linear", "fashion/bitfit"}
    found = rows.read(Path(first.path))
    assert {r["ref"] for r in found} == names
    assert [r["top1"] for r in rows.read(table)] == [r["top1"] for r in found]
    assert all(
        r["images"] == 40 and r["images_measured"] == 40 and r["peak_bytes"] > 1e8 and r["seconds"] > 0 for r in found
    )
    alone = train(
        backbone="tiny", data="vtzoo:fashion", method="bitfit", name="fashion/alone", zoo=zoo,
        recipe={"epochs": 2, "limit": 40, "eval_limit": 40, "batch_size": 20, "image_size": 64},
    )  # fmt: skip
    assert alone.digest in {r["digest"] for r in found}
    again = sweep(spec=read(SPEC.replace("small", "more").replace("bitfit]", "bitfit, norm]")), zoo=zoo, jobs=1)
    assert (again.report["done"], again.report["made"]) == (2, 1)
    page = tmp_path / "page.html"
    made = report(refs=[], out=page, zoo=zoo)
    assert made.report["rows"] == 4
    _looked_at(page, ["linear", "bitfit", "norm"])
    with pytest.raises(Conflict):
        report(refs=[again.path], out=page, zoo=zoo)
    assert report(refs=[str(table)], out=tmp_path / "b.html", zoo=zoo).report["rows"] == 2


def _looked_at(page: Path, words: list[str]) -> None:
    """It is whole, has its plots, names everyone, and fetches nothing."""
    text = page.read_text()
    seen: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            seen.append(tag)
            assert not {k: v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")}

    Parser().feed(text)
    assert seen.count("svg") == 3
    assert all(re.search(rf"<code>{w}</code>", text) for w in words)
    assert json.loads(page.with_suffix(".json").read_text())["standings"]


def test_a_killed_run_is_taken_up(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed is started again and goes on from its checkpoint: the same digest, once."""
    whole = sweep(spec=read(LONG), zoo=zoo, jobs=1)
    (name,) = (r["ref"] for r in whole.report["rows"])
    zoo.remove(zoo.resolve(name))
    started, plain = list[Any](), local._started

    def noted(*args: Any) -> Any:
        started.append(plain(*args))
        return started[-1]

    monkeypatch.setattr(local, "_started", noted)
    thread = killer(zoo, lambda: [started[0].process.pid])
    again = sweep(spec=read(LONG), zoo=zoo, jobs=1)
    thread.join()
    assert len(started) == 2
    assert [r["digest"] for r in again.report["rows"]] == [r["digest"] for r in whole.report["rows"]]


def test_a_run_that_fails_takes_no_other_with_it(zoo: Zoo, tmp_path: Path) -> None:
    """What can only be seen while it runs is told at the end; all others are kept, and in the table."""
    text = SPEC.replace("[linear, bitfit]", "[linear, 'vpt-deep[tokens=2]']").replace(
        "tiny", "[tiny, test_efficientnet]"
    )
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet", num_classes=0).state_dict(), tmp_path / "cnn.safetensors")
    add_backbone(name="test_efficientnet", arch="test_efficientnet", weights=tmp_path / "cnn.safetensors", zoo=zoo)
    with pytest.raises(VtzooError, match=r"1 of 4 runs failed; the first, fashion/vpt-deep-.*"):
        sweep(spec=read(text), zoo=zoo, jobs=1)
    assert len(zoo.entries("deltas")) == 3
    assert len(rows.read(zoo.root / ".vtzoo/sweeps/small.jsonl")) == 3


def told(item: str, watch: Any) -> None:
    """Work whose end is hard to tell of."""
    del watch
    if item == "long":
        raise ValueError("x" * 1_000_000)
    if not (mark := Path(item)).exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)


def met(item: str, watch: Any) -> None:
    """Work that notes the card it may use, and waits until another process has noted its own."""
    del watch
    place = Path(item)
    place.write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    while len(list(place.parent.iterdir())) < 2:
        time.sleep(0.01)


def test_runs_at_once_have_cards_of_their_own(tmp_path: Path) -> None:
    """As CUDA names them: a number, or a part of a card."""
    items = [str(tmp_path / name) for name in "ab"]
    assert [f for _, f in local.run(met, items, jobs=2, retries=0, cards=["2", "MIG-1"])] == [None, None]
    assert {Path(i).read_text() for i in items} == {"2", "MIG-1"}


def test_an_engine_hears_of_every_end(tmp_path: Path) -> None:
    """A message longer than a pipe takes is cut; who was terminated by somebody else is started again."""
    ends = dict(local.run(told, ["long", str(tmp_path / "mark")], jobs=2, retries=1))
    assert ends[str(tmp_path / "mark")] is None
    failure = ends["long"]
    assert failure is not None
    assert failure.message.startswith("ValueError: xxx")


def test_processes_end_quietly_with_their_parent(tmp_path: Path) -> None:
    """Whatever kills it: they stop by themselves, and show no traceback."""
    (tmp_path / "waits.py").write_text(
        "import time\nfrom pathlib import Path\n\ndef work(item, watch):\n    Path(item).touch()\n    time.sleep(60)\n"
    )
    code = "import sys, waits\nfrom vtzoo.engines import local\nlist(local.run(waits.work, sys.argv[1:], jobs=1, retries=0))"
    command = [sys.executable, "-c", code, "started"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as parent:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        parent.kill()
        _, said = parent.communicate(timeout=30)  # all that write there have ended
    assert said == ""


@pytest.mark.parametrize(
    "line",
    [
        "[1]", '{"backbone": "b"}', "{bad", *(
            f'{{"backbone": "b", "method": "m", "task": "t", {more}}}'
            for more in ('"top1": NaN', '"top1": 85.3', '"top1": true', '"top1": 0.5, "params": "abc"', '"map": 0.5, "seed": [1]')
        ),
    ],
)  # fmt: skip
def test_a_table_that_is_none_is_said(zoo: Zoo, tmp_path: Path, line: str) -> None:
    """Lines that are no rows are refused, with their number; a sweep's own table is written anew."""
    (tmp_path / "t.jsonl").write_text(line + "\n")
    with pytest.raises(Corrupt, match="is no table"):
        report(refs=[str(tmp_path / "t.jsonl")], out=tmp_path / "page.html", zoo=zoo)
    (zoo.root / ".vtzoo" / "sweeps").mkdir(parents=True)
    (zoo.root / ".vtzoo" / "sweeps" / "small.jsonl").write_text(line + "\n")
    assert sweep(spec=read(SPEC), zoo=zoo, dry_run=True).report["runs"] == 2


def test_tables_are_put_together(zoo: Zoo, tmp_path: Path) -> None:
    """Rows of several tables all count, with names or without; words with signs of mathematics or HTML in them are words."""
    lines = [
        {"backbone": "b<script>", "method": m, "task": "x", "top1": t, "params": 10 * i, "seconds": 1.0 + i}
        for i, (m, t) in enumerate([("$\\frac$", 0.5), ("two$ $", 0.7)], 1)
    ]
    for i, line in enumerate(lines):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps(line) + "\n")
    found = report(refs=[str(tmp_path / f"{i}.jsonl") for i in (0, 1)], out=tmp_path / "page.html", zoo=zoo)
    assert found.report["rows"] == 2
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "$\\frac$" in page
    assert "<script>" not in page


def test_a_backbone_is_its_weights_and_what_it_is_shown(zoo: Zoo, tmp_path: Path) -> None:
    """The same weights with other pixels are another backbone, and a sweep trains on both."""
    add_backbone(
        name="dark", arch="test_vit", weights=tmp_path / "tiny.safetensors", mean=(0.0,) * 3, std=(1.0,) * 3, zoo=zoo
    )
    text = SPEC.replace("backbones: tiny", "backbones: [tiny, dark]").replace("[linear, bitfit]", "[linear]")
    assert len(set(sweep(spec=read(text), zoo=zoo, dry_run=True).report["names"])) == 2


def test_finals_train_the_best_of_the_search_on_all_images(zoo: Zoo, tmp_path: Path) -> None:
    """Of the grid the best by validation images is trained again with them among its own; only that is in the standings."""
    text = SPEC.replace("[linear, bitfit]", "[linear]").replace(
        "limit: 40, eval_limit: 40", "limit: 40, eval_limit: 40, eval_on: val"
    )
    text += (
        "grid: {lr: [1e-5, 1e-2]}\nfinal: {recipe: {train_on: train+val, eval_on: val+test, limit: 0}, seeds: [0, 1]}\n"
    )
    planned = sweep(spec=read(text), zoo=zoo, jobs=1, dry_run=True).report
    assert (planned["runs"], planned["finals"]) == (2, 2)
    made = sweep(spec=read(text), zoo=zoo, jobs=1)
    search, final = ([r for r in made.report["rows"] if r["stage"] == s] for s in ("search", "final"))
    assert [r["split"] for r in search] == ["val", "val"]
    best = max(search, key=lambda r: r["val_top1"])
    assert {(r["recipe.lr"], r["seed"], r["split"], r.get("val_top1")) for r in final} == {
        (best["recipe.lr"], s, "test", None) for s in (0, 1)
    }
    both = len(D.open_data("vtzoo:fashion", split="train")) + len(D.open_data("vtzoo:fashion", split="val"))
    assert {r["images"] for r in final} == {both}
    (standing,) = made.report["standings"]
    assert standing["runs"] == 2
    assert sweep(spec=read(text), zoo=zoo, jobs=1).report["made"] == 0


def test_what_any_run_would_refuse_is_refused_first(zoo: Zoo) -> None:
    """A wrong knob, backbone, folder, engine or table is met before the first run starts."""
    for change, error in (
        (("bitfit", "lora[rnk=2]"), UsageError),
        (("bitfit", "lorra"), NotFound),
        (("tiny", "tinny"), NotFound),
        (("vtzoo:fashion", "./nowhere"), NotFound),
    ):
        with pytest.raises(error):
            sweep(spec=read(SPEC.replace(*change)), zoo=zoo)
    with pytest.raises(UsageError, match="no engine"):
        sweep(spec=read(SPEC), zoo=zoo, engine="rya")
    with pytest.raises(UsageError, match="neither"):
        sweep(spec=read(SPEC), zoo=zoo, table=Path("x.csv"))
    (zoo.root / "folder.jsonl").mkdir()
    with pytest.raises(UsageError, match="can't be written"):
        sweep(spec=read(SPEC), zoo=zoo, table=zoo.root / "folder.jsonl")
    assert sweep(spec=read(SPEC), zoo=zoo, dry_run=True).report["runs"] == 2
    assert not zoo.entries("deltas")


def test_a_dry_run_tells_time_and_what_does_not_fit(zoo: Zoo) -> None:
    """Seconds for each method, and every method that its backbone or knobs refuse."""
    text = SPEC.replace("[linear, bitfit]", "[bitfit, 'linear[lr=[1e-4,1e-3]]']") + "seeds: [0, 1]\n"
    plan = sweep(spec=read(text), zoo=zoo, dry_run=True).report["plan"]
    assert [(p["method"], p["runs"]) for p in plan] == [("bitfit", 2), ("linear[lr=1e-4|1e-3]", 2)]
    assert all(p["seconds"] > 0 for p in plan)
    with pytest.raises(UsageError, match=r"linear.*: linear\[lr=…\] and lr say the same twice"):
        sweep(spec=read(text.replace("epochs: 2", "lr: 1e-3, epochs: 2")), zoo=zoo, dry_run=True)
    with pytest.raises(VtzooError, match=r"2 of 4 can't be trained; the first, conv-adapter on tiny: "):
        sweep(spec=read(text.replace("[bitfit,", "[bitfit, conv-adapter, residual,")), zoo=zoo, dry_run=True)
    assert not zoo.entries("deltas")


@pytest.mark.slow
def test_ray_retries_a_killed_trial(zoo: Zoo) -> None:
    """A trial whose process is killed is started again, and there is exactly one result: that of an undisturbed run."""
    whole = sweep(spec=read(LONG), zoo=zoo, jobs=1)
    (name,) = (r["ref"] for r in whole.report["rows"])
    zoo.remove(zoo.resolve(name))
    killed: list[int] = []

    def trials() -> list[int]:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                title = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::ImplicitFunc"):  # what Tune calls an actor that runs a function
                killed.append(int(folder.name))
        return killed

    thread = killer(zoo, trials)
    again = sweep(spec=read(LONG), zoo=zoo, engine="ray")
    thread.join()
    assert len(killed) == 1
    assert [e.name for e in zoo.entries("deltas")] == [name]
    assert [r["digest"] for r in again.report["rows"]] == [r["digest"] for r in whole.report["rows"]]
    assert again.report["made"] == 1


@pytest.mark.slow
def test_ray_stops_what_lags_behind(zoo: Zoo) -> None:
    """With ASHA some runs end early; they have no delta, stand in the table, and are not run again."""
    text = (
        LONG.replace("[bitfit]", "[linear]\nseeds: [0, 1, 2, 3]")
        + "grid: {lr: [1e-2, 1e-6]}\nengine: {asha: {reduction: 4}}\n"
    )
    first = sweep(spec=read(text), zoo=zoo, engine="ray")
    assert first.report["stopped"] > 0
    assert first.report["stopped"] + first.report["made"] == 8
    again = sweep(spec=read(text), zoo=zoo, engine="ray")
    assert (again.report["done"], again.report["made"]) == (8, 0)


@pytest.mark.slow
def test_ctrl_c_ends_trials_on_ray(zoo: Zoo, tmp_path: Path) -> None:
    """The cluster that the sweep started goes with it, long before its trials would have ended; the same command may go on."""
    spec = tmp_path / "long.yaml"
    spec.write_text(LONG.replace("epochs: 12", "epochs: 5000"))
    command = [sys.executable, "-m", "vtzoo_cli", "sweep", str(spec), "--zoo", str(zoo.root), "--engine", "ray"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not list((zoo.root / ".vtzoo" / "checkpoints").glob("*.safetensors")):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=90)
    assert process.returncode == 130, said
    assert "the same command goes on from there" in said
    assert not list((zoo.root / ".vtzoo" / "ray").glob("*"))
