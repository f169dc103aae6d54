"""Edited models as folders: what transformers loads from them, and the way back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import headwater as hw
import localize_families
import tiny
from headwater.act import Delta, Edit, applied, undo
from headwater.act.exporting import export, list_edits, restore
from headwater.core.errors import ModelError, StoreError


def edits_for(model: Any, n: int = 2) -> list[Edit]:
    names = [name for name, value in model.hf.named_parameters() if value.ndim == 2]
    shapes = dict(model.hf.named_parameters())
    made = []
    for at in range(n):
        shape = shapes[names[at + 1]].shape
        factors = torch.randn(shape[0], 1), torch.randn(1, shape[1])
        made.append(Edit.of(model, f"edit {at}", [Delta.low_rank(names[at + 1], *factors)]))
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "qwen2"])
def test_transformers_loads_what_was_exported(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(localize_families._config(family)).eval()
    model = hw.load(hf)
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    for edit in edits_for(model):
        edit.apply(model)
    folder = export(model, tmp_path / "edited")
    back = AutoModelForCausalLM.from_pretrained(folder)
    for name, value in hf.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert len(applied(model)) == 2
    assert [edit.name for edit in list_edits(folder)] == ["edit 0", "edit 1"]
    loaded = hw.load(folder)
    assert loaded.fingerprint == model.fingerprint
    restore(folder, loaded)
    assert all(torch.equal(value, before[name]) for name, value in loaded.hf.state_dict().items())
    undo(model, all=True)
    assert loaded.fingerprint == model.fingerprint
    for edit in list_edits(folder):
        edit.apply(loaded)
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in loaded.hf.state_dict().items())


def test_an_edit_that_was_made_on_an_edited_model_is_exported_by_itself(tmp_path: Path) -> None:
    model = hw.load(tiny.tiny_llama(), tokenizer=tiny.tiny_tokenizer())
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    first = edits_for(model, 1)[0]
    first.apply(model)
    second = edits_for(model, 1)[0]  # for the model with the first on it
    second.apply(model)
    undo(model, first)
    now = {name: value.clone() for name, value in model.hf.state_dict().items()}
    versions = [parameter._version for parameter in model.hf.parameters()]
    folder = export(model, tmp_path / "edited")
    assert applied(model) == [second]
    assert all(torch.equal(value, now[name]) for name, value in model.hf.state_dict().items())
    assert versions == [parameter._version for parameter in model.hf.parameters()]  # it was only read
    loaded = restore(folder, hw.load(folder))
    assert all(torch.equal(value, before[name]) for name, value in loaded.hf.state_dict().items())


def test_half_precision_and_shards_come_back(tmp_path: Path) -> None:
    model = hw.load(tiny.tiny_llama(torch.bfloat16), tokenizer=tiny.tiny_tokenizer())
    before = model.fingerprint
    edits_for(model, 1)[0].apply(model)
    folder = export(model, tmp_path / "edited")
    loaded = hw.load(folder, dtype="bfloat16")
    assert loaded.tokenizer is not None
    assert restore(folder, loaded).fingerprint == before
    with pytest.raises(ModelError, match="not the one that was exported"):
        restore(folder, hw.load(folder))  # single precision on a CPU: other weights


def test_what_cannot_be_exported_or_restored(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = hw.load(tiny.tiny_llama(), tokenizer=tiny_tokenizer)
    with pytest.raises(ModelError, match="no edit to export"):
        export(model, tmp_path / "none")
    with pytest.raises(StoreError, match="holds no edited model"):
        list_edits(tmp_path)
    edits_for(model, 1)[0].apply(model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("something else")
    with pytest.raises(StoreError, match="will not write over"):
        export(model, tmp_path / "full")
    folder = export(model, tmp_path / "edited")
    export(model, folder)  # an edited model may be replaced by one
    record = folder / "headwater_edits" / "edits.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps({**facts, "edits": ["../../secret"]}))
    with pytest.raises(StoreError, match="not whole"):
        list_edits(folder)


def test_the_commands(tmp_path: Path, tiny_folder: Path, run_cli: Any) -> None:
    file, edited, restored = tmp_path / "edit.safetensors", tmp_path / "edited", tmp_path / "restored"
    done = run_cli(
        "act", "run", "repair", "ioi", "--model", str(tiny_folder), "--n", "24", "--set", "n=4", "--set", "top=2",
        "--controls", "1", "--no-prompting", "--other", "agreement", "--out", str(file), "--json",
    )  # fmt: skip
    found = json.loads(done)
    assert {row["measure"] for row in found["rows"]} >= {"ioi logit_diff", "agreement logit_diff", "text perplexity"}
    assert found["costs"][0]["weights_changed"] > 0
    listed = json.loads(run_cli("edit", "list", str(file), "--json"))
    assert listed[0]["kinds"] == ["slices"] and listed[0]["model"]
    run_cli("edit", "apply", str(file), "--model", str(tiny_folder), "--out", str(edited))
    assert json.loads(run_cli("edit", "list", str(edited), "--json"))[0]["edit"] == listed[0]["edit"]
    run_cli("edit", "undo", str(edited), "--out", str(restored))
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tiny_folder, restored))
    three = AutoModelForCausalLM.from_pretrained(edited).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], three[name]) for name in one)
    names = [row["name"] for row in json.loads(run_cli("act", "methods", "--json"))]
    assert {"caa", "rome", "memit", "cast"} <= set(names)
    assert "known failure" in run_cli("act", "methods", "rome")
    assert "rome" in run_cli("act", "methods")


def test_mistakes_at_the_command_line(tmp_path: Path, tiny_folder: Path, run_cli: Any) -> None:
    assert "caa" in run_cli("act", "run", "caaa", "ioi", "--model", str(tiny_folder), code=2)
    assert "unknown option" in run_cli(
        "act", "run", "caa", "ioi", "--model", str(tiny_folder), "--n", "12", "--set", "nosuch=1", code=2
    )
    assert "NAME=VALUE" in run_cli("act", "run", "caa", "ioi", "--model", str(tiny_folder), "--set", "x", code=2)
    assert "No such file" in run_cli("edit", "list", str(tmp_path / "none"), code=2)
    assert "no edited model" in run_cli("edit", "undo", str(tiny_folder), "--out", str(tmp_path / "o"), code=2)


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Any:
    from headwater.cli import main

    def run(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        told = capsys.readouterr()
        assert (left.value.code or 0) == code, told.err
        return " ".join((told.err if code else told.out).split()) if code else told.out

    return run
