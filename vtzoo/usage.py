"""How to use an artifact, in five lines each: with vtzoo, with plain timm, with onnxruntime; lines that run as they stand."""

import json
import shlex
from collections.abc import Sequence

from vtzoo.clip_config import ARCH
from vtzoo.lineage import CONFIG
from vtzoo.spec import Preprocess, as_map
from vtzoo.subject import Subject, backbone_of, folds, shape_of, tasks_of


def use(about: Subject) -> list[str]:
    """Five lines each for vtzoo, timm and onnxruntime, as far as they apply."""
    ref, tasks = about.origin.ref, list(tasks_of(about))
    if not tasks or about.origin.kind == "backbone":
        return []
    more = f", task={json.dumps(tasks[0])}" if len(tasks) > 1 else ""
    lines = [
        "## Use", "", "With vtzoo:", "", "```python", "import vtzoo", "",
        f'found = vtzoo.predict(ref={json.dumps(ref)}, images="image.png"{more})', 'print(found.predictions[0]["top"][0]["class"])', "```",
    ]  # fmt: skip
    return [*lines, *_with_timm(about, tasks), *_with_onnx(about, tasks)]


def _with_timm(about: Subject, tasks: Sequence[str]) -> list[str]:
    origin = about.origin
    option = f" --task {shlex.quote(tasks[0])}" if len(tasks) > 1 else ""
    if origin.kind in ("delta", "merge"):
        if not folds(origin):
            return []
        first = f"vtzoo fold {shlex.quote(origin.ref)} --out folder{option}"
    elif CONFIG in as_map(origin.facts.get("files")):
        first = f"vtzoo export timm {shlex.quote(origin.ref)} folder{option}"
    else:
        return []
    return [
        "", "With plain timm:", "", "```console", f"$ {first}", "```", "", "```python", "import timm", *_knowing(about), "from PIL import Image", "",
        'model = timm.create_model("local-dir:folder", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))",
        'logits = model(transform(Image.open("image.png").convert("RGB"))[None])',
        'print(model.pretrained_cfg["label_names"][logits.argmax()])', "```",
    ]  # fmt: skip


def _knowing(about: Subject) -> list[str]:
    """What plain timm must be told of first."""
    arch = about.origin.facts.get("arch") or backbone_of(about).get("arch")
    return ["import vtzoo.dual  # the architecture `clip`"] if arch == ARCH else []


def _with_onnx(about: Subject, tasks: Sequence[str]) -> list[str]:
    shape, ref = shape_of(about), about.origin.ref
    if shape is None or about.origin.kind == "export":
        return []
    option = f" --task {shlex.quote(tasks[0])}" if len(tasks) > 1 else ""
    return [
        "", "With onnxruntime:", "", "```console", f"$ vtzoo export onnx {shlex.quote(ref)} model.onnx --embed-preprocess{option}", "```", "", "```python",
        "import json", "", "import numpy as np", "import onnxruntime", "from PIL import Image, ImageOps", "",
        'model = onnxruntime.InferenceSession("model.onnx")', f"picture = {_fitted(shape)}",
        'logits = model.run(None, {"image": np.asarray(picture)[None]})[0]',
        'print(json.loads(model.get_modelmeta().custom_metadata_map["vtzoo.classes"])[logits.argmax()])', "```",
    ]  # fmt: skip


def _fitted(shape: Preprocess) -> str:
    """A picture at the network's size, as PIL makes it."""
    _, height, width = shape.input_size
    how = f"Image.Resampling.{shape.interpolation.upper() if shape.interpolation in ('bicubic', 'bilinear', 'nearest') else 'BICUBIC'}"
    image = 'Image.open("image.png").convert("RGB")'
    if shape.crop_mode == "squash":
        return f"{image}.resize(({width}, {height}), {how})"
    if shape.crop_mode == "border":
        fill = tuple(round(255 * m) for m in shape.mean)
        return f"ImageOps.pad({image}, ({width}, {height}), {how}, {fill})"
    border = round((1 - shape.crop_pct) / 2, 4)
    return f"ImageOps.fit({image}, ({width}, {height}), {how}" + (f", bleed={border})" if border else ")")
