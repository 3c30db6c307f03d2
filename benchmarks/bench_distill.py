"""A ViT-S tuned on four tasks, its experts and their merge, distilled into one small student with four heads.

    python benchmarks/bench_distill.py IMAGES --weights vit_small_patch14_dinov2.safetensors --zoo DIR [--limit 500] [--epochs 20] [--views 10]

IMAGES has a folder for each task. Teachers: a LoRA of the ViT-S (DINOv2, 112 px) for each task, and their merge. Students, at 112 px: MobileNetV4-small, from
random weights, and the merge slimmed to a quarter of its parameters. Beside each the same student after as many steps on the labels
alone, on the same views. Retention is top-1 over the teachers'; all on each task's test images, after the last epoch. Then the time of 20 epochs with teachers'
answers on disk, made in the first of them, and with teachers that answer in every step; nothing else may run meanwhile. What is trained already is
not trained again: start it as often as you like. Adds its rows to results/distill.json.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

from _results import keep

from vtzoo import talk
from vtzoo.score import brief
from vtzoo.verbs.add import add_backbone
from vtzoo.verbs.distill import distill
from vtzoo.verbs.merge import merge_refs
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

TASKS = {"clothing": "clothing", "emoji": "emoji", "omniglot": "omniglot-alphabets", "sign-digits": "sign-digits"}
ARCH, MERGE = "vit_small_patch14_dinov2.lvd142m", "regmean"
STUDENTS = {
    "mobilenetv4_conv_small": "mobilenetv4_conv_small",
    "vit-quarter": "slim[params=0.25]",
}
HEAD = (
    "student", "teachers", "seed", "task", "images", "teachers' top-1, %", "student's", "without a teacher", "retention, %", "agreement, %", "KL, nats", "ECE",
)  # fmt: skip
COSTS = ("network", "parameters", "million multiply-adds", "file, MB", "one image in onnxruntime, one thread, ms")
MEANS = (
    "student",
    "teachers",
    "seeds",
    "teachers' top-1, %",
    "student's",
    "without a teacher",
    "retention, %",
    "agreement, %",
)
TIMES = ("answers", "20 epochs and the final scores, s", "times as fast as asking in every step")
START: dict[str, dict[str, Any]] = {"mobilenetv4_conv_small": {}, "vit-quarter": {"init_from": "merge"}}
"""Whoever teaches it, a student starts from the same weights, and so does the one without a teacher."""
RATE = {"mobilenetv4_conv_small": 1e-3, "vit-quarter": 2e-4}
"""Weights that know something already learn more slowly."""
SEEDS = {"mobilenetv4_conv_small": (0, 1, 2), "vit-quarter": (0,)}
SHARED: dict[str, Any] = {"image_size": 112, "precision": "bf16"}


def teachers(zoo: Zoo, asked: argparse.Namespace) -> dict[str, list[str]]:
    """The experts and their merge, made where they are missing."""
    known = {entry.name for entry in zoo.entries()}
    if "vit_small" not in known:
        add_backbone(name="vit_small", arch=ARCH, weights=asked.weights, zoo=zoo)
    experts = [f"{task}/lora" for task in TASKS]
    recipe = {**SHARED, "epochs": 10, "limit": asked.teacher_limit, "batch_size": 32, "eval_on": "test"}
    for (task, folder), name in zip(TASKS.items(), experts, strict=True):
        if name not in known:
            train(
                backbone="vit_small",
                data=str(asked.images / folder),
                method="lora[rank=8]",
                name=name,
                zoo=zoo,
                recipe={**recipe},
            )
            talk.say(f"made {task}")
    if "merge" not in known:
        images = [str(asked.images / folder) for folder in TASKS.values()]
        merge_refs(refs=experts, method=asked.merge, name="merge", data=images, zoo=zoo)
    return {"experts": experts, "merge": ["merge"]}


def taught(zoo: Zoo, who: list[str], student: str, name: str, asked: argparse.Namespace, **more: Any) -> Any:
    """One student."""
    recipe = {**SHARED, "epochs": asked.epochs, "limit": asked.limit, **more.pop("recipe", {})}
    data = {task: str(asked.images / folder) for task, folder in TASKS.items()}
    given: dict[str, Any] = {"loss": asked.loss, "views": asked.views, **more}
    return distill(teachers=who, student=student, data=data, name=name, zoo=zoo, recipe=recipe, **given)


def made(zoo: Zoo, who: list[str], student: str, name: str, asked: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What came out of one student; of one that was made before, what came out then."""
    kept = zoo.root / "reports" / f"{name.replace('/', '-')}.json"
    if not kept.is_file():
        kept.parent.mkdir(exist_ok=True)
        found = taught(zoo, who, student, name, asked, latency=True, **more)
        kept.write_text(
            json.dumps({"metrics": {k: brief(m) for k, m in found.metrics.items()}, "report": found.report})
        )
    return json.loads(kept.read_text())


def report(zoo: Zoo, asked: argparse.Namespace) -> None:
    """Every student beside its teachers and itself without them."""
    lines: list[tuple[str, ...]] = []
    raw: dict[str, Any] = {}
    costs: dict[str, tuple[str, ...]] = {}
    for kind, student in STUDENTS.items():
        for seed in SEEDS[kind]:
            alone: dict[str, float] = {}
            for whose, who in teachers(zoo, asked).items():
                name = f"{kind}/{whose}-{seed}"
                raw[name] = made(
                    zoo,
                    who,
                    student,
                    name,
                    asked,
                    baseline=not alone,
                    recipe={"seed": seed, "lr": RATE[kind]},
                    **START[kind],
                )
                rows = raw[name]["report"]["tasks"]
                alone |= {row["task"]: row["no_teacher"] for row in rows if "no_teacher" in row}
                lines += [told(kind, whose, seed, row, alone[row["task"]]) for row in rows]
                costs[kind] = cost(kind, raw[name]["report"])
                print(*lines[-4:], sep="\n", flush=True)
    keep(__doc__ or "", f"four tasks, {asked.limit} images each, {asked.epochs} epochs, {asked.loss}", HEAD, lines, raw)
    keep(__doc__ or "", "mean over the four tasks", MEANS, means(lines), {})
    keep(__doc__ or "", "what the students cost", COSTS, list(costs.values()), {})


def cost(kind: str, found: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table of costs."""
    return (
        kind, f"{found['params']:,}", f"{found['macs'] / 1e6:,.0f}", f"{found['size_bytes'] / 1e6:.1f}", f"{found['latency_ms']:.1f}",
    )  # fmt: skip


def means(lines: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Of each student and teachers the mean over tasks, and over seeds with their range."""
    rows: list[tuple[str, ...]] = []
    for key in dict.fromkeys(line[:2] for line in lines):
        own = [line for line in lines if line[:2] == key]
        seeds = list(dict.fromkeys(line[2] for line in own))
        columns = [[mean(float(line[c]) for line in own if line[2] == seed) for seed in seeds] for c in (5, 6, 7, 8, 9)]
        rows.append((*key, str(len(seeds)), *(spread(c) for c in columns)))
    return rows


def spread(values: list[float]) -> str:
    """A mean, and the least and the largest."""
    return f"{mean(values):.1f}" + (f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else "")


def told(kind: str, whose: str, seed: int, line: dict[str, Any], alone: float) -> tuple[str, ...]:
    """A row of the table."""
    return (
        kind, whose, str(seed), line["task"], str(line["images"]), f"{100 * line['teacher']:.1f}", f"{100 * line['top1']:.1f}", f"{100 * alone:.1f}",
        f"{100 * line['retention']:.1f}", f"{100 * line['agreement']:.1f}", f"{line['kl']:.3f}", f"{line['ece']:.3f}",
    )  # fmt: skip


def timed(zoo: Zoo, asked: argparse.Namespace) -> None:
    """Seconds of 20 epochs of the first student, with answers that are made and kept, that are there, and without any kept."""
    who, found = teachers(zoo, asked)["experts"], dict[str, float]()
    views = {"crop_area": 0.4 + time.time_ns() % 1000 / 1e6}  # of which nobody has the answers yet
    for answers, cache in (("made and kept", "auto"), ("kept before", "auto"), ("asked for in every step", "off")):
        start = time.perf_counter()
        recipe = {"epochs": 20, "cache": cache, **views}
        taught(zoo, who, STUDENTS["mobilenetv4_conv_small"], f"timed/{cache}-{time.time_ns()}", asked, recipe=recipe)
        found[answers] = time.perf_counter() - start
    longest = found["asked for in every step"]
    rows = [(answers, f"{seconds:.0f}", f"{longest / seconds:.1f}") for answers, seconds in found.items()]
    keep(
        __doc__ or "",
        f"20 epochs of {asked.views} views, {asked.limit} images of each of four tasks",
        TIMES,
        rows,
        found,
    )
    print(rows, flush=True)


def main() -> None:
    """Make teachers, students, and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--loss", default="kd")
    parser.add_argument("--merge", default=MERGE)
    parser.add_argument("--teacher-limit", type=int, default=1000)
    parser.add_argument("--only", choices=("report", "times"))
    asked = parser.parse_args()
    talk.install(lambda text: print(text, flush=True), lambda items, _label, _total: items)
    zoo = Zoo.init(asked.zoo, exist_ok=True)
    if asked.only != "times":
        report(zoo, asked)
    if asked.only != "report":
        timed(zoo, asked)


if __name__ == "__main__":
    main()
