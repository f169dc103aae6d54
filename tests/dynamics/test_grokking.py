"""Progress measures of grokking: against planted logits, and on a run that learns by heart first."""

import pytest
import torch

from headwater.core.errors import MethodError
from headwater.core.groups import cyclic
from headwater.dynamics import TrainConfig, TrainingRun, track, train
from headwater.dynamics.measures import Probe, acrosses
from headwater.dynamics.measures.grokking import modular_addition

P = 7
SMALL = {
    "data": [{"source": "modular_addition", "options": {"p": P, "share": 0.5}}],
    "validation": [{"source": "modular_addition", "options": {"p": P, "share": 0.5, "split": "test"}}],
    "model": {"n_layers": 1, "n_heads": 2, "d_model": 16},
    "steps": 12,
    "batch": 8,
    "checkpoints": {"every": 4},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    return train(TrainConfig.from_dict(SMALL), tmp_path_factory.mktemp("runs") / "run")


def test_losses_of_both_splits_are_those_of_the_sequences(run: TrainingRun) -> None:
    found = track(run, measures="modular_addition", draws=20)
    source = run.data.sources[0]
    splits = {
        "train": torch.stack([torch.from_numpy(source.tokens(i)) for i in range(source.n_sequences)]),
        "test": torch.from_numpy(run.data.validation["validation"][0]),
    }
    for split, rows in splits.items():
        logits = run.load().run(rows, logits="all").logits[:, 2, :P].double()  # over the numbers, not the sign
        by_hand = torch.nn.functional.cross_entropy(logits, rows[:, 3])
        right = (logits.argmax(dim=-1) == rows[:, 3]).double().mean()
        assert found.curve("modular_addition", f"{split} loss")["value"][-1] == pytest.approx(float(by_hand), rel=1e-5)
        assert found.curve("modular_addition", f"{split} accuracy")["value"][-1] == pytest.approx(float(right))


def test_planted_frequencies_are_restricted_to_and_excluded() -> None:
    """Logits of frequency 2, and noise that depends on a alone: restricted keeps just the first."""
    a, b, c = torch.meshgrid(*[torch.arange(P).double()] * 3, indexing="ij")
    planted = 5 * torch.cos(2 * torch.pi * 2 * (a + b - c) / P)
    noise = torch.randn(P, 1, P, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = noise - noise.mean(dim=-1, keepdim=True) - noise.mean(dim=0) + noise.mean()
    logits = planted + noise
    shares = torch.tensor([0.0, 0.9, 0.0])  # k1, k2, k3
    kept = {
        step: {
            "modular_addition.logits": (logits if step else noise.expand(P, P, P)).float(),
            "modular_addition.train": torch.eye(P, dtype=torch.bool),
            "modular_addition.shares": shares,
        }
        for step in (0, 5)
    }
    found = {
        step: {one["name"]: one["value"] for one in rows} for step, rows in acrosses["modular_addition"](kept).items()
    }
    right = cyclic(P).product
    loss = torch.nn.functional.cross_entropy
    assert found[5]["restricted"] == pytest.approx(float(loss(planted.view(-1, P), right.flatten())), abs=1e-5)
    on_train = noise.expand(P, P, P)[torch.eye(P, dtype=torch.bool)]
    assert found[5]["excluded"] == pytest.approx(float(loss(on_train, right.diagonal())), abs=1e-5)
    assert found[5]["restricted accuracy"] == 1.0
    assert found[0]["restricted"] == pytest.approx(float(torch.log(torch.tensor(P))), abs=1e-5)


def test_what_is_no_addition_is_refused(run: TrainingRun) -> None:
    for ids in (torch.zeros(2, 5, dtype=torch.long), torch.tensor([[1, 2, P, 4]])):
        with pytest.raises(MethodError, match="no modular addition"):
            modular_addition(Probe(run.load(), 0, ids=ids))


def test_no_key_frequency_no_restricted_loss() -> None:
    kept = {
        0: {
            "modular_addition.logits": torch.zeros(P, P, P),
            "modular_addition.train": torch.eye(P, dtype=torch.bool),
            "modular_addition.shares": torch.zeros(3),
        }
    }
    assert acrosses["modular_addition"](kept) == {0: []}
