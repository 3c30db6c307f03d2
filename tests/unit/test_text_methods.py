"""CoCoOp's classifier of each image, and PLOT's of places."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.contract.cases import logits, relative
from tests.unit.spoken import VIT, WORDS, images, spoken
from vtzoo.delta import Delta
from vtzoo.errors import NotFoldable, UsageError
from vtzoo.folding import plain_head
from vtzoo.graft import tensors_of
from vtzoo.installed import head_state, installed, say
from vtzoo.live import attach, extract, inject, trainable
from vtzoo.methods import cocoop, plot

SPECS = ("kgcoop", "prograd", "cocoop", "plot[context=3]")
D, W, M = VIT["embed_dim"], VIT["text"]["width"], 4


def taught(spec: str, trunk: str = VIT["trunk"]):
    """A perturbed delta on a dual encoder."""
    model = inject(spoken(trunk), spec)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for value in trainable(model).values():
            value.add_(torch.randn_like(value) * 0.1)
    return model


@pytest.mark.parametrize("spec", SPECS)
def test_every_prompt_gets_a_gradient_and_nothing_else(spec: str) -> None:
    """What learns is the context, and in CoCoOp's head what moves it; the towers stay as they are."""
    model = taught(spec).train()
    model(images()).square().sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {n for n in [*tensors_of(model), *head_state(model)] if n in dict(model.named_parameters())}


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("kgcoop", M * W),
        ("prograd[per_class=true]", len(WORDS) * M * W),
        ("cocoop[reduction=2]", M * W + (D + 1) * (D // 2) + (D // 2 + 1) * W),
        ("cocoop", M * W + (D + 1) * 8 + (8 + 1) * W),
        ("plot[prompts=3,context=5]", 3 * 5 * W),
    ],
)
def test_parameters_are_as_many_as_the_formula_says(spec: str, count: int) -> None:
    """Closed forms of the papers, the head's among them."""
    assert sum(p.numel() for p in trainable(inject(spoken(), spec)).values()) == count


@pytest.mark.parametrize("spec", SPECS)
def test_a_saved_delta_runs_the_same(spec: str, tmp_path) -> None:
    """After save and open it gives the same bits on the whole encoder, and on the image tower alone where the head says it all."""
    model = taught(spec)
    wanted = logits(model, images())
    extract(model).save(tmp_path / "d.safetensors")
    delta = Delta.open(tmp_path / "d.safetensors")
    assert torch.equal(logits(attach(spoken(), delta, check=False), images()), wanted)
    alone = spoken()
    alone.text = alone.logit_scale = alone.logit_bias = None
    alone.reset_classifier(0)
    if "cocoop" not in spec:
        assert torch.equal(logits(attach(alone, delta, check=False), images()), wanted)
        return
    with pytest.raises(UsageError, match="runs the text tower for each image"):
        attach(alone, delta, check=False)


@pytest.mark.parametrize("spec", SPECS[2:])
def test_no_linear_head_can_stand_for_it(spec: str) -> None:
    """Folding is refused with the reason."""
    delta = extract(taught(spec))
    with pytest.raises(NotFoldable, match="own"):
        plain_head(delta, "task")


def test_each_image_reads_its_own_prompts() -> None:
    """A row of CoCoOp is CoOp's with the context that the image moved."""
    model, other = taught("cocoop"), taught("coop")
    found, head = logits(model, images()), model.clip_head
    (own,), (theirs,) = tensors_of(model).values(), tensors_of(other).values()
    f = model.forward_head(model.forward_features(images()), pre_logits=True)
    for i, shift in enumerate(head.fc2(F.relu(head.fc1(f)))):
        with torch.no_grad():
            theirs.copy_(own + shift)
        assert relative(logits(other, images())[i], found[i]) < 1e-12
    assert shift.abs().max() > 0.01


def test_other_classes_are_read_by_what_was_learned() -> None:
    """Told other names, context and what moves it stay; the prompts are those of the names."""
    model = taught("cocoop")
    kept = {n: p.detach().clone() for n, p in trainable(model).items()}
    record = installed(model)
    assert record is not None
    say(model, record.parts, ("fox", "very old teapot"), ())
    other = inject(spoken().speak(("fox", "very old teapot")), "cocoop", seed=5)
    with torch.no_grad():
        for name, value in trainable(other).items():
            value.copy_(kept[name])
    assert torch.equal(logits(model, images()), logits(other, images()))


def test_images_are_read_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """More prompts than go through at once change neither logits nor gradients, in bf16 either; no more than that are read together."""
    model, sizes = taught("cocoop"), list[int]()
    model.text.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))

    def run(reduced: bool) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            y = model.to(torch.float32 if reduced else torch.float64)(
                images().to(torch.float32 if reduced else torch.float64)
            )
        y.square().sum().backward()
        return y.detach(), [p.grad.clone() for p in trainable(model).values()]

    wanted, grads = run(reduced=False)
    assert max(sizes) == len(images()) * len(WORDS)
    monkeypatch.setattr(cocoop, "ROWS", 2 * len(WORDS))
    sizes.clear()
    found, again = run(reduced=False)
    assert max(sizes) == 2 * len(WORDS)
    assert len(sizes) == 6  # three forward, and again in the backward pass
    assert relative(wanted, found) < 1e-12
    assert all(relative(a, b) < 1e-9 for a, b in zip(grads, again, strict=True))
    near, _ = run(reduced=True)
    assert relative(wanted, near.double()) < 0.1


def test_one_prompt_is_the_mean_over_places() -> None:
    """With a single prompt all mass goes to it: the logit is exp(s) times the mean cosine of patch tokens and text."""
    model = taught("plot[prompts=1,context=3]")
    tokens = F.normalize(model.image_proj(model.forward_features(images())[:, 1:]), dim=-1)
    prompts, _ = model.clip_head.layer()
    wanted = torch.einsum("bmd,cd->bc", tokens, prompts[:, 0]).detach() / tokens.shape[1]
    assert relative(wanted, logits(model, images())) < 1e-12


def test_a_plan_moves_all_the_mass() -> None:
    """Enough iterations give places and prompts equal shares; little entropy puts the most alike together."""
    alike = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.0, 0.4], [0.2, 0.95]], dtype=torch.float64)
    found = plot.plan(alike[None], plot.Config(entropy=0.05, iterations=500, tolerance=0))[0]
    assert torch.allclose(found.sum(-1), torch.full((4,), 0.25, dtype=torch.float64), atol=1e-3)
    assert torch.allclose(found.sum(-2), torch.full((2,), 0.5, dtype=torch.float64), atol=1e-3)
    assert found.argmax(-1).tolist() == [0, 0, 1, 1]


def test_a_plan_ends_for_each_pair_by_itself() -> None:
    """Hard pairs go on where easy ones have ended; each is what it is alone, and none has a gradient."""
    draw = torch.Generator().manual_seed(0)
    alike = torch.rand(3, 2, 6, 4, generator=draw, dtype=torch.float64)
    alike[0] = 0.5  # nothing to choose
    config = plot.Config(entropy=0.05)
    together = plot.plan(alike, config)
    alone = [plot.plan(one[None, None], config)[0, 0] for one in alike.flatten(0, 1)]
    assert torch.allclose(together.flatten(0, 1), torch.stack(alone), rtol=1e-12)
    short = plot.plan(alike, plot.Config(entropy=0.05, iterations=2))
    assert torch.equal(short[0], together[0])
    assert not torch.equal(short[1], together[1])


def test_an_answer_does_not_depend_on_its_neighbours() -> None:
    """An image gives the same logits alone as in a batch, of other classes' plans included."""
    model = taught("plot[context=3]")
    together = logits(model, images())
    assert relative(together, torch.cat([logits(model, x[None]) for x in images()])) < 1e-12


@pytest.mark.parametrize("trunk", ["test_resnet", "test_efficientnet", "test_convnext", "swin_tiny_patch4_window7_224"])
def test_places_of_maps(trunk: str) -> None:
    """Of a convolutional network and of windows each position is pooled by itself; on an even map all are what the whole is."""
    model = taught("plot[context=3,prompts=2]", trunk)
    x = images(2)
    features = model.forward_features(x)
    grid = features.shape[1:3] if features.shape[-1] == model.num_features else features.shape[2:]
    places = model.at_places(features)
    assert places.shape == (2, grid[0] * grid[1], D)
    one = features[:, :1, :1] if features.shape[-1] == model.num_features else features[..., :1, :1]
    assert torch.allclose(places[:, 0], model.forward_head(one.expand_as(features), pre_logits=True))
    assert torch.isfinite(logits(model, x)).all()


def test_pooling_by_attention_is_refused() -> None:
    """SigLIP's trunk weighs patches against each other."""
    with pytest.raises(UsageError, match="by attention"):
        inject(spoken("vit_base_patch16_siglip_224"), "plot")


@pytest.mark.parametrize("spec", ["kgcoop", "prograd", "cocoop", "plot"])
def test_a_text_tower_is_needed(spec: str) -> None:
    """A plain network is refused."""
    alone = spoken()
    alone.text = None
    alone.reset_classifier(3)
    with pytest.raises(UsageError, match="teaches a text tower"):
        inject(alone, spec)
