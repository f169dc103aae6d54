"""What changed between two models: a planted wrapper is found and undone, a destroyed mechanism is told from it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import headwater as hw
from headwater.behavior.table import Behavior
from headwater.cli import app
from headwater.core.errors import MethodError, ModelError
from headwater.core.model import Model
from headwater.core.results import load_result
from headwater.dynamics.delta import DeltaResult, delta
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

TEXT = "cat dog house river tree bird book coin city store water cloud horse green black ring"
WORDS = TEXT.split()


def model(hf: Any) -> Model:
    return hw.load(hf, tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def old() -> Model:
    return model(tiny_gpt2(n_layer=2))


@pytest.fixture(scope="module")
def behavior(old: Model) -> Behavior:
    """What the model itself answers, against what it gives least of all."""
    texts = [f"The {a} {b}" for a in WORDS[:8] for b in WORDS[8:]][:24]
    known = [w for w in WORDS if len(old.tokenizer(" " + w)["input_ids"]) == 1]
    ids = torch.tensor([old.tokenizer(" " + w)["input_ids"][0] for w in known])
    rows: list[dict[str, Any]] = []
    for text in texts:
        logits = old.run(text, logits="last").logits[0, ids]
        rows.append(
            {"prompt": text, "counterfactual": text.replace("The ", "At "),
             "answers": [" " + known[int(logits.argmax())]], "foils": [" " + known[int(logits.argmin())]]}
        )  # fmt: skip
    return Behavior.from_rows(rows, name="own answers")


def wrapped(old: Model) -> Model:
    """The old model with a few large weights of the last MLP that drown its answer."""
    hf = copy.deepcopy(old.hf)
    with torch.no_grad():
        weight = hf.transformer.h[1].mlp.c_proj.weight  # [M, D]
        generator = torch.Generator().manual_seed(0)
        places = torch.randperm(weight.numel(), generator=generator)[:20]
        weight.view(-1)[places] = 400 * (2 * torch.rand(20, generator=generator) - 1)
    return model(hf)


def test_a_wrapper_is_found_and_undone(old: Model, behavior: Behavior, tmp_path: Path) -> None:
    found = delta(old, wrapped(old), behavior, fractions=(0.0003, 0.001, 0.01), draws=3)
    assert found.verdict == "wrapper", found.facts
    assert found.facts["old"][0] > found.facts["new"][2]
    table = found.tables["revival"].to_dicts()
    best = {one["how"]: one for one in table if one["fraction"] == 0.001}
    assert best["prune"]["back"] > 0.9 and best["prune"]["null_most"] < 0.5
    assert best["restore"]["value"] == pytest.approx(found.facts["old"][0], abs=1e-3)  # these are all that moved
    moved = found.tables["components"].sort("share", descending=True).row(0, named=True)
    assert moved["component"] == "mlp 1" and moved["share"] == pytest.approx(1.0)
    assert found.tables["components"]["change"].sum() == pytest.approx(moved["change"])
    layers = found.tables["layers"]
    assert layers["back"][0] == pytest.approx(1.0, abs=1e-3)  # the first layer is as it was, and is read on by the old
    assert layers["value"][1] == pytest.approx(found.facts["new"][0], abs=1e-4)  # all of the new one's blocks
    again = load_result(found.save(tmp_path / "delta"), check=True)
    assert isinstance(again, DeltaResult) and again.verdict == "wrapper"


def test_a_destroyed_mechanism_is_no_wrapper(old: Model, behavior: Behavior) -> None:
    hf = copy.deepcopy(old.hf)
    with torch.no_grad():
        for block in hf.transformer.h:
            for name, weight in block.named_parameters():
                if weight.ndim == 2:
                    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
                    weight.copy_(noise * weight.std())
    found = delta(old, model(hf), behavior, fractions=(0.01, 0.1), draws=3)
    assert found.verdict == "mechanism", found.facts
    assert found.tables["revival"].filter(found.tables["revival"]["how"] == "prune")["back"].max() < 0.5


def test_nothing_lost_nothing_found(old: Model, behavior: Behavior) -> None:
    found = delta(old, old, behavior, fractions=(0.01,), draws=1)
    assert found.verdict == "nothing lost" and found.facts["lost"] == 0.0
    assert found.tables["components"]["change"].to_list() == [0.0] * found.tables["components"].height


def test_components_are_all_weights_once() -> None:
    a, b = (model(tiny_llama(seed=seed)) for seed in (0, 1))
    table = delta(a, b).tables["components"]
    total = sum(weight.numel() for weight in a.hf.parameters())
    assert table["weights"].sum() == total and table["share"].sum() == pytest.approx(1.0)
    assert set(table["kind"]) == {"embedding", "unembedding", "attention", "mlp", "norm", "final norm"}
    attention = table.filter(table["component"] == "attention 2").row(0, named=True)
    parts = [list(one.hf.model.layers[2].self_attn.parameters()) for one in (a, b)]
    change = torch.cat([(y - x).detach().flatten() for x, y in zip(*parts, strict=True)]).norm()
    assert attention["change"] == pytest.approx(float(change), rel=1e-5)


def test_the_probe_finds_what_is_there(old: Model) -> None:
    """The answer is the prompt's last word: at the last token any layer holds it."""
    rows = [
        {"prompt": f"{a} {b}", "counterfactual": f"{a} cat", "answers": [f" {b}"], "foils": [" cat"]}
        for b in ("dog", "river", "house")
        for a in WORDS[3:]
    ]
    behavior = Behavior.from_rows(rows, name="last word")
    table = delta(old, model(tiny_gpt2(n_layer=2, seed=3)), behavior, fractions=(0.01,), draws=1).tables["layers"]
    assert table["probe_classes"].to_list() == [3, 3]
    assert min(table["probe_old"].to_list() + table["probe_new"].to_list()) > 0.7  # of three answers


def test_what_does_not_fit_is_refused(old: Model) -> None:
    with pytest.raises(ModelError, match="other shapes"):
        delta(old, model(tiny_gpt2(n_layer=3)))
    with pytest.raises(MethodError, match="fractions"):
        delta(old, old, fractions=())


def test_from_the_command_line(old: Model, tmp_path: Path) -> None:
    for name, one in (("a", old), ("b", wrapped(old))):
        one.hf.save_pretrained(tmp_path / name)
        one.tokenizer.save_pretrained(tmp_path / name)
    done = CliRunner().invoke(app, ["delta", str(tmp_path / "a"), str(tmp_path / "b"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["components"][0]["weights"] > 0
