"""Hostile files that are refused where torch or another runtime has been loaded: deltas, plain models, exported files, pickles, adapters, zip files."""

import copy
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
from onnx import TensorProto, helper
from PIL import Image

import vtzoo
from tests.hostile.light import Case
from vtzoo.onnx.describe import Description, written
from vtzoo.spec import Preprocess, Task
from vtzoo.tensors import TensorFile, write
from vtzoo.verbs.add import add_backbone
from vtzoo.zoo import Zoo

Make = Callable[[Path], list[str]]
TRAP = "__import__('pathlib').Path('vtzoo_was_here').touch()"


@cache
def template() -> Path:
    """A zoo with a tiny network, beside it a delta, a plain model's folder, an adapter and a photo."""
    place = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0)
    write(place / "tiny.safetensors", network.state_dict(), {})
    zoo = Zoo.init(place / "zoo")
    add_backbone(name="tiny", arch="test_vit", weights=place / "tiny.safetensors", zoo=zoo)
    model = vtzoo.build("tiny", zoo=zoo, num_classes=2)
    vtzoo.inject(model, "lora[rank=1]")
    vtzoo.extract(model, task="pets", classes=["cat", "dog"]).save(place / "d.safetensors")
    (place / "m").mkdir()
    whole = timm.create_model("test_vit", num_classes=2)
    write(place / "m" / "model.safetensors", whole.state_dict(), {"format": "pt"})
    config = {
        "architecture": "test_vit",
        "num_classes": 2,
        "label_names": ["cat", "dog"],
        "pretrained_cfg": {"input_size": [3, 160, 160], "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (place / "m" / "config.json").write_text(json.dumps(config))
    Image.new("RGB", (16, 16)).save(place / "p.png")
    return place


def changed(doc: Any, path: str, value: Any) -> Any:
    """A document with one value changed, found by keys with slashes between."""
    doc = copy.deepcopy(doc)
    *above, last = [int(k) if k.isdigit() else k for k in path.split("/")]
    part = doc
    for key in above:
        part = part[key]
    part[last] = value
    return doc


def _delta(path: str, value: object, here: Path) -> list[str]:
    """A delta whose header says something else."""
    source = TensorFile(template() / "d.safetensors")
    doc = changed(json.loads(source.header.metadata["vtzoo"]), path, value)
    write(here / "d.safetensors", source, {"vtzoo": json.dumps(doc)})
    return _predict("./d.safetensors", here)


def _predict(ref: str, here: Path) -> list[str]:
    shutil.copytree(template() / "zoo", here / "zoo")
    shutil.copy(template() / "p.png", here)
    return ["--zoo", "zoo", "predict", ref, "p.png"]


def _tensors(change: Callable[[dict[str, torch.Tensor]], object], here: Path) -> list[str]:
    """A delta with other tensors; NaN is written past the writer, which refuses it."""
    source = TensorFile(template() / "d.safetensors")
    tensors = dict(source)
    change(tensors)
    write(here / "d.safetensors", tensors, source.header.metadata)
    return _predict("./d.safetensors", here)


def _nan(here: Path) -> list[str]:
    data = bytearray((template() / "d.safetensors").read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"
    (here / "d.safetensors").write_bytes(data)
    return _predict("./d.safetensors", here)


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return next(n for n in tensors if "lora" in n)


DELTAS: dict[str, tuple[str, object, int]] = {
    "a newer schema": ("schema", 2, 4), "schema of text": ("schema", "1", 4), "schema of NaN": ("schema", float("nan"), 4), "no method": ("method", None, 4), "config a list": ("config", [], 4), "parts a map": ("config/parts", {"a": 1}, 4),
    "a method that isn't there": ("config/parts/0/method", "os.system", 3), "a method that climbs": ("config/parts/0/method", "../../x", 3), "a method that is a helper": ("config/parts/0/method", "_plain", 3), "a method that is a list": ("config/parts/0/method", ["lora"], 4),
    "a graft that is a dunder": ("config/parts/0/graft", "__class__", 4), "a graft of two names": ("config/parts/0/graft", "a.b", 4), "a knob that isn't there": ("config/parts/0/knobs", {"code": TRAP}, 2), "a rank of a billion": ("config/parts/0/knobs", {"rank": 10**9}, 4),
    "a rank of text": ("config/parts/0/knobs", {"rank": TRAP}, 2), "sites a number": ("config/parts/0/sites", 7, 4), "a site that isn't there": ("config/parts/0/sites/0/name", "blocks.99.attn.qkv", 4), "a site that is a dunder": ("config/parts/0/sites/0/name", "__class__.__init__", 4),
    "a backbone of a remote": ("backbone/arch", "hf-hub:evil/model", 3), "a backbone of a folder": ("backbone/arch", "local-dir:/etc", 3), "a backbone that isn't there": ("backbone/arch", "vit_evil", 3), "an arch that is a list": ("backbone/arch", ["test_vit"], 4),
    "a checkpoint among the arguments": ("backbone/model_args", {"checkpoint_path": "/etc/passwd"}, 4), "a config among the arguments": ("backbone/model_args", {"pretrained_cfg": {"file": "/etc/passwd"}}, 4), "an overlay among the arguments": ("backbone/model_args", {"pretrained_cfg_overlay": {"url": "file:///etc/passwd"}}, 4),
    "a width of a billion": ("backbone/model_args", {"embed_dim": 10**9}, 4), "a width of text": ("backbone/model_args", {"embed_dim": TRAP}, 2), "heads that are 0": ("backbone/model_args", {"num_heads": 0}, 2), "arguments a list": ("backbone/model_args", [1], 4),
    "an argument that isn't there": ("backbone/model_args", {"evil": 1}, 2), "a source that is imported": ("backbone/source", "package:this/x.safetensors", 2), "a source that climbs": ("backbone/source", "package:vtzoo.embedded/../../x", 2), "a source on the disk": ("backbone/source", "file:///etc/passwd", 2),
    "a source that isn't there": ("backbone/source", "object:sha256:" + "ab" * 32, 3), "an object that climbs": ("backbone/source", "object:sha256:../../x", 2), "another fingerprint": ("backbone/fingerprint", "sha256:" + "ab" * 32, 4), "a head of numbers": ("backbone/head", [1], 4),
    "labels that are text": ("tasks/0/classes", "ab", 4), "labels that are maps": ("tasks/0/classes", [{}, {}], 4), "three labels": ("tasks/0/classes", ["a", "b", "c"], 4), "a task without a name": ("tasks/0/name", "", 4), "a task that is a number": ("tasks/0/name", 7, 4), "a task that climbs": ("tasks/0/name", "../x", 4),
    "images of a billion": ("tasks/0/input_size", [3, 10**9, 10**9], 4), "images of no side": ("tasks/0/input_size", [3, 0, 0], 4), "images of text": ("tasks/0/input_size", "big", 4), "a mean of text": ("tasks/0/mean", ["a"], 4), "a deviation of 0": ("tasks/0/std", [0, 0, 0], 4),
    "a mean that isn't finite": ("tasks/0/mean", [float("inf")] * 3, 4), "a crop below 0": ("tasks/0/crop_pct", -1, 4), "a resize that isn't there": ("tasks/0/interpolation", ["bicubic"], 4),
}  # fmt: skip
TENSORS: dict[str, Make] = {
    "a tensor too many": partial(_tensors, lambda t: t.update({"blocks.0.evil": torch.ones(2)})), "a tensor too few": partial(_tensors, lambda t: t.pop(_first(t))), "a tensor of another shape": partial(_tensors, lambda t: t.update({_first(t): torch.ones(2, 2)})),
    "a tensor with another name": partial(_tensors, lambda t: t.update({f"__class__.{_first(t)}": t.pop(_first(t))})), "no head": partial(_tensors, lambda t: [t.pop(n) for n in list(t) if n.startswith("@")]), "a number that is none": _nan,
}  # fmt: skip


def _model(path: str, value: object, here: Path) -> list[str]:
    """A plain model whose config says something else."""
    shutil.copytree(template() / "m", here / "m")
    config = here / "m" / "config.json"
    text = (
        value
        if isinstance(value, str) and not path
        else json.dumps(changed(json.loads(config.read_text()), path, value))
    )
    config.write_text(text)
    return _predict("./m", here)


MODELS: dict[str, tuple[str, object, int]] = {
    "no JSON": ("", "{", 4), "a list": ("", "[]", 4), "a thing twice": ("", '{"architecture": "a", "architecture": "b"}', 4), "nested 100000 deep": ("", '{"a":' * 100_000, 4), "nine megabytes": ("", '{"a": "' + "a" * (9 << 20) + '"}', 4),
    "no config": ("pretrained_cfg", None, 4), "a config of text": ("pretrained_cfg", "x", 4), "an arch that isn't there": ("architecture", "vit_evil", 3), "an arch of a remote": ("architecture", "hf-hub:evil/model", 3), "an arch that is a list": ("architecture", [], 4),
    "a checkpoint among the arguments": ("model_args", {"checkpoint_path": "/etc/passwd"}, 4), "an overlay among the arguments": ("model_args", {"pretrained_cfg_overlay": {"file": "/etc/passwd"}}, 4), "arguments a list": ("model_args", [], 4),
    "a width of a billion": ("model_args", {"embed_dim": 10**9}, 4), "a depth of another network": ("model_args", {"depth": 3}, 4), "labels of numbers": ("label_names", 7, 4), "one label": ("label_names", ["cat"], 4), "labels that are maps": ("label_names", [{}, {}], 4),
    "a billion classes": ("label_names", None, 4), "images of a billion": ("pretrained_cfg/input_size", [3, 10**9, 10**9], 4), "a mean of text": ("pretrained_cfg/mean", "x", 4), "vtzoo says a list": ("vtzoo", [], 4), "tasks of text": ("vtzoo", {"tasks": 7}, 4), "heads of text": ("vtzoo", {"heads": ["x"]}, 4),
}  # fmt: skip


def _billion(here: Path) -> list[str]:
    words = _model("label_names", None, here)
    config = here / "m" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_classes": 10**9}))
    return words


def said() -> dict[str, str]:
    """What a sound file says of itself."""
    shape = Preprocess(input_size=(3, 8, 8))
    return written(Description(task=Task(name="t", classes=("a", "b"), preprocess=shape), preprocess=shape))


def graph(metadata: dict[str, str], weights: list[Any] | None = None, nodes: list[Any] | None = None) -> bytes:
    """A tiny classifier."""
    w = weights if weights is not None else [helper.make_tensor("w", 1, [192, 2], [0.0] * 384)]
    run = nodes or [helper.make_node("Flatten", ["image"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    ports = [helper.make_tensor_value_info(n, 1, s) for n, s in (("image", ["n", 3, 8, 8]), ("y", ["n", 2]))]
    model = helper.make_model(
        helper.make_graph(run, "g", ports[:1], ports[1:], w), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    helper.set_model_props(model, metadata)
    return model.SerializeToString()


def external(location: str) -> Any:
    """A tensor that lies elsewhere."""
    tensor = TensorProto(name="w", data_type=1, dims=[192, 2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def _onnx(content: Callable[[], bytes], here: Path) -> list[str]:
    (here / "m.onnx").write_bytes(content())
    (here / "secret.bin").write_bytes(bytes(192 * 2 * 4))
    return _predict("./m.onnx", here)


def _inner() -> bytes:
    constant = helper.make_node("Constant", [], ["w"], value=external("secret.bin"))
    branch = helper.make_graph([constant], "b", [], [helper.make_tensor_value_info("w", 1, [192, 2])])
    condition = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [True]))
    choice = helper.make_node("If", ["c"], ["v"], then_branch=branch, else_branch=branch)
    return graph(
        said(),
        [],
        [
            condition,
            choice,
            helper.make_node("Flatten", ["image"], ["f"]),
            helper.make_node("MatMul", ["f", "v"], ["y"]),
        ],
    )


def _input(**changes: object) -> bytes:
    return graph({**said(), "vtzoo.input": json.dumps({**json.loads(said()["vtzoo.input"]), **changes})})


ONNX: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"", "text": lambda: b"hello", "cut": lambda: graph(said())[:-200], "a location in text": lambda: b"location" * 9, **{f"external data {at}": partial(lambda at: graph(said(), [external(at)]), at) for at in ("secret.bin", "../canary/x", "/etc/passwd", "C:\\x", "")},
    "external data in a branch": _inner, "says nothing": lambda: graph({}), "says no classes": lambda: graph({"vtzoo.input": said()["vtzoo.input"]}), "input of text": lambda: graph({**said(), "vtzoo.input": "x"}), "input a list": lambda: graph({**said(), "vtzoo.input": "[]"}),
    "input nested deep": lambda: graph({**said(), "vtzoo.input": "[" * 100_000}), "classes a number": lambda: graph({**said(), "vtzoo.classes": "7"}), "three classes": lambda: graph({**said(), "vtzoo.classes": '["a", "b", "c"]'}), "tasks a number": lambda: graph({**said(), "vtzoo.tasks": "7"}),
    "tasks of text": lambda: graph({**said(), "vtzoo.tasks": '["x"]'}), "images of a billion": lambda: _input(size=[3, 10**9, 10**9]), "images of text": lambda: _input(size="big"), "a deviation of 0": lambda: _input(std=[0, 0, 0]), "a mean of maps": lambda: _input(mean=[{}]),
}  # fmt: skip


def _archive(records: dict[str, bytes], here: Path, how: int = zipfile.ZIP_STORED) -> list[str]:
    with zipfile.ZipFile(here / "m.pt2", "w", how) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return _predict("./m.pt2", here)


class Trap:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("import pathlib; pathlib.Path('vtzoo_was_here').touch()",))


class System:
    """Likewise, through the shell."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch vtzoo_was_here",))


GOOD = {"archive/archive_format": b"pt2", "archive/archive_version": b"0", "archive/byteorder": b"little"}
ARCHIVES: dict[str, dict[str, bytes]] = {
    "nothing": {}, "a file that climbs": {**GOOD, "archive/../../x": b"x"}, "an absolute file": {**GOOD, "/etc/x": b"x"}, "a file on a drive": {**GOOD, "archive/C:\\x": b"x"}, "Python": {**GOOD, "archive/extra/x.py": b"", "archive/code/x.py": b"import os"},
    "a pickle": {**GOOD, "archive/data.pkl": pickle.dumps(Trap())}, "a pickled input": {**GOOD, "archive/data/sample_inputs/model.pt": pickle.dumps(Trap())}, "a library": {**GOOD, "archive/data/aotinductor/model/x.so": b"\x7fELF"},
    "a program of text": {**GOOD, "archive/models/model.json": b"x"}, "a program nested deep": {**GOOD, "archive/models/model.json": b'{"a":' * 100_000}, "no program": GOOD,
}  # fmt: skip


def _xml(text: str, here: Path, weights: bytes | None = b"") -> list[str]:
    (here / "m.xml").write_text(text)
    if weights is not None:
        (here / "m.bin").write_bytes(weights)
    return _predict("./m.xml", here)


NET = '<?xml version="1.0"?>{dtd}<net name="m" version="11"><layers>{layers}</layers><edges/></net>'
CONSTANT = '<layer id="0" name="w" type="Const" version="opset1"><data element_type="f32" shape="9" offset="{offset}" size="36"/><output><port id="0" precision="FP32"><dim>9</dim></port></output></layer>'
ENTITIES = '<!DOCTYPE net [<!ENTITY a "aaaaaaaaaa">' + "".join(f'<!ENTITY {b} "&{a};&{a};&{a};&{a};&{a};&{a};&{a};&{a};">' for a, b in zip("abcdefghi", "bcdefghij", strict=True)) + "]>"  # fmt: skip
XMLS: dict[str, str] = {
    "nothing": "", "ONNX by another name": "\x08\x09", "not closed": "<net>", "another root": "<html/>", "entities upon entities": NET.format(dtd=ENTITIES, layers="&j;"), "an entity that is a file": NET.format(dtd='<!DOCTYPE net [<!ENTITY x SYSTEM "file:///etc/passwd">]>', layers="&x;"),
    "weights beyond the end": NET.format(dtd="", layers=CONSTANT.format(offset=10**12)), "weights before the start": NET.format(dtd="", layers=CONSTANT.format(offset=-36)),
}  # fmt: skip


def _pickle(make: Callable[[Path], object], flag: bool, here: Path) -> list[str]:
    make(here / "w.pth")
    shutil.copytree(template() / "zoo", here / "zoo")
    words = ["--zoo", "zoo", "add", "backbone", "b", "--arch", "test_vit", "--weights", "w.pth"]
    return [*words, *(["--from-pickle"] if flag else [])]


def _saved(value: object, path: Path) -> None:
    torch.save(value, path)


def _plainly(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


def _global(path: Path) -> None:
    path.write_bytes(b"cbuiltins\neval\n(V" + TRAP.encode() + b"\ntR.")


def _bomb(path: Path) -> None:
    """A terabyte that is one number, repeated."""
    torch.save({"w": torch.zeros(1).expand(1 << 38)}, path)


def _squeezed(path: Path) -> None:
    """Two gigabytes of zeros in a compressed archive."""
    torch.save({"w": torch.zeros(1 << 10)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, bytes(200 << 20) if name.endswith("data/0") else content)


PICKLES: dict[str, Callable[[Path], object]] = {
    "what starts a shell": partial(_saved, {"a": System()}), "what starts a shell, plainly": partial(_plainly, System()), "eval by its name": _global, "a terabyte of one number": _bomb, "zeros squeezed": _squeezed, "no tensors": partial(_saved, {"a": {"b": 1}}),
    "numbers among tensors": partial(_saved, {"w": torch.ones(2), "epoch": 3}), "half of one": lambda p: p.write_bytes(b"PK\x03\x04" + bytes(99)), "a sparse tensor": partial(_saved, {"w": torch.ones(2, 2).to_sparse()}), "NaN": partial(_saved, {"w": torch.full((2,), float("nan"))}),
}  # fmt: skip


def _adapter(config: object, here: Path, name: str = "adapter_model.safetensors", content: bytes = b"") -> list[str]:
    (here / "a").mkdir()
    (here / "a" / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (here / "a" / name).write_bytes(content)
    shutil.copytree(template() / "zoo", here / "zoo")
    return ["--zoo", "zoo", "import", "peft", "a", "--backbone", "tiny", "--name", "x"]


LORA = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["qkv"]}
EMPTY = b"\x02\x00\x00\x00\x00\x00\x00\x00{}"
ADAPTERS: dict[str, Make] = {
    "no JSON": partial(_adapter, "{"), "nested deep": partial(_adapter, '{"a":' * 100_000), "another type": partial(_adapter, {"peft_type": "EVIL"}), "a type that is a list": partial(_adapter, {"peft_type": []}), "no tensors": partial(_adapter, LORA, content=EMPTY),
    "a pickle": partial(_adapter, LORA, name="adapter_model.bin", content=pickle.dumps(Trap())), "a setting that isn't read": partial(_adapter, {**LORA, "auto_mapping_code": TRAP}, content=EMPTY), "damaged tensors": partial(_adapter, LORA, content=b"x"),
}  # fmt: skip


def _images(records: dict[str, int], here: Path) -> list[str]:
    with zipfile.ZipFile(here / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, size in records.items():
            archive.writestr(name, bytes(size))
    shutil.copy(template() / "d.safetensors", here)
    words = _predict("./d.safetensors", here)
    return [*words[:2], "eval", "./d.safetensors", "--data", "d.zip"]


ZIPS: dict[str, tuple[dict[str, int], int]] = {
    "an image of 300 MB of zeros": ({"test/cat/a.png": 300 << 20, "test/dog/b.png": 9}, 4), "files that climb": ({"test/../../cat/a.png": 9}, 2), "no images": ({"a.txt": 9}, 2), "no image": ({"test/cat/a.png": 9, "test/dog/b.png": 9}, 4),
}  # fmt: skip

CASES: dict[str, Case] = {
    **{f"delta: {k}": Case(partial(_delta, at, value), code) for k, (at, value, code) in DELTAS.items()},
    **{f"delta: {k}": Case(make, 4) for k, make in TENSORS.items()},
    **{f"model: {k}": Case(_billion if "billion classes" in k else partial(_model, at, value), code) for k, (at, value, code) in MODELS.items()},
    **{f"onnx: {k}": Case(partial(_onnx, v), 4) for k, v in ONNX.items()},
    **{f"archive: {k}": Case(partial(_archive, v), 4) for k, v in ARCHIVES.items()},
    "archive: zeros squeezed": Case(partial(_archive, {**GOOD, "archive/extra/x": bytes(200 << 20)}, how=zipfile.ZIP_DEFLATED), 4),
    **{f"openvino: {k}": Case(partial(_xml, v), 4) for k, v in XMLS.items()},
    "openvino: no weights": Case(partial(_xml, NET.format(dtd="", layers=""), weights=None), 3),
    **{f"pickle: {k}": Case(partial(_pickle, v, False), 4) for k, v in PICKLES.items()},
    **{f"adapter: {k}": Case(v, 4) for k, v in ADAPTERS.items()},
    **{f"zip: {k}": Case(partial(_images, v), code) for k, (v, code) in ZIPS.items()},
}  # fmt: skip
