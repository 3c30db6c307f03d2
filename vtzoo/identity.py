"""Whether a live model is the backbone that a delta was made for: the same tensors, and its sites in the same places."""

from dataclasses import replace

from torch import nn

from vtzoo.anatomy import Anatomy
from vtzoo.classifier import head_names
from vtzoo.delta import Delta
from vtzoo.errors import ShapeMismatch, WrongBackbone
from vtzoo.fingerprint import fingerprint_of
from vtzoo.graft import own_parameters
from vtzoo.spec import BackboneCard

CARD, LOADED, RESIZED = "vtzoo_card", "_vtzoo_loaded", "_vtzoo_resized"
"""What `build` leaves on a model: its card, the fingerprint of what was loaded, and the tensors made for another input size."""


def check_backbone(model: nn.Module, delta: Delta) -> None:
    """Refuse a delta made for other weights.

    Raises:
        WrongBackbone: the fingerprints differ.
    """
    card = card_on(model)
    if delta.backbone.fingerprint != card.fingerprint:
        raise WrongBackbone(
            f"the delta was made for {delta.backbone.name or delta.backbone.arch} ({delta.backbone.fingerprint[:19]}…), "
            f"this backbone is {card.name or card.arch} ({card.fingerprint[:19]}…)",
            f"build its own backbone: vtzoo show {delta.backbone.name or 'REF'}",
        )


def card_on(model: nn.Module) -> BackboneCard:
    """What `build` left on a model, as long as the model still holds what was loaded; else its present tensors' own."""
    live = fingerprint_of(model)
    card: BackboneCard = getattr(model, CARD, None) or BackboneCard(
        name="", arch=type(model).__name__, head=head_names(model), model_args=getattr(model, "model_args", {})
    )
    return card if model.__dict__.get(LOADED) == live else replace(card, fingerprint=live)


def check_places(model: nn.Module, delta: Delta, anatomy: Anatomy) -> None:
    """Refuse a model in which the delta's sites have another shape, or which has other blocks."""
    modules = dict(model.named_modules())
    towers = [anatomy, *([anatomy.text] if getattr(model, "text", None) is not None else [])]
    live = {s.name: s for a in towers for s in [*a.linears, *a.convs, *a.norms]}
    for part in delta.parts:
        for site in part.sites:
            if site.name not in modules:
                raise ShapeMismatch(
                    f"the delta acts on {site.name}, which this model lacks",
                    f"build {delta.backbone.name or 'its backbone'}",
                )
            now = live.get(site.name)
            shape = (
                now.shape
                if now and site.kind == now.kind
                else anatomy.seen[site.name].y[1:]
                if site.kind == "module" and site.name in anatomy.seen
                else site.shape
            )
            if tuple(shape) != site.shape:
                raise ShapeMismatch(
                    f"{site.name} has shape {list(shape)}, the delta was made for {list(site.shape)}",
                    "build the model at the delta's input size",
                )
            for name, size in {**site.facts.get("params", {}), **site.facts.get("buffers", {})}.items():
                own = own_parameters(modules[site.name]).get(
                    name, dict(modules[site.name].named_buffers(recurse=False)).get(name)
                )
                if own is None or list(own.shape) != list(size):
                    raise ShapeMismatch(
                        f"{site.key(name)} has shape {list(own.shape) if own is not None else None}, the delta was made for {list(size)}",
                        "build the model at the delta's input size",
                    )
