"""headwater trace, resume, verify and report, from the outside; and what is left when they are stopped."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from headwater.cli import app
from headwater.core import files
from headwater.core.store import RunFolder

SMALL = """
behavior: ioi
n: 16
localize: {n_patch: 2, steps: 1, n_attribution: 4, patch_sites: ["resid_post.1"]}
circuit: {n_choose: 2, n_test: 4, fractions: [0.1, 1.0]}
heads: {least: 0.02, top: 1, sequences: 1, length: 4, null_heads: 1, n_train: 2, n_test: 4}
claims: {n_test: 4, null_circuits: 2, n_null: 2, random_sets: 1, n_heads_test: 4, random_models: 1, n_random_models: 2}
act: {n: 4, n_train: 4, n_search: 2, others: [agreement], n_others: 2, texts: 1, text_tokens: 8, controls: 1}
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object, says: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    *progress, error = done.stderr.strip().splitlines()
    assert error.startswith("error: ") and all(line.endswith(" s") for line in progress), done.stderr
    assert says in error


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(SMALL)
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, config: Path, tiny_folder: Path) -> tuple[Path, Result]:
    """A whole run, and what the command printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run("trace", "--config", config, "--model", tiny_folder, "--out", folder)


@pytest.fixture
def copy(whole: tuple[Path, Result], tmp_path: Path) -> Path:
    """A whole run of one's own, to spoil."""
    return Path(shutil.copytree(whole[0], tmp_path / "copy"))


def readable(folder: Path, *stages: str) -> bool:
    """Whether these stages are stored and unharmed."""
    store = RunFolder.open(folder)
    return all(store.load_stage(stage, check=True) is not None for stage in stages)


def test_trace_says_what_was_found_and_where_the_report_is(whole: tuple[Path, Result]) -> None:
    folder, done = whole
    assert done.exit_code == 0, done.stderr
    assert f"Report: {folder / 'report.html'}" in done.stdout
    assert "tiny-llama" in done.stdout  # the verdict names the model
    assert f"headwater verify {folder}" in done.stdout
    assert (folder / "report.html").read_text().startswith("<!")
    # Progress is on stderr: one line a stage.
    assert [line.split(":")[0] for line in done.stderr.splitlines() if line.endswith(" s")] == [
        *("behavior", "localize", "circuit", "heads", "claims", "act", "report")
    ]


def test_resume_of_a_finished_run_changes_nothing(whole: tuple[Path, Result]) -> None:
    folder, first = whole
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = run("resume", folder)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == first.stdout
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_verify(whole: tuple[Path, Result], copy: Path) -> None:
    done = run("verify", whole[0], "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) >= 7 and all(row["same"] for row in rows)

    table = copy / "stages" / "claims" / "ledger" / "claims.parquet"
    table.write_bytes(table.read_bytes()[:-10])
    refused("verify", copy, says="damaged")


def test_report_is_written_again(whole: tuple[Path, Result], copy: Path) -> None:
    (copy / "report.html").unlink()
    done = run("report", copy, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == {"report": str(copy / "report.html")}
    assert (copy / "report.html").read_text().startswith("<!")


@pytest.mark.parametrize("command", ["resume", "verify", "report"])
def test_a_folder_that_holds_no_run(command: str, tmp_path: Path) -> None:
    refused(command, tmp_path / "nothing", says="no such run")
    (tmp_path / "other.txt").write_text("x")
    refused(command, tmp_path, says="run.json")


@pytest.mark.parametrize("command", ["resume", "verify", "report"])
def test_a_run_of_another_version(command: str, copy: Path) -> None:
    head = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**head, "format": 99}))
    refused(command, copy, says="format 99")
    assert (copy / "stages" / "claims" / "ledger" / "claims.parquet").exists()


def test_a_stage_of_another_version(copy: Path) -> None:
    file = copy / "stages" / "claims" / "ledger" / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 0}))
    refused("verify", copy, says="format 0")
    assert readable(copy, "behavior", "localize")


def test_a_folder_with_another_run(whole: tuple[Path, Result], config: Path, tiny_folder: Path, tmp_path: Path) -> None:
    folder, _ = whole
    refused("trace", "--config", config, "--model", tiny_folder, "--out", folder, "--seed", 1, says="seed")
    assert readable(folder, "behavior", "claims")
    (tmp_path / "thesis.txt").write_text("precious")
    refused("trace", "--config", config, "--model", tiny_folder, "--out", tmp_path, says="something else")
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_settings_that_make_no_sense(tmp_path: Path, tiny_folder: Path) -> None:
    file = tmp_path / "i.yaml"
    trace = ("trace", "--config", file, "--model", tiny_folder, "--out", tmp_path / "run")
    for text, says in [
        ("behavior: [", "not YAML"),
        ("just words", "no settings"),
        ("behaviour: ioi", "behavior"),
        ("behavior: ioi\ncircuit: {edgs: 3}", "edges"),
        ("behavior: ioi\nn: many", "n:"),
    ]:
        file.write_text(text)
        refused(*trace, says=says)
    refused("trace", "--config", tmp_path / "nothing.yaml", says="nothing.yaml")
    refused("trace", "ioi", says="model and out")
    refused("trace", "ioi", "--model", tiny_folder, "--out", tmp_path / "run", "--stages", "lokalize", says="localize")
    refused("trace", "nosuch", "--model", tiny_folder, "--out", tmp_path / "run", says="unknown behavior")
    refused("trace", "ioi", "--model", tmp_path / "nosuch", "--out", tmp_path / "run", says="no such file")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_a_folder_that_nobody_can_write_to(config: Path, tiny_folder: Path) -> None:
    refused("trace", "--config", config, "--model", tiny_folder, "--out", "/proc/headwater", says="/proc/headwater")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fills_up_on_the_way(
    number: int, config: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage cannot be written: the first stays, nothing half-written is left, and the run goes on later."""
    folder = tmp_path / "run"
    trace = ("trace", "--config", config, "--model", tiny_folder, "--out", folder, "--stages", "localize")
    real = files.write_bytes

    def full(path: Path, data: bytes) -> None:
        if "behavior" in path.as_posix().removeprefix(folder.as_posix()) or path.parent == folder:
            return real(path, data)
        real(path, data[: len(data) // 2])
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patched:
        for name, module in list(sys.modules.items()):
            if name.startswith("headwater.") and getattr(module, "write_bytes", None) is real:
                patched.setattr(module, "write_bytes", full)
        refused(*trace, says=os.strerror(number))
    assert RunFolder.open(folder).stages == ["behavior"]
    assert readable(folder, "behavior")
    done = run(*trace)
    assert done.exit_code == 0, done.stderr
    assert readable(folder, "behavior", "localize")
    assert not [path for path in folder.rglob(".*")]


def wait_for(file: Path, process: "subprocess.Popen[Any]") -> None:
    for _ in range(3000):
        if file.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{file} was never written")


def test_ctrl_c_says_how_to_go_on_and_leaves_what_was_stored(
    config: Path, tiny_folder: Path, tmp_path: Path, whole: tuple[Path, Result]
) -> None:
    folder = tmp_path / "my run"
    command = [sys.executable, "-m", "headwater", "trace", "--config", config, "--model", tiny_folder, "--out", folder]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
    wait_for(folder / "stages" / "behavior" / "stage.json", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, (out, err)
    assert err.splitlines()[-1].startswith("Interrupted. ")
    assert err.rstrip().endswith(f"headwater resume '{folder}'")
    assert "Traceback" not in err
    assert readable(folder, "behavior")

    done = run("resume", folder)
    assert done.exit_code == 0, done.stderr
    assert RunFolder.open(folder).hashes() == RunFolder.open(whole[0]).hashes()


def test_pairs_of_ones_own(tmp_path: Path, tiny_folder: Path, config: Path) -> None:
    file = tmp_path / "pairs.csv"
    nouns, others = ("boy", "girl", "teacher", "uncle"), ("dog", "cat", "key")
    pairs = [f"The {noun}s near the {other},The {noun} near the {other}, are, is" for noun in nouns for other in others]
    file.write_text("\n".join(["prompt,counterfactual,answer,foil", *pairs]) + "\n")
    folder = tmp_path / "run"
    options = ("--config", config, "--n", 12, "--model", tiny_folder, "--out", folder, "--stages", "circuit")
    done = run("trace", file, *options)
    assert done.exit_code == 0, done.stderr
    assert readable(folder, "behavior", "localize", "circuit")
