"""The training loop: exact resume wherever it stops, and what it refuses."""

import copy
import logging
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtzoo import knobs
from vtzoo.devices import accelerator, emulates
from vtzoo.errors import Interrupted, Mismatch, UsageError
from vtzoo.fit import Batch, Plan, _Run, checkpoint_path, fit
from vtzoo.recipe import Recipe

STEPS, EPOCHS = 3, 5
HEAD = frozenset({"4.weight", "4.bias"})
SCORES = (0.2, 0.6, 0.5, 0.4, 0.9)  # with a patience of 2 the run ends after four epochs and keeps the second's weights
RECIPES = {
    "plain": {},
    "patience": {"patience": 2},
    "average": {"ema_decay": 0.9},
    "muon": {"optimizer": "muon"},
    "patience and average": {"patience": 2, "ema_decay": 0.9},
    "probe first": {"probe_epochs": 2, "epochs": EPOCHS - 2},
}


def net() -> nn.Module:
    """A student with running statistics and dropout."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3))


def batches(epoch: int, start: int) -> Iterator[Batch]:
    """Eight rows a step, a function of epoch and step."""
    for step in range(start, STEPS):
        generator = torch.Generator().manual_seed(100 * epoch + step)
        yield torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)


def plan(
    model: nn.Module, checkpoint: Path | None = None, *, stop_at: int = 0, validated: int = 0, **recipe: Any
) -> Plan:
    """A plan that presses Ctrl-C during step `stop_at`, counted from one; `validated` epochs have had their scores."""
    done = iter(range(1, 1000))
    scores = iter(SCORES[validated:])

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if next(done) == stop_at:
            signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(model(batch[0]), batch[1])

    def validate(model: nn.Module) -> dict[str, float]:
        model.eval()
        return {"top1": next(scores), "val_loss": model(torch.ones(1, 4)).sum().item()}

    chosen = Recipe(**{"epochs": EPOCHS, "lr": 0.05, "weight_decay": 0.01, **recipe})
    return Plan(
        model=model, loss=loss, batches=batches, steps=STEPS, recipe=chosen, validate=validate, checkpoint=checkpoint,
        head=HEAD,
    )  # fmt: skip


def same(a: nn.Module, b: nn.Module) -> bool:
    """Bit for bit, buffers included."""
    return all(torch.equal(a.state_dict()[n], b.state_dict()[n]) for n in a.state_dict())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_stopped_at_any_step_it_goes_on_exactly(tmp_path: Path, recipe: dict[str, Any]) -> None:
    """Ctrl-C during any step, an epoch's last and the run's last included: same history, weights and statistics."""
    whole = net()
    history = fit(plan(whole, **recipe))
    assert len(history) == (4 if "patience" in recipe else EPOCHS)
    for step in range(1, len(history) * STEPS + 1):
        first, second, file = net(), net(), tmp_path / f"{step}.safetensors"
        with pytest.raises(Interrupted, match=f"at step {step}$"):
            fit(plan(first, file, stop_at=step, **recipe))
        rest = plan(second, file, validated=(step - 1) // STEPS, **recipe)
        assert fit(rest, resume=True) == history, step
        assert same(second, whole), step


@pytest.mark.parametrize("epoch", [2, EPOCHS])
def test_stopped_while_it_validates_it_goes_on_exactly(tmp_path: Path, epoch: int) -> None:
    """Ctrl-C during an epoch's validation, the last one's included, is honoured once the epoch is in the checkpoint."""
    whole, again, file = net(), net(), tmp_path / "c.safetensors"
    history = fit(plan(whole))
    first = plan(net(), file)
    asked = iter(range(1, EPOCHS + 1))

    def validate(model: nn.Module) -> Any:
        if next(asked) == epoch:
            signal.raise_signal(signal.SIGINT)
        return first.validate(model) if first.validate else {}

    with pytest.raises(Interrupted, match=f"after epoch {epoch}, checkpoint at step {epoch * STEPS}$"):
        fit(replace(first, validate=validate))
    assert fit(plan(again, file, validated=epoch), resume=True) == history
    assert same(again, whole)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_finished_run_resumes_without_a_step(tmp_path: Path, recipe: dict[str, Any]) -> None:
    """The checkpoint outlives the run; resumed from it, nothing is trained or validated and the weights are the same."""
    whole, again, file = net(), net(), tmp_path / "c.safetensors"
    history = fit(plan(whole, file, **recipe))
    assert file.is_file()

    def never(*_: object) -> Any:
        raise AssertionError("the run was finished")

    finished = replace(plan(again, file, **recipe), loss=never, batches=never, validate=never)
    assert fit(finished, resume=True) == history
    assert same(again, whole)


@pytest.mark.parametrize("recipe", [{"patience": 3}, {"ema_decay": 0.9}], ids=["patience", "average"])
def test_what_is_kept_is_what_was_validated(recipe: dict[str, Any]) -> None:
    """A norm's running statistics come from the same moment, or the same average, as the weights kept with them."""
    model = net()
    history = fit(plan(model, **recipe))
    best = max(range(len(history)), key=lambda i: SCORES[i]) if "patience" in recipe else len(history) - 1
    assert model(torch.ones(1, 4)).sum().item() == history[best]["val_loss"]


def test_an_epoch_without_a_batch_is_refused() -> None:
    """No steps, no training: UsageError, and not a division by zero."""
    with pytest.raises(UsageError, match="no batch") as refusal:
        fit(replace(plan(net()), steps=0))
    assert refusal.value.hint


def test_a_checkpoint_of_another_key_is_refused(tmp_path: Path) -> None:
    """The key tells runs apart."""
    file = tmp_path / "c.safetensors"
    fit(plan(net(), file))
    with pytest.raises(Mismatch, match="another recipe"):
        fit(replace(plan(net(), file), key="another"), resume=True)


def test_no_two_names_share_a_checkpoint(tmp_path: Path) -> None:
    """Names that look alike, kinds, and very long names have files of their own."""
    names = ["a/b", "a--b", "a.student", "a", "x/" * 100 + "y", "x/" * 100 + "z"]
    paths = [checkpoint_path(tmp_path, n, k) for n in names for k in ("delta", "student")]
    assert len(set(paths)) == len(paths)
    assert max(len(p.name) for p in paths) < 200


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(precision="fp16", device="cpu"), "fp16 needs a GPU"),
        pytest.param(
            Recipe(device="cuda"),
            "'cuda' is not available",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="here it is"),
        ),
    ],
)
def test_what_the_machine_lacks_is_refused(recipe: Recipe, said: str) -> None:
    """A precision or device that isn't here is UsageError with a hint, and never quietly another one."""
    with pytest.raises(UsageError, match=said) as refusal:
        accelerator(recipe)
    assert refusal.value.hint


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="nothing says what the processor has")
def test_what_the_processor_only_emulates_is_known() -> None:
    """bf16 is fast with AVX-512, or with what some processors have in its place."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    fast = {"avx512bw", "avx512dq", "avx512vl"} <= set(text.split()) or "avx_ne_convert" in text or "bf16" in text
    assert emulates(accelerator(Recipe(device="cpu", precision="bf16"))) == (not fast)
    assert not emulates(accelerator(Recipe(device="cpu")))


def test_an_unknown_device_is_refused() -> None:
    """A device is one of a few words."""
    with pytest.raises(UsageError, match="device"):
        knobs.decode(Recipe, {"device": "banana"}, "recipe")


def test_half_precision_scales_its_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a loss scaler (here on the CPU), gradients are unscaled before clipping, overflowing steps are skipped, the scale is kept."""
    made = accelerator(Recipe(device="cpu"))
    # what accelerate sets up for fp16 on a GPU
    made.scaler, made.native_amp = torch.amp.GradScaler("cpu", init_scale=1024.0), True
    monkeypatch.setattr(type(made), "mixed_precision", property(lambda _: "fp16"))
    monkeypatch.setattr(made, "autocast", lambda: torch.autocast("cpu", enabled=False))
    monkeypatch.setattr("vtzoo.fit.accelerator", lambda _: made)
    scaled, plain, norms = net(), net(), []
    clip = made.clip_grad_norm_
    monkeypatch.setattr(made, "clip_grad_norm_", lambda *a: norms.append(clip(*a)))
    run = _Run(plan(scaled, tmp_path / "c.safetensors"))
    rows = next(batches(0, 0))
    run.step(rows)
    run.save()
    F.cross_entropy(plain.train()(rows[0]), rows[1]).backward()
    assert norms[0] < 10
    before = [p.clone() for p in scaled.parameters()]
    run.step((torch.full((8, 4), 3e38), rows[1]))
    assert all(torch.equal(a, b) for a, b in zip(before, scaled.parameters(), strict=True))
    assert made.scaler.get_scale() == 512.0
    run.load()
    assert made.scaler.get_scale() == 1024.0


def test_one_step_is_trained_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """A training of a single step brings no warning of timm's scheduler."""
    single = replace(plan(net(), epochs=1), steps=1, batches=lambda epoch, start: [next(batches(epoch, start))])
    with caplog.at_level(logging.WARNING):
        fit(single)
    assert not caplog.records


def test_head_is_trained_alone_first() -> None:
    """With probe_epochs the head moves alone, at a schedule of its own; then everything does, warmed up anew."""
    model = net()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen: list[set[str]] = []

    def validate(model: nn.Module) -> dict[str, float]:
        seen.append({n for n, p in model.named_parameters() if not torch.equal(p, start[n])})
        return {"top1": 0.5}

    chosen = replace(plan(model, probe_epochs=2, epochs=2), validate=validate)
    history = fit(chosen)
    assert seen[:2] == [set(HEAD)] * 2
    assert seen[2:] == [set(start)] * 2
    assert history[1]["lr"] < 0.01
    assert history[2]["lr"] > 0.02


def test_what_rests_at_one_does_not_decay() -> None:
    """Weight decay pulls matrices to zero, but neither vectors nor the factors that a plan names."""
    start, ends = net(), []
    for undecayed in (frozenset[str](), frozenset({"0.weight"})):
        model = copy.deepcopy(start)
        chosen = replace(
            plan(model, epochs=1, weight_decay=0.5), loss=lambda m, b: 0 * m(b[0]).sum(), undecayed=undecayed
        )
        fit(chosen)
        ends.append(dict(model.named_parameters()))
    before = dict(start.named_parameters())
    assert ends[0]["0.weight"].abs().sum() < before["0.weight"].abs().sum()
    assert torch.equal(ends[1]["0.weight"], before["0.weight"])
    assert torch.equal(ends[0]["0.bias"], before["0.bias"])


def test_patience_waits_for_the_probe_to_end() -> None:
    """Validation that doesn't improve while the head learns alone ends nothing; patience counts from there on."""
    chosen = replace(plan(net(), probe_epochs=4, epochs=9, patience=2), validate=lambda _: {"top1": 0.5})
    assert len(fit(chosen)) == 4 + 2
