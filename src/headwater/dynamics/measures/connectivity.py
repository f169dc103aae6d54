"""The measure `connectivity`: whether a straight line of low loss leads from each checkpoint to others."""

from headwater.core.errors import MethodError
from headwater.dynamics.connectivity import barrier, on_the_line
from headwater.dynamics.measures.base import Probe, Row, measures, row


@measures.register("connectivity")
def connectivity(probe: Probe, *, points: int = 11) -> list[Row]:
    """Linear mode connectivity (Frankle et al., 2020) on the sequences: the barrier `before`, on the line to the
    checkpoint before, and `last`, to the last one; in nats above the straight line between both losses. From the step
    where `last` is about 0 the run has chosen its basin.

    Known failure: see `headwater.dynamics.connectivity.connect`.
    """
    if probe.others is None:
        raise MethodError(
            "this measure compares checkpoints of a series", fix="Use connect(a, b, tokens) for two models"
        )
    rows: list[Row] = []
    for name, step in (("before", probe.others.step_before(probe.step)), ("last", probe.others.steps[-1])):
        if step is not None and step != probe.step:
            other = probe.others.open(step)
            found = barrier(on_the_line(probe.model, other, probe.sequences, probe.loss_at, points))
            rows.append(row(name, found["above"], found["above_lo"], found["above_hi"]))
    return rows
