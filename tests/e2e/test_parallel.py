"""Several processes train one delta: the same curve as one process, one writer, and refusals that leave nobody waiting."""

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tests import families
from tests.e2e.curves import IMAGES, curve
from tests.unit.spoken import VIT as SPOKEN
from vtzoo import knobs
from vtzoo.delta import Delta
from vtzoo.errors import UsageError
from vtzoo.fingerprint import base_state, fingerprint
from vtzoo.parallel import part
from vtzoo.spec import BackboneCard, Preprocess
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

ROOT = Path(__file__).resolve().parents[2]
LORA = "lora[rank=4]"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TRAIN = ["train", "--json", "--backbone", "called", "--epochs", "1"]
CASES: dict[str, dict[str, Any]] = {
    "called": {"backbone": "called", "method": LORA},
    "called-sharded": {"backbone": "called", "method": LORA, "recipe": {"parallel": "fsdp"}},
    "read": {"backbone": "read", "method": LORA},
    "read-sharded": {"backbone": "read", "method": LORA, "recipe": {"parallel": "fsdp"}},
    "stopped": {"backbone": "called", "method": LORA, "stop_at": 7},
    "typed": {"words": [*TRAIN, "--name", "typed"]},
    "typed again": {"words": [*TRAIN, "--name", "typed"]},
    "probes": {"words": [*TRAIN, "--name", "probes", "--method", "linear[lr=[1e-3,1e-2]]"]},
    "average": {"words": [*TRAIN, "--name", "average", "--set", "parallel=fsdp", "--set", "ema_decay=0.9"]},
    "student": {"words": ["distill", "--teacher", "typed", "--student", "vit_tiny_patch16_224", "--name", "student"]},
}
MORE: dict[str, dict[str, Any]] = {
    "windows-sharded": {"backbone": "windows", "method": "ssf+lora[rank=2]", "recipe": {"parallel": "fsdp"}},
    "features": {"backbone": "called", "method": "linear"},
    "late": {"backbone": "called", "method": "lora[targets=blocks.1.*]"},
    "mixed": {"backbone": "called", "method": "adapter[drop_path=0]", "recipe": {"mixup": 0.4, "cutmix": 0.5}},
    "head-first": {"backbone": "called", "method": "vera", "recipe": {"probe_epochs": 1, "epochs": 4, "ema_decay": 0.9, "patience": 4}},
    "prompts-sharded": {"backbone": "called", "method": "vpt-deep[tokens=2,dropout=0]+vera", "recipe": {"parallel": "fsdp"}},
    "full-sharded": {"backbone": "read", "method": "full", "recipe": {"parallel": "fsdp", "lr": 1e-3}},
    "one-left-sharded": {"backbone": "read", "method": LORA, "recipe": {"limit": 81, "parallel": "fsdp"}},
    "aside-sharded": {"backbone": "read", "method": "vqt[dropout=0]", "recipe": {"parallel": "fsdp"}},
    "chosen": {"backbone": "read", "method": "gps[k=2]"},
    "again": {"backbone": "called", "method": LORA, "recipe": {"checkpointing": True}},
    "loss": {"backbone": "spoken", "method": "prograd[init=,context=4]"},
    "loss-sharded": {"backbone": "spoken", "method": "prograd+lora[rank=2]", "recipe": {"parallel": "fsdp"}},
    "again-sharded": {"backbone": "read", "method": LORA, "recipe": {"checkpointing": True, "parallel": "fsdp"}},
}  # fmt: skip
SIZES = {"mixed": [20] * 20, "one-left-sharded": [20, 20, 20, 20, 2] * 5}
"""Of both processes' parts of each batch: mixing wants whole ones, and of a single image both take all."""
WHOLE = {"loss-sharded": 30}
"""Frozen parameters that each process keeps whole: those of a text tower and the scale of its logits."""
CURVES = [n for n in CASES if "stop" not in n and "words" not in CASES[n]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two classes of noise, bright and dark; so many images that the last batch of an epoch is small and odd."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(IMAGES + 9):
        kind, label = ("train", i % 2) if i < IMAGES else ("val", i % 2)
        place = folder / kind / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 200, (32, 32, 3)) + 50 * label
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A zoo with tiny networks: one whose qkv is called, two whose qkv is read, and one with a text tower."""
    folder = tmp_path_factory.mktemp("parallel")
    made, swin = Zoo.init(folder / "zoo"), families.FAMILIES["swinv2"]
    nets = {"called": ("vit_tiny_patch16_224", ARGS), "read": ("beit_base_patch16_224", ARGS)}
    nets["spoken"] = ("clip", SPOKEN)
    for name, (arch, args) in (nets | {"windows": (str(swin.arch), {**swin.args, "drop_path_rate": 0.0})}).items():
        torch.manual_seed(0)
        model = timm.create_model(arch, num_classes=0, **args)
        with torch.no_grad():
            for p in model.parameters():  # many start with branches at zero
                p.add_(torch.randn_like(p) * 0.05)
        base = base_state(model)
        save_file(dict(base), folder / "w.safetensors")
        digest = made.add_object(folder / "w.safetensors")
        card = BackboneCard(
            name=name, arch=arch, source=f"object:sha256:{digest}", fingerprint=fingerprint(base), model_args=args,
            preprocess=Preprocess(input_size=(3, 32, 32)),
        )  # fmt: skip
        size_bytes = (folder / "w.safetensors").stat().st_size
        made.put("backbones", name, {**card.json(), "digest": digest, "size_bytes": size_bytes})
    return made


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip


def launched(*words: str) -> "subprocess.CompletedProcess[str]":
    """Start processes together."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, check=False, timeout=300, env=env
    )


def saw(zoo: Zoo, data: str, folder: Path, cases: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What each of two processes saw of every case."""
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    worker = str(ROOT / "tests" / "e2e" / "curves.py")
    done = launched(*TORCHRUN, worker, str(zoo.root), data, str(folder / "out"), str(folder / "cases.json"))
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"out.{rank}").read_text(encoding="utf-8")) for rank in (0, 1)]


@pytest.fixture(scope="module")
def two(zoo: Zoo, data: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The cases of every run."""
    return saw(zoo, data, tmp_path_factory.mktemp("two"), CASES)


@pytest.fixture(scope="module")
def more(zoo: Zoo, data: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The cases of a long one."""
    return saw(zoo, data, tmp_path_factory.mktemp("more"), MORE)


def compare(zoo: Zoo, data: str, name: str, case: dict[str, Any], seen: list[dict[str, Any]]) -> None:
    """Hold two processes against one."""
    alone, (first, second) = curve(zoo, data, f"one-{name}", case, parallel="ddp"), [s[name] for s in seen]
    print(name, max(abs(a - b) for a, b in zip(alone["losses"], first["losses"], strict=True)), first["kept"])
    assert len(alone["losses"]) >= 20
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(alone["losses"], abs=1e-5, rel=0)
    assert max(alone["losses"]) - min(alone["losses"]) > 0.05  # it moves
    assert [a + b for a, b in zip(first["images"], second["images"], strict=True)] == SIZES.get(
        name, [20, 20, 20, 20, 3] * 5
    )
    assert first["digest"] == second["digest"] == zoo.resolve(f"task/two-{name}").facts["digest"]
    assert first["val"] == pytest.approx(alone["val"], abs=1e-3)
    mine, theirs = (Delta.open(zoo.object(d)).tensors for d in (alone["digest"], first["digest"]))
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[n], theirs[n], atol=2e-4) for n in mine)
    for seen_by in (first, second):
        kept, sharded = seen_by["kept"], name.endswith("sharded")
        assert kept["frozen"] > 10
        assert kept["shards"] == (kept["frozen"] - WHOLE.get(name, 0) if sharded else 0)
        if name not in WHOLE:
            assert kept["share"] == (pytest.approx(0.5, abs=0.06) if sharded else 1)


@pytest.mark.parametrize("name", CURVES)
def test_two_processes_give_the_curve_of_one(zoo: Zoo, data: str, two: list[dict[str, Any]], name: str) -> None:
    """Every step's loss, over all images of its batch, is that of one process within 1e-5, and the delta is one process's.

    With parallel=fsdp every frozen parameter is a DTensor between steps, of which a process holds half; else none is.
    """
    compare(zoo, data, name, CASES[name], two)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_other_methods_and_recipes_do_so_too(zoo: Zoo, data: str, more: list[dict[str, Any]], name: str) -> None:
    """Kept features, mixed images, the head alone first, averages, patience, what chooses by gradients, what trains everything."""
    compare(zoo, data, name, MORE[name], more)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "beit", "swinv2", "resnet"])
def test_every_method_trains_a_shared_network(tmp_path: Path, family: str) -> None:
    """With a share of the frozen network in each process every method has the curve that it has with the whole in each."""
    done = launched(*TORCHRUN, str(ROOT / "tests" / "e2e" / "sharded.py"), family, str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert len(found) > 40
    assert {m: shared for m, (_, shared) in found.items()} == {
        m: pytest.approx(whole, abs=1e-5, rel=0) for m, (whole, _) in found.items()
    }


def test_a_run_goes_on_in_fewer_processes(zoo: Zoo, data: str, two: list[dict[str, Any]]) -> None:
    """Ctrl-C in one process stops all after the same step; what they left goes on in one, on the curve of one."""
    case = CASES["stopped"]
    alone = curve(zoo, data, "one-whole", case)
    assert all(seen["stopped"]["stopped"] and len(seen["stopped"]["losses"]) == 7 for seen in two)
    rest = curve(zoo, data, "two-stopped", case, resume=True)
    assert two[0]["stopped"]["losses"] + rest["losses"] == pytest.approx(alone["losses"], abs=1e-5, rel=0)


def test_one_process_speaks_and_writes(zoo: Zoo, two: list[dict[str, Any]]) -> None:
    """Of two processes with one command line the first prints the result and keeps it; nothing half-written lies about."""
    first, second = (seen["typed"] for seen in two)
    assert (first["code"], second["code"]) == (0, 0)
    assert json.loads(first["out"])["digest"] == zoo.resolve("typed").facts["digest"]
    assert "trainable parameters" in first["err"]
    assert (second["out"], second["err"]) == ("", "")
    assert not list(zoo.root.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("name", "code", "said"), [("typed again", 5, "exists already"), ("probes", 2, "in one process"), ("average", 2, "ema_decay"), ("student", 2, "in one process")]
)  # fmt: skip
def test_a_refusal_leaves_nobody_waiting(two: list[dict[str, Any]], name: str, code: int, said: str) -> None:
    """A taken name, probes that are trained together, an average of a network that nobody has: every process says so and goes on."""
    for seen in two:
        assert (seen[name]["code"], seen[name]["out"]) == (code, "")
        assert said in seen[name]["err"]


def test_norms_that_gather_statistics_are_refused(two: list[dict[str, Any]]) -> None:
    """Each process would see its own part of a batch alone."""
    assert all("gather statistics" in seen["statistics"] for seen in two)


@pytest.mark.slow
def test_launchers_start_the_command_line(zoo: Zoo, data: str) -> None:
    """The commands of the guide: torchrun's, and the one of accelerate."""
    words = ["-m", "vtzoo_cli", *TRAIN, "--zoo", str(zoo.root), "--data", data]
    for name, launcher in {"torchrun": TORCHRUN, "accelerate": ACCELERATE}.items():
        done = launched(*launcher, *words, "--name", name)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["digest"] == zoo.resolve(name).facts["digest"]
        assert done.stderr.count("trainable parameters") == 1


@pytest.mark.slow
def test_nodes_meet(zoo: Zoo, data: str) -> None:
    """The command of several nodes, started once on each: here both are this machine. The first process prints."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = ("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
    words = ["-m", "vtzoo_cli", *TRAIN, "--zoo", str(zoo.root), "--data", data, "--name", "nodes"]
    with ThreadPoolExecutor(2) as pool:
        nodes = list(pool.map(lambda _: launched(*meeting, "--rdzv-endpoint", f"localhost:{port}", *words), range(2)))
    assert [n.returncode for n in nodes] == [0, 0], nodes[0].stderr + nodes[1].stderr
    said = "".join(n.stdout for n in nodes)
    assert json.loads(said)["digest"] == zoo.resolve("nodes").facts["digest"]


@pytest.mark.slow
def test_a_process_that_dies_ends_all(zoo: Zoo, data: str) -> None:
    """An image that one process alone reads is broken: it says so, the other one that somebody has gone, and nothing is kept."""
    folder = zoo.root.parent / "broken"
    shutil.copytree(data, folder)
    (folder / "train" / "class0" / "0.png").write_bytes(b"no image")
    done = launched(
        *TORCHRUN, "-m", "vtzoo_cli", *TRAIN, "--zoo", str(zoo.root), "--data", str(folder), "--name", "broken"
    )
    assert done.returncode == 1
    assert "0.png" in done.stderr
    assert "another process of this training has stopped" in done.stderr
    assert "broken" not in [e.name for e in zoo.entries("deltas")]


def test_one_process_shares_nothing(zoo: Zoo, data: str) -> None:
    """parallel=fsdp in a process of its own is refused with the command that starts several."""
    with pytest.raises(UsageError, match="this is one") as refusal:
        train(backbone="called", data=data, name="alone", zoo=zoo, recipe={"parallel": "fsdp"})
    assert "torchrun" in refusal.value.hint


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("among", [1, 2, 3, 5])
def test_a_batch_is_shared_out_whole(size: int, among: int, paired: bool) -> None:
    """Every image goes to one process, or, where some would have none, all to all; mirrored places stay together."""
    places = list(range(100, 100 + size))
    shares = [part(places, r, among, paired=paired) for r in range(among)]
    assert all(shares)
    assert all(s == sorted(s) for s in shares)
    assert sorted(p for s in shares for p in s) == places or all(s == places for s in shares)
    if paired:
        mirror = dict(zip(places, reversed(places), strict=True))
        assert all([mirror[p] for p in s] == s[::-1] for s in shares)


def test_the_knob_is_a_word() -> None:
    """Only ddp and fsdp are known."""
    from vtzoo.recipe import Recipe

    with pytest.raises(UsageError, match="parallel"):
        knobs.decode(Recipe, {"parallel": "tp"}, "recipe")
