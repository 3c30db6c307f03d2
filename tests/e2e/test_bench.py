"""Times of a model in each of its forms."""

from pathlib import Path

import pytest
import torch

from vtzoo.errors import NotFoldable, UsageError
from vtzoo.probing import work
from vtzoo.speed import pinned, timed
from vtzoo.verbs.bench import bench
from vtzoo.verbs.export.onnx import export_onnx
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

RECIPE = {"epochs": 0, "image_size": 32, "limit": 20, "eval_limit": 10}


def _trained(zoo: Zoo, method: str) -> str:
    name = f"fashion/{method}"
    train(backbone="tiny", data="vtzoo:fashion", method=method, name=name, zoo=zoo, recipe=RECIPE)
    return name


def test_a_delta_is_timed_in_all_its_forms(zoo: Zoo, tmp_path: Path) -> None:
    """Attached, folded and in onnxruntime, for each batch size, in the threads that were asked for; an exported file in the one that it is."""
    before = torch.get_num_threads()
    ref = _trained(zoo, "lora")
    made = bench(ref=ref, batches=(1, 3), threads=1, zoo=zoo)
    assert [(r["form"], r["batch"]) for r in made.report["times"]] == [
        (f, b) for b in (1, 3) for f in ("torch", "folded", "onnx")
    ]
    assert all(abs(r["images_per_s"] * r["ms"] / 1000 - r["batch"]) < 0.05 * r["batch"] for r in made.report["times"])
    assert made.report["threads"] == 1
    assert made.report["params"] > 0 < made.report["macs"]
    assert torch.get_num_threads() == before
    export_onnx(ref=ref, out=tmp_path / "m.onnx", zoo=zoo)
    rows = bench(ref=str(tmp_path / "m.onnx"), batches=(2,), zoo=zoo).report["times"]
    assert [(r["form"], r["batch"]) for r in rows] == [("onnx", 2)]
    for what, form in ((str(tmp_path / "m.onnx"), "torch"), ("tiny", "folded")):
        with pytest.raises(UsageError, match=f"has no form '{form}'"):
            bench(ref=what, forms=(form,), zoo=zoo)


def test_what_has_no_such_form_is_left_out_or_refused(zoo: Zoo, said: list[str]) -> None:
    """A delta that doesn't fold is timed attached, which is said; where folding was asked for it is refused; so are forms and batches that are none."""
    ref = _trained(zoo, "adapter")
    rows = bench(ref=ref, batches=(1,), forms=("torch",), zoo=zoo).report["times"]
    assert [r["form"] for r in rows] == ["torch"]
    assert not any("adapter: no" in line for line in said)  # nobody asked for a fold
    with pytest.raises(NotFoldable):
        bench(ref=ref, forms=("folded",), zoo=zoo)
    assert {r["form"] for r in bench(ref=ref, batches=(1,), zoo=zoo).report["times"]} == {"torch", "onnx"}
    assert any("adapter" in line for line in said)
    for wrong in ({"forms": ("onxx",)}, {"batches": ()}, {"batches": (0,)}, {"threads": -1}):
        with pytest.raises(UsageError) as refusal:
            bench(ref=ref, zoo=zoo, **wrong)
        assert refusal.value.hint


def test_threads_are_pinned_and_given_back() -> None:
    """Torch and the sessions that are made inside have so many; afterwards torch has its own, whatever happened."""
    before = torch.get_num_threads()
    seen: list[int] = []

    def fails() -> None:
        with pinned(2) as used:
            seen.extend((used, torch.get_num_threads()))
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fails()
    assert seen == [2, 2]
    with pinned(0) as used:
        assert used == before
    assert torch.get_num_threads() == before


def test_multiply_adds_are_those_of_the_layers() -> None:
    """A convolution, a linear and an attention, counted by hand; a fused attention counts as its products do."""
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Flatten(2), torch.nn.Linear(64, 5))
    assert work(layer, (3, 8, 8))[1] == 8 * 3 * 9 * 64 + 8 * 64 * 5

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x.flatten(2) * self.scale  # [1, 3, 64]: three tokens of 64
            return torch.nn.functional.scaled_dot_product_attention(q[:, None], q[:, None], q[:, None])

    assert work(Attention(), (3, 8, 8)) == (1, 2 * 3 * 3 * 64)


def test_forms_take_turns() -> None:
    """Every form runs as often as the others, whatever it takes."""
    calls: dict[str, int] = {}

    class Counted(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls[self.name] = calls.get(self.name, 0) + 1
            return x

    rows = timed({"a": Counted("a"), "b": Counted("b")}, (3, 4, 4), (1,))
    assert calls["a"] == calls["b"] > 2
    assert [r["form"] for r in rows] == ["a", "b"]
