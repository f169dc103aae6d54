"""What heads do: roles by attention and direct effect, found on the train pairs, measured on the test pairs.

A role names a place that a head attends to. `previous_token`, `duplicate_token` and `induction` are found on repeated
random tokens, where nothing but the pattern of repetition can be attended to (Elhage et al., 2021; Olsson et al.,
2022), and must attend so in the behavior's prompts too; movers, `subject_suppressor` and `s_inhibition` are found on
the behavior's own positions (Wang et al., 2022), ranked by attention times what the head does for the metric: directly,
or (`s_inhibition`) through later heads. What a head is worth is measured by patching its output with its mean.

Shapes: B pairs, T tokens, L layers, H heads, K width of a head, D width of the stream.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch
from torch import Tensor

from headwater.behavior.metrics import metric as metric_named
from headwater.claims.nulls import matched_sets
from headwater.claims.statistics import bootstrap, p_from_draws, sign_flip
from headwater.core.errors import MethodError, did_you_mean
from headwater.core.interventions import replace
from headwater.core.progress import track
from headwater.core.repeats import attention_on_random_tokens, patterns
from headwater.core.results import Provenance, Result, register_result

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound, Group
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Head = tuple[int, int]
ROLES: dict[str, str] = {
    "previous_token": "attends to the token before",
    "duplicate_token": "attends to an earlier occurrence of the same token",
    "induction": "attends to the token after an earlier occurrence of the same token",
    "name_mover": "attends from the end to the answer and raises its logit directly",
    "negative_mover": "attends from the end to the answer and lowers its logit directly",
    "subject_suppressor": "attends from the end to the second mention of the subject and lowers its logit directly",
    "s_inhibition": "attends from the end to the second mention of the subject and acts through later heads",
}
_ON_RANDOM = ("previous_token", "duplicate_token", "induction")
_SCHEMA: dict[str, Any] = {
    "layer": pl.Int64, "head": pl.Int64, "role": pl.String, "attention": pl.Float64, "effect": pl.Float64,
    "lo": pl.Float64, "hi": pl.Float64, "null": pl.Float64, "p": pl.Float64, "attention_null": pl.Float64,
    "attention_p": pl.Float64, "attention_random": pl.Float64, "direct": pl.Float64, "n": pl.Int64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """How roles are found and measured.

    top: heads a role at most. least: attention to the role's place that a head needs, in [0, 1]. sequences, length:
    repeated random tokens, `length` of them twice. null_heads: random heads that are patched for the null. n_train,
    n_test: pairs at most. roles: which ones.
    """

    top: int = 3
    least: float = 0.2
    sequences: int = 12
    length: int = 20
    null_heads: int = 6
    n_train: int = 32
    n_test: int = 32
    metric: str = "logit_diff"
    roles: tuple[str, ...] = tuple(ROLES)
    seed: int = 0

    def __post_init__(self) -> None:
        for role in self.roles:
            if role not in ROLES:
                raise MethodError("unknown role of a head", got=repr(role), wanted=did_you_mean(role, ROLES))
        if min(self.top, self.sequences, self.null_heads, self.n_train, self.n_test) < 1 or self.length < 4:
            raise MethodError("head roles need at least one of everything and 4 random tokens", got=self)


@register_result
class HeadsResult(Result):
    """Heads with a role.

    `tables["roles"]`: layer, head, role; attention to the role's place on the test pairs, its mean over all other heads
    and p; effect of patching the head with its mean (share of the metric's way from clean to counterfactual; positive:
    the head helps), interval, mean effect of random heads and p of the difference; attention on repeated random tokens;
    direct effect on the metric (train pairs, units of the metric). `tensors`: `random` [roles on random tokens, L, H],
    `attention.<role>` [test pairs, L, H], `means` [L, H, K] (mean output values over the train pairs).
    """

    kind: ClassVar[str] = "heads"
    main: ClassVar[str] = "roles"

    def heads_of(self, role: str) -> list[Head]:
        """(layer, head) of the heads with this role, strongest first."""
        rows = self.tables["roles"].filter(pl.col("role") == role)
        return list(zip(rows["layer"].to_list(), rows["head"].to_list(), strict=True))

    @property
    def found(self) -> list[str]:
        """The roles that some head has."""
        return list(dict.fromkeys(self.tables["roles"]["role"].to_list()))


def heads(
    model: "Model",
    behavior: "Behavior",
    *,
    scores: Mapping[Head, float] | None = None,
    config: HeadsConfig | None = None,
    **options: Any,
) -> HeadsResult:
    """Which heads of a model have which role in a behavior.

    scores: how much of the metric's change from counterfactual to prompt each head carries (an attribution on the
    train pairs); it ranks heads of the roles that act through others among those that attend to the place. Without it
    attention alone ranks them. Options are fields of `HeadsConfig`. Raises MethodError for unknown roles or options.
    """
    config = _configured(config, options)
    train = _pairs(behavior, "train", config.n_train, model)
    test = _pairs(behavior, "test", config.n_test, model)
    random = attention_on_random_tokens(model, sequences=config.sequences, length=config.length, seed=config.seed)
    on_train = attention_to_places(model, train, config.roles)
    on_test = attention_to_places(model, test, config.roles)
    direct = direct_effects(model, train, metric=config.metric)
    means = mean_outputs(model, train)
    through_others = None
    if scores is not None:
        every = [
            [float(scores.get((layer, head), 0.0)) for head in range(model.n_heads)] for layer in range(model.n_layers)
        ]
        told_directly = direct - direct_effects(model, train, metric=config.metric, side="corrupt")
        through_others = (torch.tensor(every, dtype=torch.float64) - told_directly).abs()
    chosen = _choose(random, on_train, direct, through_others, config)

    clean = metric_values(model, test, metric=config.metric)
    corrupt = metric_values(model, test, metric=config.metric, side="corrupt")
    width = abs(float((clean - corrupt).mean())) or 1.0
    named = sorted({head for found in chosen.values() for head in found})
    others = random_heads(model.n_layers, model.n_heads, named, config.null_heads, seed=config.seed)
    patched = {
        head: (clean - metric_values(model, test, metric=config.metric, out=[head], means=means)) / width
        for head in track([*named, *(head for head in others if head not in named)], "patching heads")
    }
    null = torch.stack([patched[head] for head in others]).mean(dim=0)
    rows = [
        _row(role, head, on_test[role], patched[head], null, random, direct, config.seed)
        for role, found in chosen.items()
        for head in found
    ]
    tensors = {"means": means, "random": torch.stack([random[role] for role in _ON_RANDOM]), "direct": direct}
    tensors |= {f"attention.{role}": values for role, values in on_test.items() if values is not None}
    facts = {
        "metric": config.metric,
        "n": test.n,
        "clean": float(clean.mean()),
        "corrupt": float(corrupt.mean()),
        "absent": [role for role in config.roles if not chosen.get(role)],
        "not_measured": [role for role in config.roles if on_test.get(role) is None],
        "null_heads": [list(head) for head in others],
        "descriptions": {role: ROLES[role] for role in config.roles},
    }
    return HeadsResult(
        tables={"roles": pl.DataFrame(rows, schema=_SCHEMA)},
        tensors=tensors,
        facts=facts,
        config={name: getattr(config, name) for name in config.__dataclass_fields__},
        provenance=Provenance.collect(model, behavior, seed=config.seed),
    )


# --- attention


def attention_to_places(model: "Model", pairs: "Bound", roles: Iterable[str]) -> dict[str, Tensor | None]:
    """Attention [pairs, L, H] to the place of each role on a behavior's prompts; None where they have no such place.

    Pairs stand in the order of the groups. Prompts without the place are NaN.
    """
    roles = list(roles)
    found: dict[str, list[Tensor]] = {role: [] for role in roles}
    for group in pairs.groups:
        pattern = patterns(model, group.clean)
        for role in roles:
            weight = _place(role, group)
            read = torch.einsum("blhts,bts->blh", pattern, weight.to(pattern))
            read[weight.sum(dim=(1, 2)) == 0] = float("nan")
            found[role].append(read.double())
    joined = {role: torch.cat(parts) for role, parts in found.items()}
    return {role: None if bool(values.isnan().all()) else values for role, values in joined.items()}


def _place(role: str, group: "Group") -> Tensor:
    """[B, T, S]: from where to where the role attends; each prompt's weights over T sum to 1 (or are all 0)."""
    ids, (batch, length) = group.clean, group.clean.shape
    weight = torch.zeros(batch, length, length)
    earlier = torch.ones(length, length, dtype=torch.bool).tril(-1)
    same = (ids[:, :, None] == ids[:, None, :]) & earlier
    same[:, :, 0] = False  # position 0 draws attention whatever it holds
    named = group.positions
    rows = torch.arange(batch)
    if role == "previous_token":
        at = torch.arange(2, length)
        weight[:, at, at - 1] = 1.0
    elif role in ("duplicate_token", "induction"):
        if "S1" in named and "S2" in named:  # the repetition that the behavior is about, not every repeated "the"
            same = torch.zeros_like(same)
            same[rows, named["S2"], named["S1"]] = True
        if role == "induction":
            same = torch.cat([torch.zeros_like(same[:, :, :1]), same[:, :, :-1]], dim=2) & earlier
        weight = same.float()
    elif role in ("name_mover", "negative_mover"):
        answers = (ids[:, :, None] == group.answers.clamp(min=0)[:, None, :]) & (group.answers >= 0)[:, None, :]
        weight[:, -1] = answers.any(dim=-1).float()
        weight[:, -1, -1] = 0.0
    elif role in ("subject_suppressor", "s_inhibition") and "S2" in named:
        weight[rows, -1, named["S2"]] = 1.0
    readers = (weight.sum(dim=2) > 0).sum(dim=1).clamp(min=1)
    return weight / readers[:, None, None]


# --- what heads write


def direct_effects(model: "Model", pairs: "Bound", *, metric: str = "logit_diff", side: str = "clean") -> Tensor:
    """[L, H]: mean over pairs of a head's write at the last position along the metric's gradient at the final stream.

    To first order, how far the metric moves when only the unembedding sees the head. Units of the metric. `side` says
    whose write, the prompt's or the counterfactual's (`corrupt`); the gradient is always the prompt's.
    """
    score = metric_named(metric)
    total = torch.zeros(model.n_layers, model.n_heads, dtype=torch.float64)
    last = f"resid_post.{model.n_layers - 1}"
    writes = [f"head.{layer}.h{head}@-1" for layer in range(model.n_layers) for head in range(model.n_heads)]
    for group in pairs.groups:
        run = model.run(group.clean if side == "clean" else group.corrupt, capture=writes, logits="none")
        recorded = model.run(group.clean, capture=[last], logits="last", grad=True)
        value = score(recorded.logits, group.answers.to(recorded.logits.device), group.foils.to(recorded.logits.device))
        gradient = recorded.grads(value.sum(), [last])[last][:, -1]
        for index, name in enumerate(writes):
            layer, head = divmod(index, model.n_heads)
            total[layer, head] += float((run[name].to(gradient) * gradient).sum())
    return total / max(1, pairs.n)


def mean_outputs(model: "Model", pairs: "Bound") -> Tensor:
    """[L, H, K]: each head's mixed values, averaged over all prompts and positions but the first."""
    total, count = torch.zeros(model.n_layers, model.n_heads, model.d_head, dtype=torch.float64), 0
    for group in pairs.groups:
        run = model.run(group.clean, capture="z.*", logits="none")
        for layer in range(model.n_layers):
            total[layer] += run[f"z.{layer}"][:, 1:].double().sum(dim=(0, 1)).cpu()
        count += group.clean[:, 1:].numel()
    return (total / max(1, count)).float()


def metric_values(
    model: "Model",
    pairs: "Bound",
    *,
    metric: str = "logit_diff",
    side: str = "clean",
    out: Sequence[Head] = (),
    means: Tensor | None = None,
) -> Tensor:
    """[pairs]: the metric on the clean (or `corrupt`) prompts, with the heads in `out` patched with their `means`.

    Pairs stand in the order of the groups, as in `attention_to_places`.
    """
    score = metric_named(metric)
    if out and means is None:
        raise MethodError("patching heads needs their means", fix="Pass means=mean_outputs(model, pairs)")
    patches = [replace(f"z.{layer}.h{head}", means[layer, head]) for layer, head in out] if means is not None else []
    found: list[Tensor] = []
    for group in pairs.groups:
        ids = group.clean if side == "clean" else group.corrupt
        logits = model.run(ids, logits="last", interventions=patches).logits
        values = score(logits, group.answers.to(logits.device), group.foils.to(logits.device))
        found.append(values.double().cpu())
    return torch.cat(found)


def random_heads(n_layers: int, n_heads: int, like: Sequence[Head], n: int, *, seed: int = 0) -> list[Head]:
    """`n` heads (fewer where there are not so many) drawn in turn from the layers of `like`, and not of `like`."""
    layers = [layer for layer in range(n_layers) for _ in range(n_heads)]
    chosen = [layer * n_heads + head for layer, head in like]
    found: dict[int, None] = {}
    for draw in matched_sets(layers, chosen or list(range(len(layers))), 4 * n, seed=seed, apart=True):
        picks = torch.tensor(draw)[torch.randperm(len(draw), generator=torch.Generator().manual_seed(seed))].tolist()
        for at in picks:
            if len(found) < n and at not in chosen:
                found[at] = None
    if not found:
        found = {at: None for at in range(min(n, len(layers)))}
    return [divmod(at, n_heads) for at in found]


# --- roles


def _choose(
    random: Mapping[str, Tensor],
    on_train: Mapping[str, Tensor | None],
    direct: Tensor,
    through_others: Tensor | None,
    config: HeadsConfig,
) -> dict[str, list[Head]]:
    """The heads of each role, strongest first, from train pairs and random tokens alone."""
    matters = torch.ones_like(direct) if through_others is None else through_others.to(direct)
    weights = {
        "previous_token": torch.ones_like(
            direct
        ),  # they act where a counterfactual may not differ yet: no score sees it
        "name_mover": direct.clamp(min=0),
        "negative_mover": (-direct).clamp(min=0),
        "subject_suppressor": direct.clamp(min=0),
    }
    found: dict[str, list[Head]] = {}
    for role in config.roles:
        places = on_train.get(role)
        if places is None and role not in _ON_RANDOM:
            continue
        attention = random[role] if places is None else places.nanmean(dim=0)
        if places is not None and role in _ON_RANDOM:
            attention = torch.minimum(attention, random[role])
        rank = (attention * weights.get(role, matters)).masked_fill(attention < config.least, 0.0).flatten()
        best = torch.argsort(rank, descending=True, stable=True)[: config.top].tolist()
        found[role] = [divmod(at, direct.shape[1]) for at in best if float(rank[at]) > 0]
    return found


def _row(
    role: str,
    head: Head,
    attention: Tensor | None,
    patched: Tensor,
    null: Tensor,
    random: Mapping[str, Tensor],
    direct: Tensor,
    seed: int,
) -> dict[str, Any]:
    layer, number = head
    effect = bootstrap(patched.numpy(), seed=seed)
    row: dict[str, Any] = {
        "layer": layer, "head": number, "role": role, "effect": effect.value, "lo": effect.lo, "hi": effect.hi,
        "null": float(null.mean()), "direct": float(direct[layer, number]), "n": len(patched),
        "p": sign_flip((patched - null).numpy(), side="two-sided", seed=seed),
        "attention": None, "attention_null": None, "attention_p": None,
        "attention_random": float(random[role][layer, number]) if role in _ON_RANDOM else None,
    }  # fmt: skip
    if attention is not None:
        mean = attention.nanmean(dim=0)
        others = torch.cat(
            [mean.flatten()[: layer * mean.shape[1] + number], mean.flatten()[layer * mean.shape[1] + number + 1 :]]
        )
        row["attention"] = float(mean[layer, number])
        row["attention_null"] = float(others.mean())
        row["attention_p"] = p_from_draws(row["attention"], others.numpy())
    return row


def _pairs(behavior: "Behavior", split: str, n: int, model: "Model") -> "Bound":
    has_split = split in set(behavior.frame["split"].to_list())
    pairs = behavior.split(split) if has_split else behavior
    return pairs[:n].bind(model)


def _configured(config: HeadsConfig | None, options: Mapping[str, Any]) -> HeadsConfig:
    for name in options:
        if name not in HeadsConfig.__dataclass_fields__:
            wanted = did_you_mean(name, HeadsConfig.__dataclass_fields__)
            raise MethodError("head roles have no such option", got=repr(name), wanted=wanted)
    if config is not None and options:
        raise MethodError("give a config or its fields, not both", got=", ".join(options))
    return config or HeadsConfig(**options)
