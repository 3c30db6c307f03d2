"""Blocks that are computed again or compiled while a network is trained: the same gradients, and the network as it was."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import families
from tests.contract.cases import FAMILIES, METHODS, STILL, SUPPORT, WORKS, home, marked, perturbed
from vtzoo.attention import PlainAttention
from vtzoo.blocks import manner
from vtzoo.errors import UsageError, VtzooError

QUICK = ("vit", "beit", "eva02", "convnext", "resnet", "swinv2")
ALONG = ("dtl", "lst", "vit-adapter")  # side networks that blocks hand on: a block alone can't be computed again
PAIRS = [marked("lora[rank=2]", f, f in QUICK) for f in FAMILIES if SUPPORT["lora"][f] in WORKS]
PAIRS += [marked("lora[rank=2,dropout=0.3]+adapter+ssf", f) for f in QUICK[:4]]
PAIRS += [marked(m, home(m), False) for m in METHODS if m not in (*ALONG, *STILL, "lora")]
OUTSIDE = (
    "clip-adapter",
    "linear",
    "mlp-head",
    "side-tuning",
    "task-residual",
    "tip-adapter-f",
)  # no gradient passes their blocks, and nothing is kept there
Grads = dict[str, Tensor]


def gradients(
    model: nn.Module, x: Tensor, how: Callable[[], AbstractContextManager[Any]], precision: Any = nullcontext
) -> Grads:
    """Of everything trained, after one step's passes; running statistics as they are afterwards, too."""
    model.train().zero_grad()
    torch.manual_seed(0)
    with how():
        with precision():
            loss = model(x).float().square().sum()
        loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b.clone() for n, b in model.named_buffers()}


def same(a: Grads, b: Grads) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def close(a: Grads, b: Grads) -> bool:
    """But for rounding."""
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=1e-8, atol=1e-10) for n in a)


@pytest.fixture
def _fresh_compiler():
    """Each compilation starts from nothing."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("spec", "family"), PAIRS)
def test_blocks_computed_again_change_nothing(spec: str, family: str) -> None:
    """The gradients are the same, bit for bit, dropout included, and less is kept; afterwards no block runs otherwise."""
    model, x, kept = perturbed(spec, family), families.batch(family), [0, 0]

    def note(which: int, tensor: Tensor) -> Tensor:
        kept[which] += tensor.nbytes
        return tensor

    def watched(which: int, how: Any) -> Grads:
        with torch.autograd.graph.saved_tensors_hooks(partial(note, which), lambda t: t):
            return gradients(model, x, how)

    plain, again = gradients(model, x, nullcontext), manner(model, nullcontext, again=True)
    assert same(plain, gradients(model, x, again))
    watched(0, nullcontext)
    watched(1, again)
    assert kept[1] < kept[0] or spec in OUTSIDE
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert same(plain, gradients(model, x, nullcontext))


def test_norms_count_a_batch_once() -> None:
    """Running statistics that a network gathers while it is trained are those of one pass a step."""
    found = []
    for again in (False, True):
        model = families.build("resnet")
        how = manner(model, nullcontext, again=again)
        found.append([gradients(model, families.batch("resnet"), how) for _ in range(2)])
    assert all(same(a, b) for a, b in zip(*found, strict=True))
    assert not same(*found[0])


def test_what_is_computed_again_has_the_precision_of_the_first_time() -> None:
    """In bf16 the second pass takes the same attention, and gives the same bits, though the backward pass runs outside of both."""

    def precision() -> AbstractContextManager[Any]:
        stack = torch.autocast("cpu", torch.bfloat16)

        class Both(AbstractContextManager):  # type: ignore[type-arg]
            def __enter__(self) -> None:
                self.plain = PlainAttention()
                stack.__enter__()
                self.plain.__enter__()

            def __exit__(self, *error: object) -> None:
                self.plain.__exit__(*error)
                stack.__exit__(*error)

        return Both()

    model, x = perturbed("lora[rank=2]", "vit").float(), families.batch("vit").float()
    plain = gradients(model, x, nullcontext, precision)
    assert same(plain, gradients(model, x, manner(model, precision, again=True), precision))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch.compile asks for
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(("family", "again"), [("vit", False), pytest.param("beit", True, marks=pytest.mark.slow)])
def test_compiled_blocks_have_the_same_gradients(family: str, again: bool) -> None:
    """Also of a last batch that is smaller; all blocks of one kind share their code, and evaluation runs as written."""
    model, x = perturbed("lora[rank=2]+bitfit", family), families.batch(family, 4)
    how = manner(model, nullcontext, again=again, compiled="aot_eager")
    for batch in (x, x[:3]):
        assert close(gradients(model, batch, nullcontext), gradients(model, batch, how))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2
    model.eval()(x)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.usefixtures("_fresh_compiler")
def test_the_default_compiler_gives_the_same() -> None:
    """Code made by inductor, whose sums are in another order."""
    model, x = perturbed("lora[rank=2]+ssf", "vit"), families.batch("vit", 4)
    assert close(gradients(model, x, nullcontext), gradients(model, x, manner(model, nullcontext, compiled="inductor")))


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_failure_to_compile_says_what_to_leave_out() -> None:
    """Without a C++ compiler, say."""
    model, x = perturbed("lora[rank=2]", "vit"), families.batch("vit")

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler is found")

    torch._dynamo.register_backend(broken, name="broken")  # type: ignore[arg-type]
    with pytest.raises(VtzooError, match=r"torch.compile fails here \(.*no compiler") as caught:
        gradients(model, x, manner(model, nullcontext, compiled="broken"))
    assert "leave compile out" in (caught.value.hint or "")
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_network_without_blocks_is_refused() -> None:
    """There is nothing to compute again, and that is said."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 96, 96))
    with pytest.raises(UsageError, match="no numbered blocks"):
        manner(model, nullcontext, again=True)


@pytest.mark.parametrize("method", ALONG)
def test_side_networks_refuse(method: str) -> None:
    """What blocks hand on beside their outputs is gone when one is computed again; the error says what to switch off."""
    model = perturbed(method, "vit")
    with pytest.raises(UsageError, match="called by itself") as caught:
        gradients(model, families.batch("vit"), manner(model, nullcontext, again=True))
    assert "checkpointing off" in (caught.value.hint or "")
