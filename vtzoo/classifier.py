"""Which modules of a network are its classifier; duck-typed, as timm's networks tell it."""

from typing import Any

from torch import nn

from vtzoo.graft import own_tensors


def head_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules that `num_classes=0` removes: the classifier, at times a norm or a second one beside it."""
    try:
        found: Any = model.get_classifier()  # type: ignore[operator] - a method of timm models
    except AttributeError:  # no timm model, or one whose head is gone with what stands in it
        return ()
    wanted = [m for m in (found if isinstance(found, tuple | list) else [found]) if isinstance(m, nn.Module)]
    named = dict(model.named_modules())
    names = {n for n, m in named.items() if any(m is w for w in wanted)}
    inside = tuple(n + "." for n in names)
    names |= {owner for owner in _removed(model) if not f"{owner}.".startswith(inside)}
    return tuple(n for n in named if n in names)


def _removed(model: nn.Module) -> set[str]:
    """The modules whose own tensors `reset_classifier(0)` takes away, tried on a copy of its structure."""
    bare: Any = _skeleton(model)
    try:
        bare.reset_classifier(0)
    except Exception:  # noqa: BLE001 - some models have none, or can't do without a classifier
        return set()
    kept = {n for n, m in bare.named_modules() if own_tensors(m)}
    return {n for n, m in model.named_modules() if own_tensors(m) and n not in kept}


def _skeleton(module: nn.Module) -> nn.Module:
    """The same modules anew around the same tensors: changing its structure leaves the model alone."""
    made = object.__new__(type(module))  # copy.copy would build a sharded module (FSDP2) from nothing
    made.__dict__.update(module.__dict__)
    inner = {n: m and _skeleton(m) for n, m in module._modules.items()}
    made.__dict__.update(_parameters=dict(module._parameters), _buffers=dict(module._buffers), _modules=inner)
    return made
