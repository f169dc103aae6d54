"""How the command line fails: the paragraph, the exit code, and nothing that drives a terminal."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from headwater.cli.guard import Guarded, printable, resumable
from headwater.core.errors import HeadwaterError, StoreError


def run(action: Callable[[], object]) -> Result:
    """A command line of one command, `go`, that does `action` under the guard."""
    app = typer.Typer(cls=Guarded, pretty_exceptions_enable=False)

    @app.callback()
    def about() -> None:
        """A group, so that the guard is what runs."""

    @app.command()
    def go() -> None:
        action()

    return CliRunner().invoke(app, ["go"])


def fail(error: BaseException) -> Callable[[], object]:
    def action() -> None:
        raise error

    return action


def one_paragraph(text: str) -> bool:
    return "\n\n" not in text.strip() and "Traceback" not in text


def test_success_is_silent() -> None:
    done = run(lambda: None)
    assert (done.exit_code, done.output) == (0, "")


def test_a_mistake_is_one_paragraph_and_code_2() -> None:
    error = HeadwaterError("cannot do it", got="[bold]x[/bold] 'y'", wanted="z", fix="Do that")
    done = run(fail(error))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.strip() == "error: cannot do it. Got: [bold]x[/bold] 'y'. Wanted: z. Do that."


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.EDQUOT])
def test_a_disk_that_says_no_is_a_mistake_that_can_be_mended(number: int) -> None:
    done = run(fail(OSError(number, os.strerror(number), "runs/x/table.parquet")))
    assert done.exit_code == 2
    assert one_paragraph(done.stderr)
    assert "runs/x/table.parquet" in done.stderr and os.strerror(number) in done.stderr
    assert done.stderr.rstrip().endswith(".")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_really_full_disk() -> None:
    def action() -> None:
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    done = run(action)
    assert done.exit_code == 2
    assert "No space left" in done.stderr and "free some space" in done.stderr


def test_ctrl_c_says_how_to_go_on() -> None:
    def action() -> None:
        with resumable(Path("runs/ioi")):
            raise KeyboardInterrupt

    done = run(action)
    assert done.exit_code == 130
    assert "headwater resume runs/ioi" in done.stderr
    assert one_paragraph(done.stderr)


def test_ctrl_c_elsewhere() -> None:
    done = run(fail(KeyboardInterrupt()))
    assert done.exit_code == 130
    assert done.stderr.strip() == "Interrupted."


def test_a_folder_with_spaces_is_quoted() -> None:
    def action() -> None:
        with resumable(Path("my runs/ioi")):
            raise KeyboardInterrupt

    assert "headwater resume 'my runs/ioi'" in run(action).stderr


def test_a_bug_shows_its_traceback_and_asks_for_a_report() -> None:
    done = run(fail(ZeroDivisionError("by zero")))
    assert done.exit_code == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError: by zero" in done.stderr
    assert "report it" in done.stderr


def test_text_cannot_drive_the_terminal() -> None:
    done = run(fail(StoreError("cannot read it", got="\x1b[2Jgone\x07\u202e")))
    assert done.exit_code == 2
    assert "\x1b" not in done.stderr and "\x07" not in done.stderr and "\u202e" not in done.stderr
    assert "\\x1b[2Jgone" in done.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcode – 東京", "plain, ünïcode – 東京"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x00\x1b", "\\x00\\x1b"),
        ("a\rb", "a\\x0db"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_wrong_usage_is_code_2(python: Any) -> None:
    for arguments in (["nosuch"], ["trace", "--nosuch"], ["evaluate"], ["localize", "eap"]):
        done = python("-m", "headwater", *arguments)
        assert done.returncode == 2, arguments
        assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_bug() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "headwater", "--help"], stdout=write, stderr=-1, text=True, timeout=60)
    os.close(write)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "report it" not in done.stderr
