"""`vtzoo demo`."""

from pathlib import Path
from typing import Annotated

import typer

from . import _results
from ._session import Session

EXAMPLES = ("vtzoo demo", "vtzoo demo --out /data/demo")


def run(
    ctx: typer.Context,
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the demo's zoo and files go.")] = Path(
        "demo"
    ),
) -> None:
    """Do the whole main job once, offline, in minutes.

    Four deltas are trained with four methods, three merged, folded, distilled and exported to ONNX; all of it is
    checked, and lands in a zoo.
    """
    from vtzoo.verbs.demo import demo

    Session.of(ctx).show(demo(out=out), _results.demo)
