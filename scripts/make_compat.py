"""Freeze what this version writes, for every later one to open: run it once with each release.

    python scripts/make_compat.py            writes tests/compat/VERSION; refuses where that is there

A zoo with a tiny ViT and what each verb makes of it: deltas, a merge, a folded model, a student, an ONNX file; beside it `answers.json` with every
entry's files and what it answers to one batch of numbers that a formula gives.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec
from torch import Tensor

import vtzoo
from vtzoo.artifact import go_live, open_ref
from vtzoo.fingerprint import fingerprint
from vtzoo.spec import BackboneCard, Preprocess
from vtzoo.tensors import write
from vtzoo.verbs.distill import distill
from vtzoo.verbs.export.onnx import export_onnx
from vtzoo.verbs.fold import fold_ref
from vtzoo.verbs.merge import merge_refs
from vtzoo.verbs.sign import sign
from vtzoo.verbs.train import train
from vtzoo.zoo import Zoo

PLACE = Path(__file__).resolve().parents[1] / "tests" / "compat"
SIDE = 16
ARGS: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8, "img_size": SIDE}
QUICK = {"epochs": 1, "limit": 40, "batch_size": 20, "lr": 0.01}
METHODS = {"emoji/lora": "lora[rank=2]", "clipart/ssf": "ssf", "emoji/vpt": "vpt-deep[tokens=2]+bitfit"}
TASKS = {"both": "clipart"}
"""Whose head answers, where there are several."""


def batch() -> Tensor:
    """Images as the network takes them, [2, 3, SIDE, SIDE], the same numbers on every machine."""
    return torch.linspace(-2, 2, 2 * 3 * SIDE * SIDE, dtype=torch.float64).sin().float().reshape(2, 3, SIDE, SIDE)


def answers(zoo: Zoo) -> dict[str, Any]:
    """Each entry's files, and what it answers."""
    found: dict[str, Any] = {}
    for entry in (e for e in zoo.entries() if not e.builtin):
        live = go_live(open_ref(entry.name, zoo, exports=True), TASKS.get(entry.name))
        with torch.inference_mode():
            logits = live.model(batch())
        found[entry.name] = {
            "section": entry.section, "objects": sorted(entry.objects), "logits": logits.tolist(),
            "classes": list(live.task.classes) if live.task else [], "license": live.card.license,
        }  # fmt: skip
    return found


def make(zoo: Zoo, work: Path) -> None:
    """Every kind of entry, by the verbs themselves."""
    torch.manual_seed(0)
    tensors = timm.create_model("test_vit", num_classes=0, **ARGS).state_dict()
    tensors = {n: t + 0.1 * torch.randn_like(t) for n, t in tensors.items()}
    digest, path = write(work / "tiny.safetensors", tensors, {}), work / "tiny.safetensors"
    zoo.add_object(path)
    card = BackboneCard(
        name="tiny", arch="test_vit", source=f"object:sha256:{digest}", fingerprint=fingerprint(tensors), model_args=ARGS, license="mit",
        preprocess=Preprocess(input_size=(3, SIDE, SIDE)), params=sum(t.numel() for t in tensors.values()), features=ARGS["embed_dim"],
    )  # fmt: skip
    zoo.put("backbones", "tiny", {**card.json(), "digest": digest, "size_bytes": path.stat().st_size})
    for name, method in METHODS.items():
        train(
            backbone="tiny",
            data=f"vtzoo:{name.partition('/')[0]}",
            method=method,
            name=name,
            zoo=zoo,
            recipe={**QUICK, "eval_limit": 40, "cache": "off"},
        )
    merge_refs(refs=["emoji/lora", "clipart/ssf"], method="ties[density=0.5]", name="both", zoo=zoo)
    fold_ref(ref="emoji/lora", out=work / "folded", name="emoji/folded", zoo=zoo)
    student = "test_vit[depth=1,embed_dim=24,num_heads=2,patch_size=8]"
    distill(
        teachers=["emoji/lora"],
        student=student,
        data="vtzoo:emoji",
        name="emoji/student",
        zoo=zoo,
        recipe={**QUICK, "image_size": SIDE},
        views=1,
    )
    export_onnx(ref="emoji/lora", out=work / "m.onnx", name="emoji/onnx", zoo=zoo)
    key = ec.generate_private_key(ec.SECP256R1())  # of which the public half alone is kept
    (work / "key.pem").write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    sign("emoji/lora", key=work / "key.pem", zoo=zoo)
    (zoo.root.parent / "key.pub").write_bytes(
        key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    )


def main() -> None:
    """Write the folder of this version."""
    place = PLACE / vtzoo.__version__
    if place.exists():
        sys.exit(f"{place} is there: what was released stays as it is")
    with tempfile.TemporaryDirectory() as work:
        zoo = Zoo.init(place / "zoo")
        zoo.command = "python scripts/make_compat.py"
        make(zoo, Path(work))
    for left in (p for p in (zoo.root / ".vtzoo").iterdir() if p.name != "objects"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    text = json.dumps(answers(zoo), indent=1, sort_keys=True)
    (place / "answers.json").write_text(text + "\n", encoding="utf-8")
    print(f"{place}: {sum(p.stat().st_size for p in place.rglob('*') if p.is_file()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
