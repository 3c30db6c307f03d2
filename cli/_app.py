"""The Typer application: global options, and every verb in the order of a day's work."""

import platform
from pathlib import Path
from typing import Annotated

import typer

import vtzoo

from . import (
    _render,
    add,
    demo,
    distill,
    doctor,
    eval,
    export,
    fold,
    init,
    losses,
    ls,
    merge,
    merges,
    methods,
    mv,
    predict,
    rm,
    show,
    train,
)
from ._session import Session

HELP = """One frozen vision backbone, many small tasks.

Train small deltas on it, merge them, fold them into plain weights, distil them into a small student, export ONNX.
"""
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_VERBS = (demo, init, ls, show, train, eval, predict, merge, fold, distill, methods, merges, losses, rm, mv, doctor)
_GROUPS = (add, export)

app = typer.Typer(
    name="vtzoo", help=HELP, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=_SETTINGS
)


def _version(ctx: typer.Context, wanted: bool) -> None:
    if not wanted:
        return
    if ctx.params.get("json"):
        _render.document({"name": "vtzoo", "version": vtzoo.__version__, "python": platform.python_version()})
    else:
        _render.text(f"vtzoo {vtzoo.__version__}")
    raise typer.Exit


def _epilog(*examples: str) -> str:
    lines = "\n".join(f"  {line}" for line in examples)
    return f"\b\n{'Examples' if len(examples) > 1 else 'Example'}:\n{lines}"


def _global_epilog(*examples: str) -> str:
    return (
        f"{_epilog(*examples)}\n\nAlso, before or after the verb: --zoo DIR --json --quiet --no-color (vtzoo --help)."
    )


@app.callback(epilog=_epilog("vtzoo demo", "vtzoo ls --json", "vtzoo train --help"))
def _globals(
    ctx: typer.Context,
    *,
    zoo: Annotated[
        Path | None, typer.Option("--zoo", metavar="DIR", help="Which zoo (default: see vtzoo doctor).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", is_eager=True, help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No talk and no progress on stderr.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours (so does the variable NO_COLOR).")] = False,
    version: Annotated[  # noqa: ARG001 - its callback answers
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and stop.")
    ] = False,
) -> None:
    _render.setup(quiet=quiet, color=not no_color)
    ctx.obj = Session(zoo_path=zoo, json=json, command=str(ctx.obj or ""))


for _module in _VERBS:
    app.command(_module.__name__.rpartition(".")[2], epilog=_global_epilog(*_module.EXAMPLES))(_module.run)
for _module in _GROUPS:
    _group = typer.Typer(rich_markup_mode=None, help=_module.__doc__, context_settings=_SETTINGS)
    for _name, _run, _examples in _module.COMMANDS:
        _group.command(_name, epilog=_global_epilog(*_examples))(_run)
    app.add_typer(_group, name=_module.__name__.rpartition(".")[2])
