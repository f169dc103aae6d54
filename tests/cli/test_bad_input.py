"""Every mistake a user can make ends with one paragraph that says how to mend it, and exit code 2."""

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import headwater as hw
import tiny
from headwater.cli import app
from headwater.core.errors import SiteError

GOOD = "prompt,counterfactual,answer,foil\n" + "The boys,The boy, are, is\nThe girls,The girl, are, is\n" * 1


def refused(*arguments: str, says: str) -> str:
    """Run a command that must be refused; what it said."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 2, (done.exit_code, done.output)
    text = done.stderr.strip()
    assert text.startswith("error: ") and "Traceback" not in text
    assert len(text.splitlines()) == 1, text
    assert says in text
    return text


def test_unknown_model(tmp_path: Path) -> None:
    assert "smollm2" in refused("evaluate", "ioi", "--model", "smollm22", says="smollm22")
    refused("evaluate", "ioi", "--model", str(tmp_path / "nothing"), says="no such file or folder")
    refused("evaluate", "ioi", "--model", str(tmp_path), says="config.json")


def test_unknown_behavior(tiny_folder: Path) -> None:
    text = refused("evaluate", "successr", "--model", str(tiny_folder), says="unknown behavior")
    assert "successor?" in text


def test_unknown_method(tiny_folder: Path) -> None:
    text = refused("localize", "eap_gi", "ioi", "--model", str(tiny_folder), says="unknown method")
    assert "eap_ig" in text


def test_unknown_site(tiny_folder: Path) -> None:
    localize = ("localize", "patch", "ioi", "--model", str(tiny_folder), "--n", "8", "--set")
    assert "resid_post" in refused(*localize, "sites=resid_pst.1", says="resid_pst")
    refused(*localize, "sites=resid_post.7", says="0 to 2")
    refused(*localize, "sites=head.1.h9", says="h9")
    refused(*localize, "sites=head@S9", says="S9")


def test_a_site_that_the_model_lacks(tmp_path: Path) -> None:
    import transformers

    size = {"vocab_size": len(tiny.tiny_tokenizer()), "hidden_size": 32, "num_hidden_layers": 2}
    transformers.MambaForCausalLM(transformers.MambaConfig(**size, state_size=4)).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    refused("localize", "patch", "ioi", "--model", str(tmp_path), "--n", "8", says="no circuit graph")
    with pytest.raises(SiteError, match="no attention"):
        hw.load(tmp_path).run("When Mary", capture="pattern.1")


def test_options_that_a_method_does_not_take(tiny_folder: Path) -> None:
    localize = ("localize", "eap", "ioi", "--model", str(tiny_folder), "--n", "8")
    refused(*localize, "--set", "nosuch=1", says="nosuch")
    refused(*localize, "--set", "nosuch", says="NAME=VALUE")
    refused(*localize, "--set", "steps=[1", says="steps")
    refused(*localize, "--metric", "nosuch", says="unknown metric")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.csv", "", "empty"),
        ("header.csv", "prompt,counterfactual,answer,foil\n", "no "),
        ("short.csv", "prompt,counterfactual,answer,foil\na,b\n", "cells"),
        ("columns.csv", "question,other\na,b\n", "counterfactual"),
        ("broken.jsonl", '{"prompt": "a", \n', "JSON"),
        ("binary.csv", b"\xff\xfe\x00\x01", "UTF-8"),
        ("pairs.parquet", b"not parquet at all", "arquet"),
        ("pairs.txt", "a,b\n", ".csv"),
        ("missing.csv", None, "no such file"),
    ],
)
def test_a_file_that_holds_no_pairs(
    tmp_path: Path, tiny_folder: Path, name: str, content: str | bytes | None, says: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("evaluate", str(file), "--model", str(tiny_folder), says=says)


def test_pairs_that_never_align(tmp_path: Path, tiny_folder: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("prompt,counterfactual,answer,foil\n" + "The man who saw the boy,The man, is, are\n" * 1)
    refused("evaluate", str(file), "--model", str(tiny_folder), says="lengths differ")


def test_a_prompt_longer_than_the_context(tmp_path: Path, tiny_folder: Path) -> None:
    file = tmp_path / "pairs.csv"
    long = " the" * 300
    file.write_text(f"prompt,counterfactual,answer,foil\nThe boys{long},The boy{long}, are, is\n")
    refused("evaluate", str(file), "--model", str(tiny_folder), says="too long")


def test_a_checkpoint_with_a_wrong_shape(tmp_path: Path, tiny_folder: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(tiny_folder, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    refused("evaluate", "ioi", "--model", str(broken), "--n", "4", says="shape")


def test_a_damaged_checkpoint(tmp_path: Path, tiny_folder: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(tiny_folder, broken)
    (broken / "model.safetensors").write_bytes(b"\x00" * 100)
    refused("evaluate", "ioi", "--model", str(broken), "--n", "4", says="cannot")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path, tiny_folder: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refused("evaluate", "ioi", "--model", str(tiny_folder), "--n", "4", "--out", str(locked / "r"), says="locked")


def test_out_that_cannot_be_written(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    options = ("--model", str(tiny_folder), "--n", "4", "--out", str(tmp_path / "file" / "result"))
    refused("evaluate", "ioi", *options, says=str(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("keep me")
    refused("evaluate", "ioi", *options[:-1], str(other), says="other")
    assert (other / "precious.txt").read_text() == "keep me"
