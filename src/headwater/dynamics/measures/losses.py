"""What the model says: loss, the behavior's metrics, the canary, in-context learning."""

from headwater.core.repeats import repeated_tokens
from headwater.dynamics.measures.base import Probe, Row, losses_of, measures, over, row


@measures.register("loss")
def loss(probe: Probe) -> list[Row]:
    """Mean loss on the sequences, nats a token, and the share of tokens predicted right."""
    at = probe.predicted
    right = (probe.forward.guesses == probe.sequences.cpu()[:, 1:]).float()
    return [over("", probe.losses[:, at].mean(dim=1)), over("accuracy", right[:, at].mean(dim=1))]


@measures.register("behavior")
def behavior(probe: Probe) -> list[Row]:
    """The behavior's metrics: logit_diff, prob_diff and accuracy, over its pairs."""
    from headwater.behavior.evaluate import evaluate

    names = ("logit_diff", "prob_diff", "accuracy")
    report = evaluate(probe.model, probe.pairs, metrics=names, canary=False, seed=probe.seed)
    return [row(name, *report.interval(name)) for name in names]


@measures.register("canary")
def canary(probe: Probe) -> list[Row]:
    """The multiple-choice canary (Wiegreffe et al., 2025): accuracy asked plainly, with options, with the answer told.

    An answer that is known before the format is: the two come at different steps. Nothing where no pair can be put so.
    """
    from headwater.behavior.canary import canary as ask

    table = ask(probe.model, probe.pairs, seed=probe.seed)
    plain = [one for one in table.to_dicts() if "," not in one["condition"]]
    return [row(f"{one['format']}, {one['condition']}", one["accuracy"], one["lo"], one["hi"]) for one in plain]


@measures.register("icl")
def icl(probe: Probe) -> list[Row]:
    """In-context learning (Olsson et al., 2022): how much lower the loss is late in the context than early.

    `repeat`: on random tokens said twice, loss in the second half minus the first. `late`: on the sequences, where
    there are any, the last tenth of the predicted tokens minus the first tenth (published: token 500 minus token 50).
    """
    ids = repeated_tokens(probe.model, seed=probe.seed)
    lost = losses_of(probe.model.run(ids).logits.float().cpu(), ids)
    half = ids.shape[1] // 2
    rows = [over("repeat", lost[:, half:].mean(dim=1) - lost[:, : half - 1].mean(dim=1))]
    if probe.ids is not None:
        at = probe.losses[:, probe.predicted]
        tenth = max(1, at.shape[1] // 10)
        if at.shape[1] >= 2:
            rows.append(over("late", at[:, -tenth:].mean(dim=1) - at[:, :tenth].mean(dim=1)))
    return rows
