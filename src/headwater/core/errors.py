"""Errors that say the operation, what it got, what it wanted, and what to do."""

import difflib
from collections.abc import Iterable


class HeadwaterError(Exception):
    """A mistake that its reader can mend.

    `what` names the operation and what went wrong; `got`, `wanted` and `fix` complete the paragraph. The command line
    prints it without a traceback and leaves with `exit_code`.
    """

    exit_code = 2

    def __init__(self, what: str, *, got: object = None, wanted: object = None, fix: str | None = None) -> None:
        self.what, self.got, self.wanted, self.fix = what, got, wanted, fix
        parts = [what.rstrip(". ") + "."]
        if got is not None:
            parts.append(f"Got: {str(got).rstrip('. ')}.")
        if wanted is not None:
            parts.append(f"Wanted: {str(wanted).rstrip('. ')}.")
        if fix is not None:
            parts.append(fix.rstrip(". ") + ".")
        super().__init__(" ".join(parts))


class SiteError(HeadwaterError):
    """A site that cannot be read, does not exist in this model, or never fired."""


class ModelError(HeadwaterError):
    """A model that cannot be found, loaded or understood."""


class InterventionError(HeadwaterError):
    """An intervention that does not fit the place it is put."""


class BehaviorError(HeadwaterError):
    """A behavior, or a file of one, that cannot be used."""


class MethodError(HeadwaterError):
    """An unknown method, metric or option."""


class ClaimError(HeadwaterError):
    """A claim or its test that cannot be run."""


class StoreError(HeadwaterError):
    """A run's folder that cannot be read or written."""


def did_you_mean(name: str, options: Iterable[str], *, limit: int = 12) -> str:
    """Near names first, then all names (or the first `limit`), as one phrase for an error's `wanted`."""
    known = sorted(set(options))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    shown = ", ".join(known[:limit]) + (f", … ({len(known)} in all)" if len(known) > limit else "")
    return f"{' or '.join(near)}? Known: {shown}" if near else f"one of: {shown or 'none'}"
