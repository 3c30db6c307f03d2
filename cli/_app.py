"""The Typer application: every verb in the order of a day's work, each with examples and the global options."""

from typing import Any

import typer

from . import (
    add,
    bench,
    card,
    demo,
    diff,
    distill,
    doctor,
    du,
    eval,  # noqa: A004 - modules are named like their verbs
    export,
    fold,
    fsck,
    gc,
    import_,
    init,
    inits,
    log,
    losses,
    ls,
    merge,
    merges,
    methods,
    mv,
    predict,
    pull,
    push,
    report,
    reproduce,
    rm,
    sensitivity,
    show,
    sign,
    suggest,
    sweep,
    sync,
    train,
    verify,
    zero_shot,
)
from ._argv import GLOBALS

HELP = """One frozen vision backbone, many small tasks.

Train small deltas on it, merge them, fold them into plain weights, distil them into a small student, export ONNX.
"""
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_VERBS = (
    demo, init, ls, show, log, diff, card, reproduce, suggest, sensitivity, train, zero_shot, sweep, report, eval, predict, bench, merge, fold, distill, methods, merges, losses, inits, rm, mv, du, gc, fsck, verify, sign, push, pull, sync, doctor,
)  # fmt: skip
_GROUPS = (add, export, import_)
_ALSO = "Also, before or after the verb: --zoo DIR --json --offline --quiet --no-color (vtzoo --help)."


def _block(title: str, *lines: str) -> str:
    return "\b\n" + "\n  ".join((title, *lines))


def _epilog(examples: tuple[str, ...]) -> str:
    return f"{_block('Examples:' if len(examples) > 1 else 'Example:', *examples)}\n\n{_ALSO}"


def _root_epilog() -> str:
    names = {name: f"{name} DIR" if name == "--zoo" else name for name in GLOBALS}
    options = _block("Before or after the verb:", *(f"{names[n]:<12}{text}" for n, text in GLOBALS.items()))
    return f"{options}\n\n{_block('Examples:', 'vtzoo demo', 'vtzoo ls --json', 'vtzoo train --help')}"


def _name(module: object) -> str:
    return str(getattr(module, "__name__", "")).rpartition(".")[2].rstrip("_").replace("_", "-")


def build(*, help_option: bool = True) -> typer.Typer:
    """Put the application together; without the help option where nobody asked for help, to spare its decoding."""
    common: dict[str, Any] = {"context_settings": _SETTINGS, "add_help_option": help_option}
    group: dict[str, Any] = {**common, "rich_markup_mode": None, "add_completion": False}
    app = typer.Typer(name="vtzoo", help=HELP, epilog=_root_epilog(), pretty_exceptions_enable=False, **group)
    for module in _VERBS:
        settings: dict[str, Any] = {**common, "epilog": _epilog(module.EXAMPLES)}
        usage = getattr(module, "USAGE", None)  # an argument that Typer does not know: see `_session.optional`
        if usage is not None:
            settings["options_metavar"] = f"[OPTIONS] {usage}"
            settings["context_settings"] = {**_SETTINGS, "allow_extra_args": True}
        app.command(_name(module), **settings)(module.run)
    for module in _GROUPS:
        sub = typer.Typer(help=module.__doc__, **group)
        for word, run, examples in module.COMMANDS:
            sub.command(word, epilog=_epilog(examples), **common)(run)
        app.add_typer(sub, name=_name(module))
    return app
