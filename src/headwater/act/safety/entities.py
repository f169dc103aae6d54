"""Does the model know that it knows: directions at an entity's last token that tell known entities from unknown ones
(Ferrando et al., 2025)."""

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.act.action import Action
from headwater.act.catalog import methods
from headwater.act.measuring import said
from headwater.act.safety.telling import Detection, auroc, both_kinds, detectors_table, parts_table
from headwater.act.steering.choosing import SteerConfig, Task, adding, steered
from headwater.core.errors import MethodError
from headwater.core.methods import configured
from headwater.core.progress import track
from headwater.core.results import Provenance
from headwater.core.sites import Site

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class KnownConfig:
    """entity: the named position whose last token is read. sites: where (None: `resid_post` of every layer). least:
    known and unknown entities that are needed, of either kind, in both splits. seed: of the intervals."""

    entity: str = "country"
    sites: tuple[str, ...] | None = None
    least: int = 3
    seed: int = 0


def known_entities(
    model: "Model", behavior: "Behavior", *, config: KnownConfig | None = None, **options: Any
) -> Detection:
    """Whether the stream at an entity tells that the model knows the entity (Ferrando et al., 2025).

    "Known" is an entity of whose pairs the model prefers the answer to the foil; the direction of a site is the
    difference of the mean stream of known and unknown training entities. Its AUROC on training pairs leaves each pair
    out of its own mean. The best site is judged on test pairs, beside the model's own confidence at the prompt's end
    and the number of tokens of the entity. `tensors["directions"]` [sites, D] (unit length), for the action `given`. A
    table from a model that knows all or nothing is refused. Options are those of `KnownConfig`.

    Known failure: entities that are known are also frequent and short; the baselines say how far that goes.
    """
    started = time.perf_counter()
    used = configured(KnownConfig, config, options)
    sites = _sites(model, used.sites)
    train, test = (_Read.of(model, part, sites, used.entity) for part in (behavior.train, behavior.test))
    both_kinds(train.known, "known entities", "training", used.least)
    both_kinds(test.known, "known entities", "test", used.least)
    left_out = {("direction", str(site)): _projected_without_itself(train.streams[site], train.known) for site in sites}
    parts = parts_table(left_out, train.known, {"direction": 1}, 1)
    best = Site.parse(parts.filter(parts["chosen"])["part"][0])
    directions = {site: direction(train.streams[site], train.known) for site in sites}
    scores = {
        f"direction at {best}": (test.streams[best] @ directions[best]).numpy(),
        "confidence": test.confidence,
        "fewer tokens": -test.tokens,
        "constant": np.zeros(len(test.known)),
    }
    detectors = detectors_table(scores, test.known, ("confidence", "fewer tokens", "constant"), seed=used.seed)
    return Detection(
        tables={"parts": parts, "detectors": detectors},
        tensors={"directions": torch.stack([directions[site].float() for site in sites])},
        facts={
            "yes": "the entity is known",
            "behavior": behavior.name,
            "sites": [str(site) for site in sites],
            "train": {"yes": int(train.known.sum()), "no": int((~train.known).sum())},
            "test": {"yes": int(test.known.sum()), "no": int((~test.known).sum())},
        },
        config=asdict(used),
        provenance=Provenance.collect(model, behavior, seed=used.seed, seconds=time.perf_counter() - started),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Read:
    """Of each pair: its stream at the entity [N, D] by site, whether it is known, the confidence at the end (largest
    log-probability), how many tokens the entity has."""

    streams: dict[Site, Tensor]
    known: Bools
    confidence: NDArray[np.float64]
    tokens: NDArray[np.float64]

    @staticmethod
    def of(model: "Model", pairs: "Behavior", sites: list[Site], entity: str) -> "_Read":
        streams: dict[Site, list[Tensor]] = {site: [] for site in sites}
        known, confidence, tokens = [], [], []
        bound = pairs.bind(model)
        for group in track(bound.groups, "reading entities"):
            if entity not in group.positions:
                names = ", ".join(group.positions)
                raise MethodError(f"the behavior names no position {entity!r}", got=names, fix="Set entity=")
            run = model.run(group.clean, capture=sites, logits="last")
            at = group.positions[entity].to(run.logits.device)
            for site in sites:
                streams[site].append(run[site][torch.arange(len(at), device=at.device), at].double().cpu())
            known.append((said("logit_diff", run.logits, group) > 0).cpu())
            confidence.append(run.logits.double().log_softmax(-1).amax(-1).cpu())
            rows = bound.behavior.frame[group.rows]
            tokens.append(_tokens(model, rows["prompt"].to_list(), rows["positions"].to_list(), entity))
        return _Read(
            streams={site: torch.cat(values) for site, values in streams.items()},
            known=torch.cat(known).numpy(),
            confidence=torch.cat(confidence).numpy(),
            tokens=np.concatenate(tokens),
        )


def _tokens(model: "Model", prompts: list[str], positions: list[str], entity: str) -> NDArray[np.float64]:
    spans = [json.loads(text)[entity] for text in positions]
    names = [" " + prompt[first:past] for prompt, (first, past) in zip(prompts, spans, strict=True)]
    return np.array([float(len(model.tokens(name)[0])) for name in names])


def direction(streams_ND: Tensor, known: Bools) -> Tensor:
    """[D]: from the mean of unknown to the mean of known, of unit length."""
    yes = torch.from_numpy(known)
    difference = streams_ND[yes].mean(0) - streams_ND[~yes].mean(0)
    return difference / difference.norm().clamp(min=1e-12)


def _projected_without_itself(streams_ND: Tensor, known: Bools) -> NDArray[np.float64]:
    """Each pair's component along the direction that the other pairs give."""
    out = np.zeros(len(known))
    for index in range(len(known)):
        rest = np.arange(len(known)) != index
        out[index] = float(streams_ND[index] @ direction(streams_ND[torch.from_numpy(rest)], known[rest]))
    return out


def _sites(model: "Model", asked: tuple[str, ...] | None) -> list[Site]:
    patterns = asked or ("resid_post.*",)
    found = list(dict.fromkeys(site for pattern in patterns for site in model.resolve(pattern)))
    if wrong := [site for site in found if site.kind not in ("resid_pre", "resid_mid", "resid_post", "embed")]:
        raise MethodError("entities are read in the stream", got=str(wrong[0]), wanted="resid_post.8 or the like")
    return found


@dataclass(frozen=True, kw_only=True)
class KnowConfig(SteerConfig):
    """entity: the named position that is changed; its last token is read. Other options as in `SteerConfig`;
    `positions` is not used."""

    entity: str = "country"


@methods.register("known")
def known(model: "Model", behavior: "Behavior", *, config: KnowConfig | None = None, **options: Any) -> Action:
    """Add to an entity the direction of entities that the model knows (Ferrando et al., 2025).

    The direction is the difference of means between training pairs whose answer the model prefers and the others, at
    the entity's last token, as long as that difference. Options are those of `KnowConfig`. Known failure: it makes the
    model surer, not better informed; watch accuracy, not only the metric.
    """
    used = configured(KnowConfig, config, options)
    task = Task.of(model, behavior, used.sites, used.goal or "raise", used.n, used.seed)
    read = _Read.of(model, task.fit.behavior, task.places, used.entity)
    both_kinds(read.known, "known entities", "training")
    candidates = []
    for site in task.places:
        streams, yes = read.streams[site], torch.from_numpy(read.known)
        apart = streams[yes].mean(0) - streams[~yes].mean(0)
        told = auroc(_projected_without_itself(streams, read.known), read.known)
        candidates.append(adding(task, task.goals[0], site, apart, used.entity, auroc=told))
    return steered(task, candidates, used, method="known", how=f"known {used.entity} at")
