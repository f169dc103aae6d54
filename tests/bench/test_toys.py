"""Toy models against what is known of them: polytopes, phases, group representations, the Fourier algorithm."""

import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import headwater as hw
from headwater.bench import toys
from headwater.bench.toys.algebra import Algebra, neuron_shares
from headwater.bench.toys.superposing import (
    Superposition,
    SuperpositionConfig,
    dimensionality,
    draw_features,
    predicted_losses,
    predicted_phase,
    reconstruct,
)
from headwater.bench.toys.training import AlgebraConfig, make_model, split_pairs, table_of
from headwater.core.errors import MethodError, StoreError
from headwater.core.groups import by_product, cyclic, dihedral, excluded, group, kernel_share, restricted, symmetric
from headwater.core.results import load_result

GROUPS = ["C7", "C8", "D5", "D6", "S3", "S4"]


# --- superposition


def polygon(n: int) -> torch.Tensor:
    turn = 2 * math.pi * torch.arange(n).double() / n
    return torch.stack([turn.cos(), turn.sin()])


@pytest.mark.parametrize(
    ("w", "wanted"),
    [
        (torch.eye(3).double(), [1, 1, 1]),
        (torch.tensor([[1.0, -1.0]]).double(), [1 / 2, 1 / 2]),
        (polygon(3), [2 / 3] * 3),
        (polygon(5), [2 / 5] * 5),
        (torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]).double() / 3**0.5, [3 / 4] * 4),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double(), [1, 0]),
    ],
    ids=["axes", "pair", "triangle", "pentagon", "tetrahedron", "left out"],
)
def test_polytopes_have_their_known_dimensionality(w: torch.Tensor, wanted: list[float]) -> None:
    norm, dims, interference = dimensionality(w)
    torch.testing.assert_close(dims, torch.tensor(wanted).double())
    for i in range(w.shape[1]):  # and by the definition, feature by feature
        if norm[i] > 0:
            overlaps = [float((w[:, i] / norm[i]) @ w[:, j]) ** 2 for j in range(w.shape[1])]
            assert float(dims[i]) == pytest.approx(float(norm[i]) ** 2 / sum(overlaps))
            assert float(interference[i]) == pytest.approx(sum(overlaps) - overlaps[i], abs=1e-12)


def test_samples_have_their_density() -> None:
    x = draw_features((20000, 3), 0.2, torch.Generator().manual_seed(0))
    assert float((x > 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(x[x > 0].mean()) == pytest.approx(0.5, abs=0.01)
    w, b = torch.randn(2, 1, 3), torch.randn(2, 3)
    x = torch.rand(2, 4, 3)
    plain = torch.stack([torch.relu(w[i].T @ (w[i] @ x[i, n]) + b[i]) for i in range(2) for n in range(4)]).view(
        2, 4, 3
    )
    torch.testing.assert_close(reconstruct(x, w, b), plain)


@pytest.fixture(scope="module")
def phases() -> Superposition:
    return toys.superposition(
        densities=(1.0, 0.1), importances=(0.1, 1.0, 10.0), tries=3, steps=700, batch=256, lr=2e-2
    )


def test_the_phases_are_those_of_the_theory(phases: Superposition) -> None:
    found = {(row["density"], row["importance"]): row for row in phases.tables["instances"].to_dicts()}
    # dense features get a dimension each, by importance; sparse ones share it
    assert found[1.0, 0.1]["phase"] == "not represented" and found[1.0, 10.0]["phase"] == "dedicated"
    assert found[0.1, 1.0]["phase"] == "superposition" and found[0.1, 1.0]["represented"] == 2
    assert found[0.1, 1.0]["loss"] < 0.6 * found[0.1, 1.0]["floor"], "superposition beats one dimension a feature"
    assert found[1.0, 0.1]["loss"] == pytest.approx(found[1.0, 0.1]["floor"], rel=0.1)
    shared = phases.tables["features"].filter(pl.col("instance") == 4)
    assert shared["dimensionality"].to_list() == pytest.approx([0.5, 0.5], abs=0.03)
    w = phases.tensors["W"][4]
    assert float(w[0, 0] * w[0, 1]) < 0, "antipodal"
    assert (
        phases.facts["agreement"]
        == (phases.tables["instances"]["phase"] == phases.tables["instances"]["predicted"]).mean()
    )
    assert phases.facts["agreement"] >= 5 / 6
    assert phases.chart().to_dict() and phases.facts["n_instances"] == 6


def test_predicted_losses_are_those_of_the_candidates() -> None:
    """Each closed form against a million samples through the model itself."""
    candidates = {
        "not represented": ([1.0, 0.0], lambda p: [0.0, p / 2]),
        "superposition": ([1.0, -1.0], lambda p: [0.0, 0.0]),
        "dedicated": ([0.0, 1.0], lambda p: [p / 2, 0.0]),
    }
    for density, importance in ((1.0, 0.5), (0.3, 2.0), (0.15, 1.0)):
        x = draw_features((1, 1_000_000, 2), density, torch.Generator().manual_seed(0))
        for phase, loss in predicted_losses(density, importance).items():
            w, bias = candidates[phase]
            back = reconstruct(x, torch.tensor([[w]]), torch.tensor([bias(density)]))
            weighted = (x - back).square() * torch.tensor([1.0, importance])
            assert float(weighted.sum(-1).mean()) == pytest.approx(loss, rel=0.03)
    assert predicted_phase(1.0, 0.1) == "not represented" and predicted_phase(1.0, 10.0) == "dedicated"
    assert predicted_phase(0.1, 1.0) == "superposition"


def test_five_features_in_two_dimensions_become_a_pentagon() -> None:
    found = toys.superposition(
        features=5, hidden=2, densities=(1.0, 0.05), importances=(1.0,), weighting="decay", tries=4, steps=900,
        batch=256, lr=2e-2,
    )  # fmt: skip
    sparse = found.tables["features"].filter(pl.col("density") == 0.05)
    assert sparse["fraction"].to_list() == ["2/5"] * 5
    assert sparse["dimensionality"].to_list() == pytest.approx([0.4] * 5, abs=0.03)
    dense = found.tables["instances"].filter(pl.col("density") == 1.0)
    assert dense["dimensions_per_feature"][0] == pytest.approx(1.0, abs=0.05)  # as many directions as dimensions
    assert found.chart().to_dict()


def test_the_features_are_the_key_to_the_hidden_layer(phases: Superposition, tmp_path: Path) -> None:
    x, hidden = phases.hidden(4, 50)
    torch.testing.assert_close(hidden, x @ phases.directions(4))
    assert torch.equal(phases.hidden(4, 50)[0], x) and not torch.equal(phases.hidden(4, 50, seed=1)[0], x)
    again = load_result(phases.save(tmp_path / "toy"), check=True)
    assert isinstance(again, Superposition) and again.content_hash == phases.content_hash
    with pytest.raises(MethodError, match="no such instance"):
        phases.directions(6)


def test_superposition_is_the_same_from_its_seed() -> None:
    options: dict[str, Any] = {"densities": (0.3,), "importances": (1.0,), "steps": 20, "batch": 32}
    one, same, other = (toys.superposition(**options, seed=seed) for seed in (0, 0, 1))
    assert one.content_hash == same.content_hash != other.content_hash
    with pytest.raises(MethodError, match="does not fit"):
        SuperpositionConfig(features=2, hidden=3)
    with pytest.raises(MethodError, match="does not fit"):
        SuperpositionConfig(densities=(0.0,))


# --- groups


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_groups_and_their_irreps_complete(name: str) -> None:
    made = group(name)
    n = made.order
    a, b, c = torch.meshgrid(*[torch.arange(n)] * 3, indexing="ij")
    assert torch.equal(made.product[made.product[a, b], c], made.product[a, made.product[b, c]])
    assert torch.equal(made.product[torch.arange(n), made.inverse], torch.full((n,), made.identity))
    total = torch.zeros(n, n, dtype=torch.float64)
    for irrep in made.irreps:
        p = irrep.projector
        torch.testing.assert_close(p @ p, p)
        torch.testing.assert_close(p, p.T)
        # matrix entries: d^2 functions for a real irrep, d of them for a joined pair of one-dimensional ones
        rank = round(float(p.trace()))
        assert rank == irrep.dimension ** (1 if name.startswith("C") else 2)
        total += p
    torch.testing.assert_close(total, torch.eye(n).double())
    characters = torch.stack([irrep.character for irrep in made.irreps])
    overlaps = characters @ characters.T / n
    assert float((overlaps - overlaps.diag().diag()).abs().max()) < 1e-9
    # a character is one value a conjugacy class
    g, h = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    conjugate = made.product[made.product[h, g], made.inverse[h]]
    for irrep in made.irreps:
        torch.testing.assert_close(irrep.character[conjugate], irrep.character[g])


def test_permutations_compose_as_permutations() -> None:
    made = symmetric(4)
    rows = [[int(x) for x in name] for name in made.elements]
    for i in (0, 5, 13, 23):
        for j in (2, 7, 22):
            assert rows[int(made.product[i, j])] == [rows[i][rows[j][x]] for x in range(4)]
    turn = dihedral(5)
    r, s = turn.elements.index("r1"), turn.elements.index("sr0")
    assert turn.elements[int(turn.product[s, r])] == "sr1"
    assert turn.product[turn.product[s, r], s] == turn.inverse[r]
    for wrong in ("S9", "X3", "C1", "D2", "S"):
        with pytest.raises(MethodError):
            group(wrong)


# --- measures


def test_pure_logits_of_the_algorithm_are_explained_exactly() -> None:
    made = cyclic(13)
    a, b, c = torch.meshgrid(*[torch.arange(13)] * 3, indexing="ij")
    weights = {2: 3.0, 5: 1.0}
    logits = sum(w * torch.cos(2 * math.pi * k * (a + b - c) / 13) for k, w in weights.items()) * 4
    answer = toys.measure(made, torch.as_tensor(logits), key=0.05)
    shares = dict(zip(answer.tables["irreps"]["irrep"], answer.tables["irreps"]["logits"], strict=True))
    assert shares["k2"] == pytest.approx(9 / 10) and shares["k5"] == pytest.approx(1 / 10)
    assert answer.key == ["k2", "k5"] and answer.facts["explained"] == pytest.approx(1)
    losses = {(row["logits"], row["split"]): row for row in answer.tables["losses"].to_dicts()}
    assert losses["restricted", "train"]["loss"] == pytest.approx(losses["full", "train"]["loss"], rel=1e-4)
    assert losses["excluded", "train"]["loss"] == pytest.approx(math.log(13))
    assert answer.facts["passed"]


@pytest.mark.parametrize("name", ["C7", "D5", "S3", "S4"])
def test_characters_of_the_product_are_found_in_any_group(name: str) -> None:
    made = group(name)
    irrep = made.irreps[-1]
    logits = made.kernel(irrep).double()
    assert kernel_share(made, irrep, logits) == pytest.approx(1)
    assert all(kernel_share(made, other, logits) < 1e-12 for other in made.irreps[1:-1])
    torch.testing.assert_close(restricted(made, [irrep], logits), logits)
    assert float(excluded(made, [irrep], logits).abs().max()) < 1e-9
    said = logits.argmax(dim=-1)
    if irrep.dimension > 1 and name != "C7":  # a faithful representation tells every element from the others
        assert torch.equal(said, made.product) or name == "S4"
    # by definition: the mean over all pairs of one product
    x = int(made.product[1, 2])
    pairs = (made.product == x).nonzero().tolist()
    values = torch.randn(made.order, made.order, 3, dtype=torch.float64)
    torch.testing.assert_close(by_product(made, values)[x], torch.stack([values[a, b] for a, b in pairs]).mean(dim=0))


def test_memorized_logits_lie_along_no_irrep() -> None:
    made = cyclic(13)
    logits = torch.randn(13, 13, 13, generator=torch.Generator().manual_seed(0))
    answer = toys.measure(made, logits)
    assert answer.facts["explained"] < 0.1 and not answer.facts["passed"]
    with pytest.raises(MethodError, match="wrong shape"):
        toys.measure(made, logits[:5])
    with pytest.raises(MethodError, match="no such irrep"):
        toys.measure(made, logits, key=["k9"])


def test_a_neurons_share_is_that_of_its_frequency() -> None:
    made = cyclic(11)
    irreps = made.irreps[1:]
    a, b = torch.meshgrid(torch.arange(11).double(), torch.arange(11).double(), indexing="ij")
    turn = 2 * math.pi / 11

    def wave(k: int, x: torch.Tensor, phase: float = 0.0) -> torch.Tensor:
        return torch.cos(turn * k * x + phase)

    neurons = torch.stack(
        [
            3 + wave(2, a, 0.3) + 2 * wave(2, b, 1.0) + wave(2, a) * wave(2, b, 0.2),  # one frequency
            wave(1, a) + wave(4, b),  # half and half
            wave(1, a) * wave(4, b),  # a product across frequencies is of neither
        ],
        dim=-1,
    )
    shares, variance = neuron_shares(irreps, neurons)
    names = [irrep.name for irrep in irreps]
    assert float(shares[names.index("k2"), 0]) == pytest.approx(1)
    assert float(shares[names.index("k1"), 1]) == pytest.approx(0.5) == float(shares[names.index("k4"), 1])
    assert float(shares[:, 2].max()) < 1e-12
    torch.testing.assert_close(variance, neurons.var(dim=(0, 1), unbiased=False))


def test_addition_written_by_hand_is_measured_as_what_it_is(tmp_path: Path) -> None:
    made = toys.by_hand(31, (2, 7, 12), phases=16)
    facts = made.answer.facts
    assert facts["passed"] and made.answer.key == ["k2", "k7", "k12"]
    # the neurons' factor |cos(pi k (a - b) / p)| leaves (2 / pi)^2 / (1 / 2) of the variance along the pure algorithm
    assert facts["explained"] == pytest.approx(8 / math.pi**2, abs=0.002)
    irreps = made.answer.tables["irreps"].filter(pl.col("key"))
    assert irreps["embedding"].to_list() == pytest.approx([1 / 3] * 3)
    assert irreps["neurons"].to_list() == pytest.approx([1 / 3] * 3)
    # found from the model alone, without being told which
    logits, neurons = table_of(made.model, made.group)
    assert toys.measure(made.group, logits, neurons=neurons).key == made.answer.key
    # one frequency taken away is missed by the answer key's own checks
    with torch.no_grad():
        made.model.hf.embed_tokens.weight[:, 0] = 0
        made.model.hf.embed_tokens.weight[:, 3] = 0
    broken = toys.measure(made.group, table_of(made.model, made.group)[0])
    assert broken.key == ["k7", "k12"]
    assert made.answer.chart().to_dict()
    with pytest.raises(MethodError, match="cannot be written"):
        toys.by_hand(31, (2, 16))


def test_a_saved_toy_is_a_model_with_pairs_and_its_answer(tmp_path: Path) -> None:
    made = toys.by_hand(17, (1, 4, 6))
    folder = made.save(tmp_path / "toy")
    model = hw.load(folder)
    pairs = made.behavior(30)
    assert pairs.bind(model).n == 30
    assert hw.behavior.evaluate(model, pairs, metrics=["accuracy"], canary=False).value("accuracy") == 1.0
    again = toys.load(folder)
    assert again.answer.content_hash == made.answer.content_hash and torch.equal(again.train, made.train)
    assert isinstance(load_result(folder / "answer"), Algebra)
    # the whole answer comes through the one MLP: patching says so too
    effects = hw.localize.patch(model, pairs[:10], sites=["mlp_out"]).to_frame()
    assert effects["effect"].to_list() == pytest.approx([1.0], abs=1e-3)
    (folder / "toy.json").unlink()
    with pytest.raises(StoreError):
        toys.load(folder)


def test_pairs_are_split_with_their_mirrors() -> None:
    mask = split_pairs(cyclic(11), 0.4, 0)
    assert torch.equal(mask, mask.T)
    n = int(mask.triu().sum())
    assert n == round(0.4 * 66) and not torch.equal(mask, split_pairs(cyclic(11), 0.4, 1))


def test_training_lowers_the_loss_and_is_the_same_from_its_seed() -> None:
    options: dict[str, Any] = {
        "share": 0.6,
        "weight_decay": 1.0,
        "steps": 60,
        "every": 20,
        "d_model": 24,
        "n_heads": 2,
        "head_dim": 8,
        "d_mlp": 32,
    }
    one, same = (toys.group_composition("S3", **options) for _ in range(2))
    other = toys.group_composition("S3", **options, seed=1)
    curve = one.answer.tables["curve"]
    assert curve["train_loss"][-1] < 0.5 * curve["train_loss"][0] and curve["step"].to_list() == [20, 40, 60]
    assert one.answer.content_hash == same.answer.content_hash != other.answer.content_hash
    for a, b in zip(one.model.hf.parameters(), same.model.hf.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    with pytest.raises(MethodError, match="positive sizes"):
        AlgebraConfig(share=0.0)


def test_neurons_and_logits_are_the_models_own() -> None:
    made = cyclic(5)
    model = make_model(AlgebraConfig(group="C5", d_model=16, n_heads=2, head_dim=8, d_mlp=12), made, name="x")
    logits, neurons = table_of(model, made)
    run = model.run("3 4 =", capture=["neurons.0"])
    ids = [model.tokenizer.get_vocab()[str(c)] for c in range(5)]
    torch.testing.assert_close(run.logits[0, -1, ids], logits[3, 4])
    torch.testing.assert_close(run["neurons.0"][0, -1], neurons[3, 4])


def test_toys_by_name(tmp_path: Path) -> None:
    assert {"superposition_phases", "superposition_polytopes", "modular_addition", "symmetric"} <= set(
        toys.toys.names()
    )
    assert all(toys.toys.get(name).__doc__ for name in toys.toys.names())
    found = toys.train("symmetric", group="S3", steps=2, every=1, out=tmp_path / "s3")
    assert found.kind == "algebra" and (tmp_path / "s3" / "config.json").is_file()
    with pytest.raises(MethodError, match="unknown toy"):
        toys.train("symetric")


@pytest.mark.slow
def test_modular_addition_is_learned_by_few_frequencies() -> None:
    """About a minute on a quiet core: the published algorithm, found in a trained model."""
    made = toys.modular_addition(43)
    facts = made.answer.facts
    assert facts["passed"] and 2 <= len(made.answer.key) <= 8, facts
    assert facts["explained"] > 0.8 and facts["neurons_explained"] > 0.8, facts
    curve = made.answer.tables["curve"]
    memorized = curve.filter(pl.col("train_accuracy") == 1.0)["step"].min()
    known = curve.filter(pl.col("test_accuracy") > 0.9)["step"].min()
    assert memorized < known  # type: ignore[operator]
