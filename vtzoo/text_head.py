"""The classifier that a text tower makes of class names (zero-shot; Radford et al. 2021, arXiv:2103.00020, section 3.1.2).

    logits = exp(s) f T' + b,   f = the image's embedding,  T_c = mean over templates of the texts' embeddings; f and T normalised

It is linear over normalised features, W = exp(s) T. W is computed once and kept for as long as nothing that it depends on changes.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo.graft import named_grafts
from vtzoo.speech import TEXT
from vtzoo.text_tower import causal

ROWS = 256
"""Texts at once, where no gradient is wanted."""


class TextHead(nn.Module):
    """Image embeddings [n, embed_dim], normalised -> logits [n, classes].

    Args:
        model: the dual encoder that it is the classifier of.
        words: class names as the prompts say them.
        templates: around them.
        ids: the prompts' tokens, [classes, prompts, context]; see `vtzoo.speech`.

    What it holds for a file is W [classes, embed_dim] and b [classes], as a linear layer does.
    """

    model: Any
    weight: Tensor
    bias: Tensor
    ids: Tensor

    def __init__(self, model: Any, words: Sequence[str], templates: Sequence[str], ids: Tensor) -> None:
        super().__init__()
        self.__dict__["model"] = model
        self.words, self.templates = tuple(words), tuple(templates)
        self.in_features, self.out_features = int(model.embed_dim), len(words)
        like = model.logit_scale
        self.register_buffer("ids", _cut(model.text, ids), persistent=False)
        self.register_buffer("weight", torch.zeros(len(words), self.in_features, device=like.device, dtype=like.dtype))
        self.register_buffer("bias", torch.zeros(len(words), device=like.device, dtype=like.dtype))
        self._known: tuple[Any, ...] = ()

    def prompted(self, ids: Tensor) -> Self:
        """The same classes with other prompts."""
        return type(self)(self.model, self.words, self.templates, ids).to(self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Compare with every class."""
        return F.linear(x, *self.layer())

    def layer(self) -> tuple[Tensor, Tensor]:
        """W and b; with gradients where something is trained."""
        if self._known and self._known == self._key():
            return self.weight, self.bias
        weight, bias = self.computed()
        if not weight.requires_grad and not torch.compiler.is_compiling():
            self.weight, self.bias = weight.detach().clone(), bias.detach().clone()
            self._known = self._key()
        return weight, bias

    def computed(self) -> tuple[Tensor, Tensor]:
        """W and b, made now."""
        model, texts = self.model, self.texts()
        features = F.normalize(F.normalize(texts, dim=-1).mean(1), dim=-1)
        bias = features.new_zeros(len(features)) if model.logit_bias is None else model.logit_bias.expand(len(features))
        return model.logit_scale.exp() * features, bias

    def texts(self, ids: Tensor | None = None) -> Tensor:
        """The embeddings of prompts, not normalised: [classes, prompts, embed_dim]."""
        ids = self.ids if ids is None else ids
        flat, rows = ids.flatten(0, 1), len(ids) * ids.shape[1] if torch.is_grad_enabled() else ROWS
        found = torch.cat([self.model.text(part) for part in flat.split(rows)])
        return found.unflatten(0, tuple(ids.shape[:2])).to(self.weight.dtype)

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
        own = dict(self.model.named_parameters(remove_duplicate=False))
        roots = {p for p, _ in named_grafts(self.model) if "." not in p.rstrip(".")}
        found = [t for n, t in own.items() if n.startswith((TEXT, "logit_", *roots))]
        if any(t.requires_grad for t in found) and not torch.is_inference_mode_enabled():
            return ()  # a pass that is watched must be seen to run it
        made = (self.weight, self.bias, self.ids)
        return tuple((id(t), -1 if t.is_inference() else t._version) for t in (*found, *made))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with torch.no_grad():
            self.layer()
        super()._save_to_state_dict(destination, prefix, keep_vars)


def _cut(tower: Any, ids: Tensor) -> Tensor:
    """Prompts without what stands behind the longest text's end, where that makes no difference."""
    if not causal(tower):
        return ids
    if tower.pool_type == "argmax":
        return ids[..., : int(ids.argmax(-1).max()) + 1]
    return ids[..., : int((ids == tower.eos_id).int().argmax(-1).max()) + 1]
