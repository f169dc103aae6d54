"""bench list, train, check, recover and toys; a training run killed at any moment goes on to the same weights."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import headwater as hw
from headwater.cli import app

TINY = (
    "length=3", "n_layers=1", "n_heads=2", "d_model=8", "d_mlp=8", "batch=8", "steps=6", "check_every=3",
    "check_rows=8",
)  # fmt: skip


def sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def cli(*arguments: str | Path, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == code, done.output
    return done


def refused(*arguments: str | Path, says: str) -> None:
    text = cli(*arguments, code=2).stderr.strip()
    assert text.startswith("error: ") and len(text.splitlines()) == 1, text
    assert says in text, text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "made"
    said = cli("bench", "train", "repeats", "--out", folder, "--checks", "20", *sets(*TINY)).stdout
    assert "recover eap_ig" in said and "passed" in said
    return folder


def test_list_names_every_config() -> None:
    from headwater.bench.siit import configs

    rows = json.loads(cli("bench", "list", "--json").stdout)
    assert [row["name"] for row in rows] == configs.names()
    assert "ioi_llama" in cli("bench", "list").stdout


def test_train_leaves_a_model_its_mechanism_and_its_checks_and_nothing_else(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "mechanism", "mechanism.json", "report", "behavior.parquet", "siit.json",
    }  # fmt: skip
    pairs = hw.behavior(str(made / "behavior.parquet"))
    assert pairs.bind(hw.load(made)).n == pairs.n
    assert hw.load_result(made / "report").facts["n"] == 20


def test_a_run_that_is_done_is_loaded_and_another_config_refused(made: Path) -> None:
    before = (made / "model.safetensors").stat().st_mtime_ns
    arguments = ("bench", "train", "repeats", "--out", made, *sets(*TINY))
    facts = json.loads(cli(*arguments, "--json").stdout)["facts"]
    assert facts["n"] == 20 and (made / "model.safetensors").stat().st_mtime_ns == before
    refused(*arguments, "--set", "seed=3", says="seed=0, not 3")
    refused("bench", "train", "previous", "--out", made, *sets(*TINY), says="graph='repeats', not 'previous'")


def test_check_takes_other_inputs(made: Path) -> None:
    found = json.loads(cli("bench", "check", made, "--n", "30", "--json").stdout)
    assert found["facts"]["n"] == 30 and {row["node"] for row in found["nodes"]} >= {"model", "m0"}
    assert "against the causal graph" in cli("bench", "check", made, "--n", "30", "--seed", "5").stdout


@pytest.mark.parametrize(("method", "setting"), [("eap_ig", "steps=2"), ("patch", "sites=[head, mlp_out]")])
def test_recover_says_where_the_true_nodes_rank(made: Path, method: str, setting: str) -> None:
    arguments = ("bench", "recover", method, made, "--n", "12", "--set", setting)
    found = json.loads(cli(*arguments, "--json").stdout)
    assert found["n_true_nodes"] == 2 and found["n_nodes"] == 3 and 0 <= found["node_auroc"] <= 1
    assert (found["edge_auroc"] is None) == (method == "patch")
    assert "nodes by score" in cli(*arguments).stdout


def test_toys_are_listed_and_trained(tmp_path: Path) -> None:
    names = [row["name"] for row in json.loads(cli("bench", "toys", "list", "--json").stdout)]
    assert {"superposition_phases", "modular_addition", "symmetric"} <= set(names)
    small = sets("steps=2", "batch=4", "densities=[0.5, 0.1]", "importances=[1.0]", "tries=1")
    found = json.loads(
        cli("bench", "toys", "train", "superposition_phases", "--out", tmp_path / "s", *small, "--json").stdout
    )
    assert found["facts"]["n_instances"] == 2 and hw.load_result(tmp_path / "s").kind == "superposition"
    said = cli("bench", "toys", "train", "symmetric", "--out", tmp_path / "g", *sets("group=S3", "steps=2", "every=1"))
    assert "algebra" in said.stdout and hw.load(tmp_path / "g").n_layers == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "iol", "--out", "x"], "ioi"),
        (["train", "ioi", "--out", "x", "--set", "stepps=3"], "steps"),
        (["train", "ioi", "--out", "x", "--set", "steps=many"], "steps"),
        (["train", "ioi", "--out", "x", "--set", "steps"], "NAME=VALUE"),
        (["train", "ioi", "--out", "x", "--set", "d_model=30"], "d_model"),
        (["train", "ioi", "--out", "x", "--set", "family=gpt3"], "family"),
        (["train", "ioi", "--out", "x", "--set", "n_layers=1"], "needs more layers"),
        (["train", "ioi", "--out", "x", "--set", "graph=nothing"], "ioi"),
        (["check", "nowhere"], "siit.json"),
        (["recover", "eap_ig", "nowhere"], "siit.json"),
        (["toys", "train", "symetric", "--out", "x"], "symmetric"),
        (["toys", "train", "symmetric", "--out", "x", "--set", "group=S9"], "3, 4 or 5"),
        (["toys", "train", "symmetric", "--out", "x", "--set", "stepps=9"], "steps"),
        (["toys", "train", "superposition_phases", "--out", "x", "--set", "densities=[0]"], "densities"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_paragraph(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused("bench", *arguments, says=says)
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


def test_recover_refuses_what_scores_nothing(made: Path) -> None:
    refused("bench", "recover", "eap_gi", made, says="eap_ig")
    refused("bench", "recover", "subspace_check", made, "--n", "4", says="")


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    refused("bench", "train", "repeats", "--out", tmp_path / "taken", *sets(*TINY), says="taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_killed_while_training_it_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL some steps after a check was stored, at a moment that nobody chose."""
    long = sets(*TINY, "steps=60", "check_every=5", "patience=60")
    command = ["bench", "train", "repeats", "--checks", "8", *long, "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    child = subprocess.Popen(
        [sys.executable, "-c", "from headwater.cli import main; main()", *command, str(killed)],
        stdout=subprocess.DEVNULL,
    )
    state, deadline = killed / "training" / "state.json", time.monotonic() + 240
    while not state.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (killed / "siit.json").exists()
    step = json.loads(state.read_text())["step"]
    assert 0 < step < 60
    for folder in (killed, whole):
        cli(*command, folder)
    one, other = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    assert one.keys() == other.keys() and all(bool((one[key] == other[key]).all()) for key in one)
    histories = [json.loads((folder / "siit.json").read_text())["history"] for folder in (killed, whole)]
    assert histories[0] == histories[1] and len(histories[0]) == 12
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
