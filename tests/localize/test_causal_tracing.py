"""Causal tracing equals the protocol run plainly: noise the subject, give one state back, read the probability."""

from pathlib import Path
from typing import Any

import pytest
import torch

import headwater as hw
from headwater.behavior.known import known_facts
from headwater.behavior.metrics import metric
from headwater.core.errors import BehaviorError, MethodError
from headwater.localize.engine.passes import Engine, make_batches
from headwater.localize.engine.planning import plan
from headwater.localize.patching.causal_trace import GROUPS, token_groups
from headwater.localize.patching.corruption import Noise, with_starts

KNOWN = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "known" / "known_1000.json"


def facts(n: int = 2) -> Any:
    names = [("Mary John", "Tom"), ("John Mary", "Ann"), ("Tom Mary John", "Mary"), ("Mary Tom John", "Ann")]
    rows = [
        {
            "prompt": f"When {a} went to the store, they gave a drink to",
            "counterfactual": f"When {' '.join(reversed(a.split()))} went to the store, they gave a drink to",
            "answer": f" {b}",
            "foil": " milk",
            "positions": {"subject": [5, 5 + len(a)]},
            "split": "train",
        }
        for a, b in names[:n]
    ]
    return hw.Behavior.from_rows(rows, name="names")


def test_effects_are_those_of_the_plain_protocol(tiny_model64: Any) -> None:
    model, behavior, samples, window = tiny_model64, facts(4), 2, 2
    result = hw.localize.causal_trace(model, behavior, samples=samples, window=window, seed=3)
    engine = Engine(model)
    noise = Noise(at="subject[:]", samples=samples, deviation=result.facts["noise_deviation"], seed=3)
    prob, per_fact = metric("prob"), {}
    embedding = model.hf.get_input_embeddings()
    seen_ids = []
    for batch in make_batches(with_starts(behavior, ["subject"]).bind(model), 10_000):
        drawn = noise.draw(engine, batch)
        ids = batch.clean.repeat_interleave(samples, dim=0)
        answers, foils = (x.repeat_interleave(samples, dim=0) for x in (batch.answers, batch.foils))
        clean = model.run(ids, capture=["resid_post.*", "mlp_out.*", "attn_out.*"])
        seen_ids += [batch.clean[i, s : e + 1] for i, (s, e) in enumerate(
            zip(batch.positions["subject[0]"].tolist(), batch.positions["subject"].tolist(), strict=True))]  # fmt: skip

        def noised(
            *changes: Any, ids: Any = ids, drawn: Any = drawn, answers: Any = answers, foils: Any = foils
        ) -> Any:
            handle = embedding.register_forward_hook(lambda m, a, y: y + drawn.to(y))
            try:
                logits = model.run(ids, interventions=changes, logits="last").logits
            finally:
                handle.remove()
            return prob(logits, answers, foils).view(-1, samples).mean(dim=1)

        length = batch.clean.shape[1]
        for kind, layer in (("resid_post", 0), ("resid_post", 2), ("mlp_out", 1), ("attn_out", 2)):
            layers = (
                [layer] if kind == "resid_post" else range(max(0, layer - window // 2), min(3, layer + window // 2))
            )
            at = [
                noised(*[hw.resample(f"{kind}.{one}@{p}", clean[f"{kind}.{one}"][:, p]) for one in layers]) - noised()
                for p in range(length)
            ]
            for i, row in enumerate(batch.rows):
                places = token_groups(length, int(batch.positions["subject[0]"][i]), int(batch.positions["subject"][i]))
                for group, own in places.items():
                    per_fact.setdefault((kind, layer, group), {})[row] = sum(float(at[p][i]) for p in own) / len(own)
    table = result.to_frame()
    assert set(table["group"]) == set(GROUPS)
    for (kind, layer, group), own in per_fact.items():
        row = table.filter(kind=kind, layer=layer, group=group).row(0, named=True)
        assert row["effect"] == pytest.approx(sum(own.values()) / len(own), rel=1e-7, abs=1e-12), (kind, layer, group)
        assert row["n"] == len(own)
        assert row["lo"] <= row["effect"] <= row["hi"]
        assert row["share"] == pytest.approx(row["effect"] / result.facts["total"])
    whole = table.filter(kind="resid_post", layer=2, group="last").row(0, named=True)
    assert whole["effect"] == pytest.approx(result.facts["total"])  # the last state is all that the answer is read from
    vectors = embedding(torch.cat(seen_ids)).detach()
    assert result.facts["noise_deviation"] == pytest.approx(3 * float(vectors.std()))
    assert plan("causal_trace", model, behavior, samples=samples, window=window).counts() == result.facts["ran"]


def test_tokens_fall_into_groups() -> None:
    assert token_groups(9, 1, 4) == {
        "first subject": [1], "middle subject": [2, 3], "last subject": [4], "first after": [5], "further": [6, 7],
        "last": [8],
    }  # fmt: skip
    assert token_groups(3, 0, 0) == {"last subject": [0], "first after": [1], "last": [2]}
    assert token_groups(3, 0, 1) == {"first subject": [0], "last subject": [1], "last": [2]}
    for length, start, end in ((9, 1, 4), (3, 0, 0), (12, 5, 6)):
        places = [p for own in token_groups(length, start, end).values() for p in own]
        assert sorted(places) == list(range(start, length))  # each token from the subject on, once


def test_it_saves_draws_and_refuses(tiny_model: Any, tmp_path: Path) -> None:
    result = hw.localize.causal_trace(tiny_model, facts(), samples=1, window=1, kinds=["mlp_out"])
    loaded = hw.load_result(result.save(tmp_path / "trace"))
    assert loaded.content_hash == result.content_hash
    assert "vconcat" in str(loaded.chart().to_dict()) or "mark" in loaded.chart().to_dict()
    paths = hw.localize.path_patch(tiny_model, facts(), senders="heads", receivers=["a2.*<q>"], apart=True)
    assert "mark" in paths.chart().to_dict()
    with pytest.raises(MethodError, match="span"):
        hw.localize.causal_trace(tiny_model, hw.behavior("ioi", n=4, seed=0))
    for wrong in ({"kinds": ["pattern"]}, {"window": 0}, {"samples": 0}, {"noise": -1.0}, {"metric": "loss"}):
        with pytest.raises(MethodError):
            hw.localize.causal_trace(tiny_model, facts(), **wrong)


def test_known_facts_from_a_file(tmp_path: Path) -> None:
    import json

    known = [
        (4, "Beats Music", "Apple", "Beats Music is owned by", "P1"),
        (5, "Audible.com", "Amazon", "The site Audible.com is owned by", "P1"),
        (6, "Vinson Massif", "Antarctica", "Vinson Massif lies in", "P3"),
    ]
    keys = ("known_id", "subject", "attribute", "prompt", "relation_id")
    rows = [dict(zip(keys, fact, strict=True)) for fact in known]
    file = tmp_path / "known.json"
    file.write_text(json.dumps(rows))
    behavior = known_facts(file)
    assert behavior.n == 3
    second = behavior.frame.filter(id="5").row(0, named=True)
    assert second["counterfactual"] == "The site Beats Music is owned by"
    assert second["foils"] == [" Apple"]
    assert json.loads(second["positions"]) == {"subject": [9, 20]}
    assert behavior.hash == known_facts(file).hash
    assert known_facts(file, n=2, seed=1).n == 2
    for bad in ("[]", "{}", "[{}]", "nothing", json.dumps([{"subject": "x", "attribute": "y", "prompt": "z"}])):
        file.write_text(bad)
        with pytest.raises(BehaviorError):
            known_facts(file)


@pytest.mark.skipif(not KNOWN.exists(), reason="the authors' facts are not beside this checkout")
def test_the_authors_facts_are_read() -> None:
    behavior = known_facts(KNOWN, n=60)
    assert behavior.n == 60
    assert behavior.slices == ["relation"]
    spans = [hw.behavior.files.as_json(text)["subject"] for text in behavior.frame["positions"]]
    variables = [hw.behavior.files.as_json(text) for text in behavior.frame["variables"]]
    for prompt, span, values in zip(behavior.prompts, spans, variables, strict=True):
        assert prompt[slice(*span)] == values["subject"]
