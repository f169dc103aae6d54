"""The measure `memorizing`: which neurons hold what was learned by heart."""

import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.interventions import replace
from headwater.dynamics.measures.base import Probe, Row, measures, over, row

CLEARLY = 4.0
"""Standard errors by which a neuron must matter more to wrong labels than to right ones."""


@measures.register("memorizing")
def memorizing(probe: Probe, *, neurons: int = 1024, little: float = 0.1) -> list[Row]:
    """Of a run of the lab with corrupted labels (`corrupt` of a source): which neurons the wrong labels need and the
    right ones do not, by setting one neuron at a time to its mean over the training sequences.

    `corrupted`, `clean`: the loss on both kinds of training sequences, and `... accuracy`. `share`: of the neurons
    looked at (all, or `neurons` drawn by the seed), how many matter clearly more to wrong labels (by 4 standard errors
    of the difference) and to the right ones at most `little` as much. `participation ...`: over how many neurons, as a
    share, the damage to each kind is spread (the participation ratio of the increases in loss). `without ...`: the
    accuracy on each kind when all of that share are at their means at once: what shows that they hold the one and not
    the other. After Maini et al. (2023).

    Known failure: what two neurons hold between them shows for neither; and a neuron that is taken out alone can be
    stood in for. The two `without` rows are the test; they are of the sequences that the neurons were chosen on, as
    what is held by heart is these sequences, so of a share that is little more than chance they say too much.
    """
    if probe.trained is None or probe.corrupted is None:
        raise MethodError(
            "this measure needs a run of the lab whose labels are corrupted in part",
            fix="Train with data: [{source: ..., corrupt: 0.1}]",
        )
    rows, wrong = probe.trained, probe.corrupted
    if int(wrong.sum()) < 2 or int((~wrong).sum()) < 2:
        raise MethodError(
            "this measure needs sequences of both kinds", got=f"{int(wrong.sum())} of {len(wrong)} corrupted"
        )
    sites = [f"neurons.{layer}" for layer in range(probe.model.n_layers)]
    run = probe.model.run(rows, capture=sites)
    plain, right = _read(probe, rows, run.logits)
    values: dict[str, Tensor] = {site: run[site].clone() for site in sites}
    means = {site: value.flatten(0, -2).mean(dim=0) for site, value in values.items()}
    every = [(site, neuron) for site in sites for neuron in range(means[site].shape[-1])]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(probe.seed))[:neurons]
    looked_at = [every[int(number)] for number in order.sort().values]

    def without(some: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        on = []
        for site in dict.fromkeys(site for site, _ in some):
            columns = [neuron for where, neuron in some if where == site]
            value = values[site].clone()
            value[..., columns] = means[site][columns]
            on.append(replace(site, value))
        return _read(probe, rows, probe.model.run(rows, interventions=on).logits)

    harm = torch.stack([without([one])[0] - plain for one in looked_at])  # [neurons, n]
    on_wrong, on_right = harm[:, wrong], harm[:, ~wrong]
    by = on_wrong.mean(dim=1) - on_right.mean(dim=1)
    error = (on_wrong.var(dim=1) / int(wrong.sum()) + on_right.var(dim=1) / int((~wrong).sum())).sqrt()
    holds = (by > CLEARLY * error) & (on_right.mean(dim=1) <= little * on_wrong.mean(dim=1))
    chosen = [one for one, yes in zip(looked_at, holds.tolist(), strict=True) if yes]
    after = without(chosen)[1] if chosen else right
    return [
        over("corrupted", plain[wrong]),
        over("clean", plain[~wrong]),
        over("corrupted accuracy", right[wrong], share=True),
        over("clean accuracy", right[~wrong], share=True),
        row("share", len(chosen) / len(looked_at)),
        row("participation corrupted", _participation(on_wrong.mean(dim=1))),
        row("participation clean", _participation(on_right.mean(dim=1))),
        over("without corrupted accuracy", after[wrong], share=True),
        over("without clean accuracy", after[~wrong], share=True),
    ]


def _read(probe: Probe, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """([n] mean loss, [n] 1 where all predicted tokens are right) of the training sequences as they were shown."""
    length = ids.shape[1]
    at = torch.ones(length - 1, dtype=torch.bool) if probe.loss_at is None else probe.loss_at[1:].bool()
    said, told = logits[:, :-1][:, at].float().cpu(), ids[:, 1:][:, at]
    lost = torch.nn.functional.cross_entropy(said.transpose(1, 2), told, reduction="none").mean(dim=1)
    return lost.double(), (said.argmax(dim=-1) == told).all(dim=1).double()


def _participation(harm: Tensor) -> float:
    """Share of the neurons over which increases of the loss are spread evenly: 1: all alike; 1/n: one alone."""
    worse = harm.clamp(min=0)
    total = float(worse.square().sum())
    return float(worse.sum()) ** 2 / total / len(worse) if total > 0 else float("nan")
