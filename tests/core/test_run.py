"""run and intervene: every sort of input, exact groups, early stops, gradients, and nothing left behind."""

import threading
from typing import Any

import pytest
import torch

import headwater as hw
from headwater.core.errors import InterventionError, ModelError, SiteError
from headwater.core.model import Model
from headwater.core.sites import Site
from tests.core.families import build

PROMPTS = [[5, 17, 3, 42], [9, 28], [11, 50, 7, 33], [4], [21, 8]]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(build("llama"))


def hooks(model: Model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


def test_every_sort_of_input_gives_the_same(tiny_model: Model) -> None:
    text = "When Mary and John went to the store,"
    ids = tiny_model.tokenizer(text)["input_ids"]
    wanted = tiny_model.run(text).logits
    assert wanted.shape == (1, len(ids), tiny_model.d_vocab)
    for inputs in ([text], ids, [ids], torch.tensor(ids), torch.tensor([ids]), {"input_ids": torch.tensor([ids])}):
        run = tiny_model.run(inputs)
        assert torch.equal(run.logits, wanted)
        assert [t.tolist() for t in run.tokens] == [ids]


def test_unequal_lengths_keep_their_order_and_are_not_padded(model: Model) -> None:
    run = model.run(PROMPTS, capture=["resid_post.1", "z.1.h2@-1", "pattern.0"], logits="all")
    last = model.run(PROMPTS, logits="last").logits
    assert last.shape == (5, 61)
    assert [t.tolist() for t in run.tokens] == PROMPTS
    assert run["z.1.h2@-1"].shape == (5, 8)
    for i, prompt in enumerate(PROMPTS):
        one = model.run([prompt], capture=["resid_post.1", "z.1.h2@-1", "pattern.0"])
        assert run.logits[i].shape == (len(prompt), 61)
        assert float((run.logits[i] - one.logits[0]).abs().max()) < 1e-12
        assert float((last[i] - one.logits[0, -1]).abs().max()) < 1e-12
        assert run["pattern.0"][i].shape == (4, len(prompt), len(prompt))
        assert float((run["resid_post.1"][i] - one["resid_post.1"][0]).abs().max()) < 1e-12
        assert float((run["z.1.h2@-1"][i] - one["z.1.h2@-1"][0]).abs().max()) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_batch_size_changes_nothing(model: Model, size: int) -> None:
    seen = []
    handle = model.hf.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True)
    vectors = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    named = {"S": torch.tensor([1, 0, -2, 0, 1])}
    change = [hw.add("resid_post.0@S", vectors)]
    batched = model.run(
        PROMPTS, capture="resid_post.1@S", logits="last", batch_size=size, positions=named, interventions=change
    )
    handle.remove()
    assert max(seen) <= size
    whole = model.run(PROMPTS, capture="resid_post.1@S", logits="last", positions=named, interventions=change)
    assert float((batched.logits - whole.logits).abs().max()) < 1e-12
    assert float((batched["resid_post.1@S"] - whole["resid_post.1@S"]).abs().max()) < 1e-12


def test_only_what_is_asked_for_runs(model: Model) -> None:
    ran: list[Any] = []
    layers = model.hf.model.layers
    handles = [layer.register_forward_hook(lambda m, a, o, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    handles.append(model.hf.lm_head.register_forward_hook(lambda m, a, o: ran.append(o.shape[1])))

    def running(**options: Any) -> list[Any]:
        ran.clear()
        model.run(PROMPTS[:1], **options)
        return list(ran)

    try:
        assert running() == [0, 1, 2, 4]
        assert running(logits="last") == [0, 1, 2, 1]
        assert running(logits="none") in ([0, 1], [0, 1, 2])
        # A block that raises on its way out has not ended for the user's own hooks.
        assert 2 not in running(logits="none", capture="z.1")
        assert 1 not in running(logits="none", capture=["z.0", "resid_pre.0"])
        assert 1 not in running(stop_after="resid_post.0")
    finally:
        for handle in handles:
            handle.remove()
    assert model.run(PROMPTS[:1], logits="none", capture="z.1").logits is None


def test_values_of_a_run(model: Model) -> None:
    run = model.run([PROMPTS[0]], capture=["z.1", "pattern.0", "resid_post.*", "logits"])
    assert torch.equal(run["z.1.h2@-1"], run["z.1"][:, -1, 2])
    assert torch.equal(run["pattern.0.h1@2"], run["pattern.0"][:, 1, 2])
    assert torch.equal(run["blocks.2.hook_resid_post"], run["resid_post.2"])
    assert torch.equal(run["logits"], run.logits)
    assert "resid_post.0" in run and "z.0" not in run
    with pytest.raises(SiteError, match=r"z\.0 was not captured.*z\.1"):
        run["z.0"]


def test_nothing_is_left_behind_by_an_exception(model: Model) -> None:
    """Neither by one of ours, nor by the model's, nor by one inside a block."""
    before, plain = hooks(model), model.run(PROMPTS[:1]).logits
    with pytest.raises(hw.HeadwaterError):
        model.run(PROMPTS[:1], capture="pattern.0", interventions=[hw.add("z.1", torch.zeros(3))])
    with pytest.raises(IndexError):
        model.run([[1000]], capture=["z.0", "pattern.1", "head.2"])
    with pytest.raises(KeyError), model.intervene(hw.zero("z.1"), hw.zero("pattern.0")):
        raise KeyError
    with pytest.raises(SiteError, match="never fired"), model.intervene(hw.zero("z.1@3")):
        model.hf(torch.tensor([PROMPTS[1]]))
    assert hooks(model) == before
    assert torch.equal(model.run(PROMPTS[:1]).logits, plain)
    assert torch.equal(model.hf(torch.tensor(PROMPTS[:1])).logits.detach(), plain)
    with model.intervene(hw.zero("z.1")):
        pass  # a block in which nothing runs is no mistake


def test_hooks_of_the_user_stay_and_are_seen(model: Model) -> None:
    plain = model.run(PROMPTS[:1], capture="resid_post.1")["resid_post.1"]
    handle = model.hf.model.layers[1].register_forward_hook(lambda m, a, o: o + 1.0)
    try:
        run = model.run(PROMPTS[:1], capture="resid_post.1")
        assert torch.equal(run["resid_post.1"], plain + 1.0)
        assert handle.id in model.hf.model.layers[1]._forward_hooks
    finally:
        handle.remove()
    assert torch.equal(model.run(PROMPTS[:1], capture="resid_post.1")["resid_post.1"], plain)


def test_threads_do_not_see_each_others_interventions(model: Model) -> None:
    plain = model.run(PROMPTS[:1]).logits
    changed = model.run(PROMPTS[:1], interventions=[hw.zero("z.1")]).logits
    wrong: list[str] = []
    inside = threading.Event()

    def without() -> None:
        inside.wait(10)
        for _ in range(10):
            if not torch.equal(model.run(PROMPTS[:1], capture="pattern.0").logits, plain):
                wrong.append("a run saw another thread's interventions")

    def within() -> None:
        for _ in range(10):
            with model.intervene(hw.zero("z.1")):
                inside.set()
                if not torch.equal(model.run(PROMPTS[:1]).logits, changed):
                    wrong.append("an intervention was lost")

    threads = [threading.Thread(target=f) for f in (without, without, within)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_grad_mode(model: Model) -> None:
    run = model.run(PROMPTS[:1], capture="z.1")
    assert run.logits.is_inference() and run["z.1"].is_inference()
    with pytest.raises(hw.HeadwaterError, match="grad=True"):
        run.grads(run.logits.sum())
    model.hf.lm_head.weight.requires_grad_(False)
    recorded = model.run(PROMPTS[:1], capture="z.1", grad=True)
    assert recorded.logits.requires_grad and torch.equal(recorded.logits.detach(), run.logits)
    assert not model.hf.lm_head.weight.requires_grad and model.hf.model.norm.weight.requires_grad
    model.hf.lm_head.weight.requires_grad_(True)


def test_gradients_in_the_layout_of_each_site(model: Model) -> None:
    names = [f"{kind}.1" for kind in ("head", "z", "q", "k", "v", "pattern")]
    names += ["head.1.h2", "z.1.h2@-1", "k.1.h1", "pattern.1.h3@2", "resid_post.0@1:3", "embed"]
    run = model.run([PROMPTS[0], PROMPTS[2]], capture=names, grad=True)
    of = run.logits[:, -1, 7].sum()
    gradients = run.grads(of)
    for name in names:
        assert gradients[name].shape == run[name].shape, name
        nothing = torch.zeros_like(run[name]).requires_grad_(True)
        changed = model.run([PROMPTS[0], PROMPTS[2]], grad=True, interventions=[hw.add(name, nothing)])
        (wanted,) = torch.autograd.grad(changed.logits[:, -1, 7].sum(), nothing)
        assert float((gradients[name] - wanted).abs().max()) < 1e-6, name
        assert float(wanted.abs().max()) > 1e-6, name
    assert set(run.grads(of, ["z.1", "head.1.h2"])) == {"z.1", "head.1.h2"}


def test_what_is_refused(model: Model, tiny_model: Model) -> None:
    for inputs, says in (
        ([], "no prompts"),
        ([[]], "no tokens"),
        (torch.zeros(1, 0, dtype=torch.long), "no tokens"),
        (list(range(60)) + [3] * 5, "longer than the context.*65 tokens.*at most 64"),
        ("text", "no tokenizer"),
        ({"use_cache": False}, "no tensor"),
    ):
        with pytest.raises(ModelError, match=f"(?s){says}"):
            model.run(inputs)
    with pytest.raises(ModelError, match="no tokens"):
        tiny_model.run("")
    with pytest.raises(ModelError, match="prompt 1 has no tokens"):
        tiny_model.run(["Mary", ""])
    with pytest.raises(ModelError, match="longer than the context"):
        tiny_model.run("Mary and " * 300)
    with pytest.raises(ModelError, match="choice of logits"):
        model.run(PROMPTS, logits="first")  # pyright: ignore[reportArgumentType]
    with pytest.raises(hw.HeadwaterError, match=r"2 indices.*5"):
        model.run(PROMPTS, positions={"S": torch.tensor([0, 1])})
    with pytest.raises(SiteError, match="no site cross_z"):
        model.run(PROMPTS, capture="cross_z.*")
    with pytest.raises(SiteError, match="never fired"):
        model.run(PROMPTS, stop_after="resid_post.0", interventions=[hw.zero("z.2")])
    with pytest.raises(ModelError, match="dict"):
        Model(build("t5")).run([[5, 6]])


def test_half_precision() -> None:
    model = Model(build("llama", torch.bfloat16))
    ids = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        wanted = model.hf(ids).logits
    run = model.run(ids, capture=["resid_post.1", "pattern.1", "z.1"])
    assert torch.equal(run.logits, wanted) and model.dtype == run["z.1"].dtype == torch.bfloat16
    own = model.run(ids, interventions=[hw.replace("pattern.1", run["pattern.1"])])
    assert torch.equal(own.logits, wanted)
    changed = model.run(ids, interventions=[hw.project_out("resid_post.1", torch.ones(32))])  # float32 directions
    assert changed.logits.dtype == torch.bfloat16 and not torch.equal(changed.logits, wanted)


def test_a_dispatched_model(tmp_path: Any) -> None:
    """Weights that accelerate holds elsewhere and brings in when a module runs."""
    accelerate = pytest.importorskip("accelerate")
    ids = torch.tensor([PROMPTS[0]])
    plain = Model(build("llama")).run(ids, capture=["resid_post.1", "pattern.1", "head.1", "neurons.1"])
    hf = build("llama")
    accelerate.cpu_offload(hf, execution_device=torch.device("cpu"))
    model = Model(hf)
    assert model.device == torch.device("cpu")
    run = model.run(ids, capture=["resid_post.1", "pattern.1", "neurons.1", "head.1"])
    for site in run.captured:
        assert torch.equal(run[site], plain[site]), site
    assert torch.equal(run.logits, plain.logits)
    changed = [hw.zero("head.1.h2"), hw.zero("resid_mid.0@1")]
    wanted = Model(build("llama")).run(ids, interventions=changed).logits
    assert torch.equal(model.run(ids, interventions=changed).logits, wanted)


def test_sites_are_listed_and_resolved(model: Model) -> None:
    listed = model.sites()
    assert len(listed) == len(set(listed)) == 3 * 15 - 1 + 3
    assert [str(s) for s in model.sites("resid_post.*")] == ["resid_post.0", "resid_post.1", "resid_post.2"]
    assert [str(s) for s in model.resolve("k.1.h*@-1")] == ["k.1.h0@-1", "k.1.h1@-1"]
    assert model.resolve(Site("embed")) == [Site("embed")]


def test_a_padded_batch_is_not_counted_from_its_padded_side(model: Model) -> None:
    ids = torch.tensor([[5, 17, 3, 42], [9, 28, 0, 0]])
    right = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    left = {"input_ids": ids.flip(1), "attention_mask": right["attention_mask"].flip(1)}
    assert model.run(right, capture="resid_post.1@1", logits="none")["resid_post.1@1"].shape == (2, 32)
    assert model.run(left, capture="resid_post.1@-1", logits="last").logits.shape == (2, 61)
    for inputs, pos in ((right, "-1"), (right, "1:"), (left, "1"), (left, "0,-1")):
        with pytest.raises(InterventionError, match="counted from the padded side"):
            model.run(inputs, capture=f"resid_post.1@{pos}")
        with pytest.raises(InterventionError, match="counted from the padded side"):
            model.run(inputs, interventions=[hw.zero(f"mlp_out.0@{pos}")])
    with pytest.raises(InterventionError, match="the last logits"):
        model.run(right, logits="last")
