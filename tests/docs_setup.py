"""What a snippet of the documentation may assume, by the name in the HTML comment before it: `<!-- setup: NAME -->`.

A setup is a function of pytest's monkeypatch and a scratch folder; it returns the names the snippets begin with. A
page's snippets run in order in one namespace, from the page's first setup on; a later setup comment adds to it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny

Setup = Callable[[pytest.MonkeyPatch, Path], dict[str, Any]]


def fresh(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """Nothing but an empty working folder."""
    monkeypatch.chdir(folder)
    return {}


def tiny_smollm2(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """`hw.load("smollm2")` gives a tiny random model with 14 layers of 4 heads; all other loads are real."""
    import headwater as hw
    from headwater.core import loading

    real = hw.load
    small = tiny.tiny_llama(num_hidden_layers=14, hidden_size=16, intermediate_size=16, head_dim=4)
    model = real(small, tokenizer=tiny.tiny_tokenizer())

    def load(what: Any, *arguments: Any, **options: Any) -> Any:
        return model if what == "smollm2" else real(what, *arguments, **options)

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(hw, "load", load)
    return fresh(monkeypatch, folder)


SETUPS: dict[str, Setup] = {"fresh": fresh, "tiny": tiny_smollm2}
