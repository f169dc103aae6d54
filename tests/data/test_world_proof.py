"""The frequency link shown on a world of real facts: one seed and its twin, as docs/data.md has it for three."""

from pathlib import Path

import polars as pl
import pytest

from headwater.data.link import link
from headwater.data.link_worlds import compare_worlds
from headwater.data.world import relations_of, world_of
from headwater.dynamics import TrainConfig, train

CONFIG = Path(__file__).resolve().parents[2] / "examples" / "world.yaml"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mechanisms_follow_frequency(tmp_path: Path) -> None:
    from headwater.core.results import load_result

    parts = []
    for name, options in (("world", {}), ("twin", {"permute": 1})):
        config = TrainConfig.from_yaml(CONFIG, data=[{"source": "world", "options": options}])
        run = train(config, tmp_path / name)
        found = link(run.path, relations_of(world_of(run).facts), out=tmp_path / f"{name}-link")
        parts += [load_result(tmp_path / f"{name}-link" / "measured")]
        parts += [load_result(tmp_path / f"{name}-link" / "counts" / "counts")]
        assert len(found.facts["relations"]) >= 13
        assert found.value().value > 0.65 and found.value().lo > 0.5
        assert found.value().value > found.value(counts="subject").value + 0.1
        assert found.value().value > found.value(counts="object").value - 0.02
        assert found.value(subjects="several").value > 0.6 and found.value(subjects="single").value > 0.6
        start = found.tables["points"].filter(pl.col("step") == 0, pl.col("subjects") == "all")
        assert start["causality"].max() == 0 and start["faithfulness"].mean() > 0.5  # type: ignore[operator]
        assert "capital / largest_city" in found.facts["flagged"]
        at = found.tables["thresholds"].filter(pl.col("strength") == "causality", pl.col("level") == 0.5)
        assert 5 < at["n"][0] < 100
    worlds = compare_worlds(*parts)
    assert worlds.facts["r"] > 0.6 and worlds.facts["p"] < 0.01
