"""The frequency link: measured strengths and exact counts against plain definitions, and planted truths found."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from headwater.claims import Context, run_test
from headwater.core.errors import BehaviorError, MethodError, StoreError
from headwater.core.results import load_result
from headwater.data import lre
from headwater.data.counts import Counts
from headwater.data.link import bins, counts_for, frequency_link, link, points_of, seen
from headwater.data.link_strengths import StrengthConfig, Strengths, relation_strengths, summary
from headwater.data.link_worlds import compare_worlds
from headwater.data.relations import Relation
from headwater.data.world import relations_of, world_of
from headwater.dynamics import TrainConfig, TrainingRun, train

NAMES = ["capital", "largest_city", "state_code"]
SMALL = StrengthConfig(examples=4, validation=8, n_test=12, ranks=(2, 4))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    settings = {
        "model": {"type": "llama", "n_layers": 2, "n_heads": 2, "d_model": 16, "d_mlp": 16},
        "data": [{"source": "world", "options": {"relations": NAMES, "length": 24}}],
        "steps": 40, "batch": 8, "optimizer": {"lr": 0.02}, "checkpoints": {"log": False, "at": [10]}, "threads": 1,
    }  # fmt: skip
    return train(TrainConfig.from_dict(settings), tmp_path_factory.mktemp("world") / "run")


@pytest.fixture(scope="module")
def relations(run: TrainingRun) -> dict[str, Relation]:
    return relations_of(world_of(run).facts)


@pytest.fixture(scope="module")
def strengths(run: TrainingRun, relations: dict[str, Relation]) -> Strengths:
    return relation_strengths(run.path, relations, config=SMALL)


def spans(line: list[str], term: list[str]) -> list[tuple[int, int]]:
    size = len(term)
    return [(i, i + size) for i in range(len(line) - size + 1) if line[i : i + size] == term]


def test_counts_are_those_of_reading_every_line(run: TrainingRun, relations: dict[str, Relation]) -> None:
    counts = counts_for([10, 40], run.path, relations)
    tokenizer = world_of(run).tokenizer
    lines: list[list[str]] = []
    for step in range(10):
        for row in run.order.step(step):
            words = tokenizer.convert_ids_to_tokens(row.tolist())
            line: list[str] = []
            for word in [*words, "\n"]:
                if word == "\n":
                    lines.append(line)
                    line = []
                else:
                    line.append(word)
    frame = counts.by(10)
    for subject, thing, n in frame.select("subject", "object", "n").iter_rows():
        s, o = tokenizer.tokenize(subject), tokenizer.tokenize(thing)
        by_hand = sum(
            any(a[1] <= b[0] or b[1] <= a[0] for a in spans(line, s) for b in spans(line, o)) for line in lines
        )
        assert n == by_hand, (subject, thing)
    assert frame["n"].sum() > 100
    terms = {row["term"]: row["n"] for row in counts.by(10, "terms").to_dicts()}
    assert terms["Texas"] == sum(len(spans(line, ["Texas"])) for line in lines)


def test_what_is_known_is_the_models_own(
    run: TrainingRun, strengths: Strengths, relations: dict[str, Relation]
) -> None:
    model = run.load(40)
    part = strengths.tables["facts"].filter(pl.col("step") == 40, pl.col("relation") == "state_code")
    assert part.height == len(relations["state_code"].samples)
    for row in part.head(10).to_dicts():
        prompt = relations["state_code"].templates[0].format(row["subject"])
        ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])  # type: ignore[misc]
        with torch.no_grad():
            logits = model.hf(ids).logits[0, -1].double()
        first = model.tokenizer(row["object"])["input_ids"][0]  # type: ignore[misc]
        assert row["log_prob"] == pytest.approx(float(logits.log_softmax(-1)[first]), abs=1e-4)
        assert row["right"] == (int(logits.argmax()) == first)


def test_causal_is_that_the_edited_model_says_the_targets_object(
    run: TrainingRun, relations: dict[str, Relation]
) -> None:
    config = StrengthConfig(examples=4, validation=8, n_test=12, ranks=(8,), layers=("embed",))
    found = relation_strengths({40: run.load(40)}, [relations["state_code"]], config=config)
    model, relation = run.load(40), relations["state_code"]
    samples = lre.shuffled(relation.samples, 0)
    weight = lre.fit(model, relation, samples[:4], relation.templates[0], "embed", shown=False).weight
    u, s, vh = torch.linalg.svd(weight)
    inverse = vh[:8].T @ torch.diag(1 / s[:8]) @ u[:, :8].T
    answers = dict(relation.samples)
    embedding = model.hf.get_input_embeddings()

    def asked(subject: str, change: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
        coded = model.tokenizer(relation.templates[0].format(subject), return_offsets_mapping=True)  # type: ignore[misc]
        end = relation.templates[0].index("{}") + len(subject)
        at = [i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < end <= b][-1]
        kept: dict[str, torch.Tensor] = {}

        def put(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            out = output.clone()
            if change is not None:
                out[0, at] += change.to(out.dtype)
            return out

        def keep(_: Any, __: Any, output: Any) -> None:
            kept["z"] = (output if isinstance(output, torch.Tensor) else output[0])[0, -1]

        hooks = [embedding.register_forward_hook(put), model.hf.model.layers[-1].register_forward_hook(keep)]
        try:
            with torch.no_grad():
                said = int(model.hf(torch.tensor([coded["input_ids"]])).logits[0, -1].argmax())
        finally:
            for hook in hooks:
                hook.remove()
        return kept["z"].double(), said

    def first(text: str) -> int:
        return int(model.tokenizer(text)["input_ids"][0])  # type: ignore[misc]

    rows = found.judged().to_dicts()
    assert len(rows) == 12 and all(answers[row["target"]] != row["object"] for row in rows)
    for row in rows:
        z, said = asked(row["subject"])
        goal, said_of_goal = asked(row["target"])
        _, edited = asked(row["subject"], inverse @ (goal - z))
        wanted = first(answers[row["target"]])
        assert row["causal"] == (edited == wanted and said != wanted)
        assert row["said"] == (edited == said_of_goal)


def test_facts_are_fitted_on_chosen_on_or_judged_on(strengths: Strengths) -> None:
    facts = strengths.tables["facts"].filter(pl.col("step") == 40)
    roles = facts.group_by("relation", "role").len()
    sizes = {(row["relation"], row["role"]): row["len"] for row in roles.to_dicts()}
    assert all(
        (sizes[name, "train"], sizes[name, "validation"], sizes[name, "test"]) == (4, 8, 12)
        for name in strengths.facts["relations"]
    )
    judged = strengths.judged()
    assert judged["causal"].is_not_null().all() and judged.height == 3 * 3 * 12
    assert facts.filter(pl.col("role") != "test")["causal"].is_null().all()
    rows = strengths.tables["relations"]
    one = rows.filter(pl.col("step") == 40, pl.col("relation") == "capital", pl.col("subjects") == "all").row(
        0, named=True
    )
    mine = judged.filter(pl.col("step") == 40, pl.col("relation") == "capital")
    assert one["n"] == 12 and one["causality"] == pytest.approx(mine["causal"].mean())
    assert one["accuracy"] == pytest.approx(mine["right"].mean()) and one["lo"] <= one["causality"] <= one["hi"]
    assert summary(strengths.tables["facts"]).equals(rows)


def test_an_untrained_model_has_no_causality_but_much_that_looks_like_it(strengths: Strengths) -> None:
    start = strengths.tables["relations"].filter(pl.col("step") == 0, pl.col("subjects") == "all")
    assert start["causality"].max() == 0
    assert start["faithfulness"].mean() > 0.3 and start["said_causality"].mean() > 0.3  # type: ignore[operator]


def test_killed_measurements_go_on(
    run: TrainingRun, relations: dict[str, Relation], strengths: Strengths, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from headwater.data import link_strengths

    real, calls = link_strengths._measure, list[str]()

    def dies(*args: Any) -> Any:
        if len(calls) == 4:  # in the middle of the second checkpoint
            raise KeyboardInterrupt
        calls.append("")
        return real(*args)

    monkeypatch.setattr(link_strengths, "_measure", dies)
    with pytest.raises(KeyboardInterrupt):
        relation_strengths(run.path, relations, out=tmp_path / "s", config=SMALL)
    # a kill while the very first file was written leaves its beginning
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / ".strengths.json.tmp-0123456789ab").write_text("{")
    with pytest.raises(KeyboardInterrupt):
        relation_strengths(run.path, relations, out=tmp_path / "first", config=SMALL)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="something else"):
        relation_strengths(run.path, relations, out=tmp_path / "other", config=SMALL)
    assert (tmp_path / "s" / "step-0.parquet").exists() and not (tmp_path / "s" / "step-10.parquet").exists()
    calls.clear()
    calls.append("never dies")
    monkeypatch.setattr(link_strengths, "_measure", lambda *args: (calls.append(""), real(*args))[1])
    again = relation_strengths(run.path, relations, out=tmp_path / "s", config=SMALL)
    assert len(calls) == 1 + 2 * 3  # the first checkpoint is not measured again
    assert again.content_hash == strengths.content_hash
    with pytest.raises(StoreError, match="other settings"):
        relation_strengths(run.path, relations, out=tmp_path / "s", examples=5, n_test=5, ranks=(2,))


def test_link_of_a_run_is_whole_and_goes_on(run: TrainingRun, relations: dict[str, Relation], tmp_path: Path) -> None:
    found = link(run.path, relations, out=tmp_path / "link", strengths=SMALL)
    assert found.facts["steps"] == [0, 10, 40] and found.facts["relations"] == NAMES
    assert load_result(tmp_path / "link" / "link").content_hash == found.content_hash
    assert link(run.path, relations, out=tmp_path / "link", strengths=SMALL).content_hash == found.content_hash
    flagged = found.tables["overlaps"].filter(pl.col("flagged"))
    assert {(row["relation"], row["other"]) for row in flagged.to_dicts()} == {
        ("capital", "largest_city"), ("largest_city", "capital"),
    }  # fmt: skip
    assert flagged["share"].min() > 0.7  # type: ignore[operator]
    # a pair that both say is met in the lines of both
    assert all(
        row["n_shared"] >= row["n_own"] for row in flagged.filter(pl.col("relation") == "largest_city").to_dicts()
    )
    assert found.chart().to_dict()


def planted(
    slope: float = 1.0, *, relations: int = 8, facts: int = 20, seed: int = 0, noise: float = 0.05
) -> tuple[Strengths, Counts]:
    """Relations that differ in frequency, with strengths that rise with the pairs' own counts."""
    random = np.random.default_rng(seed)
    steps, rows, pairs, terms = [0, 10, 100], [], [], []
    for r in range(relations):
        for f in range(facts):
            subject, thing = f"s{r}.{f}", f"o{r}.{f}"
            each = {0: 0, 10: int(10 ** random.uniform(0, 1) * 2 ** (r / 2)), 100: 0}
            each[100] = each[10] * 10
            previous = 0
            alone = int(10 ** random.uniform(0, 3))
            for first, last in ((0, 10), (10, 100)):
                n = each[last] - previous
                previous = each[last]
                span = {"first": first, "last": last}
                pairs.append({"subject": subject, "object": thing, **span, "n": n, "documents": n})
                for term in (subject, thing):
                    terms.append({"term": term, **span, "n": n + alone, "documents": n})
            for step in steps:
                x = math.log10(1 + each[step])
                chance = 1 / (1 + math.exp(-4 * slope * (x - 1.5)))
                causal = bool(random.random() < chance)
                rows.append({
                    "step": step, "relation": f"r{r}", "subject": subject, "object": thing, "role": "test",
                    "tokens": 1 + f % 2, "right": bool(random.random() < chance),
                    "log_prob": -5 + slope * x + noise * random.normal(), "faithful": bool(random.random() < 0.5),
                    "target": subject, "causal": causal, "said": True,
                })  # fmt: skip
    table = pl.DataFrame(rows)
    made = Strengths(
        tables={"relations": summary(table), "facts": table},
        facts={"steps": steps, "relations": [f"r{r}" for r in range(relations)]},
    )
    return made, Counts(
        tables={"pairs": pl.DataFrame(pairs), "terms": pl.DataFrame(terms)}, facts={"scope": "document"}
    )


def test_planted_frequency_is_found() -> None:
    strengths, counts = planted()
    found = frequency_link(strengths, counts, draws=200)
    assert found.value().value > 0.9 and found.value().lo > 0.8
    points = found.tables["points"].filter(pl.col("subjects") == "all")
    assert found.value().value == pytest.approx(np.corrcoef(points["pair"], points["causality"])[0, 1])
    last = points.filter(pl.col("step") == 100)
    assert found.value(steps="last").value == pytest.approx(np.corrcoef(last["pair"], last["causality"])[0, 1])
    assert found.value(counts="subject").value < found.value().value
    row = found.tables["correlations"].filter(
        pl.col("strength") == "causality", pl.col("counts") == "subject", pl.col("steps") == "all",
        pl.col("subjects") == "all",
    )  # fmt: skip
    assert row["less"][0] == pytest.approx(found.value().value - found.value(counts="subject").value)
    half = (
        found.tables["thresholds"].filter(pl.col("strength") == "causality", pl.col("level") == 0.5).row(0, named=True)
    )
    assert half["within"] and half["n"] == pytest.approx(10**1.5, rel=0.35) and half["lo"] < half["n"] < half["hi"]
    near = {row["predictor"]: row["within"] for row in found.tables["predictions"].to_dicts() if row["steps"] == "all"}
    error = {row["predictor"]: row["error"] for row in found.tables["predictions"].to_dicts() if row["steps"] == "all"}
    assert near["log_prob"] > 0.95 and error["log_prob"] < 0.5 * error["accuracy"] < error["mean"]
    assert found.facts["flagged"] == [] and found.tables["overlaps"].height == 0
    table = found.tables["facts"]
    assert table["n"].sum() == 160 and table["accuracy"][-1] > table["accuracy"][0]  # type: ignore[operator]


def test_strengths_that_do_not_follow_frequency_have_no_threshold() -> None:
    strengths, counts = planted(-1.0)
    found = frequency_link(strengths, counts, draws=100)
    assert found.value().value < -0.8
    rows = found.tables["thresholds"].to_dicts()
    assert all(math.isnan(row["n"]) and not row["within"] for row in rows)


def test_points_are_means_of_the_logs_over_the_judged() -> None:
    strengths, counts = planted(facts=6)
    facts = seen(strengths, counts)
    by = {(row["subject"], row["object"]): row["n"] for row in counts.by(10).to_dicts()}
    own = facts.filter(pl.col("step") == 10, pl.col("relation") == "r3")
    assert own["n_pair"].to_list() == [by[row["subject"], row["object"]] for row in own.to_dicts()]
    assert facts.filter(pl.col("step") == 0)["n_pair"].sum() == 0
    point = points_of(facts).filter(
        pl.col("step") == 10, pl.col("relation") == "r3", pl.col("subjects") == "several"
    ).row(0, named=True)  # fmt: skip
    several = own.filter(pl.col("tokens") > 1)
    assert point["n"] == 3 and point["pair"] == pytest.approx(np.log10(1 + several["n_pair"].to_numpy()).mean())
    whole = bins(facts.filter(pl.col("step") == 100))
    assert whole["n"].sum() == 48 and (whole["low"] < whole["high"]).all()


def test_facts_that_another_relation_says_are_flagged_and_left_out() -> None:
    strengths, counts = planted()
    facts = strengths.tables["facts"].with_columns(
        # r1 says most of what r0 says, the other way round
        subject=pl.when((pl.col("relation") == "r1") & ~pl.col("subject").str.ends_with("19"))
        .then(pl.col("object").str.replace("o1", "o0")).otherwise("subject"),
        object=pl.when((pl.col("relation") == "r1") & ~pl.col("subject").str.ends_with("19"))
        .then(pl.col("subject").str.replace("s1", "s0")).otherwise("object"),
    )  # fmt: skip
    pairs = counts.tables["pairs"]
    turned = pairs.rename({"subject": "object", "object": "subject"}).filter(pl.col("object").str.starts_with("s0"))
    both = Counts(
        tables={"pairs": pl.concat([pairs, turned.select(pairs.columns)]), "terms": counts.tables["terms"]}, facts={}
    )
    strengths.tables["facts"] = facts
    found = frequency_link(strengths, both, draws=50)
    flagged = found.tables["overlaps"].filter(pl.col("flagged"))
    assert {(row["relation"], row["other"], row["shared"]) for row in flagged.to_dicts()} == {
        ("r0", "r1", 19), ("r1", "r0", 19),
    }  # fmt: skip
    own = found.tables["correlations"].filter(pl.col("facts") == "own", pl.col("steps") == "last")
    assert own["relations"].to_list() == [6] * own.height  # of r0 and r1 too few facts are left
    assert found.facts["flagged"] == ["r0 / r1", "r1 / r0"]


def test_the_twin_world_tells_cause_from_correlation() -> None:
    one, counts = planted()
    other, others = planted(seed=1)
    # the second world's frequencies are dealt out in the other order: r0 is the most frequent
    swap = {f"{kind}{r}.{f}": f"{kind}{7 - r}.{f}" for kind in "so" for r in range(8) for f in range(20)}
    facts = other.tables["facts"].with_columns(
        pl.col("subject", "object").replace_strict(swap),
        relation=pl.col("relation").replace_strict({f"r{r}": f"r{7 - r}" for r in range(8)}),
    )
    twin = Strengths(tables={"relations": summary(facts), "facts": facts}, facts=one.facts)
    tables = {
        "pairs": others.tables["pairs"].with_columns(pl.col("subject", "object").replace_strict(swap)),
        "terms": others.tables["terms"].with_columns(pl.col("term").replace_strict(swap)),
    }
    found = compare_worlds(one, counts, twin, Counts(tables=tables, facts={}), draws=200)
    changes = found.tables["changes"].filter(pl.col("step") == 100)
    assert found.facts["r"] == pytest.approx(np.corrcoef(changes["pair"], changes["causality"])[0, 1])
    assert found.facts["r"] > 0.9 and found.facts["p"] < 0.02
    rows = {(row["level"], row["strength"], row["steps"]): row for row in found.tables["correlations"].to_dicts()}
    assert rows["fact", "log_prob", "last"]["r"] > 0.95 and rows["fact", "log_prob", "last"]["p"] < 0.02
    outcome = run_test("counterfactual_pretraining", Context(worlds=found), {"reference": 0.5})
    assert outcome.effect == found.facts["r"] and outcome.reference == 0.5 and not outcome.why_not
    assert found.chart().to_dict()
    claim = found.ledger()["do-data-frequency"]
    assert claim.status == "supported" and claim.effect == found.facts["r"] and claim.stage == "data"
    # a mechanism that does not follow its frequency: the strengths of the same world, the counts of the other
    deaf = compare_worlds(one, counts, one, Counts(tables=tables, facts={}), draws=200)
    assert math.isnan(deaf.facts["r"])
    with pytest.raises(MethodError, match="other facts or steps"):
        compare_worlds(one, counts, planted(facts=19)[0], counts)


def test_mistakes_are_named(run: TrainingRun, relations: dict[str, Relation]) -> None:
    strengths, counts = planted(relations=2)
    with pytest.raises(MethodError, match="three relations"):
        frequency_link(strengths, counts)
    strengths, counts = planted()
    with pytest.raises(MethodError, match="unknown option"):
        frequency_link(strengths, counts, lewels=(0.5,))
    with pytest.raises(MethodError, match="not counted"):
        frequency_link(strengths, planted(facts=19)[1])
    with pytest.raises(MethodError, match="not cut at this step"):
        short = Counts(tables={k: t.filter(pl.col("last") == 10) for k, t in counts.tables.items()}, facts={})
        frequency_link(strengths, short)
    with pytest.raises(MethodError, match="no such counts"):
        frequency_link(strengths, counts, draws=10).value(counts="pears")
    with pytest.raises(MethodError, match="after step 0"):
        counts_for([0], run.path, relations)
    with pytest.raises(BehaviorError, match="too small"):
        relation_strengths(run.path, [relations["state_code"]], examples=48)
    with pytest.raises(StoreError, match="no such checkpoints"):
        relation_strengths(run.path, relations, steps=[7])
    for wrong in ({"examples": 1}, {"ranks": (0,)}):
        with pytest.raises(MethodError):
            StrengthConfig(**wrong)  # type: ignore[arg-type]
