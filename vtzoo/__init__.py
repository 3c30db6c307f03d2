"""One frozen vision backbone, many small tasks: train deltas, merge them, fold them, distil them, ship them.

    import vtzoo
    model = vtzoo.build("tf_efficientnet_lite0", num_classes=10)     # frozen, eval
    vtzoo.inject(model, "lora[rank=8]+bitfit", seed=0)               # a fresh trainable delta, in place

Importing this package loads nothing heavy: a name below is fetched when it is first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtzoo.backbone import build
    from vtzoo.delta import Delta
    from vtzoo.errors import VtzooError
    from vtzoo.folding import fold
    from vtzoo.live import attach, detach, extract, inject
    from vtzoo.merging import merge
    from vtzoo.sharing import pull, push, sync
    from vtzoo.verbs.bring.lycoris import import_lycoris
    from vtzoo.verbs.bring.peft import import_peft
    from vtzoo.verbs.diff import diff
    from vtzoo.verbs.distill import distill
    from vtzoo.verbs.evaluate import evaluate
    from vtzoo.verbs.export.onnx import export_onnx
    from vtzoo.verbs.export.peft import export_peft
    from vtzoo.verbs.export.program import export_program
    from vtzoo.verbs.export.tasks import export_tasks
    from vtzoo.verbs.predict import predict
    from vtzoo.verbs.report import report
    from vtzoo.verbs.sensitivity import sensitivity_of
    from vtzoo.verbs.sign import sign
    from vtzoo.verbs.suggest import suggest
    from vtzoo.verbs.sweep import sweep
    from vtzoo.verbs.train import train
    from vtzoo.verbs.verify import verify
    from vtzoo.zoo import Zoo

__version__ = "0.1.0.dev0"

__all__ = [
    "Delta",
    "VtzooError",
    "Zoo",
    "__version__",
    "attach",
    "build",
    "detach",
    "diff",
    "distill",
    "evaluate",
    "export_onnx",
    "export_peft",
    "export_program",
    "export_tasks",
    "extract",
    "fold",
    "import_lycoris",
    "import_peft",
    "inject",
    "merge",
    "predict",
    "pull",
    "push",
    "report",
    "sensitivity_of",
    "sign",
    "suggest",
    "sweep",
    "sync",
    "train",
    "verify",
]

_HOME = {
    "Delta": "vtzoo.delta",
    "VtzooError": "vtzoo.errors",
    "Zoo": "vtzoo.zoo",
    "attach": "vtzoo.live",
    "build": "vtzoo.backbone",
    "detach": "vtzoo.live",
    "diff": "vtzoo.verbs.diff",
    "distill": "vtzoo.verbs.distill",
    "evaluate": "vtzoo.verbs.evaluate",
    "export_onnx": "vtzoo.verbs.export.onnx",
    "export_program": "vtzoo.verbs.export.program",
    "export_tasks": "vtzoo.verbs.export.tasks",
    "export_peft": "vtzoo.verbs.export.peft",
    "extract": "vtzoo.live",
    "fold": "vtzoo.folding",
    "import_lycoris": "vtzoo.verbs.bring.lycoris",
    "import_peft": "vtzoo.verbs.bring.peft",
    "inject": "vtzoo.live",
    "merge": "vtzoo.merging",
    "predict": "vtzoo.verbs.predict",
    "pull": "vtzoo.sharing",
    "push": "vtzoo.sharing",
    "report": "vtzoo.verbs.report",
    "sensitivity_of": "vtzoo.verbs.sensitivity",
    "sign": "vtzoo.verbs.sign",
    "suggest": "vtzoo.verbs.suggest",
    "sweep": "vtzoo.verbs.sweep",
    "sync": "vtzoo.sharing",
    "train": "vtzoo.verbs.train",
    "verify": "vtzoo.verbs.verify",
}


def __getattr__(name: str) -> Any:
    """Fetch a public name from its home on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'vtzoo' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
