"""Heads that follow named patterns and relations: against a loop over prompts, and a head that is made to."""

import pytest
import torch

import headwater as hw
from headwater import behavior as behaviors
from headwater.core.errors import MethodError
from headwater.core.interventions import replace
from headwater.dynamics.lab.patterns import pattern_named
from headwater.dynamics.measures import Probe, measures
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

IDS = torch.randint(50, (6, 14), generator=torch.Generator().manual_seed(0)).repeat(1, 2)[:, :20]


def numbers(probe: Probe, **settings: str) -> dict[str, float]:
    return {row["name"]: row["value"] for row in measures.get("attention_structure")(probe, **settings)}


def test_patterns_by_a_loop() -> None:
    model = hw.load(tiny_gpt2(), tokenizer=tiny_tokenizer())
    found = numbers(Probe(model, 0, ids=IDS), patterns="back:2,induction,first_token")
    run = model.run(IDS, capture="pattern.*", logits="none")
    for name in ("back:2", "induction", "first_token"):
        wanted, scores = pattern_named(name)(IDS), []
        for layer in range(3):
            for head in range(4):
                hits = []
                for b in range(6):
                    for t in range(20):
                        places = set(wanted[b, t].nonzero().flatten().tolist())
                        if places and len(places) < t + 1:
                            hits.append(int(run[f"pattern.{layer}"][b, head, t].argmax()) in places)
                scores.append(sum(hits) / len(hits))
        assert found[f"{name} best"] == pytest.approx(max(scores))
        assert found[f"{name} heads"] == pytest.approx(sum(score >= 0.5 for score in scores) / 12)


def test_a_head_that_is_made_to_follow() -> None:
    model = hw.load(tiny_gpt2(), tokenizer=tiny_tokenizer())
    before = numbers(Probe(model, 0, ids=IDS), patterns="back:3")
    made = pattern_named("back:3")(IDS).clone()
    made[:, :3, 0] = 1
    with model.intervene(replace("pattern.1.h2", made)):
        after = numbers(Probe(model, 0, ids=IDS), patterns="back:3")
    assert before["back:3 best"] < 0.9 and after["back:3 best"] == 1.0
    assert after["back:3 heads"] >= 1 / 12


def test_relations_by_a_loop() -> None:
    model = hw.load(tiny_llama(), tokenizer=tiny_tokenizer())
    pairs = behaviors.make("ioi", n=12)
    groups = pairs.bind(model).groups
    names = sorted(groups[0].positions)
    relation = f"{names[0]}->{names[1]},END->{names[-1]}"
    found = numbers(Probe(model, 0, behavior=pairs), patterns="", relations=relation)
    best = []
    for text in relation.split(","):
        source, target = text.split("->")
        hits = torch.zeros(3, 4)
        n = 0
        for group in groups:
            run = model.run(group.clean, capture="pattern.*", logits="none")
            for b in range(len(group.clean)):
                n += 1
                for layer in range(3):
                    row = run[f"pattern.{layer}"][b, :, int(group.positions[source][b])]
                    hits[layer] += (row.argmax(dim=-1) == group.positions[target][b]).float()
        best.append(float(hits.max() / n))
        assert found[f"{text} best"] == pytest.approx(best[-1])
    assert found["relations mean"] == pytest.approx(sum(best) / 2)


def test_what_is_no_structure_is_refused() -> None:
    model = hw.load(tiny_llama(), tokenizer=tiny_tokenizer())
    probe = Probe(model, 0, behavior=behaviors.make("ioi", n=4), ids=IDS)
    for settings, said in (
        ({"patterns": "", "relations": ""}, "needs patterns or relations"),
        ({"patterns": "sideways"}, "unknown attention pattern"),
        ({"relations": "END to S2"}, "no relation"),
        ({"relations": "END->NOWHERE"}, "no position NOWHERE"),
    ):
        with pytest.raises(MethodError, match=said):
            numbers(probe, **settings)
