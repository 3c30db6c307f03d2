"""A frozen linear with a thin product: the same function and gradients as written out, and nothing saved that is saved elsewhere."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import vtzoo
from tests import families
from vtzoo import lean
from vtzoo.costs import memory_bytes

OUT, IN, RANK = 7, 5, 2
BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda z: z,
    "gelu": F.gelu,
    "gelu tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "gate": lambda z: F.silu(z) * (1 + z),
    "norm": lambda z: F.layer_norm(
        z, (IN,), torch.linspace(0.5, 2, IN, dtype=z.dtype), torch.linspace(-1, 1, IN, dtype=z.dtype)
    ),
    "bare norm": lambda z: F.layer_norm(z, (IN,)),
    "frozen scale": lambda z: z * torch.linspace(0.5, 2, IN, dtype=z.dtype),
}


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """A frozen weight and bias, and two trained factors."""
    weight, bias = torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, dtype=dtype)
    left, right = torch.randn(OUT, RANK, dtype=dtype), torch.randn(RANK, IN, dtype=dtype)
    return weight, bias, left.requires_grad_(), right.requires_grad_()


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_it_is_the_sum_and_so_are_its_gradients(before: Callable[[Tensor], Tensor], biased: bool) -> None:
    """Output and gradients are those of x (W + L R)^T + b by autograd, whatever the input came out of."""
    weight, bias, left, right = drawn()
    z = torch.randn(3, 4, IN, dtype=torch.float64, requires_grad=True)
    found = lean.linear(before(z * 1), weight, bias if biased else None, left, right)
    wanted = F.linear(before(z * 1), weight + left @ right, bias if biased else None)
    assert torch.allclose(found, wanted, rtol=1e-12)
    grad = torch.randn_like(wanted)
    got, want = (torch.autograd.grad(y, (z, left, right), grad) for y in (found, wanted))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("before", ["gelu", "silu", "norm", "gate"])
def test_it_saves_no_copy_of_its_input(before: str) -> None:
    """Of what came out of an activation, a norm or a gate it keeps what that node keeps, not the input beside it."""
    weight, bias, left, right = drawn()
    x = BEFORE[before](torch.randn(3, IN, dtype=torch.float64, requires_grad=True) * 1)
    y = lean.linear(x, weight, bias, left, right)
    assert y.grad_fn is not None
    assert all(t is None or t.data_ptr() != x.data_ptr() for t in y.grad_fn.saved_tensors)  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", [(0, 4, IN), (2, 0, IN), (IN,)], ids=str)
def test_no_rows_and_a_single_one(shape: tuple[int, ...]) -> None:
    """What has no rows, as tokens that a prompt of length zero stands for, and a lone row go through and back."""
    weight, bias, left, right = drawn()
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if len(shape) == 1:
        z = z[None]
    y = lean.linear(F.gelu(z * 1), weight, bias, left, right)
    wanted = F.linear(F.gelu(z * 1), weight + left @ right, bias)
    assert torch.allclose(y, wanted, rtol=1e-12)
    got, want = (torch.autograd.grad(o.sum(), (z, left, right)) for o in (y, wanted))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(got, want, strict=True))


def test_an_input_without_a_gradient_gets_none() -> None:
    """At the network's first trained layer only the factors get gradients."""
    weight, bias, left, right = drawn()
    lean.linear(torch.randn(3, IN, dtype=torch.float64), weight, bias, left, right).sum().backward()
    assert left.grad is not None
    assert right.grad is not None
    assert weight.grad is None


def test_activation_checkpointing_sees_each_tensor_once() -> None:
    """Inside a checkpoint, which forbids to ask twice for what is saved, gradients are the same."""
    weight, bias, left, right = drawn()
    z = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)

    def run(z: Tensor) -> Tensor:
        return lean.linear(F.gelu(z * 1), weight, bias, left, right).square()

    plain = torch.autograd.grad(run(z).sum(), (z, left, right))
    again = torch.autograd.grad(checkpoint(run, z, use_reentrant=False).sum(), (z, left, right))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_a_thin_matrix_alone_is_a_linear(before: Callable[[Tensor], Tensor], biased: bool) -> None:
    """Output and gradients, its bias's too, are those of a plain linear, whatever the input came out of; no second input is kept."""
    weight, bias, *_ = (t.requires_grad_() for t in drawn())
    z = torch.randn(3, 4, IN, dtype=torch.float64, requires_grad=True)
    x, plain = before(z * 1), before(z * 1)
    found = lean.thin(x, weight, bias if biased else None)
    wanted = F.linear(plain, weight, bias if biased else None)
    assert torch.equal(found, wanted)
    assert found.grad_fn is not None
    copied = any(t is not None and t.data_ptr() == x.data_ptr() for t in found.grad_fn.saved_tensors)  # type: ignore[attr-defined]
    assert not copied or before in (BEFORE["nothing"], BEFORE["relu"], BEFORE["frozen scale"])
    of = (z, weight, bias) if biased else (z, weight)
    grad = torch.randn_like(wanted)
    got, want = (torch.autograd.grad(y, of, grad) for y in (found, wanted))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(got, want, strict=True))


def test_a_bias_may_be_trained_beside_the_product() -> None:
    """Its gradient is the sum over rows, as autograd has it."""
    weight, bias, left, right = drawn()
    bias.requires_grad_()
    x = torch.randn(3, 4, IN, dtype=torch.float64)
    grad = torch.randn(3, 4, OUT, dtype=torch.float64)
    got = torch.autograd.grad(lean.linear(x, weight, bias, left, right), (bias, left, right), grad)
    want = torch.autograd.grad(F.linear(x, weight + left @ right, bias), (bias, left, right), grad)
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(got, want, strict=True))


def test_a_second_derivative_is_refused() -> None:
    """What is computed again has no graph of its own: a second derivative is an error, and never a wrong number."""
    weight, bias, left, right = drawn()
    z = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    y = lean.linear(F.gelu(z), weight, bias, left, right).square().sum()
    (first,) = torch.autograd.grad(y, z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "all in bf16"])
def test_few_bits_keep_a_small_product(autocast: bool) -> None:
    """In bf16 a product far below the weight's last digit still counts, since the two are never added up."""
    weight, _, left, right = drawn(torch.float32 if autocast else torch.bfloat16)
    weight = torch.full_like(weight, 100.0)
    with torch.no_grad():
        left.mul_(1e-3)
    x = torch.ones(2, IN, dtype=weight.dtype)
    x[:, ::2] = -1
    x[:, 0] = 0  # 100 - 100 + 100 - 100
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = lean.linear(x, weight, None, left, right)
    assert y.dtype == torch.bfloat16
    wanted = x.double() @ (left.double() @ right.double()).T
    assert (y.double() - wanted).norm() < 0.05 * wanted.norm()
    y.float().square().sum().backward()
    assert left.grad is not None
    assert left.grad.dtype == left.dtype


@pytest.mark.parametrize(
    ("spec", "taken"),
    [
        ("lora[rank=2,targets=fc1|fc2]", 4),
        ("lora[rank=2,qkv=qv,targets=qkv]", 2),
        ("lora[rank=2,targets=fc1|fc2]+ssf[targets=fc2]", 4),
        ("ssf[targets=fc2]+lora[rank=2,targets=fc1|fc2]", 2),
        ("lora[rank=2,dropout=0.5,targets=fc2]", 0),
        ("lora[rank=2,dynamic=true,targets=fc2]", 0),
        ("lora[rank=2,init=pissa,targets=fc2]", 0),
        ("lora[rank=2,dora=true,targets=fc2]", 0),
        ("lora[rank=2,targets=fc2]+bitfit", 2),
        ("bitfit+lora[rank=2,targets=fc2]", 2),
        ("lora[rank=2,dropout=0.5,targets=fc2]+bitfit", 0),
        ("lora[rank=2,targets=fc2]+full", 0),
    ],
)
def test_it_is_taken_where_the_product_is_all_there_is(spec: str, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes the lean way where LoRA acts right on a frozen linear and nowhere else; it computes what evaluation does."""
    model, calls = vtzoo.inject(families.build("vit"), spec), list[int]()
    families.perturb({n: p for n, p in model.named_parameters() if p.requires_grad})
    x, run = families.batch("vit"), lean.linear
    monkeypatch.setattr(lean, "linear", lambda *given: (calls.append(1), run(*given))[1])
    y = model.eval()(x)
    assert len(calls) == taken
    with torch.no_grad():
        assert torch.allclose(model(x), y, rtol=1e-10)
    assert len(calls) == taken


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's attention under vmap
def test_gradients_of_single_images_go_the_plain_way() -> None:
    """torch.func's transforms, which know nothing of the lean way, give each image's gradients as before."""
    model = vtzoo.inject(families.build("vit"), "lora[rank=2,targets=fc2]")
    families.perturb({n: p for n, p in model.named_parameters() if p.requires_grad})
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    x = families.batch("vit", 3)

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, values, (image[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(trained, x)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in trained:
            assert torch.allclose(each[name].sum(0), parameter.grad, rtol=1e-9, atol=1e-12)


def test_its_memory_is_told_as_it_is() -> None:
    """What `suggest` counts by hooks on saved tensors is what the lean way keeps, and less than the plain way does."""
    size = (3, *families.FAMILIES["vit"].size)
    told = [
        memory_bytes(vtzoo.inject(families.build("vit"), f"lora[rank=2,targets=fc2{more}]"), size, 8)
        for more in ("", ",dropout=0.5")
    ]
    hidden = 8 * (4 * 32) * (3 * 4 + 1) * 8  # images, width, tokens, bytes: what comes into the second block's fc2
    assert told[0] <= told[1] - hidden


def test_an_input_that_was_changed_out_of_sight_is_kept() -> None:
    """Steering hooks scale activations in place without autograd: gradients are those of what the layer really saw."""
    weight, bias, left, right = drawn()
    z = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    x = F.gelu(z * 1)
    with torch.no_grad():
        x.mul_(0.5)
    got = torch.autograd.grad(lean.linear(x, weight, bias, left, right).sum(), right, retain_graph=True)
    want = torch.autograd.grad(F.linear(x, weight + left @ right, bias).sum(), right)
    assert torch.allclose(got[0], want[0], rtol=1e-10)


def test_it_can_be_turned_off() -> None:
    """For gradients of gradients, and for forward-mode, which turns it off by itself."""
    weight, bias, *_ = drawn()
    assert lean.applies(weight, bias)
    with lean.off():
        assert not lean.applies(weight, bias)
    with torch.autograd.forward_ad.dual_level():
        assert not lean.applies(weight, bias)
    assert lean.applies(weight, bias)
