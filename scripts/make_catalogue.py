"""Make zoo_index.yaml, the built-in catalogue of backbones: facts from timm's and open_clip's own configs, generated, not typed.

    python scripts/make_catalogue.py            write the file
    python scripts/make_catalogue.py --check    exit 1 when the file is not what this script makes

Typed here are only the choice of backbones, what each is good for, and the embedded ones (`EMBEDDED`).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg

ROOT = Path(__file__).parent.parent
CARRIED = ROOT / "vtzoo" / "embedded"
sys.path.insert(0, str(ROOT))

from vtzoo import files  # noqa: E402 - this checkout's, whatever is installed
from vtzoo.catalogue import INDEX, Index, dump  # noqa: E402
from vtzoo.clip_card import PREFIX, clip_card  # noqa: E402
from vtzoo.dual import ARCH  # noqa: E402
from vtzoo.spec import plain  # noqa: E402

HEADER = """\
# The built-in catalogue of backbones. Made by scripts/make_catalogue.py from timm's and open_clip's own configs; don't edit it by hand.
#
# clip/…    models of image and text, by open_clip's names in lower case; their file is open_clip_model.safetensors, and params counts both towers
# source    timm's and open_clip's configs pin no revision, so a hub source here follows the repository's main branch; the fingerprint
#           that a delta records is what protects it. To pin one, add your own entry with @revision.
# params    numbers in the backbone, the head left out; features: width of what the backbone gives to a head
# head      the tensors that num_classes=0 removes; [] when the published weights have no head
# license   as timm states it for the weights; of clip/… as timm states it for the image tower of the same training
"""

BACKBONES = {
    # plain ViT
    "vit_tiny_patch16_224.augreg_in21k": "quick trials and small devices with the plain ViT recipe",
    "vit_small_patch16_224.augreg_in21k": "the default for fine-tuning on a small budget",
    "vit_base_patch16_224.augreg_in21k": "transfer to many kinds of photos; a common base of adapter papers",
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": "everyday photos close to ImageNet, few labels",
    "vit_large_patch16_224.augreg_in21k": "accuracy before speed with the plain ViT recipe",
    "vit_base_patch16_224.orig_in21k": "comparing with papers that start from the original ImageNet-21k weights (VPT)",
    "vit_base_patch16_224.mae": "full fine-tuning and merging studies; weak under a linear probe",
    "vit_small_patch16_224.dino": "nearest neighbours and linear probes without labels in the pretraining",
    "deit3_small_patch16_224.fb_in22k_ft_in1k": "a strong small ViT for everyday photos",
    "deit3_base_patch16_224.fb_in22k_ft_in1k": "a strong ViT-B for everyday photos, with LayerScale",
    # self-supervised, dense features
    "vit_small_patch14_dinov2.lvd142m": "linear probes on fine-grained or unusual images at small cost",
    "vit_base_patch14_dinov2.lvd142m": "linear probes and retrieval; strong frozen features",
    "vit_base_patch14_reg4_dinov2.lvd142m": "as DINOv2-B with clean attention maps, for dense tasks",
    "vit_large_patch14_reg4_dinov2.lvd142m": "accuracy before speed with frozen features",
    "vit_small_patch16_dinov3.lvd1689m": "frozen features at small cost, any resolution; read its licence first",
    "vit_base_patch16_dinov3.lvd1689m": "strong frozen features, any resolution; read its licence first",
    "convnext_tiny.dinov3_lvd1689m": "DINOv3 features in a convolutional net; read its licence first",
    # image towers of image-text models
    "vit_base_patch16_clip_224.openai": "merging studies and zero-shot heads; robust to style",
    "vit_base_patch32_clip_224.openai": "fast merging studies; the ViT-B/32 of the task arithmetic papers",
    "vit_base_patch16_siglip_224.v2_webli": "fine-grained web concepts, logos and text in images",
    # masked image modelling
    "beitv2_base_patch16_224.in1k_ft_in22k": "fine-tuning to many classes; attention with relative positions",
    "eva02_small_patch14_224.mim_in22k": "full or delta fine-tuning of a small modern ViT (SwiGLU, rotary positions)",
    "eva02_base_patch14_224.mim_in22k": "full or delta fine-tuning of a modern ViT-B",
    # hierarchical
    "swin_tiny_patch4_window7_224.ms_in22k": "small objects and textures at moderate cost",
    "swin_base_patch4_window7_224.ms_in22k": "accuracy with a pyramid of features; a base of the VPT and SSF papers",
    "swinv2_tiny_window8_256.ms_in1k": "a pyramid that keeps its quality when the input size changes",
    # convolutional
    "convnext_tiny.fb_in22k": "a sound default among convolutional nets",
    "convnext_base.fb_in22k": "accuracy of a Swin-B with convolutions only; a base of the SSF paper",
    "convnextv2_tiny.fcmae_ft_in22k_in1k": "accuracy for its size on everyday photos; read its licence first",
    "resnet50.a1_in1k": "comparing with the literature; every runtime is fast on it",
    "resnet18.a1_in1k": "a small student or a test of residual adapters",
    "efficientnet_b0.ra_in1k": "small and accurate on CPU",
    "tf_efficientnetv2_s.in21k": "convolutional transfer with a wide label set in the pretraining",
    "mobilenetv4_conv_small.e2400_r224_in1k": "phones and other tight latency budgets; a good student",
    "mobilenetv4_conv_medium.e500_r256_in1k": "phones with more room; a good student",
}

DUAL = {
    "RN50.openai": ("resnet50_clip.openai", "comparing with papers on prompts, whose second backbone it is"),
    "ViT-B-32.openai": ("vit_base_patch32_clip_224.openai", "quick trials with words; the ViT-B/32 of the CLIP papers"),
    "ViT-B-32.laion2b_s34b_b79k": ("vit_base_patch32_clip_224.laion2b", "quick trials with words, openly trained"),
    "ViT-B-32.datacomp_xl_s13b_b90k": ("vit_base_patch32_clip_224.datacompxl", "the strongest zero-shot ViT-B/32 of these"),
    "ViT-B-16.openai": ("vit_base_patch16_clip_224.openai", "comparing with papers on prompts and adapters (CoOp and after)"),
    "ViT-B-16.laion2b_s34b_b88k": ("vit_base_patch16_clip_224.laion2b", "zero-shot and few shots, openly trained"),
    "ViT-B-16.datacomp_xl_s13b_b90k": ("vit_base_patch16_clip_224.datacompxl", "a sound default among models of image and text"),
    "ViT-B-16.dfn2b": ("vit_base_patch16_clip_224.dfn2b", "zero-shot at ViT-B cost; read its licence first"),
    "ViT-L-14.openai": ("vit_large_patch14_clip_224.openai", "robust to style; merging studies with words"),
    "ViT-L-14-336.openai": ("vit_large_patch14_clip_336.openai", "details in larger images"),
    "ViT-L-14.laion2b_s32b_b82k": ("vit_large_patch14_clip_224.laion2b", "accuracy before speed, openly trained"),
    "ViT-L-14.datacomp_xl_s13b_b90k": ("vit_large_patch14_clip_224.datacompxl", "accuracy before speed with words"),
    "ViT-L-14.dfn2b": ("vit_large_patch14_clip_224.dfn2b", "zero-shot before speed; read its licence first"),
    "ViT-H-14.laion2b_s32b_b79k": ("vit_huge_patch14_clip_224.laion2b", "a teacher with words, openly trained"),
    "ViT-H-14.dfn5b": ("vit_huge_patch14_clip_224.dfn5b", "a strong teacher with words; read its licence first"),
    "ViT-H-14-378.dfn5b": ("vit_huge_patch14_clip_378.dfn5b", "the strongest teacher of these, for details; read its licence first"),
    "ViT-B-16-SigLIP.webli": ("vit_base_patch16_siglip_224.webli", "each class judged by itself: sigmoid instead of softmax"),
    "ViT-B-16-SigLIP-384.webli": ("vit_base_patch16_siglip_384.webli", "the same with details of larger images"),
    "ViT-L-16-SigLIP-256.webli": ("vit_large_patch16_siglip_256.webli", "accuracy before speed with SigLIP"),
    "ViT-SO400M-14-SigLIP-384.webli": ("vit_so400m_patch14_siglip_384.webli", "a teacher with SigLIP"),
    "ViT-B-32-SigLIP2-256.webli": ("vit_base_patch32_siglip_256.v2_webli", "class names in many languages at small cost"),
    "ViT-B-16-SigLIP2.webli": ("vit_base_patch16_siglip_224.v2_webli", "class names in many languages; logos and text in images"),
    "ViT-B-16-SigLIP2-256.webli": ("vit_base_patch16_siglip_256.v2_webli", "the same with slightly larger images"),
    "ViT-L-16-SigLIP2-256.webli": ("vit_large_patch16_siglip_256.v2_webli", "accuracy before speed, class names in many languages"),
    "ViT-SO400M-16-SigLIP2-256.webli": ("vit_so400m_patch16_siglip_256.v2_webli", "a teacher with class names in many languages"),
    "ViT-SO400M-16-SigLIP2-384.webli": ("vit_so400m_patch16_siglip_384.v2_webli", "the same with details of larger images"),
    "MobileCLIP-S1.datacompdr": ("fastvit_mci1.apple_mclip", "zero-shot on phones; read its licence first"),
    "MobileCLIP-S2.datacompdr": ("fastvit_mci2.apple_mclip", "zero-shot on phones with more room; read its licence first"),
    "MobileCLIP-B.datacompdr": ("vit_base_mci_224.apple_mclip", "a hybrid ViT-B for zero-shot; read its licence first"),
    "MobileCLIP-B.datacompdr_lt": ("vit_base_mci_224.apple_mclip_lt", "the same, trained longer; read its licence first"),
    "MobileCLIP2-S0.dfndr2b": ("fastvit_mci0.apple_mclip2_dfndr2b", "the smallest of these; read its licence first"),
    "MobileCLIP2-S2.dfndr2b": ("fastvit_mci2.apple_mclip2_dfndr2b", "zero-shot on phones; read its licence first"),
    "MobileCLIP2-S3.dfndr2b": ("fastvit_mci3.apple_mclip2_dfndr2b", "zero-shot on phones with more room; read its licence first"),
    "MobileCLIP2-S4.dfndr2b": ("fastvit_mci4.apple_mclip2_dfndr2b", "accuracy of a ViT-L at lower latency; read its licence first"),
    "MobileCLIP2-B.dfndr2b": ("vit_base_mci_224.apple_mclip2_dfndr2b", "a hybrid ViT-B for zero-shot; read its licence first"),
    "MobileCLIP2-L-14.dfndr2b": ("vit_large_patch14_clip_224.apple_mclip2_dfndr2b", "a ViT-L for zero-shot; read its licence first"),
}  # fmt: skip
"""By open_clip's name and tag: the timm config of the same training, for its licence, and what it is good for."""

EMBEDDED: dict[str, dict[str, Any]] = {
    "tf_efficientnet_lite0": {
        "config": "tf_efficientnet_lite0.in1k",
        "file": "tf_efficientnet_lite0.safetensors",
        "good_for": "real photos offline from the first minute",
        "license": "apache-2.0",
    },
    "vit_embedded_64": {
        "config": "vit_tiny_patch16_224.augreg_in21k",
        "file": "vit_embedded_64.safetensors",
        "arch": "vit_tiny_patch16_224",
        "model_args": {"img_size": 64, "patch_size": 8, "depth": 8, "global_pool": "avg"},
        "input_size": (3, 64, 64),
        "num_classes": 0,
        "crop_pct": 1.0,
        "good_for": "prompt and token methods offline, and quick trials on small images",
        "license": "apache-2.0",
    },
}
"""By name: `config` is the timm config that fills in what is not given; other keys are facts that win over it."""


def main() -> int:
    """Write the catalogue, or compare it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the file differs")
    check: bool = parser.parse_args().check
    path, text = ROOT / INDEX, made()
    if not check:
        files.atomic_text(path, text)
        print(f"wrote {path.name}: {len(BACKBONES) + len(DUAL) + len(EMBEDDED)} backbones, {len(text.encode())} bytes")
        return 0
    if path.is_file() and path.read_bytes() == text.encode():
        return 0
    print(f"{path.name} is not what this script makes; run: python scripts/{Path(__file__).name}", file=sys.stderr)
    return 1


def made() -> str:
    """Give the catalogue's text."""
    index = Index(catalogue=True)
    index.sections["backbones"] = {
        **{name: {**described(name), "good_for": good_for} for name, good_for in BACKBONES.items()},
        **{f"{ARCH}/{name.lower()}": dual(name, *given) for name, given in DUAL.items()},
        **{name: embedded(given) for name, given in EMBEDDED.items() if (CARRIED / given["file"]).is_file()},
    }
    return HEADER + dump(index)


def described(config: str) -> dict[str, Any]:
    """Give the facts of a timm config and of the network that it configures."""
    cfg = get_pretrained_cfg(config, allow_unregistered=False)
    if cfg is None or not cfg.hf_hub_id:
        raise SystemExit(f"timm {timm.__version__} has no hub weights called {config}")
    own = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {
        "arch": cfg.architecture,
        "source": f"hf-hub:{cfg.hf_hub_id}",
        "license": cfg.license or "",
        **network(cfg.architecture, cfg.num_classes, cfg.input_size, {}),
        **{key: plain(getattr(cfg, key)) for key in own},
    }


def network(arch: str, num_classes: int, input_size: tuple[int, ...], model_args: dict[str, Any]) -> dict[str, Any]:
    """Count what a network holds, without weights in memory."""
    with torch.device("meta"):
        bare = timm.create_model(arch, num_classes=0, **model_args).eval()
        full = timm.create_model(arch, num_classes=num_classes, **model_args)
        with torch.no_grad():
            features = bare(torch.zeros(1, *input_size)).shape[-1]
    head = sorted(set(full.state_dict()) - set(bare.state_dict()))
    return {"params": sum(p.numel() for p in bare.parameters()), "features": features, "head": head}


def dual(name: str, image_tower: str, good_for: str) -> dict[str, Any]:
    """Give the facts of a model of open_clip's list."""
    card, like = clip_card(PREFIX + name), get_pretrained_cfg(image_tower, allow_unregistered=False)
    if like is None:
        raise SystemExit(f"timm {timm.__version__} has no config {image_tower}")
    with torch.device("meta"):
        model = timm.create_model(card.arch, **card.model_args)
    params = sum(p.numel() for p in model.parameters())
    facts = {k: v for k, v in card.json().items() if k not in ("fingerprint", "name")}
    return {**facts, "params": params, "license": like.license or "", "good_for": good_for}


def embedded(given: dict[str, Any]) -> dict[str, Any]:
    """Give the facts of a backbone that the package carries; digest, size and fingerprint once its file is there."""
    typed = {k: plain(v) for k, v in given.items() if k not in ("config", "file", "num_classes")}
    facts = {**described(given["config"]), **typed, "source": f"package:vtzoo.embedded/{given['file']}"}
    classes = given.get("num_classes", get_pretrained_cfg(given["config"]).num_classes)
    facts |= network(facts["arch"], classes, facts["input_size"], facts.get("model_args", {}))
    path = ROOT / "vtzoo" / "embedded" / given["file"]
    if path.is_file():
        facts["head"] = [name for name in facts["head"] if name in files.header(path).tensors]
        facts |= {"digest": files.sha256(path), "size_bytes": path.stat().st_size, **identity(path, facts["head"])}
    return facts


def identity(path: Path, head: list[str]) -> dict[str, str]:
    """Fingerprint a weights file, head left out."""
    from vtzoo.fingerprint import fingerprint
    from vtzoo.tensors import TensorFile

    tensors = TensorFile(path)
    return {"fingerprint": fingerprint({name: tensors[name] for name in tensors if name not in head})}


if __name__ == "__main__":
    sys.exit(main())
