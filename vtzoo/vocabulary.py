"""A dual encoder, bare or with a delta, as a classifier of classes that only their names tell: zero-shot, and beyond what was trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vtzoo.artifact import Artifact, Live, go_live
from vtzoo.dual import ARCH
from vtzoo.errors import UsageError
from vtzoo.installed import installed, say
from vtzoo.spec import Task
from vtzoo.speech import named
from vtzoo.text_head import Spoken
from vtzoo.tunable import says_words


@dataclass(frozen=True)
class Naming:
    """What classes are called, by label, and the templates around them; see `of_names`."""

    words: Mapping[str, str] = field(default_factory=dict[str, str])
    templates: Sequence[str] = ()


def of_names(artifact: Artifact, labels: Sequence[str], naming: Naming | None = None, task: str | None = None) -> Live:
    """Build it, and tell it these classes.

    Args:
        artifact: a dual encoder's card, or a delta on one.
        labels: of the classes.
        naming: what they are called, and what stands around that; unless given the delta's own names of classes that it knows, the
            label with spaces of others, and the delta's own templates, else "a photo of a {}.".
        task: of the delta, where it has several.

    Raises:
        UsageError: there is no text tower, or the delta knows its own classes only.
        NotFound: no such task, or several and none named.
    """
    card = artifact.delta.backbone if artifact.delta else artifact.card
    if card is None or card.arch != ARCH or not card.model_args.get("text"):
        raise UsageError(f"'{artifact.ref}' has no text tower to tell names", "use a clip: backbone, or a delta on one")
    naming, known = naming or Naming(), artifact.task(task)
    live = go_live(artifact, known.name if known else "", whole=True)
    _check_wordy(live, artifact.ref)
    own = dict(zip(known.classes, known.words, strict=True)) if known and known.words else {}
    said = named(labels, {label: word for label, word in {**own, **naming.words}.items() if label in labels})
    around = tuple(naming.templates) or (known.templates if known else ())
    record = installed(live.model)
    say(live.model, record.parts if record else (), said, around)
    around = live.model.get_classifier().templates  # type: ignore[operator,union-attr] - a TextHead
    name = known.name if known else "zero-shot"
    told = Task(name=name, classes=tuple(labels), preprocess=live.preprocess, words=said, templates=around)
    return Live(model=live.model, card=live.card, task=told, preprocess=live.preprocess)


def _check_wordy(live: Live, ref: str) -> None:
    """Refuse what has a plain classifier that its text tower doesn't make: that has learned more than words (in a merge, words that are gone).

    Raises:
        UsageError: it has.
    """
    plain = live.task is not None and not isinstance(live.model.get_classifier(), Spoken)  # type: ignore[operator] - timm's
    if plain and live.task is not None and not says_words(live.model, live.task):
        raise UsageError(
            f"'{ref}' has learned its own classes, and has nothing to say of others",
            "use a method that learns a context for all of them, such as coop, and that delta itself, not a merge of it",
        )
