"""What loss plateaus show: positions that look alike, guesses that repeat themselves."""

import torch

from headwater.core.errors import MethodError
from headwater.dynamics.measures.base import Probe, Row, measures, over


@measures.register("collapse")
def collapse(probe: Probe) -> list[Row]:
    """Representation collapse (Gopalani and Hu, 2025): mean cosine between the streams of two predicting tokens of a
    sequence, after each layer. 1: all positions look alike."""
    rows: list[Row] = []
    for layer, stream in probe.forward.streams.items():
        unit = torch.nn.functional.normalize(stream[:, :-1][:, probe.predicted], dim=-1)
        n = unit.shape[1]
        if n < 2:
            raise MethodError("collapse compares positions, and one token a sequence is predicted", fix="Leave it out")
        total = unit.sum(dim=1).square().sum(dim=-1)  # the sum over all ordered pairs, each with itself among them
        rows.append(over(f"layer {layer}", (total - unit.square().sum(dim=(1, 2))) / (n * (n - 1))))
    return rows


@measures.register("repetition")
def repetition(probe: Probe) -> list[Row]:
    """Repetition bias (Gopalani and Hu, 2025): how often the model's best guess is its guess of one token before; and
    how often (`truth`) the right token is the one before."""
    at = probe.predicted
    guess, right = probe.forward.guesses[:, at], probe.sequences.cpu()[:, 1:][:, at]
    if guess.shape[1] < 2:
        raise MethodError("repetition compares guesses, and one token a sequence is predicted", fix="Leave it out")
    return [
        over(name, (said[:, 1:] == said[:, :-1]).float().mean(dim=1)) for name, said in (("", guess), ("truth", right))
    ]
