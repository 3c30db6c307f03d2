"""What eight real tasks keep of their accuracy in every merge, with published defaults, with a search, and with refitted heads.

    python benchmarks/bench_merge_quality.py DIR [MERGE …] --zoo ZOO --backbone NAME [--set full|lora|mixed …] [--pixels 56] [--epochs 5] [--lr 5e-4]

DIR holds the tasks, one folder each with train, val and test. Deltas that ZOO lacks are trained first, by the methods' own recipes, on
1,000 images: `full` and `lora[rank=16]` of every task, and for `mixed` two each of lora, full, ssf and bitfit. Top-1 is the mean over
the tasks, on up to 100 test images each; normalised is divided by what each task's own delta has on the same images; the worst is
the lowest of the normalised. The search is `--search scale` by agreement with the experts on 10 training images of each task, without
labels, and the heads are refitted to the experts' answers on 48, as many as `surgery` sees. Merges that look at images get the train split's. Rows that
results/merge_quality.json has are not repeated: stop it and start it again as you like.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _results import FOLDER, keep

from vtzoo import data as D
from vtzoo import evidence as E
from vtzoo.artifact import fold_artifact, plain_model
from vtzoo.bases import open_base
from vtzoo.delta import Delta
from vtzoo.merges._chain import correcting, curious, steps
from vtzoo.merges._scene import Scene
from vtzoo.merging import Plan, assembled, look, plan
from vtzoo.search import found
from vtzoo.stage import answers, load_merged, logits, opened, refit, scene
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

TRAIN, TEST, SEARCH, REFIT = 1000, 100, 10, 48
SINGLE = (
    "linear", "task-arithmetic", "ties", "tsv", "iso-c", "iso-cts", "svc", "ties+svc", "regmean", "regmean-plus", "emr", "esm", "wudi", "ace",
    "cart", "core", "knots", "pcb", "consensus", "lines", "tall", "dare", "dare+ties", "adamerging[by=layer,steps=60]", "della",
    "breadcrumbs", "sce", "model-stock", "karcher", "tsv+svc", "core+iso-c", "fisher", "adamerging[by=task,steps=60]", "greedy-soup",
    "surgery", "tsv+surgery",
)  # fmt: skip
MIXED = ("full", "lora[rank=16]", "ssf", "full", "bitfit", "lora[rank=16]", "ssf", "bitfit")
HEAD = (
    "merge",
    "top-1",
    "normalised",
    "worst task",
    "with a search",
    "its scale",
    "with refitted heads",
)
KEPT = FOLDER / "merge_quality.json"


@dataclass(frozen=True)
class Bench:
    """What all merges of one set share."""

    zoo: Zoo
    deltas: Sequence[Delta]
    base: Any
    data: Sequence[str]
    test: Scene
    few: Scene
    heads: Scene
    alone: Sequence[float]
    told: Sequence[torch.Tensor]
    looks: dict[str, list[Any]]


def trained(asked: argparse.Namespace, zoo: Zoo, kind: str) -> list[str]:
    """The set's deltas, those that are lacking trained now."""
    tasks = sorted(p for p in Path(asked.data).iterdir() if p.is_dir())
    refs: list[str] = []
    known = {e.name for e in zoo.entries("deltas")}
    for i, task in enumerate(tasks):
        method = {"full": "full", "lora": "lora[rank=16]"}.get(kind) or MIXED[i % len(MIXED)]
        refs.append(f"{task.name}/{method.partition('[')[0]}")
        if refs[-1] not in known:
            recipe = {"epochs": asked.epochs, "limit": TRAIN} | ({"image_size": asked.pixels} if asked.pixels else {})
            recipe |= {"lr": asked.lr} if asked.lr else {}
            train(backbone=asked.backbone, data=str(task), method=method, name=refs[-1], zoo=zoo, recipe=recipe)
    return refs


def prepared(asked: argparse.Namespace, zoo: Zoo, refs: Sequence[str]) -> Bench:
    """Open deltas and images, and measure each delta alone."""
    deltas = [Delta.open(zoo.object(zoo.resolve(r, "deltas").digest)) for r in refs]
    base = open_base(deltas[0].backbone, zoo)
    data = [str(Path(asked.data) / r.partition("/")[0]) for r in refs]
    first = plan(deltas, "linear", base=base)

    def images(split: D.Split, count: int, *, labelled: bool, model: torch.nn.Module | None = None) -> Scene:
        return scene(first, opened(data, deltas, split=split, labelled=labelled, limit=count), heads=True, model=model)

    test = images("test", TEST, labelled=True)
    alone: list[float] = []
    for task in range(len(deltas)):
        test.load_expert(task)
        alone.append(test.accuracy(task))
    few, heads = (images("train", n, labelled=False, model=test.model) for n in (SEARCH, REFIT))
    return Bench(zoo, deltas, base, data, test, few, heads, alone, answers(heads), {})


def evidence(bench: Bench, spec: str) -> list[Any] | None:
    """What the merge's images tell, found once for all merges that ask the same."""
    step = curious(steps(spec))
    if step is None:
        return None
    if step.looks:
        return [{} for _ in bench.deltas]
    key = f"{step.evidence}/{step.images}"
    if key not in bench.looks:
        see, rows = getattr(E, step.evidence), []
        for data, delta in zip(bench.data, bench.deltas, strict=True):
            images = D.open_data(data, split="train", labelled=False).limit(step.images)
            task = delta.task()
            folded = fold_artifact(delta, bench.zoo, task.name if step.heads else "")
            model = plain_model(delta, folded, len(task.classes) if step.heads else 0)
            rows.append(see(model, D.loader(images, D.transforms(task.preprocess, train=False), batch_size=32)))
        bench.looks[key] = rows
    return bench.looks[key]


def on(stage: Scene, made: Plan) -> Scene:
    """The same images, another merge."""
    told = [e if isinstance(e, dict) else {} for e in made.whole.evidence]
    return replace(stage, whole=made.whole, tensor=made.tensor, told=told)


def scores(bench: Bench, made: Plan, *merges: Delta) -> list[list[float]]:
    """Top-1 of each task, of merges that differ in their heads alone."""
    stage, found_ = on(bench.test, made), [[] for _ in merges]
    for task, delta in enumerate(bench.deltas):
        if not task or made.masking:
            load_merged(stage, made, merges[0], task)
        seen, name = stage.features(task), delta.tasks[0].name
        for rows, merged in zip(found_, merges, strict=True):
            rows.append((logits(merged, name, seen).argmax(-1) == stage.labels[task]).double().mean().item())
    return found_


def in_memory(merged: Delta) -> Delta:
    """Computed once."""
    return merged.with_(tensors={n: merged.tensors[n] for n in merged.tensors})


def finished(bench: Bench, made: Plan) -> Delta:
    """The merge, with corrected heads where a step does that."""
    merged, fit = in_memory(assembled(made)), correcting(made.chain)
    return in_memory(refit(on(bench.heads, made), made, merged, fit)) if fit else merged


def measured(bench: Bench, spec: str) -> dict[str, Any]:
    """One merge, four ways."""
    layers, _, method = spec.rpartition(" ")  # "*:0 linear" is the bare backbone
    seen = evidence(bench, method)
    made = plan(bench.deltas, method, base=bench.base, layers=layers or None, evidence=seen)
    step = curious(made.chain)
    if step and step.looks:
        if step.needs == "labels":
            stage = scene(
                made,
                opened(bench.data, bench.deltas, split="val", labelled=True, limit=64),
                heads=True,
                model=bench.test.model,
            )
        else:
            images = opened(bench.data, bench.deltas, split="train", labelled=False, limit=min(step.images, 64))
            stage = scene(made, images, heads=True, model=bench.test.model)
        look(made, on(stage, made))
    merged, fits = finished(bench, made), correcting(made.chain) is not None
    fitted = [] if fits else [in_memory(refit(on(bench.heads, made), made, merged, "expert", bench.told))]
    plainly, *with_heads = scores(bench, made, merged, *fitted)
    result: dict[str, Any] = {"top1": plainly, **({"heads": with_heads[0]} if with_heads else {})}
    if not made.masking and not layers:
        best, (point, _), _ = found(made, on(bench.few, made), "scale", "agreement")
        result["search"], result["scale"] = scores(bench, best, finished(bench, best))[0], point[0]
    return result


def row(name: str, result: dict[str, Any], alone: Sequence[float]) -> tuple[str, ...]:
    """One line of the table."""
    ratios = [a / b for a, b in zip(result["top1"], alone, strict=True)]

    def mean(key: str) -> str:
        return f"{statistics.mean(result[key]):.3f}" if key in result else ""

    scale = f"{result['scale']:g}" if "scale" in result else ""
    return (
        name, mean("top1"), f"{statistics.mean(ratios):.3f}", f"{min(ratios):.3f}", mean("search"), scale, mean("heads"),
    )  # fmt: skip


def main() -> None:
    """Train, merge, measure, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--backbone", default="vit_embedded_64")
    parser.add_argument("--set", action="append", dest="sets", choices=("full", "lora", "mixed"))
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, help="of the deltas that are trained, in place of their methods' own")
    parser.add_argument("--again", action="store_true", help="also merges that have a row")
    parser.add_argument("merges", nargs="*", metavar="MERGE", default=[])
    asked = parser.parse_args()
    zoo = Zoo(asked.zoo) if (asked.zoo / "zoo_index.yaml").exists() else Zoo.init(asked.zoo)
    for kind in asked.sets or ("full", "lora", "mixed"):
        refs = trained(asked, zoo, kind)
        run = f"{asked.backbone}, {kind}" + (f", {asked.pixels} px" if asked.pixels else "")
        run += (f", {len(refs)} tasks" if len(refs) != len(MIXED) else "") + (f", lr {asked.lr:g}" if asked.lr else "")
        known = json.loads(KEPT.read_text())["runs"].get(run, {}) if KEPT.is_file() else {}
        raw: dict[str, Any] = known.get("raw", {"results": {}})
        bench = prepared(asked, zoo, refs)
        raw["alone"] = list(bench.alone)
        raw["tasks"] = [d.tasks[0].name for d in bench.deltas]
        raw["norms"] = plan(bench.deltas, "linear", base=bench.base).whole.norms()
        alone = f"each delta alone, of norm {min(raw['norms']):.1f} to {max(raw['norms']):.1f}"
        for spec in ("*:0 linear", *(asked.merges or SINGLE)):
            if spec not in raw["results"] or asked.again:
                raw["results"][spec] = measured(bench, spec)
            table = [(alone, f"{statistics.mean(bench.alone):.3f}", "1.000", "1.000", *[""] * 3)]
            table += [
                row("the bare backbone" if s.startswith("*") else s, r, bench.alone) for s, r in raw["results"].items()
            ]
            keep(__doc__ or "", run, HEAD, table, raw)
            print(run, " | ".join(row(spec, raw["results"][spec], bench.alone)), flush=True)


if __name__ == "__main__":
    main()
