"""Lineage as earlier versions, other hands and damaged files have it; and the graph made of it."""

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest

from vtzoo.ancestry import ancestry
from vtzoo.errors import Corrupt, Mismatch
from vtzoo.facts import facts_of
from vtzoo.files import safetensors_header
from vtzoo.headers import stands_on
from vtzoo.lineage import bare, check_images, images, of_entry, origin, parents, record
from vtzoo.model_card import card
from vtzoo.scratch import scratch
from vtzoo.zoo import Zoo
from vtzoo_cli._blocks import Tree, indented
from vtzoo_cli._tree import trees

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def _delta(zoo: Zoo, name: str, lineage: Any, **facts: Any) -> str:
    """A delta of one tensor that says this of itself; gives its digest."""
    said = {
        "schema": 1,
        "method": "lora[rank=2]",
        "tasks": [{"name": "pets", "classes": ["cat", "dog"]}],
        "lineage": lineage,
        **facts,
    }
    digest = zoo.add_object(safetensors_header([("a.lora.A", "F32", (2,))], {"vtzoo": json.dumps(said)}) + bytes(8))
    zoo.put("deltas", name, {"digest": digest, "tasks": ["pets"]})
    return digest


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """An empty one."""
    return Zoo.init(tmp_path / "zoo")


def test_digests_are_written_in_one_form() -> None:
    """sha256:…, whatever form they had; what has no file is left out."""
    made = record("merge", [A, f"sha256:{B}", ""], spec="linear")
    assert made["parents"] == [f"sha256:{A}", f"sha256:{B}"]
    assert parents(made) == [A, B]
    assert set(made["versions"]) == {"vtzoo", "torch", "timm"}


def test_earlier_forms_are_read() -> None:
    """Digests without sha256:, a student's teachers and giver, and images where each verb has kept them."""
    assert parents({"parents": [A]}) == [A]
    assert parents({"teachers": [A, B], "student": {"giver": f"sha256:{C}"}}) == [A, B, C]
    assert images({"data": f"sha256:{A}", "images": 5}) == [{"task": "", "data": A, "images": 5}]
    one = {"task": "pets", "data": f"sha256:{A}", "images": 5}
    for said in (
        {"images": [one]},
        {"lessons": [one]},
        {"searched": {"images": [one]}},
        {"images": [one], "heads_images": [one]},
    ):
        assert images(said) == [{"task": "pets", "data": A, "images": 5}]


@pytest.mark.parametrize(
    "lineage",
    [
        {},
        {"parents": 5},
        {"parents": [1, "../x", "sha256:zz", None]},
        {"images": {"a": 1}, "data": 3},
        {"lessons": ["x"], "student": []},
    ],
)
def test_nonsense_is_unknown(zoo: Zoo, lineage: dict[str, Any]) -> None:
    """A lineage of other shapes names no parents and no images; the graph is the artifact alone, and the card has no lineage."""
    assert (parents(lineage), images(lineage)) == ([], [])
    _delta(zoo, "pets/lora", lineage)
    start = origin(zoo, "pets/lora")
    assert list(ancestry(zoo, start, children=True).nodes) == ["deltas:pets/lora"]
    assert "## Lineage" not in card(zoo, start)


def test_nonsense_in_a_header(zoo: Zoo) -> None:
    """Facts of other kinds than vtzoo writes are shown as what they are, or left out; nothing breaks on them."""
    _delta(zoo, "odd", {"verb": 7}, tasks=5, method={"a": 1}, config=[1], recipe="x", metrics=[2], backbone="tiny")
    start = origin(zoo, "odd")
    assert list(ancestry(zoo, start, children=True).nodes) == ["deltas:odd", "backbone:tiny"]
    assert facts_of(start)["task pets.is"] == "here"
    assert card(zoo, start).startswith("# odd\n")


def test_a_lineage_that_is_no_map(zoo: Zoo) -> None:
    """It says nothing, too."""
    _delta(zoo, "pets/lora", "made by hand")
    assert of_entry(zoo, zoo.resolve("pets/lora")).lineage == {}


def test_what_is_no_digest_names_nothing() -> None:
    """Only 64 hex digits do."""
    assert [bare(d) for d in (A, f"sha256:{A}", A[:-1], A.upper(), "", None, 7)] == [A, A, "", "", "", "", ""]


def test_links_in_a_circle_end(zoo: Zoo) -> None:
    """An index can't make log run for ever: entries that claim to be made from each other, or from themselves, are told once each."""
    files = {n: zoo.add_object(n.encode()) for n in ("one", "two")}
    for name, parents_too in (("one", ["two"]), ("two", ["one", "two"])):
        lineage = {"verb": "fold", "parents": [files[p] for p in parents_too]}
        zoo.put("models", name, {"kind": "folded", "files": {"model.safetensors": files[name]}, "lineage": lineage})
    graph = ancestry(zoo, origin(zoo, "one"), children=True)
    assert sorted(graph.nodes) == ["models:one", "models:two"]
    assert sorted((e["from"], e["to"]) for e in graph.edges) == [
        ("models:one", "models:two"),
        ("models:two", "models:one"),
    ]
    assert "## Lineage" in card(zoo, origin(zoo, "one"))


def test_a_file_that_says_nothing_is_no_delta(tmp_path: Path, zoo: Zoo) -> None:
    """Tensors alone may be anybody's: neither log nor card calls them a delta."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors_header([("a", "F32", (2,))], {"format": "pt"}) + bytes(8))
    found = origin(zoo, str(path))
    assert found.kind == "file"
    assert "A file of tensors." in card(zoo, found)


def test_a_damaged_parent_is_told_and_the_root_refused(zoo: Zoo) -> None:
    """Of a parent whose file is no longer sound its name is left and the reason; asked for itself it is refused."""
    digest = _delta(zoo, "pets/lora", {"verb": "train", "data": f"sha256:{A}"})
    _delta(zoo, "both", {"verb": "merge", "parents": [digest]})
    path = zoo.object(digest)
    path.chmod(0o644)
    path.write_bytes(b"not a tensor")
    found = ancestry(zoo, origin(zoo, "both"), children=True).nodes["deltas:pets/lora"]
    assert "no sound safetensors file" in found["problem"]
    with pytest.raises(Corrupt):
        origin(zoo, "pets/lora")


def test_a_backbone_of_the_catalogue(zoo: Zoo) -> None:
    """A parent may live in the catalogue: by its name while nobody here has seen its weights."""
    backbone = {"name": "tf_efficientnet_lite0", "fingerprint": f"sha256:{C}"}
    _delta(zoo, "pets/lora", {"verb": "train"}, backbone=backbone)
    nodes = ancestry(zoo, origin(zoo, "pets/lora")).nodes
    known = next(e for e in zoo.entries("backbones") if e.name == backbone["name"])
    seen = "backbones:tf_efficientnet_lite0" if not known.facts.get("fingerprint") else f"backbone:{C}"
    assert list(nodes) == ["deltas:pets/lora", seen]


def test_other_images_are_refused() -> None:
    """None awaited means any; else each must be one of them."""
    check_images((), [A])
    check_images([A, B], [B])
    with pytest.raises(Mismatch, match="these images are sha256:cccccccccccc…, it was made from sha256:aaaaaaaaaaaa"):
        check_images([A], [A, C])


def test_a_card_of_hostile_names(zoo: Zoo) -> None:
    """Texts of a file that someone else made can't leave their line, their code or their table."""
    bad = 'pets"); import os\n```\n# Owned | <script>'
    digest = _delta(
        zoo,
        "pets/lora",
        {"verb": "train", "data": f"sha256:{A}"},
        tasks=[{"name": bad, "classes": ["a\n# b", "c"], "input_size": [3, 8, 8]}, {"name": "two", "classes": []}],
    )
    zoo.put("deltas", "pets/lora", {"digest": digest, "tasks": [bad, "two"]}, replace=True)
    text = card(zoo, origin(zoo, "pets/lora"))
    assert "\n# Owned" not in text
    assert "<script>" not in text
    assert 'task="pets\\"); import os' in text
    assert text.count("```") % 2 == 0


def test_a_card_of_facts_that_are_none(zoo: Zoo) -> None:
    """What stands where a kind, a number or a date is wanted is shown in its own line and cell; a terminal gets no orders."""
    bad = "x\x1b[2J\n\n# Owned | <img src=x>"
    loss = [{"function": bad, "weight": bad}]
    _delta(zoo, "pets/lora", {"loss": loss}, metrics={bad: {"top1": 0.5}}, recipe={"precision": bad, "eval_limit": bad})
    shape = {"input_size": [3, 8, 8], "interpolation": bad, "crop_mode": bad, "crop_pct": 0.5}
    _delta(zoo, "both", {"verb": "merge", "coef": [bad, 1.5]}, tasks=[{"name": "pets", "classes": [], **shape}])
    facts = {"kind": bad, "arch": bad, "created": bad, "metrics": {"top1": 0.5}}
    zoo.put("models", "small", {"files": {"model.safetensors": zoo.add_object(b"x")}, **facts})
    for name in ("pets/lora", "both", "small"):
        text = card(zoo, origin(zoo, name))
        plain = re.sub(r"`[^`\n]*`", "", text)
        assert "Owned" in text
        assert "\n# Owned" not in text
        assert "\x1b" not in text
        assert "<img" not in plain
        assert "| (img" not in plain


def test_two_thousand_parents_one_before_the_other(zoo: Zoo) -> None:
    """The graph has them all; tree and card are drawn as far as people read, and say that there are more."""
    digests = [f"{n:064x}" for n in range(2001)]
    models = {
        f"m{n}": {"files": {"model.safetensors": digests[n]}, "lineage": {"parents": [digests[n - 1]]}}
        for n in range(1, 2001)
    }
    (zoo.root / "zoo_index.yaml").write_text(json.dumps({"schema": 1, "models": models}), encoding="utf-8")
    start = origin(zoo, "m2000")
    graph = ancestry(zoo, start)
    nodes = [{"id": name, **facts} for name, facts in graph.nodes.items()]
    assert len(nodes) == 2001
    (drawn,) = trees({"root": graph.root, "children": False, "nodes": nodes, "edges": graph.edges})
    lines = indented(cast("Tree", drawn))
    assert len(lines) == 65
    assert lines[-1].endswith("… (all of it: --json)")
    assert "`m1990`" in card(zoo, start)


def test_a_config_is_read_within_limits(zoo: Zoo) -> None:
    """What a model says of itself may be as long as a header, no longer, and says nothing twice (4)."""
    for text, said in ((b'{"a": "' + bytes(9 << 20) + b'"}', "the limit is"), (b'{"a": 1, "a": 2}', "'a' twice")):
        files = {"config.json": zoo.add_object(text), "model.safetensors": zoo.add_object(b"x")}
        zoo.put("models", "small", {"files": files}, replace=True)
        with pytest.raises(Corrupt, match=said):
            origin(zoo, "small")


@pytest.mark.parametrize("document", ["[" * 100_000, '{"backbone": 5}', "{", '{"backbone": {}}'])
def test_a_delta_that_says_nothing_sound_is_in_nobodys_way(zoo: Zoo, document: str) -> None:
    """What it stands on is unknown: a backbone can be removed beside it, and a zoo lent for a while."""
    digest = zoo.add_object(safetensors_header([("a", "F32", (2,))], {"vtzoo": document}) + bytes(8))
    zoo.put("deltas", "odd", {"digest": digest})
    source = "object:sha256:" + zoo.add_object(b"weights")
    zoo.put("backbones", "tiny", {"arch": "test_vit", "source": source})
    with scratch(zoo, [zoo.resolve("odd")]) as other:
        assert other.resolve("odd").digest == digest
    zoo.remove(zoo.resolve("tiny"))
    assert stands_on(zoo.object(digest)) == ""
