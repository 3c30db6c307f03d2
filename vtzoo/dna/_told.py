"""What a search says, and what it reports."""

from collections.abc import Mapping, Sequence
from typing import Any

from vtzoo import knobs, talk
from vtzoo.dna._choice import MS, Found
from vtzoo.dna._space import ARCH, STAGES, Pick, Space, written
from vtzoo.dna._traversal import Choice, Table, total


def typed(space: Space, picks: Sequence[Pick]) -> str:
    """A network as `--student` takes it."""
    args = space.arguments(picks)
    texts = {k: "|".join(map(str, v)) if isinstance(v, list) else v for k, v in args.items()}
    return str(knobs.Part(ARCH, texts))


def reported(space: Space, found: Found, ratings: Table) -> dict[str, Any]:
    """The network to be typed, `search`, every choice of every stage, and `measured`, the networks that were timed."""
    rows = [
        {
            "stage": i + 1, "depth": depth, "kernel": kernel, "rating": ratings[i][c], **{k: cost.stages[i][c] for k, cost in found.costs.items()},
            "chosen": c == found.choice[i],
        }
        for i in range(STAGES) for c, (depth, kernel) in enumerate(space.picks)
    ]  # fmt: skip

    def picks(choice: Choice) -> list[Pick]:
        return [space.picks[c] for c in choice]

    measured = [
        {
            "network": written(picks(choice)), "rating": total(ratings, choice), "sum_ms": found.costs[MS].of(choice), "ms": ms,
            "chosen": choice == found.choice,
        }
        for choice, ms in found.measured.items()
    ]  # fmt: skip
    return {"student": typed(space, picks(found.choice)), "search": rows} | ({"measured": measured} if measured else {})


def tell(found: Found, report: Mapping[str, Any], wholes: Mapping[str, float]) -> None:
    """A line for each stage, and one for the network; `wholes` are the teacher's parameters and multiply-adds."""
    for stage in range(1, STAGES + 1):
        rows = [r for r in report["search"] if r["stage"] == stage]
        own, every = next(r for r in rows if r["chosen"]), [r["rating"] for r in rows]
        ms = f", {own[MS]:.3g} ms" if MS in own else ""
        talk.say(f"stage {stage}: {own['depth']}x{own['kernel']}, relative loss {own['rating']:.4f} (all choices {min(every):.4f} to {max(every):.4f}){ms}")  # fmt: skip
    parts = [f"{found.costs[k].of(found.choice) / whole:.2%} of the teacher's {k.replace('_', '-')}" for k, whole in wholes.items()]  # fmt: skip
    parts += [f"{found.measured[found.choice]:.3g} ms measured"] if found.measured else []
    talk.say(f"found {report['student']}: {', '.join(parts)}")
