"""PEFT's adapter types other than LoRA, number for number ours: `give` one layer's tensors, `take` all of them back.

LOHA   B1 A1 B2 A2 <-> hada_w1_a hada_w1_b hada_w2_a hada_w2_b        IA3    l <-> ia3_l, 1 for queries
LOKR   w1 w1a w1b w2 w2a w2b <-> lokr_w1 lokr_w1_a …                  OFT    Q <-> oft_R.weight
VERA   b d <-> vera_lambda_b vera_lambda_d, A and B for all           BOFT   Q, s <-> boft_R (full matrices), boft_s
SHIRA  s places <-> shira_weight shira_indices, zeros filled in       LN_TUNING   weight bias <-> ln_tuning_layers.…
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vtzoo.anatomy import Anatomy, Site, is_norm
from vtzoo.delta import Part
from vtzoo.errors import Mismatch
from vtzoo.fingerprint import COUNTER
from vtzoo.graft import stored
from vtzoo.interop._lora import Pair, piece
from vtzoo.interop._parts import Piece, words
from vtzoo.interop._places import site_of
from vtzoo.interop._settings import Settings
from vtzoo.methods.vera import Shared
from vtzoo.rebuilt import rebuild_shared

Own = Mapping[str, Tensor]
Config = Mapping[str, Any]


class Form(Protocol):
    """One of PEFT's types."""

    method: str
    suffixes: tuple[str, ...]

    def config(self, part: Part, grafts: Mapping[str, Any]) -> dict[str, Any]:
        """What PEFT must be told of our knobs; refuses what it can't be told."""
        ...

    def give(self, site: Site, graft: Any, own: Own, anatomy: Anatomy, told: Config) -> dict[str, Tensor]:
        """One layer's tensors as PEFT names them."""
        ...

    def take(self, anatomy: Anatomy, config: Settings, found: Mapping[str, Own], extra: Own) -> list[Piece]:
        """Ours from PEFT's, by layer; `extra` belongs to none of them."""
        ...


class Renamed:
    """LoHa and LoKr: the same matrices under other names."""

    def __init__(self, method: str, names: Mapping[str, str]) -> None:
        self.method, self.names, self.suffixes = method, names, tuple(names.values())

    def config(self, part: Part, grafts: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - the interface
        """Rank and alpha; for LoKr how sizes are split."""
        knobs = part.config
        told = {"r": knobs.rank, "alpha": whole(knobs.alpha or knobs.rank)}
        if self.method == "lokr":
            told |= {"decompose_both": knobs.decompose_both, "decompose_factor": knobs.factor or -1}
        return told

    def give(self, site: Site, graft: Any, own: Own, anatomy: Anatomy, told: Config) -> dict[str, Tensor]:  # noqa: ARG002 - the interface
        """As they are."""
        return {self.names[n]: t for n, t in own.items()}

    def take(self, anatomy: Anatomy, config: Settings, found: Mapping[str, Own], extra: Own) -> list[Piece]:  # noqa: ARG002 - the interface
        """One part for the layers of one rank and alpha."""
        back = {v: k for k, v in self.names.items()}
        groups: dict[tuple[int, float], dict[str, tuple[Site, Own]]] = {}
        for name, own in found.items():
            key = config.rank_of(name), config.alpha_of(name)
            groups.setdefault(key, {})[name] = site_of(anatomy, name), {back[n]: t for n, t in own.items()}
        more: dict[str, Any] = {}
        if self.method == "lokr":
            factor = config["decompose_factor"]
            more = {"decompose_both": config["decompose_both"], "factor": None if factor == -1 else factor}
        return [
            Piece(method=self.method, knobs={"rank": r, "alpha": a if a != r else None, **more, "targets": words(anatomy, sites)}, sites=sites)
            for (r, a), sites in groups.items()
        ]  # fmt: skip


class Scales:
    """IA3."""

    method, suffixes = "ia3", ("ia3_l",)

    def config(self, part: Part, grafts: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - the interface
        """Which layers' inputs are scaled."""
        return {"feedforward_modules": sorted(s.name for s in part.sites if s.facts["side"] == "in")}

    def give(self, site: Site, graft: Any, own: Own, anatomy: Anatomy, told: Config) -> dict[str, Tensor]:  # noqa: ARG002 - the interface
        """A factor for each input or output."""
        l = own["l"]  # noqa: E741 - the paper's letter
        if site.facts.get("heads"):
            l = torch.cat([torch.ones_like(l[:1]), l]).unflatten(1, (site.facts["heads"], -1)).transpose(0, 1).flatten()  # noqa: E741 - likewise
        flat = l.flatten()
        if site.kind == "conv":
            return {"ia3_l": flat.reshape(1, -1, 1, 1)}
        return {"ia3_l": flat.reshape(1, -1) if graft.inner else flat.reshape(-1, 1)}

    def take(self, anatomy: Anatomy, config: Settings, found: Mapping[str, Own], extra: Own) -> list[Piece]:  # noqa: ARG002 - the interface
        """Sides by PEFT's own list; a fused qkv is scaled as a whole."""
        sites: dict[str, tuple[Site, Own]] = {}
        for name, own in found.items():
            site = site_of(anatomy, name)
            side = "in" if config.feeds(name) else "out"
            sites[name] = replace(site, facts={**site.facts, "side": side}), {"l": own["ia3_l"].flatten()}
        knobs: dict[str, Sequence[str]] = {}
        for knob, side in (("outputs", "out"), ("inputs", "in")):
            names = sorted(n for n, (s, _) in sites.items() if s.facts["side"] == side)
            short = words(anatomy, names) if names else ()
            knobs[knob] = names if short == ("auto",) else short  # which stands for other layers here
        return [Piece(method="ia3", knobs=knobs, sites=sites)]


class Rotations:
    """OFT and BOFT."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.suffixes: tuple[str, ...] = ("oft_R.weight",) if method == "oft" else ("boft_R", "boft_s")

    def config(self, part: Part, grafts: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes; BOFT wants them everywhere."""
        knobs = part.config
        if self.method == "oft":
            told = {"oft_block_size": knobs.block, "r": 0, "use_cayley_neumann": False, "block_share": knobs.share}
            return told | ({"coft": True, "eps": knobs.eps} if knobs.eps is not None else {})
        for name, graft in grafts.items():
            if (graft.block, graft.Q.shape[0]) != (knobs.block, knobs.factors):
                raise Mismatch(
                    f"{name} has {graft.Q.shape[0]} factors of blocks of {graft.block}, PEFT's BOFT has the same everywhere ({knobs.factors} of {knobs.block})",
                    "train with boft[block=…,factors=…] that divide every layer's inputs, or fold it: vtzoo fold REF --out DIR",
                )
        return {"boft_block_size": knobs.block, "boft_n_butterfly_factor": knobs.factors}

    def give(self, site: Site, graft: Any, own: Own, anatomy: Anatomy, told: Config) -> dict[str, Tensor]:  # noqa: ARG002 - the interface
        """OFT's as they are, BOFT's as full skew-symmetric matrices."""
        if self.method == "oft":
            return {"oft_R.weight": own["Q"][0]}
        size, Q = graft.block, own["Q"]
        full = Q.new_zeros(*Q.shape[:2], size, size)
        rows, columns = torch.triu_indices(size, size, 1)
        full[..., rows, columns] = Q
        return {"boft_R": full - full.mT, "boft_s": own["s"].reshape((1, -1) if site.kind == "conv" else (-1, 1))}

    def take(self, anatomy: Anatomy, config: Settings, found: Mapping[str, Own], extra: Own) -> list[Piece]:  # noqa: ARG002 - the interface
        """What stands above the diagonals."""
        if self.method == "oft":
            if config["use_cayley_neumann"]:
                raise Mismatch(
                    "use_cayley_neumann: PEFT sums a few terms of a series, which is no rotation, and oft turns exactly",
                    "train it with use_cayley_neumann=False",
                )
            if not config["oft_block_size"]:
                raise Mismatch(f"r={config['r']}: PEFT counts blocks here, oft their size", "train it with oft_block_size=… and r=0")  # fmt: skip
            knobs = {"block": config["oft_block_size"], "share": config["block_share"]}
            knobs |= {"eps": config["eps"]} if config["coft"] else {}
            own = {n: {"Q": t["oft_R.weight"][None]} for n, t in found.items()}
        else:
            told = config[
                "boft_n_butterfly_factor"
            ]  # PEFT leaves it there, and makes one factor without its CUDA kernel
            there = {len(t["boft_R"]) for t in found.values()}
            knobs = {"block": config["boft_block_size"], "factors": there.pop() if len(there) == 1 else told}
            own = {n: {"Q": _upper(t["boft_R"]), "s": t["boft_s"].flatten()} for n, t in found.items()}
        sites = {n: (site_of(anatomy, n), t) for n, t in own.items()}
        return [Piece(method=self.method, knobs={**knobs, "targets": words(anatomy, sites)}, sites=sites)]


class Vectors:
    """VeRA."""

    method, suffixes = "vera", ("vera_lambda_b", "vera_lambda_d")

    def config(self, part: Part, grafts: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - the interface
        """Rank and seed; the matrices go along, since PEFT would draw others."""
        knobs = part.config
        return {"r": knobs.rank, "d_initial": knobs.start, "projection_prng_key": knobs.seed, "save_projection": True}

    def give(self, site: Site, graft: Any, own: Own, anatomy: Anatomy, told: Config) -> dict[str, Tensor]:  # noqa: ARG002 - the interface
        """As they are."""
        return {"vera_lambda_b": own["b"], "vera_lambda_d": own["d"]}

    def take(self, anatomy: Anatomy, config: Settings, found: Mapping[str, Own], extra: Own) -> list[Piece]:
        """vera where the matrices are those of the seed, else the same function as lora."""
        if not {"vera_A", "vera_B"} <= set(extra):
            raise Mismatch(
                "the file lacks vera_A and vera_B, which only PEFT can draw", "save it with save_projection=True"
            )
        sites = {n: site_of(anatomy, n) for n in found}
        knobs = {"rank": config["r"], "seed": config["projection_prng_key"], "start": config["d_initial"]}
        part = Part(method="vera", graft="vera", knobs=knobs, sites=tuple(sites.values()))
        drawn = dict(Shared(part.sites, part.config).named_buffers())
        if all(torch.equal(drawn[n], extra[f"vera_{n}"]) for n in "AB"):
            own = {n: (sites[n], {"b": t["vera_lambda_b"], "d": t["vera_lambda_d"]}) for n, t in found.items()}
            return [Piece(method="vera", knobs={**knobs, "targets": words(anatomy, own)}, sites=own)]
        pairs = {n: (sites[n], _product(sites[n], t, extra)) for n, t in found.items()}
        return [piece(anatomy, pairs)]


class Entries:
    """SHiRA."""

    method, suffixes = "shira", ("shira_weight", "shira_indices")

    def config(self, part: Part, grafts: Mapping[str, Any]) -> dict[str, Any]:
        """The least rank at which PEFT has as many entries as we in every layer."""
        needed = [-(-g.s.numel() // sum(s.shape)) for s, g in zip(part.sites, grafts.values(), strict=True)]
        rank = max(needed)
        for site in part.sites:
            if rank * sum(site.shape) > site.shape[0] * site.shape[1]:
                raise Mismatch(
                    f"{site.name} is too small for PEFT's SHiRA of rank {rank}, which has as many entries everywhere as LoRA of that rank",
                    "choose sites of like size with targets=…, or fold it: vtzoo fold REF --out DIR",
                )
        return {"r": rank}

    def give(self, site: Site, graft: Any, own: Own, anatomy: Anatomy, told: Config) -> dict[str, Tensor]:  # noqa: ARG002 - the interface
        """Entries, and zeros at free places up to PEFT's count."""
        places = own.get("places", graft.places)
        places, s = _filled(places.long(), own["s"], told["r"] * sum(site.shape), site.shape[0] * site.shape[1])
        return {
            "shira_weight": s,
            "shira_indices": torch.stack([places // site.shape[1], places % site.shape[1]]).int(),
        }

    def take(self, anatomy: Anatomy, config: Settings, found: Mapping[str, Own], extra: Own) -> list[Piece]:  # noqa: ARG002 - the interface
        """Entries at places of their own; one fraction for all layers, filled up with zeros."""
        sites = {n: site_of(anatomy, n) for n in found}
        totals = {n: s.shape[0] * s.shape[1] for n, s in sites.items()}
        fraction = max(max(t["shira_weight"].numel(), 16) / totals[n] for n, t in found.items())
        own: dict[str, tuple[Site, Own]] = {}
        for name, tensors in found.items():
            rows, columns = tensors["shira_indices"].long()
            count = max(min(16, totals[name]), round(min(1.0, fraction) * totals[name]))
            places, s = _filled(rows * sites[name].shape[1] + columns, tensors["shira_weight"], count, totals[name])
            own[name] = sites[name], {"places": places.int(), "s": s}
        knobs = {"fraction": min(1.0, fraction), "mask": "magnitude", "targets": words(anatomy, own)}
        return [Piece(method="shira", knobs=knobs, sites=own)]


class Norms:
    """LN tuning."""

    method = "norm"
    suffixes = tuple(f"ln_tuning_layers.{n}" for n in ("weight", "bias", "running_mean", "running_var", COUNTER))

    def config(self, part: Part, grafts: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - the interface
        """Nothing."""
        return {}

    def give(self, site: Site, graft: Any, own: Own, anatomy: Anatomy, told: Config) -> dict[str, Tensor]:  # noqa: ARG002 - the interface
        """PEFT copies the module with its statistics, which are the backbone's."""
        kept = dict(anatomy.modules[site.name].named_buffers(recurse=False))
        return {f"ln_tuning_layers.{n}": t.detach().cpu() for n, t in {**own, **kept}.items()}

    def take(self, anatomy: Anatomy, config: Settings, found: Mapping[str, Own], extra: Own) -> list[Piece]:  # noqa: ARG002 - the interface
        """Scales and shifts; statistics must be the backbone's."""
        tensors = {n: {k.removeprefix("ln_tuning_layers."): t for k, t in own.items()} for n, own in found.items()}
        for name, own in tensors.items():
            host = anatomy.modules.get(name)
            if host is None or not is_norm(host):
                raise Mismatch(
                    f"{name} is no normalisation of this {type(anatomy.model).__name__}", "is it the backbone?"
                )
            for moved in ("running_mean", "running_var"):
                if moved in own and not torch.equal(own[moved], stored(host, moved).to(own[moved])):
                    raise Mismatch(
                        f"{name}.{moved} is not the backbone's: PEFT let it move in training, and norm keeps it",
                        "train with the norms in eval mode, or merge in PEFT and: vtzoo add delta NAME --backbone REF --weights FILE",
                    )
        wanted = [f"{n}.{p}" for n, own in tensors.items() for p in ("weight", "bias") if p in own]
        sites = {s.name: (s, {p: tensors[s.name][p] for p in s.facts["params"]}) for s in anatomy.params(wanted)}
        return [Piece(method="norm", sites=sites)]


FORMS: dict[str, Form] = {
    "LOHA": Renamed("loha", {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}),
    "LOKR": Renamed("lokr", {f"w{i}{e}": f"lokr_w{i}{'_' if e else ''}{e}" for i in (1, 2) for e in ("", "a", "b")}),
    "IA3": Scales(),
    "OFT": Rotations("oft"),
    "BOFT": Rotations("boft"),
    "VERA": Vectors(),
    "SHIRA": Entries(),
    "LN_TUNING": Norms(),
}


def shared_of(part: Part) -> dict[str, Tensor]:
    """VeRA's matrices, as PEFT names them."""
    common = rebuild_shared(part, {})(torch.float32)
    return {f"vera_{n}": t for n, t in common.named_buffers()} if common is not None else {}


def whole(value: float) -> float:
    """A number as JSON should have it: 8, not 8.0."""
    return int(value) if float(value).is_integer() else value


def _upper(R: Tensor) -> Tensor:
    """Above the diagonals of the skew-symmetric half, [m, blocks, b, b] -> [m, blocks, b (b - 1) / 2]."""
    rows, columns = torch.triu_indices(R.shape[-1], R.shape[-1], 1)
    return ((R - R.mT) / 2)[..., rows, columns]


def _product(site: Site, own: Own, extra: Own) -> Pair:
    out, fan_in = site.shape
    A, B = extra["vera_A"][:, :fan_in], extra["vera_B"][:out]
    return Pair(A=own["vera_lambda_d"][:, None] * A, B=own["vera_lambda_b"][:, None] * B, scale=1.0)


def _filled(places: Tensor, s: Tensor, count: int, total: int) -> tuple[Tensor, Tensor]:
    """Places in order and their entries, with zeros at the first free places up to `count`."""
    free = torch.ones(total, dtype=torch.bool)
    free[places] = False
    more = free.nonzero().flatten()[: count - places.numel()]
    places, s = torch.cat([places, more]), torch.cat([s, s.new_zeros(more.numel())])
    order = places.argsort()
    return places[order], s[order]


__all__: Sequence[str] = ("FORMS", "Form", "shared_of", "whole")
