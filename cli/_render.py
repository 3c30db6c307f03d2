"""The only file that prints. stdout carries the result; stderr the talk, the progress and the two lines of an error."""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vtzoo import talk

from ._blocks import Block, Line, Table, Tree, indented, plain

LONGEST = 1000
"""Characters of an error's line."""


@dataclass(slots=True)
class _Style:
    color: bool = True
    quiet: bool = False


_style = _Style()


def setup(*, quiet: bool, color: bool) -> None:
    """Take the global options to heart and give the library its voice on stderr."""
    _style.quiet, _style.color = quiet, color and not os.environ.get("NO_COLOR")
    if quiet:
        talk.install(lambda _text: None, lambda items, _label, _total: items)
    else:
        talk.install(say, _track)


def document(value: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(_jsonable(value), indent=2, default=str))


def text(value: str) -> None:
    """Print text on stdout as it is."""
    print(value)


def blocks(content: Iterable[Block]) -> None:
    """Print lines, tables and trees on stdout: drawn by rich on a terminal, in plain columns and levels elsewhere."""
    for block in map(_harmless, content):
        if isinstance(block, Line):
            print(block.text)
        elif sys.stdout.isatty():
            _draw(_tree(block) if isinstance(block, Tree) else _table(block))
        else:
            print("\n".join(indented(block) if isinstance(block, Tree) else plain(block)))


def say(line: str) -> None:
    """Print one line of talk on stderr."""
    if not _style.quiet:
        print(_printable(line), file=sys.stderr, flush=True)


def refuse(message: str, hint: str) -> None:
    """Print an error's two lines on stderr."""
    red, reset = ("\x1b[31m", "\x1b[0m") if _style.color and sys.stderr.isatty() else ("", "")
    print(f"{red}error:{reset} {_one_line(message)}\nhint: {_one_line(hint)}", file=sys.stderr, flush=True)


def _printable(text: str) -> str:
    """A text from anywhere, what isn't printable escaped: a label or name could else move the cursor, or write what a reader takes for ours."""
    return text if text.isprintable() else "\n".join(map(_cell, text.split("\n")))


def _cell(text: str) -> str:
    """Likewise, on one line: a fact in a table could else write the lines below it."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _harmless(block: Block) -> Block:
    if isinstance(block, Line):
        return Line(_printable(block.text))
    if isinstance(block, Tree):
        return _plain_tree(block)
    rows = [tuple(map(_cell, row)) for row in block.rows]
    return Table(tuple(map(_cell, block.columns)), rows, _cell(block.title), frozenset(map(_cell, block.right)))


def _plain_tree(tree: Tree) -> Tree:
    return Tree(_cell(tree.text), [_plain_tree(t) for t in tree.below])


def _one_line(words: str) -> str:
    """On one line that can be read: names in it may be of any length."""
    line = _cell(" ".join(words.split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def _draw(drawn: Any) -> None:
    from rich.console import Console

    Console(no_color=not _style.color, highlight=False).print(drawn)


def _tree(tree: Tree) -> Any:
    from rich.tree import Tree as RichTree

    drawn = RichTree(_escaped(tree.text))
    for below in tree.below:
        drawn.add(_tree(below))
    return drawn


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def _table(table: Table) -> Any:
    from rich import box
    from rich.table import Table as RichTable

    drawn = RichTable(title=table.title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in table.columns:
        drawn.add_column(name, justify="right" if name in table.right else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(_escaped, row))
    return drawn


def _track(items: Iterable[object], label: str, total: int) -> Iterable[object]:
    """Show a progress bar on stderr while items pass, when stderr is a terminal."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True, no_color=not _style.color)
    return track(items, description=label, total=total or None, console=console, transient=True)


def _jsonable(value: Any) -> Any:
    """Strict JSON: numbers that are not finite become null, tuples lists, keys text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(v) for v in value]
    return value
