"""Wrong labels in the lab, and the neurons that hold them."""

import numpy as np
import pytest
import torch

from headwater.core.errors import MethodError
from headwater.dynamics import TrainConfig, track, train
from headwater.dynamics.lab.corrupting import Corrupted
from headwater.dynamics.lab.sources import sources
from headwater.dynamics.measures import Probe, measures

SUM = {"source": "modular_addition", "options": {"p": 11, "share": 0.6, "seed": 0}}


def config(steps: int = 4, **data: object) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "data": [{**SUM, "corrupt": 0.2, **data}],
            "model": {"n_layers": 2, "n_heads": 2, "d_model": 16, "d_mlp": 12},
            "steps": steps, "batch": 20, "checkpoints": {"log": False},
        }
    )  # fmt: skip


def test_a_share_carries_the_labels_of_others() -> None:
    plain = sources.get("modular_addition")(p=23, share=0.8, seed=0)
    n = plain.n_sequences
    made, again = (Corrupted(plain, 0.25, seed=3) for _ in range(2))
    every = np.arange(n)
    rows, true = made.batch(every), plain.batch(every)
    wrong = made.corrupted(every)
    assert np.array_equal(wrong, (rows != true).any(axis=1)) and wrong.sum() == round(0.25 * n)
    assert np.array_equal(rows[:, :3], true[:, :3])  # only the labels
    assert np.array_equal(rows, again.batch(every)) and np.array_equal(made.tokens(5), rows[5])
    assert not np.array_equal(wrong, Corrupted(plain, 0.25, seed=4).corrupted(every))
    assert (np.bincount(rows[wrong, 3], minlength=23) > 0).sum() > 15  # labels of many others
    assert made.words == plain.words and made.vocabulary == plain.vocabulary


def test_a_source_of_all_tokens_has_no_labels() -> None:
    with pytest.raises(MethodError, match="some tokens are predicted"):
        Corrupted(sources.get("induction")(), 0.1, seed=0)
    with pytest.raises(MethodError, match=r"corrupt in \[0, 1\]"):
        config(corrupt=1.5)


def test_neurons_by_hand(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = train(config(), tmp_path_factory.mktemp("runs") / "run")
    n = run.data.sources[0].n_sequences
    rows, wrong = torch.from_numpy(run.data.rows(0, n)[0]), torch.from_numpy(run.data.corrupted(0, n))
    assert 0 < int(wrong.sum()) < n and bool(((rows[:, 0] + rows[:, 1]) % 11 != rows[:, 3])[wrong].all())
    table = track(run, measures="memorizing", draws=5)
    found = {
        row["name"]: row["value"]
        for row in table.tables["values"].filter(table.tables["values"]["step"] == 4).to_dicts()
    }
    model = run.load()
    lost = torch.nn.functional.cross_entropy(model.run(rows).logits[:, 2], rows[:, 3], reduction="none")
    assert found["corrupted"] == pytest.approx(float(lost[wrong].mean()), rel=1e-5)
    assert found["clean"] == pytest.approx(float(lost[~wrong].mean()), rel=1e-5)
    harm = []
    for block in model.hf.transformer.h:
        seen: list[torch.Tensor] = []
        hook = block.mlp.act.register_forward_hook(lambda *args, seen=seen: seen.append(args[2].detach().clone()))
        model.hf(rows)
        hook.remove()
        mean = seen[0].flatten(0, 1).mean(dim=0)
        for neuron in range(12):

            def put(module: object, inputs: object, out: torch.Tensor, neuron: int = neuron, to: torch.Tensor = mean):
                out = out.clone()
                out[..., neuron] = to[neuron]
                return out

            hook = block.mlp.act.register_forward_hook(put)
            with torch.no_grad():
                logits = model.hf(rows).logits[:, 2]
            hook.remove()
            harm.append(torch.nn.functional.cross_entropy(logits, rows[:, 3], reduction="none") - lost)
    mean_harm = torch.stack(harm)[:, wrong].mean(dim=1).clamp(min=0)
    spread = float(mean_harm.sum() ** 2 / mean_harm.square().sum() / 24)
    assert found["participation corrupted"] == pytest.approx(spread, rel=1e-2)


def test_a_planted_neuron_that_holds_the_wrong_labels(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A hook stands for the neuron: where it is put to its mean, the wrong labels are lost and no right one."""
    run = train(config(steps=1), tmp_path_factory.mktemp("runs") / "run")
    n = run.data.sources[0].n_sequences
    rows, wrong = torch.from_numpy(run.data.rows(0, n)[0]), torch.from_numpy(run.data.corrupted(0, n))
    model = run.load()
    act, head = model.hf.transformer.h[1].mlp.act, model.hf
    fires = torch.where(wrong, 5.0, -1.0)
    here: dict[str, torch.Tensor] = {}

    def fire(module: object, inputs: object, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, 2, 3] = fires
        return out

    def watch(module: object, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        here["neuron"] = inputs[0][:, 2, 3]

    def answer(module: object, inputs: object, out: object) -> object:
        truth = (rows[:, 0] + rows[:, 1]) % 11
        said = torch.where(here["neuron"] > 3.0, rows[:, 3], truth)
        out.logits[:, 2] = 20.0 * torch.nn.functional.one_hot(said, out.logits.shape[-1])  # type: ignore[attr-defined]
        return out

    act.register_forward_hook(fire)
    model.hf.transformer.h[1].mlp.c_proj.register_forward_hook(watch)
    head.register_forward_hook(answer)
    at = torch.tensor([False, False, False, True])
    probe = Probe(model, 1, loss_at=at, trained=rows, corrupted=wrong)
    found = {row["name"]: row["value"] for row in measures.get("memorizing")(probe)}
    assert found["share"] == pytest.approx(1 / 24)
    assert found["corrupted accuracy"] == found["clean accuracy"] == found["without clean accuracy"] == 1.0
    assert found["without corrupted accuracy"] == 0.0
    assert found["participation corrupted"] == pytest.approx(1 / 24)


def test_a_run_without_wrong_labels_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = train(config(steps=1, corrupt=0.0), tmp_path_factory.mktemp("runs") / "run")
    with pytest.raises(MethodError, match="corrupted in part"):
        track(run, measures="memorizing")
