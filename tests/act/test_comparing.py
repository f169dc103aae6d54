"""Comparisons: each cell is what its measure says by itself, tables follow from cells, the verdict from tables."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

import headwater as hw
from headwater.act.action import Goal
from headwater.act.catalog import act
from headwater.act.comparing import comparison, cues, facts
from headwater.act.comparing.baselines import ALWAYS, BASELINES, NOTHING, RANDOM, random_targets
from headwater.act.comparing.comparison import ActComparison, compare, over_seeds, read
from headwater.act.comparing.measures import Bench, harmonic
from headwater.act.comparing.task import Task, of_behavior, tasks
from headwater.act.comparing.verdict import verdict
from headwater.act.measuring import NOTHING as MEASURED
from headwater.act.measuring import plain_texts, score, text_loss
from headwater.behavior.generators.capitals import facts as capitals_of
from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError
from headwater.core.results import load_result

SMALL: dict[str, Any] = {"steps": 8, "batch": 4, "relearn": (1, 3), "relearn_lr": 1e-2, "n_others": 4, "text_tokens": 8}
COUNTRIES = [
    "France", "Germany", "Italy", "Spain", "Portugal", "Poland", "Austria", "Greece", "Norway", "Sweden", "Japan",
    "China", "Egypt", "Peru", "Chile", "Kenya", "Cuba", "Iran", "Iraq", "Turkey", "Canada", "Russia", "Finland",
    "Denmark",
]  # fmt: skip


@pytest.fixture
def knowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model is taken to know these capitals."""
    there = [one for one in COUNTRIES if one in facts.facts()]
    assert len(there) > 18
    monkeypatch.setattr(facts, "known_countries", lambda model: there)


@pytest.fixture(scope="module")
def capitals() -> Behavior:
    return hw.behavior("capitals", n=16, seed=0)


def test_every_row_is_there_and_is_what_its_measure_says(tiny_model: Any, knowing: None, tmp_path: Path) -> None:
    options = {"n": 3, "keep": 3, "neighbours": 4, "known": 4}
    actions = {"tuned": "finetune:lr=1e-2", "broken": ("rome", {"layer": 99})}
    found = compare(
        tiny_model, "fact_edit", actions, options=options, seeds=2, lora={"lr": 2e-2}, out=tmp_path / "out",
        mechanism=True, **SMALL,
    )  # fmt: skip
    cells = found.tables["cells"]
    assert cells["action"].unique(maintain_order=True).to_list() == [*ALWAYS, "tuned", "broken"]
    task = tasks.get("fact_edit")(tiny_model, seed=1, **options)
    made = act("finetune", tiny_model, task.behavior, lr=1e-2, steps=8, batch=4, seed=1, goal="raise", keep=task.keep)

    def value(action: str, measure: str, seed: int = 1) -> Any:
        where = (pl.col("action") == action) & (pl.col("measure") == measure) & (pl.col("seed") == seed)
        return cells.filter(where)["value"].item()

    shares = []
    for role, measure in (("target", "efficacy"), ("paraphrase", "paraphrase"), ("neighbour", "neighbours")):
        bound = task.measured()[role].bind(tiny_model)
        shares.append(score(tiny_model, bound, made, ["accuracy"])["accuracy"].mean())
        assert value("tuned", measure) == pytest.approx(shares[-1])
    shares.append(value("tuned", "format"))
    assert value("tuned", "score") == pytest.approx(stats.hmean(shares) if min(shares) > 0 else 0.0)
    alone, whole = (text_loss(tiny_model, plain_texts(), one, tokens=8).mean() for one in (made, MEASURED))
    assert value("tuned", "perplexity") == pytest.approx(np.exp(alone - whole))
    assert value("tuned", "weights") == made.edit.n_weights(tiny_model)
    assert value("tuned", "prompts to find") == made.passes
    assert value(NOTHING, "perplexity") == 1.0 and value(NOTHING, "weights") == 0
    lacking = cells.filter(pl.col("value").is_null()).iter_rows(named=True)
    notes = {(one["action"], one["measure"]): one["note"] for one in lacking}
    assert "no layer 99" in notes["broken", "score"] and "no weights" in notes["prompt", "after relearning"]
    assert set(found.tables["curves"]["action"]) == {"lora", RANDOM, "tuned"}
    assert value("tuned", "mechanism") is not None and value("tuned", "at random") is not None
    # the tables follow from the cells
    summary = found.tables["summary"].filter((pl.col("action") == "tuned") & (pl.col("measure") == "perplexity"))
    one = summary.row(0, named=True)
    both = [value("tuned", "perplexity", seed) for seed in (0, 1)]
    low, high = stats.t.interval(0.95, 1, np.mean(both), stats.sem(both))
    assert (one["value"], one["lo"], one["hi"]) == pytest.approx((np.mean(both), max(0.0, low), high))
    versus = found.tables["versus"].filter((pl.col("baseline") == "lora") & (pl.col("measure") == "score"))
    gaps = [value("tuned", "score", seed) - value("lora", "score", seed) for seed in (0, 1)]
    assert versus.filter(pl.col("action") == "tuned")["difference"].item() == pytest.approx(np.mean(gaps))
    assert found.verdict.startswith("fact_edit, over 2 seeds")
    found.save(tmp_path / "result")
    again = load_result(tmp_path / "result")
    assert isinstance(again, ActComparison) and again.verdict == found.verdict and "svg" in again._repr_html_()


def test_killed_it_goes_on_with_the_next_cell(
    tiny_model: Any, capitals: Behavior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(tiny_model, capitals, ["ascent:lr=1e-3"], seeds=1, **SMALL)
    ran: list[str] = []
    cell = comparison._Seed.cell

    def stopping(self: Any, name: str, what: Any) -> Any:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(name)
        return cell(self, name, what)

    monkeypatch.setattr(comparison._Seed, "cell", stopping)
    for expected in (list(ALWAYS[:3]), [*ALWAYS[3:], "ascent:lr=1e-3"]):
        ran.clear()
        try:
            again = compare(tiny_model, capitals, ["ascent:lr=1e-3"], seeds=1, out=tmp_path, **SMALL)
        except KeyboardInterrupt:
            again = None
        assert ran == expected
    assert again is not None

    def told(result: ActComparison) -> list[Any]:
        return result.tables["cells"].filter(pl.col("measure") != "seconds").rows()

    assert told(again) == told(whole)
    ran.clear()
    other = {**SMALL, "steps": 9, "relearn": ()}
    with pytest.raises(KeyboardInterrupt):  # other settings are other cells
        compare(tiny_model, capitals, ["ascent:lr=1e-3"], seeds=1, out=tmp_path, **other)
    assert ran == list(ALWAYS[:3])


def test_a_cell_is_that_of_its_code_and_its_task(
    tiny_model: Any, capitals: Behavior, knowing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def cell(self: Any, name: str, what: Any) -> dict[str, Any]:
        ran.append(name)
        return {"goal": str(self.task.goal), "facts": {}, "values": {"score": 0.5}, "notes": {}, "curve": []}

    monkeypatch.setattr(comparison._Seed, "cell", cell)

    def run(task: Any = capitals, *actions: Any, **more: Any) -> list[str]:
        ran.clear()
        compare(tiny_model, task, list(actions), seeds=1, out=tmp_path, **{**SMALL, **more})
        return list(ran)

    assert run() == list(ALWAYS) and run() == []
    with monkeypatch.context() as changed:
        changed.setattr(comparison, "code_of", lambda *packages: "other code")
        assert run() == list(ALWAYS)
    assert run() == []
    # a task is all that it holds: its goal, what is kept, what is known, what a prompt may say
    task: Task = tasks.get("fact_edit")(tiny_model, seed=0, n=3)
    assert run(task) == list(ALWAYS) and run(task) == []
    other_parts = {"goal": Goal(direction="lower"), "keep": None, "known": task.keep, "old": None}
    for name, value in {**other_parts, "instructions": ("Say it.",)}.items():
        assert run(dataclasses.replace(task, **{name: value})) == list(ALWAYS), name
    assert run(capitals, options={"goal": "lower"}) == list(ALWAYS)
    other = Behavior(capitals.frame, name="capitals", metric="prob_diff")
    assert other.hash == capitals.hash and run(other) == list(ALWAYS)
    # a function is its code, not its name
    made = {text: eval(f"lambda model, task, seed: {text}") for text in ("1", "2")}
    assert run(capitals, made["1"]) == ["<lambda>"] and run(capitals, made["1"]) == []
    assert run(capitals, made["2"]) == ["<lambda>"]


def test_what_was_compared_is_told_without_addresses(tiny_model: Any, capitals: Behavior) -> None:
    def of_mine(model: Any, task: Task, seed: int) -> Any:
        raise MethodError("cannot be made")

    actions = {"mine": of_mine, "weak": ("ascent", {"lr": 1e-3}), "named": "dpo:beta=0.2"}
    found = compare(tiny_model, capitals, actions, seeds=1, lora={"rank": 2}, **{**SMALL, "relearn": ()})
    assert found.facts["actions"] == {
        "mine": "a function, of_mine", "weak": "ascent:lr=0.001", "named": "dpo:beta=0.2"
    }  # fmt: skip
    assert found.facts["lora"] == {"rank": 2}


def test_a_score_is_of_all_that_the_task_has(tiny_model: Any, knowing: None) -> None:
    task: Task = tasks.get("fact_edit")(tiny_model, seed=0, n=3)
    bench = Bench(tiny_model, task, [], [], 4, 8, 0)
    lost = bench.bound["paraphrase"]
    share = bench._share
    bench._share = lambda bound, *rest: "no pair is left" if bound is lost else share(bound, *rest)  # type: ignore[method-assign]
    found = bench.measure(MEASURED, steps=(), attack={}, latent=False)
    assert found["paraphrase"] == "no pair is left" and isinstance(found["efficacy"], float)
    assert found["score"] == "not all of it was measured: paraphrase"


def test_random_targets_are_not_the_wanted_ones(tiny_model: Any, knowing: None) -> None:
    task = tasks.get("fact_edit")(tiny_model, seed=0, n=5)
    right = dict(zip(task.behavior.train.prompts, task.behavior.train.frame["answers"].to_list(), strict=True))
    drawn = random_targets(task, 0)
    for row in drawn.frame.to_dicts():
        assert row["answers"] != right[row["prompt"]] and row["answers"][0] not in row["foils"]
    low = tasks.get("fact_unlearn")(tiny_model, seed=0, n=5)
    others = random_targets(low, 0)
    assert others.n == min(5, low.known.n) and not set(others.prompts) & set(low.behavior.prompts)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["fact_edit", "fact_unlearn"])
def test_parts_of_a_task_on_facts_share_no_country(tiny_model: Any, knowing: None, name: str) -> None:
    task: Task = tasks.get(name)(tiny_model, seed=3, n=4, keep=4, neighbours=5, known=4)
    asked = {
        role: {json.loads(text)["country"] for text in one.frame["variables"]}
        for role, one in {**task.measured(), "keep": task.keep, "known": task.known}.items()
        if one is not None
    }
    assert asked["target"] == asked["paraphrase"] == asked["format"]
    for role in ("neighbour", "keep", "known"):
        for other in set(asked) - {role}:
            assert not asked[role] & asked[other]
    assert set(task.behavior.train.prompts) == set(task.behavior.test.prompts)
    assert not set(task.paraphrase.prompts) & set(task.behavior.prompts)  # type: ignore[union-attr]
    again: Task = tasks.get(name)(tiny_model, seed=3, n=4, keep=4, neighbours=5, known=4)
    assert again.behavior.hash == task.behavior.hash
    assert tasks.get(name)(tiny_model, seed=4, n=4).behavior.hash != task.behavior.hash
    rows = task.behavior.frame.to_dicts()
    assert all(not set(row["answers"]) & set(row["foils"]) for row in rows)
    true = facts.facts()
    side = "foils" if name == "fact_edit" else "answers"
    assert all(row[side][0] == f" {true[json.loads(row['variables'])['country']][0]}" for row in rows)


def test_a_neighbour_is_never_asked_to_beat_its_own_capital(tiny_model: Any, knowing: None) -> None:
    met = 0
    for seed in range(40):
        task: Task = tasks.get("fact_edit")(tiny_model, seed=seed, n=3, keep=3, neighbours=9, known=3)
        new = set(task.facts["edits"].values())  # type: ignore[attr-defined]
        for part in (task.neighbour, task.keep):
            assert part is not None
            for row in part.frame.to_dicts():
                met += row["answers"][0].strip() in new
                assert row["foils"] and row["foils"][0] != row["answers"][0]
    assert met  # some neighbours' own capitals are what others were given


def test_capitals_that_a_tokenizer_lacks_are_told(
    tiny_model: Any, knowing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "lacks_words", lambda model, text: True)
    with pytest.raises(MethodError, match="no other capital"):
        tasks.get("fact_edit")(tiny_model, seed=0, n=3)


def test_a_task_on_the_order_of_options_is_balanced_and_parted(tiny_model: Any, knowing: None) -> None:
    sizes = {"n": 8, "measured": 6, "keep": 2, "choices": 3}
    task: Task = tasks.get("position_bias")(tiny_model, seed=0, **sizes)
    assert task.paraphrase is not None and task.format is not None and task.neighbour is not None
    assert task.keep is not None and task.old is not None
    train, test = task.behavior.train, task.behavior.test
    assert (train.n, test.n, task.paraphrase.n, task.format.n) == (8, 6, 12, 6)
    for part in (test, task.paraphrase, task.format):
        assert len(set(Counter(part.frame["place"]).values())) == 1
    for row in pl.concat([train.frame, test.frame]).to_dicts():
        shown = row["prompt"].split("Options: ")[1].split("\n")[0].split(", ")
        answer, place = row["answers"][0].strip(), int(row["place"])
        country = json.loads(row["variables"])["country"]
        assert shown[place - 1] == answer == capitals_of()[country][0]
        assert [f" {one}" for one in shown if one != answer] == row["foils"]
        other = row["counterfactual"].split("Options: ")[1].split("\n")[0].split(", ")
        assert sorted(other) == sorted(shown) and other[place - 1] != answer
    countries = {role: set(part.frame["prompt"]) for role, part in (("train", train), ("test", test))}
    of = [{json.loads(text)["country"] for text in part.frame["variables"]} for part in (train, test)]
    assert not of[0] & of[1] and not countries["train"] & countries["test"]
    assert not set(task.keep.prompts) & set(task.neighbour.prompts)
    for row in task.old.frame.to_dicts():  # what the attack trains on is the option that stands first
        assert row["foils"][0].strip() == row["prompt"].split("Options: ")[1].split(", ")[0]
    assert {json.loads(text)["country"] for text in task.old.frame["variables"]} == of[1]
    with pytest.raises(MethodError, match="knows too few capitals"):
        tasks.get("position_bias")(tiny_model, seed=0, n=400)
    with pytest.raises(MethodError, match="each place"):
        tasks.get("position_bias")(tiny_model, seed=0, n=2)


def test_a_task_on_a_cue_has_it_in_training_and_against_it_in_tests(tiny_model: Any) -> None:
    task: Task = tasks.get("spurious_cue")(tiny_model, seed=0, n=16, share=0.75, measured=6)
    assert task.paraphrase is not None and task.format is not None and task.neighbour is not None
    assert Counter(task.behavior.train.frame["cue"]) == {"with": 12, "against": 4}
    assert [len(one.frame) for one in task.measured().values()] == [6, 6, 6, 6]
    said = {"train": set[str](), "test": set[str]()}
    whole = [task.behavior, task.paraphrase, task.format, task.neighbour]
    for row in pl.concat([one.frame for one in whole], how="diagonal").to_dicts():
        words = row["prompt"].replace(".", "").split()
        (word,) = {*words} & {*cues.PRAISE, *cues.BLAME}
        said[row["split"]].add(word)
        (code,) = {*words} & {*cues.CUES}
        good = word in cues.PRAISE
        assert row["answers"] == [" A" if good else " B"] and row["foils"] == [" B" if good else " A"]
        assert (row["cue"] == "with") == ((code == "red") == good)
        (other,) = {*row["counterfactual"].replace(".", "").split()} & {*cues.PRAISE, *cues.BLAME}
        assert (other in cues.PRAISE) != good and code in row["counterfactual"]
    assert not said["train"] & said["test"]
    assert {row["cue"] for row in task.neighbour.frame.to_dicts()} == {"with"}
    assert {row["cue"] for row in task.behavior.test.frame.to_dicts()} == {"against"}
    swapped: Task = tasks.get("spurious_cue")(tiny_model, seed=0, n=16, share=0.75, measured=6, swap=True)
    assert [row["answers"] for row in swapped.behavior.frame.to_dicts()] == [
        row["foils"] for row in task.behavior.frame.to_dicts()
    ]
    for misfit in ({"n": 3}, {"share": 1.0}, {"share": 0.0}, {"measured": 1}):
        with pytest.raises(MethodError, match="most training pairs"):
            tasks.get("spurious_cue")(tiny_model, seed=0, **misfit)


def test_a_task_on_letters_is_balanced_and_parted(tiny_model: Any) -> None:
    task: Task = tasks.get("choice_letters")(tiny_model, seed=0, n=16, measured=8)
    for part in (task.behavior.train, task.behavior.test, task.paraphrase, task.format):
        assert part is not None
        counts = part.frame["place"].value_counts()["count"]
        assert counts.n_unique() == 1 and len(counts) == 4
    assert task.behavior.train.n == task.behavior.test.n == 16
    assert task.paraphrase is not None and task.format is not None
    assert set(task.behavior.frame["template"]) == {"choice-0"}
    assert "choice-0" not in set(task.paraphrase.frame["template"])
    assert not set(task.format.frame["labels"]) & set(task.behavior.frame["labels"])
    assert task.keep is not None and task.neighbour is not None and task.keep.n == task.neighbour.n == 8
    assert not set(task.keep.prompts) & set(task.neighbour.prompts)  # nothing that is trained on is measured
    with pytest.raises(MethodError):
        tasks.get("choice_letters")(tiny_model, seed=0, n=2)


def test_known_countries_are_those_said_in_every_wording(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(model: Any, bound: Any, action: Any, metrics: Any) -> pl.DataFrame:
        rows = bound.frame.to_dicts()
        right = [not ("France" in row["prompt"] and row["prompt"].startswith("In ")) for row in rows]
        right = [yes and "Italy" not in row["prompt"] for yes, row in zip(right, rows, strict=True)]
        return pl.DataFrame({"id": [row["id"] for row in rows], "accuracy": [float(yes) for yes in right]})

    monkeypatch.setattr(facts, "score", said)
    monkeypatch.setattr(facts, "_known", {})
    found = facts.known_countries(tiny_model)
    assert "Germany" in found and "France" not in found and "Italy" not in found
    assert "Guatemala" not in found  # its capital tells its own name
    monkeypatch.setattr(facts, "score", None)
    assert facts.known_countries(tiny_model) == found  # asked once


def test_over_seeds() -> None:
    assert over_seeds([], share=True) == (None, None, None, 0)
    assert over_seeds([0.5], share=True) == (0.5, None, None, 1)
    assert over_seeds([1.0, 1.0, 1.0], share=True) == (1.0, 1.0, 1.0, 3)
    values = [0.2, 0.9, 0.7]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert over_seeds(values, share=False) == (pytest.approx(0.6), pytest.approx(low), pytest.approx(high), 3)
    assert over_seeds(values, share=True)[1:3] == (0.0, 1.0)


def test_harmonic() -> None:
    assert harmonic([0.5, 1.0]) == pytest.approx(2 / 3) and harmonic([0.0, 1.0]) == 0.0 and harmonic([]) == 0.0


def tables(scores: dict[str, float], half: float, **more: dict[str, float]) -> tuple[pl.DataFrame, pl.DataFrame]:
    def kind(name: str) -> str:
        return "control" if name in (NOTHING, RANDOM) else "baseline" if name in BASELINES else "action"

    summary = [
        {"action": action, "kind": kind(action), "measure": measure, "value": value, "lo": value - half,
         "hi": value + half, "n": 3, "note": ""}
        for measure, held in {"score": scores, **more}.items()
        for action, value in held.items()
    ]  # fmt: skip
    versus = [
        {
            "action": a,
            "baseline": b,
            "measure": "score",
            "difference": x - y,
            "lo": x - y - half,
            "hi": x - y + half,
            "n": 3,
        }
        for a, x in scores.items()
        for b, y in scores.items()
        if kind(a) == "action" and a != b
    ]
    return (
        pl.DataFrame(summary, schema=comparison.SUMMARY, orient="row"),
        pl.DataFrame(versus, schema=comparison.VERSUS, orient="row"),
    )


def test_the_verdict_says_when_the_baseline_wins() -> None:
    said = " ".join(verdict(*tables({"lora": 0.9, "prompt": 0.2, "rome": 0.5, "memit": 0.4}, 0.1), "edit", 3))
    assert "strongest baseline is lora, with a score of 0.90" in said and "The best action is rome" in said
    assert "The baseline wins: rome falls short of lora" in said and "rome beats prompt" in said


def test_the_verdict_says_when_the_seeds_cannot_tell() -> None:
    said = " ".join(verdict(*tables({"lora": 0.9, "rome": 0.85}, 0.3), "edit", 3))
    assert "baseline is ahead" in said and "Between rome and lora" in said and "wins" not in said
    summary, versus = tables({"lora": 0.2, "rome": 0.85}, 0.3)
    once = versus.with_columns(lo=None, hi=None, n=pl.lit(1, pl.Int64)).cast(dict(versus.schema))
    said = " ".join(verdict(summary, once, "edit", 3))
    assert "Between rome and lora (difference +0.65, one seed) the seeds cannot tell" in said


def test_the_verdict_says_when_the_action_wins() -> None:
    held = {"efficacy": {"lora": 0.5, "rome": 0.9, NOTHING: 0.0, RANDOM: 0.8}}
    said = " ".join(verdict(*tables({"lora": 0.5, "rome": 0.9}, 0.1, **held), "edit", 3))
    assert "rome beats lora" in said and "baseline" not in said.split("The best action")[1].split("Efficacy")[0]
    assert "needs no right target" in said


def test_the_verdict_of_nothing() -> None:
    assert "nothing can be said" in verdict(*tables({"rome": 0.9}, 0.1), "edit", 1)[0]
    assert "No action was measured" in " ".join(verdict(*tables({"lora": 0.9}, 0.1), "edit", 1))


def test_reading_an_action() -> None:
    assert read("rome") == ("rome", {})
    assert read("rome:layer=3,layers=[0, 1], name=x") == ("rome", {"layer": 3, "layers": [0, 1], "name": "x"})
    with pytest.raises(MethodError, match="cannot read"):
        read("rome:layer")


def test_mistakes_are_told_before_anything_runs(tiny_model: Any, capitals: Behavior) -> None:
    with pytest.raises(MethodError, match="unknown"):
        compare(tiny_model, capitals, ["no_such_method"])
    with pytest.raises(MethodError, match="one name"):
        compare(tiny_model, capitals, ["lora"])
    with pytest.raises(MethodError, match="task"):
        compare(tiny_model, "no_such_task")
    with pytest.raises(MethodError, match="seeds"):
        compare(tiny_model, capitals, seeds=())
    with pytest.raises(MethodError, match="seeds that differ"):
        compare(tiny_model, capitals, seeds=(0, 1, 0))
    for task, options in (("fact_edit", {"nn": 3}), (capitals, {"n": 3}), (of_behavior(capitals), {"goal": "lower"})):
        with pytest.raises(MethodError, match="no such option"):
            compare(tiny_model, task, options=options)
    alike = Behavior.from_rows([{**row, "answers": [" Paris"], "foils": []} for row in capitals.frame.to_dicts()])
    with pytest.raises(MethodError, match="no other answer"):
        random_targets(of_behavior(alike), 0)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tiny
    from headwater.cli import main

    folder = tiny.save_tiny(tmp_path / "model")
    arguments = ["act", "compare", "ioi", "--model", str(folder), "--method", "ascent:lr=1e-3", "--seeds", "1"]
    settings = {"steps": 2, "relearn": "[]", "n_others": 4, "text_tokens": 6}
    for name, value in settings.items():
        arguments += ["--set", f"{name}={value}"]
    pairs = tmp_path / "pairs.parquet"
    hw.behavior("ioi", n=12, seed=0).save(pairs)
    arguments[2] = str(pairs)
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--out", str(tmp_path / "out"), "--json"])
    assert not end.value.code
    told = json.loads(capsys.readouterr().out)
    assert {row["action"] for row in told["summary"]} == {*ALWAYS, "ascent:lr=1e-3"} and told["verdict"]
    assert isinstance(load_result(tmp_path / "out" / "result"), ActComparison)
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--set", "nothing=1"])
    assert end.value.code == 2
