"""headwater circuit show|compare|evaluate|mib."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import headwater as hw
from headwater.cli import app
from headwater.localize.circuit import Circuit

run = CliRunner().invoke


@pytest.fixture(scope="module")
def files(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("circuits")
    scores = hw.localize.eap(hw.load(str(tiny_folder)), hw.behavior("ioi", n=8, seed=0))
    scores.circuit(edges=120).to_json(folder / "a.json")
    scores.circuit(edges=60).to_json(folder / "b.json")
    scores.circuit(edges=120).save(folder / "saved")
    return {"a": folder / "a.json", "b": folder / "b.json", "saved": folder / "saved"}


def test_show(files: dict[str, Path]) -> None:
    done = run(app, ["circuit", "show", str(files["a"]), "--top", "3"])
    assert done.exit_code == 0 and "edges" in done.stdout and "logits" in done.stdout
    told = json.loads(run(app, ["circuit", "show", str(files["saved"]), "--json"]).stdout)
    assert told["edges"] == Circuit.load(files["saved"]).n_edges
    assert len(told["strongest"]) == 20 and "logits" in told["nodes"]


def test_compare(files: dict[str, Path]) -> None:
    told = json.loads(run(app, ["circuit", "compare", str(files["a"]), str(files["b"]), "--n", "20", "--json"]).stdout)
    found = {(row["what"], row["measure"]): row for row in told}
    # the smaller is cut from the same ranking, so all of it lies in the larger
    assert found["edges", "precision"]["value"] == 1.0
    assert found["edges", "iou"]["p"] < 0.05
    done = run(app, ["circuit", "compare", str(files["a"]), str(files["b"]), "--n", "5"])
    assert done.exit_code == 0 and "heads" in done.stdout


def test_evaluate(files: dict[str, Path], tiny_folder: Path) -> None:
    words = ["circuit", "evaluate", str(files["saved"]), "ioi", "--model", str(tiny_folder), "--n", "8"]
    told = json.loads(run(app, [*words, "--ablation", "counterfactual", "--ablation", "zero", "--json"]).stdout)
    assert [(row["measure"], row["ablation"]) for row in told] == [
        (measure, ablation) for measure in ("faithfulness", "completeness") for ablation in ("counterfactual", "zero")
    ]
    own = Circuit.load(files["saved"]).bind(hw.load(str(tiny_folder))).faithfulness(hw.behavior("ioi", n=8).test)
    assert told[0]["value"] == pytest.approx(own.value)


def test_mib(tiny_folder: Path, tmp_path: Path) -> None:
    words = ["circuit", "mib", "ioi", "--model", str(tiny_folder), "--n", "8", "--method", "eap", "--json"]
    done = run(app, [*words, "--out", str(tmp_path / "out"), "--submission", str(tmp_path / "sub")])
    told = json.loads(done.stdout)
    assert {(row["method"], row["rank"]) for row in told} == {
        (m, r) for m in ("eap", "random") for r in ("abs", "signed")
    }
    assert (tmp_path / "sub" / "eap_ioi.json").exists() and (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["circuit", "show", "nosuch.json"], "cannot read"),
        (["circuit", "mib", "arc_easy", "--model", "TINY"], "questions of others"),
        (["circuit", "mib", "mcqa", "--model", "TINY", "--data", "."], "cannot read MIB's list"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], says: str, tiny_folder: Path) -> None:
    done = run(app, [str(tiny_folder) if word == "TINY" else word for word in words])
    assert done.exit_code == 2
    assert says in done.stderr
