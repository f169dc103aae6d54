"""How the streams change: the depth at which the guess is made, and likeness between steps."""

import torch
from torch import Tensor

from headwater.core.interventions import replace
from headwater.dynamics.measures.base import Probe, Row, acrosses, measures, over, row

_LENS_TOKENS = 16  # sequences: the lens runs once a layer


@measures.register("lens_depth")
def lens_depth(probe: Probe) -> list[Row]:
    """Depth at which the final guess is made (logit lens, nostalgebraist, 2020): the first layer from which on the
    stream, read by the model's own final norm and unembedding, gives it; as a share of all layers, mean over tokens.

    Read by putting the stream of a layer in place of the last one's, so it holds for any architecture.
    """
    ids, at = probe.sequences[:_LENS_TOKENS], probe.predicted
    final, streams = probe.forward.guesses[: len(ids), at], probe.forward.streams
    depth, last = torch.full(final.shape, probe.model.n_layers), probe.model.n_layers - 1
    stays = torch.ones_like(final, dtype=torch.bool)
    for layer in range(last, -1, -1):
        if layer < last:
            put = replace(f"resid_post.{last}", streams[layer][: len(ids)].to(probe.model.device))
            guess = probe.model.run(ids, interventions=[put]).logits[:, :-1].argmax(dim=-1).cpu()[:, at]
            stays &= guess == final
        depth = torch.where(stays, layer + 1, depth)
    return [over("", depth.float().mean(dim=1) / probe.model.n_layers)]


@measures.register("cka")
def cka(probe: Probe) -> list[Row]:
    """Linear CKA (Kornblith et al., 2019) of each layer's stream with that of the step before, and of the last step."""
    for layer, stream in probe.forward.streams.items():
        flat = stream[:, :-1][:, probe.predicted].flatten(0, 1)
        places = torch.linspace(0, len(flat) - 1, min(len(flat), 512)).long()
        probe.keep(f"cka.{layer}", flat[places])
    return []


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Linear CKA of two representations [N, D] of the same N tokens: 1 up to rotation, scale and shift; NaN where one
    is constant."""
    a, b = (x.double() - x.double().mean(dim=0) for x in (a, b))
    cross = (a.T @ b).square().sum()
    own = (a.T @ a).norm() * (b.T @ b).norm()
    return float(cross / own) if float(own) > 0 else float("nan")


def _across_cka(kept: dict[int, dict[str, Tensor]]) -> dict[int, list[Row]]:
    steps = sorted(kept)
    out: dict[int, list[Row]] = {step: [] for step in steps}
    for before, step in zip([None, *steps], steps, strict=False):
        own = [name for name in kept[step] if name.startswith("cka.")]
        for name in sorted(own, key=lambda name: int(name.removeprefix("cka."))):
            layer, mine = name.removeprefix("cka."), kept[step][name]
            for what, other in (("before", before), ("last", steps[-1])):
                theirs = kept.get(other, {}).get(name) if other is not None else None
                if theirs is not None and theirs.shape == mine.shape:
                    out[step].append(row(f"{what}, layer {layer}", linear_cka(mine, theirs)))
    return out


acrosses["cka"] = _across_cka
