"""The classifier that a text tower makes: made once while nothing changes, and the same wherever it is asked for."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests import families
from vtzoo.errors import UsageError
from vtzoo.graft import tensors_of
from vtzoo.live import inject
from vtzoo.speech import prompts

WORDS = ("cat", "dog", "emu")


@pytest.fixture
def model() -> Any:
    """A tiny dual encoder that knows three classes."""
    made: Any = families.build("dual")
    return made.speak(WORDS)


def ran(model: Any) -> list[int]:
    """How many texts the tower is given, call by call from now on."""
    seen: list[int] = []
    model.text.register_forward_hook(lambda _m, args, _y: seen.append(len(args[0])))
    return seen


@torch.no_grad()
def test_it_is_the_mean_over_templates(model: Any) -> None:
    """W = exp(s) T, T the normalised mean of the texts' normalised embeddings, of whole contexts."""
    model.speak(WORDS, ["a {}.", "the big {}"])
    ids = prompts(model.tokenize, WORDS, ["a {}.", "the big {}"], model.text.context_length)
    features = F.normalize(torch.stack([F.normalize(model.text(row), dim=-1).mean(0) for row in ids]), dim=-1)
    x = families.batch("dual")
    image = F.normalize(model.image_proj(model.fc_norm(model.pool(model.forward_features(x)))), dim=-1)
    assert torch.allclose(model(x), model.logit_scale.exp() * image @ features.T, rtol=1e-12)


@torch.no_grad()
def test_texts_are_cut_behind_the_longest(model: Any) -> None:
    """Fewer tokens go through the tower, and its answer is that of whole contexts."""
    ids = prompts(model.tokenize, WORDS, ["a photo of a {}."], model.text.context_length)
    assert model.clip_head.ids.shape[-1] < ids.shape[-1] == model.text.context_length
    assert torch.allclose(model.clip_head.texts(), model.clip_head.texts(ids), rtol=1e-12)


def test_it_is_made_once_while_nothing_changes(model: Any) -> None:
    """Where the tower is frozen it runs once, whatever is trained of the images, and again when a number of it moves."""
    inject(model, "lora[rank=2]")
    seen, x = ran(model), families.batch("dual")
    for _ in range(3):
        model.train()(x).sum().backward()
    with torch.inference_mode():
        model.eval()(x)
    assert len(seen) <= 1
    before = model(x)
    with torch.no_grad():
        model.text.ln_final.weight.mul_(-1.5)
    assert not torch.allclose(model(x), before)


def test_a_trained_context_is_followed(model: Any) -> None:
    """Every training step runs the tower; a pass over test images runs it once, and not at all while nothing moves."""
    inject(model, "coop")
    seen, x = ran(model), families.batch("dual")
    for _ in range(2):
        model.train()(x).sum().backward()
    assert len(seen) == 2
    with torch.inference_mode():
        first, again = model.eval()(x), model(x)
    assert len(seen) == 3
    families.perturb(tensors_of(model))
    with torch.inference_mode():
        moved = model(x)
    assert torch.equal(first, again)
    assert not torch.allclose(first, moved)


def test_its_state_is_what_it_computes(model: Any) -> None:
    """A state dict has W and b of the tower as it is now, and no token ids."""
    with torch.no_grad():
        model.text.ln_final.weight.mul_(1.5)
        state: dict[str, Tensor] = {n: t for n, t in model.state_dict().items() if n.startswith("clip_head.")}
        x = families.batch("dual")
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        assert sorted(state) == ["clip_head.bias", "clip_head.weight"]
        assert torch.equal(F.linear(features, *(state[f"clip_head.{n}"] for n in ("weight", "bias"))), model(x))


def test_copies_follow_their_own_tower(model: Any) -> None:
    """A copy, or what comes out of a pickle, answers alike, and not for the tower that it was copied from."""
    x = families.batch("dual")
    before = model(x).detach()
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(made) is type(model)
        assert torch.equal(made(x), before)
        with torch.no_grad():
            made.text.ln_final.weight.mul_(-1.5)
        assert not torch.allclose(made(x), before)
    assert torch.equal(model(x), before)


def test_without_a_text_tower_nothing_is_said() -> None:
    """An image classifier can't be told names."""
    model: Any = families.build("dual", text=False)
    with pytest.raises(UsageError, match="has no text tower"):
        model.speak(WORDS)
