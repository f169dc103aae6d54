"""Options of the form NAME=VALUE."""

from collections.abc import Iterable
from typing import Any


def settings_of(texts: Iterable[str] | None, flag: str) -> dict[str, Any]:
    """Names and YAML values of `NAME=VALUE` texts. Raises MethodError, which names the flag."""
    import yaml

    from headwater.core.errors import MethodError

    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise MethodError(f"cannot read a {flag} option", got=repr(text), wanted=f"NAME=VALUE, such as {flag} n=4")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise MethodError(f"cannot read the value of {flag} {name}", got=repr(value)) from None
    return found
