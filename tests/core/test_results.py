import json
import os

import polars as pl
import pytest
import torch

from headwater.core import files
from headwater.core.errors import StoreError
from headwater.core.results import FORMAT, Provenance, Result, load_result, register_result


@register_result
class Measured(Result):
    kind = "test_measured"
    main = "rows"


def sample(**facts) -> Measured:
    return Measured(
        tables={
            "rows": pl.DataFrame({"a": [1.5, None, float("nan")], "b": ["x", "<script>alert(1)</script>", None]}),
            "lists": pl.DataFrame({"l": [[1, 2], [], [3]]}),
        },
        tensors={"w": torch.arange(6.0).reshape(2, 3).T, "h": torch.ones(2, dtype=torch.bfloat16)},
        facts={"score": 0.5, "nan": float("nan"), "inf": float("inf"), "names": ("p", "q"), **facts},
        config={"steps": 5},
        provenance=Provenance.collect(seed=3, seconds=1.25),
    )


def test_saved_and_loaded_result_is_the_same(tmp_path):
    result = sample()
    loaded = load_result(result.save(tmp_path / "r"), check=True)
    assert type(loaded) is Measured
    assert loaded.tables["rows"].equals(result.tables["rows"]) and loaded.tables["lists"].equals(result.tables["lists"])
    assert torch.equal(loaded.tensors["w"], result.tensors["w"]) and loaded.tensors["h"].dtype == torch.bfloat16
    assert loaded.facts == {"score": 0.5, "nan": None, "inf": "Infinity", "names": ["p", "q"]}
    assert loaded.config == {"steps": 5} and loaded.provenance == result.provenance
    assert loaded.content_hash == result.content_hash


def test_files_of_equal_results_are_equal_bytes_but_for_provenance(tmp_path):
    for name in "ab":
        sample().save(tmp_path / name)
    names = sorted(os.listdir(tmp_path / "a"))
    assert names == ["lists.parquet", "provenance.json", "result.json", "rows.parquet", "tensors.safetensors"]
    for name in set(names) - {"provenance.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    json.loads((tmp_path / "a" / "result.json").read_text(), parse_constant=pytest.fail)  # strict JSON: no NaN


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.facts.update(score=0.25),
        lambda r: r.config.update(steps=6),
        lambda r: r.tensors["w"].add_(1),
        lambda r: r.tensors.update(w=r.tensors["w"].reshape(2, 3)),
        lambda r: r.tables.update(rows=r.tables["rows"].with_columns(a=pl.lit(1.5))),
        lambda r: r.tables.update(rows=r.tables["rows"].rename({"a": "c"})),
        lambda r: r.tables.update(rows=r.tables["rows"].fill_nan(None)),
        lambda r: r.tables.pop("lists"),
    ],
)
def test_content_hash_sees_every_change(change):
    changed = sample()
    change(changed)
    assert changed.content_hash != sample().content_hash


def test_provenance_is_outside_the_content_hash():
    changed = sample()
    changed.provenance = Provenance(seed=4)
    assert changed.content_hash == sample().content_hash


def test_saving_again_replaces_a_result_but_never_another_folder(tmp_path):
    sample().save(tmp_path / "r")
    sample(score=0.75).save(tmp_path / "r")
    assert load_result(tmp_path / "r").facts["score"] == 0.75
    assert os.listdir(tmp_path) == ["r"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="something else"):
        sample().save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def edit(folder, **changes):
    head = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**head, **changes}))


def test_what_cannot_be_read_is_refused_with_the_mend(tmp_path):
    folder = sample().save(tmp_path / "r")
    edit(folder, format=FORMAT + 1)
    with pytest.raises(StoreError, match="Update headwater"):
        load_result(folder)
    edit(folder, format=0)
    with pytest.raises(StoreError, match="new folder"):
        load_result(folder)
    edit(folder, format=FORMAT, kind="test_measure")
    with pytest.raises(StoreError, match="test_measured"):
        load_result(folder)
    edit(folder, kind="test_measured", tables=["../../etc/passwd"])
    with pytest.raises(StoreError, match="unusable names"):
        load_result(folder)
    (folder / "result.json").write_text("{")
    with pytest.raises(StoreError, match="not valid JSON"):
        load_result(folder)
    with pytest.raises(StoreError, match="missing"):
        load_result(tmp_path / "nowhere")


def test_damaged_and_changed_files_are_found(tmp_path):
    folder = sample().save(tmp_path / "r")
    sample(score=0.9).tables["lists"].head(1).write_parquet(folder / "lists.parquet")
    load_result(folder)  # unchecked reading trusts the files
    with pytest.raises(StoreError, match="not what was saved"):
        load_result(folder, check=True)
    (folder / "tensors.safetensors").write_bytes(b"short")
    with pytest.raises(StoreError, match="damaged"):
        load_result(folder)
    (folder / "rows.parquet").unlink()
    with pytest.raises(StoreError, match="cannot read"):
        load_result(folder)


def test_load_wants_the_right_type(tmp_path):
    folder = Result(facts={"a": 1}).save(tmp_path / "r")
    assert Result.load(folder).facts == {"a": 1}
    with pytest.raises(StoreError, match="another kind"):
        Measured.load(folder)


def test_disk_full_while_saving_leaves_the_old_result(tmp_path, monkeypatch):
    sample().save(tmp_path / "r")

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headwater.core.results.write_bytes", full)
    with pytest.raises(StoreError, match="disk is full"):
        sample(score=0.75).save(tmp_path / "r")
    assert load_result(tmp_path / "r", check=True).facts["score"] == 0.5
    assert os.listdir(tmp_path) == ["r"]


def test_to_frame_html_and_repr_escape_what_came_from_outside():
    result = sample(title="<img src=x onerror=alert(1)>")
    assert result.to_frame().columns == ["a", "b"]
    page = result._repr_html_()
    assert "<script>" not in page and "<img" not in page and "&lt;script&gt;" in page
    assert "score=0.5" in repr(result) and "rows 3x2" in repr(result)
    assert Result(facts={"a": [1]}).to_frame().rows() == [("a", "[1]")]


def test_a_kind_without_chart_says_so(monkeypatch):
    import sys
    import types

    charts = types.ModuleType("headwater.report.charts")
    monkeypatch.setitem(sys.modules, "headwater.report.charts", charts)
    with pytest.raises(StoreError, match="no chart"):
        sample().chart()
    charts.test_measured = lambda result: ("drawn", result.facts["score"])  # type: ignore[attr-defined]
    assert sample().chart() == ("drawn", 0.5)


def test_plain_refuses_what_json_cannot_hold():
    assert files.plain({1: (torch.tensor([1.0]), {"b", "a"})}) == {"1": [[1.0], ["a", "b"]]}
    with pytest.raises(StoreError, match="object"):
        files.plain(object())


def test_two_kinds_of_one_name_are_refused():
    with pytest.raises(StoreError, match="two results"):

        @register_result
        class Other(Result):
            kind = "test_measured"
