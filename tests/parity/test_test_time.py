"""Test-time prompt tuning of a dual encoder beside its formula on the open_clip model of the same weights."""

import numpy as np
import pytest
from PIL import Image

from tests.contract.cases import relative
from tests.parity import language_rewrites as r
from tests.parity.clip_case import NAMES, TEMPLATE, made, say
from tests.parity.dual_case import dual, taught
from vtzoo.artifact import Live
from vtzoo.spec import BackboneCard, Preprocess, Task
from vtzoo.test_time import Config, Tuner
from vtzoo.tunable import tunable


def picture(seed: int) -> Image.Image:
    """Colours at random."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize("spec", ["coop", ""])
def test_tpt(spec: str, agree) -> None:
    """One step on the surest views' mean, anew for each image: of learned context, and of the template's words."""
    model = taught(spec)[0] if spec else dual()
    task = Task(name="t", classes=NAMES, words=NAMES, templates=(TEMPLATE,))
    card, how = BackboneCard(name="b", arch="clip"), Preprocess(input_size=(3, 32, 32))
    live = Live(model=model, card=card, task=task, preprocess=how)
    tuner = Tuner(live, Config(views=20), *tunable(model, task))
    (ctx,) = (p.detach().clone() for p in tuner.prompts)
    for seed in (0, 1):
        views = tuner._views(picture(seed))
        tuned = r.tpt(lambda c, x=views: r.coop(made(), say, x, NAMES, c), ctx)
        wanted = r.coop(made(), say, views[:1], NAMES, tuned)[0]
        assert relative(r.coop(made(), say, views[:1], NAMES, ctx)[0], wanted) > 1e-4
        agree(
            f"tpt, {spec or 'zero-shot'}",
            "rewrite",
            tolerance=1e-6,
            logits=relative(wanted, tuner(picture(seed)).double()),
        )
