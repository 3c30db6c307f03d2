"""A recorded line, parsed and run by the program's own commands."""

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from vtzoo.errors import UsageError

from ._argv import split
from ._session import Session

if TYPE_CHECKING:
    from vtzoo.again import Line
    from vtzoo.zoo import Zoo


def read(command: str) -> "Line":
    """Parse a recorded line; nothing is run.

    Raises:
        UsageError: it is no line of this program, or of one that makes no artifact.
    """
    from vtzoo.again import Line, check_kept, check_verb

    from ._app import build

    node: Any = typer.main.get_command(build(help_option=False))
    words, verb = _words(command), list[str]()
    while (commands := getattr(node, "commands", None)) is not None:
        if not words or words[0] not in commands:
            raise _foreign(command)
        verb.append(words[0])
        node, words = commands[words[0]], words[1:]
    check_verb(" ".join(verb))
    try:
        ctx = node.make_context(verb[-1], [*words])
    except (typer.TyperException, typer.Exit) as error:
        raise _foreign(command) from error
    line = Line(command=command, verb=" ".join(verb), given=dict(ctx.params), handle=(node, verb[-1], words))
    check_kept(line)
    return line


def verb_of(command: str) -> str:
    """The first word of a recorded line that is no global option; "" of an empty one.

    Raises:
        UsageError: it is no line of this program.
    """
    words = _words(command) if command else []
    return words[0] if words else ""


def run(line: "Line", values: Mapping[str, Any], zoo: "Zoo", awaited: Sequence[str]) -> None:
    """Run a parsed line in a zoo, with some of its values replaced, on images of these digests alone."""
    node, name, words = line.handle
    session = Session(zoo_path=zoo.root, command=line.command, awaited=tuple(awaited), again=True)
    ctx = node.make_context(name, [*words], obj=session)
    ctx.params.update(values)
    node.invoke(ctx)


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise _foreign(command) from error
    if words[:1] != ["vtzoo"]:
        raise _foreign(command)
    return list(split(words[1:]).rest)


def _foreign(command: str) -> UsageError:
    return UsageError(f"the recorded command is no line of this program: {command[:80]}", "nothing was run; see it with: vtzoo show REF")  # fmt: skip
