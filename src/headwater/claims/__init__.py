"""What every stage hands its findings to: claims, the tests that could refute them, their nulls, the ledger.

from headwater import claims

claims.sign_flip([0.4, 0.1, 0.3, 0.2, 0.5])          # p of "the mean is above 0"
claims.Ledger.load("runs/ioi/stages/claims/ledger")  # every claim of a run, refuted ones too
"""

from headwater.claims.claim import Claim, Outcome, Status, decide
from headwater.claims.ledger import Ledger
from headwater.claims.nulls import matched_sets, random_weights
from headwater.claims.statistics import (
    Interval,
    benjamini_hochberg,
    binomial,
    bootstrap,
    p_from_draws,
    permutation,
    sign_flip,
    smallest_p,
)
from headwater.claims.tests import Context, claim_from_test, run_test, test, test_names

__all__ = [
    "Claim",
    "Context",
    "Interval",
    "Ledger",
    "Outcome",
    "Status",
    "benjamini_hochberg",
    "binomial",
    "bootstrap",
    "claim_from_test",
    "decide",
    "matched_sets",
    "p_from_draws",
    "permutation",
    "random_weights",
    "run_test",
    "sign_flip",
    "smallest_p",
    "test",
    "test_names",
]
