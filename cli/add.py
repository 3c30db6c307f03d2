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
    origin: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="hf-hub:ORG/NAME[@REVISION]|clip:NAME.TAG|FOLDER",
            help="A model of timm or open_clip: of the Hugging Face Hub, of open_clip's list, or a folder (./…).",
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            metavar="TIMM_ARCH|clip:NAME[.TAG]",
            help="The weights' architecture: timm's, or a model of open_clip.",
        ),
    ] = None,
    weights: Annotated[Path | None, typer.Option("--weights", metavar="FILE.safetensors", help="The weights.")] = None,
    mean: Annotated[str | None, typer.Option("--mean", metavar="R,G,B", help="Of the input, in [0, 1] units.")] = None,
    std: Annotated[str | None, typer.Option("--std", metavar="R,G,B", help="Of the input, in [0, 1] units.")] = None,
    input_size: Annotated[
        str | None, typer.Option("--input-size", metavar="PIXELS|C,H,W", help="Size of the input.")
    ] = None,
    license_: Annotated[str, typer.Option("--license", metavar="SPDX", help="Licence of the weights.")] = "",
    from_pickle: FromPickle = False,
) -> None:
    """Keep a backbone: weights from a file, or a model as it was published, of timm or open_clip (image and text)."""
    session = Session.of(ctx)
    pixels = _input_size(input_size)
    means, stds = numbers(mean, "--mean"), numbers(std, "--std")
    if origin is not None:
        _refuse_beside({"--arch": arch, "--weights": weights, "--mean": means, "--std": stds, "--input-size": pixels})
        from vtzoo.verbs.add import add_published

        result = add_published(name=name, source=origin, license=license_, from_pickle=from_pickle, zoo=session.zoo())
        session.show(result, _results.added)
        return
    if arch is None or weights is None:
        lacking = "--arch" if arch is None else "--weights"
        raise UsageError(f"{lacking} is missing", "give --arch and --weights, or --from hf-hub:org/name")
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


def _refuse_beside(options: dict[str, object]) -> None:
    """A model of the hub says these things itself."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"--from and {given[0]} don't go together", "the model's own config says it: leave it out")


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
    (
        "backbone",
        backbone,
        (
            "vtzoo add backbone my-vit --arch vit_tiny_patch16_224 --weights vit.safetensors",
            "vtzoo add backbone dino --from hf-hub:timm/vit_small_patch14_dinov2.lvd142m",
            "vtzoo add backbone b32 --from clip:ViT-B-32.laion2b_s34b_b79k",
        ),
    ),
    ("delta", delta, ("vtzoo add delta pets/full --backbone my-vit --weights pets.safetensors --classes pets.txt",)),
)
