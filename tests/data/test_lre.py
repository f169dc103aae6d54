"""The LRE equals its definition: Jacobians by torch.func.jacrev, edits by a plain pseudo-inverse, float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import headwater as hw
import tiny
from headwater.core.errors import HeadwaterError
from headwater.data import LreResult, Relation, linear_relation
from headwater.data.lre import fit

PAIRS = [
    ("France", "Paris"), ("South Korea", "Seoul"), ("Italy", "Rome"), ("Peru", "Lima"), ("New Zealand", "Wellington"),
    ("Japan", "Tokyo"), ("Norway", "Oslo"), ("Egypt", "Cairo"), ("Kenya", "Nairobi"), ("Chile", "Santiago"),
]  # fmt: skip
RELATION = Relation(name="capitals", templates=("The capital of {} is", "{} has the capital"), samples=tuple(PAIRS))


class Plain:
    """The model by hand: hooks on the transformers module, one prompt at a time."""

    def __init__(self, family: str) -> None:
        make = {"gpt2": tiny.tiny_gpt2, "llama": tiny.tiny_llama}[family]
        self.hf = make(torch.float64, attn_implementation="eager").requires_grad_(False)
        self.tokenizer = tiny.tiny_tokenizer()
        self.body = getattr(self.hf, "transformer", None) or self.hf.model
        self.blocks = self.body.h if family == "gpt2" else self.body.layers
        self.norm = self.body.ln_f if family == "gpt2" else self.body.norm

    def run(self, text: str, layer: int, end: int, put: Any = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(h at the subject's last token, z, logits at the last token); `put` is put in place of h."""
        coded = self.tokenizer(text, return_offsets_mapping=True)
        at = [i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < end <= b][-1]
        seen: dict[str, torch.Tensor] = {}

        def swap(_: Any, __: Any, output: Any) -> Any:
            stream = output if isinstance(output, torch.Tensor) else output[0]
            seen["h"] = stream[0, at]
            if put is None:
                return output
            stream = torch.cat([stream[:, :at], put[None, None], stream[:, at + 1 :]], dim=1)
            return stream if isinstance(output, torch.Tensor) else (stream, *output[1:])

        def keep(_: Any, __: Any, output: Any) -> None:
            seen["z"] = (output if isinstance(output, torch.Tensor) else output[0])[0, -1]

        hooks = [self.blocks[layer].register_forward_hook(swap), self.blocks[-1].register_forward_hook(keep)]
        try:
            logits = self.hf(torch.tensor([coded["input_ids"]]), use_cache=False).logits[0, -1]
        finally:
            for hook in hooks:
                hook.remove()
        return seen["h"], seen["z"], logits

    def says(self, z: torch.Tensor) -> int:
        return int(self.hf.lm_head(self.norm(z)).argmax())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_jacobians_and_edits_are_those_of_the_definition(family: str) -> None:
    plain, layer, rank = Plain(family), 1, 6
    model = hw.load(plain.hf, tokenizer=plain.tokenizer)
    result = linear_relation(
        model, RELATION, examples=3, layers=(layer,), ranks=(rank,), betas=(0.5, 2.0), known=False, seed=4
    )
    answers = dict(PAIRS)
    train = [(name, answers[name]) for name in result.facts["trained_on"]]
    jacobians, offsets = [], []
    for subject, _ in train:
        text, _, end = RELATION.prompt(subject, train, RELATION.templates[0])
        assert f"{subject} is {answers[subject]}" not in text
        h, z, _ = plain.run(text, layer, end)
        jacobians.append(torch.func.jacrev(lambda x, t=text, e=end: plain.run(t, layer, e, x)[1], chunk_size=1)(h))
        offsets.append(z - jacobians[-1] @ h)
    weight, bias = torch.stack(jacobians).mean(0), torch.stack(offsets).mean(0)
    assert torch.allclose(result.tensors["weight"], weight, atol=1e-10)
    assert torch.allclose(result.tensors["bias"], bias, atol=1e-10)

    u, s, vh = torch.linalg.svd(weight)
    inverse = vh[:rank].T @ torch.diag(1 / s[:rank]) @ u[:, :rank].T
    rows = result.tables["examples"].to_dicts()
    assert len(rows) == 7
    asked = {row["subject"]: RELATION.prompt(row["subject"], train, RELATION.templates[0]) for row in rows}
    own = {name: plain.run(text, layer, end) for name, (text, _, end) in asked.items()}
    word = lambda token: plain.tokenizer.decode([token])  # noqa: E731
    for row in rows:
        text, _, end = asked[row["subject"]]
        h, z, logits = own[row["subject"]]
        assert row["said"] == word(int(logits.argmax()))
        assert row["lre"] == word(plain.says(result.facts["beta"] * (weight @ h) + bias))
        assert row["faithful"] == (row["lre"] == row["said"])
        aim = own[row["target"]]
        moved = plain.run(text, layer, end, h + inverse @ (aim[1] - z))[2]
        assert row["edited"] == word(int(moved.argmax()))
        assert row["causal"] == (int(moved.argmax()) == int(aim[2].argmax()))
    sweep = result.tables["sweep"]
    assert sweep.filter(sweep["what"] == "causality")["value"].to_list() == [sum(r["causal"] for r in rows) / 7]


def test_a_full_rank_edit_moves_z_exactly(tiny_model64: Any) -> None:
    found = fit(tiny_model64, RELATION, PAIRS[:3], RELATION.templates[0], "embed")
    change = torch.randn(4, found.bias.shape[0], dtype=torch.float64)
    assert torch.allclose(found.edit(change, 32) @ found.weight.T, change, atol=1e-6)
    assert found.edit(change, 0).abs().max() == 0


def test_where_the_model_is_linear_the_lre_is_perfect() -> None:
    hf = tiny.tiny_llama(torch.float64)
    last = hf.model.layers[-1]
    for weight in (last.self_attn.o_proj.weight, last.mlp.down_proj.weight):  # so that z is h
        torch.nn.init.zeros_(weight)
    model = hw.load(hf, tokenizer=tiny.tiny_tokenizer())
    ends = Relation(name="ends", templates=("Of {}",), samples=tuple(PAIRS))
    result = linear_relation(model, ends, examples=3, layers=("embed", 1), ranks=(0, 32), known=False)
    assert torch.allclose(result.tensors["weight"], torch.eye(32, dtype=torch.float64), atol=1e-12)
    assert result.tensors["bias"].abs().max() < 1e-12
    assert (result.facts["layer"], result.facts["rank"], result.facts["beta"]) == (1, 32, 1.0)
    assert (result.facts["causality"], result.facts["faithfulness"]) == (1.0, 1.0)
    sweep = result.tables["sweep"]
    assert sweep.filter((sweep["what"] == "causality") & (sweep["setting"] == 0))["value"].to_list() == [0.0, 0.0]
    assert set(sweep["layer"].to_list()) == {-1, 1}
    again = linear_relation(model, ends, examples=3, layers=("embed", 1), ranks=(0, 32), known=False)
    assert again.content_hash == result.content_hash


def test_it_saves_and_draws(tiny_model: Any, tmp_path: Path) -> None:
    result = linear_relation(tiny_model, RELATION, examples=2, layers=(0,), ranks=(0, 8), betas=(1.0,), known=False)
    assert LreResult.load(result.save(tmp_path / "lre"), check=True).facts == result.facts
    result.chart().to_dict()


@pytest.mark.parametrize(
    "options",
    [{"layers": (2,)}, {"layers": ("embed", 9)}, {"examples": 9}, {"examples": 1}, {"template": 5}, {"betas": ()},
     {"beta": 1.0}, {"known": True}],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tiny_model: Any, options: dict[str, Any]) -> None:
    with pytest.raises(HeadwaterError):
        linear_relation(tiny_model, RELATION, **{"examples": 3, "layers": (0,), "ranks": (4,), **options})


def test_relations_of_the_authors_are_read(shared_data: Path) -> None:
    files = sorted((shared_data / "lre").rglob("*.json"))
    relations = [Relation.load(file) for file in files]
    assert len(relations) == 47
    capitals = next(one for one in relations if one.name == "country capital city")
    assert ("Canada", "Ottawa") in capitals.samples
    text, start, end = capitals.prompt("Canada", [("Canada", "Ottawa"), ("Spain", "Madrid")], capitals.templates[1])
    assert text == "The capital of Spain is Madrid\nThe capital of Canada is"
    assert text[start:end] == "Canada"


def test_other_braces_of_a_template_are_text() -> None:
    """Files come from anywhere: a template fills in the subject and nothing else."""
    told = Relation(name="r", templates=("{x} {0.__class__} {} {y",), samples=(("a", "b"), ("c", "d")))
    text, start, end = told.prompt("c", [("a", "b")], told.templates[0])
    assert text == "{x} {0.__class__} a {y b\n{x} {0.__class__} c {y" and text[start:end] == "c"


def test_broken_relations_are_refused(tmp_path: Path) -> None:
    good = {"name": "r", "prompt_templates": ["{} is"], "samples": [{"subject": "a", "object": "b"}] * 2}
    for change in ({"samples": [{"subject": "a"}]}, {"prompt_templates": ["no place"]}, {"samples": 3}, {}):
        (tmp_path / "r.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(HeadwaterError):
            Relation.load(tmp_path / "r.json")
