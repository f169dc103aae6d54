"""The measure `modular_addition`: what a network that learns to add modulo p has understood before it shows.

Progress measures for grokking (Nanda et al., 2023) over checkpoints: the loss restricted to the key frequencies, the
loss with just those excluded, and the Fourier spectrum of the logits.
"""

import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.groups import cyclic, excluded, kernel_share, restricted, scored
from headwater.dynamics.measures.base import Probe, Row, acrosses, measures, row

KEY = 0.05
"""Share of the logits' variance above which a frequency is key."""
_AT_ONCE = 4096


@measures.register("modular_addition")
def modular_addition(probe: Probe) -> list[Row]:
    """Of `a b = c` (the lab's `modular_addition`), all p x p pairs: `train` and `test` loss and accuracy, `k3` and so
    on, the share of the logits' variance along each frequency, and `key frequencies`, their number.

    `restricted` is the loss on all pairs of what the logits owe to a + b through the frequencies that are key at the
    last step, `excluded` the loss on the trained pairs without just that (Nanda et al., 2023). Without a run of the lab
    it is not known which pairs were trained on: all count as trained.

    Known failure: a share is of variance, so a frequency that matters for a few answers is missed; and where the last
    step has no key frequency (it never generalized), there is no restricted or excluded loss.
    """
    p = _modulus(probe.sequences)
    group = cyclic(p)
    logits = _logits(probe, p)
    logits = logits - logits.mean(dim=-1, keepdim=True)
    train = torch.ones(p, p, dtype=torch.bool)
    if probe.trained is not None:
        train = torch.zeros(p, p, dtype=torch.bool)
        train[probe.trained[:, 0], probe.trained[:, 1]] = True
    rows: list[Row] = []
    for name, mask in (("train", train), ("test", ~train)):
        if bool(mask.any()):
            of_split = scored(group, logits, mask)
            rows += [row(f"{name} loss", of_split["loss"]), row(f"{name} accuracy", of_split["accuracy"])]
    shares = {one.name: kernel_share(group, one, logits) for one in group.irreps if one.name != "trivial"}
    rows.append(row("key frequencies", sum(share > KEY for share in shares.values())))
    probe.keep("modular_addition.logits", logits.float())
    probe.keep("modular_addition.train", train)
    probe.keep("modular_addition.shares", torch.tensor(list(shares.values())))
    return rows + [row(name, share) for name, share in shares.items()]


def _modulus(ids: Tensor) -> int:
    """p, told by the sign between the numbers and the answer, which the lab gives the id p."""
    p = int(ids[0, 2]) if ids.shape[1] == 4 else 0
    right = p > 1 and bool((ids[:, 2] == p).all()) and bool(((ids[:, 0] + ids[:, 1]) % p == ids[:, 3]).all())
    if not right:
        raise MethodError(
            "these sequences are no modular addition",
            got=f"tokens {list(ids.shape)}, the first {ids[0].tolist()[:8]}",
            wanted="a, b, p, (a + b) mod p: what the source modular_addition of the lab makes",
        )
    return p


def _logits(probe: Probe, p: int) -> Tensor:
    """[a, b, c] float64 at the sign after a b."""
    a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
    every = torch.stack([a, b, torch.full((p * p,), p)], dim=1)
    parts = [probe.model.run(part, logits="last").logits.cpu() for part in every.split(_AT_ONCE)]
    return torch.cat([part.reshape(len(part), -1)[:, :p] for part in parts]).double().view(p, p, p)


def _restricted_and_excluded(kept: dict[int, dict[str, Tensor]]) -> dict[int, list[Row]]:
    """Both losses of every step, by the frequencies that are key at the last one."""
    last = kept[max(kept)]
    group = cyclic(last["modular_addition.logits"].shape[0])
    nontrivial = [one for one in group.irreps if one.name != "trivial"]
    key = [one for one, share in zip(nontrivial, last["modular_addition.shares"].tolist(), strict=True) if share > KEY]
    out: dict[int, list[Row]] = {step: [] for step in kept}
    for step, tensors in kept.items() if key else ():
        logits, train = tensors["modular_addition.logits"].double(), tensors["modular_addition.train"]
        on_all = scored(group, restricted(group, key, logits), torch.ones_like(train))
        on_train = scored(group, excluded(group, key, logits), train)
        out[step] = [
            row("restricted", on_all["loss"]),
            row("restricted accuracy", on_all["accuracy"]),
            row("excluded", on_train["loss"]),
            row("excluded accuracy", on_train["accuracy"]),
        ]
    return out


acrosses["modular_addition"] = _restricted_and_excluded
