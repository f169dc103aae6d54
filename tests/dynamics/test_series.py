"""Checkpoint series: names, local folders, our own runs, and the hub's cache as the hub's own library lays it out."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from headwater.core.errors import HeadwaterError, StoreError
from headwater.dynamics import CheckpointSeries, train
from headwater.dynamics import series as series_module
from headwater.dynamics.audit import AuditConfig, SeriesAudit, sketch, weights_of
from headwater.dynamics.series import parse_name
from lab_runs import small

SIZES: dict[str, Any] = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16}


def save_walk(folder: Path, steps: dict[int, str], *, seed: int = 0) -> dict[int, Path]:
    """A model whose weights move a little with each step: a random walk, like training's."""
    hf = tiny.tiny_gpt2(**SIZES)
    generator = torch.Generator().manual_seed(seed)
    done, out = 0, {}
    for step, name in sorted(steps.items()):
        with torch.no_grad():
            for weight in hf.parameters():
                weight += torch.randn(weight.shape, generator=generator) * 0.02 * (step - done) ** 0.5
        done = step
        hf.save_pretrained(folder / name)
        out[step] = folder / name
    return out


def cache_of(cache: Path, repo: str, folders: dict[str, Path]) -> None:
    """A hub cache with these revisions as huggingface_hub lays it out: blobs by hash, snapshots of links, refs."""
    import hashlib

    base = cache / "hub" / f"models--{repo.replace('/', '--')}"
    for revision, folder in folders.items():
        commit = hashlib.sha1(revision.encode()).hexdigest()
        (base / "refs").mkdir(parents=True, exist_ok=True)
        (base / "refs" / revision).write_text(commit)
        (base / "snapshots" / commit).mkdir(parents=True)
        (base / "blobs").mkdir(exist_ok=True)
        for file in folder.iterdir():
            data = file.read_bytes()
            big = file.suffix == ".safetensors"
            name = hashlib.sha256(data).hexdigest() if big else hashlib.sha1(data).hexdigest()
            if not (base / "blobs" / name).exists():
                (base / "blobs" / name).write_bytes(data)
            (base / "snapshots" / commit / file.name).symlink_to(Path("../../blobs") / name)


PYTHIA = {step: f"step{step}" for step in (0, 1, 2, 16, 512, 1000)}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("step143000", (None, None, 143000, None)),
        ("step1000-tokens4B", (None, None, 1000, 4 * 10**9)),
        ("stage1-step1000-tokens5B", (1, None, 1000, 5 * 10**9)),
        ("stage2-ingredient3-step500-tokens3B", (2, 3, 500, 3 * 10**9)),
        ("stage1-step7-tokens1.5T", (1, None, 7, 15 * 10**11)),
        ("step-20", (None, None, 20, None)),
        ("checkpoint-300", (None, None, 300, None)),
        ("global_step40", None),
        ("globalstep40", (None, None, 40, None)),
        ("main", None),
        ("step", None),
        ("step10-hotfix", None),
    ],
)
def test_names_say_steps(name: str, wanted: tuple[Any, ...] | None) -> None:
    found = parse_name(name)
    assert (found and tuple(found[key] for key in ("stage", "ingredient", "step", "tokens"))) == wanted


def test_a_run_is_a_series(tmp_path: Path) -> None:
    run = train(small(), tmp_path / "run")
    for given in (run, run.path, str(run.path)):
        series = CheckpointSeries.of(given)
        assert series.steps == run.steps and series[4].tokens == 4 * 4 * 12
    loaded = [(one.step, model.fingerprint) for one, model in series.select([0, 5, 12]).load()]
    assert loaded == [(step, run.load(step).fingerprint) for step in (0, 5, 12)]
    assert series.open(12).fingerprint == loaded[-1][1]
    (run.folder(8) / "headwater.json").unlink()  # what is not whole is not listed
    assert 8 not in CheckpointSeries.of(run.path).steps


def test_folders_and_tables_of_folders(tmp_path: Path) -> None:
    folders = save_walk(tmp_path / "trainer", {10: "checkpoint-10", 200: "checkpoint-200", 30: "checkpoint-30"})
    (tmp_path / "trainer" / "logs").mkdir()
    series = CheckpointSeries.of(tmp_path / "trainer")
    assert series.steps == [10, 30, 200] and series.name == "trainer"
    given = CheckpointSeries.of({3: folders[200], 1: folders[10]})
    assert [one.name for one in given] == ["checkpoint-10", "checkpoint-200"]
    assert given.open(3).fingerprint == series.open(200).fingerprint
    with pytest.raises(StoreError, match=r"near: .*30"):
        series[31]
    for wrong in (tmp_path / "trainer" / "logs", "no such thing", {1: "nowhere"}):
        with pytest.raises(StoreError):
            CheckpointSeries.of(wrong)


def test_some_of_them(tmp_path: Path) -> None:
    save_walk(tmp_path, {step: f"step-{step}" for step in (0, 1, 2, 4, 8, 16, 32, 40, 48, 56, 64)})
    series = CheckpointSeries.of(tmp_path)
    assert series.select([8, 2]).steps == [2, 8]
    assert series.select(first=3, last=32).steps == [4, 8, 16, 32]
    assert series.select(n=4, spacing="linear").steps == [0, 16, 40, 64]
    assert series.select(n=4).steps == [0, 4, 16, 64]
    assert series.select(n=1).steps == [64] and series.select(n=99).steps == series.steps
    with pytest.raises(StoreError):
        series.select(first=65)


def test_the_hub_cache_is_read_as_the_hub_lays_it_out(tmp_path: Path) -> None:
    folders = save_walk(tmp_path / "src", {**PYTHIA, 2000: "main"})
    cache_of(tmp_path / "cache", "someone/pythia-tiny", {path.name: path for path in folders.values()})
    series = CheckpointSeries.of("someone/pythia-tiny", offline=True, cache_dir=tmp_path / "cache")
    assert series.steps == sorted(PYTHIA)  # main is no step
    got = {one.step: model for one, model in series.load()}
    for step, folder in folders.items():
        if step != 2000:
            wanted = load_file(folder / "model.safetensors")
            assert all(torch.equal(got[step].hf.state_dict()[name], weight) for name, weight in wanted.items())
    assert got[16].name == "someone/pythia-tiny"
    with pytest.raises(HeadwaterError, match="does not hold it"):
        CheckpointSeries.of("someone/else", offline=True, cache_dir=tmp_path / "cache")


OLMO = (
    "main", "stage1-step0-tokens0B", "stage1-step1000-tokens3B", "stage1-step150-tokens1B",
    "stage2-ingredient1-step1000-tokens9B", "stage2-ingredient2-step1000-tokens9B", "stage2-ingredient2-step0-tokens0B",
)  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """A hub that answers as recorded: names of refs, and downloads out of folders; what was asked is kept."""
    asked: list[Any] = []

    def install(names: tuple[str, ...], cache: Path | None = None, folders: dict[str, Path] | None = None) -> list[Any]:
        refs = SimpleNamespace(branches=[SimpleNamespace(name=name) for name in names], tags=[])
        monkeypatch.setattr(series_module, "probe", lambda repo, revision: None)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_refs", lambda self, repo: refs)
        files = ["config.json", "model.safetensors", "pytorch_model.bin"]
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, revision: files)
        real = huggingface_hub.snapshot_download

        def download(repo_id: str, *, revision: str, local_files_only: bool = False, **options: Any) -> str:
            if not local_files_only:
                assert cache is not None and folders is not None
                asked.append((revision, tuple(options["allow_patterns"])))
                cache_of(cache, repo_id, {revision: folders[revision]})
            return str(real(repo_id, revision=revision, local_files_only=True, cache_dir=options["cache_dir"]))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return asked

    return install


def test_stages_of_olmo(hub: Callable[..., list[Any]]) -> None:
    hub(OLMO)
    first = CheckpointSeries.of("allenai/OLMo-tiny")
    assert first.steps == [0, 150, 1000] and [one.tokens for one in first] == [0, 10**9, 3 * 10**9]
    assert {one.stage for one in first} == {1}
    second = CheckpointSeries.of("allenai/OLMo-tiny", stage=2, ingredient=2)
    assert second.steps == [0, 1000] and second[1000].revision == "stage2-ingredient2-step1000-tokens9B"
    with pytest.raises(StoreError, match="no checkpoints of stage 3"):
        CheckpointSeries.of("allenai/OLMo-tiny", stage=3)
    with pytest.raises(StoreError, match="no ingredient"):
        CheckpointSeries.of("allenai/OLMo-tiny", stage=2, ingredient=5)


def test_two_names_of_one_step_are_refused(hub: Callable[..., list[Any]]) -> None:
    hub(("step10-tokens1B", "step10", "step20"))
    with pytest.raises(StoreError, match="several checkpoints of one step"):
        CheckpointSeries.of("a/b")
    hub(("main", "v1"))
    with pytest.raises(StoreError, match="no revisions that are steps"):
        CheckpointSeries.of("a/b")


def test_nothing_is_fetched_twice_and_the_next_is_fetched_ahead(tmp_path: Path, hub: Callable[..., list[Any]]) -> None:
    folders = save_walk(tmp_path / "src", {0: "step0", 1: "step1", 2: "step2"})
    asked = hub(("step0", "step1", "step2"), tmp_path / "cache", {path.name: path for path in folders.values()})
    series = CheckpointSeries.of("a/b", cache_dir=tmp_path / "cache")
    seen = []
    for one, _ in series.load():
        for _ in range(200):  # the thread is given time to be ahead
            if len(asked) >= min(3, len(seen) + 2):
                break
            torch.randn(10).sort()
            import time

            time.sleep(0.02)
        seen.append((one.step, [revision for revision, _ in asked]))
    assert seen == [(0, ["step0", "step1"]), (1, ["step0", "step1", "step2"]), (2, ["step0", "step1", "step2"])]
    assert all("pytorch_model*.bin" not in patterns and "*.safetensors" in patterns for _, patterns in asked)
    assert [one.step for one, _ in series.load()] == [0, 1, 2] and len(asked) == 3


def test_a_failed_fetch_is_told(tmp_path: Path) -> None:
    folders = save_walk(tmp_path, {0: "step-0", 1: "step-1"})
    (folders[1] / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(HeadwaterError, match="weights"):
        list(CheckpointSeries.of(tmp_path).load())


# --- the audit


def test_the_sketch_keeps_distances(tmp_path: Path) -> None:
    folders = save_walk(tmp_path, {0: "step-0", 5: "step-5"})
    plain = [torch.cat([w.double().flatten() for _, w in weights_of(folder)]) for folder in folders.values()]
    sketches = [sketch(weights_of(folder), AuditConfig()) for folder in folders.values()]
    assert float((sketches[0] - sketches[1]).norm()) == pytest.approx(float((plain[0] - plain[1]).norm()), rel=0.08)
    assert float(sketches[0].norm()) == pytest.approx(float(plain[0].norm()), rel=0.08)
    assert torch.equal(sketches[0], sketch(weights_of(folders[0]), AuditConfig()))


def test_an_honest_series_passes(tmp_path: Path) -> None:
    run = train(small(steps=40, checkpoints={"every": 10}), tmp_path / "run")
    found = CheckpointSeries.of(run).audit()
    assert found.facts["flagged"] == [] and "No checkpoint" in found.facts["verdict"]
    table = found.tables["checkpoints"]
    assert table["sha256"].to_list() == [run.note(step)["sha256"] for step in run.steps]
    assert bool((found.tensors["distance"] == found.tensors["distance"].T).all())
    assert table["drift"].drop_nans().min() > 0


def test_mislabeled_checkpoints_are_flagged(tmp_path: Path) -> None:
    """As in the published cases: revisions that serve the weights of a late step, the same files or saved anew."""
    folders = save_walk(tmp_path / "series", {step: f"step-{step}" for step in (0, 1, 2, 4, 8, 16, 32, 64)})
    shutil.copy(folders[64] / "model.safetensors", folders[2] / "model.safetensors")  # byte for byte
    late = load_file(folders[32] / "model.safetensors")
    save_file(late, folders[4] / "model.safetensors", metadata={"format": "pt", "saved": "anew"})
    (folders[1] / "model.safetensors").write_bytes(b"not weights")
    series = CheckpointSeries.of(tmp_path / "series")
    found = series.audit()
    flags = {row["step"]: (row["flag"], row["same_as"], row["nearest"]) for row in found.flagged.to_dicts()}
    assert flags == {
        1: ("unreadable", None, None),
        2: ("identical", 64, 64), 64: ("identical", 2, 2),
        4: ("same weights", 32, 32), 32: ("same weights", 4, 4),
    }  # fmt: skip
    assert "5 of 8" in found.facts["verdict"]
    found.save(tmp_path / "audit")
    assert SeriesAudit.load(tmp_path / "audit", check=True).content_hash == found.content_hash


def test_one_late_checkpoint_among_early_ones_is_out_of_place(tmp_path: Path) -> None:
    folders = save_walk(tmp_path / "series", {step: f"step-{step}" for step in (0, 8, 16, 24, 32, 40, 48)})
    late = load_file(folders[48] / "model.safetensors")
    near = {name: weight + 0.002 * torch.randn_like(weight) for name, weight in late.items()}
    save_file(near, folders[8] / "model.safetensors", metadata={"format": "pt"})
    rows = CheckpointSeries.of(tmp_path / "series").audit().tables["checkpoints"].to_dicts()
    flags = {row["step"]: (row["flag"], row["nearest"]) for row in rows if row["flag"]}
    assert flags[8] == ("out of place", 48)
    assert set(flags) == {8}


def test_hashes_alone_need_no_download(
    tmp_path: Path, hub: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub(("step0", "step1", "step2"))

    def info(self: Any, repo: str, *, revision: str, files_metadata: bool) -> Any:
        digest = {"step0": "a" * 64, "step1": "b" * 64, "step2": "a" * 64}[revision]
        lfs = SimpleNamespace(sha256=digest)
        siblings = [("config.json", None), ("pytorch_model.bin", lfs), ("model.safetensors", lfs)]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, lfs=held) for name, held in siblings])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    found = CheckpointSeries.of("a/b", cache_dir=tmp_path / "cache").audit(weights=False)
    assert asked == []
    rows = found.tables["checkpoints"].to_dicts()
    assert [row["flag"] for row in rows] == ["identical", "", "identical"] and rows[2]["same_as"] == 0
    with pytest.raises(HeadwaterError, match="buckets"):
        CheckpointSeries.of("a/b", cache_dir=tmp_path / "cache").audit(bukets=3)
