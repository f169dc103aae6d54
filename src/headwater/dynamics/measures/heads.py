"""Where heads look."""

from headwater.core.repeats import attention_on_random_tokens
from headwater.dynamics.measures.base import Probe, Row, measures, row


@measures.register("heads")
def heads(probe: Probe) -> list[Row]:
    """Attention of every head to the token before, the same token and the one after it, on random tokens said twice
    (Olsson et al., 2022); and the most that any head gives to each.

    Known failure: it is where heads look, not what they do there.
    """
    found = attention_on_random_tokens(probe.model, seed=probe.seed)
    rows: list[Row] = []
    for role, values in found.items():
        rows.append(row(f"{role} max", float(values.max())))
        for layer, per_head in enumerate(values.tolist()):
            rows += [row(f"{role} a{layer}.h{head}", value) for head, value in enumerate(per_head)]
    return rows
