"""A network as torch.export sees it: what PT2 keeps and ExecuTorch is made of."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vtzoo.errors import NotExportable
from vtzoo.onnx._quiet import quiet
from vtzoo.onnx.convert import HINT, first_line
from vtzoo.spec import Preprocess

BATCH = 2
"""Images of the example; of one, torch.export would take the batch for a constant."""


class Pictures(nn.Module):
    """A network that takes pictures as PIL and numpy hold them, uint8 [n, height, width, 3]; see `vtzoo.onnx.pixels`."""

    def __init__(self, network: nn.Module, shape: Preprocess) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", shape.mean), ("std", shape.std)):
            self.register_buffer(name, torch.tensor(values))

    def forward(self, image: Tensor) -> Tensor:
        """Normalise, put channels first, run."""
        own: Any = self
        return self.network(((image.float() / 255 - own.mean) / own.std).permute(0, 3, 1, 2))


def exported(
    network: nn.Module, shape: Preprocess, size: tuple[int, int, int], *, embedded: bool, dynamic_size: bool, most: int | None = None
) -> ExportedProgram:  # fmt: skip
    """Trace a network in evaluation mode; notes on where in the source a node comes from, which name files of this machine, are left out.

    Args:
        network: of one input and one output.
        shape: its preprocessing.
        size: of an image, [channels, height, width].
        embedded: take uint8 pictures [n, h, w, 3].
        dynamic_size: leave height and width free, too.
        most: the largest batch, where there is one.

    Raises:
        NotExportable: torch.export's own reason.
    """
    channels, height, width = size
    batch = Dim("batch", min=1, max=most) if most else Dim("batch")
    image = torch.zeros(BATCH, channels, height, width)
    if embedded:
        network, image = Pictures(network, shape), image.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
    sides = (1, 2) if embedded else (2, 3)
    free: dict[int, Any] = {0: batch, **(dict.fromkeys(sides, Dim.DYNAMIC) if dynamic_size else {})}
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(network.eval(), (image,), dynamic_shapes=(free,))
    except Exception as error:  # whatever tracing a network meets
        hint = "leave --dynamic-size out" if dynamic_size else HINT
        raise NotExportable(f"torch.export can't trace this network: {first_line(error)}", hint) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program
