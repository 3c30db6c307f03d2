"""Many tasks in one network: every image goes its own task's way, and what the tasks have in common is computed once for all.

Images are sorted by task, so that each task's are a run of rows. The backbone runs on all rows. Where a delta acts, one of two
things happens:

    beside    its grafts' `enter` and `leave` see the delta's own rows; the host in between runs on all rows at once
    apart     the delta's own copy of the host, its grafts on it, runs on the delta's own rows; the backbone's on the others

Beside are grafts that are called and leave the host alone (low-rank branches, scales, adapters, side networks). Apart are those
that edit what the host reads, put tokens in, or write its forward anew, and hosts of which the delta holds other tensors. Either way it
is each graft's own code that runs. A host that is not called with rows of images (its weight is read, or it works on a table) gives way to the module
around it; the outermost is the network.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtzoo.by_rows import by_rows, class_axis
from vtzoo.classifier import head_names
from vtzoo.graft import CONTAINERS, Graft, entered, graft, grafts, hosts, left
from vtzoo.probing import evaluating, input_size

Heads = Mapping[str, nn.Module]


@dataclass(frozen=True, slots=True)
class Member:
    """A network with a delta on it, and its tasks' heads: of each task its modules by name.

    `model` is used up: it takes the lead's tensors in place of its own (`share`), and heads of all tasks.
    """

    model: nn.Module
    heads: Sequence[Heads]


@dataclass
class Rows:
    """Whose rows are in the present batch: the members, in order, and of each how many rows its tasks have."""

    counts: list[list[Any]] = field(default_factory=list[list[Any]])
    present: tuple[int, ...] = ()

    def of(self, member: int) -> Any:
        """How many rows a member has."""
        return sum(self.counts[member][1:], self.counts[member][0])

    @contextmanager
    def only(self, members: Sequence[int]) -> Generator[None]:
        """Inside, the batch holds these members' rows."""
        before, self.present = self.present, tuple(members)
        try:
            yield
        finally:
            self.present = before

    def split(self, x: Tensor, each: int) -> dict[int, Tensor]:
        """Each member's own, where an image has `each` rows of x."""
        if len(self.present) == 1:
            return {self.present[0]: x}
        return dict(zip(self.present, x.split([each * self.of(m) for m in self.present]), strict=True))


class Mixed(nn.Module):
    """The network of all tasks. `forward` takes images and, for each task, the numbers of its images in the batch.

    Args:
        lead: the backbone with a classifier of any size, used up; or the only member's own network.
        members: in the order of their tasks.
        pad: the logit of a class that a task doesn't have.

    Attributes:
        apart: of each member by number the modules that its rows have to themselves, "" being the whole network.
    """

    def __init__(self, lead: nn.Module, members: Sequence[Member], pad: float) -> None:
        super().__init__()
        self.rows = Rows()
        self.members = nn.ModuleList(m.model for m in members if m.model is not lead)
        self.lead = lead  # last, since what it shares with members is called by its names
        self.tasks = [len(m.heads) for m in members]
        names, every = head_names(lead), [m.heads for m in members]
        seen, given = _watch(lead, names)
        self.apart = _mix(lead, [m.model for m in members if m.model is not lead], seen, self.rows)
        for model in (lead, *self.members):
            for name in names:
                heads = _Heads([[h[name] for h in own] for own in every], given[name], self.rows, pad)
                model.set_submodule(name, heads)

    def forward(self, image: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """[n, 3, h, w] and of each task its row numbers [n_t] -> logits [n, most classes].

        Rows of no task are NaN.
        """
        counts = iter([r.shape[0] for r in rows])
        self.rows.counts = [[next(counts) for _ in range(n)] for n in self.tasks]
        order = torch.cat(list(rows))
        with self.rows.only(range(len(self.tasks))):
            y = self.lead(image.index_select(0, order))
        return y.new_full((image.shape[0], y.shape[1]), torch.nan).index_copy(0, order, y)


class _Heads(nn.Module):
    """Every task's classifier on its own rows, filled up to the most classes."""

    def __init__(self, heads: Sequence[Sequence[nn.Module]], given: Tensor, rows: Rows, pad: float) -> None:
        super().__init__()
        self.pad = pad
        self.heads = nn.ModuleList(nn.ModuleList(own) for own in heads)
        self.most = max(head(given).shape[class_axis(head)] for own in heads for head in own)
        self.__dict__["rows"] = rows

    def forward(self, x: Tensor) -> Tensor:
        """[n, features, …] -> [n, most classes, …]."""
        rows: Rows = self.__dict__["rows"]
        every: list[Any] = list(self.heads)
        present = [h for m in rows.present for h in every[m]]
        counts = [n for m in rows.present for n in rows.counts[m]]
        return by_rows(present, x, counts, self.most, self.pad)


@dataclass(frozen=True, slots=True)
class _Seen:
    """How a module is called: its first input, further ones and output, each by how many of its rows an image has; None is no image's own.

    `shape` is the output's for two images.
    """

    x: int
    args: tuple[int | None, ...]
    kwargs: Mapping[str, int | None]
    y: int
    shape: tuple[int, ...]


class _Mixing(Graft):
    """On a module of the lead: members that go their own way there."""

    rewrites = True

    def __init__(self, seen: _Seen, rows: Rows) -> None:
        super().__init__()
        self.seen = seen
        self.__dict__.update(rows=rows, apart={}, beside={})  # the members own their modules

    def around(self, host: Any, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002 - it is `run`
        """Those apart first, each in its own copy; then the others in this one."""
        rows: Rows = self.__dict__["rows"]
        own: dict[int, nn.Module] = {m: h for m, h in self.__dict__["apart"].items() if m in rows.present}
        if not own:
            return self._together(run, x, *args, **kwargs)
        present, made = rows.present, dict[int, Tensor]()
        parts = self._parts((x, *args), kwargs)
        for member, module in own.items():
            with rows.only([member]):
                given, named = parts[member]
                made[member] = module(*given, **named)
        if rest := [m for m in present if m not in own]:
            given, named = self._joined([parts[m] for m in rest])
            with rows.only(rest):
                made |= rows.split(self._together(run, *given, **named), self.seen.y)
        return torch.cat([made[m] for m in present])

    def _together(self, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The host on all rows at once, and each member's grafts on its own."""
        rows: Rows = self.__dict__["rows"]
        children: dict[int, list[Graft]] = {m: g for m, g in self.__dict__["beside"].items() if m in rows.present}
        if not children:
            return run(x, *args, **kwargs)
        before, notes = rows.split(x, self.seen.x), dict[int, list[Any]]()
        for member, own in children.items():
            before[member], notes[member] = entered(own, before[member])
        after = rows.split(run(torch.cat([*before.values()]), *args, **kwargs), self.seen.y)
        for member, own in children.items():
            after[member] = left(own, notes[member], after[member])
        return torch.cat([*after.values()])

    def _parts(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int, tuple[list[Any], dict[str, Any]]]:
        """What each present member's rows are given."""
        each = (self.seen.x, *self.seen.args)
        listed = [self._cut(v, k) for v, k in zip(args, each, strict=True)]
        named = {n: self._cut(v, self.seen.kwargs[n]) for n, v in kwargs.items()}
        return {m: ([v[m] for v in listed], {n: v[m] for n, v in named.items()}) for m in self.__dict__["rows"].present}

    def _cut(self, value: Any, each: int | None) -> dict[int, Any]:
        rows: Rows = self.__dict__["rows"]
        return dict.fromkeys(rows.present, value) if each is None else rows.split(value, each)

    def _joined(self, parts: Sequence[tuple[list[Any], dict[str, Any]]]) -> tuple[list[Any], dict[str, Any]]:
        """What several members' rows are given together."""
        each = (self.seen.x, *self.seen.args)
        args = [_glued([p[0][i] for p in parts], k) for i, k in enumerate(each)]
        return args, {n: _glued([p[1][n] for p in parts], k) for n, k in self.seen.kwargs.items()}


def _glued(values: Sequence[Any], each: int | None) -> Any:
    return values[0] if each is None else torch.cat(list(values))


@torch.no_grad()
def _watch(model: nn.Module, heads: Iterable[str]) -> tuple[dict[str, _Seen], dict[str, Tensor]]:
    """How modules are called that are called once with rows of images; and what the heads are given."""
    given: dict[str, Tensor] = {}
    two, three = _calls(model, 2, given, heads), _calls(model, 3, {}, ())
    found = {n: _compared(two[n], three[n]) for n in two if n in three}
    return {n: s for n, s in found.items() if s is not None}, given


def _calls(model: nn.Module, images: int, given: dict[str, Tensor], heads: Iterable[str]) -> dict[str, list[Any]]:
    """By module and call the shapes of what it was given, by place and by name, and of what it gave; others than tensors have none."""
    found: dict[str, list[Any]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            shapes = [_shape(v) for v in args], {n: _shape(v) for n, v in kwargs.items()}, _shape(y)
            found.setdefault(name, []).append(shapes)
            if name in heads:
                given[name] = args[0]

        return hook

    handles = [m.register_forward_hook(note(n), with_kwargs=True) for n, m in model.named_modules()]
    like = next(model.parameters())
    x = torch.randn(images, *input_size(model), generator=torch.Generator().manual_seed(0))
    try:
        with evaluating(model):
            model(x.to(like.device, like.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _compared(two: Sequence[Any], three: Sequence[Any]) -> _Seen | None:
    """A module's calls with two images and with three; None where it is called several times, or on nothing that is the images' own."""
    if len(two) != 1 or len(three) != 1:
        return None
    (args, kwargs, y), (more, named, z) = two[0], three[0]
    each = [_each(a, b) for a, b in zip(args, more, strict=True)]
    out = _each(y, z)
    if not each or not each[0] or not out:
        return None
    return _Seen(each[0], tuple(each[1:]), {n: _each(kwargs[n], named[n]) for n in kwargs}, out, y)


def _each(two: tuple[int, ...] | None, three: tuple[int, ...] | None) -> int | None:
    """How many rows an image has, if there are rows of images: of shapes with two images and with three."""
    if not two or not three or two[1:] != three[1:] or 3 * two[0] != 2 * three[0]:
        return None
    return two[0] // 2


def _mix(lead: nn.Module, models: Sequence[nn.Module], seen: Mapping[str, _Seen], rows: Rows) -> list[tuple[str, ...]]:
    """Hang on the lead what each model does otherwise; gives for each the modules that it has apart."""
    places: dict[str, _Mixing] = {}
    found: list[tuple[str, ...]] = []
    for number, model in enumerate(models):
        apart, beside = _ways(lead, model, seen)
        for name, value in (*((n, model.get_submodule(n)) for n in apart), *beside.items()):
            place = places.setdefault(name, _Mixing(seen[name], rows))
            place.__dict__["apart" if name in apart else "beside"][number] = value
        found.append(tuple(apart))
    for name, place in places.items():
        graft(lead.get_submodule(name), "mixing", place)
    return found


def _ways(lead: nn.Module, model: nn.Module, seen: Mapping[str, _Seen]) -> tuple[list[str], dict[str, list[Graft]]]:
    """The modules that a model's rows have apart, outermost only, and its grafts elsewhere by their host."""
    apart = {_around(n, lead, seen) for n in share(lead, model)}
    beside: dict[str, list[Graft]] = {}
    for name, host in hosts(model):
        acting = [g for g in grafts(host) if g.calls or g.edits]
        if acting and name in seen and all(_is_beside(g) for g in acting):
            beside[name] = acting
        elif acting:
            apart.add(_around(name, lead, seen))
    apart = {n for n in apart if not _inside(n, apart)}
    if "" not in apart and not _alike(model, seen, apart):
        apart = {""}
    return sorted(apart), {n: g for n, g in beside.items() if n not in apart and not _inside(n, apart)}


def _is_beside(child: Graft) -> bool:
    """Whether a graft leaves its host alone."""
    return child.calls and not child.rewrites and type(child).bind is Graft.bind


def _around(name: str, lead: nn.Module, seen: Mapping[str, _Seen]) -> str:
    """The innermost module about a name, itself counted, that is called with rows of images."""
    while name and (name not in seen or isinstance(lead.get_submodule(name), CONTAINERS)):
        name = name.rpartition(".")[0]
    return name


def _inside(name: str, others: Iterable[str]) -> bool:
    return any(name != o and (not o or name.startswith(f"{o}.")) for o in others)


def _alike(model: nn.Module, seen: Mapping[str, _Seen], apart: Iterable[str]) -> bool:
    """Whether outside of what is apart every module gives as many tokens as the backbone's does."""
    found = _calls(model, 2, {}, ())
    names = [n for n in seen if n and n in found and not _inside(n, apart)]
    heads = head_names(model)
    return all(found[n][0][2] == seen[n].shape for n in names if not n.startswith(heads))


def share(lead: nn.Module, model: nn.Module) -> list[str]:
    """Give a model the lead's tensors in place of equal ones of its own; the modules that have others are named."""
    heads, found = head_names(lead), list[str]()
    for name, module in lead.named_modules():
        if name in heads:
            continue
        other = model.get_submodule(name)
        pairs: Any = ((module._parameters, other._parameters), (module._buffers, other._buffers))
        for mine, its in pairs:
            for key, value in mine.items():
                own = its[key]
                if value is not None and own is not None and torch.equal(value, own):
                    its[key] = value
                elif value is not own:
                    found.append(name)
    return found
