"""The folder is the registry: a file's stem is its public name, its docstring its documentation.

Listing reads files with `ast` and runs nothing; only `load` imports. Third parties add their own through the
entry points `vtzoo.methods`, `vtzoo.merges`, `vtzoo.losses` and `vtzoo.inits`.
"""

import ast
import importlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from vtzoo.errors import NotFound, did_you_mean

Kind = Literal["methods", "merges", "losses", "inits"]


@dataclass(frozen=True, slots=True)
class Knob:
    """One hyper-parameter as written in the source: its name, type and default."""

    name: str
    type: str
    default: str


@dataclass(frozen=True, slots=True)
class Card:
    """What a method, merge, loss or init says about itself without being run; `constants` are the module's own literals."""

    name: str
    summary: str
    doc: str
    group: str
    paper: str
    folds: str
    knobs: tuple[Knob, ...]
    path: str
    constants: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """`yes`, `no` or `when` (under a condition), of the sentence after "Folds:"."""
        first = re.split(r"[\s,;:.]+", self.folds.strip().lower())[0]
        if first in ("", "no", "never", "not"):
            return "no"
        return "yes" if first in ("yes", "exactly", "always", "exact") else "when"


def names(kind: Kind) -> list[str]:
    """The public names of a kind, sorted."""
    return sorted(_sources(kind))


def load(kind: Kind, name: str) -> ModuleType:
    """Import one.

    Raises:
        NotFound: no such name; the hint suggests the nearest.
    """
    return importlib.import_module(_sources(kind)[_known(kind, name)])


def card(kind: Kind, name: str) -> Card:
    """Read one's documentation and knobs from its source, importing nothing.

    Raises:
        NotFound: no such name.
    """
    module = _sources(kind)[_known(kind, name)]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise NotFound(
            f"{kind[:-1]} '{name}' has no source file (module {module})", "reinstall the package that provides it"
        )
    return _read(name, Path(spec.origin))


def cards(kind: Kind) -> list[Card]:
    """All cards of a kind, by name."""
    return [card(kind, name) for name in names(kind)]


def _known(kind: Kind, name: str) -> str:
    known = _sources(kind)
    if name not in known:
        what = {"methods": "method", "merges": "merge", "losses": "loss", "inits": "init"}[kind]
        raise NotFound(f"no {what} is called '{name}'", did_you_mean(name, known) + f" (all: vtzoo {kind})")
    return name


@lru_cache
def _sources(kind: Kind) -> dict[str, str]:
    folder = Path(__file__).parent / kind
    found = {p.stem.replace("_", "-"): f"vtzoo.{kind}.{p.stem}" for p in folder.glob("[!_]*.py")}
    found.update({e.name: e.value for e in entry_points(group=f"vtzoo.{kind}")})
    return found


def _read(name: str, path: Path) -> Card:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    doc = ast.get_docstring(tree) or ""
    constants = {
        t.id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for t in node.targets
        if isinstance(t, ast.Name)
    }
    folds = re.search(r"Folds:\s*((?:.|\n)*?)(?:\n\s*\n|\.\s{2,}|\.\n|\.$|\Z)", doc)
    return Card(
        name=name,
        summary=doc.split("\n", 1)[0].rstrip(".") + ".",
        doc=doc,
        group=str(constants.get("GROUP", "")),
        paper=str(constants.get("PAPER", "")),
        folds=" ".join(folds[1].split()) if folds else "",
        knobs=tuple(_knobs(tree, name, path.parent)),
        path=str(path),
        constants=constants,
    )


def _knobs(tree: ast.Module, name: str, folder: Path) -> list[Knob]:
    """Fields of a `Config` class, or the keyword-only parameters of the function named like the file."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            return list(_fields(node, tree, folder).values())
        if isinstance(node, ast.FunctionDef) and node.name == name.replace("-", "_"):
            args, defaults = node.args.kwonlyargs, node.args.kw_defaults
            pairs = zip(args, defaults, strict=True)
            return [
                Knob(a.arg, ast.unparse(a.annotation) if a.annotation else "", ast.unparse(d) if d else "")
                for a, d in pairs
            ]
    return []


def _fields(made: ast.ClassDef, tree: ast.Module, folder: Path) -> dict[str, Knob]:
    """A class's fields by name, first those of the class that it extends."""
    found: dict[str, Knob] = {}
    for base in made.bases:
        if (extended := _extended(base, tree, folder)) is not None:
            found |= _fields(*extended, folder)
    for field in made.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            default = ast.unparse(field.value) if field.value else ""
            found[field.target.id] = Knob(field.target.id, ast.unparse(field.annotation), default)
    return found


def _extended(base: ast.expr, tree: ast.Module, folder: Path) -> tuple[ast.ClassDef, ast.Module] | None:
    """The class that an expression names, and the file around it: this one, or a helper of the folder that it imports."""
    said, _, inside = ast.unparse(base).partition(".")
    around = tree
    for node in (n for n in tree.body if isinstance(n, ast.ImportFrom)):
        for name in (alias.name for alias in node.names if said == (alias.asname or alias.name)):
            path = folder / f"{(name if inside else node.module or '').rpartition('.')[2]}.py"
            around = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else tree
    named = (n for n in around.body if isinstance(n, ast.ClassDef) and n.name == (inside or said))
    return next(((n, around) for n in named), None)
