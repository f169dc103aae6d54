"""The test of a claim that a subspace carries a behavior's variable. Without the dormant-pathway check it decides
nothing.
"""

from typing import Any, cast

import torch

from headwater.claims import Context, Outcome, sign_flip, test
from headwater.claims.claim import DORMANT_CHECK, SUBSPACE
from headwater.core.errors import ClaimError
from headwater.localize.comparing.subspace import SubspaceResult, subspace_check
from headwater.localize.stats import ratio


@test("subspace_carries")
def subspace_carries(
    context: Context, *, seed: int, site: str, n: int, metric: str, threshold: float = 0.0, subspace: str | None = None
) -> Outcome:
    """The effect of patching a subspace on test pairs, against a threshold; of what the model reads of it, where the
    check finds a dormant pathway.

    Reads `context["subspaces"]` ({name: [R, W] directions}; none for `subspace=None`, the mean difference of the train
    pairs) and `context["subspace_checks"]` ({site or name: SubspaceResult}). Where no check is stored for it, the claim
    is inconclusive, whatever the patch does.
    """
    behavior, model = context["behavior"], context["model"]
    named = context.get("subspaces") or {}
    if subspace is not None and subspace not in named:
        raise ClaimError(
            "a claim is about a subspace that is not stored", got=subspace, wanted=", ".join(named) or "none"
        )
    directions = None if subspace is None else torch.as_tensor(named[subspace])
    made = subspace_check(
        model, behavior, site=site, directions=directions, metric=metric, n_test=n, seed=seed, draws=0
    )
    found = cast(SubspaceResult, made)
    stored: Any = (context.get("subspace_checks") or {}).get(subspace or site)
    checked = stored if isinstance(stored, SubspaceResult) and _same(stored, found) else None
    verdict = checked.verdict if checked is not None else None
    part = 1 if verdict == "dormant pathway" else 0  # only what the model reads of it counts
    values, base, other = (found.tensors[name] for name in ("values", "base", "other"))
    moved, whole = values[part] - base, other - base
    sign = 1.0 if float(whole.mean()) >= 0 else -1.0
    value, lo, hi = ratio(moved, whole, seed=seed)
    p = sign_flip((sign * (moved - threshold * whole)).numpy(), seed=seed)
    details = {
        SUBSPACE: str(found.facts["site"]), DORMANT_CHECK: verdict, "whole": found.effect("whole"),
        "rowspace": found.effect("rowspace"), "null_share": found.facts["null_share"], "reply": found.facts["reply"],
    }  # fmt: skip
    note = {
        None: "",
        "dormant pathway": "the patch works by a dormant pathway: what counts is its part that the model reads",
    }.get(verdict, f"dormant-pathway check: {verdict}")
    return Outcome(effect=value, lo=lo, hi=hi, p=p, n=len(whole), reference=threshold, note=note, details=details)


def _same(check: SubspaceResult, found: SubspaceResult) -> bool:
    """Whether a stored check is of this subspace at this site."""
    ours, theirs = found.tensors["directions"], check.tensors["directions"]
    return (
        check.facts["site"] == found.facts["site"]
        and ours.shape == theirs.shape
        and torch.allclose(ours.T @ ours, theirs.double().T @ theirs.double(), atol=1e-5)
    )
