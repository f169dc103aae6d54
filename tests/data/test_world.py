"""The world: real facts, known frequencies, and a twin with other ones."""

from collections import Counter
from typing import Any

import numpy as np
import polars as pl
import pytest

from headwater.behavior.generators import capitals
from headwater.core.errors import MethodError
from headwater.data.world import KINDS, World, facts, relation_names, relations_of, world, world_of
from headwater.dynamics.lab.sources import sources

SMALL: dict[str, Any] = {"relations": ["capital", "state_code"], "length": 24}


def test_facts_are_real_and_enough() -> None:
    frame = facts()
    assert frame.columns == ["relation", "subject", "object", "rank", "share"]
    assert len(relation_names()) >= 13 and len(frame) >= 3000
    assert frame["share"].sum() == pytest.approx(1)
    assert not frame.select("relation", "subject").is_duplicated().any()
    said = {(r, s): o for r, s, o in frame.select("relation", "subject", "object").iter_rows()}
    assert said["capital", "South Korea"] == "Seoul" and said["largest_city", "Australia"] == "Sydney"
    assert said["city_country", "Osaka"] == "Japan" and said["state_code", "Texas"] == "TX"


def test_shares_follow_zipf_within_and_between_relations() -> None:
    frame = facts(["capital", "language"], exponent=1.5, spread=2.0)
    totals = frame.group_by("relation", maintain_order=True).agg(pl.col("share").sum())["share"].to_list()
    assert totals[0] / totals[1] == pytest.approx(4)
    part = frame.filter(pl.col("relation") == "capital").sort("rank")
    assert part["rank"].to_list() == list(range(1, len(part) + 1))
    assert part["share"][0] / part["share"][8] == pytest.approx(9**1.5)


def test_the_twin_has_the_same_facts_and_frequencies_dealt_out_otherwise() -> None:
    one, other = facts(), facts(permute=1)
    assert one.select("relation", "subject", "object").equals(other.select("relation", "subject", "object"))
    assert sorted(one["rank"].to_list()) == sorted(other["rank"].to_list())
    city = [frame.filter(pl.col("relation") == "city_country")["rank"].to_numpy() for frame in (one, other)]
    assert abs(np.corrcoef(*city)[0, 1]) < 0.1
    assert not facts(permute=2)["share"].equals(other["share"]) and facts(permute=1).equals(other)
    assert not facts(seed=1)["rank"].equals(one["rank"])


def test_capitals_are_asked_as_the_world_says_them() -> None:
    assert KINDS["capital"].templates == tuple(t.replace("{country}", "{}") for t in capitals.TEMPLATES)
    own = facts(["capital"])
    assert {(s, o) for s, o in own.select("subject", "object").iter_rows()} == {
        (country, city) for country, (city, _) in capitals.facts().items()
    }
    tokenizer = world(relations=["capital"]).tokenizer
    for country, (city, _) in capitals.facts().items():
        for template in capitals.TEMPLATES:
            assert tokenizer.unk_token_id not in tokenizer(f"{template.format(country=country)} {city}")["input_ids"]


def test_subjects_have_one_and_several_tokens() -> None:
    one = world()
    sizes = Counter(len(one.tokenizer(subject)["input_ids"]) > 1 for subject in facts()["subject"].unique().to_list())
    assert sizes[True] > 200 and sizes[False] > 500


def test_a_sequence_is_a_function_of_seed_and_number() -> None:
    one, again, other = world(**SMALL), world(**SMALL), world(**SMALL, seed=1)
    assert isinstance(one, World) and one.sequence_length == 24
    rows = one.batch(np.arange(20))
    assert rows.shape == (20, 24) and (rows[7] == again.tokens(7)).all() and (rows >= 0).all()
    assert rows.max() < one.vocabulary == len(one.words)
    assert (other.batch(np.arange(20)) != rows).any()


def test_what_is_stated_stands_in_the_text() -> None:
    source = world(**SMALL, filler=0.4)
    seen = 0
    for index in range(40):
        lines = [line.removesuffix(" .").strip() for line in source.text(index).split("\n")]
        for number in source.stated(index):
            row = source.facts.row(number, named=True)
            texts = [f"{one.format(row['subject'])} {row['object']}" for one in KINDS[row["relation"]].templates]
            wanted = [" ".join(source.tokenizer.tokenize(text)) for text in texts]
            assert any(line.startswith(tuple(wanted)) for line in lines)
            seen += 1
    assert seen > 40


def test_facts_come_as_often_as_they_should() -> None:
    one = world(**SMALL, filler=0.0)
    counts = Counter(number for index in range(1500) for number in one.stated(index))
    share = one.facts["share"].to_numpy()
    found = np.array([counts[i] for i in range(len(share))]) / sum(counts.values())
    # a line that a sequence's end cuts is not counted, and longer lines are cut more often
    assert np.corrcoef(share, found)[0, 1] > 0.99
    assert found[share.argmax()] == pytest.approx(share.max(), rel=0.15)


def test_filler_is_the_same_in_the_twin() -> None:
    one, twin = world(**SMALL, filler=0.5), world(**SMALL, filler=0.5, permute=3)
    first, second = (
        Counter(line for i in range(30) for line in source.text(i).split("\n") if "article" in line)
        for source in (one, twin)
    )
    assert first and sum((first & second).values()) > 0.6 * sum(first.values())


def test_relations_for_linear_maps() -> None:
    found = relations_of(facts(["capital", "region"]))
    assert list(found) == ["capital", "region"]
    assert ("France", "Paris") in found["capital"].samples
    own = relations_of(pl.DataFrame({"relation": ["x", "x"], "subject": ["a", "b"], "object": ["c", "d"]}))
    assert own["x"].templates == ("{}",)


@pytest.mark.parametrize(
    "options",
    [
        {"relations": ["capitol"]},
        {"relations": []},
        {"relations": ["capital", "capital"]},
        {"exponent": -1.0},
        {"length": 1},
        {"sequences": 0},
        {"filler": 1.0},
        {"stop": 2.0},
    ],
)
def test_mistakes_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        sources.get("world")(**options)


def test_a_run_knows_its_world(tmp_path: Any) -> None:
    from headwater.dynamics import TrainConfig, train

    settings = {
        "model": {"type": "llama", "n_layers": 1, "n_heads": 1, "d_model": 8, "d_mlp": 8},
        "steps": 2, "batch": 4, "checkpoints": {"log": False}, "threads": 1,
    }  # fmt: skip
    run = train(TrainConfig.from_dict({**settings, "data": [{"source": "world", "options": SMALL}]}), tmp_path / "a")
    one = world_of(run)
    assert one.facts.equals(facts(SMALL["relations"]))
    model = run.load()
    assert model.tokenizer is not None and model.tokenizer.get_vocab() == one.tokenizer.get_vocab()
    text = "The capital of South Korea is Seoul\nThe capital"
    assert [int(i) for i in model.tokens(text)[0]] == one.tokenizer(text)["input_ids"]
    assert len(model.tokens(text)[0]) == 10
    other = train(TrainConfig.from_dict({**settings, "data": [{"source": "induction"}]}), tmp_path / "b")
    with pytest.raises(MethodError, match="not trained on a world"):
        world_of(other)
