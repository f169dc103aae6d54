"""Attribution to examples, against the plain definitions in float64 and against facts that were planted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from headwater.claims import Ledger, claim_from_test, run_test
from headwater.cli import main
from headwater.core.errors import HeadwaterError
from headwater.core.model import Model
from headwater.core.results import load_result
from headwater.data import Corpus, attribute, remove_and_retrain
from headwater.data.attribution.ekfac import Ekfac
from headwater.data.attribution.gradients import SequenceGradients, Sketch
from headwater.data.attribution.planted import planted
from headwater.data.attribution.removing import DataRemoval
from headwater.data.attribution.result import AttributionToData
from headwater.data.attribution.scoring import Setting, scorers
from headwater.dynamics import TrainConfig, TrainingRun, train


def tiny(kind: str, seed: int = 0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        hf: Any = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=8, **ends))
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
        hf = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes, **ends))
    return hf.double().eval()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    at = (torch.rand(5, 6) < 0.7).double()
    at[:, 3] = 1
    return torch.randint(0, 11, (5, 6)), at


def by_hand(hf: Any, ids: Tensor, at: Tensor, margin: bool = False) -> Tensor:
    """[n, weights] of the losses, one backward pass after the other."""
    out: list[Tensor] = []
    for row, mask in zip(ids, at, strict=True):
        logits = hf(input_ids=row[None, :-1]).logits[0]
        chance = logits.softmax(-1).gather(-1, row[1:, None])[:, 0]
        each = -(chance / (1 - chance)).log() if margin else -chance.log()
        loss = (each * mask[1:]).sum() / mask[1:].sum()
        grads = torch.autograd.grad(loss, list(hf.parameters()))
        out.append(torch.cat([one.flatten() for one in grads]))
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("of", ["loss", "margin"])
def test_rows_are_the_gradients_of_each_sequence(kind: str, of: Any, batch: tuple[Tensor, Tensor]) -> None:
    hf = tiny(kind)
    plain = by_hand(hf, *batch, margin=of == "margin")
    for vectorized in (True, False):
        rows = SequenceGradients(hf, vectorized=vectorized).rows(*batch, of)
        torch.testing.assert_close(rows, plain, rtol=1e-9, atol=1e-12)
        assert not rows.requires_grad
    some = SequenceGradients(hf, ["*mlp*"])
    assert 0 < some.n_weights < plain.shape[1]
    with pytest.raises(HeadwaterError, match="no weight"):
        SequenceGradients(hf, ["nothing*"])


def test_a_sketch_keeps_inner_products_in_the_mean() -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 400, dtype=torch.float64)
    true = rows @ rows.T
    drawn = torch.stack([(s := Sketch(400, 64, seed=seed)(rows)) @ s.T for seed in range(400)])
    error = drawn.std(dim=0) / 20  # of the mean of 400
    assert ((drawn.mean(dim=0) - true).abs() < 4 * error + 1e-9).all()
    assert drawn.std(dim=0).min() > 1
    assert torch.equal(Sketch(400, None, seed=0)(rows), rows) and torch.equal(Sketch(400, 500, seed=0)(rows), rows)


def scored(method: str, hfs: list[Any], queries: Any, batch: Any, **setting: Any) -> Tensor:
    ids, at = batch
    parts = lambda: iter([(ids[:3], at[:3]), (ids[3:], at[3:])])  # noqa: E731
    setting = {"rates": [0.5] * len(hfs)} | setting
    return scorers.get(method)(iter(hfs), queries, parts, Setting(**setting))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_methods_are_what_their_formulas_say(kind: str, batch: tuple[Tensor, Tensor]) -> None:
    first, last = tiny(kind, 0), tiny(kind, 1)
    ids, at = batch
    asked = [(torch.tensor([1, 2, 3]), torch.tensor([0.0, 0, 1])), (torch.tensor([4, 5, 6, 7]), torch.ones(4).double())]
    asked = [(q, m.double()) for q, m in asked]
    gq = {hf: torch.cat([by_hand(hf, q[None], m[None]) for q, m in asked]) for hf in (first, last)}
    gz = {hf: by_hand(hf, ids, at) for hf in (first, last)}
    unit = torch.nn.functional.normalize
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)  # noqa: E731
    close(scored("cosine", [last], asked, batch), unit(gq[last]) @ unit(gz[last]).T)
    sums = 0.5 * gq[first] @ gz[first].T + 0.1 * gq[last] @ gz[last].T
    close(scored("tracin", [first, last], asked, batch, rates=[0.5, 0.1]), sums)
    cosines = 0.5 * unit(gq[first]) @ unit(gz[first]).T + 0.1 * unit(gq[last]) @ unit(gz[last]).T
    close(scored("tracin", [first, last], asked, batch, rates=[0.5, 0.1], normalize=True), cosines)
    # trak without a projection, by the formula and a plain inverse
    total, doubts = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for hf in (first, last):
        f = by_hand(hf, ids, at, margin=True)
        q = torch.cat([by_hand(hf, x[None], m[None], margin=True) for x, m in asked])
        kernel = f.T @ f + 0.2 * (f.T @ f).diagonal().mean() * torch.eye(f.shape[1], dtype=torch.float64)
        chance = hf(input_ids=ids[:, :-1]).logits.softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].detach()
        total += q @ torch.linalg.inv(kernel) @ f.T / 2
        doubts += (1 - (chance * at[:, 1:]).sum(1) / at[:, 1:].sum(1)) / 2
    close(scored("trak", [first, last], asked, batch, damping=0.2), total * doubts)  # each averaged on its own


@pytest.mark.parametrize("method", ["cosine", "tracin", "trak", "ekfac"])
def test_a_sequence_of_which_nothing_is_predicted_has_no_score(method: str, batch: tuple[Tensor, Tensor]) -> None:
    """It moves no weight; and it must not make numbers of the others."""
    ids, at = batch
    asked = [(torch.tensor([1, 2, 3]), torch.tensor([0.0, 0, 1]).double())]
    empty = at.clone()
    empty[1] = 0
    scores = scored(method, [tiny("llama")], asked, (ids, empty), damping=0.3)
    assert scores.isfinite().all() and scores[0, 1] == 0 and (scores[0, [0, 2, 3, 4]] != 0).all()


@pytest.mark.parametrize("method", ["trak", "ekfac"])
def test_half_precision_is_solved_in_single(method: str, batch: tuple[Tensor, Tensor]) -> None:
    ids, at = batch
    asked = [(torch.tensor([1, 2, 3]), torch.tensor([0.0, 0, 1]))]
    hf = tiny("llama").float()
    whole = scored(method, [hf], asked, (ids, at.float()), damping=0.3)
    half = scored(method, [hf.bfloat16()], asked, (ids, at.float()), damping=0.3)
    assert half.dtype == torch.float32 and half.isfinite().all()
    if method == "trak":  # ekfac draws labels, which rounding changes
        assert torch.corrcoef(torch.stack([whole[0], half[0]]))[0, 1] > 0.9


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_ekfac_is_the_inverse_that_it_says_it_is(kind: str, batch: tuple[Tensor, Tensor]) -> None:
    """Against dense matrices: (Qs x Qa) diag(curvature + damping) (Qs x Qa)' for each layer, and its plain inverse."""
    hf = tiny(kind)
    ids, at = batch
    asked = [(torch.tensor([1, 2, 3]), torch.tensor([0.0, 0, 1]).double())]
    scores = scored("ekfac", [hf], asked, batch, damping=0.3)
    curvature = Ekfac(hf)
    curvature.fit(lambda: iter([(ids, at)]), seed=0)
    names = {layer.name for layer in curvature.layers}
    assert "lm_head" in names if kind == "llama" else "lm_head" not in names  # GPT-2's is the embedding

    # gradients weight by weight, by plain autograd
    def grads(row: Tensor, mask: Tensor) -> dict[str, Tensor]:
        logits = hf(input_ids=row[None, :-1]).logits[0]
        each = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
        loss = (each * mask[1:]).sum() / mask[1:].sum()
        known = dict(hf.named_parameters())
        return dict(zip(known, torch.autograd.grad(loss, list(known.values())), strict=True))

    # the labels that the model draws, and from them the factors and the curvature by their definitions
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        chances = hf(input_ids=ids[:, :-1]).logits.softmax(-1)
    drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=draw).view(5, -1)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    hooks = [
        hf.get_submodule(layer.name).register_forward_hook(
            lambda _, x, y, name=layer.name: (inputs.update({name: x[0]}), outputs.update({name: y}))[0]
        )
        for layer in curvature.layers
    ]
    logits = hf(input_ids=ids[:, :-1]).logits
    for hook in hooks:
        hook.remove()
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="none").view(5, -1)
    losses = (each * at[:, 1:]).sum(1) / at[:, 1:].sum(1)
    slopes = torch.autograd.grad(losses.sum(), list(outputs.values()), retain_graph=True)
    slope = dict(zip(outputs, slopes, strict=True))
    on_drawn = [torch.autograd.grad(one, list(hf.parameters()), retain_graph=True) for one in losses]
    of_sequences = [dict(zip(dict(hf.named_parameters()), one, strict=True)) for one in on_drawn]

    total = torch.zeros(1, 5, dtype=torch.float64)
    for layer in curvature.layers:

        def matrix(one: dict[str, Tensor]) -> Tensor:
            weight = one[f"{layer.name}.weight"]  # noqa: B023
            weight = weight.T if layer.turned else weight  # noqa: B023
            return torch.cat([weight, one[f"{layer.name}.bias"][:, None]], dim=1) if layer.bias else weight  # noqa: B023

        for basis in (layer.inside, layer.outside):
            torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=torch.float64), atol=1e-9, rtol=0)
        x, y = inputs[layer.name].flatten(0, 1).detach(), slope[layer.name].flatten(0, 1)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if layer.bias else x
        for basis, factor in ((layer.inside, x.T @ x), (layer.outside, y.T @ y)):
            turned = basis.T @ factor @ basis
            off = turned - turned.diagonal().diag()
            assert off.abs().max() < 1e-9 * turned.abs().max()
        squares = [(layer.outside.T @ matrix(one) @ layer.inside).square() for one in of_sequences]
        torch.testing.assert_close(layer.curvature, torch.stack(squares).mean(0), rtol=1e-7, atol=1e-14)
        both = torch.kron(layer.outside, layer.inside)
        damped = layer.curvature + 0.3 * layer.curvature.mean()
        dense = both @ torch.diag(damped.flatten()) @ both.T
        q = matrix(grads(*asked[0])).flatten()
        z = torch.stack([matrix(grads(row, mask)).flatten() for row, mask in zip(ids, at, strict=True)])
        total += (torch.linalg.solve(dense, q) @ z.T)[None]
    # the labels are drawn batch by batch, so the same seed must see the same batches
    again = scorers.get("ekfac")(iter([hf]), asked, lambda: iter([(ids, at)]), Setting(rates=[1.0], damping=0.3))
    torch.testing.assert_close(again, total, rtol=1e-6, atol=1e-10)
    assert scores.shape == total.shape


def small_planted() -> Any:
    return planted(facts=6, sequences=160, share=0.05, lures=3, length=8, fillers=20, relations=2, seed=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    folder = tmp_path_factory.mktemp("attribution")
    data = small_planted()
    np.save(folder / "rows.npy", data.rows)
    settings = {
        "model": {"type": "llama", "d_model": 32, "n_layers": 2, "n_heads": 2, "d_mlp": 64},
        "data": [{"source": str(folder / "rows.npy")}], "vocabulary": len(data.words), "steps": 120, "batch": 16,
        "optimizer": {"lr": 0.005}, "checkpoints": {"log": False, "every": 40}, "threads": 1,
    }  # fmt: skip
    return train(TrainConfig.from_dict(settings), folder / "run")


def rows_of(run: TrainingRun) -> Path:
    return run.path.parent / "rows.npy"


@pytest.fixture(scope="module")
def found(run: TrainingRun) -> AttributionToData:
    data = small_planted()
    return attribute(run, data.queries, rows_of(run), truth=data.truth, method="tracin", k=5, normalize=True)


def test_planted_facts_are_found_and_told_beside_both_baselines(run: TrainingRun, found: AttributionToData) -> None:
    table = {row["ranking"]: row for row in found.tables["summary"].iter_rows(named=True)}
    assert set(table) == {"tracin", "retrieval", "base rate"}
    assert table["base rate"]["precision"] == pytest.approx(8 / 160)
    assert table["tracin"]["precision"] > 0.5 and table["retrieval"]["precision"] > 0.5
    assert found.facts["steps"] == [40, 80, 120] and found.facts["rates"] == [0.005] * 3
    assert "retrieval" in found.text and "base rate" in found.text
    # by hand: precision of the first five, and the numbers that are told
    truth, scores = small_planted().truth, found.tensors["scores"].numpy()
    best = np.argsort(-scores, axis=1)[:, :5]
    assert table["tracin"]["precision"] == pytest.approx(np.mean([truth[q, best[q]].mean() for q in range(6)]))
    told = found.tables["top"].filter((pl.col("query") == 2) & (pl.col("ranking") == "tracin"))
    assert told["sequence"].to_list() == best[2].tolist()
    assert told["relevant"].to_list() == truth[2, best[2]].tolist()
    assert found.first(5) == sorted(set(best.flatten().tolist()))


def test_it_is_never_told_without_its_baselines(found: AttributionToData, tmp_path: Path) -> None:
    kept = load_result(found.save(tmp_path / "kept"))
    assert isinstance(kept, AttributionToData) and kept.text == found.text
    for missing in ("base rate", "retrieval"):
        tables = dict(found.tables)
        tables["summary"] = tables["summary"].filter(pl.col("ranking") != missing)
        bare = AttributionToData(tables=tables, tensors=found.tensors, facts=found.facts)
        with pytest.raises(HeadwaterError, match="without its baselines"):
            bare.save(tmp_path / missing)
        with pytest.raises(HeadwaterError, match="without its baselines"):
            _ = bare.text


def test_pairs_say_what_is_mentioned_together(run: TrainingRun) -> None:
    data = small_planted()
    words = run_with_words(run)
    found = attribute(words, data.queries, rows_of(run), pairs=data.pairs, method="cosine", k=5)
    together = found.tables["queries"]["together"].to_list()
    by_eye = [sum({s, o} <= {data.words[t] for t in row} for row in data.rows.tolist()) for s, o in data.pairs]
    assert together == by_eye and min(together) >= 11
    table = {row["ranking"]: row["precision"] for row in found.tables["summary"].iter_rows(named=True)}
    assert table["retrieval"] == 1.0 and table["base rate"] == pytest.approx(np.mean(by_eye) / 160)
    assert found.facts["steps"] == [0]
    bare = attribute(words, data.queries, rows_of(run), method="cosine", k=5)
    assert set(bare.tables["summary"]["of"].to_list()) == {"retrieval"}


def run_with_words(run: TrainingRun) -> Model:
    from headwater.dynamics.lab.words import word_tokenizer

    model = run.load()
    return Model(model.hf, tokenizer=word_tokenizer(small_planted().words, whole=True), name="words")


def test_of_a_run_its_own_data_is_the_corpus(run: TrainingRun) -> None:
    data = small_planted()
    found = attribute(run, data.queries[:2], sequences=40, steps=(40, 120), k=3)
    assert found.tensors["scores"].shape == (2, 40) and found.facts["steps"] == [40, 120]
    which = run.data.places(np.arange(40))[1]
    whole = attribute(run, data.queries[:2], rows_of(run), steps=(40, 120), k=3)
    np.testing.assert_allclose(found.tensors["scores"], whole.tensors["scores"][:, which], rtol=1e-4, atol=1e-7)


def beginning(tokenizer: Any) -> Any:
    """The tokenizer, and the token 0 before every text."""
    import copy

    from tokenizers.processors import TemplateProcessing

    made = copy.deepcopy(tokenizer)
    mark = made.convert_ids_to_tokens(0)
    made.backend_tokenizer.post_processor = TemplateProcessing(f"{mark} $A", special_tokens=[(mark, 0)])
    return made


def test_texts_and_behaviors_are_asked_for(tiny_model: Any) -> None:
    from headwater.data.attribution.queries import read_queries

    (one,) = read_queries(tiny_model, [("The capital of France is", " Paris")])
    answer = tiny_model.tokens(" Paris")[0]
    assert one.ids[-len(answer) :].tolist() == answer.tolist() and int(one.at.sum()) == len(answer)
    marked = Model(tiny_model.hf, tokenizer=beginning(tiny_model.tokenizer))  # as Llama's: a text begins with a mark
    (other,) = read_queries(marked, [("The capital of France is", " Paris")])
    assert other.ids.tolist() == [0, *one.ids.tolist()] and int(other.at.sum()) == len(answer)
    import headwater as hw

    behavior = hw.behavior("greater_than", n=6, seed=0)
    asked = read_queries(tiny_model, behavior)
    bound = behavior.bind(tiny_model)
    assert len(asked) == bound.n
    group = bound.groups[0]
    assert asked[group.rows[0]].ids.tolist() == [*group.clean[0].tolist(), int(group.answers[0, 0])]
    with pytest.raises(HeadwaterError, match="its pair"):
        read_queries(tiny_model, behavior, pairs=[("a", "b")] * (bound.n + 1))


def test_without_what_is_pointed_at_the_fact_is_not_learned(
    run: TrainingRun, found: AttributionToData, tmp_path: Path
) -> None:
    queries = small_planted().queries
    made = remove_and_retrain(run, queries, found, tmp_path / "do", k=8, seeds=(0, 1), source=0)
    effect = {(row["removed"], row["measure"]): row for row in made.tables["effect"].iter_rows(named=True)}
    assert {name for name, _ in effect} == {"tracin", "retrieval", "random"}
    assert effect["tracin", "loss"]["more"] > 0.5 and effect["tracin", "loss"]["more_lo"] > 0
    assert effect["tracin", "loss"]["p"] <= 1 / 64 + 1e-9  # six queries: the smallest there is
    assert effect["random", "loss"]["more"] == 0 and effect["tracin", "loss"]["seeds"] == 2
    # what was removed is in no batch, and one number by hand
    gone = TrainingRun.open(tmp_path / "do" / "tracin-seed-1")
    assert not set(found.first(8)) & set(gone.data.places(np.arange(gone.order.n_sequences))[1].tolist())
    runs = made.tables["runs"].filter((pl.col("removed") == "tracin") & (pl.col("seed") == 1) & (pl.col("query") == 3))
    row = torch.from_numpy(queries[3])[None]
    logits = gone.load().hf(input_ids=row[:, :-1]).logits[0, -1]
    assert runs["loss"][0] == pytest.approx(-logits.log_softmax(-1)[row[0, -1]].item(), rel=1e-5)
    again = remove_and_retrain(run, queries, found, tmp_path / "do", k=8, seeds=(0, 1), source=0)
    assert again.content_hash == made.content_hash
    kept = load_result(made.save(tmp_path / "kept"))
    outcome = run_test("data_removed", {"data_removal": kept}, {"ranking": "tracin"})
    assert isinstance(kept, DataRemoval)
    assert outcome.effect == pytest.approx(effect["tracin", "loss"]["more"]) and outcome.n == 6


def test_a_data_claim_without_do_data_is_inconclusive(found: AttributionToData) -> None:
    """However high its scores."""
    claim = claim_from_test("data", "these made it", "data_removed", {"attribution": found}, {"ranking": "tracin"})
    assert "no do(data)" in claim.why_not
    ledger = Ledger.of([claim])
    assert ledger.claims[0].status == "inconclusive"
    other = DataRemoval(tables={"effect": pl.DataFrame(schema={"removed": pl.String, "measure": pl.String})})
    assert (
        "removed nothing by tracin" in run_test("data_removed", {"data_removal": other}, {"ranking": "tracin"}).why_not
    )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a run whose words the tokenizer knows, retrained without what is found."""
    source = {"source": "induction", "options": {"vocabulary": 12, "length": 8, "sequences": 60}}
    settings = {"model": {"d_model": 16, "n_heads": 2}, "data": [source], "steps": 6, "batch": 8, "threads": 1}
    run = train(TrainConfig.from_dict(settings), tmp_path / "run")
    (tmp_path / "q.csv").write_text("prompt,answer,subject,object\nt1 t2,t3,t1,t3\nt4 t5 t6,t7,t4,t7\n")
    arguments = ["attribute", str(run.path), "--queries", str(tmp_path / "q.csv"), "--method", "cosine", "--k", "4"]
    more = ["--retrain", str(tmp_path / "do"), "--seeds", "0,1", "--out", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as left:
        main([*arguments, *more])
    told = json.loads(capsys.readouterr().out)
    assert left.value.code == 0
    assert {row["ranking"] for row in told["summary"]} == {"cosine", "retrieval", "base rate"}
    assert {row["removed"] for row in told["effect"]} == {"cosine", "retrieval", "random"}
    assert isinstance(load_result(tmp_path / "out" / "removal"), DataRemoval)
    with pytest.raises(SystemExit) as left:
        main(arguments)
    said = capsys.readouterr().out
    assert left.value.code == 0 and "base rate" in said and "retrieval" in said and "no causes" in said
    (tmp_path / "holes.csv").write_text("prompt,answer\nt1 t2,\n")
    (tmp_path / "bare.csv").write_text("prompt\nt1 t2\n")
    for wrong in (
        ["attribute", "x"], [*arguments, "--seeds", "a"],
        *([*arguments[:3], str(tmp_path / name)] for name in ("no.csv", "holes.csv", "bare.csv")),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as left:
            main(wrong)
        assert left.value.code == 2


def test_queries_are_read_as_they_are_written(tmp_path: Path) -> None:
    from headwater.cli.attribute import _queries

    (tmp_path / "q.csv").write_text("prompt,answer\nThe code is,007\nTo phone,1.50\n")
    assert _queries(tmp_path / "q.csv") == ([("The code is", "007"), ("To phone", "1.50")], None)


def test_refusals(run: TrainingRun, tmp_path: Path) -> None:
    queries = small_planted().queries
    for options, said in [
        ({"method": "tracing"}, "tracin"),
        ({"k": 0}, "above 0"),
        ({"wieghts": ("a",)}, "weights"),
        ({"steps": (41,)}, "no checkpoint"),
        ({"truth": np.ones((1, 2), dtype=bool)}, "truth"),
        ({"sequences": 5}, "fewer sequences"),
    ]:
        with pytest.raises(HeadwaterError, match=said):
            attribute(run, queries, rows_of(run), **options)
    with pytest.raises(HeadwaterError, match="whose sequences"):
        attribute(run.load(), queries)
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(HeadwaterError, match="holds texts"):
        attribute(run.load(), queries, Corpus.open(tmp_path / "t.jsonl"))
    with pytest.raises(HeadwaterError, match="rows"):
        attribute(run, queries.astype(float), rows_of(run))


def test_tracin_is_that_of_dattri(batch: tuple[Tensor, Tensor]) -> None:
    """Beside a kept library, where it is installed (`pip install dattri`)."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("dattri")
        from dattri.algorithm import TracInAttributor
        from dattri.task import AttributionTask

        hf = tiny("llama")
        hf.float()
        ids, at = batch

        def loss(weights: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
            row, mask = data
            logits = torch.func.functional_call(
                hf, weights, (), {"input_ids": row[None, :-1], "use_cache": False}
            ).logits
            each = torch.nn.functional.cross_entropy(logits[0], row[1:], reduction="none")
            return (each * mask[1:]).sum() / mask[1:].sum()

        from torch.nn.attention import SDPBackend, sdpa_kernel

        task = AttributionTask(loss_func=loss, model=hf, checkpoints=hf.state_dict())
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids, at.float()), batch_size=5)
        theirs = TracInAttributor(task, weight_list=torch.tensor([0.5]), normalized_grad=False)
        theirs.projector_kwargs = None  # else it projects to 512 numbers, whatever is asked for
        with sdpa_kernel([SDPBackend.MATH]):
            scores = theirs.attribute(loader, loader)
    ours = scored("tracin", [hf], [(row, mask.float()) for row, mask in zip(ids, at, strict=True)], (ids, at.float()))
    torch.testing.assert_close(ours, scores.T, rtol=1e-4, atol=1e-6)
