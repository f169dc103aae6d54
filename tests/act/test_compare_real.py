"""Actions beside baselines on the real model: a preference for the first option is mended, and a fact is edited."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from headwater.act import compare
from headwater.act.comparing.comparison import ActComparison

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


def value(found: ActComparison, action: str, measure: str) -> float:
    table = found.tables["summary"]
    return table.filter((pl.col("action") == action) & (pl.col("measure") == measure))["value"].item()


def test_where_the_right_option_stands_matters_less_after_lora(smollm2: Any, tmp_path: Path) -> None:
    fingerprint = smollm2.fingerprint
    found = compare(
        smollm2,
        "position_bias",
        options={"n": 24, "measured": 12},
        lora={"lr": 1e-3},
        seeds=1,
        steps=40,
        batch=6,
        shots=(4,),
        relearn=(),
        latent=False,
        n_others=4,
        text_tokens=24,
        out=tmp_path,
    )
    assert smollm2.fingerprint == fingerprint
    # asked plainly the model knows the capitals; with options it does not say them
    assert value(found, "nothing", "neighbours") > 0.75 > 0.6 > value(found, "nothing", "efficacy")
    assert value(found, "lora", "efficacy") > value(found, "nothing", "efficacy") + 0.25
    assert value(found, "lora", "efficacy") > value(found, "lora, random targets", "efficacy") + 0.25
    assert value(found, "lora", "neighbours") > 0.75 and value(found, "lora", "perplexity") < 1.3


def test_a_capital_is_changed_and_its_neighbours_stay(smollm2: Any, tmp_path: Path) -> None:
    fingerprint = smollm2.fingerprint
    found = compare(
        smollm2,
        "fact_edit",
        {"localized": ("localized", {"weights": "lookup:4", "lr": 3e-4})},
        options={"n": 2, "keep": 4, "neighbours": 6, "known": 3},
        lora={"lr": 1e-3},
        seeds=1,
        steps=15,
        batch=4,
        relearn=(2,),
        latent=False,
        n_others=4,
        text_tokens=24,
        out=tmp_path,
    )
    assert smollm2.fingerprint == fingerprint
    assert value(found, "nothing", "efficacy") == 0.0 and value(found, "nothing", "neighbours") == 1.0
    assert value(found, "lora", "efficacy") == 1.0 > value(found, "prompt", "efficacy")
    assert value(found, "lora", "neighbours") >= 0.5 and value(found, "lora", "perplexity") < 2.0
    assert value(found, "localized", "efficacy") > value(found, "localized", "at random")
    assert "baseline" in found.verdict
