"""What a failure looks like: one paragraph and an exit code, never a traceback for a mistake that can be mended."""

import errno
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from headwater.core.errors import HeadwaterError, StoreError
from headwater.core.files import store_error
from headwater.core.progress import progress_shown

INTERRUPTED = 130  # what a shell gives a command that Ctrl-C ended
BUG = 1

# What a disk may say at any moment; other system errors (a closed pipe, a lost child) mean something else.
_OF_A_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
}


class Guarded(TyperGroup):
    """The group of all commands, with the handling of failures that they share."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with progress_shown():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as stop:
            say(f"Interrupted. {stop}".strip())
            raise typer.Exit(INTERRUPTED) from None
        except HeadwaterError as error:
            say(str(error), label="error")
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            if error.errno not in _OF_A_DISK:
                _report_bug(error)
                raise typer.Exit(BUG) from None
            say(str(store_error(error, Path(error.filename or "a file"), "read or write")), label="error")
            raise typer.Exit(StoreError.exit_code) from None
        except Exception as error:
            if type(error).__module__.startswith(("typer.", "click.")):
                raise  # wrong usage of the command line: it prints itself
            _report_bug(error)
            raise typer.Exit(BUG) from None


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Whoever presses Ctrl-C inside is told how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        command = shlex.join(["headwater", "resume", str(folder)])
        raise KeyboardInterrupt(f"Every finished stage is stored in {folder}; go on with: {command}") from None


def say(message: str, *, label: str | None = None) -> None:
    """One wrapped paragraph on stderr. The text may hold a user's or a model's words: none of it is read as markup."""
    from rich.console import Console
    from rich.text import Text

    paragraph = " ".join(printable(message).split())
    text = Text.assemble((f"{label}: ", "bold red"), paragraph) if label else Text(paragraph)
    Console(stderr=True, highlight=False).print(text, soft_wrap=not sys.stderr.isatty())


def printable(text: str) -> str:
    """The text without control characters, so that a file's or a model's words cannot drive the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else f"\\x{ord(char):02x}" for char in text)


def _report_bug(error: Exception) -> None:
    import traceback

    sys.stderr.write(printable("".join(traceback.format_exception(error))))
    say(
        "This is a bug in headwater, not a mistake of yours: please report it with the lines above, the command and "
        "the output of `headwater --version`. What was stored before is untouched.",
        label="bug",
    )
