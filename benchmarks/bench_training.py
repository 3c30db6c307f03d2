"""A training step of LoRA beside PEFT's, full fine-tuning and the frozen network: time and peak memory.

    python benchmarks/bench_training.py [ARCH …] [--batch 32] [--rounds 5] [--pixels 224] [--precision bf16] [--others | --methods SPEC …]

All live in one process and take a step in turns; a ratio is the median over the rounds. This package's run as `vtzoo train` runs them:
in bf16 with frozen weights kept in it, and with attention in plain products; all others under autocast. Memory is what a step holds at most
beside the model, by torch's own account of its allocations, the optimiser's state included. The frozen network passes
gradients from its head to the pixels and trains the head alone: no method that adapts all depths can be cheaper. With
--others DoRA, IA3 and OFT run beside PEFT's instead. With --methods any of this package's run beside the frozen network, a `*` after
one computes its blocks again in the backward pass. Adds its rows to results/training.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from _results import keep
from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model
from timm import create_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import vtzoo
from vtzoo.blocks import manner
from vtzoo.devices import accelerator, computing
from vtzoo.narrow import narrow
from vtzoo.recipe import Recipe

HEAD = ("training", "trained numbers", "s / step", "to PEFT's", "peak, MB", "to PEFT's")
METHODS_HEAD = tuple(h.replace("PEFT's", "the frozen network's") for h in HEAD)
SITES = r".*\.(qkv|proj|fc1|fc2)"
OURS = "targets=qkv|proj|fc1|fc2"
Builder = Callable[[nn.Module], nn.Module]
Context = Callable[[], AbstractContextManager[Any]]


def frozen(model: nn.Module) -> nn.Module:
    """Only the head is trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    return model


def peft(config: Any) -> Builder:
    """PEFT's method, with the head."""
    return lambda model: get_peft_model(model, config)


def ours(spec: str) -> Builder:
    """A method of this package."""
    return lambda model: vtzoo.inject(model, spec)


def pairs() -> dict[str, tuple[Any, str]]:
    """PEFT's configurations and ours, by name."""
    shared: dict[str, Any] = {"target_modules": SITES, "modules_to_save": ["head"]}
    return {
        "lora": (LoraConfig(r=8, lora_alpha=8, **shared), f"lora[rank=8,{OURS}]"),
        "dora": (LoraConfig(r=8, lora_alpha=8, use_dora=True, **shared), f"lora[rank=8,dora=true,{OURS}]"),
        "ia3": (IA3Config(feedforward_modules=r".*\.fc2", **shared), "ia3[outputs=qkv|proj|fc1,inputs=fc2]"),
        "oft": (OFTConfig(oft_block_size=8, **shared), f"oft[block=8,{OURS}]"),
    }


class Run:
    """One training, a step at a time."""

    def __init__(self, arch: str, build: Builder, asked: argparse.Namespace, *, own: bool, again: bool = False) -> None:
        torch.manual_seed(0)
        batch, pixels = asked.batch, asked.pixels
        sized = {} if pixels == 224 else {"img_size": pixels}
        self.model = build(create_model(arch, num_classes=10, **sized)).train()
        trained = partial(computing, accelerator(Recipe(precision=asked.precision, device="cpu")))
        reduced: Context = trained if own else partial(torch.autocast, "cpu", torch.bfloat16)
        self.precise = reduced if asked.precision == "bf16" else nullcontext
        self.blocks = manner(self.model, self.precise, again=again)
        if own and asked.precision == "bf16":
            narrow(self.model, torch.bfloat16, self.precise)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.x, self.y = torch.randn(batch, 3, pixels, pixels), torch.randint(0, 10, (batch,))

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        x = self.x.detach().requires_grad_()  # as if something were trained at the pixels: no depth is left out
        with self.blocks():
            with self.precise():
                loss: Tensor = F.cross_entropy(self.model(x).float(), self.y)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def peak(self) -> int:
        """Bytes that a step holds at most beside the model."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            self.step()
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        state = self.optimizer.state_dict()["state"].values()
        return most + sum(t.nbytes for slots in state for t in slots.values())


def builders(asked: argparse.Namespace) -> dict[str, Builder]:
    """What takes part, and beside which of PEFT's."""
    found: dict[str, Builder] = {} if asked.others else {"full fine-tuning": lambda model: model, "frozen": frozen}
    if asked.methods:
        return found | {spec: ours(spec.removesuffix("*")) for spec in asked.methods}
    for name, (config, spec) in pairs().items():
        if (name == "lora") != asked.others:
            found |= {f"PEFT {name}": peft(config), spec: ours(spec)}
    return found


def measured(arch: str, asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Everything about one network."""
    runs = {
        name: Run(arch, build, asked, own=not name.startswith(("PEFT", "full", "frozen")), again=name.endswith("*"))
        for name, build in builders(asked).items()
    }
    found: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        run.step()
        found[name] = {"params": sum(p.numel() for p in run.trained), "peak": run.peak(), "seconds": []}
        print(f"{name}: {found[name]['peak'] / 1e6:,.0f} MB", flush=True)
    for _ in range(asked.rounds):
        for name, run in runs.items():
            found[name]["seconds"].append(run.step())
    return found


def rows(found: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line for each training; each is compared with the PEFT method that stands before it, the first ones with the first, all with the frozen network where there is none."""
    lines: list[tuple[str, ...]] = []
    beside = next((m for n, m in found.items() if n.startswith("PEFT")), found.get("frozen", {}))
    for name, own in found.items():
        beside = own if name.startswith("PEFT") else beside
        ratio = statistics.median(a / b for a, b in zip(own["seconds"], beside["seconds"], strict=True))
        times = f"{statistics.median(own['seconds']):.2f}", f"{ratio:.2f}"
        memory = f"{own['peak'] / 1e6:,.0f}", f"{own['peak'] / beside['peak']:.2f}"
        lines.append((name, f"{own['params']:,}", *times, *memory))
        print(" | ".join(lines[-1]), flush=True)
    return lines


def main() -> None:
    """Run and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", nargs="*")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--others", action="store_true")
    parser.add_argument("--methods", nargs="*", default=[])
    asked = parser.parse_args()
    for arch in asked.arch or ["vit_small_patch16_224", "vit_base_patch16_224"]:
        found = measured(arch, asked)
        title = (
            f"{arch}, batch {asked.batch}, {asked.precision}"
            + (", others" if asked.others else "")
            + (f", {asked.pixels} px" if asked.methods else "")
        )
        keep(__doc__ or "", title, METHODS_HEAD if asked.methods else HEAD, rows(found), found)


if __name__ == "__main__":
    main()
