"""How far a network that composes group elements does so by the known algorithm.

The algorithm (Nanda et al., 2023; Chughtai et al., 2023): represent a and b by a few irreps, multiply the matrices, and
give c the trace of the product with the inverse of c. For addition modulo p an irrep is a frequency, and the logit of
c is a sum of cos(2 pi k (a + b - c) / p) over the key frequencies.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.groups import Group, Irrep, excluded, kernel_share, restricted, scored
from headwater.core.results import Provenance, Result, register_result

KEY = 0.05


@register_result
class Algebra(Result):
    """What a network's logits, neurons and embedding are made of.

    `tables["irreps"]`: irrep, dimension, embedding (share of the embedding's variance over elements), logits (share of
    the logits' variance along its character at a b c^-1, the algorithm's own direction), neurons (share of the neurons'
    variance that belongs to neurons of this irrep), key. `tables["neurons"]`: neuron, irrep (that explains most),
    explained (share of the neuron's variance over pairs: functions of a, of b, and products of both within that
    irrep), variance.
    `tables["losses"]`: logits ("full"; "restricted" to what depends on a b through the key irreps; "excluded": without
    just that), split ("train", "test"), loss (nats), accuracy, n. `tables["curve"]`, where it was trained: step,
    train_loss, test_loss, train_accuracy, test_accuracy, restricted (loss on all pairs), excluded (on train pairs).
    facts: group, order, key, explained (share of the logits' variance by the key irreps), neurons_explained (mean over
    neurons, weighted by variance), chance_loss, passed.
    """

    kind: ClassVar[str] = "algebra"
    main: ClassVar[str] = "irreps"

    @property
    def key(self) -> list[str]:
        """Names of the key irreps: the answer."""
        return list(self.facts["key"])


def measure(
    group: Group,
    logits: Tensor,
    *,
    neurons: Tensor | None = None,
    embedding: Tensor | None = None,
    train: Tensor | None = None,
    key: float | Sequence[str] = KEY,
    curve: pl.DataFrame | None = None,
    config: dict[str, Any] | None = None,
    provenance: Provenance | None = None,
) -> Algebra:
    """Measure logits [a, b, c] (and neurons [a, b, M], the embedding of elements [order, D]) against the group's
    irreps.

    train: [a, b] bool, the pairs that it was trained on (None: all count as train). key: the names of the key irreps,
    or the share of the logits' variance above which one is key. Raises MethodError for other shapes.

    Known failure: shares are of variance: an irrep that matters for a few answers only is missed below the threshold.
    A network that follows another algorithm with the same outputs in these directions is not told from this one by its
    logits alone; its neurons say more.
    """
    n = group.order
    if logits.shape != (n, n, n) or (neurons is not None and neurons.shape[:2] != (n, n)):
        raise MethodError(
            f"logits of {group.name} have the wrong shape",
            got=list(logits.shape),
            wanted=f"[{n}, {n}, {n}] for a, b, c",
        )
    logits = logits.double() - logits.double().mean(dim=-1, keepdim=True)
    train = torch.ones(n, n, dtype=torch.bool) if train is None else train
    nontrivial = [irrep for irrep in group.irreps if irrep.name != "trivial"]
    shares = {irrep.name: kernel_share(group, irrep, logits) for irrep in nontrivial}
    if isinstance(key, float | int):
        names = [name for name, share in shares.items() if share > key]
    else:
        names = list(key)
        unknown = set(names) - set(shares)
        if unknown:
            raise MethodError(f"{group.name} has no such irrep", got=sorted(unknown), wanted=", ".join(shares))
    chosen = [irrep for irrep in nontrivial if irrep.name in names]
    tables: dict[str, pl.DataFrame] = {}
    owner: dict[str, float] = dict.fromkeys(shares, 0.0)
    neurons_explained = None
    if neurons is not None:
        tables["neurons"], owner, neurons_explained = _neurons(nontrivial, neurons)
    embedded = _embedding_shares(nontrivial, embedding)
    tables["irreps"] = pl.DataFrame(
        [
            {
                "irrep": irrep.name,
                "dimension": irrep.dimension,
                "embedding": embedded.get(irrep.name),
                "logits": shares[irrep.name],
                "neurons": owner[irrep.name] if neurons is not None else None,
                "key": irrep.name in names,
            }
            for irrep in nontrivial
        ],
        schema_overrides={"embedding": pl.Float64, "neurons": pl.Float64},
    )
    parts = {
        "full": logits,
        "restricted": restricted(group, chosen, logits),
        "excluded": excluded(group, chosen, logits),
    }
    rows = [
        {"logits": name, "split": split, **scored(group, values, mask)}
        for name, values in parts.items()
        for split, mask in (("train", train), ("test", ~train))
        if bool(mask.any())
    ]
    tables["losses"] = pl.DataFrame(rows)
    if curve is not None:
        tables["curve"] = curve
    chance = float(torch.log(torch.tensor(float(n))))
    at = {(row["logits"], row["split"]): row for row in rows}
    judged = "test" if ("full", "test") in at else "train"
    facts = {
        "group": group.name,
        "order": n,
        "key": [irrep.name for irrep in chosen],
        "explained": sum(shares[irrep.name] for irrep in chosen),
        "neurons_explained": neurons_explained,
        "chance_loss": chance,
        "passed": bool(
            chosen
            and at["full", judged]["accuracy"] >= 0.99
            and at["restricted", judged]["accuracy"] >= 0.99
            and at["excluded", "train"]["loss"] >= 0.99 * chance
        ),
    }
    return Algebra(tables=tables, facts=facts, config=config, provenance=provenance or Provenance.collect())


def neuron_shares(irreps: Sequence[Irrep], neurons: Tensor) -> tuple[Tensor, Tensor]:
    """([irreps, M] shares, [M] variances) of neurons [a, b, M]: functions of a, of b, and products within an irrep."""
    values = neurons.double() - neurons.double().mean(dim=(0, 1))
    variance = values.square().sum(dim=(0, 1))
    of_a, of_b = values.mean(dim=1), values.mean(dim=0)
    n = values.shape[0]
    found: list[Tensor] = []
    for irrep in irreps:
        p = irrep.projector
        alone = n * ((p @ of_a).square().sum(dim=0) + (p @ of_b).square().sum(dim=0))
        both = torch.einsum("xa,yb,abm->xym", p, p, values).square().sum(dim=(0, 1))
        found.append((alone + both) / variance.clamp(min=1e-300))
    return torch.stack(found), variance / n**2


def _neurons(irreps: Sequence[Irrep], neurons: Tensor) -> tuple[pl.DataFrame, dict[str, float], float]:
    shares, variance = neuron_shares(irreps, neurons)
    dead = variance <= 1e-12 * float(variance.max())
    best = shares.argmax(dim=0)
    explained = shares.amax(dim=0)
    table = pl.DataFrame(
        {
            "neuron": list(range(len(best))),
            "irrep": [None if gone else irreps[i].name for i, gone in zip(best.tolist(), dead.tolist(), strict=True)],
            "explained": [None if gone else x for x, gone in zip(explained.tolist(), dead.tolist(), strict=True)],
            "variance": variance.tolist(),
        },
        schema_overrides={"irrep": pl.String, "explained": pl.Float64},
    )
    weights = torch.where(dead, 0.0, variance)
    weights = weights / weights.sum()
    owner = {irrep.name: float(weights[best == i].sum()) for i, irrep in enumerate(irreps)}
    return table, owner, float((weights * explained)[~dead].sum())


def _embedding_shares(irreps: Sequence[Irrep], embedding: Tensor | None) -> dict[str, float]:
    if embedding is None:
        return {}
    values = embedding.double() - embedding.double().mean(dim=0)
    size = float(values.square().sum())
    return {irrep.name: float((irrep.projector @ values).square().sum()) / max(size, 1e-300) for irrep in irreps}
