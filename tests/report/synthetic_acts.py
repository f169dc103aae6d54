"""Synthetic results of the kinds of `act`, shaped as their tables are documented."""

from collections.abc import Callable
from typing import Any

HOSTILE = "</script><script>alert(1)</script>"


def steering_curve() -> dict[str, Any]:
    curve = [
        {"action": f"caa at resid_post.{at}{HOSTILE}", "strength": strength, "value": at + (strength or 0),
         "lo": at - 1.0, "hi": at + (strength or 0) + 1.0, "accuracy": 0.5, "n": 24,
         "perplexity": 30.0 + (strength or 0) ** 2 * at, "perplexity_lo": 29.0, "perplexity_hi": 200.0,
         "texts": 12, "chosen": strength == 2.0}
        for at in (1, 2)
        for strength in (None, 0.5, 1.0, 2.0, 4.0)
    ]  # fmt: skip
    return {"curve": curve}


TABLES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {"steering_curve": ("act", steering_curve)}
