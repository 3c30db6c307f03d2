"""The parts of an ONNX export by themselves."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vtzoo import data as D
from vtzoo.errors import ExportMismatch, NotExportable
from vtzoo.onnx.convert import convert
from vtzoo.onnx.describe import Description, read, steps, written
from vtzoo.onnx.fallback import quantised
from vtzoo.spec import Preprocess, Task

SHAPE = Preprocess(input_size=(3, 64, 96), crop_pct=0.9, interpolation="bilinear")


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("embedded", [False, True])
def test_what_is_written_is_read(embedded: bool, several: bool) -> None:
    """Task, preprocessing and form come back as they were."""
    shape = replace(SHAPE, crop_mode="squash", mean=(0.1, 0.2, 0.3))
    task = Task(name="fruit", classes=("pear", "Äpfel, 2"), preprocess=shape, multilabel=several)
    given = Description(
        task=task, preprocess=shape, embedded=embedded, dynamic_size=True, facts={"license": "MIT", "folded": True}
    )
    back = read(written(given), "m.onnx")
    assert replace(back, facts={}) == replace(given, facts={})
    assert (back.facts["license"], back.facts["folded"]) == ("MIT", "true")


@pytest.mark.parametrize(
    ("mean", "std", "kind"), [(0.5, 0.5, "Normalized_1_1"), (0.0, 1.0, "Normalized_0_1"), (0.4, 0.2, None)]
)
def test_onnx_has_words_for_some_ranges_only(mean: float, std: float, kind: str | None) -> None:
    """A range that the input doesn't have isn't claimed."""
    shape = replace(SHAPE, mean=(mean,) * 3, std=(std,) * 3)
    assert written(Description(task=None, preprocess=shape)).get("Image.NominalPixelRange") == kind


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("sides", [(64, 64), (64, 96)])
def test_steps_are_what_the_transform_does(mode: str, sides: tuple[int, int]) -> None:
    """A picture taken through the written steps is timm's own input to the bit."""
    shape = replace(SHAPE, crop_mode=mode, input_size=(3, *sides))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (131, 187, 3), dtype=np.uint8))
    assert torch.equal(_walked(picture, steps(shape, embedded=False)), D.transforms(shape, train=False)(picture))


def _walked(image: Image.Image, todo: list[dict[str, Any]]) -> Tensor:
    """The steps with pillow and numpy alone."""
    value: Any = image
    for step in todo:
        match step["op"]:
            case "resize":
                height, width = _resized(value.height, value.width, step)
                value = value.resize((width, height), Image.Resampling[step["interpolation"].upper()])
            case "center_crop":
                height, width = step["size"]
                left, top = round((value.width - width) / 2), round((value.height - height) / 2)
                around = Image.new("RGB", (width, height), tuple(step.get("fill", (0, 0, 0))))
                around.paste(value, (-left, -top))
                value = around
            case "divide":
                value = np.asarray(value, dtype=np.float32) / np.float32(step["by"])
            case "normalize":
                value = (value - np.float32(step["mean"])) / np.float32(step["std"])
            case "transpose":
                value = value.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(value))


def _resized(height: int, width: int, step: dict[str, Any]) -> tuple[int, int]:
    if side := step.get("shorter_side"):
        return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    if sides := step.get("to"):
        return sides[0], sides[1]
    wanted = step.get("cover") or step["within"]
    ratio = (min if "cover" in step else max)(height / wanted[0], width / wanted[1])
    return round(height / ratio), round(width / ratio)


class Wavering(nn.Module):
    """Which way it goes depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice, or not."""
        return x * 2 if x.sum() > 0 else x


def test_a_network_that_can_not_be_translated() -> None:
    """The exporter's own reason, in a line."""
    with pytest.raises(NotExportable, match="data-dependent") as caught:
        convert(Wavering(), (3, 8, 8))
    assert "\n" not in caught.value.message


COSTS = {"a": 1.0, "b": 8.0, "c": 2.0, "d": 4.0, "e": 0.5}


@pytest.mark.parametrize(("allowed", "left"), [(16, ""), (15, "b"), (7.5, "b"), (7, "bd"), (1.5, "bdc"), (0.5, "bdca")])
def test_the_costliest_layers_stay_float(allowed: float, left: str) -> None:
    """As few as let the rest pass, costliest first."""
    made, kept = quantised(list(COSTS), frozenset, _cost, _cost, allowed)
    assert ("".join(kept), made) == (left, frozenset(COSTS) - set(left))


def test_no_layer_may_be_int8() -> None:
    """Nothing is shipped as int8 that has none inside."""
    with pytest.raises(ExportMismatch, match="left in float"):
        quantised(list(COSTS), frozenset, _cost, _cost, 0.4)


def _cost(chosen: frozenset[str]) -> float:
    return sum(COSTS[n] for n in chosen)
