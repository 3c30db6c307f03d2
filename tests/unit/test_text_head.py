"""The classifier that a text tower makes: made once while nothing changes, and the same wherever it is asked for."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
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


def stale(model: Any) -> float:
    """How far what it answers with is from what the tower says."""
    with torch.inference_mode():
        return float((model.clip_head.layer()[0] - model.clip_head.computed()[0]).abs().max())


def test_other_tensors_in_the_same_memory_are_seen(model: Any) -> None:
    """What stands in for parameters for one pass is freed after it; what comes next in its place is another."""
    own = {n: p.detach() for n, p in model.named_parameters()}
    x = families.batch("dual")

    def scaled(by: float) -> Tensor:
        return functional_call(model, {**own, "logit_scale": own["logit_scale"] + by}, (x,))

    found = [scaled(by) for by in (0.0, 1.0, 2.0)]
    for by, logits in enumerate(found):
        assert torch.allclose(logits, found[0] * math.exp(by), rtol=1e-9)


def test_what_was_made_for_answers_alone_serves_training(model: Any) -> None:
    """W that a pass in inference mode made takes part in one with gradients."""
    model.requires_grad_(False)
    with torch.inference_mode():
        model(families.batch("dual"))
    x = families.batch("dual").requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None


def test_lower_precision_is_not_kept(model: Any) -> None:
    """W that was made under autocast is none for a pass without it, nor for a file."""
    model.float().requires_grad_(False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(families.batch("dual").float())
    assert stale(model) == 0


def test_dropout_is_not_kept(model: Any) -> None:
    """W of a training pass, in which text grafts drop numbers, is none for evaluation."""
    inject(model, "lora[targets=text.qkv,dropout=0.5]")
    families.perturb(tensors_of(model))
    with torch.inference_mode():
        model.train()(families.batch("dual"))
    model.eval()
    assert stale(model) == 0


def test_without_a_text_tower_nothing_is_said() -> None:
    """An image classifier can't be told names."""
    model: Any = families.build("dual", text=False)
    with pytest.raises(UsageError, match="has no text tower"):
        model.speak(WORDS)
