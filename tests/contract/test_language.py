"""Methods of a dual encoder's text tower: where they start, what they train, and that their folds are what runs; printed with VTZOO_SHOW=1."""

import os

import pytest
import torch
from torch import Tensor

from tests import families
from tests.contract.cases import logits, relative
from vtzoo import registry
from vtzoo.folding import fold
from vtzoo.graft import tensors_of
from vtzoo.installed import head_state
from vtzoo.live import attach, extract, inject, trainable

GROUPS = ("prompt/language-driven", "prompt/vision-language")
PROMPTS = [c.name for c in registry.cards("methods") if c.group in GROUPS and c.name != "zero-shot"]
FOLDING = (
    "zero-shot", "coop", "coop[per_class=true]", "coop[init=,context=3,position=middle]", "coop[position=front]", "kgcoop", "prograd", "task-residual", "linear",
    "lora[rank=2,targets=text.qkv|text.mlp]", "lora[rank=2,targets=auto|text.auto]", "coop+lora[rank=2]",
)  # fmt: skip


def show(capsys: pytest.CaptureFixture[str], *said: object) -> None:
    """Print a line where it is wanted."""
    if os.environ.get("VTZOO_SHOW"):
        with capsys.disabled():
            print("\n", *said, end="")


def perturbed(spec: str, dtype: torch.dtype) -> torch.nn.Module:
    """A dual encoder with a delta of which nothing is at its start."""
    model = inject(families.build("dual", dtype=dtype), spec, batches=families.labelled("dual", dtype=dtype))
    families.perturb(tensors_of(model))
    families.perturb({n: p for n, p in head_state(model).items() if n in trainable(model)}, seed=2)
    return model


def test_three_starts_are_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Zero-shot, coop and task-residual give the same logits before anything is learned."""
    x = families.batch("dual")
    first = logits(inject(families.build("dual"), "zero-shot"), x)
    for spec in ("coop", "coop[per_class=true]", "task-residual"):
        other = logits(inject(families.build("dual"), spec), x)
        show(capsys, f"{spec} beside zero-shot: largest difference of logits {float((first - other).abs().max()):.1e}")
        assert torch.equal(first, other) if spec != "task-residual" else relative(first, other) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("spec", FOLDING)
def test_a_fold_is_what_runs(spec: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    """An image classifier with folded weights gives what the live network with its text tower gives, also once the delta is attached anew."""
    x, base = families.batch("dual", dtype=dtype), families.build("dual", dtype=dtype).state_dict()
    live = perturbed(spec, dtype)
    wanted, delta = logits(live, x), extract(live)
    folded = fold(base, delta)
    plain = families.build("dual", dtype=dtype, **folded.all_args)
    plain.load_state_dict(dict(folded))
    again = attach(families.build("dual", dtype=dtype), delta)
    found = relative(wanted, logits(plain, x))
    show(capsys, f"{spec}, {str(dtype).removeprefix('torch.')}: fold beside live {found:.1e} of the largest logit")
    assert plain.text is None
    assert found < (1e-13 if dtype == torch.float64 else 1e-5)
    assert relative(wanted, logits(again, x)) < (1e-13 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("method", PROMPTS)
def test_gradients_reach_prompts_alone(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every tensor that the method owns gets a gradient that is not zero, and nothing else has one."""
    model = perturbed(method, torch.float64)
    own: dict[str, Tensor] = {
        **tensors_of(model),
        **{n: p for n, p in head_state(model).items() if n in trainable(model)},
    }
    model.train()(families.batch("dual")).square().sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    least = min(float(p.grad.abs().max()) for n, p in model.named_parameters() if n in reached)
    show(capsys, f"{method}: {len(reached)} of {len(own)} tensors reached, the least by {least:.1e}; nothing else")
    assert reached == {n for n in own if n in trainable(model)}
    assert least > 0
