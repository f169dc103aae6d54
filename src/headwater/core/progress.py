"""Progress on long work: a bar on a terminal, one line a stage elsewhere, nothing in the library's results."""

import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")
_displays: list[Any] = []  # the display that is on the terminal now, if there is one
_quiet: ContextVar[bool] = ContextVar("headwater_quiet", default=True)


@contextmanager
def progress_shown(shown: bool = True) -> Generator[None]:
    """Show progress inside this block (the command line does; a library call is silent unless asked)."""
    token = _quiet.set(not shown)
    try:
        yield
    finally:
        _quiet.reset(token)


def track(things: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
    """Iterate over `things`, showing how far it is where progress is shown."""
    if _quiet.get():
        return things
    if total is None and hasattr(things, "__len__"):
        total = len(things)  # type: ignore[arg-type]
    return _lines(things, label, total) if not sys.stderr.isatty() else _bar(things, label, total)


def _bar(things: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    """A bar; one inside another is a second line of the same display, as a terminal has room for one display only."""
    from rich.console import Console
    from rich.progress import Progress

    if _displays:
        display, own = _displays[-1], False
    else:
        display, own = Progress(console=Console(stderr=True), transient=True), True
        _displays.append(display)
        display.start()
    task = display.add_task(label, total=total)
    try:
        for thing in things:
            yield thing
            display.advance(task)
    finally:
        display.remove_task(task)
        if own:
            display.stop()
            _displays.remove(display)


def _lines(things: Iterable[Any], label: str, total: int | None) -> Iterator[Any]:
    """Where there is no terminal (a log, CI): at most a line every ten seconds."""
    import time

    shown = time.monotonic()
    for done, thing in enumerate(things):
        yield thing
        now = time.monotonic()
        if now - shown > 10:
            shown = now
            sys.stderr.write(f"  {label}: {done + 1}{f'/{total}' if total else ''}\n")
            sys.stderr.flush()


def note(line: str) -> None:
    """One line on stderr where progress is shown (a stage that ended); nothing elsewhere."""
    if not _quiet.get():
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
