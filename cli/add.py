"""Keep a backbone or a fine-tuned checkpoint in the zoo."""

from pathlib import Path
from typing import Annotated

import typer

from vtzoo.errors import UsageError

from . import _results
from ._options import FromPickle, numbers
from ._session import Session

New = Annotated[str, typer.Argument(metavar="NAME", help="What to call it in the zoo.")]
Weights = Annotated[Path, typer.Option("--weights", metavar="FILE.safetensors", help="The weights.")]


def backbone(
    ctx: typer.Context,
    *,
    name: New,
    arch: Annotated[str, typer.Option("--arch", metavar="TIMM_ARCH", help="The timm architecture of the weights.")],
    weights: Weights,
    mean: Annotated[str | None, typer.Option("--mean", metavar="R,G,B", help="Of the input, in [0, 1] units.")] = None,
    std: Annotated[str | None, typer.Option("--std", metavar="R,G,B", help="Of the input, in [0, 1] units.")] = None,
    input_size: Annotated[
        str | None, typer.Option("--input-size", metavar="PIXELS|C,H,W", help="Size of the input.")
    ] = None,
    license_: Annotated[str, typer.Option("--license", metavar="SPDX", help="Licence of the weights.")] = "",
    from_pickle: FromPickle = False,
) -> None:
    """Keep a backbone: the weights of a timm architecture, from a file."""
    session = Session.of(ctx)
    pixels = _input_size(input_size)
    means, stds = numbers(mean, "--mean"), numbers(std, "--std")
    from vtzoo.verbs.add import add_backbone

    result = add_backbone(
        name=name,
        arch=arch,
        weights=weights,
        mean=means,
        std=stds,
        input_size=pixels,
        license=license_,
        from_pickle=from_pickle,
        zoo=session.zoo(),
    )
    session.show(result, _results.added)


def delta(
    ctx: typer.Context,
    *,
    name: New,
    backbone: Annotated[str, typer.Option("--backbone", metavar="REF", help="What it was fine-tuned from.")],
    weights: Weights,
    classes: Annotated[Path | None, typer.Option("--classes", metavar="FILE", help="Its labels, one a line.")] = None,
    from_pickle: FromPickle = False,
) -> None:
    """Keep a fine-tuned checkpoint as a full delta of its backbone."""
    session = Session.of(ctx)
    from vtzoo.verbs.add import add_delta

    result = add_delta(
        name=name, backbone=backbone, weights=weights, classes=classes, from_pickle=from_pickle, zoo=session.zoo()
    )
    session.show(result, _results.added)


def _input_size(text: str | None) -> tuple[int, int, int] | None:
    """`224` is square with three channels; `3,224,288` says all."""
    sizes = [int(p) if p.strip().isdecimal() else None for p in text.split(",")] if text is not None else []
    match sizes:
        case []:
            return None
        case [int(side)]:
            return 3, side, side
        case [int(channels), int(height), int(width)]:
            return channels, height, width
        case _:
            raise UsageError(f"--input-size '{text}' is not a size", "write --input-size 224 or --input-size 3,224,224")


COMMANDS = (
    ("backbone", backbone, ("vtzoo add backbone my-vit --arch vit_tiny_patch16_224 --weights vit.safetensors",)),
    ("delta", delta, ("vtzoo add delta pets/full --backbone my-vit --weights pets.safetensors --classes pets.txt",)),
)
