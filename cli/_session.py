"""What the global options say, and the two things every command needs: the zoo and a place for its result."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vtzoo import machine
from vtzoo.errors import UsageError
from vtzoo.refs import as_path, is_path

from . import _render
from ._blocks import Block

if TYPE_CHECKING:
    from vtzoo.zoo import Zoo


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One run of the program: its global options, and the line that was typed.

    Attributes:
        awaited: digests of the images that may be trained on; empty for any.
        again: whether it is a recorded line that is run once more, and prints nothing.
    """

    zoo_path: Path | None = None
    json: bool = False
    command: str = ""
    awaited: tuple[str, ...] = ()
    again: bool = False

    @classmethod
    def of(cls, ctx: typer.Context) -> "Session":
        """Give the session that the program's callback left in the context."""
        return ctx.find_object(cls) or cls()

    def zoo(self, *refs: str) -> "Zoo":
        """Find the zoo that `--zoo`, the environment or the working folder says.

        Raises:
            NotFound: there is none, or a ref means nothing in it: said now, before a verb loads torch.
        """
        from vtzoo.zoo import Zoo

        zoo = Zoo.find(self.zoo_path)
        zoo.command = self.command
        for ref in refs:
            if is_path(ref):
                as_path(ref)
            else:
                with suppress(UsageError):  # whether an unclear ref will do is for the verb to say
                    zoo.resolve(ref)
        return zoo

    def show(self, result: Any, view: Callable[[Any], list[Block]]) -> None:
        """Print a result, once for all processes that made it: one JSON document with `--json`, else its human form."""
        if self.again or not machine.first():
            return
        facts = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
        if self.json:
            _render.document(facts)
        else:
            _render.blocks(view(facts))


def optional(ctx: typer.Context) -> str | None:
    """The one optional argument of a list, as it was typed: declared to Typer it would cost loading pydantic.

    Raises:
        UsageError: there are several.
    """
    if len(ctx.args) > 1:
        raise UsageError(f"one name at most, not {len(ctx.args)}: {' '.join(ctx.args)}", f"{ctx.command_path} --help")
    return ctx.args[0] if ctx.args else None
