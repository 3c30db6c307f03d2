"""A dual encoder, bare or with a delta, as a classifier of classes that only their names tell: zero-shot, and beyond what was trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vtzoo.artifact import Artifact, Live, go_live
from vtzoo.dual import ARCH
from vtzoo.errors import UsageError
from vtzoo.installed import installed, say
from vtzoo.spec import Task
from vtzoo.speech import named


@dataclass(frozen=True)
class Naming:
    """What classes are called, by label, and the templates around them; see `of_names`."""

    words: Mapping[str, str] = field(default_factory=dict[str, str])
    templates: Sequence[str] = ()


def of_names(
    artifact: Artifact, labels: Sequence[str], words: Mapping[str, str] | None = None, templates: Sequence[str] = ()
) -> Live:
    """Build it, and tell it these classes.

    Args:
        artifact: a dual encoder's card, or a delta on one.
        labels: of the classes.
        words: names by label, of those that are not the label with spaces.
        templates: around them; the delta's own unless given, else "a photo of a {}.".

    Raises:
        UsageError: there is no text tower, or the delta knows its own classes only.
    """
    card = artifact.delta.backbone if artifact.delta else artifact.card
    if card is None or card.arch != ARCH or not card.model_args.get("text"):
        raise UsageError(f"'{artifact.ref}' has no text tower to tell names", "use a clip: backbone, or a delta on one")
    known = artifact.delta.tasks[0] if artifact.delta and artifact.delta.tasks else None
    live = go_live(artifact, known.name if known else "", whole=True)
    said, around = named(labels, words or {}), tuple(templates) or (known.templates if known else ())
    record = installed(live.model)
    say(live.model, record.parts if record else (), said, around)
    around = live.model.get_classifier().templates  # type: ignore[operator,union-attr] - a TextHead
    task = Task(
        name=known.name if known else "zero-shot",
        classes=tuple(labels),
        preprocess=live.preprocess,
        words=said,
        templates=around,
    )
    return Live(model=live.model, card=live.card, task=task, preprocess=live.preprocess)
