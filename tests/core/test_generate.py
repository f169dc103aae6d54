"""Generating with interventions: the same as computing the whole sequence anew for each token, without a cache."""

from typing import Any

import pytest
import torch

import headwater as hw
from headwater.core.model import Model
from tests.core.families import build

PROMPT = [5, 17, 3, 42, 9, 28, 11, 50, 7, 33]
STEPS = 8


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3", "gptj"])
def model(request: pytest.FixtureRequest) -> Model:
    hf = build(request.param)
    hf.generation_config.eos_token_id = None
    return Model(hf)


def slowly(model: Model, prompt: list[int], layer: int, change: Any, steps: int = STEPS) -> list[int]:
    """Greedy tokens with `change(stream, prompt length)` on a block's output, by a bare hook on the whole sequence."""
    block = model.anatomy.main.blocks[layer].module

    def hook(module: Any, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        x = change(x.clone(), len(prompt))
        return (x, *output[1:]) if isinstance(output, tuple) else x

    ids = list(prompt)
    handle = block.register_forward_hook(hook)
    try:
        for _ in range(steps):
            with torch.no_grad():
                logits = model.hf(torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    finally:
        handle.remove()
    return ids[len(prompt) :]


def vector(seed: int = 3) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


CASES = {
    "all": ("resid_post.1", "all", lambda n: slice(None)),
    "none": ("resid_post.1", None, lambda n: slice(None)),
    "prompt": ("resid_post.1", "prompt", lambda n: slice(0, n)),
    "decode": ("resid_post.1", "decode", lambda n: slice(n, None)),
    "index": ("resid_post.1@3", None, lambda n: 3),
    "beyond the prompt": ("resid_post.1@12", None, lambda n: slice(12, 13)),
    "negative": ("resid_post.1@-2", None, lambda n: n - 2),
    "slice": ("resid_post.1@2:5", None, lambda n: slice(2, 5)),
    "open slice": ("resid_post.1@8:", None, lambda n: slice(8, None)),
    "slice over the edge": ("resid_post.1@8:13", None, lambda n: slice(8, 13)),
    "list": ("resid_post.1", [1, -1, 11], lambda n: [i for i in (1, n - 1, 11)]),
    "tuple": ("resid_post.1@0,4", None, lambda n: [0, 4]),
}


@pytest.mark.parametrize("case", CASES)
def test_positions_are_absolute_under_the_cache(model: Model, case: str) -> None:
    site, positions, where = CASES[case]

    def change(x: torch.Tensor, n: int) -> torch.Tensor:
        index = where(n)
        if isinstance(index, list):
            index = [i for i in index if i < x.shape[1]]
        x[:, index] += vector()
        return x

    wanted = slowly(model, PROMPT, 1, change)
    changed = hw.add(site, vector(), positions=positions)
    assert model.generate([PROMPT], max_new_tokens=STEPS, interventions=[changed]) == [wanted]
    # The same for a call of transformers' own generate inside the block, and for model.generate inside it.
    ids = torch.tensor([PROMPT])
    with model.intervene(changed):
        own = model.hf.generate(ids, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
        again = model.hf.generate(ids, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
        assert model.generate(torch.tensor(PROMPT), max_new_tokens=STEPS) == wanted
    assert own[0, len(PROMPT) :].tolist() == wanted
    assert again[0, len(PROMPT) :].tolist() == wanted


def test_the_cases_differ(model: Model) -> None:
    """Otherwise equality above would say nothing."""
    plain = model.generate([PROMPT], max_new_tokens=STEPS)[0]
    found = {
        case: tuple(
            model.generate([PROMPT], max_new_tokens=STEPS, interventions=[hw.add(site, vector(), positions=positions)])[
                0
            ]
        )
        for case, (site, positions, _) in CASES.items()
    }
    assert found["all"] == found["none"]
    assert len({*found.values(), tuple(plain)}) >= 6, found


def test_without_interventions_it_is_transformers(model: Model) -> None:
    ids = torch.tensor([PROMPT])
    wanted = model.hf.generate(ids, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)[0, len(PROMPT) :]
    assert model.generate(ids, max_new_tokens=STEPS) == [wanted.tolist()]
    beams = model.hf.generate(ids, max_new_tokens=STEPS, do_sample=False, num_beams=3, pad_token_id=0)
    assert model.generate(ids, max_new_tokens=STEPS, num_beams=3) == [beams[0, len(PROMPT) :].tolist()]


def test_prompts_of_several_lengths_are_as_one_by_one(model: Model) -> None:
    prompts = [PROMPT, PROMPT[:4], PROMPT[2:], PROMPT[3:7], PROMPT[::-1]]
    where = torch.tensor([2, 1, -1, 0, 5])
    values = torch.stack([vector(seed) for seed in range(5)])
    together = model.generate(
        prompts,
        max_new_tokens=STEPS,
        interventions=[hw.add("resid_post.1@S", values)],
        positions={"S": where},
    )
    apart = [
        model.generate(
            [prompt],
            max_new_tokens=STEPS,
            interventions=[hw.add("resid_post.1", values[i], positions=int(where[i]))],
        )[0]
        for i, prompt in enumerate(prompts)
    ]
    assert together == apart
    # Beams multiply the rows; each keeps its prompt's own position and value.
    settings: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2}
    together = model.generate(
        prompts, interventions=[hw.add("resid_post.1@S", values)], positions={"S": where}, **settings
    )
    for i, prompt in enumerate(prompts):
        one = hw.add("resid_post.1", values[i], positions=int(where[i]))
        assert together[i] == model.generate([prompt], interventions=[one], **settings)[0]


def test_prompts_that_end_early_are_as_one_by_one() -> None:
    hf = build("llama")
    model = Model(hf)
    prompts = [PROMPT, PROMPT[::-1], [*PROMPT[1:], 2]]
    hf.generation_config.eos_token_id = None
    free = model.generate(prompts, max_new_tokens=STEPS)
    hf.generation_config.eos_token_id = free[0][2]
    together = model.generate(prompts, max_new_tokens=STEPS)
    assert together == [model.generate([prompt], max_new_tokens=STEPS)[0] for prompt in prompts]
    assert len(together[0]) <= 3
    assert max(map(len, together)) > 3, "all ended at once: nothing was tried"


def test_heads_and_patterns_while_generating(model: Model) -> None:
    """Zeroing a head's z equals taking its rows out of the output projection."""
    part = model.anatomy.main.blocks[1].attention
    assert part is not None
    into = part.out_proj

    def cut(module: Any, args: Any) -> Any:
        x = args[0].clone()
        x[..., 2 * part.d_value : 3 * part.d_value] = 0
        return (x, *args[1:])

    handle = into.register_forward_pre_hook(cut)
    wanted = slowly(model, PROMPT, 1, lambda x, n: x)
    handle.remove()
    for change in (hw.zero("z.1.h2"), hw.zero("head.1.h2"), hw.zero("pattern.1.h2")):
        assert model.generate([PROMPT], max_new_tokens=STEPS, interventions=[change]) == [wanted]


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    hf = build("gpt2")
    model = Model(hf)
    wanted = model.generate([PROMPT], max_new_tokens=STEPS)
    hf.train()
    hf.transformer.h[1].eval()
    before = [module.training for module in hf.modules()]
    assert model.generate([PROMPT], max_new_tokens=STEPS) == wanted
    model.run([PROMPT])
    Model(hf)
    assert [module.training for module in hf.modules()] == before


def test_text(tiny_model: Model) -> None:
    prompts = ["When Mary and John went to the store,", "Mary"]
    texts = tiny_model.generate(prompts, max_new_tokens=5)
    assert [tiny_model.generate(prompt, max_new_tokens=5) for prompt in prompts] == texts
    assert all(isinstance(text, str) for text in texts)


def test_what_is_refused(model: Model) -> None:
    with pytest.raises(hw.HeadwaterError, match="never fired"):
        model.generate([PROMPT], max_new_tokens=3, interventions=[hw.zero("resid_post.1@40")])
    with pytest.raises(hw.HeadwaterError, match="one continuation"):
        model.generate([PROMPT], max_new_tokens=3, num_return_sequences=2, num_beams=2)
    with pytest.raises(ValueError, match="nosuch"):
        model.generate([PROMPT], max_new_tokens=3, nosuch=1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_encoder_decoder() -> None:
    """Decoder positions count from the decoder's start token, encoder positions from the source's first token."""
    hf = build("t5")
    # Tied embeddings would make it say its start token for ever.
    unembed = torch.randn(61, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hf.lm_head.weight = torch.nn.Parameter(unembed)
    hf.generation_config.eos_token_id = None
    model = Model(hf)
    source = torch.tensor([PROMPT])

    def slow(prefix: str, index: Any) -> list[int]:
        block = model.anatomy.stacks[prefix].blocks[1].module

        def hook(module: Any, args: Any, output: Any) -> Any:
            x = output[0].clone()
            x[:, index] += vector()
            return (x, *output[1:])

        handle = block.register_forward_hook(hook)
        ids = [0]
        for _ in range(6):
            with torch.no_grad():
                logits = hf(input_ids=source, decoder_input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        handle.remove()
        return ids

    plain = hf.generate(source, max_new_tokens=6, do_sample=False)[0].tolist()
    seen = set()
    for prefix, at, index in (
        ("decoder", "", slice(None)),
        ("decoder", "@2", slice(2, 3)),
        ("decoder", "@1:4", slice(1, 4)),
        ("encoder", "@-2", -2),
        ("encoder", "@3", 3),
    ):
        wanted = slow(prefix, index)
        seen.add(tuple(wanted))
        with model.intervene(hw.add(f"{prefix}/resid_post.1{at}", vector())):
            for _ in range(2):
                assert hf.generate(source, max_new_tokens=6, do_sample=False)[0].tolist() == wanted, (prefix, at)
    assert len(seen | {tuple(plain)}) >= 3
    assert hf.generate(source, max_new_tokens=6, do_sample=False)[0].tolist() == plain
