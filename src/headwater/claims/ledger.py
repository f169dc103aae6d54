"""Ledger: every claim of an investigation, decided together, with the refuted and the inconclusive in plain sight."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import polars as pl

from headwater.claims.claim import STATUSES, Claim, Status, decide
from headwater.claims.statistics import benjamini_hochberg
from headwater.core.errors import ClaimError, did_you_mean
from headwater.core.files import to_json
from headwater.core.results import Provenance, Result, register_result

_COLUMNS: dict[str, Any] = {
    "id": pl.String,
    "statement": pl.String,
    "status": pl.String,
    "effect": pl.Float64,
    "lo": pl.Float64,
    "hi": pl.Float64,
    "reference": pl.Float64,
    "side": pl.String,
    "null_mean": pl.Float64,
    "n_null": pl.Int64,
    "p": pl.Float64,
    "p_adj": pl.Float64,
    "n": pl.Int64,
    "test": pl.String,
    "stage": pl.String,
    "seed": pl.Int64,
    "command": pl.String,
    "params": pl.String,
    "why_not": pl.String,
    "note": pl.String,
}


@register_result
class Ledger(Result):
    """Claims under one false-discovery rate `q` (Benjamini-Hochberg over all that were tested).

    `facts`: q, title, claims (plain data, null draws included). `tables["claims"]`: one row a claim, without the draws.
    Adding a claim decides all of them again.
    """

    kind: ClassVar[str] = "ledger"
    main: ClassVar[str] = "claims"

    @classmethod
    def of(
        cls, claims: Iterable[Claim] = (), *, q: float = 0.05, title: str = "", provenance: Provenance | None = None
    ) -> "Ledger":
        """A ledger of these claims. Raises ClaimError for a q outside (0, 1) or two claims of one id."""
        if not 0 < q < 1:
            raise ClaimError("a false-discovery rate must lie between 0 and 1", got=q)
        ledger = cls(facts={"q": q, "title": title, "claims": []}, provenance=provenance)
        ledger.add(*claims)
        return ledger

    def add(self, *claims: Claim) -> None:
        """File claims; every status is decided again. Raises ClaimError for an id that is taken."""
        together = [*self.claims, *claims]
        ids = [claim.id for claim in together]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ClaimError("two claims of one id", got=", ".join(twice), fix="Give the later one another id")
        # a test that could not have decided is no test: it neither passes nor costs the others
        adjusted = benjamini_hochberg([None if claim.why_not else claim.p for claim in together])
        together = [replace(claim, p_adj=p_adj) for claim, p_adj in zip(together, adjusted, strict=True)]
        decided = [replace(claim, status=decide(claim, q=self.q)) for claim in together]
        self.facts["claims"] = [claim.to_dict() for claim in decided]
        self.tables["claims"] = pl.DataFrame([_row(claim) for claim in decided], schema=_COLUMNS)

    @property
    def q(self) -> float:
        """The false-discovery rate that the supported claims hold together."""
        return float(self.facts["q"])

    @property
    def claims(self) -> list[Claim]:
        return [Claim.from_dict(data) for data in self.facts["claims"]]

    def by_status(self, status: Status) -> list[Claim]:
        """Claims that are `supported`, `refuted` or `inconclusive`."""
        if status not in STATUSES:
            raise ClaimError("unknown status", got=status, wanted=did_you_mean(status, STATUSES))
        return [claim for claim in self.claims if claim.status == status]

    @property
    def counts(self) -> dict[str, int]:
        """How many claims have each status, those of none included."""
        return {status: len(self.by_status(status)) for status in STATUSES}

    def __getitem__(self, name: str) -> Claim:
        known = {claim.id: claim for claim in self.claims}
        if name not in known:
            raise ClaimError("no such claim in this ledger", got=repr(name), wanted=did_you_mean(name, known))
        return known[name]

    def __iter__(self) -> Iterator[Claim]:
        return iter(self.claims)

    def __len__(self) -> int:
        return len(self.facts["claims"])

    def to_json(self) -> str:
        """The whole ledger as JSON text."""
        return to_json({name: self.facts[name] for name in ("q", "title", "claims")})

    @classmethod
    def from_json(cls, text: str) -> "Ledger":
        """A ledger from `to_json`; adjusted p-values and statuses are decided again, not believed."""
        try:
            data: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ClaimError("a ledger is not valid JSON", got=error) from None
        if not isinstance(data, Mapping) or not isinstance(data.get("claims"), list):
            raise ClaimError("a ledger's JSON holds no list of claims", wanted='{"q": ..., "claims": [...]}')
        claims = [Claim.from_dict(each) for each in data["claims"]]
        return cls.of(claims, q=float(data.get("q", 0.05)), title=str(data.get("title", "")))

    def __repr__(self) -> str:
        counted = ", ".join(f"{n} {status}" for status, n in self.counts.items())
        return f"Ledger({len(self)} claims: {counted}; q={self.q})"


def _row(claim: Claim) -> dict[str, Any]:
    row = {name: getattr(claim, name) for name in _COLUMNS if name not in ("n_null", "params")}
    return {**row, "n_null": len(claim.null_draws), "params": to_json(claim.params, indent=None)}
