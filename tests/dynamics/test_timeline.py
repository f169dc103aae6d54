"""Timelines: each measure against its words, transitions against planted ones, and resuming."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import headwater as hw
from headwater.core.errors import HeadwaterError, MethodError, StoreError
from headwater.core.repeats import repeated_tokens
from headwater.dynamics import Timeline, TrainingRun, track, train
from headwater.dynamics import timeline as timeline_module
from headwater.dynamics.measures import Probe, measures
from headwater.dynamics.measures.streams import linear_cka
from headwater.dynamics.transitions import change_point, crossing, transitions
from lab_runs import small


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    config = small(steps=16, checkpoints={"log": True}, model={"d_model": 16, "n_heads": 2})
    return train(config, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def probe(run: TrainingRun) -> Probe:
    rows, at = run.data.validation["validation"]
    return Probe(run.load(), 16, None, torch.from_numpy(rows), torch.from_numpy(at), 0)


def numbers(name: str, probe: Probe) -> dict[str, float]:
    return {row["name"]: row["value"] for row in measures.get(name)(probe)}


def test_loss_and_accuracy(run: TrainingRun, probe: Probe) -> None:
    last = run.result.tables["validation"].tail(1).to_dicts()[0]
    found = numbers("loss", probe)
    assert found[""] == pytest.approx(last["loss"], rel=1e-5) and found["accuracy"] == pytest.approx(last["accuracy"])
    partial = Probe(probe.model, 0, None, probe.ids, torch.arange(12) >= 6, 0)
    assert numbers("loss", partial)[""] == pytest.approx(float(probe.losses[:, 5:].mean()), rel=1e-6)


def test_heads_and_in_context_learning(probe: Probe) -> None:
    ids = repeated_tokens(probe.model, seed=0)
    half = ids.shape[1] // 2
    assert torch.equal(ids[:, :half], ids[:, half:])
    pattern = probe.model.run(ids, capture="pattern.1.h0")["pattern.1.h0"]
    looked = torch.stack([pattern[:, t, t - half + 1] for t in range(half, 2 * half)]).mean()
    found = numbers("heads", probe)
    assert found["induction a1.h0"] == pytest.approx(float(looked), rel=1e-5)
    assert found["induction max"] == max(v for n, v in found.items() if n.startswith("induction a"))
    logp = probe.model.run(ids).logits.log_softmax(-1)
    lost = -logp[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    score = numbers("icl", probe)["repeat"]
    assert score == pytest.approx(float(lost[:, half:].mean() - lost[:, : half - 1].mean()), abs=1e-5)


def test_collapse_is_the_mean_cosine_of_pairs(probe: Probe) -> None:
    stream = probe.model.run(probe.ids, capture="resid_post.0")["resid_post.0"][:, :-1]
    pairs = [
        torch.cosine_similarity(stream[:, i], stream[:, j], dim=-1) for i in range(11) for j in range(11) if i != j
    ]
    assert numbers("collapse", probe)["layer 0"] == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-5)


def test_repetition(probe: Probe) -> None:
    guess = probe.model.run(probe.ids).logits.argmax(-1)[:, :-1]
    found = numbers("repetition", probe)
    assert found[""] == pytest.approx(float((guess[:, 1:] == guess[:, :-1]).float().mean()))
    assert found["truth"] == 0.0  # distinct tokens that repeat never stand side by side


def test_lens_depth_by_hand(probe: Probe) -> None:
    """By the model's own norm and unembedding, called as modules."""
    hf = probe.model.hf
    run = probe.model.run(probe.ids, capture="resid_post.*")
    final = run.logits[:, :-1].argmax(-1)
    with torch.inference_mode():
        first = hf.lm_head(hf.transformer.ln_f(run["resid_post.0"]))[:, :-1].argmax(-1)
    by_hand = torch.where(first == final, 1, 2).float().mean() / 2
    assert numbers("lens_depth", probe)[""] == pytest.approx(float(by_hand))


def test_weight_norms(probe: Probe) -> None:
    found = numbers("weight_norms", probe)
    flat = torch.cat([p.flatten() for p in probe.model.hf.parameters()])
    assert found["all"] == pytest.approx(flat.norm().item(), rel=1e-5)
    block = torch.cat([p.flatten() for p in probe.model.hf.transformer.h[1].parameters()])
    assert found["layer 1"] == pytest.approx(block.norm().item(), rel=1e-5)


def test_cka_is_what_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(50, d, generator=generator) for d in (6, 4))
    turned = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    assert linear_cka(a, 3 * a @ turned + 1) == pytest.approx(1.0)
    assert 0 < linear_cka(a, b) < 0.4
    assert np.isnan(linear_cka(a, torch.ones(50, 4)))
    centre = torch.eye(50) - 1 / 50  # by Gram matrices, as it is defined
    k, m = centre @ a @ a.T @ centre, centre @ b @ b.T @ centre
    assert linear_cka(a, b) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())), rel=1e-4)


def test_what_a_measure_needs_is_told(probe: Probe) -> None:
    bare = Probe(probe.model, 0)
    with pytest.raises(MethodError, match="needs a behavior"):
        measures.get("behavior")(bare)
    with pytest.raises(MethodError, match="needs sequences"):
        measures.get("loss")(bare)
    one = Probe(probe.model, 0, None, probe.ids, torch.arange(12) == 5)
    for name in ("collapse", "repetition"):
        with pytest.raises(MethodError, match="Leave it out"):
            measures.get(name)(one)


# --- transitions


def test_a_planted_step_is_found_with_its_interval() -> None:
    random = np.random.default_rng(0)
    steps = [10 * i for i in range(40)]
    inside = 0
    for trial in range(20):
        y = np.where(np.arange(40) < 25, 0.1, 0.9) + random.normal(0, 0.25, 40)
        found = change_point(steps, y.tolist(), draws=200, seed=trial)
        assert found is not None and found["p"] < 0.02 and found["lo"] <= found["step"] <= found["hi"]
        inside += found["lo"] <= 245 <= found["hi"]
    assert inside >= 17  # nominal 95%
    assert found["before"] == pytest.approx(0.1, abs=0.2) and found["after"] == pytest.approx(0.9, abs=0.2)


def test_noise_has_no_small_p() -> None:
    random = np.random.default_rng(1)
    ps = [change_point(range(20), random.normal(size=20).tolist(), draws=99)["p"] for _ in range(60)]  # type: ignore[index]
    assert 0.25 < float(np.mean(ps)) < 0.75 and sum(p <= 0.05 for p in ps) <= 8


def test_curves_that_say_nothing() -> None:
    assert change_point(range(5), [0, 0, 1, 1, 1]) is None
    assert change_point(range(9), [0.3] * 9) is None
    assert change_point(range(8), [float("nan")] * 4 + [0.0, 1.0, 1.0, 1.0]) is None


def test_crossings_are_read_in_straight_lines() -> None:
    steps, y = np.array([0.0, 10, 20, 30]), np.array([0.0, 0.2, 0.6, 1.0])
    assert crossing(steps, y, 0.4, rising=True) == pytest.approx(15)
    assert crossing(steps, -y, -0.4, rising=False) == pytest.approx(15)
    assert crossing(steps, y, 0.0, rising=True) == 0.0
    assert np.isnan(crossing(steps, y, 2.0, rising=True))
    table = pl.DataFrame(
        {
            "step": [*range(8)] * 2,
            "measure": ["m"] * 16,
            "name": ["a"] * 8 + ["b"] * 8,
            "value": [0.0] * 4 + [1.0] * 4 + [2.0] * 8,
        }
    )
    found = transitions(table)
    assert found["name"].to_list() == ["a"] and found["half"][0] == pytest.approx(3.5)


# --- tracking


MEASURES = ("loss", "heads", "icl", "weight_norms", "collapse", "repetition", "lens_depth", "cka")


def test_a_run_is_tracked(run: TrainingRun, tmp_path: Path) -> None:
    found = track(run, measures=MEASURES, draws=50)
    assert found.curve("loss")["step"].to_list() == [0, 1, 2, 4, 8, 16]
    validation = run.result.tables["validation"].filter(pl.col("step") == 16)["loss"][0]
    assert found.curve("loss")["value"][-1] == pytest.approx(validation, rel=1e-5)
    assert set(found.tables["values"]["measure"]) == set(MEASURES)
    last = found.curve("cka", "last, layer 1")
    assert last["value"][-1] == pytest.approx(1.0) and last["value"][0] < 1.0
    assert found.curve("cka", "before, layer 1")["step"].to_list() == [1, 2, 4, 8, 16]
    norm = found.curve("weight_norms", "all")["value"]
    assert found.when("weight_norms", "all", level=float(norm[2]), rising=bool(norm[2] > norm[0])) <= 2.0
    found.save(tmp_path / "t")
    assert Timeline.load(tmp_path / "t", check=True).content_hash == found.content_hash
    assert "svg" in found._repr_html_()
    with pytest.raises(MethodError, match="loss accuracy"):
        found.curve("loss", "acuracy")


def test_tracking_goes_on_where_it_was(run: TrainingRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = track(run, measures="loss,cka", draws=50)
    real, seen = timeline_module._measure, []

    def killed(probe: Probe, config: Any, one: Any) -> Any:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(one.step)
        return real(probe, config, one)

    monkeypatch.setattr(timeline_module, "_measure", killed)
    with pytest.raises(KeyboardInterrupt):
        track(run, measures="loss,cka", draws=50, out=tmp_path / "t")
    again: list[int] = []
    monkeypatch.setattr(timeline_module, "_measure", lambda *a: again.append(a[2].step) or real(*a))
    done = track(run, measures="loss,cka", draws=50, out=tmp_path / "t")
    assert seen == [0, 1, 2] and again == [4, 8, 16]
    assert done.content_hash == whole.content_hash
    assert track(run, measures="loss,cka", draws=50, out=tmp_path / "t").content_hash == whole.content_hash
    assert len(again) == 3
    with pytest.raises(StoreError, match="another config"):
        track(run, measures="loss", out=tmp_path / "t")


def test_what_another_process_is_at_is_left_to_it(
    run: TrainingRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are claimed come last, when their claim has fallen."""
    from filelock import FileLock

    out = tmp_path / "t"
    (out / "measured").mkdir(parents=True)
    track(run, measures="loss", draws=50, out=tmp_path / "other")
    (out / "track.json").write_bytes((tmp_path / "other" / "track.json").read_bytes())
    theirs = FileLock(out / "measured" / ".2.lock")
    theirs.acquire()
    order: list[int] = []
    real = timeline_module._measure

    def note(probe: Probe, config: Any, one: Any) -> Any:
        order.append(one.step)
        if one.step == 16:
            theirs.release()
        return real(probe, config, one)

    monkeypatch.setattr(timeline_module, "_measure", note)
    found = track(run, measures="loss", draws=50, out=out)
    assert order == [0, 1, 4, 8, 16, 2]
    assert found.content_hash == Timeline.load(tmp_path / "other" / "timeline").content_hash


def test_a_behavior_is_tracked(tiny_folder: Path) -> None:
    pairs = hw.behavior("ioi", n=6)
    found = track({0: tiny_folder, 5: tiny_folder}, behavior=pairs, measures=("behavior", "canary"), draws=20)
    value = hw.behavior.evaluate(hw.load(str(tiny_folder)), pairs, canary=False).value("logit_diff")
    curve = found.curve("behavior", "logit_diff")
    assert curve["value"].to_list() == pytest.approx([value, value]) and curve["lo"][0] < value < curve["hi"][0]
    assert any(name.startswith("multiple choice") for name in found.tables["values"]["name"])
    assert not found.tables["transitions"].height


def test_mistakes_are_told(run: TrainingRun, tmp_path: Path) -> None:
    for options, said in (
        ({"measures": ("los",)}, "loss"),
        ({"measures": ()}, "once each"),
        ({"mesures": ("loss",)}, "measures"),
        ({"measures": ("behavior",)}, "measure 'behavior' of step-0"),
        ({"length": 1}, "two tokens"),
    ):
        with pytest.raises(HeadwaterError, match=said):
            track(run, **options)
    (tmp_path / "x" / "measured").mkdir(parents=True)
    (tmp_path / "x" / "measured" / "thesis").write_text(json.dumps("precious"))
    with pytest.raises(StoreError, match="something else"):
        track(run, out=tmp_path / "x")
