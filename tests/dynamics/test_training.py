"""Training: what is computed, what is written, and that an interrupted run gives the same bits."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import headwater as hw
from headwater.core.errors import HeadwaterError, MethodError, ModelError, StoreError
from headwater.dynamics import TrainConfig, TrainingRun, train
from headwater.dynamics.lab.config import CheckpointConfig, OptimizerConfig, ScheduleConfig
from headwater.dynamics.lab.models import make_model
from headwater.dynamics.lab.optimizing import make_optimizer, rate
from lab_runs import same_files, small, weights


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    return train(small(), tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_is_what_a_plain_loop_gives(tmp_path: Path) -> None:
    """Against the definition, written out: transformers' own loss on the rebuilt batches, a fresh AdamW."""
    config = small(
        model={"d_model": 16, "n_heads": 2}, schedule={"name": "constant"}, dtype="float64",
        optimizer={"lr": 0.01, "weight_decay": 0.1, "clip": None},
    )  # fmt: skip
    run = train(config, tmp_path / "run")
    hf = transformers.AutoModelForCausalLM.from_pretrained(run.folder(0), dtype=torch.float64)
    decaying = [p for p in hf.parameters() if p.ndim >= 2]
    rest = [p for p in hf.parameters() if p.ndim < 2]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), foreach=False)
    losses = []
    for batch in run.batches():
        ids = torch.from_numpy(batch)
        loss = hf(input_ids=ids, labels=ids).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert np.allclose(losses, run.curve["loss"].to_numpy(), rtol=1e-6)  # transformers takes its loss in float32
    for name, weight in weights(run.folder(12)).items():
        assert torch.allclose(weight, hf.state_dict()[name], atol=1e-6), name
    assert run.curve["loss"][-1] < run.curve["loss"][0]


def test_checkpoints_load_as_any_model(done: TrainingRun) -> None:
    assert done.steps == [0, 1, 2, 4, 5, 8, 10, 12]
    model = hw.load(str(done.folder(12)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(done.folder(12))
    ids = torch.from_numpy(done.order.step(0))
    assert torch.equal(model.run(ids).logits, theirs.eval()(ids).logits)
    assert model.tokens("t3 t0")[0].tolist() == [3, 0]
    assert done.load().fingerprint == model.fingerprint != done.load(0).fingerprint
    note = done.note(8)
    assert note["step"] == 8 and note["sequences"] == 32 and note["tokens"] == 32 * 12
    with pytest.raises(StoreError, match="no checkpoint of step 3"):
        done.load(3)


def test_the_curve_and_the_validation(done: TrainingRun) -> None:
    assert done.curve["step"].to_list() == list(range(1, 13))
    assert done.result.facts["loss"] == done.curve["loss"][-1]
    table = done.result.tables["validation"]
    assert table["step"].to_list() == [0, 5, 10, 12]
    ids = torch.from_numpy(done.data.validation["validation"][0])
    logits = done.load(5).run(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    row = table.row(1, named=True)
    assert row["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert row["accuracy"] == pytest.approx(float((logits.argmax(-1) == ids[:, 1:]).float().mean()))


@pytest.mark.parametrize("stops", [[0], [1], [5, 6], [3, 7, 11], [12]])
def test_stopping_anywhere_changes_no_bit(done: TrainingRun, tmp_path: Path, stops: list[int]) -> None:
    for stop in stops:
        run = train(small(), tmp_path / "run", stop_at=stop)
        assert not run.finished or stop == 12
    torch.manual_seed(1234)  # the process' own random state must not matter
    run = train(small(), tmp_path / "run")
    assert run.result.content_hash == done.result.content_hash
    assert same_files(run.path, done.path, done.steps)
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*") if file.is_file()}
    assert train(small(), tmp_path / "run").result.content_hash == done.result.content_hash  # nothing is left to do
    after = {
        file: file.stat().st_mtime_ns for file in run.path.rglob("*") if file.is_file() and file.name != "run.lock"
    }
    assert all(before[file] == time for file, time in after.items())


def test_training_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    train(small(steps=2, threads=2), tmp_path / "run")
    assert torch.equal(state, torch.random.get_rng_state()) and torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_seeds_differ(done: TrainingRun, tmp_path: Path) -> None:
    other = train(small(seed=1), tmp_path / "other")
    assert not np.array_equal(other.order.step(0), done.order.step(0))
    assert not torch.equal(*(weights(r.folder(0))["transformer.h.0.attn.c_attn.weight"] for r in (other, done)))


def test_micro_batches_add_up(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": {"d_model": 16, "n_heads": 2}, "dtype": "float64"}
    whole = train(small(**options), tmp_path / "whole")
    parts = train(small(**options, micro_batch=3), tmp_path / "parts")
    assert np.allclose(whole.curve["loss"], parts.curve["loss"], rtol=1e-10)


def test_only_asked_tokens_are_predicted(tmp_path: Path) -> None:
    options = {"p": 7, "share": 1.0, "split": "all"}
    config = small(
        data=[{"source": "modular_addition", "options": options}], batch=49, steps=1, validation=[], dtype="float64",
        model={"type": "llama", "n_layers": 1, "d_model": 16, "n_heads": 2},
    )  # fmt: skip
    run = train(config, tmp_path / "run")
    ids = torch.from_numpy(run.order.step(0))
    logits = run.load(0, dtype="float64").run(ids[:, :-1]).logits[:, -1]
    assert run.curve["loss"][0] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, ids[:, 3])), rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"n_kv_heads": 1, "options": {"tie_word_embeddings": True}}),
        ("gpt_neox", {}),
        ("qwen3", {}),
        ("opt", {}),
    ],
)
def test_other_architectures(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model = {"type": kind, "d_model": 16, "n_heads": 2, "n_layers": 1, "d_mlp": 20, **options}
    first = train(small(model=model, steps=3), tmp_path / "a")
    train(small(model=model, steps=3), tmp_path / "b", stop_at=1)
    second = train(small(model=model, steps=3), tmp_path / "b")
    assert first.result.content_hash == second.result.content_hash
    assert first.load().hf.config.model_type == kind and first.load().n_layers == 1
    assert any(20 in p.shape for p in first.load().hf.parameters())


def test_bfloat16_keeps_float32_weights(tmp_path: Path) -> None:
    run = train(small(dtype="bfloat16", steps=2), tmp_path / "run")
    assert weights(run.folder(2))["transformer.wte.weight"].dtype == torch.float32
    exact = train(small(steps=2), tmp_path / "exact")
    assert run.curve["loss"][0] != exact.curve["loss"][0]
    assert run.curve["loss"][0] == pytest.approx(exact.curve["loss"][0], rel=0.02)


def test_a_run_may_start_from_a_checkpoint(done: TrainingRun, tmp_path: Path) -> None:
    config = small(model={"start": str(done.folder(12))}, steps=1, seed=4)
    run = train(config, tmp_path / "run")
    assert run.load(0).fingerprint == done.load(12).fingerprint


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"model": {"type": "gpt-2"}}, "gpt2"),
        ({"model": {"options": {"n_layerz": 3}}}, "n_layer"),
        ({"model": {"d_model": 30, "n_heads": 4}}, "no multiple"),
        ({"model": {"n_kv_heads": 2}}, "no such setting"),
        ({"model": {"context": 5}}, "shorter than a sequence"),
        ({"steps": 0}, "at least 1"),
        ({"schedule": {"name": "linear"}}, "constant"),
        ({"interventions": [{"do": "zero('z.0.h1')", "steps": [5, 5]}]}, "do not fit"),
        ({"validation": [{"source": "induction"}, {"source": "induction"}]}, "one name"),
        ({"vocabulary": 5}, "too small"),
        ({"device": "tpu9"}, "unknown device"),
    ]  # fmt: skip
    for options, said in wrong:
        with pytest.raises(HeadwaterError, match=said):
            train(small(**options), tmp_path / "run")
    assert not (tmp_path / "run" / "train.json").exists()
    train(small(), tmp_path / "run", stop_at=1)  # the folder of a refused try can be used


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match="something else"):
        train(small(), tmp_path / "full")
    train(small(steps=2), tmp_path / "run")
    with pytest.raises(StoreError, match=r"other values of .*seed"):
        train(small(steps=2, seed=8), tmp_path / "run")
    train(small(steps=2, checkpoints={"every": 5, "save_seconds": 99}), tmp_path / "run")  # no result depends on it


def test_changed_data_and_damage_are_noticed(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 9, (40, 12)))
    config = small(data=[{"source": str(tmp_path / "ids.npy")}], validation=[])
    train(config, tmp_path / "run", stop_at=2)
    saved = copy.deepcopy((tmp_path / "run/state/state.safetensors").read_bytes())
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, 9, (40, 12)))
    with pytest.raises(StoreError, match="other tokens"):
        train(config, tmp_path / "run")
    with pytest.raises(StoreError, match="other tokens"):
        _ = TrainingRun.open(tmp_path / "run").data
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 9, (40, 12)))
    (tmp_path / "run/state/state.safetensors").write_bytes(saved[:100])
    with pytest.raises(StoreError, match="damaged"):
        train(config, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not finite"):
        train(small(optimizer={"lr": 1e30, "clip": None}), tmp_path / "run")


def test_schedules() -> None:
    def curve(**options: Any) -> list[float]:
        return [rate(step, 100, 2.0, ScheduleConfig(**options)) for step in range(100)]

    assert curve() == [2.0] * 100
    warm = curve(name="constant", warmup=10)
    assert warm[0] == pytest.approx(0.2) and warm[9] == 2.0 == warm[50]
    cosine = curve(name="cosine", warmup=10, final=0.1)
    assert max(cosine) == pytest.approx(2.0) and cosine[55] == pytest.approx(1.1) and cosine[-1] < 0.21
    wsd = curve(name="wsd", decay=0.2, final=0.0)
    assert wsd[79] == 2.0 and wsd[90] == pytest.approx(1.0) and wsd[-1] == pytest.approx(0.1)


def test_which_weights_decay() -> None:
    hf = make_model(small(), 12, 12, None)

    def names(**options: Any) -> set[str]:
        adam = make_optimizer(hf, OptimizerConfig(weight_decay=0.5, **options), torch.device("cpu"))
        decaying = {id(p) for group in adam.param_groups if group["weight_decay"] for p in group["params"]}
        assert sum(len(group["params"]) for group in adam.param_groups) == len(list(hf.parameters()))
        return {name for name, p in hf.named_parameters() if id(p) in decaying}

    assert names(decay="all") == {name for name, _ in hf.named_parameters()}
    assert names() == {name for name, p in hf.named_parameters() if p.ndim >= 2}
    assert names() - names(decay="no_embeddings") == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_checkpoint_steps() -> None:
    assert CheckpointConfig().steps(20) == [0, 1, 2, 4, 8, 16, 20]
    assert CheckpointConfig(log=False, every=8, at=(3, 99)).steps(20) == [0, 3, 8, 16, 20]


def test_yaml_and_its_overrides(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("steps: 7\noptimizer: {lr: 1e-3}\ndata:\n  - source: ./ids.npy\n")
    config = TrainConfig.from_yaml(tmp_path / "a.yaml", **{"model.n_layers": 3, "data.0.weight": 2, "seed": 5})
    assert (config.steps, config.optimizer.lr, config.model.n_layers, config.data[0].weight) == (7, 1e-3, 3, 2.0)
    assert config.data[0].source == str((tmp_path / "ids.npy").resolve())
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for text, said in (("stpes: 3", "steps"), ("data: [{source: a, wieght: 2}]", "weight"), ("[1]", "no settings")):
        (tmp_path / "b.yaml").write_text(text)
        with pytest.raises(MethodError, match=said):
            TrainConfig.from_yaml(tmp_path / "b.yaml")
    with pytest.raises(MethodError, match="cannot set this"):
        TrainConfig.from_yaml(tmp_path / "a.yaml", **{"steps.more": 3})
