"""headwater models: short names, families, and a model's anatomy."""

import json
from pathlib import Path

from typer.testing import CliRunner

from headwater.cli import app
from headwater.cli.models import BLOCK_SITES_ONLY, FAMILIES, _ranges

run = CliRunner().invoke


def test_the_families_listed_are_those_tested() -> None:
    from tests.core import families

    assert set(FAMILIES) == set(families.FAMILIES)
    assert set(BLOCK_SITES_ONLY) <= set(families.MORE)


def test_list() -> None:
    done = run(app, ["models"])
    assert done.exit_code == 0
    assert "smollm2" in done.stdout and "gpt_neox" in done.stdout
    found = json.loads(run(app, ["models", "--json"]).stdout)
    assert {"smollm2", "gemma3-270m"} <= {row["name"] for row in found["models"]}
    assert len(found["families"]) == 25


def test_show(tiny_folder: Path) -> None:
    done = run(app, ["models", "show", str(tiny_folder), "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["family"], found["n_layers"], found["n_kv_heads"], found["max_length"]) == ("llama", 3, 2, 256)
    sites = {row["site"]: row for row in found["sites"]}
    assert sites["k"] == {
        "site": "k",
        "layers": "0-2",
        "shape": "B S G K",
        "where": "model.layers.*.self_attn, inside its attention function",
    }
    assert sites["neurons"]["where"] == "model.layers.*.mlp.down_proj.in[0]"
    assert sites["resid_mid"]["where"].startswith("model.layers.*.post_attention_layernorm.in")
    assert found["refused"] == []


def test_show_as_a_table(tiny_folder: Path) -> None:
    done = run(app, ["models", "show", str(tiny_folder)])
    assert done.exit_code == 0, done.stderr
    assert "n_layers 3" in done.stdout
    assert "B S G K" in done.stdout


def test_a_site_that_a_model_lacks_is_not_shown(tmp_path: Path) -> None:
    from tests.core.families import FAMILIES as BUILDERS

    BUILDERS["gpt_neox"]().save_pretrained(tmp_path)
    found = json.loads(run(app, ["models", "show", str(tmp_path), "--json"]).stdout)
    kinds = {row["site"] for row in found["sites"]}
    assert "resid_post" in kinds and "resid_mid" not in kinds  # attention and MLP side by side: no stream between them


def test_ranges() -> None:
    assert [_ranges(n) for n in ([0], [0, 1, 2], [0, 2, 3, 7], [])] == ["0", "0-2", "0, 2-3, 7", ""]
