"""do(data): what redo changes of an order, and that it changes nothing else."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from headwater.cli import main
from headwater.core.errors import HeadwaterError
from headwater.dynamics import TrainConfig, TrainingRun, redo, train
from lab_runs import same_files, small, weights


def finite(**options: Any) -> TrainConfig:
    """200 sequences, 240 shown: some twice."""
    data = [{"source": "induction", "options": {"vocabulary": 12, "length": 12, "sequences": 200}}]
    return small(**{"data": data, "steps": 60, "checkpoints": {"log": False, "save_seconds": 0}} | options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    return train(finite(), tmp_path_factory.mktemp("redo") / "run")


def shown(run: TrainingRun) -> np.ndarray[Any, Any]:
    return run.data.places(np.arange(run.order.n_sequences))[1]


def test_without_a_change_it_is_the_same_run(base: TrainingRun, tmp_path: Path) -> None:
    again = redo(base, tmp_path / "again")
    assert same_files(again.path, base.path, base.steps)
    assert again.result.content_hash == base.result.content_hash


def test_what_is_removed_is_nowhere_and_the_next_of_the_order_takes_its_place(
    base: TrainingRun, tmp_path: Path
) -> None:
    gone = [0, 17, 18, 200]  # the last one begins the second time through
    run = redo(base, tmp_path / "run", remove=gone)
    before, after = shown(base), shown(run)
    removed = set(before[gone].tolist())
    assert not removed & set(after.tolist())
    held = np.isin(before, list(removed))
    assert held.sum() > len(gone)  # those that come a second time, too
    assert np.array_equal(before[~held], after[~held])
    of_source = redo(base, tmp_path / "of", remove={0: sorted(removed)})
    assert np.array_equal(shown(of_source), after)
    # by hand: the unchanged order goes on after the last step
    following = [s for s in base.data.order.samples(240, 300)[1].tolist() if s not in removed]
    assert after[held].tolist() == following[: held.sum()]
    assert run.data.change is not None and run.data.change.about["removed"] == held.sum()
    rows = np.concatenate(list(run.batches()))
    assert np.array_equal(rows[5], run.data.sources[0].tokens(int(after[5])))
    assert not torch.equal(
        weights(run.folder(60))["transformer.wte.weight"], weights(base.folder(60))["transformer.wte.weight"]
    )


def test_stopped_and_gone_on_with_it_is_the_same(base: TrainingRun, tmp_path: Path) -> None:
    whole = redo(base, tmp_path / "whole", remove=[3, 4], reweight=([5], 0.5))
    redo(base, tmp_path / "cut", remove=[3, 4], reweight=([5], 0.5), stop_at=23)
    cut = redo(base, tmp_path / "cut", remove=[3, 4], reweight=([5], 0.5))
    assert same_files(cut.path, whole.path, whole.steps) and cut.result.content_hash == whole.result.content_hash
    # and by its own stored settings, as `train` goes on with any run
    moved = tmp_path / "moved"
    (tmp_path / "cut").rename(moved)
    assert train(TrainingRun.open(moved).config, moved).result.content_hash == whole.result.content_hash
    with pytest.raises(HeadwaterError, match="other settings"):
        redo(base, moved, remove=[3])


def test_repeats_take_places_of_others(base: TrainingRun, tmp_path: Path) -> None:
    run = redo(base, tmp_path / "run", repeat=([10, 11], 5))
    before, after = Counter(shown(base).tolist()), Counter(shown(run).tolist())
    for k in (10, 11):
        sequence = int(shown(base)[k])
        assert after[sequence] == 5 * before[sequence]
    assert (shown(run) != shown(base)).sum() == sum(4 * before[int(shown(base)[k])] for k in (10, 11))
    assert sum(after.values()) == 240


def test_a_weight_of_zero_is_a_place_left_empty(base: TrainingRun, tmp_path: Path) -> None:
    """Against a step done by hand: the gradient of the batch without these sequences, over as many tokens as before."""
    from headwater.dynamics.lab.models import make_model

    config = finite(model={"d_model": 16, "n_heads": 2}, dtype="float64", steps=1, micro_batch=3)
    run = train(config, tmp_path / "run")
    out = redo(run, tmp_path / "out", reweight=([1], 0.0))
    batch = torch.from_numpy(run.order.step(0))
    assert np.array_equal(out.order.step(0), run.order.step(0))
    hf = make_model(config, run.data.vocabulary, 12, run.data.tokenizer)
    kept = batch[[0, 2, 3]]
    logits = hf(input_ids=kept[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), kept[:, 1:].flatten(), reduction="sum") / (4 * 11)
    assert out.result.tables["curve"]["loss"][0] == pytest.approx(loss.item(), rel=1e-12)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([one.grad for one in hf.parameters() if one.grad is not None])
    assert out.result.tables["curve"]["grad_norm"][0] == pytest.approx(float(norm), rel=1e-9)
    one = redo(run, tmp_path / "one", reweight=([1], 1.0))
    assert one.result.tables["curve"]["loss"][0] == pytest.approx(run.result.tables["curve"]["loss"][0], rel=1e-12)


def test_pairs_of_terms_are_removed_from_what_takes_their_place_too(tmp_path: Path) -> None:
    run = train(small(steps=8), tmp_path / "run")  # a source that never runs out
    rows = np.concatenate(list(run.batches()))
    pair = [run.data.tokenizer.decode([int(t)]) for t in rows[0][:2]]
    ids = [int(t) for t in rows[0][:2]]
    out = redo(run, tmp_path / "out", remove=[tuple(pair)])
    both = np.array([set(ids) <= set(row.tolist()) for row in rows])
    after = np.concatenate(list(out.batches()))
    assert both.any() and not both.all()
    assert np.array_equal(after[~both], rows[~both])
    assert not any(set(ids) <= set(row.tolist()) for row in after)
    with pytest.raises(HeadwaterError, match="no such source"):
        redo(run, tmp_path / "no", remove={1: [0]})
    with pytest.raises(HeadwaterError, match="no such sequences"):
        redo(run, tmp_path / "no", remove={0: [-3]})
    (tmp_path / "p.csv").write_text(f"subject,object\n{pair[0]},{pair[1]}\n")
    assert redo(run, tmp_path / "file", remove=tmp_path / "p.csv").result.content_hash == out.result.content_hash
    pl.DataFrame({"sequence": np.flatnonzero(both)}).write_parquet(tmp_path / "n.parquet")
    np.save(tmp_path / "n.npy", np.flatnonzero(both))
    named = [redo(run, tmp_path / f"by-{kind}", remove=tmp_path / f"n.{kind}") for kind in ("parquet", "npy")]
    assert np.array_equal(*(np.concatenate(list(one.batches())) for one in named))


def test_parts_of_the_data_keep_their_shares(tmp_path: Path) -> None:
    source = {"source": "induction", "options": {"vocabulary": 12, "length": 12, "sequences": 500}}
    other = {"source": "induction", "weight": 0.5, "options": {"vocabulary": 12, "length": 12, "seed": 9}}
    data = [{**source, "repeat": {"share": 0.4, "sequences": 5}}, other]
    run = train(small(data=data, steps=50), tmp_path / "run")
    where, which = run.data.places(np.arange(200))
    often = Counter(which[where == 0].tolist()).most_common(1)[0][0]
    gone = np.flatnonzero((where == 0) & (which == often))[:1]
    out = redo(run, tmp_path / "out", remove=gone.tolist())
    after, sequence = out.data.places(np.arange(200))
    assert np.array_equal(after, where)
    assert often not in sequence[after == 0]
    part = {s for s, n in Counter(which[where == 0].tolist()).items() if n > 3}
    assert set(sequence[(where == 0) & (which == often)].tolist()) <= part  # of the repeated part


def test_another_seed_has_the_same_sequences_in_another_order(base: TrainingRun, tmp_path: Path) -> None:
    gone = [2, 9]
    plain, out = redo(base, tmp_path / "plain", seed=3), redo(base, tmp_path / "out", seed=3, remove=gone)
    assert out.config.seed == 3
    assert np.array_equal(plain.data.sources[0].batch(np.arange(9)), base.data.sources[0].batch(np.arange(9)))
    before, after = shown(plain), shown(out)
    assert not np.array_equal(before, shown(base))
    removed = np.isin(before, shown(base)[gone])
    assert removed.any() and np.array_equal(before[~removed], after[~removed])
    assert not np.isin(after, shown(base)[gone]).any()


def test_another_seed_keeps_the_wrong_labels(tmp_path: Path) -> None:
    data = [{"source": "modular_addition", "options": {"p": 11, "share": 0.6}, "corrupt": 0.2}]
    run = train(small(data=data, validation=[], steps=2), tmp_path / "run")
    every = np.arange(run.data.sources[0].n_sequences)
    for name, changed in (("one", redo(run, tmp_path / "one", seed=3)), ("two", redo(run, tmp_path / "two", steps=3))):
        assert np.array_equal(changed.data.sources[0].batch(every), run.data.sources[0].batch(every)), name
    assert not np.array_equal(shown(TrainingRun.open(tmp_path / "one")), shown(run))


def test_options_of_a_source_change(base: TrainingRun, tmp_path: Path) -> None:
    out = redo(base, tmp_path / "out", data={"induction": {"period": 3}}, steps=4)
    assert out.config.data[0].options["period"] == 3 and out.config.steps == 4
    assert all(len(set(row.tolist())) == 3 for row in out.order.step(0))
    with pytest.raises(HeadwaterError, match="no such source"):
        redo(base, tmp_path / "no", data={"world": {}})


def test_refusals(base: TrainingRun, tmp_path: Path) -> None:
    for options, said in [
        ({"remove": [240]}, "no such sequences"),
        ({"remove": [-1]}, "no such sequences"),
        ({"remove": np.arange(240)}, "nothing is left"),
        ({"repeat": ([0], 1)}, "whole number of times"),
        ({"repeat": (list(range(100)), 9)}, "too short"),
        ({"reweight": ([0], -1.0)}, "not negative"),
        ({"remove": [("t0", "nobody")]}, "written|removed"),
        ({"remove": np.array([0.5])}, "named by their numbers"),
    ]:
        with pytest.raises(HeadwaterError, match=said):
            redo(base, tmp_path / "no", **options)
    once = redo(base, tmp_path / "once", remove=[0], steps=2)
    with pytest.raises(HeadwaterError, match="redo itself"):
        redo(once, tmp_path / "twice")
    stored = next((once.path / "data").glob("change-*"))
    stored.write_bytes(stored.read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(HeadwaterError, match=r"damaged|not the change"):
        train(once.config, once.path)
    stored.unlink()
    with pytest.raises(HeadwaterError, match="missing"):
        train(once.config, once.path)


def test_the_command(base: TrainingRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "n.npy", np.array([0, 3]))
    arguments = ["redo", str(base.path), "--out", str(tmp_path / "out"), "--remove", str(tmp_path / "n.npy"), "--json"]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--set", "induction.period=3", "--steps", "3"])
    told = json.loads(capsys.readouterr().out)
    assert left.value.code == 0 and told["steps"] == 3 and told["change"]["removed"] == 2
    run = TrainingRun.open(tmp_path / "out")
    assert run.config.data[0].options["period"] == 3
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--set", "period=3"])
    assert left.value.code == 2
