import numpy as np
import pytest
import torch

from headwater.claims import matched_sets, random_weights
from headwater.core.errors import ClaimError


def test_matched_sets_keep_size_and_profile():
    strata = np.repeat([0, 1, 2], [4, 6, 2])
    chosen = [0, 1, 5, 11]
    draws = list(matched_sets(strata, chosen, 200, seed=1))
    for draw in draws:
        assert len(set(draw.tolist())) == 4
        assert np.bincount(strata[draw], minlength=3).tolist() == [2, 1, 1]
    counts = np.bincount(np.concatenate(draws), minlength=12)
    assert (np.abs(counts[:4] - 100) < 40).all() and (np.abs(counts[4:10] - 33) < 25).all()  # uniform within a stratum
    again = list(matched_sets(strata, chosen, 200, seed=1))
    assert all((a == b).all() for a, b in zip(draws, again, strict=True))


def test_matched_sets_apart_leave_the_chosen_out_where_they_can():
    strata = [0, 0, 0, 0, 1, 1]
    for draw in matched_sets(strata, [0, 1, 4, 5], 20, apart=True):
        assert draw.tolist() == [2, 3, 4, 5]  # stratum 1 has no others
    assert next(iter(matched_sets(strata, [], 1))).size == 0
    with pytest.raises(ClaimError, match="outside"):
        next(iter(matched_sets(strata, [6], 1)))


def test_random_weights_is_another_model_of_the_same_shape(tiny_model):
    state = torch.random.get_rng_state()
    before = {name: value.clone() for name, value in tiny_model.hf.state_dict().items()}
    one, same, other = (random_weights(tiny_model, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in tiny_model.hf.state_dict().items())
    name = "model.layers.1.self_attn.q_proj.weight"
    weights = [m.hf.state_dict()[name] for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], before[name]) and weights[0].shape == before[name].shape
    assert one.n_layers == tiny_model.n_layers and one.tokenizer is tiny_model.tokenizer
    assert one.fingerprint != tiny_model.fingerprint and not one.hf.training
