"""Front matter of a hub's model card, made of entries' facts."""

import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from vtzoo.hub_card import front_matter, measured, readme, with_front
from vtzoo.refs import Entry

DIGEST = "0" * 64


def _delta(name: str = "fashion/lora", **facts: Any) -> Entry:
    return Entry("deltas", name, {"digest": DIGEST, "method": "lora[rank=8]+ssf", "tasks": ["fashion"], **facts})


def _backbone(name: str, **facts: Any) -> Entry:
    return Entry("backbones", name, {"arch": "vit", "source": f"object:sha256:{DIGEST}", **facts})


@pytest.mark.parametrize(
    ("metrics", "tasks", "rows"),
    [
        ({"top1": 0.9}, ["a"], [("a", "", "top1", 0.9)]),
        ({"top1": 0.9}, ["a", "b"], [("", "", "top1", 0.9)]),
        ({"a": {"top1": 0.9}, "b": {"top1": 0.8}}, ["a", "b"], [("a", "", "top1", 0.9), ("b", "", "top1", 0.8)]),
        ({"test": {"top1": 0.9, "n": 3}, "val": {"top1": 0.8}, "seconds": 4}, ["a"],
         [("a", "test", "top1", 0.9), ("a", "test", "n", 3), ("a", "val", "top1", 0.8), ("a", "", "seconds", 4)]),
        ({"a": {"val": {"map": 0.5}}, "note": "x", "ok": True}, ["a", "b"], [("a", "val", "map", 0.5)]),
    ],
)  # fmt: skip
def test_metrics_however_they_are_nested(
    metrics: dict[str, Any], tasks: list[str], rows: list[tuple[Any, ...]]
) -> None:
    """By task and split, words and flags left out."""
    assert list(measured(metrics, tasks)) == rows


@pytest.mark.parametrize(
    ("licences", "said"),
    [
        (["Apache-2.0"], {"license": "apache-2.0"}),
        (["apache-2.0", "mit"], {"license": "other", "license_name": "apache-2.0 AND mit"}),
        (["mit AND cc-by-4.0"], {"license": "other", "license_name": "cc-by-4.0 AND mit"}),
        (["dinov3-license"], {"license": "other", "license_name": "dinov3-license"}),
        ([""], {}),
    ],
)
def test_licences(licences: list[str], said: dict[str, str]) -> None:
    """One that the hub has a word for; several, or others, by name; none where nobody knows."""
    bases = [_backbone(f"b{i}", license=text) for i, text in enumerate(licences)]
    deltas = [_delta(f"d{i}", backbone=b.name) for i, b in enumerate(bases)]
    found = front_matter(deltas, bases)
    assert {k: v for k, v in found.items() if k.startswith("license")} == said


def test_a_students_licences_are_its_teachers() -> None:
    """They stand in its lineage."""
    student = Entry("models", "s", {"files": {"model.safetensors": DIGEST}, "kind": "student", "lineage": {"licenses": ["cc-by-nc-4.0"]}})  # fmt: skip
    assert front_matter([student])["license"] == "cc-by-nc-4.0"


def test_an_entry_is_a_model_of_the_index() -> None:
    """Only what tells how good it is, of a task that is known; nothing that isn't recorded."""
    found = front_matter([_delta(metrics={"top1": 0.9, "max_rel": 1e-6}), _delta("bare")])
    assert [m["name"] for m in found["model-index"]] == ["fashion/lora"]
    (result,) = found["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.9, "name": "top1"}]
    assert found["metrics"] == ["accuracy"]
    assert found["tags"] == ["vtzoo", "timm", "lora", "ssf"]
    assert set(found) == {"library_name", "pipeline_tag", "tags", "metrics", "model-index"}


def test_base_models_are_those_of_the_hub() -> None:
    """Without their revision; a backbone from a file is none."""
    bases = [_backbone("a", source="hf-hub:timm/vit@v1"), _backbone("b")]
    found = front_matter([_delta("x", backbone="a"), _delta("y", backbone="b"), _delta("z", backbone="a")], bases)
    assert found["base_model"] == ["timm/vit"]


def test_more_keys() -> None:
    """`extra` stands over what is made, and can take a key away."""
    found = front_matter([_delta()], extra={"datasets": ["mnist"], "tags": None})
    assert found["datasets"] == ["mnist"]
    assert "tags" not in found


def test_the_text_is_read_again() -> None:
    """By YAML and by the hub's library."""
    text = with_front(front_matter([_delta(metrics={"top1": 0.9})]), "# Title\n")
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "vtzoo"
    assert ModelCard(text).text.strip() == "# Title"


@pytest.mark.parametrize("old", ["", "# Mine\n\ntext\n", "---\nlicense: [\n---\ntext\n", "---\n- a\n---\ntext\n", "---\ntags: x\n---\n", "---\ntags: [1, {a: b}]\n---\n"])  # fmt: skip
def test_a_readme_of_any_kind_is_taken(old: str) -> None:
    """What can't be read as front matter stays as text; writing again changes nothing."""
    once = readme(old, "lab/zoo", [_delta()])
    assert once.count("| fashion/lora |") == 1
    assert ("text" in once) == ("text" in old)
    assert readme(once, "lab/zoo", [_delta()], [_delta()]) == once


def test_a_table_cell_holds_a_bar() -> None:
    """Targets are separated by bars, which Markdown takes for cells."""
    assert r"lora[targets=qkv\|proj]" in readme("", "lab/zoo", [_delta(method="lora[targets=qkv|proj]")])


def test_a_table_cell_is_no_link_and_no_html() -> None:
    """Nor the mark at which our part of the page ends: what entries say may be a stranger's, and the page is yours."""
    bad = "x\n# Owned [here](https://x) <!-- vtzoo: end -->\x1b[2J"
    once = readme("", "lab/zoo", [_delta(method=bad, backbone=bad, tasks=[bad])])
    assert not re.search(r"\n# Owned|\]\(|<!-- vtzoo: end -->(?!\n)|\x1b", once.partition("---\n\n")[2])
    assert (
        readme(once, "lab/zoo", [_delta()]).partition("---\n\n")[2]
        == readme("", "lab/zoo", [_delta()]).partition("---\n\n")[2]
    )


def test_a_licence_that_we_wrote_follows_the_entries() -> None:
    """One of people stays, with or without a name; so do their base models and tags, after ours."""
    first = [_backbone("a", license="mit", source="hf-hub:timm/a"), _delta("x", backbone="a")]
    second = [*first, _backbone("b", license="apache-2.0"), _delta("y", backbone="b")]
    once = readme("", "lab/zoo", first)
    assert _head(once)["license"] == "mit"
    twice = readme(once, "lab/zoo", second, first)
    assert (_head(twice)["license"], _head(twice)["license_name"]) == ("other", "apache-2.0 AND mit")
    theirs = twice.replace("license: other\nlicense_name: apache-2.0 AND mit", "license: cc0-1.0").replace(
        "- timm/a", "- timm/a\n- lab/c"
    )
    again = _head(readme(theirs, "lab/zoo", second[2:], second))
    assert (again["license"], "license_name" in again, again["base_model"]) == ("cc0-1.0", False, ["lab/c"])


def _head(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---")[1])
