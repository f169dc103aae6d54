"""Claim: a statement with the test that could refute it, and what the test said."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from headwater.core.errors import ClaimError, did_you_mean
from headwater.core.files import plain

Status = Literal["supported", "refuted", "inconclusive"]
STATUSES: tuple[Status, ...] = ("supported", "refuted", "inconclusive")


SUBSPACE, DORMANT_CHECK = "subspace", "dormant_pathway"
"""Keys of an outcome's details: the subspace that a test patched, and what the dormant-pathway check said of it."""


def unchecked_subspace(details: Mapping[str, Any]) -> str:
    """Why a claim about a subspace cannot be decided: nobody looked whether its patch wakes a dormant pathway; else "".

    A patch can work through a part that nothing reads (Makelov et al., 2023), so whoever patches a subspace says so by
    `details["subspace"]`, and `details["dormant_pathway"]` holds the verdict of the check, or nothing where it was not
    made.
    """
    if details.get(SUBSPACE) and not details.get(DORMANT_CHECK):
        return f"the subspace at {details[SUBSPACE]} was not checked for a dormant pathway (run subspace_check)"
    return ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a test measured.

    `side` is where the claim says that `effect` lies from `reference`. `null_draws` are values of the same measure
    under the null, where it is drawn. `why_not` says why no verdict can be reached (too few pairs or draws): such a
    claim stays inconclusive whatever its p.
    """

    effect: float
    lo: float | None = None
    hi: float | None = None
    p: float | None = None
    n: int = 0
    reference: float = 0.0
    side: Literal["greater", "less"] = "greater"
    null_draws: tuple[float, ...] = ()
    why_not: str = ""
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def null_mean(self) -> float | None:
        """Mean of the null's draws, or None where the null is not drawn."""
        return float(np.mean(self.null_draws)) if self.null_draws else None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of a ledger. `test` and `params` (with `seed`) are enough to run it again on the stored run.

    `p_adj` and `status` are the ledger's, as both depend on the other claims in it.
    """

    id: str
    statement: str
    test: str
    stage: str = ""
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    effect: float | None = None
    lo: float | None = None
    hi: float | None = None
    reference: float = 0.0
    side: Literal["greater", "less"] = "greater"
    null_mean: float | None = None
    null_draws: tuple[float, ...] = ()
    p: float | None = None
    p_adj: float | None = None
    n: int = 0
    seed: int = 0
    command: str = ""
    status: Status = "inconclusive"
    why_not: str = ""
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def with_outcome(self, outcome: Outcome) -> "Claim":
        """This claim with what its test measured; its status stays open until a ledger decides."""
        return replace(
            self,
            effect=_number(outcome.effect),
            lo=_number(outcome.lo),
            hi=_number(outcome.hi),
            p=_number(outcome.p),
            n=outcome.n,
            reference=outcome.reference,
            side=outcome.side,
            null_mean=_number(outcome.null_mean),
            null_draws=tuple(float(draw) for draw in outcome.null_draws),
            why_not=outcome.why_not or unchecked_subspace(outcome.details),
            note=outcome.note,
            details=plain(outcome.details),
            p_adj=None,
            status="inconclusive",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Claim":
        """A claim from plain data. Raises ClaimError for keys that a claim does not have, or a status that is none."""
        known = {each.name for each in fields(cls)}
        for key in data:
            if key not in known:
                raise ClaimError("a stored claim has an unknown field", got=repr(key), wanted=did_you_mean(key, known))
        for needed in ("id", "statement", "test"):
            if not isinstance(data.get(needed), str):
                raise ClaimError("a stored claim lacks a field", wanted=needed)
        if data.get("status", "inconclusive") not in STATUSES:
            raise ClaimError("a stored claim has no such status", got=data["status"], wanted=", ".join(STATUSES))
        return cls(**{**data, "null_draws": tuple(data.get("null_draws") or ())})


def decide(claim: Claim, *, q: float) -> Status:
    """The claim's status, given its adjusted p.

    `supported`: p_adj <= q and the effect lies on the claimed side. `refuted`: its interval lies wholly on the other
    side of the reference, or wholly within the middle 95% of the null's draws. Anything else, and any claim whose test
    could not have decided, is `inconclusive`.
    """
    if claim.why_not or claim.effect is None:
        return "inconclusive"
    sign = 1.0 if claim.side == "greater" else -1.0
    on_side = sign * (claim.effect - claim.reference) > 0
    if on_side and claim.p_adj is not None and claim.p_adj <= q:
        return "supported"
    if claim.lo is None or claim.hi is None:
        return "inconclusive"
    nearest = claim.hi if claim.side == "greater" else claim.lo
    if sign * (nearest - claim.reference) < 0:
        return "refuted"
    if claim.null_draws:
        low, high = np.quantile(np.asarray(claim.null_draws), [0.025, 0.975])
        if low <= claim.lo and claim.hi <= high:
            return "refuted"
    return "inconclusive"


def _number(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
