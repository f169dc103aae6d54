"""The measure `attention_structure`: how many heads look where a named structure says."""

import re

import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.dynamics.measures.base import Probe, Row, measures, row

MOST = 0.5
_RELATION = re.compile(r"\s*(\w+)\s*->\s*(\w+)\s*")
_SEQUENCES = 32


@measures.register("attention_structure")
def attention_structure(
    probe: Probe, *, patterns: str = "previous_token,first_token,duplicate_token,induction", relations: str = ""
) -> list[Row]:
    """Attention structure: of every named pattern or relation the score of the best head (`best`) and the share of
    heads that mostly follow it (`heads`: a score of .5 or more).

    patterns: of the lab (`headwater.dynamics.lab.patterns`, `back:N`, one's own), on the sequences: a head's score is
    how often the token it attends to most is one of the pattern's, where the pattern says something and more than
    chance can tell. relations: between named positions of the behavior, as `END->S2,S2->S1`: how often the token that
    the head attends to most from the first is the second (Clark et al., 2019, for syntax; its rise over training: Chen
    et al., 2024). `relations mean` is the mean of `best` over all relations.

    Known failure: the best of many heads scores above chance where none has learned anything; step 0 is the baseline.
    Names of positions carry the syntax: a relation is no better than the behavior's own marks.
    """
    wanted = [name.strip() for name in patterns.split(",") if name.strip()]
    pairs = [part for part in relations.split(",") if part.strip()]
    if not wanted and not pairs:
        raise MethodError("an attention structure needs patterns or relations", wanted="such as patterns=induction")
    rows: list[Row] = []
    if wanted and (probe.ids is not None or not pairs):
        rows += _of_patterns(probe, wanted)
    best: list[float] = []
    for text in pairs:
        match = _RELATION.fullmatch(text)
        if match is None:
            raise MethodError("this is no relation between positions", got=repr(text), wanted="such as END->S2")
        score = _of_relation(probe, match[1], match[2])
        best.append(float(score.max()))
        rows += _rows(f"{match[1]}->{match[2]}", score)
    if best:
        rows.append(row("relations mean", sum(best) / len(best)))
    return rows


def _of_patterns(probe: Probe, names: list[str]) -> list[Row]:
    from headwater.core.repeats import patterns as attention
    from headwater.dynamics.lab.patterns import pattern_named

    ids = probe.sequences[:_SEQUENCES]
    looked = attention(probe.model, ids).argmax(dim=-1)  # [B, L, H, T]
    rows: list[Row] = []
    for name in names:
        places = pattern_named(name)(ids.cpu()) > 0  # [B, T, S]
        # where every token so far is one of the pattern's, nothing can be told
        some = places.any(dim=-1) & (places.sum(dim=-1) < torch.arange(1, ids.shape[1] + 1))
        if not bool(some.any()):
            continue
        hit = torch.gather(
            places[:, None, None].expand(*looked.shape, places.shape[-1]), 4, looked[..., None]
        )[..., 0]  # fmt: skip
        at = some[:, None, None].expand_as(hit)
        score = (hit & at).sum(dim=(0, 3)).double() / at.sum(dim=(0, 3))
        rows += _rows(name, score)
    return rows


def _of_relation(probe: Probe, source: str, target: str) -> Tensor:
    """[L, H]: share of the prompts in which the head's largest attention at one position is on the other."""
    from headwater.core.repeats import patterns as attention

    bound = probe.pairs.bind(probe.model)
    hits: list[Tensor] = []
    for group in bound.groups:
        for name in (source, target):
            if name not in group.positions:
                raise MethodError(
                    f"the behavior has no position {name}", wanted=", ".join(sorted(group.positions)) or "none"
                )
        looked = attention(probe.model, group.clean).argmax(dim=-1)  # [B, L, H, T]
        start, end = group.positions[source].cpu(), group.positions[target].cpu()
        there = ((start >= 0) & (end >= 0)).nonzero().flatten()  # a prompt may lack a position
        hits.append(looked[there, :, :, start[there]] == end[there, None, None])
    found = torch.cat(hits)
    if not len(found):
        raise MethodError("no prompt has both positions", got=f"{source}->{target}")
    return found.double().mean(dim=0)


def _rows(name: str, score: Tensor) -> list[Row]:
    return [row(f"{name} best", float(score.max())), row(f"{name} heads", float((score >= MOST).double().mean()))]
