"""The contract of vtzoo/losses: what every loss keeps to, and where the formulas have no bound."""

import inspect
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.losses import Drawn, Loss, changed, draw, gradients, learning, load, tensors
from vtzoo import knobs, registry
from vtzoo.errors import ShapeMismatch, UsageError
from vtzoo.losses._hadamard import hadamard, levelling
from vtzoo.losses._outputs import Outputs
from vtzoo.losses._standard import phi_s, scored

NAMES = registry.names("losses")
SPECS = [
    *NAMES,
    "kd[standardise=true]",
    "token[kind=soft]",
    "feature[standard=phi-s]",
    "feature[kind=cosine,standard=none]",
]
ON_LOGITS = [s for s in SPECS if "logits" in registry.load("losses", s.partition("[")[0]).NEEDS]


def _learnt(drawn: Drawn, spec: str) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss's value, and its gradients with respect to the student's outputs."""
    drawn = replace(drawn, student=learning(drawn.student))
    value = load(spec, drawn)(drawn)
    return value.detach(), gradients(value, drawn.student)


def _pulls(found: dict[str, Tensor]) -> float:
    return max(float(g.abs().max()) for g in found.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_what_it_is(name: str) -> None:
    """PAPER, what of Outputs it needs, its function, and bridges and forms that name only its knobs."""
    module = registry.load("losses", name)
    schema = inspect.signature(getattr(module, name.replace("-", "_"))).parameters
    assert module.PAPER.startswith("arXiv:")
    assert set(module.NEEDS) <= {f.name for f in fields(Outputs)}
    assert list(schema)[:3] == ["student", "teacher", "labels"]
    for other, own in (("bridge", 2), ("standard", 2)):
        if hasattr(module, other):
            assert set(list(inspect.signature(getattr(module, other)).parameters)[own:]) <= set(list(schema)[3:])


@pytest.mark.parametrize("spec", SPECS)
def test_only_what_is_needed_is_looked_at(spec: str) -> None:
    """Of the student all that NEEDS names learns, and nothing else is needed; the teacher learns nothing."""
    needs = set(registry.load("losses", spec.partition("[")[0]).NEEDS)
    whole = draw(3)
    kept = {f.name: () if f.name == "maps" else None for f in fields(Outputs) if f.name not in needs}
    drawn = replace(whole, student=replace(whole.student, **kept), teacher=learning(replace(whole.teacher, **kept)))
    loss = load(spec, whole)
    ours = learning(drawn.student)
    value = loss(replace(drawn, student=ours))
    assert value.shape == ()
    assert torch.isfinite(value)
    found = gradients(value, ours)
    assert set(found) == set(tensors(ours))
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in found.values())
    assert not gradients(value, drawn.teacher)


@pytest.mark.parametrize("spec", SPECS)
def test_a_step_against_the_gradient_goes_down(spec: str) -> None:
    """And by as much as the gradient says."""
    drawn = draw(5)
    loss = load(spec, drawn)
    ours = learning(drawn.student)
    value = loss(replace(drawn, student=ours))
    found = gradients(value, ours)
    squared = sum(float((g**2).sum()) for g in found.values())
    step = 1e-6 * float(value.detach()) / squared
    moved = {n: t.detach() - step * found[n] if n in found else t.detach() for n, t in tensors(ours).items()}
    maps = tuple(moved[f"maps.{i}"] for i in range(len(ours.maps)))
    after = loss(replace(drawn, student=Outputs(moved["logits"], moved["features"], maps, moved["token"])))
    assert float(value.detach() - after.detach()) == pytest.approx(step * squared, rel=1e-3)


MET = [
    "kd[alpha=1]", "kd[alpha=1,standardise=true]", "dkd[ce=0]", "dist[ce=0]", "token[kind=soft,weight=1]", "attention", "rkd", "fitnet", "review", "feature",
    "feature[standard=phi-s]", "feature[kind=cosine]", "kdep",
]  # fmt: skip


@pytest.mark.parametrize("spec", MET)
def test_nothing_is_left_to_learn_from_oneself(spec: str) -> None:
    """A student that answers as its teacher (in the form in which it is taught) has a loss of zero and no gradient."""
    drawn = draw(7, alike=True)
    loss = load(spec, drawn)
    teacher = drawn.teacher
    if loss.standard is not None:
        teacher = replace(teacher, features=loss.standard(teacher.features))
    ours = learning(replace(teacher, token=teacher.logits))
    value = loss.function(ours, teacher, drawn.labels, **loss.knobs)
    assert abs(float(value.detach())) < 1e-12
    assert _pulls(gradients(value, ours)) < 1e-7


@pytest.mark.parametrize(
    ("spec", "same"),
    [("kd", "kd[alpha=1]"), ("hard", "hard[weight=1]"), ("dist", "dist[ce=0]"), ("kd[standardise=true]", "kd[alpha=1,standardise=true]")],
)  # fmt: skip
def test_without_labels_the_teacher_alone_is_followed(spec: str, same: str) -> None:
    """As if the labels had no weight."""
    drawn = draw(1)
    none = replace(drawn, labels=torch.full_like(drawn.labels, -1))
    assert float(_learnt(none, spec)[0]) == pytest.approx(float(_learnt(drawn, same)[0]), rel=1e-12)


@pytest.mark.parametrize("spec", ["dkd[ce=0]", "token", "token[kind=soft]"])
def test_without_labels_the_teacher_decides(spec: str) -> None:
    """Its decision stands where the label would."""
    drawn = draw(2)
    assert drawn.teacher.logits is not None
    decided = replace(drawn, labels=drawn.teacher.logits.argmax(-1))
    none = replace(drawn, labels=torch.full_like(drawn.labels, -1))
    assert float(_learnt(none, spec)[0]) == pytest.approx(float(_learnt(decided, spec)[0]), rel=1e-12)


@pytest.mark.parametrize("spec", ON_LOGITS)
def test_labels_are_indices_or_probabilities(spec: str) -> None:
    """One class's index is its probability of one, in float32 as well; a mixture's loss lies between its parts' where only the label differs."""
    drawn = draw(4)
    assert drawn.student.logits is not None
    one = F.one_hot(drawn.labels, drawn.student.logits.shape[-1])
    value, found = _learnt(drawn, spec)
    same, also = _learnt(replace(drawn, labels=one.float()), spec)
    assert float(value) == pytest.approx(float(same), rel=1e-12)
    assert all(torch.allclose(found[n], also[n], atol=1e-12) for n in found)
    mixed, pulls = _learnt(replace(drawn, labels=0.8 * one + 0.2 * one.roll(1, 1)), spec)
    assert torch.isfinite(mixed)
    assert mixed != value
    assert all(torch.isfinite(g).all() for g in pulls.values())


@pytest.mark.parametrize("spec", ["kd", "hard", "dist", "token", "kd[standardise=true]"])
def test_mixed_labels_have_their_shares(spec: str) -> None:
    """.8 of one class and .2 of another is .8 of the one loss and .2 of the other."""
    drawn = draw(6)
    assert drawn.student.logits is not None
    one = F.one_hot(drawn.labels, drawn.student.logits.shape[-1]).double()
    first, other, mixed = (_learnt(replace(drawn, labels=y), spec)[0] for y in (one, one.roll(1, 1), 0.8 * one + 0.2 * one.roll(1, 1)))  # fmt: skip
    assert float(mixed) == pytest.approx(float(0.8 * first + 0.2 * other), rel=1e-12)


@pytest.mark.parametrize("spec", SPECS)
def test_a_teacher_in_half_precision(spec: str) -> None:
    """Its answers count as the float32 numbers that they are; the loss is in float32."""
    drawn = draw(8)
    ours = changed(drawn.student, Tensor.float)
    half, wide = (changed(changed(drawn.teacher, Tensor.half), to) for to in (Tensor.half, Tensor.float))
    loss = _in_float32(load(spec, drawn))
    first, second = (loss(replace(drawn, student=ours, teacher=t)) for t in (half, wide))
    assert first.dtype == torch.float32
    assert torch.equal(first, second)


def _in_float32(loss: Loss) -> Loss:
    for module in (loss.bridge, loss.standard):
        if module is not None:
            module.float()
    return loss


@pytest.mark.parametrize("spec", ["rkd", "feature[standard=phi-s]", "kdep", "kd", "attention"])
def test_a_student_in_bf16(spec: str) -> None:
    """Where networks compute in bf16 a loss of what they gave doesn't."""
    drawn = draw(9)
    loss = _in_float32(load(spec, drawn))
    met = changed(drawn.student, Tensor.float)
    met = changed(met if loss.bridge is None else loss.bridge(met), Tensor.bfloat16)
    drawn, alone = replace(drawn, student=met, teacher=changed(drawn.teacher, Tensor.float)), replace(loss, bridge=None)
    wanted = alone(replace(drawn, student=changed(met, Tensor.float)))
    with torch.autocast("cpu", torch.bfloat16):
        found = alone(drawn)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("spec", SPECS)
def test_a_batch_of_one(spec: str) -> None:
    """The last images of an epoch may be one; what compares images has nothing to say of it."""
    drawn = draw(10, batch=1)
    value, found = _learnt(drawn, spec)
    assert torch.isfinite(value)
    assert all(torch.isfinite(g).all() for g in found.values())
    assert (value == 0) == (spec == "rkd")


NONSENSE = [
    "kd[temperature=0]", "kd[alpha=1.5]", "kd[standardise=perhaps]", "hard[weight=-1]", "dkd[beta=-1]", "dkd[temperature=0]", "dist[gamma=-1]",
    "dist[temperature=-2]", "dist[ce=-1]", "feature[kind=l1]", "feature[standard=phi]", "fitnet[interpolation=nearest]", "attention[p=0.5]", "attention[p=nan]",
    "rkd[distance=-1]", "rkd[angle=inf]", "token[kind=both]", "token[weight=2]", "kdep[power=0]", "kdep[temperature=0]", "review[weight=1]",
]  # fmt: skip


@pytest.mark.parametrize("spec", NONSENSE)
def test_nonsense_is_refused(spec: str) -> None:
    """With the knob's name, before anything is computed."""
    part = knobs.one(spec)
    function = getattr(registry.load("losses", part.name), part.name)
    with pytest.raises(UsageError, match=next(iter(part.knobs))):
        knobs.decode(function, part.knobs, part.name)


# ------------------------------------------------------------------------------------------------------------- no bound


@pytest.mark.parametrize("spec", ["kd[standardise=true]", "dist", "dist[ce=0]"])
@pytest.mark.parametrize("value", [0.0, 3.1])
def test_logits_that_are_all_equal(spec: str, value: float) -> None:
    """A head that starts at zero has no spread to divide by: gradients stay small, on either side."""
    drawn = draw(11)
    assert drawn.student.logits is not None
    for dtype in (torch.float32, torch.float64):
        equal = torch.full_like(drawn.student.logits, value, dtype=dtype)
        flat = replace(drawn, student=replace(drawn.student, logits=equal))
        teacher = replace(drawn.teacher, logits=equal[:1].expand_as(drawn.student.logits).clone())
        for one in (flat, replace(drawn, teacher=teacher), replace(flat, teacher=teacher)):
            loss, found = _learnt(one, spec)
            assert torch.isfinite(loss)
            assert _pulls(found) < 10


def test_images_that_are_equal() -> None:
    """Features of the student that coincide, two of them or all, have distances of zero and finite gradients."""
    drawn = draw(12, batch=4)
    assert drawn.student.features is not None
    two, zero = drawn.student.features.clone(), torch.zeros_like(drawn.student.features)
    two[1] = two[0]
    for features in (two, zero, zero + 1):
        value, found = _learnt(replace(drawn, student=replace(drawn.student, features=features)), "rkd")
        assert value > 0
        assert _pulls(found) < 1e3


@pytest.mark.parametrize("spec", ["attention", "attention[p=1]", "review", "fitnet"])
def test_maps_of_zeros(spec: str) -> None:
    """Dead maps give finite values and gradients."""
    drawn = draw(13)
    for one in (
        replace(drawn, student=changed(drawn.student, torch.zeros_like)),
        replace(drawn, teacher=changed(drawn.teacher, torch.zeros_like)),
    ):
        value, found = _learnt(one, spec)
        assert torch.isfinite(value)
        assert all(torch.isfinite(g).all() for g in found.values())


def test_a_teacher_that_is_certain() -> None:
    """Probabilities that underflow have logarithms all the same."""
    drawn = draw(14)
    assert drawn.student.logits is not None
    sure = 300 * F.one_hot(drawn.labels, drawn.student.logits.shape[-1]).double()
    for spec in ("kd", "dkd[temperature=1]", "dist", "hard", "token[kind=soft]"):
        for logits in (sure, sure.roll(1, 1)):
            one = replace(drawn, teacher=replace(drawn.teacher, logits=logits))
            value, found = _learnt(one, spec)
            assert torch.isfinite(value)
            assert all(torch.isfinite(g).all() for g in found.values())


# -------------------------------------------------------------------------------------------------- bridges and forms


@pytest.mark.parametrize(("spec", "part"), [("feature", "features"), ("fitnet", "maps"), ("review", "maps")])
def test_a_bridge_takes_the_student_to_the_teachers_shapes(spec: str, part: str) -> None:
    """What it isn't about passes untouched, so that a sum of losses sees it; each of its parameters learns."""
    drawn = draw(15)
    loss = load(spec, drawn)
    assert loss.bridge is not None
    met = tensors(loss.bridge(drawn.student))
    for name, value in tensors(drawn.student).items():
        if name.startswith(part):
            assert met[name].shape == tensors(drawn.teacher)[name].shape
        else:
            assert met[name] is value
    loss(drawn).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in loss.bridge.parameters())


def test_fitnet_may_resize_before_or_after() -> None:
    """The 1x1 convolution runs where there are fewer places, which changes nothing."""
    drawn = draw(16, maps=[((3, 9, 7), (4, 4, 5)), ((3, 4, 3), (5, 8, 9))])
    loss = load("fitnet[interpolation=bicubic]", drawn)
    assert loss.bridge is not None
    seen: list[torch.Size] = []
    for conv in loss.bridge.get_submodule("convs").children():
        conv.register_forward_hook(lambda _module, _args, y: seen.append(y.shape[-2:]))
    every = loss.bridge(drawn.student).maps
    assert seen == [(4, 5), (4, 3)]
    for i, met in enumerate(every):
        conv = loss.bridge.get_submodule(f"convs.{i}")
        late = F.interpolate(conv(drawn.student.maps[i]), met.shape[-2:], mode="bicubic", antialias=True)
        assert torch.allclose(met, late, atol=1e-12)


@pytest.mark.parametrize("width", [8, 12, 10])
def test_phi_s_keeps_proportions(width: int) -> None:
    """Each dimension has mean 0 and deviation 1, and all distances shrink by one factor; z-scores have no such factor."""
    images = draw(17, width=width).images
    form, other = phi_s(images), scored(images)
    for made in (form, other):
        assert made(images).mean(0).abs().max() < 1e-12
        assert (made(images).std(0) - 1).abs().max() < 1e-12
    factors, unequal = (torch.pdist(made(images)) / torch.pdist(images) for made in (form, other))
    assert float(factors.max() / factors.min()) == pytest.approx(1, abs=1e-12)
    assert float(unequal.max() / unequal.min()) > 1.1


@pytest.mark.parametrize("spec", ["feature", "feature[standard=phi-s]"])
def test_forms_of_features_that_hardly_vary(spec: str) -> None:
    """Fewer images than dimensions and dimensions that never change are no division by zero."""
    drawn = draw(18)
    flat = drawn.images[:2].clone()
    flat[:, 0] = 3
    for images in (flat, flat[:1].expand(4, -1)):
        form = load(spec, replace(drawn, images=images)).standard
        assert form is not None
        assert torch.isfinite(form(drawn.images)).all()


def test_a_form_is_the_same_each_time() -> None:
    """Directions have no free sign."""
    images = draw(19, width=9).images
    assert torch.allclose(phi_s(images).directions, phi_s(images.flip(0)).directions, atol=1e-8)


WIDTHS = [1, 2, 4, 12, 20, 28, 36, 52, 60, 192, 320, 384, 448, 512, 576, 640, 768, 960, 1152, 1280]


@pytest.mark.parametrize("size", WIDTHS)
def test_hadamard(size: int) -> None:
    """Entries of 1 and -1, and rows at right angles, at the widths that networks have."""
    made = hadamard(size)
    if size == 52:  # 2 (25 + 1), and 25 is no prime
        assert made is None
        return
    assert made is not None
    assert (made.abs() == 1).all()
    assert torch.equal(made @ made.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 7, 10, 52, 92])
def test_levelling_without_a_hadamard_matrix(size: int) -> None:
    """A rotation that gives every dimension the mean variance, for very unequal and for equal variances."""
    assert hadamard(size) is None
    for variances in (torch.logspace(-6, 3, size, dtype=torch.float64), torch.ones(size), torch.eye(size)[0]):
        turn = levelling(variances)
        assert torch.allclose(turn @ turn.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
        level = (turn @ torch.diag(variances.double()) @ turn.T).diag()
        assert torch.allclose(level, variances.double().mean().expand(size), atol=1e-9)


def test_kdep_needs_a_wider_teacher_and_enough_images() -> None:
    """A student wider than its teacher, or than there are images, is refused with both numbers."""
    module = registry.load("losses", "kdep")
    with pytest.raises(ShapeMismatch, match=r"9 features, 8 components"):
        module.standard(torch.randn(40, 8), 9, temperature=0.1, power=3)
    with pytest.raises(UsageError, match=r"6 components .* 6 images"):
        module.standard(torch.randn(6, 8), 6, temperature=0.1, power=3)


def test_kdep_takes_the_largest_components() -> None:
    """With neither power nor temperature the form is the projection that loses least."""
    images = draw(20, width=7).images
    main = registry.load("losses", "kdep").standard(images, 3, temperature=1.0, power=1.0)
    _, sizes, _ = torch.linalg.svd(images - images.mean(0), full_matrices=False)
    assert torch.allclose(main(images).norm(dim=0), sizes[:3], rtol=1e-9)
