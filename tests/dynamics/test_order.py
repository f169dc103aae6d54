"""The data order: a pure function of the seed, equal to what its words say."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.core.errors import MethodError
from headwater.dynamics.lab import order as orders
from headwater.dynamics.lab.order import BLOCK, Order, Permutation, Stream, key


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**62))
def test_a_permutation_is_one(n: int, key_: int) -> None:
    places = Permutation(n, key_)(np.arange(n))
    assert np.array_equal(np.sort(places), np.arange(n))


def test_a_looked_up_permutation_is_the_walked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = Permutation(1000, 5)
    monkeypatch.setattr(orders, "_TABLE", 10)
    walked = Permutation(1000, 5)
    assert walked._table is None and looked_up._table is not None
    assert np.array_equal(walked(np.arange(1000)), looked_up(np.arange(1000)))


def test_permutations_look_random() -> None:
    """Every place goes everywhere equally often (chi squared), and neighbours do not stay together."""
    n, draws = 7, 7000
    table = np.zeros((n, n))
    for draw in range(draws):
        table[np.arange(n), Permutation(n, key(0, draw))(np.arange(n))] += 1
    expected = draws / n
    assert ((table - expected) ** 2 / expected).sum() < 75  # 36 degrees of freedom: p = .0001 at 76
    long = Permutation(10_000, 1)(np.arange(10_000))
    assert abs(np.corrcoef(long[:-1], long[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(long, np.arange(10_000))[0, 1]) < 0.05


def test_a_known_order_stays_what_it_is() -> None:
    """Runs that are on disk are rebuilt by later versions: these numbers may never change."""
    assert key(0, "order") == 3247283209826649275
    assert Permutation(10, 42)(np.arange(10)).tolist() == [4, 6, 2, 3, 7, 9, 0, 1, 8, 5]
    one = Order([Stream(source=0, n=5, weight=1.0)], seed=7)
    assert one.samples(0, 10)[1].tolist() == [2, 3, 1, 4, 0, 3, 2, 4, 1, 0]


def test_any_stretch_is_the_same_as_within_the_whole() -> None:
    streams = [Stream(source=0, n=50, weight=1.0), Stream(source=1, n=7, weight=0.3), Stream(source=2, n=9, weight=2.0)]
    whole = Order(streams, seed=3).samples(0, 10_000)
    for first, last in ((0, 1), (17, 60), (4090, 4100), (9_990, 10_000)):
        part = Order(streams, seed=3).samples(first, last)
        assert np.array_equal(part[0], whole[0][first:last]) and np.array_equal(part[1], whole[1][first:last])
    other = Order(streams, seed=4).samples(0, 10_000)
    assert not np.array_equal(other[1], whole[1])


def test_every_epoch_holds_everything_once_in_another_order() -> None:
    order = Order([Stream(source=0, n=100, weight=1.0)], seed=0)
    epochs = [order.samples(100 * e, 100 * (e + 1))[1].tolist() for e in range(5)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    straight = Order([Stream(source=0, n=100, weight=1.0, shuffle=False)], seed=0)
    assert straight.samples(95, 105)[1].tolist() == [95, 96, 97, 98, 99, 0, 1, 2, 3, 4]


def test_shares_are_exact_in_every_block() -> None:
    streams = [Stream(source=i, n=10_000, weight=w) for i, w in enumerate((0.5, 0.25, 0.25))]
    order = Order(streams, seed=1)
    for block in (0, 3):
        source, _ = order.samples(block * BLOCK, (block + 1) * BLOCK)
        assert Counter(source.tolist()) == {0: BLOCK // 2, 1: BLOCK // 4, 2: BLOCK // 4}
    source, sequence = order.samples(0, 3 * BLOCK)
    mine = sequence[source == 1]
    assert len(set(mine.tolist())) == len(mine)  # no sequence twice within an epoch
    assert abs(float((source[:200] == 0).mean()) - 0.5) < 0.12  # scattered, not one source after the other


def test_a_repeated_part_is_apart_from_the_rest() -> None:
    streams = [
        Stream(source=0, n=10, weight=0.25, part=(0, 10), total=1000),
        Stream(source=0, n=990, weight=0.75, part=(10, 1000), total=1000),
    ]
    order = Order(streams, seed=5)
    _, sequence = order.samples(0, BLOCK)
    counts = Counter(sequence.tolist())
    often = {one for one, n in counts.items() if n > 20}
    assert len(often) == 10 and sum(counts[one] for one in often) == BLOCK // 4
    assert set(counts) - often <= set(range(1000)) - often
    assert often != set(range(10))  # chosen by the seed, not the first ones


def test_refusals() -> None:
    for wrong in ([], [Stream(source=0, n=5, weight=0.0)], [Stream(source=0, n=5, weight=float("nan"))]):
        with pytest.raises(MethodError):
            Order(wrong, seed=0)
    with pytest.raises(MethodError, match="counted from 0"):
        Order([Stream(source=0, n=5, weight=1.0)], seed=0).samples(-1, 2)
    with pytest.raises(MethodError, match="at least one"):
        Permutation(0, 1)
