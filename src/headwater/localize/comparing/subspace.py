"""Subspace honesty: does a patched subspace carry the variable, or only wake a pathway that sleeps?

A patch along a direction moves the run by (what the direction reads) times (what it writes). If the direction leans on
a part that nothing behind the site reads, it may read the variable there, in the disconnected part, and write along
another part that the two prompts do not differ in at all: the patch works, though the model never uses that pathway
(Makelov, Lange and Nanda, 2023). The check splits a subspace into what the following map reads (its rowspace) and what
it does not (its nullspace), and patches each alone.

Shapes: B pairs, n pairs in all, W width of the site, R directions, J rows of the following map.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import polars as pl
import torch
from torch import Tensor

from headwater.behavior.metrics import STEPS
from headwater.behavior.metrics import metric as metric_named
from headwater.claims.statistics import p_from_draws, sign_flip
from headwater.core.anatomy import linear_weight
from headwater.core.errors import MethodError, did_you_mean
from headwater.core.interventions import replace
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.core.sites import Site
from headwater.localize.attribution.eap import configured
from headwater.localize.catalog import methods
from headwater.localize.engine.passes import for_discovery
from headwater.localize.stats import ratio

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound, Group
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

KINDS = ("neurons", "z", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
REPLY = (
    "The split is no proof of an illusion on its own (the reply of Wu et al., 2024). Where a site is wider than what "
    "reads it, any direction found by training or by differences, a right one too, has a part in the nullspace, "
    "because that part varies with the variable as well; the best direction to read a variable and the best to write "
    "it need not be one and the same; and cutting a direction down makes a smaller edit, which moves less whatever the "
    "direction means. So a small rowspace effect says that this patch acts by way of a part that the model does not "
    "read from here, not that the variable is absent from the site. What decides is whether the subspace keeps working "
    "on prompts it was not found on, and beats a direction with no such part."
)


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig:
    """site: `neurons.L`, `z.L.hH`, `resid_*.L`, `mlp_out.L` or `attn_out.L`, with `@position` (else the last token).
    direction: "denoise" puts the prompt's part into the counterfactual run, "noise" the other way round. keep: the
    share of the whole effect that the rowspace part must keep. energy, probes: for sites that everything behind reads,
    the map is taken from gradients on both prompts of each pair, of the metric and of `probes` random readouts of the
    final logits; its rowspace are the singular directions that hold `energy` of their squared length. draws: random
    subspaces of as many directions. metric: must have a gradient where the map is taken from gradients.
    """

    site: str
    direction: Literal["denoise", "noise"] = "denoise"
    metric: str = "logit_diff"
    keep: float = 0.5
    energy: float = 0.99
    probes: int = 4
    draws: int = 19
    n_train: int = 64
    n_test: int = 64
    seed: int = 0


@register_result
class SubspaceResult(Result):
    """`tables["parts"]`: part, effect, lo, hi, n, about.

    Parts: `whole` (the subspace patched), `rowspace` and `nullspace` (the span of its connected and of its disconnected
    part, each patched alone), `driven by rowspace` and `driven by nullspace` (the whole subspace written by what only
    that part of the difference says: they add up to the whole where all behind is linear), `site` (everything),
    `random` (mean of random subspaces). Effects: 0 leaves the run as it was, 1 moves the metric to the other run.
    facts: verdict ("connected", "dormant pathway", "unclear", "no effect"), retained (rowspace over whole), p,
    p_random, null_share (of the directions' squared length in the nullspace), null_reading (of what the directions
    read between the two prompts), rank, nullity, map, reply (the counter-argument). `tensors`: directions [R, W],
    rowspace, nullspace; values [parts, n], base, other [n].
    """

    kind: ClassVar[str] = "subspace"
    main: ClassVar[str] = "parts"

    @property
    def verdict(self) -> str:
        return str(self.facts["verdict"])

    def effect(self, part: str) -> float:
        """The effect of one part. Raises MethodError for a part that was not measured."""
        found = self.tables["parts"].filter(part=part)
        if not found.height:
            raise MethodError(
                "no such part of a subspace", got=repr(part), wanted=did_you_mean(part, self.tables["parts"]["part"])
            )
        return float(found["effect"][0])


@methods.register("subspace_check")
def subspace_check(
    model: "Model",
    behavior: "Behavior",
    *,
    directions: Tensor | None = None,
    config: SubspaceConfig | None = None,
    **options: Any,
) -> SubspaceResult:
    """Patch a subspace, its connected and its disconnected part, and say whether the patch wakes a dormant pathway
    (Makelov, Lange & Nanda, 2023; reply: Wu et al., 2024).

    The reply stands in `facts["reply"]`. directions: [R, W], in the space of the site; None takes the mean difference
    between prompt and counterfactual on the train pairs. Measured on the test pairs. For neurons and z the following
    map is the down- or output projection, and its nullspace is disconnected exactly; elsewhere it is a Jacobian, and
    disconnected to first order on the prompts seen. Options are those of `SubspaceConfig`.

    Known failure: a rowspace is all of the space where the following map is no narrower than the site (a head's z, a
    stream read by everything); the check then passes anything, and says so by nullity 0.

    Raises MethodError for a site or directions that do not fit, SiteError for a site that the model lacks.
    """
    used = configured(SubspaceConfig, config, options)  # type: ignore[type-var]
    started = time.monotonic()
    site = _site(model, used)
    train = for_discovery(behavior)[: used.n_train].bind(model)
    has_test = "test" in set(behavior.frame["split"].to_list())
    test = (behavior.test if has_test else behavior)[: used.n_test].bind(model)
    given = _mean_difference(model, train, site, used) if directions is None else directions
    basis = _orthonormal(given, site, model)
    width = basis.shape[1]
    rows, how = _following(model, train, site, used, width)
    row_space, rank = _row_space(rows, used.energy if how == "jacobian" else 1.0)
    onto = row_space.T @ row_space
    connected, disconnected = _span(basis @ onto), _span(basis - basis @ onto)
    random = torch.Generator().manual_seed(used.seed)
    drawn = [_span(torch.randn(basis.shape, generator=random, dtype=torch.float64)) for _ in range(used.draws)]
    parts: dict[str, Callable[[Tensor], Tensor]] = {
        "whole": lambda d: (d @ basis.T) @ basis,
        "rowspace": lambda d: (d @ connected.T) @ connected,
        "nullspace": lambda d: (d @ disconnected.T) @ disconnected,
        "driven by rowspace": lambda d: ((d @ onto) @ basis.T) @ basis,
        "driven by nullspace": lambda d: ((d - d @ onto) @ basis.T) @ basis,
        "site": lambda d: d,
        **{f"random {i}": lambda d, q=q: (d @ q.T) @ q for i, q in enumerate(drawn)},
    }
    values, base, other, read = _patched(model, test, site, parts, used, basis, onto)
    moved, whole = values - base, other - base
    if float(whole.mean()) == 0.0:
        raise MethodError(f"{used.metric} is the same on prompts and counterfactuals, so effects are not defined")
    names = list(parts)
    table, effects = _table(names, moved, whole, used)
    keeps = (moved[1] - used.keep * moved[0]).numpy() * (1.0 if float(whole.mean()) > 0 else -1.0)
    verdict, p = _verdict(effects["whole"], keeps, used.seed)
    sign = 1.0 if effects["whole"][0] >= 0 else -1.0
    null = [sign * effects[f"random {i}"][0] for i in range(used.draws)]
    facts = {
        "site": str(site), "direction": used.direction, "metric": used.metric, "verdict": verdict, "p": p,
        "retained": effects["rowspace"][0] / effects["whole"][0] if effects["whole"][0] else None,
        "p_random": p_from_draws(sign * effects["whole"][0], null) if null else None,
        "null_share": float((basis - basis @ onto).square().sum() / len(basis)),
        "null_reading": read, "rank": rank, "nullity": width - rank, "map": how, "n": len(base), "width": width,
        "reply": REPLY, "keep": used.keep,
    }  # fmt: skip
    return SubspaceResult(
        tables={"parts": table},
        tensors={"directions": basis, "rowspace": connected, "nullspace": disconnected, "values": values,
                 "base": base, "other": other},
        facts=facts,
        config={"method": "subspace_check", **asdict(used)},
        provenance=Provenance.collect(model, behavior, seed=used.seed, seconds=time.monotonic() - started),
    )  # fmt: skip


_ABOUT = {
    "whole": "the subspace patched",
    "rowspace": "the span of its connected part patched",
    "nullspace": "the span of its disconnected part patched",
    "driven by rowspace": "the subspace written by what its connected part reads",
    "driven by nullspace": "the subspace written by what its disconnected part reads",
    "site": "everything at the site patched",
    "random": "random subspaces of as many directions",
}


def _table(
    names: list[str], moved: Tensor, whole: Tensor, used: SubspaceConfig
) -> tuple[pl.DataFrame, dict[str, tuple[float, float, float]]]:
    effects = {name: ratio(row, whole, seed=used.seed) for name, row in zip(names, moved, strict=True)}
    rows = [(n, *effects[n], moved.shape[1], _ABOUT[n]) for n in names if not n.startswith("random")]
    if used.draws:
        drawn = torch.stack([row for name, row in zip(names, moved, strict=True) if name.startswith("random")])
        rows.append(("random", *ratio(drawn.mean(dim=0), whole, seed=used.seed), moved.shape[1], _ABOUT["random"]))
    schema = {
        "part": pl.String, "effect": pl.Float64, "lo": pl.Float64, "hi": pl.Float64, "n": pl.Int64, "about": pl.String,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row"), effects


def _verdict(whole: tuple[float, float, float], keeps: Any, seed: int) -> tuple[str, float]:
    """keeps [n]: how much more than the asked share of the whole effect the rowspace part gives, pair by pair."""
    value, low, high = whole
    against = float(keeps.mean()) < 0
    if value < 0:
        keeps = -keeps  # the patch moves the metric the other way: keeping that is moving that way too
        against = not against
    p = sign_flip(keeps, side="less" if against else "greater", seed=seed)
    if low <= 0 <= high:
        return "no effect", p
    if p > 0.05:
        return "unclear", p
    return ("dormant pathway" if against else "connected"), p


# --- the site


def _site(model: "Model", used: SubspaceConfig) -> Site:
    site = Site.parse(used.site)
    if site.kind not in KINDS or site.layer is None or site.is_pattern or (site.kind == "z") != (site.head is not None):
        raise MethodError(
            "cannot check a subspace of this site", got=used.site,
            wanted="neurons.L, z.L.hH, resid_pre.L, resid_mid.L, resid_post.L, attn_out.L or mlp_out.L",
        )  # fmt: skip
    if site.pos is None:
        site = Site.parse(f"{used.site}@-1")
    model.resolve(site)
    if used.direction not in ("denoise", "noise"):
        wanted = did_you_mean(str(used.direction), ["denoise", "noise"])
        raise MethodError("unknown direction of a patch", got=repr(used.direction), wanted=wanted)
    if not 0 < used.keep < 1 or not 0 < used.energy <= 1 or min(used.draws, used.probes) < 0:
        raise MethodError("keep and energy are shares; draws and probes are numbers", got=used)
    return site


def _held(model: "Model", ids: Tensor, group: "Group", site: Site) -> Tensor:
    """[B, W] float64: what a site holds at its position."""
    run = model.run(ids, capture=[site], logits="none", positions=group.positions)
    value = run[str(site)]
    if not isinstance(value, Tensor) or value.ndim != 2:
        raise MethodError(
            "a subspace is checked at one position", got=str(site), wanted="@-1, an index, or a named position"
        )
    return value.detach().double().cpu()


def _mean_difference(model: "Model", pairs: "Bound", site: Site, used: SubspaceConfig) -> Tensor:
    found = [_held(model, g.clean, g, site) - _held(model, g.corrupt, g, site) for g in pairs.groups]
    mean = torch.cat(found).mean(dim=0)
    if float(mean.norm()) == 0.0:
        raise MethodError(f"prompts and counterfactuals do not differ at {site}", fix="Choose a later site or position")
    return mean[None]


def _orthonormal(directions: Tensor, site: Site, model: "Model") -> Tensor:
    """[R, W] float64."""
    rows = torch.as_tensor(directions).double().cpu()
    rows = rows if rows.ndim == 2 else rows[None]
    if not bool(torch.isfinite(rows).all()):
        raise MethodError(f"directions at {site} are not finite")
    basis = _span(rows)
    if len(basis) == 0:
        raise MethodError(f"directions at {site} are all zero")
    return basis


def _span(rows: Tensor) -> Tensor:
    """An orthonormal basis of the span of rows [R, W]; no rows where they are 0."""
    if rows.numel() == 0:
        return rows
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[sizes > 1e-9 * max(1e-300, float(sizes.max()))] if float(sizes.max()) > 1e-9 else basis[:0]


# --- what reads it


def _following(
    model: "Model", pairs: "Bound", site: Site, used: SubspaceConfig, width: int
) -> tuple[Tensor, Literal["weights", "jacobian"]]:
    """(the following map [J, W], where it comes from)."""
    block = model.anatomy.main.blocks[int(site.layer or 0)]
    rows: Tensor | None = None
    if site.kind == "neurons" and block.mlp is not None and block.mlp.down_proj is not None:
        rows = linear_weight(block.mlp.down_proj).detach().double().cpu()
    elif site.kind == "z" and block.attention is not None:
        rows = block.attention.out_weight_HKD().detach().double().cpu()[int(site.head or 0)].T
    if rows is not None:
        if rows.shape[1] != width:
            raise MethodError(f"directions do not fit {site}", got=f"width {width}", wanted=f"width {rows.shape[1]}")
        return rows, "weights"
    if used.metric in STEPS:
        raise MethodError(f"the metric {used.metric} has no gradient, which this site needs", wanted="logit_diff")
    found = _jacobian(model, pairs, site, used)
    if found.shape[1] != width:
        raise MethodError(f"directions do not fit {site}", got=f"width {width}", wanted=f"width {found.shape[1]}")
    return found, "jacobian"


def _jacobian(model: "Model", pairs: "Bound", site: Site, used: SubspaceConfig) -> Tensor:
    """[J, W]: gradients at the site, on both prompts of every pair, of the metric and of random readouts."""
    score, rows = metric_named(used.metric), []
    generator = torch.Generator().manual_seed(used.seed + 1)
    where = Site.parse(str(site).split("@")[0])
    for group in track(pairs.groups, "following map"):
        at = _positions(group, site)
        for ids in (group.clean, group.corrupt):
            run = model.run(ids, capture=[where], logits="last", grad=True)
            logits = run.logits
            assert isinstance(logits, Tensor)
            reference = logits.detach() if used.metric == "kl" else None
            wanted = [score(logits, group.answers.to(logits.device), group.foils.to(logits.device), reference)]
            for _ in range(used.probes):
                mix = torch.randn(logits.shape[1], generator=generator, dtype=torch.float64).to(logits)
                wanted.append(logits @ mix / logits.shape[1] ** 0.5)
            for value in wanted:
                gradient = run.grads(value.sum(), [str(where)])[str(where)]
                own = gradient[torch.arange(len(ids)), at.to(gradient.device)].detach().double().cpu()
                rows.append(own / own.norm().clamp(min=1e-300) * len(own) ** 0.5)
    return torch.cat(rows)


def _positions(group: "Group", site: Site) -> Tensor:
    text = str(site).split("@")[1]
    if text in group.positions:
        return group.positions[text]
    return torch.full((len(group),), int(text) % group.length)


def _row_space(rows: Tensor, energy: float) -> tuple[Tensor, int]:
    """(an orthonormal basis [rank, W] of the map's rowspace, its rank): of what holds `energy` of its squared size."""
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    tiny = float(sizes.max()) * max(rows.shape) * torch.finfo(torch.float32).eps if sizes.numel() else 0.0
    keep = sizes > tiny
    if energy < 1.0:
        held = sizes.square().cumsum(0) / sizes.square().sum()
        keep &= torch.cat([torch.zeros(1, dtype=held.dtype), held[:-1]]) < energy
    return basis[keep], int(keep.sum())


# --- patching


def _patched(
    model: "Model",
    pairs: "Bound",
    site: Site,
    parts: dict[str, Callable[[Tensor], Tensor]],
    used: SubspaceConfig,
    basis: Tensor,
    onto: Tensor,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """(metric [parts, n], of the run patched into [n], of the other run [n], share of what the directions read that
    stands in the nullspace)."""
    score = metric_named(used.metric)
    values: list[list[Tensor]] = [[] for _ in parts]
    base, other, read = [], [], []
    for group in track(pairs.groups, "subspace patches"):
        into, source = (group.corrupt, group.clean) if used.direction == "denoise" else (group.clean, group.corrupt)

        def measured(ids: Tensor, *patches: Any, group: "Group" = group, reference: Tensor | None = None) -> Tensor:
            logits = model.run(ids, logits="last", interventions=patches, positions=group.positions).logits
            assert isinstance(logits, Tensor)
            device = logits.device
            return score(logits, group.answers.to(device), group.foils.to(device), reference).double().cpu()

        reference = model.run(group.clean, logits="last").logits if used.metric == "kl" else None
        held, given = _held(model, into, group, site), _held(model, source, group, site)
        difference = given - held
        base.append(measured(into, reference=reference))
        other.append(measured(source, reference=reference))
        read.append(torch.stack([difference @ basis.T, (difference - difference @ onto) @ basis.T]))
        for row, change in zip(values, parts.values(), strict=True):
            row.append(measured(into, replace(site, held + change(difference)), reference=reference))
    whole, null = torch.cat(read, dim=1).abs().sum(dim=(1, 2))
    share = float(null / whole) if float(whole) else 0.0
    return torch.stack([torch.cat(row) for row in values]), torch.cat(base), torch.cat(other), share
