"""A model card in Markdown: what an artifact is, how it was made and measured, and how to use it.

Everything stands in the artifact, its entry or its parents; what is not recorded is left out. The front matter that a hub wants is
put before it by whoever sends it there.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from vtzoo import knobs, registry
from vtzoo.ancestry import Graph, ancestry
from vtzoo.catalogue import builtin
from vtzoo.errors import VtzooError
from vtzoo.lineage import CONFIG, Origin, images, of_entry
from vtzoo.refs import Entry
from vtzoo.spec import AND, Preprocess
from vtzoo.zoo import Zoo

SHOWN = 12
_METRICS = ("top1", "top5", "balanced_accuracy", "map", "micro_f1", "macro_f1", "retention", "loss", "ece")
_SHARES = frozenset(_METRICS) - {"loss", "ece"}
_PAPER = re.compile(r"(arXiv:\d{4}\.\d{4,5}|doi:10\.\S+?)[\s,;)]")


@dataclass(frozen=True)
class Subject:
    """What the card is of, and what lies around it."""

    zoo: Zoo
    origin: Origin
    graph: Graph
    before: Sequence[Origin]


def card(zoo: Zoo, origin: Origin) -> str:
    """The whole card, without front matter."""
    graph = ancestry(zoo, origin)
    about = Subject(zoo, origin, graph, _before(zoo, graph))
    parts = [
        [f"# {origin.name}", "", _what(about)], _facts(about), _trained(about), _data(about), _metrics(about), _lineage(about),
        _use(about), _licence(about), _citation(about),
    ]  # fmt: skip
    return "\n\n".join("\n".join(p) for p in parts if p) + "\n"


def _before(zoo: Zoo, graph: Graph) -> list[Origin]:
    """The artifacts that it was made from, wherever they are, nearest first."""
    marks = list(graph.nodes)[1:]
    entries = {f"{e.section}:{e.name}": e for e in zoo.entries()}
    found: list[Origin] = []
    for mark in marks:
        if mark in entries:
            try:
                found.append(of_entry(zoo, entries[mark]))
            except VtzooError:  # its file is missing: the lineage says so
                continue
    return found


def _what(about: Subject) -> str:
    """One sentence."""
    origin, tasks = about.origin, _tasks(about)
    kind = {
        "delta": "A task delta", "merge": "Several tasks in one delta", "folded": "A plain timm model, folded from a delta", "student": "A distilled student",
        "export": "A model exported for another runtime", "backbone": "A frozen backbone",
    }.get(origin.kind, "A plain timm model")  # fmt: skip
    method = _method(origin)
    how = f", made by `{method}`" if method else ""
    on = f", on the backbone `{name}`" if (name := _backbone(about).get("name")) else ""
    of = f", for {_and([f'{t} ({len(c)} classes)' if c else t for t, c in tasks.items()])}" if tasks else ""
    return f"{kind}{how}{on}{of}. Made with [vtzoo](https://pypi.org/project/vtzoo/)."


def _facts(about: Subject) -> list[str]:
    """What is known of it as a file."""
    origin, facts, shape = about.origin, about.origin.facts, _shape(about)
    size, backbone = facts.get("size_bytes"), _backbone(about)
    rows = [
        ("kind", origin.kind),
        ("network", f"`{arch}`" if (arch := facts.get("arch") or backbone.get("arch")) else ""),
        ("size", f"{size:,} bytes" if size else ""),
        ("input", _input(shape) if shape else ""),
        ("sha256", f"`{origin.digest}`" if origin.digest else ""),
        ("backbone's fingerprint", f"`{backbone['fingerprint']}`" if backbone.get("fingerprint") else ""),
        ("backbone's licence", str(backbone.get("license") or "")),
        ("made", str(facts.get("created") or "")),
        ("with", ", ".join(f"{k} {v}" for k, v in _map(origin.lineage.get("versions")).items())),
    ]
    return _table(("", ""), [r for r in rows if r[1]])


def _trained(about: Subject) -> list[str]:
    """The recipe, and the command, where those are recorded."""
    lineage = about.origin.lineage
    recipe = _map(about.origin.said.get("recipe")) or _map(lineage.get("recipe"))
    wanted = ("preset", "epochs", "lr", "head_lr", "weight_decay", "batch_size", "optimizer", "augment", "mixup", "cutmix", "precision", "seed")  # fmt: skip
    told = [f"{k} {recipe[k]}" for k in wanted if recipe.get(k) not in (None, 0.0, "")]
    loss = [_spelled(_map(t)) for t in _list(lineage.get("loss"))]
    spec = str(lineage.get("spec") or "")
    lines = [f"Recipe: {', '.join(told)}."] if told else []
    lines += [f"Loss: `{' + '.join(loss)}`."] if loss else []
    lines += [f"Merged by `{spec}`, weights {', '.join(f'{c:g}' for c in _list(lineage.get('coef')))}."] if spec else []
    return ["## How it was made", "", *lines] if lines else []


def _spelled(term: Mapping[str, Any]) -> str:
    own = {k: v for k, v in term.items() if k not in ("function", "weight")}
    weight = f"{term['weight']:g}*" if term.get("weight", 1) != 1 else ""
    return f"{weight}{term.get('function')}" + (f"[{','.join(f'{k}={v}' for k, v in own.items())}]" if own else "")


def _data(about: Subject) -> list[str]:
    """Which images, and which classes."""
    seen = [(i, o) for o in (about.origin, *about.before) for i in images(o.lineage)]
    rows = list(dict.fromkeys(
        (i["task"] or ", ".join(_names(o)), str(i["images"] or ""), f"`{i['data']}`") for i, o in seen
    ))  # fmt: skip
    classes = [f"Classes of {t}: {', '.join(c[:SHOWN])}{f', … ({len(c)})' if len(c) > SHOWN else ''}." for t, c in _tasks(about).items() if c]  # fmt: skip
    told = _table(("task", "training images", "their sha256"), rows) if rows else []
    return ["## Data", "", *told, *([""] if told and classes else []), *classes] if told or classes else []


def _metrics(about: Subject) -> list[str]:
    """The numbers with what they were measured on."""
    origin = about.origin
    found = _map(origin.said.get("metrics")) or _map(origin.facts.get("metrics"))
    nested = {k: v for k, v in found.items() if isinstance(v, Mapping)} or {"": found}
    columns = [c for c in _METRICS if any(c in m for m in nested.values())]
    if not columns:
        return []
    rows = [(k, *(_number(c, m.get(c)) for c in columns)) for k, m in nested.items() if any(c in m for c in columns)]
    splits = set(nested) <= {"val", "test", "train"}
    recipe = _map(origin.said.get("recipe")) or _map(origin.lineage.get("recipe"))
    shape = _shape(about)
    protocol = [
        f"images of {_input(shape)}" if shape else "", f"{recipe['precision']} numbers" if recipe.get("precision") else "",
        f"of each split at most {recipe['eval_limit']} images" if recipe.get("eval_limit") else "",
    ]  # fmt: skip
    told = "; ".join(p for p in protocol if p)
    if any("images" in m for m in nested.values()):
        columns.append("images")
        rows = [(*r, str(m.get("images", ""))) for r, m in zip(rows, nested.values(), strict=False)]
    head = (
        "split" if splits and "" not in nested else "task" if "" not in nested else "",
        *(c.replace("_", " ") for c in columns),
    )
    return ["## Metrics", "", *_table(head, rows), *(["", f"Measured on {told}."] if told else [])]


def _lineage(about: Subject) -> list[str]:
    """A short tree of what it was made from."""
    lines: list[str] = []

    def tell(mark: str, depth: int) -> None:
        node = about.graph.nodes[mark]
        gone = " (no longer in the zoo it was made in)" if node["kind"] == "gone" else ""
        name = f"`{node['name']}`" if node.get("name") else node.get("task", "")
        digest = f", sha256 `{node['digest'][:12]}…`" if node["digest"] else ""
        lines.append(f"{'  ' * depth}- {' '.join(p for p in (node['kind'], name) if p)}{digest}{gone}")
        if depth < 6:
            for other in about.graph.before(mark):
                tell(other, depth + 1)

    tell(about.graph.root, 0)
    return ["## Lineage", "", *lines] if len(lines) > 1 else []


def _use(about: Subject) -> list[str]:
    """Five lines each for vtzoo, timm and onnxruntime, as far as they apply."""
    ref, tasks = about.origin.name, list(_tasks(about))
    if not tasks or about.origin.kind == "backbone":
        return []
    more = f', task="{tasks[0]}"' if len(tasks) > 1 else ""
    lines = [
        "## Use", "", "With vtzoo:", "", "```python", "import vtzoo", "",
        f'found = vtzoo.predict(ref="{ref}", images="image.png"{more})', 'print(found.predictions[0]["top"][0]["class"])', "```",
    ]  # fmt: skip
    return [*lines, *_with_timm(about, tasks), *_with_onnx(about, tasks)]


def _with_timm(about: Subject, tasks: Sequence[str]) -> list[str]:
    origin = about.origin
    option = f" --task {tasks[0]}" if len(tasks) > 1 else ""
    if origin.kind in ("delta", "merge"):
        if not _folds(origin):
            return []
        first = f"vtzoo fold {origin.name} --out folder{option}"
    elif CONFIG in _map(origin.facts.get("files")):
        first = f"vtzoo export timm {origin.name} folder{option}"
    else:
        return []
    return [
        "", "With plain timm:", "", "```console", f"$ {first}", "```", "", "```python", "import timm", "from PIL import Image", "",
        'model = timm.create_model("local-dir:folder", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))",
        'logits = model(transform(Image.open("image.png").convert("RGB"))[None])',
        'print(model.pretrained_cfg["label_names"][logits.argmax()])', "```",
    ]  # fmt: skip


def _with_onnx(about: Subject, tasks: Sequence[str]) -> list[str]:
    shape, ref = _shape(about), about.origin.name
    if shape is None or about.origin.kind == "export":
        return []
    option = f" --task {tasks[0]}" if len(tasks) > 1 else ""
    return [
        "", "With onnxruntime:", "", "```console", f"$ vtzoo export onnx {ref} model.onnx --embed-preprocess{option}", "```", "", "```python",
        "import json", "", "import numpy as np", "import onnxruntime", "from PIL import Image, ImageOps", "",
        'model = onnxruntime.InferenceSession("model.onnx")', f"picture = {_fitted(shape)}",
        'logits = model.run(None, {"image": np.asarray(picture)[None]})[0]',
        'print(json.loads(model.get_modelmeta().custom_metadata_map["vtzoo.classes"])[logits.argmax()])', "```",
    ]  # fmt: skip


def _fitted(shape: Preprocess) -> str:
    """A picture at the network's size, as PIL makes it."""
    _, height, width = shape.input_size
    how = f"Image.Resampling.{shape.interpolation.upper() if shape.interpolation in ('bicubic', 'bilinear', 'nearest') else 'BICUBIC'}"
    image = 'Image.open("image.png").convert("RGB")'
    if shape.crop_mode == "squash":
        return f"{image}.resize(({width}, {height}), {how})"
    if shape.crop_mode == "border":
        fill = tuple(round(255 * m) for m in shape.mean)
        return f"ImageOps.pad({image}, ({width}, {height}), {how}, {fill})"
    border = round((1 - shape.crop_pct) / 2, 4)
    return f"ImageOps.fit({image}, ({width}, {height}), {how}" + (f", bleed={border})" if border else ")")


def _licence(about: Subject) -> list[str]:
    """Whose licences the weights carry."""
    own = [str(_map(about.origin.said).get("license") or "")]
    own += [str(x) for x in _list(about.origin.lineage.get("licenses"))]
    own += [str(o.backbone.get("license") or o.facts.get("license") or "") for o in (about.origin, *about.before)]
    own.append(str(_backbone(about).get("license") or ""))
    known = sorted({x for text in own for x in text.split(AND) if x})
    if not known:
        return []
    return [
        "## Licence",
        "",
        f"The weights that it was made from are under {_and(known)}; what is made of them carries that on.",
    ]


def _citation(about: Subject) -> list[str]:
    """The papers of its method, and of the steps before."""
    found: dict[str, str] = {}
    for origin in (about.origin, *about.before):
        specs = [
            (("methods", "merges"), _method(origin)),
            (("losses",), "+".join(str(_map(t).get("function")) for t in _list(origin.lineage.get("loss")))),
        ]
        for kinds, spec in specs:
            for name in _parts(spec):
                found |= _paper(kinds, name)
    rows = [f"- {summary} {_link(paper)}".rstrip() for paper, summary in found.items()]
    return ["## Citation", "", *rows] if rows else []


def _paper(kinds: Iterable[Any], name: str) -> dict[str, str]:
    for kind in kinds:
        if name in registry.names(kind):
            page = registry.card(kind, name)
            return {page.paper: page.summary.replace(f", {page.paper}", "")} if page.paper else {}
    return {}


def _link(paper: str) -> str:
    kind, _, number = paper.partition(":")
    where = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}.get(kind, "")
    return f"[{paper}]({where}{number})" if where else paper


def _parts(spec: str) -> list[str]:
    try:
        return [p.name for p in knobs.parse(spec)] if spec else []
    except VtzooError:
        return []


def _folds(origin: Origin) -> bool:
    """Whether every part has an exact form in plain weights, as its own page says."""
    parts = [
        str(p.get("method")) for p in _list(_map(origin.said.get("config")).get("parts")) if isinstance(p, Mapping)
    ]
    return bool(parts) and all(
        p in registry.names("methods") and registry.card("methods", p).verdict == "yes" for p in parts
    )


def _method(origin: Origin) -> str:
    return str(origin.said.get("method") or origin.facts.get("method") or "")


def _backbone(about: Subject) -> dict[str, Any]:
    """Of the artifact, else of what it was folded or exported from."""
    for origin in (about.origin, *(o for o in about.before if o.kind in ("delta", "merge"))):
        own = dict(origin.backbone)
        if own.get("name"):
            entry = next((e for e in _entries(about) if e.section == "backbones" and e.name == own["name"]), None)
            return {**({"license": entry.facts.get("license")} if entry else {}), **{k: v for k, v in own.items() if v}}
        if about.origin.kind == "student":
            break
    return {}


def _entries(about: Subject) -> list[Entry]:
    return [*about.zoo.entries(), *builtin()]


def _tasks(about: Subject) -> dict[str, list[str]]:
    """Each task's classes; those of a model from its parents, where it doesn't say them itself."""
    known: dict[str, list[str]] = {}
    for origin in reversed((about.origin, *about.before)):
        for task in [*_list(origin.said.get("tasks")), *_list(origin.said.get("heads"))]:
            if isinstance(task, Mapping):
                known[str(task.get("name"))] = [str(c) for c in _list(cast("Any", task).get("classes"))]
        if (labels := _list(origin.said.get("labels"))) and len(names := _names(origin)) == 1:
            known[names[0]] = [str(c) for c in labels]
    return {n: known.get(n, []) for n in _names(about.origin)}


def _names(origin: Origin) -> list[str]:
    tasks = _list(origin.facts.get("tasks")) or _list(origin.said.get("tasks"))
    return [str(_map(t).get("name") if isinstance(t, dict) else t) for t in tasks]


def _shape(about: Subject) -> Preprocess | None:
    """How it looks at images: by its own first task, else by those of the delta that it was made from."""
    for origin in (about.origin, *(o for o in about.before if o.kind in ("delta", "merge"))):
        for told in [_map(origin.said.get("shape")), *map(_map, _list(origin.said.get("tasks")))]:
            if told.get("input_size"):
                return Preprocess.of(told)
    return None


def _input(shape: Preprocess) -> str:
    _, height, width = shape.input_size
    crop = f", {shape.crop_mode} crop of {shape.crop_pct:.1%}" if shape.crop_pct < 1 else ""
    return f"{width} x {height} pixels, {shape.interpolation}{crop}"


def _number(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:.1%}" if name in _SHARES else f"{value:.4f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(r)} |" for r in (head, ["---"] * len(head), *rows)]


def _and(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def _map(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []
