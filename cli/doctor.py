"""`vtzoo doctor`."""

import platform
import re
import shutil
import sys
from typing import Any

import typer

import vtzoo
from vtzoo.errors import VtzooError

from ._blocks import Block, Line, Table, size
from ._session import Session

USED = frozenset(
    {"always", "gs", "hfds", "onnx", "s3", "sign", "ssh"}
)  # extras that a verb asks for; the others wait for theirs
EXAMPLES = ("vtzoo doctor", "vtzoo doctor --json")
_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(?:\[[^\]]*\])?\s*(?P<wanted>[^;]*?)\s*(?:;.*extra == ['\"](?P<extra>\w+)['\"])?"
)


def run(ctx: typer.Context) -> None:
    """Say what is installed, what is missing, and which zoo."""
    session = Session.of(ctx)
    facts = {
        "vtzoo": vtzoo.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "zoo": _zoo(session),
        "packages": _packages(),
    }
    session.show(facts, _view)


def _zoo(session: Session) -> dict[str, Any]:
    try:
        zoo = session.zoo()
        counts = {section: len(zoo.entries(section)) for section in ("backbones", "deltas", "models")}
    except VtzooError as error:
        return {"path": "", "problem": str(error), "hint": error.hint}
    there = next(p for p in (zoo.root, *zoo.root.parents) if p.exists())
    return {"path": str(zoo.root), "problem": "", "free_bytes": shutil.disk_usage(there).free, **counts}


def _packages() -> list[dict[str, str]]:
    """Every requirement that some verb has, with the version that is here; empty when missing."""
    from importlib.metadata import requires

    rows: dict[str, dict[str, str]] = {}
    for text in requires("vtzoo") or ():
        found = _REQUIREMENT.fullmatch(text)
        if found is None or found["name"] == "vtzoo" or (found["extra"] or "always") not in USED:
            continue
        name, purpose = found["name"], found["extra"] or "always"
        rows.setdefault(name, {"name": name, "wanted": found["wanted"], "for": purpose, "version": _version(name)})
    return list(rows.values())


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _view(facts: dict[str, Any]) -> list[Block]:
    rows = [(p["name"], p["wanted"], p["version"] or "missing", p["for"]) for p in facts["packages"]]
    missing = sorted({p["for"] for p in facts["packages"] if not p["version"]})
    lines = [
        Line(f"vtzoo {facts['vtzoo']}, Python {facts['python']}, {facts['platform']}"),
        Line(_zoo_line(facts["zoo"])),
        Table(("package", "wanted", "here", "for"), rows),
    ]
    hints = [Line(f"for {extra}: pip install 'vtzoo[{extra}]'") for extra in missing if extra != "always"]
    return [*lines, *hints]


def _zoo_line(zoo: dict[str, Any]) -> str:
    if zoo["problem"]:
        return f"zoo: {zoo['problem']} ({zoo['hint']})"
    counts = ", ".join(f"{zoo[section]} {section}" for section in ("backbones", "deltas", "models"))
    return f"zoo: {zoo['path']} ({counts}; {size(zoo['free_bytes'])} free)"
