"""What the Hugging Face Hub reads of a README: YAML front matter made of entries' facts, nothing that isn't recorded.

Keys and their values are those of https://github.com/huggingface/hub-docs/blob/main/modelcard.md?plain=1; `model-index` is
written by the hub's own library.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from vtzoo.catalogue import builtin
from vtzoo.refs import Entry
from vtzoo.spec import AND, as_list, as_map, one_line

TASK = "image-classification"
_SOURCE = "hf-hub:"
_METRICS = {"top1": "accuracy", "map": "mAP", "f1": "f1"}
"""Metrics that tell how good a classifier is, with their names on the hub."""

_SPLITS = ("test", "val", "train")
_BEGIN, _END = "<!-- vtzoo: what stands between these two lines is written at each push -->", "<!-- vtzoo: end -->"
_OURS = ("library_name", "metrics", "model-index")
_LICENCES = frozenset({
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc", "cc-by-2.0",
    "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "ecl-2.0", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "mit", "mpl-2.0",
    "ms-pl", "openrail", "pddl", "postgresql", "unlicense", "wtfpl", "zlib",
})  # fmt: skip
"""The hub's words for licences, as far as weights bear them: https://huggingface.co/docs/hub/repositories-licenses."""


def front_matter(
    entries: Sequence[Entry], among: Iterable[Entry] = (), extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The front matter for a repository that holds these entries.

    Args:
        entries: what the card is of.
        among: where their backbones are looked up, before the built-in catalogue.
        extra: more keys, over these.
    """
    known = {e.name: e for e in [*builtin(), *among, *entries] if e.section == "backbones"}
    bases = [known[n] for n in dict.fromkeys(_backbone(e) for e in entries) if n in known]
    index = [found for entry in entries for found in _model_index(entry)]
    facts = {
        **_licence([*entries, *bases]),
        "library_name": "vtzoo",
        "pipeline_tag": TASK,
        "tags": list(dict.fromkeys(["vtzoo", "timm", *(tag for e in entries for tag in _tags(e) if tag)])),
        "base_model": list(dict.fromkeys(filter(None, map(_hub_id, bases)))),
        "metrics": sorted({m["type"] for model in index for r in model["results"] for m in r["metrics"]}),
        "model-index": index,
    }
    return {k: v for k, v in {**facts, **(extra or {})}.items() if v}


def with_front(facts: Mapping[str, Any], body: str) -> str:
    """A README: the front matter between its dashes, then the body."""
    from huggingface_hub.utils import yaml_dump

    return f"---\n{yaml_dump(dict(facts), sort_keys=False)}---\n\n{body}"


def measured(metrics: Mapping[str, Any], tasks: Sequence[str]) -> Iterator[tuple[str, str, str, float]]:
    """An entry's metrics, however nested by task and split, as (task, split, name, value); split "" where none is told."""
    yield from _measured(metrics, tasks[0] if len(tasks) == 1 else "", "", frozenset(tasks))


def _measured(
    metrics: Mapping[str, Any], task: str, split: str, tasks: frozenset[str]
) -> Iterator[tuple[str, str, str, float]]:
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            inner = cast("Mapping[str, Any]", value)
            yield from _measured(inner, key if key in tasks else task, key if key in _SPLITS else split, tasks)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield task, split, key, value


def _model_index(entry: Entry) -> list[dict[str, Any]]:
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    rows = [r for r in measured(entry.facts.get("metrics") or {}, _tasks(entry)) if r[0] and r[2] in _METRICS]
    results = [
        EvalResult(
            task_type=TASK, dataset_type=task, dataset_name=task, dataset_split=split or None, metric_type=_METRICS[name], metric_name=name,
            metric_value=value,
        )
        for task, split, name, value in rows
    ]  # fmt: skip
    return eval_results_to_model_index(entry.name, results) if results else []


def _tasks(entry: Entry) -> list[str]:
    """Names of its tasks; entries of some verbs hold whole ones."""
    return [str(as_map(t).get("name")) if isinstance(t, Mapping) else str(t) for t in as_list(entry.facts.get("tasks"))]


def _tags(entry: Entry) -> Iterator[str]:
    """Methods and kinds, without their knobs."""
    for part in str(entry.facts.get("method") or "").split("+"):
        yield part.partition("[")[0]
    yield str(entry.facts.get("kind") or "")


def _backbone(entry: Entry) -> str:
    return entry.name if entry.section == "backbones" else str(entry.facts.get("backbone") or "")


def _hub_id(backbone: Entry) -> str:
    source = str(backbone.facts.get("source") or "")
    return source.removeprefix(_SOURCE).partition("@")[0] if source.startswith(_SOURCE) else ""


def _licence(entries: Iterable[Entry]) -> dict[str, str]:
    """All that hold together: one the hub has a word for stands as such, others under `license_name`."""
    found: set[str] = set()
    for entry in entries:
        lineage: Mapping[str, Any] = entry.facts.get("lineage") or {}
        told = [entry.facts.get("license"), *as_list(lineage.get("licenses"))]
        found |= {part for text in told if text for part in str(text).lower().split(AND.lower())}
    if len(found) == 1 and found <= _LICENCES:
        return {"license": found.pop()}
    return {"license": "other", "license_name": AND.join(sorted(found))} if found else {}


def readme(old: str, repo: str, entries: Sequence[Entry], before: Sequence[Entry] = ()) -> str:
    """A repository's README: table and front matter made anew, the text and keys of people left as they are.

    Args:
        old: what stands there; "" for nothing.
        repo: org/name.
        entries: all that the repository holds.
        before: what it held when `old` was made: a key that says what they say is ours.
    """
    head, text = _taken_apart(old)
    facts = _joined(head, front_matter(entries), front_matter(before))
    above, begun, rest = text.partition(_BEGIN)
    below = rest.partition(_END)[2] if begun else ""
    title = above if begun or above.strip() else f"# {repo}\n\n"
    return with_front(
        facts, f"{title.rstrip()}\n\n{_BEGIN}\n{_shelf(repo, entries)}\n{_END}{below or chr(10)}".lstrip()
    )


def _joined(head: Mapping[str, Any], made: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of people over ours; in a list theirs after ours. A licence goes with its name."""
    own = {k: v for k, v in head.items() if k not in _OURS and v != before.get(k)}
    mine = {k: v for k, v in made.items() if not ("license" in own and k == "license_name")}
    for key in ("tags", "base_model"):
        if isinstance(theirs := own.pop(key, None), list):
            more = [x for x in cast("list[Any]", theirs) if isinstance(x, str) and x not in before.get(key, ())]
            mine[key] = list(dict.fromkeys([*made.get(key, ()), *more]))
    return {k: v for k, v in {**mine, **own}.items() if v}


def _taken_apart(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and the rest; what can't be read as front matter is text."""
    import yaml

    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n?", text, re.DOTALL)
    if found is None:
        return {}, text
    try:
        head = yaml.safe_load(found[1])
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}, text
    return (cast("dict[str, Any]", head), text[found.end() :]) if isinstance(head, dict) else ({}, text)


def _shelf(repo: str, entries: Sequence[Entry]) -> str:
    """What is there, and how to have it."""
    rows = [_row(e) for e in entries if e.section != "backbones"] or [_row(e) for e in entries]
    first = next((e.name for e in entries if e.section != "backbones"), "NAME")
    lines = [
        "A zoo of vtzoo: small deltas on frozen backbones, and models made of them.",
        "",
        "| entry | kind | backbone | tasks | top-1 |",
        "| --- | --- | --- | --- | ---: |",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "```console",
        f"$ vtzoo pull {first} hf://{repo}",
        f"$ vtzoo predict {first} photo.jpg",
        "```",
    ]
    return "\n".join(lines)


def _row(entry: Entry) -> tuple[str, ...]:
    facts = entry.facts
    top1 = [v for _, _, name, v in measured(facts.get("metrics") or {}, _tasks(entry)) if name == "top1"]
    shown = f"{sum(top1) / len(top1):.1%}" if top1 else ""
    kind = facts.get("method") or facts.get("kind") or entry.section[:-1]
    on = facts.get("backbone") or facts.get("arch") or ""
    return entry.name, _cell(kind), _cell(on), _cell(", ".join(_tasks(entry))), shown


def _cell(text: object) -> str:
    """What someone else wrote, in a table's cell, where it is neither a link nor HTML."""
    return re.sub(r"([\\|`]|(?<=\])\()", r"\\\1", one_line(text)).replace("<", "&lt;")
