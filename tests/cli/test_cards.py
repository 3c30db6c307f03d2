"""methods, merges, losses, inits and doctor."""

import json
from dataclasses import replace
from importlib.metadata import metadata, version

import pytest

from vtzoo import registry
from vtzoo_cli._cards import readable


@pytest.mark.parametrize("kind", ["methods", "merges", "losses", "inits"])
def test_lists_have_every_entry(vtzoo, kind: registry.Kind) -> None:
    """The list has what the registry has, in JSON and as a table, with what the contract promises."""
    found = json.loads(vtzoo(kind, "--json").out)
    assert [c["name"] for c in found] == registry.names(kind)
    wanted = {"name", "paper", "knobs"} | ({"group", "folds", "families"} if kind == "methods" else set())
    assert all(wanted <= set(c) for c in found)
    lines = vtzoo(kind).out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == registry.names(kind)


def test_a_page(vtzoo) -> None:
    """One method's page has its documentation and its knobs; its JSON is one object."""
    page = vtzoo("methods", "lora").out
    assert "arXiv:2106.09685" in page
    assert "rank" in page.split("knob")[1]
    found = json.loads(vtzoo("methods", "lora", "--json").out)
    assert found["folds"] == "yes"
    assert "vit" in found["families"]
    assert {k["name"] for k in found["knobs"]} >= {"rank", "alpha"}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("exactly", "yes"),
        ("yes", "yes"),
        ("no", "no"),
        ("", "no"),
        ("only on nets with an absolute position", "when"),
    ],
)
def test_folds_in_one_word(text: str, word: str) -> None:
    """A docstring's sentence about folding becomes yes, no or when."""
    card = replace(registry.card("methods", "lora"), folds=text)
    assert card.verdict == word


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        ("Annotated[int, BeforeValidator(knobs.whole), Field(ge=1)]", "int ≥ 1"),
        ("Annotated[float, Field(gt=0, allow_inf_nan=False)] | None", "float > 0 or None"),
        ("Annotated[float, Field(ge=0, lt=1)]", "float ≥ 0 and < 1"),
        ("Literal['vector', 'tensor']", "vector or tensor"),
        ("tuple[str, ...]", "list of str"),
        ("bool", "bool"),
    ],
)
def test_types_are_said_as_people_say_them(annotation: str, said: str) -> None:
    """No Python in the tables of knobs."""
    assert readable(annotation) == said


def test_doctor(vtzoo) -> None:
    """The doctor names every run-time requirement with its version or its absence, and the zoo in use."""
    found = json.loads(vtzoo("doctor", "--json").out)
    packages = {p["name"]: p for p in found["packages"]}
    assert packages["torch"]["version"] == version("torch")
    assert packages["onnx"]["for"] == "onnx"
    assert "pytest" not in packages
    known = {"always", *(metadata("vtzoo").get_all("Provides-Extra") or ())}
    used = {"always", "gs", "hfds", "onnx", "s3", "sign", "ssh"}  # extras that a verb asks for
    assert {p["for"] for p in found["packages"]} == used & known
    assert found["zoo"]["problem"] == ""
    assert found["zoo"]["backbones"] >= 1
    assert "zoo: " in vtzoo("doctor").out


def test_doctor_with_a_broken_zoo(vtzoo, tmp_path) -> None:
    """A zoo that can't be read is part of the diagnosis, not an error."""
    (tmp_path / "zoo_index.yaml").write_text("schema: 1\ndeltas: [", encoding="utf-8")
    ran = vtzoo("doctor")
    assert ran.code == 0
    assert "line" in next(x for x in ran.out.splitlines() if x.startswith("zoo: "))
