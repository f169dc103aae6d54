"""The rates count what ledgers say; the nulls are such that every claim of them is false; and few are supported."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from headwater.bench import rates, truth
from headwater.bench.rates import NULLS, TRUE, _material, _rates, claim_rates
from headwater.core.errors import MethodError


def claims(*rows: tuple[str, str, str, str, str]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["investigation", "kind", "claim", "stage", "status"], orient="row")


def test_rates_count_investigations_and_claims() -> None:
    table = _rates(
        claims(
            ("0", "random weights", "behavior-accuracy", "behavior", "supported"),
            ("0", "random weights", "circuit-sufficient", "circuit", "supported"),
            ("1", "random weights", "behavior-accuracy", "behavior", "refuted"),
            ("2", "absent behavior", "behavior-accuracy", "behavior", "inconclusive"),
            ("3", TRUE, "circuit-sufficient", "circuit", "supported"),
            ("3", TRUE, "circuit-beats-heads", "circuit", "refuted"),
            ("3", TRUE, "role-induction", "heads", "refuted"),
        ),
        0.05,
    )
    found = {(row["kind"], row["of"]): (row["supported"], row["n"]) for row in table.iter_rows(named=True)}
    assert found["random weights", "investigations"] == (1, 2)
    assert found["random weights", "claims"] == (2, 3)
    assert found["all nulls", "investigations"] == (1, 3)
    assert found[TRUE, "claims"] == (1, 1)
    assert found[TRUE, "circuit-beats-heads"] == (0, 1)
    assert (TRUE, "role-induction") not in found
    row = table.filter(kind="all nulls", of="investigations").row(0, named=True)
    assert row["lo"] < 1 / 3 < row["hi"] and row["bound"] == 0.05


@pytest.mark.parametrize("kind", NULLS)
def test_chance_alone_decides_in_a_null(kind: str) -> None:
    """Over several draws, answers win on half of the pairs, and prompts over counterfactuals on half of them."""
    right, higher, n = 0.0, 0.0, 0
    for seed in range(4):
        model, behavior = _material(kind, "" if kind == NULLS[0] else "reverse", seed, 64)
        for group in behavior.bind(model).groups:
            metric = []
            for ids in (group.clean, group.corrupt):
                logits = model.run(ids, logits="last").logits
                metric.append((logits.gather(1, group.answers) - logits.gather(1, group.foils))[:, 0])
            right += int((metric[0] > 0).sum()) + 0.5 * int((metric[0] == 0).sum())
            higher += int((metric[0] > metric[1]).sum()) + 0.5 * int((metric[0] == metric[1]).sum())
            n += len(group)
    assert n > 150
    assert abs(right / n - 0.5) < 0.15 and abs(higher / n - 0.5) < 0.15


def test_a_few_investigations_and_their_resumption(tmp_path: Path) -> None:
    options: dict[str, Any] = {"nulls": 2, "kinds": ("random weights",), "programs": ("induction",), "pairs": 32}
    found = claim_rates(**options, out=tmp_path)
    assert found.tables["failed"].height == 0
    kept = sorted(tmp_path.glob("*.parquet"))
    assert [path.name.rsplit("-", 2)[0] for path in kept] == ["null-0-0000", "null-0-0001", "true-0-induction"]
    kept[1].unlink()
    times = {path: path.stat().st_mtime_ns for path in kept if path.exists()}
    again = claim_rates(**options, out=tmp_path)
    assert again.tables["claims"].equals(found.tables["claims"])
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert found.rate(TRUE, "claims")[0] == 1.0
    assert found.rate("random weights", "claims")[0] < 0.2
    with pytest.raises(MethodError, match="no such rate"):
        found.rate("nothing")


def test_a_refused_null_is_replaced_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def investigated(model: Any, behavior: Any, seed: int, q: float) -> list[dict[str, Any]]:
        tried.append(seed)
        if len(tried) % 2:
            raise MethodError("nothing differs")
        return [{"claim": "behavior-accuracy", "stage": "behavior", "status": "refuted"}]

    tried: list[int] = []
    monkeypatch.setattr(rates, "_investigated", investigated)
    options: dict[str, Any] = {"nulls": 3, "kinds": ("random weights",), "programs": ()}
    found = claim_rates(**options, out=tmp_path)
    assert found.facts == {"q": 0.05, "investigations": 3, "failed": 3} and len(tried) == 6
    assert set(found.tables["failed"]["why"]) == {"nothing differs."}
    again = claim_rates(**options, out=tmp_path)
    assert again.content_hash == found.content_hash and len(tried) == 6


def test_unknown_nulls_are_refused() -> None:
    with pytest.raises(MethodError, match="random weights"):
        claim_rates(kinds=("random weight",))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_false_claims_stay_below_the_stated_rate_and_true_ones_are_found(tmp_path: Path) -> None:
    """Over 210 null investigations the share with any supported claim is not above q beyond chance."""
    found = claim_rates(nulls=210, out=tmp_path)
    rate, low, _high = found.rate("all nulls")
    assert found.facts["investigations"] >= 210
    assert low <= found.facts["q"], f"{rate:.3f} of null investigations support a claim"
    power, _low, _high = found.rate(TRUE, "claims")
    assert power >= 0.9
    assert len(truth.names()) >= 20
