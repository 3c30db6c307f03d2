"""Help and lists answer at once: what they must not load, they don't."""

import json
import pkgutil

import pytest

import vtzoo as library
from scripts.make_docs import commands
from vtzoo.zoo import Zoo

HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "onnx",
    "onnxruntime",
    "safetensors",
    "PIL",
    "huggingface_hub",
    "accelerate",
}
PROBE = """
import io, json, sys
from contextlib import redirect_stdout
from vtzoo_cli._main import main
heavy, found = set(json.loads(sys.argv[1])), {}
for words in json.loads(sys.argv[2]):
    out = io.StringIO()
    with redirect_stdout(out):
        code = main(words)
    found[" ".join(words)] = [code, bool(out.getvalue()), sorted(heavy & set(sys.modules))]
print(json.dumps(found))
"""
LISTS = [
    ["--help"],
    ["ls"],
    ["ls", "backbones", "--json"],
    ["methods"],
    ["methods", "lora"],
    ["merges"],
    ["losses"],
    ["inits"],
]


def _probe(python, heavy: set[str], lines: list[list[str]]) -> dict[str, list[object]]:
    ran = python(PROBE, json.dumps(sorted(heavy)), json.dumps(lines))
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_help_of_every_command_loads_nothing_heavy(python) -> None:
    """No command's help loads torch, timm, numpy or torchvision."""
    lines = [[*words, "--help"] for words in commands()]
    found = _probe(python, HEAVY, lines)
    assert len(found) == len(lines) > 20
    assert found == {line: [0, True, []] for line in found}


def test_lists_and_pages_load_nothing_heavy(python, zoo: Zoo) -> None:
    """Nor do ls, show, methods, merges, losses, inits, doctor, push, pull, sync, rm and mv, with whatever they are asked."""
    where = ["--zoo", str(zoo.root)]
    share = f"{zoo.root}-share"
    entries = [
        ["push", "pets/lora", share],
        ["pull", "--all", share],
        ["sync", share],
        ["ls", f"file://{share}"],
        ["show", "pets/lora"],
        ["show", "tf_efficientnet_lite0"],
        ["mv", "pets/lora", "pets/old"],
        ["rm", "pets/old"],
    ]
    found = _probe(python, HEAVY, [[*words, *where] for words in [*LISTS, *entries, ["doctor"]]])
    assert found == {line: [0, True, []] for line in found}


def test_refusals_come_before_torch(python) -> None:
    """An unknown ref, method or merge is refused before anything heavy is loaded."""
    lines = [
        ["eval", "nope", "--data", "d"],
        ["fold", "nope", "--out", "d"],
        ["export", "onnx", "nope", "x.onnx"],
        ["train", "--backbone", "b", "--data", "d", "--name", "n", "--method", "lorra"],
        ["merge", "a", "b", "--method", "tiess", "--name", "n"],
    ]
    found = _probe(python, HEAVY, lines)
    assert found == {line: [3, False, []] for line in found}


@pytest.mark.parametrize("words", LISTS, ids=" ".join)
def test_lists_do_not_load_what_costs_a_tenth_of_a_second(python, words: list[str]) -> None:
    """Piped lists load neither pydantic nor rich: the two that would take half of their 0.3 s."""
    assert _probe(python, {"pydantic", "rich"}, [words]) == {" ".join(words): [0, True, []]}


def test_importing_the_library_loads_nothing(python) -> None:
    """`import vtzoo` loads none of the heavy packages, and no module of its own."""
    ran = python("import sys, vtzoo; print([m for m in sys.modules if m.startswith('vtzoo.')])")
    assert ran.stdout.strip() == "[]"


def test_the_packages_own_example_runs() -> None:
    """The lines in the package's docstring name what is there, offline."""
    lines = [x.strip() for x in (library.__doc__ or "").splitlines() if x.startswith("    ")]
    assert len(lines) == 3
    exec("\n".join(lines))


def test_public_names() -> None:
    """Every public name is found, listed by dir(), sorted, and is no submodule of the same name."""
    modules = {m.name for m in pkgutil.iter_modules(library.__path__)}
    assert sorted(library.__all__) == library.__all__
    assert dir(library) == library.__all__
    assert set(library.__all__) & modules == set()
    assert set(library._HOME) == set(library.__all__) - {"__version__"}
    for name in library.__all__:
        assert getattr(library, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = library.trian
