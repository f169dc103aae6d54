"""Every method says what it measures, after whom, and how it fails; and takes its options by name."""

import pkgutil
import re

import pytest

from headwater import localize
from headwater.core.errors import MethodError
from headwater.localize.catalog import described, methods

NAMES = methods.names()


def test_the_family_is_there() -> None:
    assert {"patch", "atp", "eap", "eap_ig"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_what_it_measures_and_how_it_fails(name: str) -> None:
    said = described(name)
    assert re.search(r"\b(19|20)\d\d\b", said["what"]), f"{name} cites no paper: {said['what']}"
    assert len(said["known failure"].split()) >= 5, f"{name} states no known failure"
    assert said["options"], f"{name} takes no options"
    assert len(said["what"]) < 300


def test_an_unknown_method_lists_near_names() -> None:
    with pytest.raises(MethodError, match="eap_ig"):
        described("eap_gi")


def test_no_file_hides_a_method_of_its_name() -> None:
    """Importing `localize.x` sets the package's attribute `x` to the module: no function may be called so."""
    for name in localize.__all__:
        assert f"headwater.localize.{name}" not in MODULES, f"localize/{name}.py hides localize.{name}"


MODULES = {module.name for module in pkgutil.iter_modules(localize.__path__, "headwater.localize.")}
