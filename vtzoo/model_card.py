"""A model card in Markdown: what an artifact is, how it was made and measured, and how to use it.

Everything stands in the artifact, its entry or its parents; what is not recorded is left out. The front matter that a hub reads is
`vtzoo.hub_card`'s.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vtzoo.ancestry import ancestry
from vtzoo.lineage import Origin, images
from vtzoo.papers import citation
from vtzoo.spec import AND, Preprocess, as_list, as_map, tidy
from vtzoo.subject import Subject, backbone_of, before_of, code, method_of, names_of, shape_of, tasks_of
from vtzoo.usage import use
from vtzoo.zoo import Zoo

SHOWN = 12
_DEEP = 64
_METRICS = ("top1", "top5", "balanced_accuracy", "map", "micro_f1", "macro_f1", "retention", "loss", "ece")
_SHARES = frozenset(_METRICS) - {"loss", "ece"}


def card(zoo: Zoo, origin: Origin) -> str:
    """The whole card, without front matter."""
    graph = ancestry(zoo, origin)
    about = Subject(zoo, origin, graph, before_of(zoo, graph))
    parts = [
        [f"# {tidy(origin.name)}", "", _what(about)], _facts(about), _trained(about), _data(about), _metrics(about), _lineage(about),
        use(about), _licence(about), citation(about),
    ]  # fmt: skip
    return "\n\n".join("\n".join(p) for p in parts if p) + "\n"


def _what(about: Subject) -> str:
    """One sentence."""
    origin, tasks = about.origin, tasks_of(about)
    kind = {
        "delta": "A task delta", "merge": "Several tasks in one delta", "folded": "A plain timm model, folded from a delta", "student": "A distilled student",
        "export": "A model exported for another runtime", "backbone": "A frozen backbone", "file": "A file of tensors",
    }.get(origin.kind, "A plain timm model")  # fmt: skip
    method = method_of(origin)
    how = f", made by `{method}`" if method else ""
    on = f", on the backbone `{name}`" if (name := backbone_of(about).get("name")) else ""
    of = f", for {_and([f'{t} ({len(c)} classes)' if c else t for t, c in tasks.items()])}" if tasks else ""
    return f"{kind}{how}{on}{of}. Made with [vtzoo](https://pypi.org/project/vtzoo/)."


def _facts(about: Subject) -> list[str]:
    """What is known of it as a file."""
    origin, facts, shape = about.origin, about.origin.facts, shape_of(about)
    size, backbone = facts.get("size_bytes"), backbone_of(about)
    rows = [
        ("kind", tidy(origin.kind)),
        ("network", f"`{tidy(arch)}`" if (arch := facts.get("arch") or backbone.get("arch")) else ""),
        ("size", f"{size:,} bytes" if size else ""),
        ("input", _input(shape) if shape else ""),
        ("sha256", f"`{origin.digest}`" if origin.digest else ""),
        ("backbone's fingerprint", f"`{backbone['fingerprint']}`" if backbone.get("fingerprint") else ""),
        ("backbone's licence", str(backbone.get("license") or "")),
        ("made", tidy(facts.get("created") or "")),
        ("with", tidy(", ".join(f"{k} {v}" for k, v in as_map(origin.lineage.get("versions")).items()))),
    ]
    return _table(("", ""), [r for r in rows if r[1]])


def _trained(about: Subject) -> list[str]:
    """The recipe, and the command, where those are recorded."""
    lineage = about.origin.lineage
    recipe = as_map(about.origin.said.get("recipe")) or as_map(lineage.get("recipe"))
    wanted = ("preset", "epochs", "lr", "head_lr", "weight_decay", "batch_size", "optimizer", "augment", "mixup", "cutmix", "precision", "seed")  # fmt: skip
    told = [f"{k} {tidy(recipe[k])}" for k in wanted if recipe.get(k) or k == "seed" in recipe]
    loss = [_spelled(as_map(t)) for t in as_list(lineage.get("loss"))]
    spec = method_of(about.origin) if about.origin.kind == "merge" else ""
    lines = [f"Recipe: {', '.join(told)}."] if told else []
    lines += [f"Loss: `{' + '.join(loss)}`."] if loss else []
    lines += [f"Merged by `{spec}`, weights {', '.join(map(_short, as_list(lineage.get('coef'))))}."] if spec else []
    return ["## How it was made", "", *lines] if lines else []


def _spelled(term: Mapping[str, Any]) -> str:
    own = {k: v for k, v in term.items() if k not in ("function", "weight")}
    weight = f"{_short(term['weight'])}*" if term.get("weight", 1) != 1 else ""
    return code(
        f"{weight}{term.get('function')}" + (f"[{','.join(f'{k}={v}' for k, v in own.items())}]" if own else "")
    )


def _data(about: Subject) -> list[str]:
    """Which images, and which classes."""
    seen = [(i, o) for o in (about.origin, *about.before) for i in images(o.lineage)]
    rows = list(dict.fromkeys(
        (tidy(i["task"]) or ", ".join(names_of(o)), tidy(i["images"] or ""), f"`{i['data']}`") for i, o in seen
    ))  # fmt: skip
    classes = [f"Classes of {t}: {', '.join(c[:SHOWN])}{f', … ({len(c)})' if len(c) > SHOWN else ''}." for t, c in tasks_of(about).items() if c]  # fmt: skip
    told = _table(("task", "training images", "their sha256"), rows) if rows else []
    return ["## Data", "", *told, *([""] if told and classes else []), *classes] if told or classes else []


def _metrics(about: Subject) -> list[str]:
    """The numbers with what they were measured on."""
    origin = about.origin
    found = as_map(origin.said.get("metrics")) or as_map(origin.facts.get("metrics"))
    nested = {k: as_map(v) for k, v in found.items() if as_map(v)} or {"": found}
    columns = [c for c in (*_METRICS, "images") if any(c in m for m in nested.values())]
    if not {*columns} & {*_METRICS}:
        return []
    rows = [(tidy(k), *(_number(c, m.get(c)) for c in columns)) for k, m in nested.items() if {*m} & {*columns}]
    what = "" if "" in nested else "split" if {*nested} <= {"val", "test"} else "task"
    told = _protocol(about)
    if not what:
        return [
            "## Metrics",
            "",
            *_table(columns, [r[1:] for r in rows]),
            *(["", f"Measured on {told}."] if told else []),
        ]
    head = (what, *(c.replace("_", " ") for c in columns))
    return ["## Metrics", "", *_table(head, rows), *(["", f"Measured on {told}."] if told else [])]


def _protocol(about: Subject) -> str:
    """How it was measured, beside the split."""
    recipe = as_map(about.origin.said.get("recipe")) or as_map(about.origin.lineage.get("recipe"))
    shape, most = shape_of(about), recipe.get("eval_limit")
    told = [f"images of {_input(shape)}"] if shape else []
    told += [f"in {tidy(recipe['precision'])}"] if recipe.get("precision") else []
    told += [f"of each split at most {tidy(most)} images"] if most else []
    return ", ".join(told)


def _lineage(about: Subject) -> list[str]:
    """A short tree of what it was made from."""
    lines, told = list[str](), set[str]()

    def tell(mark: str, depth: int) -> None:
        node = about.graph.nodes[mark]
        gone = " (no longer in the zoo it was made in)" if node["kind"] == "gone" else ""
        name = f"`{tidy(node['name'])}`" if node.get("name") else tidy(node.get("task", ""))
        digest = f", sha256 `{node['digest'][:12]}…`" if node["digest"] else ""
        lines.append(f"{'  ' * depth}- {' '.join(p for p in (tidy(node['kind']), name) if p)}{digest}{gone}")
        if mark not in told and depth < _DEEP:
            told.add(mark)
            for other, _ in about.graph.sources.get(mark, ()):
                tell(other, depth + 1)

    tell(about.graph.root, 0)
    return ["## Lineage", "", *lines] if len(lines) > 1 else []


def _licence(about: Subject) -> list[str]:
    """Whose licences the weights carry."""
    own = [str(as_map(about.origin.said).get("license") or "")]
    own += [str(x) for x in as_list(about.origin.lineage.get("licenses"))]
    own += [str(o.backbone.get("license") or o.facts.get("license") or "") for o in (about.origin, *about.before)]
    own.append(str(backbone_of(about).get("license") or ""))
    known = sorted({tidy(x) for text in own for x in text.split(AND) if x})
    if not known:
        return []
    return [
        "## Licence",
        "",
        f"The weights that it was made from are under {_and(known)}; what is made of them carries that on.",
    ]


def _input(shape: Preprocess) -> str:
    _, height, width = shape.input_size
    crop = f", {tidy(shape.crop_mode)} crop of {shape.crop_pct:.1%}" if shape.crop_pct < 1 else ""
    return f"{width} x {height} pixels, {tidy(shape.interpolation)}{crop}"


def _number(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    if name == "images":
        return str(value)
    return f"{value:.1%}" if name in _SHARES else f"{value:.4f}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else tidy(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(r)} |" for r in (head, ["---"] * len(head), *rows)]


def _and(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)
