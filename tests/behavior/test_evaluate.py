"""Evaluation against a plain forward pass, prompt by prompt; the canary on models that know and do not know."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import headwater as hw
from headwater.behavior import generators
from headwater.behavior.canary import canary, verdict
from headwater.behavior.evaluate import BehaviorReport, evaluate
from headwater.behavior.table import Behavior
from headwater.core.errors import BehaviorError, MethodError
from headwater.core.results import load_result


class Rule:
    """A stand-in for a model: its next token is what a rule says of the text; every other token has logit 0."""

    name, fingerprint, max_length = "rule", "0", None

    def __init__(self, tokenizer: Any, rule: Any) -> None:
        self.tokenizer, self.rule = tokenizer, rule

    def run(self, inputs: Any, **_keywords: Any) -> Any:
        rows = [row.tolist() if isinstance(row, torch.Tensor) else row for row in inputs]
        logits = torch.zeros(len(rows), len(self.tokenizer))
        for at, row in enumerate(rows):
            text = self.tokenizer.decode(row)
            said = self.rule(text)
            if said:
                whole = self.tokenizer(text + said)["input_ids"]
                assert whole[: len(row)] == row
                logits[at, whole[len(row)]] = 5.0
        return type("Run", (), {"logits": logits})()


def test_rows_are_those_of_a_plain_forward(tiny_model: Any) -> None:
    behavior = hw.behavior("ioi", n=16)
    report = evaluate(tiny_model, behavior, metrics=("logit_diff", "prob_diff", "accuracy", "rank", "kl"), canary=False)
    rows = report.rows.to_dicts()
    assert [row["id"] for row in rows] == behavior.frame["id"].to_list()
    tokenizer, hf = tiny_model.tokenizer, tiny_model.hf
    with torch.no_grad():
        for row in rows:
            logits, then = (
                hf(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].double()
                for text in (row["prompt"], row["counterfactual"])
            )
            answer, foil = tokenizer(row["answer"])["input_ids"][0], tokenizer(row["foil"])["input_ids"][0]
            p, q = logits.log_softmax(-1), then.log_softmax(-1)
            assert row["logit_diff"] == pytest.approx((logits[answer] - logits[foil]).item(), abs=1e-4)
            assert row["cf_logit_diff"] == pytest.approx((then[answer] - then[foil]).item(), abs=1e-4)
            assert row["prob_diff"] == pytest.approx((p[answer].exp() - p[foil].exp()).item(), abs=1e-5)
            assert row["kl"] == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-4)
            assert row["correct"] == bool(logits[answer] > logits[foil])
            assert row["rank"] == (logits > logits[answer]).sum().item()
            assert row["said"] == tokenizer.decode([logits.argmax().item()])


def test_parts_change_nothing(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    behavior = hw.behavior("ioi", n=20)
    before = evaluate(tiny_model, behavior, canary_rows=5)
    monkeypatch.setattr(sys.modules["headwater.behavior.evaluate"], "AT_ONCE", 3)
    monkeypatch.setattr(sys.modules["headwater.behavior.canary"], "_AT_ONCE", 3)
    after = evaluate(tiny_model, behavior, canary_rows=5)
    assert after.canary.equals(before.canary)
    for name in ("logit_diff", "prob_diff", "rank", "cf_logit_diff"):
        assert after.rows[name].to_list() == pytest.approx(before.rows[name].to_list(), abs=1e-5)


def test_summary_is_of_the_rows(tiny_model: Any) -> None:
    report = evaluate(tiny_model, hw.behavior("agreement", n=40), canary=False)
    rows = report.rows
    metrics = report.tables["metrics"]
    assert metrics.columns == ["metric", "slice_name", "slice", "value", "lo", "hi", "n"]
    for name, slice_name, key, value, lo, hi, n in metrics.rows():
        part = rows if slice_name == "all" else rows.filter(pl.col(slice_name) == key)
        column = part[{"accuracy": "correct"}.get(name, name)].cast(pl.Float64)
        assert n == part.height
        assert value == pytest.approx(column.mean())
        assert lo <= value <= hi
    for slice_name in ("split", "template", "number", "noun_agrees"):
        found = metrics.filter((pl.col("slice_name") == slice_name) & (pl.col("metric") == "accuracy"))
        assert set(found["slice"]) == set(rows[slice_name])
        assert found["n"].sum() == rows.height
    assert report.value("logit_diff") == pytest.approx(rows["logit_diff"].mean())
    assert report.interval("accuracy")[0] == rows["correct"].mean()
    with pytest.raises(MethodError, match=r"not measured.*'kl'.*accuracy"):
        report.value("kl")
    assert report.facts["n"] + report.facts["n_dropped"] == 40
    assert report.dropped.height == report.facts["n_dropped"] > 0
    assert report.facts["chance"] == 0.5
    assert "canary" not in report.tables


def test_saved_and_loaded(tiny_model: Any, tmp_path: Path) -> None:
    report = evaluate(tiny_model, hw.behavior("capitals", n=12), canary_rows=6, seed=3)
    again = load_result(report.save(tmp_path / "report"), check=True)
    assert isinstance(again, BehaviorReport)
    assert again.rows.equals(report.rows)
    assert again.canary.equals(report.canary)
    assert again.facts == report.facts
    assert again.provenance.behavior == hw.behavior("capitals", n=12).hash
    assert (
        evaluate(tiny_model, hw.behavior("capitals", n=12), canary_rows=6, seed=3).content_hash == report.content_hash
    )


def test_pairs_without_foils(tiny_model: Any) -> None:
    rows = [
        {"prompt": "The dog", "counterfactual": "The cat", "answer": " is"},
        {"prompt": "The fox", "counterfactual": "The pig", "answer": " is", "foil": " are"},
    ]
    report = evaluate(tiny_model, Behavior.from_rows(rows))
    first, second = report.rows.to_dicts()
    assert math.isnan(first["logit_diff"])
    assert not math.isnan(second["logit_diff"])
    assert first["prob_diff"] > 0
    assert report.tables["metrics"].filter(pl.col("metric") == "logit_diff")["n"].to_list()[0] == 1
    none = evaluate(tiny_model, Behavior.from_rows(rows[:1]))
    assert "logit_diff" not in none.tables["metrics"]["metric"].to_list()
    assert none.facts["chance"] is None
    assert none.canary.height == 0
    assert none.facts["canary"]["verdict"].startswith("no pair of this behavior")


def test_unknown_metric_and_no_pair_left(tiny_model: Any) -> None:
    with pytest.raises(MethodError, match=r"unknown metric.*'logitdiff'.*logit_diff"):
        evaluate(tiny_model, hw.behavior("ioi", n=4), metrics=("logitdiff",))
    long = Behavior.from_rows([{"prompt": "dog " * 300 + "is", "counterfactual": "cat " * 300 + "is", "answer": " a"}])
    with pytest.raises(BehaviorError, match=r"too long for the model \(1\)"):
        evaluate(tiny_model, long)


def test_interventions_are_seen(tiny_model: Any) -> None:
    behavior = hw.behavior("ioi", n=8)
    before = evaluate(tiny_model, behavior, canary=False).rows["logit_diff"].to_list()
    with tiny_model.intervene(hw.zero("mlp_out.1@S2")):
        within = evaluate(tiny_model, behavior, canary=False).rows["logit_diff"].to_list()
    after = evaluate(tiny_model, behavior, canary=False).rows["logit_diff"].to_list()
    assert within != before == after


# --- the canary ---


@pytest.fixture(scope="module")
def facts_behavior() -> Behavior:
    return hw.behavior("capitals", n=40)


def knowing(behavior: Behavior) -> dict[str, str]:
    return {prompt: answers[0] for prompt, answers in zip(behavior.prompts, behavior.frame["answers"], strict=True)}


def told_in(text: str) -> str | None:
    found = re.match(r"The answer is (.*)\.\n", text)
    return found[1] if found else None


def options_in(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\((.)\) (.*)$", text, flags=re.M))


def cells(table: pl.DataFrame) -> dict[tuple[str, str], float]:
    main = table.filter(~pl.col("condition").str.contains(","))
    return {
        (form, condition): accuracy
        for form, condition, accuracy in main.select("format", "condition", "accuracy").rows()
    }


def test_canary_of_four_kinds_of_model(gpt2: Any, facts_behavior: Behavior) -> None:
    known = knowing(facts_behavior)

    def answer_to(text: str) -> str | None:
        question = re.sub(r"^The answer is .*\.\n", "", text).split(" ...\n")[0]
        return known.get(question)

    def rule(knows: bool, has_format: bool) -> Any:
        def says(text: str) -> str | None:
            wanted = (answer_to(text) or "").strip() if knows else told_in(text)
            offered = options_in(text)
            if offered:
                labels = (
                    [label for label, option in offered.items() if option == wanted] if has_format else list(offered)
                )
                return labels[0] if labels else None
            return f" {wanted}" if wanted else None

        return says

    wanted = {
        (True, True): (1.0, 1.0, 1.0, 1.0, True, True),
        (True, False): (1.0, 1.0, None, None, True, False),
        (False, True): (0.0, 1.0, 0.0, 1.0, False, True),
        (False, False): (0.0, 1.0, None, None, False, False),
    }
    for (knows, has_format), (asked, told, choice_asked, choice_told, answer, format_known) in wanted.items():
        table = canary(Rule(gpt2, rule(knows, has_format)), facts_behavior, rows=40)  # type: ignore[arg-type]
        found = cells(table)
        assert found["cloze", "asked"] == asked
        assert found["cloze", "told"] == told
        if choice_asked is None:
            # always the first option: right as often as the answer stands there
            assert found["multiple choice", "told"] == pytest.approx(0.5)
        else:
            assert found["multiple choice", "asked"] == choice_asked
            assert found["multiple choice", "told"] == choice_told
        says = verdict(table)
        assert (says["answer"], says["format"]) == (answer, format_known), (knows, has_format)
        assert says["verdict"]


def test_canary_meets_labels_and_places_alike(gpt2: Any, facts_behavior: Behavior) -> None:
    seen: list[str] = []

    def first_option(text: str) -> str | None:
        seen.append(text)
        offered = options_in(text)
        return next(iter(offered), None)

    table = canary(Rule(gpt2, first_option), facts_behavior, rows=40)  # type: ignore[arg-type]
    by = {row["condition"]: row for row in table.to_dicts() if row["format"] == "multiple choice"}
    assert by["asked, right at 1"]["accuracy"] == 1.0
    assert by["asked, right at 2"]["accuracy"] == 0.0
    assert {by[f"told, labels {labels}"]["n"] for labels in ("A-D", "C-F", "W-Z", "1-4")} == {10}
    assert {row["chance"] for row in by.values()} == {0.5}
    assert all(row["lo"] <= row["accuracy"] <= row["hi"] for row in table.to_dicts())
    asked = [text for text in seen if options_in(text) and not told_in(text)]
    told = [text for text in seen if options_in(text) and told_in(text)]
    # told is asked with the answer before it, and nothing else
    assert sorted(re.sub(r"^The answer is .*\.\n", "", text) for text in told) == sorted(asked)
    assert len(asked) == 40


def test_canary_with_more_options(gpt2: Any) -> None:
    made = hw.behavior("greater_than", n=24)
    always_first: Any = Rule(gpt2, lambda text: next(iter(options_in(text)), None))
    table = canary(always_first, made, rows=24, choices=4)
    choice = table.filter((pl.col("format") == "multiple choice") & (pl.col("condition") == "asked"))
    assert choice["chance"].to_list() == [0.25]
    assert table.filter(pl.col("condition").str.starts_with("told, right at"))["condition"].n_unique() == 4


def test_canary_leaves_multiple_choice_alone(gpt2: Any) -> None:
    only_choice = hw.behavior("colors", n=16, format="choice")
    table = canary(Rule(gpt2, lambda text: None), only_choice)  # type: ignore[arg-type]
    assert table.height == 0
    assert verdict(table)["answer"] is None
    with pytest.raises(BehaviorError, match="from 2 to 4"):
        canary(Rule(gpt2, lambda text: None), only_choice, choices=1)  # type: ignore[arg-type]


# --- the example file ---

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "my_pairs.csv"


def test_the_example_file_is_good(tiny: Any, gpt2: Any) -> None:
    for tokenizer in (tiny, gpt2):
        assert hw.behavior.check(EXAMPLE, tokenizer).height == 0  # type: ignore[operator]
    bound = hw.behavior(EXAMPLE).bind(gpt2)  # type: ignore[operator]
    assert bound.n == 32
    assert sorted(bound.positions) == ["END", "name"]
    for group in bound.groups:
        for at, index in enumerate(group.rows):
            # the one token that the counterfactual changes is the name
            differs = (group.clean[at] != group.corrupt[at]).nonzero().flatten().tolist()
            assert differs == [group.positions["name"][at].item()], bound.behavior.prompts[index]


# --- the real model ---


@pytest.mark.real_model
def test_known_accuracies_of_smollm2(smollm2: Any) -> None:
    """Published measurements: IOI about 4.4 (accuracy .94), agreement 1.00 and .95, and the format of multiple choice
    not known."""
    ioi = evaluate(smollm2, hw.behavior("ioi", n=24), canary_rows=12)
    assert ioi.facts["n"] == 24
    assert 3.5 < ioi.value("logit_diff") < 6.5
    assert ioi.value("accuracy") >= 0.9
    assert ioi.value("cf_logit_diff") < -3.0
    assert (ioi.facts["canary"]["answer"], ioi.facts["canary"]["format"]) == (True, False)
    agreement = evaluate(smollm2, hw.behavior("agreement", n=30), canary=False)
    assert agreement.value("accuracy") >= 0.95
    copying = evaluate(smollm2, hw.behavior("colors", n=20, format="cloze"), canary=False)
    assert copying.value("accuracy") >= 0.85


@pytest.mark.real_model
def test_smollm2_keeps_most_pairs(smollm2: Any) -> None:
    for name in generators.BUILT_IN:
        behavior = hw.behavior(name)
        assert behavior.bind(smollm2).n >= 0.85 * behavior.n, name
    assert hw.behavior("capitals").bind(smollm2).n >= 120
