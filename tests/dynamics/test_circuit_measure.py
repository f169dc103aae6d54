"""The measure `circuit`: against the localizing stage asked by hand, at every checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError
from headwater.dynamics import Timeline, TrainingRun, track, train
from headwater.dynamics.measures import circuit as circuit_file
from headwater.localize.attribution.eap import eap_ig
from headwater.localize.circuit import Circuit
from headwater.localize.comparing.compare import compare
from lab_runs import small

SETTINGS: dict[str, dict[str, Any]] = {"circuit": {"fraction": 0.2, "draws": 20, "strengths": 4}}


def pairs(n: int = 8) -> Behavior:
    """Which of two words came next the first time."""
    random = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for _ in range(n):
        a, b, c, d = (f"t{int(i)}" for i in torch.randperm(12, generator=random)[:4])
        rows.append(
            {"prompt": f"{a} {b} {c} {d} {a}", "counterfactual": f"{a} {d} {c} {b} {a}", "answers": [f" {b}"],
             "foils": [f" {d}"]}
        )  # fmt: skip
    return Behavior.from_rows(rows, name="next")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    config = small(steps=12, checkpoints={"every": 4, "log": False}, model={"d_model": 16, "n_heads": 2})
    return train(config, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def timeline(run: TrainingRun, tmp_path_factory: pytest.TempPathFactory) -> Timeline:
    out = tmp_path_factory.mktemp("tracked")
    return track(run, behavior=pairs(), measures="circuit", settings=SETTINGS, draws=20, out=out)


def at(timeline: Timeline, name: str, step: int) -> float:
    curve = timeline.curve("circuit", name)
    return curve.filter(curve["step"] == step)["value"].item()


def test_numbers_are_those_of_the_localizing_stage(run: TrainingRun, timeline: Timeline) -> None:
    behavior = pairs()
    last = eap_ig(run.load(), behavior.train, metric=behavior.metric).circuit(fraction=0.2)
    for step in (4, 12):
        model = run.load(step)
        scored = eap_ig(model, behavior.train, metric=behavior.metric)
        judged = last.faithfulness(behavior.test, metric=behavior.metric, model=model)
        whole = judged.facts["full"] - judged.tables["curve"]["empty"].item()
        assert at(timeline, "whole", step) == pytest.approx(whole, abs=1e-5)
        curve = judged.tables["curve"]
        assert at(timeline, "part", step) == pytest.approx(curve["value"].item() - curve["empty"].item(), abs=1e-5)
        assert at(timeline, "strength", step) == pytest.approx(float(scored.scores[last.mask].sum()), rel=1e-4)
        own = scored.circuit(edges=last.n_edges)
        assert at(timeline, "edges overlap", step) == pytest.approx(compare(own, last, n=5).value("edges"))
        strongest = last.tables["edges"].sort(last.tables["edges"]["score"].abs(), descending=True).row(0, named=True)
        place = last.graph.edge(f"{strongest['source']}->{strongest['target']}")
        name = f"edge {strongest['source']}->{strongest['target']}"
        assert at(timeline, name, step) == pytest.approx(float(scored.scores[place]), rel=1e-4)


def test_the_last_checkpoint_has_its_own_circuit(timeline: Timeline) -> None:
    for name in ("edges overlap", "heads overlap", "rank correlation"):
        assert at(timeline, name, 12) == pytest.approx(1.0)
        assert at(timeline, name, 0) < 1.0


def test_faithfulness_is_left_out_where_nothing_is_there(timeline: Timeline) -> None:
    whole, ratio = timeline.curve("circuit", "whole"), timeline.curve("circuit", "faithfulness")
    nothing = [(lo <= 0 <= hi) for lo, hi in whole.select("lo", "hi").iter_rows()]
    assert any(nothing)
    assert [value != value for value in ratio["value"]] == nothing


def test_it_goes_on_with_the_circuit_that_was_found(
    run: TrainingRun, timeline: Timeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = circuit_file._smallest
    monkeypatch.setattr(circuit_file, "_smallest", lambda *args: made.append(1) or real(*args))
    options: dict[str, Any] = {"behavior": pairs(), "measures": "circuit", "settings": SETTINGS, "draws": 20}
    first = track(run, out=tmp_path, **options)
    assert made == [1] and Circuit.load(tmp_path / "at_last" / "circuit").n_edges
    (tmp_path / "measured" / "4" / "rows.json").unlink()
    again = track(run, out=tmp_path, **options)
    assert made == [1]
    assert again.content_hash == first.content_hash == timeline.content_hash


def test_a_given_circuit(run: TrainingRun, timeline: Timeline, tmp_path: Path) -> None:
    model = run.load()
    scored = eap_ig(model, pairs().train, metric=pairs().metric)
    folder = scored.circuit(fraction=0.2).save(tmp_path / "circuit")
    given = {"circuit": {"given": str(folder), "draws": 20, "strengths": 4}}
    found = track(run, behavior=pairs(), measures="circuit", settings=given, draws=20)
    assert found.tables["values"].equals(timeline.tables["values"])
    with pytest.raises(MethodError, match="holds no circuit"):
        other = {"circuit": {"given": str(scored.save(tmp_path / "scores"))}}
        track(run, behavior=pairs(), measures="circuit", settings=other)


def test_the_smallest_that_is_faithful(run: TrainingRun) -> None:
    """With a target that any circuit reaches the first size is taken, with one that none does the closest."""
    behavior, model = pairs(), run.load()
    found = {
        target: circuit_file._smallest(model, eap_ig, behavior.train, behavior.test, behavior.metric, None, target)
        for target in (1e9, 1.0)
    }
    scored = eap_ig(model, behavior.train, metric=behavior.metric)
    sizes = [c for f in circuit_file.FRACTIONS if (c := scored.circuit(fraction=f)).n_edges]
    assert found[1e9].n_edges == sizes[0].n_edges
    off = [abs(1 - c.faithfulness(behavior.train, metric=behavior.metric, model=model).value) for c in sizes]
    best = found[1.0].faithfulness(behavior.train, metric=behavior.metric, model=model).value
    assert abs(1 - best) == pytest.approx(min(off), abs=1e-9)


def test_settings_are_known() -> None:
    with pytest.raises(MethodError, match="unknown setting"):
        track({0: "x"}, measures="circuit", settings={"circuit": {"fractoin": 0.1}})
    with pytest.raises(MethodError, match="not asked for"):
        track({0: "x"}, measures="loss", settings={"circuit": {}})
