"""Time any ref on this machine: in torch as it is, folded, and in other runtimes, by batch size."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from vtzoo import talk
from vtzoo.artifact import Artifact, Live, go_live, open_ref
from vtzoo.errors import NotExportable, NotFoldable, UsageError, VtzooError
from vtzoo.formats import KINDS
from vtzoo.probing import work
from vtzoo.refs import EXPORTS
from vtzoo.results import Timed
from vtzoo.speed import in_format, in_onnx, pinned, timed
from vtzoo.zoo import Zoo

USUAL = ("torch", "folded", "onnx")


def bench(
    *, ref: str, task: str | None = None, batches: Sequence[int] = (1, 8), threads: int = 1, forms: Sequence[str] = (), zoo: Zoo | None = None,
) -> Timed:  # fmt: skip
    """Measure latency and throughput.

    Args:
        ref: anything that runs: a delta, merge, model, student, backbone or exported file.
        task: whose head, where there are several.
        batches: images at once.
        threads: of torch and the others; 0 leaves them as many as torch takes.
        forms: torch (a delta attached), folded (a delta in plain weights), and as other runtimes run it, in plain weights where it folds: onnx, pt2,
            openvino, executorch. Of the first three all that there are unless given.
        zoo: where to look.

    Returns:
        `report`: parameters, multiply-adds, threads, and for each form and batch size the median time of a call and images a second.

    Raises:
        UsageError: no such form, here or at all, or batches of none.
        NotFoldable: "folded" was asked for, and it has no such form.
        NotExportable: another runtime was asked for, and its exporter can't.
    """
    if unknown := [f for f in forms if f not in USUAL + KINDS]:
        raise UsageError(f"no form is called '{unknown[0]}'", f"choose of {', '.join(USUAL + KINDS)}")
    if not batches or min(batches) < 1 or threads < 0:
        raise UsageError(
            f"batches {list(batches)} in {threads} threads take no time", "for example --batch 1 --batch 8"
        )
    zoo = zoo or Zoo.find()
    artifact = open_ref(ref, zoo, exports=True)
    wanted = _wanted(artifact, forms)
    with pinned(threads) as used:
        live = go_live(artifact, task)
        size, report = live.preprocess.input_size, dict[str, Any]()
        made: dict[str, nn.Module] = {wanted[0]: live.model}
        if artifact.exported is None:
            report["params"], report["macs"] = work(live.model, size)
            made = _forms(artifact, live, task, wanted, strict=bool(forms))
        rows = timed(made, size, batches)
    return Timed(ref=artifact.ref, path=str(artifact.path or ""), report={**report, "threads": used, "times": rows})


def _wanted(artifact: Artifact, asked: Sequence[str]) -> Sequence[str]:
    """The forms that were asked for; without a wish all that there are.

    Raises:
        UsageError: it has no such form.
    """
    usual = USUAL if artifact.delta is not None else ("torch", "onnx")
    there = (EXPORTS[next(iter(artifact.exported))],) if artifact.exported is not None else (*usual, *KINDS)
    if lacking := [f for f in asked if f not in there]:
        raise UsageError(
            f"'{artifact.ref}' has no form '{lacking[0]}' to be timed",
            f"leave --form out, or choose {' or '.join(there)}",
        )
    return asked or (there if artifact.exported is not None else usual)


def _forms(
    artifact: Artifact, live: Live, task: str | None, wanted: Sequence[str], *, strict: bool
) -> dict[str, nn.Module]:
    """These forms; unless `strict` those of them that can be made, and why not the others."""
    plain = live.model
    made: dict[str, nn.Module] = {"torch": live.model} if "torch" in wanted else {}
    if artifact.delta is not None and {*wanted} != {"torch"}:
        try:
            plain = go_live(artifact, task, plain=True).model
            made |= {"folded": plain} if "folded" in wanted else {}
        except NotFoldable as error:
            _refuse_or_say(error, strict=strict and "folded" in wanted)
    if "onnx" in wanted:
        try:
            made["onnx"] = in_onnx(plain, live.preprocess)
        except (NotExportable, UsageError) as error:
            _refuse_or_say(error, strict=strict)
    return made | {form: in_format(form, plain, live.preprocess) for form in KINDS if form in wanted}


def _refuse_or_say(error: VtzooError, *, strict: bool) -> None:
    if strict:
        raise error
    talk.say(error.message)
