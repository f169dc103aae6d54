"""Adapters of published benchmarks: their formats, the swap against its plain definition, and scores on tiny models."""

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from headwater.bench import published
from headwater.bench.published import Interchange, Ravel, fit_subspace, swapped
from headwater.bench.published.find import normalized_error
from headwater.bench.published.interchange import first_token, known, positions
from headwater.core.errors import BehaviorError, MethodError
from headwater.core.results import load_result

if TYPE_CHECKING:
    from headwater.core.model import Model

CITIES = {
    "Paris": ("France", "Europe"), "Rome": ("Italy", "Europe"), "Cairo": ("Egypt", "Africa"),
    "Lima": ("Peru", "America"), "Delhi": ("India", "Asia"), "Tokyo": ("Japan", "Asia"),
    "Oslo": ("Norway", "Europe"), "Nairobi": ("Kenya", "Africa"),
}  # fmt: skip


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def ravel_folder(tmp_path: Path) -> Path:
    """A domain of eight cities in the published format."""
    templates = {
        "Country": ["%s is in the country of", "The country of %s is", "People in %s live in"],
        "Continent": ["%s is on the continent of", "The continent of %s is"],
    }
    attributes = {city: {"Country": a, "Continent": b} for city, (a, b) in CITIES.items()}
    write(tmp_path / "ravel_city_entity_attributes.json", attributes)
    write(tmp_path / "ravel_city_attribute_to_prompts.json", templates)
    write(tmp_path / "ravel_city_entity_to_split.json", {c: ("train", "test")[i % 2] for i, c in enumerate(CITIES)})
    write(tmp_path / "ravel_city_prompt_to_split.json", {t: "test" for texts in templates.values() for t in texts})
    return tmp_path


# --- the swap ---------------------------------------------------------------------------------------------------------


PAIRS = [
    Interchange(base="When Mary went to Paris", source="Then John went to Rome with Mary", answer=" in", expected=" on",
                base_end=9, source_end=9),
    Interchange(base="Then Mary and John went to Rome", source="The country of Cairo", answer=" in", expected=" on",
                base_end=18, source_end=20),
    Interchange(base="The boy and the girl", source="When Mary", answer=" in", expected=" on"),
]  # fmt: skip


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_swap_equals_the_plain_definition(tiny_model: "Model", rank: int | None) -> None:
    site = "resid_post.1"
    generator = torch.Generator().manual_seed(1)
    basis = None if rank is None else torch.linalg.qr(torch.randn(32, rank, generator=generator))[0].T
    found = swapped(tiny_model, site, PAIRS, basis)
    for i, pair in enumerate(PAIRS):
        at = positions(tiny_model, [pair.base, pair.source], [pair.base_end, pair.source_end]).tolist()
        base, source = (tiny_model.tokens(text)[0][None] for text in (pair.base, pair.source))
        with torch.no_grad():
            vector = tiny_model.run(source, capture=[site])[site][0, at[1]]

            def change(module: Any, inputs: Any, output: Any, vector: Any = vector, at: int = at[0]) -> Any:
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                h = hidden[0, at]
                hidden[0, at] = vector if basis is None else h + basis.T @ (basis @ (vector - h))
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handle = tiny_model.hf.model.layers[1].register_forward_hook(change)
            wanted = tiny_model.hf(base).logits[0, -1]
            handle.remove()
        assert torch.allclose(found[i], wanted, atol=1e-3)


def test_a_subspace_of_no_directions_changes_nothing(tiny_model: "Model") -> None:
    """At a span that both sentences share, class means do not differ."""
    clean = tiny_model.run([pair.base for pair in PAIRS], logits="last").logits
    assert torch.allclose(swapped(tiny_model, "resid_post.1", PAIRS, torch.zeros(0, 32)), clean, atol=1e-5)


def test_positions_are_those_of_the_spans(tiny_model: "Model") -> None:
    at = positions(tiny_model, [p.base for p in PAIRS], [p.base_end for p in PAIRS]).tolist()
    words = [tiny_model.tokenizer.decode([tiny_model.tokens(p.base)[0][i]]) for p, i in zip(PAIRS, at, strict=True)]
    assert words == [" Mary", " John", " girl"]
    assert first_token(tiny_model, "Mary went", " to") == tiny_model.tokens("Mary went to")[0][-1]
    with pytest.raises(BehaviorError, match="no token"):
        positions(tiny_model, ["Mary"], [99])


def test_subspaces_are_orthonormal_and_find_what_differs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=generator)
    labels = [("a", "b")[i % 2] for i in range(300)]
    x[1::2, 3] += 4.0
    for method, rank in (("pca", 3), ("mean", 1), ("probe", 1), ("random", 2)):
        basis = fit_subspace(method, x, labels, rank=rank)
        assert basis is not None
        assert torch.allclose(basis @ basis.T, torch.eye(len(basis)), atol=1e-5)
        if method in ("mean", "probe"):
            assert abs(float(basis[0, 3])) > 0.9
    plain = (x[1::2].mean(0) - x[::2].mean(0)).double()
    found = fit_subspace("mean", x, labels)
    assert found is not None
    assert abs(float(found[0].double() @ plain / plain.norm())) == pytest.approx(1.0, abs=1e-6)
    assert fit_subspace("full", x, labels) is None
    same = fit_subspace("mean", torch.ones(4, 12), ["a", "b"] * 2)
    assert same is not None and same.shape == (0, 12)
    for wrong in ({"method": "nosuch"}, {"method": "pca", "rank": 13}, {"method": "mean", "labels": ["a"] * 300}):
        with pytest.raises(MethodError):
            fit_subspace(wrong.get("method", "pca"), x, wrong.get("labels", labels), rank=wrong.get("rank", 1))  # type: ignore[arg-type]


# --- RAVEL ------------------------------------------------------------------------------------------------------------


def test_ravel_pairs_ask_for_the_right_thing(ravel_folder: Path) -> None:
    data = Ravel.load(ravel_folder)
    pairs = data.pairs("Country", n=6, split="test")
    assert {pair.group for pair in pairs} == {"cause", "isolate"}
    for pair in pairs:
        own, other = CITIES[pair.details["entity"]], CITIES[pair.details["source_entity"]]
        assert data.entity_split[pair.details["entity"]] == "test"
        assert pair.base[: pair.base_end].endswith(pair.details["entity"])
        assert pair.source[: pair.source_end].endswith(pair.details["source_entity"])
        if pair.group == "cause":
            assert (pair.answer, pair.expected) == (f" {own[0]}", f" {other[0]}")
        else:
            assert pair.answer == pair.expected == f" {own[1]}"
            assert own[1] != other[1]
    assert data.pairs("Country", n=6, seed=1) != pairs
    with pytest.raises(BehaviorError, match="Country"):
        data.pairs("Contry", n=2)
    with pytest.raises(BehaviorError, match="city"):
        Ravel.load(ravel_folder, "verb")


def test_ravel_scores_on_a_tiny_model(tiny_model: "Model", ravel_folder: Path, tmp_path: Path) -> None:
    data = Ravel.load(ravel_folder)
    options: dict[str, Any] = dict(site="resid_post.0", rank=2, n=12, n_train=12, only_known=False)
    eye, nothing = torch.eye(32), torch.zeros(1, 32)
    nothing[0, 0] = 1e-20
    found = published.ravel(tiny_model, data, "Country", bases={"eye": eye}, **options)
    for measure in ("cause", "isolate", "disentangle"):
        assert found.value(measure, "eye") == found.value(measure, "full")
    both = found.value("cause", "pca"), found.value("isolate", "pca")
    assert found.value("disentangle", "pca") == pytest.approx(sum(both) / 2)
    again = load_result(found.save(tmp_path / "result"), check=True)
    assert again.content_hash == found.content_hash
    with pytest.raises(BehaviorError, match="too little"):
        published.ravel(tiny_model, data, "Country", **{**options, "only_known": True})


def test_ravel_reads_the_published_files(shared_data: Path) -> None:
    for domain in ("city", "verb", "occupation", "physical_object", "nobel_prize_winner"):
        data = Ravel.load(shared_data / "ravel", domain)
        for attribute in data.measured:
            pairs = data.pairs(attribute, n=4, split="train")
            assert len(pairs) == 8, (domain, attribute)
            assert all(pair.source[: pair.source_end].endswith(pair.details["source_entity"]) for pair in pairs)
        assert set(data.prompts) - set(data.measured) == ({"Gender Bias"} if domain == "occupation" else set())
    with pytest.raises(BehaviorError, match=r"no values.*Gender Bias.*Industry"):
        Ravel.load(shared_data / "ravel", "occupation").pairs("Gender Bias", n=2)


# --- CausalGym --------------------------------------------------------------------------------------------------------

ROWS = [
    {"base": ["<|endoftext|>", f"The {a}"], "src": ["<|endoftext|>", f"The {b}"],
     "base_label": " is", "src_label": " has", "base_type": "one", "src_type": "many", "task": "toy"}
    for a, b in [("boy", "boys"), ("girl", "girls"), ("car", "cars"), ("cat", "cats"), ("dog", "dogs"),
                 ("bike", "bikes"), ("chair", "chairs"), ("desk", "desks"), ("doctor", "doctors"),
                 ("farmer", "farmers")]
]  # fmt: skip


def test_causalgym_formats(tmp_path: Path) -> None:
    pairs = published.read_pairs(write(tmp_path / "pairs.json", ROWS))
    assert pairs[0].base == ("The boy",)
    joined = [{**ROWS[0], "base": ["<|endoftext|>The", " boy"], "src": ["<|endoftext|>The", " boys"]}]
    assert published.read_pairs(write(tmp_path / "joined.json", joined))[0].base == ("The", " boy")
    assert (pairs[0].base_type, pairs[0].source_label, pairs[0].task) == ("one", " has", "toy")
    line = {"clean_prefix": "The boy near the car", "patch_prefix": "The boys near the car", "clean_answer": " is",
            "patch_answer": " are", "case": "singular_singular"}  # fmt: skip
    lines = tmp_path / "simple_test.json"
    lines.write_text(json.dumps(line) + "\n" + json.dumps({**line, "case": "plural_singular"}) + "\n")
    first, second = published.read_pairs(lines)
    assert first.base == ("The", " boy", " near", " the", " car")
    assert (first.base_type, first.source_type, second.base_type) == ("singular", "plural", "plural")
    assert first.at(1).base_end == len("The boy")
    assert first.swap().swap() == first
    for wrong in ([{"base": "x"}], [{**line, "patch_prefix": "The boys"}], [3]):
        with pytest.raises(BehaviorError, match="row 1"):
            published.read_pairs(write(tmp_path / "wrong.json", wrong))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(BehaviorError, match="JSON"):
        published.read_pairs(tmp_path / "bad.json")


def test_causalgym_templates(tmp_path: Path) -> None:
    spec = {
        "templates": ["The {subject} that {verb} the {object}"], "label": "subject", "result_prepend_space": True,
        "labels": {"plural": ["are"], "singular": ["is"]},
        "variables": {"subject": {"singular": ["boy"], "plural": ["boys"]}, "verb": ["saw"], "object": ["car", "cars"]},
    }  # fmt: skip
    linked = {
        "templates": ["The {noun}{insert} {vp.verb} {vp.cont}"], "label": "insert", "result_prepend_space": False,
        "labels": {"yes": [" fell"], "no": ["."]},
        "variables": {"noun": ["boy", "girl"], "insert": {"yes": [" who was"], "no": [""]},
                      "vp.verb": ["sent", "given", "shown"], "vp.cont": ["home", "bread", "maps"]},
    }  # fmt: skip
    path = write(tmp_path / "templates.json", {"agr": spec, "garden": linked})
    assert published.template_names(path) == ["agr", "garden"]
    together = set()
    for pair in published.sample_template(path, "garden", n=30):
        assert pair.base[0] == "The" and pair.base[1] in (" boy", " girl") and "" in (pair.base[2], pair.source[2])
        assert pair.base[3:] == pair.source[3:]
        assert {pair.base_label, pair.source_label} == {" fell", "."}
        together.add("".join(pair.base[3:]))
    assert together == {" sent home", " given bread", " shown maps"}
    for pair in published.sample_template(path, "agr", n=20):
        number = {"boy": "singular", "boys": "plural"}
        base, source = "".join(pair.base).split(), "".join(pair.source).split()
        assert [a == b for a, b in zip(base, source, strict=True)] == [True, False, True, True, True, True]
        assert (pair.base_type, pair.source_type) == (number[base[1]], number[source[1]])
        assert pair.base_label == {"plural": " are", "singular": " is"}[pair.base_type]
    with pytest.raises(BehaviorError, match="agr"):
        published.sample_template(path, "agrr", n=1)


def test_missing_data_is_named_with_where_it_comes_from(tmp_path: Path) -> None:
    calls: list[tuple[str, Callable[[Path], Any]]] = [
        ("explanare/ravel", lambda path: Ravel.load(path)),
        ("causalgym", published.read_pairs),
        ("syntaxgym", lambda path: published.sample_template(path, "agr", n=1)),
        ("MIB", lambda path: published.read_rows(path, "answerPosition")),
        ("ioi_templates.json.*MIB", lambda path: published.indirect_object(path, n=1)),
        ("multimodal-interpretability/FIND", lambda path: published.load_find(path, "strings")),
        ("ll_model.pth.*InterpBench", published.interpbench),
    ]
    for says, call in calls:
        with pytest.raises(BehaviorError, match=f"(?s)nothing.*{says}") as error:
            call(tmp_path / "nothing")
        assert "\n\n" not in str(error.value)


def test_full_swap_at_the_end_of_the_last_layer_reverses_the_odds(tiny_model: "Model", tmp_path: Path) -> None:
    pairs = published.read_pairs(write(tmp_path / "pairs.json", ROWS))
    eye = torch.eye(32)
    found = published.causalgym(tiny_model, pairs, sites=["resid_post.2", "resid_post.0"], bases={"eye": eye}, n=8)
    own, other = (
        tiny_model.run([text], logits="last").logits for text in ("The boy", "The boys")
    )  # sanity of what the full swap must give: the source's own margin
    assert not torch.allclose(own, other)
    full = found.value("log_odds_ratio", "full", site="resid_post.2", position="span 0")
    assert found.value("log_odds_ratio", "eye", site="resid_post.2", position="span 0") == pytest.approx(full, abs=1e-4)
    # pairs come both ways round, so with the last layer's vector swapped the mean margin is that of the other sentence,
    # for the other sentence's words: the ratio is the sum of both margins, whatever the model prefers
    margins = []
    for pair in pairs:
        ids = [first_token(tiny_model, "".join(pair.base), w) for w in (pair.base_label, pair.source_label)]
        a, b = (tiny_model.run(["".join(s)], logits="last").logits[0] for s in (pair.base, pair.source))
        margins.append(float((a[ids[0]] - a[ids[1]]) - (b[ids[0]] - b[ids[1]])))
    assert min(margins) - 1e-3 <= full <= max(margins) + 1e-3
    assert found.value("overall", "full") >= full / 2 - 1e-6
    with pytest.raises(BehaviorError, match="too few"):
        published.causalgym(tiny_model, pairs[:3], sites=["resid_post.0"])


def test_agreement_pairs_of_the_published_files(shared_data: Path) -> None:
    pairs = published.read_pairs(shared_data / "sva" / "nounpp_train.json")
    assert len(pairs) == 1920
    assert {len(pair.base) for pair in pairs} == {5}
    assert {pair.base_type for pair in pairs} == {"singular", "plural"}
    assert all(pair.base_type != pair.source_type for pair in pairs)


# --- MIB --------------------------------------------------------------------------------------------------------------


def test_mib_rows(tmp_path: Path) -> None:
    row = {
        "prompt": "base", "choices": {"label": ["A", "B"], "text": ["red", "blue"]}, "answerKey": 1,
        "answerPosition_counterfactual": {"prompt": "source", "choices": {"label": ["C", "D"]}, "answerKey": 0},
    }  # fmt: skip
    path = write(tmp_path / "rows.json", [row])
    (pair,) = published.read_rows(path, "answerPosition", variable="answer_pointer")
    assert (pair.answer, pair.expected, pair.label, pair.source_label) == (" B", " A", "1", "0")
    assert pair.source_answer == " C"
    (pair,) = published.read_rows(path, "answerPosition_counterfactual")
    assert (pair.answer, pair.expected) == (" B", " C")
    with pytest.raises(BehaviorError, match="randomLetter"):
        published.read_rows(path, "randomLetter")


def test_multiple_choice_pointer_and_letter_differ(tmp_path: Path) -> None:
    things = [
        {"object": o, "color": c} for o, c in [("apple", "red"), ("sky", "blue"), ("grass", "green"), ("coal", "black")]
    ]
    path = write(tmp_path / "colors.json", things)
    for pair in published.multiple_choice(path, n=20):
        lines = dict(line.split(". ") for line in pair.base.split("\n")[1:-1])
        other = dict(line.split(". ") for line in pair.source.split("\n")[1:-1])
        color = pair.base.split(" is ")[1].split(".")[0]
        assert lines[pair.answer.strip()] == color
        place = list(other.values()).index(color)
        assert pair.expected.strip() == list(lines)[place] != pair.answer.strip()
    with pytest.raises(BehaviorError, match="no list"):
        published.multiple_choice(write(tmp_path / "bad.json", {}), n=2)


@pytest.mark.parametrize("digits", [False, True])
def test_arithmetic_swaps_the_carry(digits: bool) -> None:
    for pair in published.arithmetic(n=50, digits=digits):
        a, b = (int(x) for x in pair.base.split() if x.isdigit())
        c, d = (int(x) for x in pair.source.split() if x.isdigit())
        carry, other = (int(x % 10 + y % 10 >= 10) for x, y in ((a, b), (c, d)))
        assert int(pair.answer) == a + b
        assert int(pair.expected) == (a + b) % 10 + 10 * (a // 10 + b // 10 + other)
        assert carry != other


def test_causal_variable_scores(tiny_model: "Model") -> None:
    pairs = [
        Interchange(base=f"The {a} is", source=f"The {b} was", answer=" red", expected=" blue", label=a, source_label=b)
        for a, b in [("boy", "girl"), ("girl", "boy"), ("boy", "girl"), ("girl", "boy")] * 3
    ]
    said = tiny_model.run(["The girl was"], logits="last").logits[0].argmax()
    word = tiny_model.tokenizer.decode([int(said)])
    pairs = [Interchange(**{**vars(pair), "expected": word}) for pair in pairs]
    if first_token(tiny_model, pairs[0].base, word) != int(said):
        pytest.skip("the tiny model's word does not follow as a token of its own")
    found = published.causal_variable(tiny_model, pairs, site="resid_post.2", rank=1, only_known=False)
    # at the end of the last layer the whole vector is the answer: the source's word, wherever it is this source
    assert found.value("iia", "full") == pytest.approx(0.5)
    assert found.facts["accuracy"] == 0.0
    with pytest.raises(BehaviorError, match="none of these"):
        published.causal_variable(tiny_model, pairs, site="resid_post.2", rank=1)
    behavior = published.as_behavior(pairs, name="toy")
    assert behavior.n == 12


def test_only_pairs_whose_two_prompts_are_answered_are_kept(tiny_model: "Model") -> None:
    prompts = ["The boy is", "The girl was", "Then Mary went"]
    said = [tiny_model.tokenizer.decode([i]) for i in tiny_model.run(prompts, logits="last").logits.argmax(-1).tolist()]
    if any(first_token(tiny_model, p, w) is None for p, w in zip(prompts, said, strict=True)):
        pytest.skip("the tiny model's words do not follow as tokens of their own")
    wrong = " Paris"
    assert wrong not in said

    def pair(base: int, answer: str, source: int, source_answer: str | None) -> Interchange:
        return Interchange(
            base=prompts[base], source=prompts[source], answer=answer, expected=wrong, source_answer=source_answer
        )

    pairs = [
        pair(0, said[0], 1, said[1]), pair(0, said[0], 2, wrong), pair(1, wrong, 2, said[2]), pair(2, said[2], 0, None),
    ]  # fmt: skip
    assert known(tiny_model, pairs) == [True, False, False, True]
    assert known(tiny_model, []) == []


def test_mib_lists_of_the_published_files(shared_data: Path) -> None:
    for pair in published.indirect_object(shared_data / "mib", n=30):
        names = [name.strip() for name in (pair.answer, pair.expected)]
        assert pair.base.count(names[0]) == 1 or names[0] in names[1]
        assert pair.base.count(names[1]) >= 2
        assert "{" not in pair.base + pair.source
    assert len(published.multiple_choice(shared_data / "mib" / "mcqa_object_color_pairs.json", n=5)) == 5


# --- FIND -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def find_folder(tmp_path: Path) -> Path:
    """Two string functions and a numeric one in the published layout; their code would leave a file if it were run."""
    trap = f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\n"
    strings = tmp_path / "strings"
    vector = [[["a", "Hello", "b"], ["zz", "HelloX", "zz"]], [["cat", "x", "y"], ["catX", "q", "q"]]]
    write(strings / "unit_test_data.json", [{"name": "f00000", "test_vec": vector, "correct_inx": [2, 1]}])
    write(strings / "test_data.json", [{"name": "f00000", "description": "appends X", "test_inputs": "..."}])
    (strings / "f00000").mkdir()
    (strings / "f00000" / "function_code.py").write_text(trap + "def function(s):\n    return s + 'X'\n")
    numeric = tmp_path / "numeric"
    write(numeric / "data.json", [{"dir": "f00000", "name": "linear((2, 1))", "domain": [0, 10]}])
    (numeric / "f00000").mkdir()
    (numeric / "f00000" / "function_code.py").write_text("def function(x):\n    return 2 * x + 1\n")
    return tmp_path


def test_find_is_read_without_being_run(find_folder: Path) -> None:
    functions = published.load_find(find_folder / "strings")
    one = functions["f00000"]
    assert one.tests == [("Hello", "HelloX"), ("cat", "catX")]
    assert one.defines == ["function"]
    assert one.metadata["description"] == "appends X"
    good = published.find(functions, {"f00000": lambda s: s + "X"})
    half = published.find(functions, {"f00000": lambda s: "catX" if s == "cat" else 1 / 0})
    assert (good.value("agreement", "proposal"), half.value("agreement", "proposal")) == (1.0, 0.5)
    assert good.value("agreement", "copy") == 0.0
    assert "ZeroDivisionError" in half.facts["failed"]["f00000"]
    with pytest.raises(MethodError, match="allow_code"):
        published.find(functions, {"f00000": "def f(s):\n    return s + 'X'"})
    assert not (find_folder / "ran").exists()


def test_find_runs_code_only_when_told_to(find_folder: Path) -> None:
    functions = published.load_find(find_folder / "numeric")
    proposals: list[tuple[str, bool]] = [
        ("def f(x):\n    return 2 * x + 1", True),
        ("def f(x):\n    return 2 * x + 1.1", True),
        ("def f(x):\n    return -x", False),
        ("def f(x):\n    return x.nosuch", False),
        ("import sys; sys.exit(3)", False),
    ]
    for source, right in proposals:
        found = published.find(functions, {"f00000": source}, allow_code=True)
        assert found.value("indicator", "proposal") == float(right)
    with pytest.raises(MethodError, match="allow_code"):
        published.find(functions, {"f00000": lambda x: x})  # the published code would be run for the truth
    told = published.find(functions, {"f00000": lambda x: 2 * x}, truths={"f00000": lambda x: 2 * x + 1})
    xs = [i + 0.5 for i in range(-128, 128)]
    assert told.value("nmse", "proposal") == pytest.approx(256 / sum((2 * x + 1) ** 2 for x in xs))
    told = published.find(
        functions, {"f00000": lambda x: 2 * x}, truths={"f00000": lambda x: 2 * x + 1}, points=[0.0, 2.0]
    )
    assert told.value("nmse", "proposal") == pytest.approx(2 / 26)
    assert told.value("indicator", "proposal", task="all") == 1.0


def test_published_code_finds_the_weights_beside_it(find_folder: Path) -> None:
    folder = find_folder / "numeric" / "f00000"
    torch.save({"slope": torch.tensor(3.0)}, folder / "mlp_approx_model.pt")
    (folder / "function_code.py").write_text(
        "import os, torch\nhere = os.path.dirname(os.path.abspath(__file__))\n"
        "def function(x):\n    return torch.load(os.path.join(here, 'mlp_approx_model.pt'))['slope'].item() * x\n"
    )
    functions = published.load_find(find_folder / "numeric")
    found = published.find(functions, {"f00000": lambda x: 3 * x}, allow_code=True, points=[1.0, 2.0])
    assert found.value("nmse", "proposal") == 0.0


def test_find_ends_code_that_does_not(find_folder: Path) -> None:
    functions = published.load_find(find_folder / "strings")
    source = "def f(s):\n    while True: pass"
    found = published.find(functions, {"f00000": source}, allow_code=True, seconds=1.0)
    assert found.value("agreement", "proposal") == 0.0
    assert "not finished" in found.facts["failed"]["f00000"]


def test_find_refuses_odd_folders(tmp_path: Path, find_folder: Path) -> None:
    with pytest.raises(BehaviorError, match="strings"):
        published.load_find(tmp_path / "string")
    (tmp_path / "neurons_entities").mkdir()
    with pytest.raises(BehaviorError, match="FIND's data is not at"):
        published.load_find(tmp_path / "neurons_entities")
    write(find_folder / "numeric" / "data.json", [{"dir": "../../secret"}])
    with pytest.raises(BehaviorError, match="oddly"):
        published.load_find(find_folder / "numeric")
    functions = published.load_find(find_folder / "strings")
    with pytest.raises(MethodError, match="f00000"):
        published.find(functions, {"f0000": lambda s: s})


def test_normalized_error() -> None:
    assert normalized_error([1.0, math.nan, 2.0], [1.0, 5.0, 2.0]) == 0.0
    assert normalized_error([3.0, 4.0], [3.0, 9.0]) == 1.0
    assert normalized_error([1.0], [None]) == math.inf
    assert normalized_error([0.0], [0.0]) == 0.0
    assert normalized_error([0.0], [1.0]) == math.inf


# --- InterpBench ------------------------------------------------------------------------------------------------------


def write_hooked(folder: Path, circuit: tuple[str, ...], edges: list[tuple[str, str]]) -> Path:
    """A folder as InterpBench lays it out, of a model in which only the nodes named write anything."""
    g = torch.Generator().manual_seed(0)
    layers, heads, d, k, m, vocab = 2, 2, 8, 4, 16, 7
    config: dict[str, Any] = {
        "n_layers": layers, "n_heads": heads, "d_model": d, "d_head": k, "d_mlp": m, "d_vocab": vocab,
        "d_vocab_out": 3, "n_ctx": 6, "act_fn": "gelu", "normalization_type": None, "eps": 1e-5,
        "attention_dir": "causal", "positional_embedding_type": "standard",
    }  # fmt: skip

    def r(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    state = {"embed.W_E": r(vocab, d), "pos_embed.W_pos": r(6, d), "unembed.W_U": r(d, 3), "unembed.b_U": r(3)}
    for i in range(layers):
        b = f"blocks.{i}"
        for letter in "QKV":
            state |= {f"{b}.attn.W_{letter}": r(heads, d, k), f"{b}.attn.b_{letter}": r(heads, k)}
        out = r(heads, k, d) * torch.tensor([float(f"a{i}.h{h}" in circuit) for h in range(heads)])[:, None, None]
        state |= {f"{b}.attn.W_O": out, f"{b}.attn.b_O": r(d), f"{b}.mlp.W_in": r(d, m), f"{b}.mlp.b_in": r(m)}
        state |= {f"{b}.mlp.W_out": r(m, d) * float(f"m{i}" in circuit), f"{b}.mlp.b_out": r(d)}
    folder.mkdir()
    torch.save(state, folder / "ll_model_510.pth")
    (folder / "meta_510.json").write_text("{}")
    (folder / "ll_model_cfg_510.json").write_text(json.dumps(config))
    (folder / "edges.pkl").write_bytes(pickle.dumps(edges))
    return folder


EDGES = [
    ("blocks.0.hook_resid_pre", "blocks.0.hook_v_input[1]"),
    ("blocks.0.attn.hook_result[1]", "blocks.1.hook_mlp_in"),
    ("blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"),
]


def test_interpbench_nodes_of_the_circuit_and_no_others_move_the_output(tmp_path: Path) -> None:
    folder = write_hooked(tmp_path / "11", ("a0.h1", "m1"), EDGES)
    found = published.interpbench(folder, n=12, length=6)
    rows = {row["site"]: row for row in found.to_frame().filter(found.to_frame()["measure"] == "effect").to_dicts()}
    assert {node: row["position"] for node, row in rows.items() if row["position"] == "circuit"} == {
        "a0.h1": "circuit", "m1": "circuit",
    }  # fmt: skip
    for node, row in rows.items():
        assert (row["value"] > 0.05) if row["position"] == "circuit" else (row["value"] < 1e-6), node
    assert found.value("node_auroc", "interchange") == 1.0
    chance = found.to_frame().filter(found.to_frame()["method"] == "random").to_dicts()[0]
    assert chance["lo"] < 0.5 < chance["hi"]
    # a circuit that names the wrong nodes is found out
    wrong = write_hooked(tmp_path / "12", ("a0.h0", "m0"), EDGES)
    assert published.interpbench(wrong, n=12).value("node_auroc", "interchange") == 0.25  # ties count half
    # by hand: the effect of one head on one pair
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6], [0, 2, 1], [3, 3, 5]])
    told = published.interpbench(folder, tokens=tokens)
    from headwater.bench.siit import load_interpbench
    from headwater.core.interventions import replace

    model = load_interpbench(folder).model
    base, other = model.run(tokens[:2]).logits, model.run(tokens[2:], capture=["z.0.h1"])
    moved = model.run(tokens[:2], interventions=[replace("z.0.h1", other["z.0.h1"])]).logits
    shares = (moved - base).flatten(1).norm(dim=1) / (other.logits - base).flatten(1).norm(dim=1)
    assert told.value("effect", "interchange", site="a0.h1") == pytest.approx(float(shares.mean()), rel=1e-5)
    with pytest.raises(MethodError, match="pairs of inputs"):
        published.interpbench(folder, tokens=tokens[:3])


# --- the real model ---------------------------------------------------------------------------------------------------


@pytest.mark.real_model
@pytest.mark.slow
def test_benchmarks_on_the_real_model(
    smollm2: "Model", shared_data: Path, summary_table: Callable[[str], None]
) -> None:
    sites = ["resid_post.4", "resid_post.16", "resid_post.28"]
    pairs = published.read_pairs(shared_data / "sva" / "nounpp_train.json")
    gym = published.causalgym(smollm2, pairs, sites=sites, n=12, n_train=40)
    assert gym.facts["accuracy"] > 0.9
    # the whole vector at the end of a late layer carries the number of the verb; a random direction does not
    late = {"site": "resid_post.28", "position": "span 4"}
    assert gym.value("log_odds_ratio", "full", **late) > 2.0
    assert abs(gym.value("log_odds_ratio", "random", **late)) < 0.5
    ioi = published.causal_variable(smollm2, published.indirect_object(shared_data / "mib", n=40), site="resid_post.28")
    assert ioi.value("iia", "full") > 0.8
    summary_table(f"{gym.to_frame().filter(gym.to_frame()['measure'] == 'overall')}\n{ioi.to_frame()}")
