"""Options of the form NAME=VALUE."""

from collections.abc import Iterable
from typing import Any


def settings_of(texts: Iterable[str] | None, flag: str = "--set", *, dotted: bool = False) -> dict[str, Any]:
    """Names and YAML values of `NAME=VALUE` texts; `dotted` allows names such as `model.n_layers`.

    Raises MethodError, which names the flag.
    """
    import yaml

    from headwater.core.errors import MethodError

    such_as = f"{flag} {'model.n_layers=3' if dotted else 'n=4'}"
    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not (name.replace(".", "_") if dotted else name).isidentifier():
            raise MethodError(f"cannot read a {flag} option", got=repr(text), wanted=f"NAME=VALUE, such as {such_as}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            wanted = "a number, a word or a list"
            raise MethodError(f"cannot read the value of {flag} {name}", got=repr(value), wanted=wanted) from None
    return found
