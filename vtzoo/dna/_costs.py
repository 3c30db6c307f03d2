"""What networks of a space cost: parameters and multiply-adds by count, milliseconds of one image in one onnxruntime thread as measured.

A network's cost is its stages' sum and a rest, which is the same for all (stem, head): of one whole network what its stages leave over. Measured so, the rest
also takes back what starting a session five times costs more than once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from vtzoo import talk
from vtzoo.dna._space import STAGES, Pick, Space
from vtzoo.dna._traversal import Choice, Table, total
from vtzoo.losses._outputs import Shapes
from vtzoo.onnx.run import Runtime, latencies, require
from vtzoo.probing import work
from vtzoo.spec import Preprocess
from vtzoo.speed import in_onnx, pinned


@dataclass(frozen=True)
class Cost:
    """One kind of cost.

    Attributes:
        stages: of each choice of each stage.
        rest: what a network has beside its stages.
    """

    stages: Table
    rest: float

    def of(self, choice: Choice) -> float:
        """A network's, as it adds up."""
        return total(self.stages, choice) + self.rest

    @property
    def least(self) -> Choice:
        """The cheapest network."""
        return tuple(min(range(len(row)), key=row.__getitem__) for row in self.stages)


@dataclass(frozen=True)
class Bench:
    """Where costs are told.

    Attributes:
        space: whose networks.
        classes: of the classifier.
        preprocess: of the images.
        shapes: of the stages' maps.
    """

    space: Space
    classes: int
    preprocess: Preprocess
    shapes: Shapes

    def network(self, choice: Choice) -> nn.Module:
        """A whole network, fresh."""
        return self.space.network([self.space.picks[c] for c in choice], self.classes).eval()

    def given(self, stage: int) -> tuple[int, int, int]:
        """What comes to a stage, [channels, height, width]: the first one's as large as what it gives."""
        channels, height, width = self.shapes.maps[max(0, stage - 1)]
        return channels, height, width

    def stages(self) -> Mapping[Pick, list[nn.Module]]:
        """Every choice of every stage."""
        return {pick: [m.eval() for m in self.space.stages(pick)] for pick in self.space.picks}


def counted(bench: Bench) -> tuple[Cost, Cost]:
    """Parameters and multiply-adds; exact."""
    size = bench.preprocess.input_size
    with torch.device("meta"):
        found = [[work(m, bench.given(i)) for i, m in enumerate(row)] for row in bench.stages().values()]
        first = work(bench.network((0,) * STAGES), size)
    tables = [[[row[i][kind] for row in found] for i in range(STAGES)] for kind in (0, 1)]
    params, macs = (
        Cost(table, whole - sum(row[0] for row in table)) for table, whole in zip(tables, first, strict=True)
    )
    return params, macs


def clocked(bench: Bench) -> Cost:
    """Milliseconds: choices of a stage in turns, then a whole network, of the quickest stages, beside these.

    Raises:
        UsageError: the onnx extra is not installed.
        NotExportable: the exporter's own reason.
    """
    require()
    stages = list(bench.stages().values())
    with pinned(1):
        runs = [[_run(row[i], bench.given(i), bench) for row in stages] for i in talk.track(range(STAGES), "onnxruntime", STAGES)]  # fmt: skip
        table = [latencies(*row) for row in runs]
        quickest = Cost(table, 0.0).least
        whole, *own = latencies(_whole(bench, quickest), *(row[c] for row, c in zip(runs, quickest, strict=True)))
    return Cost(table, whole - sum(own))


def wholes(bench: Bench, choices: Sequence[Choice]) -> list[float]:
    """Milliseconds of whole networks, in turns."""
    with pinned(1):
        return latencies(*(_whole(bench, choice) for choice in choices))


def _whole(bench: Bench, choice: Choice) -> Callable[[], object]:
    return _run(bench.network(choice), bench.preprocess.input_size, bench)


def _run(model: nn.Module, size: tuple[int, int, int], bench: Bench) -> Callable[[], object]:
    runtime: Runtime = in_onnx(model, replace(bench.preprocess, input_size=size))
    return runtime.bare(torch.randn(1, *size, generator=torch.Generator().manual_seed(0)))
