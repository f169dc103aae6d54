"""Binding: what is kept is exact, what is dropped is counted with its reason."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headwater as hw
from headwater.behavior import generators
from headwater.behavior.bind import bind, reasons_to_drop
from headwater.behavior.table import Behavior
from headwater.core.errors import BehaviorError


def pair(
    prompt: str = "The dog", counterfactual: str = "The cat", answer: Any = " is", foil: Any = " are", **more: Any
) -> dict:
    answers, foils = ([x] if isinstance(x, str) else x for x in (answer, foil))
    return {"prompt": prompt, "counterfactual": counterfactual, "answers": answers, "foils": foils, **more}


def behavior(*rows: dict) -> Behavior:
    return Behavior.from_rows(rows)


def check_exact(bound: Any, tokenizer: Any) -> None:
    """Everything a Bound says, against the tokenizer itself."""
    seen = []
    lengths = [group.length for group in bound.groups]
    assert lengths == sorted(set(lengths))
    rows = bound.behavior.frame.to_dicts()
    kept = {row["id"]: row for row in bound.frame.to_dicts()}
    for group in bound.groups:
        assert group.clean.shape == group.corrupt.shape == (len(group), group.length)
        for at, index in enumerate(group.rows):
            row = rows[index]
            used = kept[row["id"]]
            seen.append(row["id"])
            clean = tokenizer(row["prompt"])["input_ids"]
            assert group.clean[at].tolist() == clean
            assert group.corrupt[at].tolist() == tokenizer(used["counterfactual"])["input_ids"]
            found = {}
            for column, ids, texts in (("a", group.answers, used["answers"]), ("f", group.foils, used["foils"])):
                tokens = [token for token in ids[at].tolist() if token != -1]
                assert len(tokens) == len(set(tokens)) > 0
                whole = [tokenizer(row["prompt"] + text)["input_ids"] for text in texts]
                follows = {ids[len(clean)] for ids in whole if ids[: len(clean)] == clean and len(ids) > len(clean)}
                assert set(tokens) <= follows
                found[column] = (set(tokens), follows)
            (answers, all_answers), (foils, all_foils) = found["a"], found["f"]
            assert answers == all_answers - all_foils
            assert foils == all_foils - all_answers
    dropped = dict(bound.dropped.rows())
    assert sorted([*seen, *dropped]) == sorted(row["id"] for row in rows)
    assert all(dropped.values())


@pytest.mark.parametrize("name", generators.BUILT_IN)
@pytest.mark.parametrize("which", ["gpt2", "tiny", "characters"])
def test_generators_bind_exactly(name: str, which: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(which)
    made = hw.behavior(name, n=40, seed=1)
    if which == "characters" and name in ("agreement", "capitals", "conflict", "successor"):
        # subjects in the other number have another length; answers " Paris" and " Rome" begin with the same space
        with pytest.raises(BehaviorError, match="no pair of behavior") as caught:
            made.bind(tokenizer)
        assert "(40)" in str(caught.value) or ";" in str(caught.value)
        return
    if which != "gpt2" and name == "parentheses":
        # one token a closer: how many are needed is not the next token's to say
        with pytest.raises(BehaviorError, match="answer and foil begin with the same token"):
            made.bind(tokenizer)
        return
    if which != "gpt2" and name == "refusal":  # harmful and harmless words are spelled in pieces, of other numbers
        kinds = {reason.split(":")[0] for _id, reason in reasons_to_drop(made, tokenizer)}
        assert kinds <= {"lengths differ", "answer and foil begin with the same token"}
        return
    if which == "characters" and name in ("ioi", "induction", "colors"):
        kinds = {reason.split(":")[0] for _id, reason in reasons_to_drop(made, tokenizer)}
        unknown = "a word that the tokenizer does not know"  # a line's end, where what differs has it at another place
        assert kinds <= {"answer and foil begin with the same token", "lengths differ", "no answer", unknown}
        return
    bound = made.bind(tokenizer)
    check_exact(bound, tokenizer)
    assert bound.n >= 20


def test_smallest_case(tiny: Any) -> None:
    bound = behavior(pair()).bind(tiny)
    (group,) = bound.groups
    ids = {text: tiny(text)["input_ids"] for text in ("The dog", "The cat", " is", " are")}
    assert group.clean.tolist() == [ids["The dog"]]
    assert group.corrupt.tolist() == [ids["The cat"]]
    assert (group.answers.tolist(), group.foils.tolist()) == ([ids[" is"]], [ids[" are"]])
    assert {name: x.tolist() for name, x in group.positions.items()} == {"END": [1]}
    assert (bound.n, len(bound), bound.dropped.height, bound.removed.height) == (1, 1, 0, 0)
    assert all(x.dtype == torch.long for x in (group.clean, group.corrupt, group.answers, group.foils))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair(counterfactual="The big cat"), "lengths differ: 2 tokens in the prompt, "),
        (pair(counterfactual="The dog"), "prompt and counterfactual have the same tokens"),
        (pair(answer=" is", foil=" is it"), "answer and foil begin with the same token: ' is'"),
        (pair(prompt="The do", counterfactual="The ca", answer="g", foil="t"), "no answer: 'g' does not follow"),
        (pair(foil=""), "no foil: it is empty"),
        (pair(answer=[]), "no answer"),
        (pair(prompt=""), "empty prompt or counterfactual"),
    ],
)
def test_reasons(row: dict, reason: str, tiny: Any) -> None:
    # "The do" + "g": merged with the end of the prompt, so its logit is not the next token's
    if row["prompt"] == "The do":
        row = pair(prompt="The ca", counterfactual="The co", answer="r", foil="x")
        reason = "no answer: 'r' does not follow"
        assert tiny("The car")["input_ids"][:-1] != tiny("The ca")["input_ids"]
    good = pair()
    bound = behavior(good, row).bind(tiny)
    assert bound.n == 1
    assert bound.dropped.height == 1
    assert bound.dropped["reason"][0].startswith(reason)
    assert bound.reasons == {reason.split(":")[0]: 1}


def test_too_long_and_nothing_left(tiny: Any) -> None:
    class Holder:
        tokenizer = tiny
        max_length = 3

    rows = [pair(), pair("The dog near the car", "The cat near the car")]
    assert behavior(*rows).bind(Holder()).n == 1
    dropped = behavior(*rows).bind(Holder()).dropped
    assert dropped["reason"].to_list() == ["too long for the model: 5 tokens, its context is 3"]
    assert behavior(*rows).bind(tiny).n == 2
    assert bind(behavior(*rows), tiny, max_length=2).n == 1
    Holder.max_length = 1
    with pytest.raises(BehaviorError, match=r"no pair of behavior 'behavior' fits.*too long for the model \(2\)"):
        behavior(*rows).bind(Holder())
    Holder.max_length = None
    assert behavior(*rows).bind(Holder()).n == 2
    Holder.tokenizer = None
    with pytest.raises(BehaviorError, match="model with a tokenizer"):
        behavior(*rows).bind(Holder())


def test_shared_first_tokens_leave_both_sides(characters: Any) -> None:
    row = pair("from 1732 to 17", "from 1701 to 17", [str(y) for y in range(33, 100)], [f"{y:02d}" for y in range(33)])
    bound = behavior(row).bind(characters)
    digits = characters.convert_ids_to_tokens
    assert sorted(digits(bound.groups[0].answers[0].tolist())) == list("456789")
    assert sorted(digits(bound.groups[0].foils[0].tolist())) == list("012")
    assert set(bound.removed["column"]) == {"answers", "foils"}
    assert bound.removed["reason"].unique().to_list() == ["it begins with the same token as one of the other side"]


def test_texts_that_merge_with_the_prompt_are_removed_and_said(gpt2: Any) -> None:
    # " 1700" is one token of GPT-2, " 1741" is two
    assert len(gpt2(" 1700")["input_ids"]) == 1
    row = pair("to the year 17", "to the era 17", ["41", "00"], ["23"])
    bound = behavior(row).bind(gpt2)
    assert bound.groups[0].answers.tolist() == [gpt2("41")["input_ids"]]
    assert bound.removed.rows() == [("00000", "answers", "00", "'00' does not follow the prompt as tokens of its own")]


def test_alternatives_are_tried_in_order(tiny: Any) -> None:
    others = [
        {"counterfactual": "The purple cat", "foils": [" was"]},
        {"counterfactual": "The fox", "foils": [" has"]},
        {"counterfactual": "The pig", "foils": [" had"]},
    ]
    bound = behavior(pair(counterfactual="The big cat", alternatives=others)).bind(tiny)
    assert bound.frame["counterfactual"].to_list() == ["The fox"]
    assert bound.frame["foils"].to_list() == [[" has"]]
    assert bound.groups[0].corrupt.tolist() == [tiny("The fox")["input_ids"]]
    assert bound.groups[0].foils.tolist() == [tiny(" has")["input_ids"]]
    assert bound.dropped.height == 0
    none = behavior(pair(), pair(counterfactual="The big cat", alternatives=others[:1])).bind(tiny)
    assert none.dropped["reason"][0].startswith("lengths differ")


def test_positions_are_last_tokens_of_spans(gpt2: Any, characters: Any) -> None:
    prompt, then = "Ask Wilhelmina now, café", "Ask Bartholomew now, café"
    spans = {"name": [4, 14], "word": [15, 18], "accent": [20, 24], "inside": [5, 7]}
    one = behavior(pair(prompt, then, " a", " b", positions=spans))
    row = pair(prompt, prompt.replace("now", "out"), " a", " b", positions=spans)
    bound = behavior(row).bind(gpt2)
    ids, offsets = (gpt2(prompt, return_offsets_mapping=True)[key] for key in ("input_ids", "offset_mapping"))
    for name, (_start, end) in spans.items():
        at = bound.groups[0].positions[name].item()
        assert offsets[at][0] < end <= offsets[at][1]
        assert all(end <= first for first, _past in offsets[at + 1 :])
    assert bound.groups[0].positions["END"].tolist() == [len(ids) - 1]
    assert one.n == 1


def test_positions_of_emoji(gpt2: Any) -> None:
    prompt = "I like 🦙 and tea"
    llama = prompt.index("🦙")
    assert len(gpt2("🦙")["input_ids"]) > 1
    row = pair(prompt, prompt.replace("tea", "pie"), " now", " then", positions={"llama": [llama, llama + 1]})
    at = behavior(row).bind(gpt2).groups[0].positions["llama"].item()
    ids = gpt2(prompt)["input_ids"]
    assert gpt2.decode(ids[: at + 1]).endswith("🦙")
    assert not gpt2.decode(ids[:at]).endswith("🦙")


def test_positions_without_offsets(gpt2: Any) -> None:
    """A slow tokenizer gives no offsets; the same indices are found from the text's beginning."""

    class Slow:
        is_fast = False

        def __call__(self, text: Any) -> Any:
            return {"input_ids": gpt2(text)["input_ids"]}

        def decode(self, ids: Any) -> str:
            return gpt2.decode(ids)

    made = hw.behavior("ioi", n=20)
    fast, slow = made.bind(gpt2), made.bind(Slow())
    assert slow.n == fast.n
    for a, b in zip(fast.groups, slow.groups, strict=True):
        assert {k: v.tolist() for k, v in a.positions.items()} == {k: v.tolist() for k, v in b.positions.items()}


def test_only_shared_positions_are_offered(tiny: Any) -> None:
    rows = [pair(positions={"noun": [4, 7], "art": [0, 3]}), pair("The fox", "The pig", positions={"noun": [4, 7]})]
    bound = behavior(*rows).bind(tiny)
    assert sorted(bound.positions) == ["END", "noun"]
    assert set(bound.groups[0].positions) == {"END", "noun"}


def test_a_span_over_nothing_drops_the_pair(tiny: Any) -> None:
    bound = behavior(pair(), pair("The fox", "The pig", positions={"noun": [4, 70]})).bind(tiny)
    assert bound.dropped["reason"].to_list() == ["a position falls on no token: 'noun' at characters 4 to 70"]


def test_a_tokenizer_that_frames_its_text(tiny: Any) -> None:
    """A token put before every prompt moves the positions; one put after it leaves no next token to score."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    from tiny import tiny_tokenizer

    def framed(template: str) -> PreTrainedTokenizerFast:
        tokenizer = tiny_tokenizer()
        end = ("<|endoftext|>", 0)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[end])
        return tokenizer

    row = pair(positions={"noun": [4, 7]})
    before = behavior(row).bind(framed("<|endoftext|> $A"))
    assert before.groups[0].clean.tolist() == [[0, *tiny("The dog")["input_ids"]]]
    assert before.groups[0].positions["noun"].tolist() == [2]
    with pytest.raises(BehaviorError, match="does not follow the prompt"):
        behavior(row).bind(framed("$A <|endoftext|>"))


@given(
    st.lists(
        st.tuples(
            st.text("ab ", min_size=1, max_size=5),
            st.text("ab ", min_size=1, max_size=5),
            st.lists(st.text("xyz", min_size=1, max_size=2), min_size=1, max_size=3, unique=True),
            st.lists(st.text("xyz", min_size=1, max_size=2), min_size=1, max_size=3, unique=True),
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=80, deadline=None)
def test_any_pairs_are_kept_exactly_or_dropped(characters: Any, rows: list) -> None:
    made = behavior(*(pair(*row) for row in rows))
    try:
        bound = made.bind(characters)
    except BehaviorError:
        assert len(reasons_to_drop(made, characters)) == len(rows)
        return
    check_exact(bound, characters)


def test_words_that_a_word_tokenizer_lacks_drop_the_pair_or_the_answer() -> None:
    from headwater.dynamics.lab.words import word_tokenizer

    words = word_tokenizer(["<unk>", "<eos>", "The", "capital", "of", "France", "Norway", "is", "Paris", "Oslo"])
    row = {
        "prompt": "The capital of France is", "counterfactual": "The capital of Norway is", "answers": [" Paris"],
        "foils": [" Oslo"],
    }  # fmt: skip
    rows = [
        row,
        {**row, "prompt": "The capital of Peru is", "answers": [" Lima"]},
        {**row, "answers": [" Lutetia"]},
        {**row, "answers": [" Lutetia", " Paris"]},
        {**row, "foils": [" Kristiania"]},
    ]
    bound = Behavior.from_rows(rows, name="capitals").bind(words)
    assert [row["answers"] for row in bound.frame.to_dicts()] == [[" Paris"], [" Lutetia", " Paris"]]
    assert bound.groups[0].answers[:, 0].tolist() == [8, 8]
    assert [reason.split(":")[0] for reason in bound.dropped["reason"]] == [
        "a word that the tokenizer does not know", "no answer", "no foil"
    ]  # fmt: skip
