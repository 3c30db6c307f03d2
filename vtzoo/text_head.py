"""The classifier that a text tower makes of class names (zero-shot; Radford et al. 2021, arXiv:2103.00020, section 3.1.2).

    logits = exp(s) f T' + b,   f = the image's embedding,  T_c = mean over templates of the texts' embeddings; f and T normalised

It is linear over normalised features, W = exp(s) T. W is computed once and kept for as long as nothing that it depends on changes; what
is written past autograd, through a tensor's `.data`, nobody sees: `speak` again after that.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.graft import named_grafts
from vtzoo.speech import TEXT, prompts
from vtzoo.text_tower import causal

ROWS = 256
"""Texts at once, where no gradient is wanted."""


class Spoken(nn.Module):
    """What every classifier has that a text tower makes of class names.

    Args:
        model: the dual encoder that it is the classifier of.
        words: class names as the prompts say them.
        templates: around them.
        ids: the prompts' tokens, [classes, prompts, context]; see `vtzoo.speech`.
    """

    model: Any
    ids: Tensor

    def __init__(self, model: Any, words: Sequence[str], templates: Sequence[str], ids: Tensor) -> None:
        super().__init__()
        self.__dict__["model"] = model
        self.words, self.templates = tuple(words), tuple(templates)
        self.in_features, self.out_features = int(model.embed_dim), len(words)
        self.register_buffer("ids", _cut(model.text, ids.to(model.logit_scale.device)), persistent=False)

    def texts(self, ids: Tensor | None = None) -> Tensor:
        """The embeddings of prompts, not normalised: [classes, prompts, embed_dim]."""
        ids = self.ids if ids is None else ids
        flat, whole = ids.flatten(0, 1), torch.is_grad_enabled() or torch.compiler.is_compiling()
        found = torch.cat([self.model.text(part) for part in ([flat] if whole else flat.split(ROWS))])
        return found.unflatten(0, (-1, ids.shape[1])).to(self.model.logit_scale.dtype)

    def scaled(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """W and b of classes' normalised embeddings, [classes, ..., embed_dim]."""
        model = self.model
        count = features.shape[0]
        bias = features.new_zeros(count) if model.logit_bias is None else model.logit_bias.expand(count)
        return model.logit_scale.exp() * features, bias

    @torch.no_grad()
    def zero_shot(self) -> tuple[Tensor, Tensor]:
        """W and b of the class names in their templates, whatever the prompts are now."""
        ids = prompts(self.model.tokenize, self.words, self.templates, self.model.text.context_length)
        return self.scaled(_mean(self.texts(_cut(self.model.text, ids.to(self.ids.device)))))


class TextHead(Spoken):
    """Image embeddings [n, embed_dim], normalised -> logits [n, classes].

    What it holds for a file is W [classes, embed_dim] and b [classes], as a linear layer does. Its arguments are those of `Spoken`.
    Subclasses that make something else of the texts say so in `computed`, and by which names it is held in `held`.
    """

    held = ("weight", "bias")
    weight: Tensor
    bias: Tensor

    def __init__(self, model: Any, words: Sequence[str], templates: Sequence[str], ids: Tensor) -> None:
        super().__init__(model, words, templates, ids)
        like = model.logit_scale
        for name, shape in zip(self.held, self.shapes(), strict=True):
            self.register_buffer(name, torch.zeros(shape, device=like.device, dtype=like.dtype))
        self._known: tuple[Any, ...] = ()
        self._own: list[tuple[Tensor, Tensor]] | None = None

    def prompted(self, ids: Tensor) -> Self:
        """The same classes with other prompts."""
        return type(self)(self.model, self.words, self.templates, ids)

    def forward(self, x: Tensor) -> Tensor:
        """Compare with every class."""
        return F.linear(x, *self.layer())

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of W and b."""
        return (self.out_features, self.in_features), (self.out_features,)

    def computed(self) -> tuple[Tensor, Tensor]:
        """W and b, made now."""
        return self.scaled(_mean(self.texts()))

    def layer(self) -> tuple[Tensor, Tensor]:
        """W and b; with gradients where something is trained."""
        if self._own:
            return self._own[0]
        if self._known and self._known == self._key():
            weight, bias = (getattr(self, name) for name in self.held)
            return weight, bias
        weight, bias = self.computed()
        if self._own is not None:
            self._own.append((weight, bias))
        if not weight.requires_grad and not torch.compiler.is_compiling():
            with torch.inference_mode(mode=False):  # they may be wanted by a pass with gradients
                for name, value in zip(self.held, (weight, bias), strict=True):
                    setattr(self, name, value.detach().clone())
            self._known = self._key()
        return weight, bias

    @contextmanager
    def once(self) -> Generator[None]:
        """Within it W and b are made once, gradients and all, however often they are asked for."""
        self._own = []
        try:
            yield
        finally:
            self._own = None

    @torch.no_grad()
    def linear(self) -> nn.Linear:
        """The same as a plain layer, to be trained on."""
        made = nn.Linear(self.in_features, self.out_features, device=self.weight.device, dtype=self.weight.dtype)
        for place, value in zip((made.weight, made.bias), self.layer(), strict=True):
            place.copy_(value)
        return made

    def _key(self) -> tuple[Any, ...]:
        """What W depends on, as it is now; nothing where it may not be kept."""
        if torch.compiler.is_compiling():
            return ()
        model, learned = self.model, named_grafts(self.model)
        roots = {p for p, _ in learned if "." not in p.rstrip(".")}
        inside = (TEXT, "logit_", *roots)
        found = [t for n, t in model.named_parameters(remove_duplicate=False) if n.startswith(inside)]
        if any(t.requires_grad for t in found) and not torch.is_inference_mode_enabled():
            return ()  # a pass that is watched must be seen to run it
        found += [t for n, t in model.named_buffers() if n.startswith(inside)]
        drops = any(p.startswith(inside) and child.training for p, child in learned)
        kind = self.ids.device.type
        cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        made = (*(getattr(self, name) for name in self.held), self.ids)
        return drops, cast, *(_Seen(t) for t in (*found, *made))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": ()}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with torch.no_grad():
            self.layer()
        super()._save_to_state_dict(destination, prefix, keep_vars)


class _Seen:  # noqa: PLW1641 - what is equal today may not be tomorrow
    """A tensor as it was: equal while it is that very one, and nothing was written into it."""

    def __init__(self, tensor: Tensor) -> None:
        self.own, self.version = ref(tensor), -1 if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Seen) and self.version == other.version and self.own() is other.own() is not None


def _mean(texts: Tensor) -> Tensor:
    """Of the embeddings of each class's prompts, [classes, prompts, embed_dim] -> [classes, embed_dim], normalised."""
    return F.normalize(F.normalize(texts, dim=-1).mean(1), dim=-1)


def _cut(tower: Any, ids: Tensor) -> Tensor:
    """Prompts without what stands behind the longest text's end, where that makes no difference."""
    if not causal(tower):
        return ids
    if tower.pool_type == "argmax":
        return ids[..., : int(ids.argmax(-1).max()) + 1]
    return ids[..., : int((ids == tower.eos_id).int().argmax(-1).max()) + 1]
