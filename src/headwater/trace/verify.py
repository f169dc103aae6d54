"""Verify: every claim's test again, from what is stored, and whether it says the same."""

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl

from headwater.claims import Claim, Ledger, run_test
from headwater.core.errors import StoreError
from headwater.core.progress import track
from headwater.core.results import Provenance, Result
from headwater.core.store import RunFolder

if TYPE_CHECKING:
    from headwater.core.model import Model
    from headwater.trace.stages import Work

_SCHEMA: dict[str, Any] = {
    "id": pl.String, "same": pl.Boolean, "status": pl.String, "status_now": pl.String, "effect": pl.Float64,
    "effect_now": pl.Float64, "p": pl.Float64, "p_now": pl.Float64, "statement": pl.String,
}  # fmt: skip
# Another machine or number of threads sums in another order; a claim whose numbers move by more has changed.
_TOLERANCE = 1e-3


class Verification(Result):
    """`tables["claims"]`: id, same, status and status_now, effect and effect_now, p and p_now, statement."""

    kind: ClassVar[str] = "verification"
    main: ClassVar[str] = "claims"

    @property
    def same(self) -> bool:
        """Whether every claim came out as stored."""
        return bool(self.tables["claims"]["same"].all())


def verify(folder: str | Path, *, model: "Model | None" = None) -> Verification:
    """Run every test of a run's ledger again, with its stored params and seed, on the stored pairs, circuit and heads;
    a model's history (checkpoints, corpus) is measured again.

    The files' content hashes are checked first. Raises StoreError for a run without claims, changed files, or a model
    that is no longer the same.
    """
    import headwater.trace.tests  # noqa: F401  (registers the tests)
    from headwater.trace.investigation import Investigation
    from headwater.trace.stages import Work

    run = RunFolder.open(folder)
    if not run.has("claims"):
        raise StoreError(f"{run.path} has no claims yet", fix=f"Run `headwater resume {run.path}` first")
    for stage in run.stages:
        run.load_stage(stage, check=True)
    stored = run.load("claims", "ledger")
    if not isinstance(stored, Ledger):
        raise StoreError(f"{run.path} holds no ledger", got=stored.kind)
    settings = Investigation(**{**run.config, "out": str(folder)})
    work = Work(settings, run, settings._loader(model))
    with tempfile.TemporaryDirectory(prefix="headwater-verify-") as scratch:
        work.scratch = Path(scratch)
        measure_again(work)
        context = work.context()
        again = [
            claim.with_outcome(run_test(claim.test, context, claim.params, seed=claim.seed))
            for claim in track(stored.claims, "verifying", total=len(stored))
        ]
    decided = Ledger.of(again, q=stored.q)
    rows = [_row(old, decided[old.id]) for old in stored.claims]
    return Verification(
        tables={"claims": pl.DataFrame(rows, schema=_SCHEMA)},
        facts={"claims": len(rows), "same": sum(row["same"] for row in rows)},
        provenance=Provenance.collect(work.model, work.behavior, seed=settings.seed),
    )


def measure_again(work: "Work") -> None:
    """Measure the checkpoints and the corpus again, where the run has stages about its model's history, so that their
    tests stand on more than what was stored. The second run of do(data) is not trained again: its checkpoints must have
    the hashes that were stored."""
    from headwater.trace import forming, reading, redoing

    if work.run.has("timeline"):
        work.again.update({("timeline", name): one for name, one in forming.timeline(work).items()})
    if work.run.has("data"):
        work.again.update({("data", name): one for name, one in reading.data(work).results.items()})
    if work.run.has("do_data") and "checkpoints" in work.run.facts("do_data"):
        found = redoing.measured(work, redoing.checked_run(work))
        work.again.update({("do_data", name): one for name, one in found.items()})


def _row(old: Claim, new: Claim) -> dict[str, Any]:
    same = old.status == new.status and _close(old.effect, new.effect) and _close(old.p, new.p)
    return {
        "id": old.id, "same": same, "status": old.status, "status_now": new.status, "effect": old.effect,
        "effect_now": new.effect, "p": old.p, "p_now": new.p, "statement": old.statement,
    }  # fmt: skip


def _close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
