"""Circuit discovery, evaluation and exhaustive patching: beside the bare cost of their passes, and beside other code.

The floor of EAP is what the definition asks for, run naively on the bare model: two forwards and one backward (to
activations only, weights frozen). Of EAP-IG with 5 steps it is two forwards, then five forwards and five backwards.
Time is CPU time on one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import measure, models, pairs
from benchmarks.localize import eap_ig

PAIRS, TOKENS, SHARED, STEPS, FRACTION = 32, 20, 12, 5, 0.05
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
FEW = 16
"""Pairs for EAP-IG's own code, which takes CPU minutes for more; headwater is measured on the same few beside it."""
PATCHED = 8
"""Pairs for the patching sweep."""
Job = Callable[[], object]


def setting(name: str, n: int = PAIRS) -> tuple[Any, Any]:
    """(headwater model, behavior of `n` pairs, all of them to find things on)."""
    import headwater as hw

    if name == "gpt2":
        model = hw.Model(models.gpt2_small(), pairs.word_tokenizer(50257), name="gpt2-small-random")
        return model, pairs.random_pairs(n, TOKENS, SHARED, 50257)
    model = models.smollm2()
    ioi = hw.behavior("ioi", n=8 * n, seed=0)
    longest = max(ioi.bind(model).groups, key=len)
    return model, hw.Behavior(ioi[longest.rows[:n]].frame.with_columns(split=_train()), name="ioi")


def _train() -> Any:
    import polars as pl

    return pl.lit("train")


def one_group(model: Any, behavior: Any) -> Any:
    groups = behavior.bind(model).groups
    if len(groups) != 1:
        raise ValueError(f"pairs of one length are needed, got {[len(g) for g in groups]}")
    return groups[0]


class Floor:
    """The passes of a method on the bare model: all positions run and unembedded, nothing kept but by autograd."""

    def __init__(self, hf: Any, group: Any) -> None:
        self.hf, self.group = hf, group

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        return self.hf.get_input_embeddings()(ids)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.hf(input_ids=ids, use_cache=False).logits

    def backward(self) -> None:
        start = self._embedded(self.group.clean).detach().requires_grad_(True)
        logits = self.hf(inputs_embeds=start, use_cache=False).logits
        eap_ig._difference(logits, self.group).sum().backward()

    def _frozen(self, job: Job) -> None:
        asked = [p for p in self.hf.parameters() if p.requires_grad]
        for p in asked:
            p.requires_grad_(False)
        job()
        for p in asked:
            p.requires_grad_(True)

    def eap(self) -> None:
        self.forward(self.group.corrupt)
        self._frozen(self.backward)

    def eap_ig(self) -> None:
        self.forward(self.group.corrupt)
        self.forward(self.group.clean)
        for _ in range(STEPS):
            self._frozen(self.backward)

    def evaluation(self) -> None:
        self.forward(self.group.corrupt)
        self.forward(self.group.clean)


def ours(model: Any, behavior: Any) -> dict[str, Job]:
    from headwater import localize

    held: list[Any] = []

    def circuit() -> Any:
        if not held:
            held.append(localize.eap(model, behavior).circuit(fraction=FRACTION))
        return held[0]

    return {
        "eap": lambda: localize.eap(model, behavior),
        "eap_whole": lambda: localize.eap(model, behavior, reuse_prefix=False),
        "eap_ig": lambda: localize.eap_ig(model, behavior, steps=STEPS),
        "evaluation": lambda: circuit().faithfulness(behavior),
        "patching": lambda: localize.patch(model, behavior, sites=["head.*.h*"]),
    }


def against_floor(name: str, title: str, rounds: int, peaks: bool) -> None:
    model, behavior = setting(name)
    group = one_group(model, behavior)
    first = (group.clean != group.corrupt).int().argmax(dim=1).float()
    share = float(first.mean()) / group.length
    floor, mine = Floor(model.hf, group), ours(model, behavior)
    jobs = {
        "bare forward": lambda: floor.forward(group.clean),
        "floor of EAP": floor.eap,
        "floor of EAP-IG": floor.eap_ig,
        "headwater EAP": mine["eap"],
        "headwater EAP, no prefix reuse": mine["eap_whole"],
        "headwater EAP-IG": mine["eap_ig"],
        "headwater one evaluation": mine["evaluation"],
    }
    long = [job for job in jobs if "EAP-IG" in job]  # every pass of it is one of EAP's, so fewer rounds tell as much
    spent = measure.interleaved({job: jobs[job] for job in jobs if job not in long}, rounds)
    spent |= measure.interleaved({job: jobs[job] for job in long}, max(2, rounds - 2), warm=0)
    floors = {name: "floor of EAP-IG" if "EAP-IG" in name else "floor of EAP" for name in jobs}
    over = {
        job: measure.Spread.of([a / b for a, b in zip(times, spent[floors[job]], strict=True)])
        for job, times in spent.items()
    }
    keys = {
        "bare forward": "bare",
        "headwater EAP": "eap",
        "headwater EAP-IG": "eap_ig",
        "headwater one evaluation": "evaluation",
    }
    memory = {
        job: measure.peak_mb("benchmarks.localize.circuits", f"{name}:{key}") if peaks else None
        for job, key in keys.items()
    }
    rows = [
        [job, measure.Spread.of(spent[job]).text(), "" if job == "bare forward" else over[job].text(),
         f"{memory[job]:.0f}" if memory.get(job) else ""]
        for job in jobs
    ]  # fmt: skip
    measure.table(
        f"{title}, {len(group)} pairs x {group.length} tokens, {share:.0%} of them before the first that differs; "
        f"circuit of {FRACTION:.0%} of edges; median (min to max) of {rounds} rounds (EAP-IG: {max(2, rounds - 2)}). "
        "An evaluation has no backward; it stands over EAP's floor.",
        ["", "CPU s", "over the floor of its method", "peak MB"],
        rows,
    )
    measure.bar(f"{name}: EAP over its floor", over["headwater EAP"].median, 0.9)
    measure.bar(f"{name}: EAP-IG over its floor", over["headwater EAP-IG"].median, 0.9)
    bare = memory.get("bare forward")
    for job in ("headwater EAP", "headwater EAP-IG", "headwater one evaluation"):
        if bare and memory[job]:
            measure.bar(f"{name}: peak memory of {job} over bare", memory[job] / bare, 2.0)  # type: ignore[operator]


def against_eap_ig(rounds: int, *, peaks: bool) -> None:
    model, behavior = setting("gpt2", FEW)
    group = one_group(model, behavior)
    mine, theirs = ours(model, behavior), eap_ig.EapIg(model.hf)
    from headwater import localize

    graph = localize.graph_of(model)
    sources, readers = theirs.in_order_of(graph)
    for label, method, steps, own in (
        ("EAP", "EAP", None, localize.eap(model, behavior)),
        ("EAP-IG", "EAP-IG-inputs", STEPS, localize.eap_ig(model, behavior, steps=STEPS)),
    ):
        their_scores = theirs.scores(group, method, steps)[sources][:, readers].double()
        gap = (their_scores - own.scores)[graph.allowed].abs().max()
        print(
            f"  {label}: largest difference of {graph.n_edges} scores {gap:.1e}, "
            f"where the largest score is {own.scores.abs().max():.1e}"
        )
    theirs.graph.apply_topn(int(FRACTION * graph.n_edges), absolute=True)
    mask = theirs.graph.in_graph[sources][:, readers].bool() & graph.allowed
    circuit = localize.Circuit.build(graph, mask, model=model)
    own_values = circuit.measure(behavior)
    gap = (theirs.evaluate(group).double() - own_values).abs().max()
    print(
        f"  one evaluation, {int(mask.sum())} edges: largest difference of the metric {gap:.1e}, "
        f"where the largest value is {own_values.abs().max():.1e}"
    )

    table, found = [], {}
    ranked = localize.eap(model, behavior)
    works: dict[str, tuple[Job, Job, int]] = {
        "EAP": (mine["eap"], lambda: theirs.scores(group, "EAP"), rounds),
        "EAP-IG, 5 steps": (mine["eap_ig"], lambda: theirs.scores(group, "EAP-IG-inputs", STEPS), 1),
        "one evaluation": (lambda: circuit.measure(behavior), lambda: theirs.evaluate(group), rounds),
        "one circuit's faithfulness": (
            lambda: circuit.faithfulness(behavior),
            lambda: theirs.faithfulness(group),
            rounds,
        ),
        f"faithfulness at {len(FRACTIONS)} sizes": (
            lambda: ranked.curve(behavior, fractions=FRACTIONS),
            lambda: theirs.faithfulness(group, FRACTIONS),
            1,
        ),
    }
    for work, (us, them, n) in works.items():
        spent = measure.interleaved({"headwater": us, "EAP-IG library": them}, n, warm=0)
        found[work] = measure.ratios(spent, "headwater")["EAP-IG library"]
        mean = {name: measure.Spread.of(times).text() for name, times in spent.items()}
        table.append([work, mean["headwater"], mean["EAP-IG library"], found[work].text(1), n])
        print(" ", *table[-1], sep=" | ", flush=True)  # it takes long: what was measured is not lost with the rest
    measure.table(
        f"GPT-2-small, random weights, {FEW} pairs x {TOKENS} tokens, beside EAP-IG's own code",
        ["", "headwater CPU s", "EAP-IG library CPU s", "times faster", "rounds"],
        table,
    )
    for method in ("EAP", "EAP-IG-inputs") if peaks else ():
        peak = measure.peak_mb("benchmarks.localize.circuits", f"eapig:{method}")
        print(f"  peak MB of the library's process at {FEW} pairs, {method}: {peak}")
    for work, wanted in (("EAP", 15.0), ("EAP-IG, 5 steps", 15.0)):
        measure.bar(f"{work}: times faster than EAP-IG's own code", found[work].median, wanted, at_least=True)


def evaluation_beside_eap_ig(rounds: int) -> None:
    """One circuit on all pairs with two threads: what the bar of evaluations was measured on. The library's call gives
    the metric of the circuit alone, as `Circuit.measure` does.
    """
    from headwater import localize

    torch.set_num_threads(2)
    model, behavior = setting("gpt2")
    group, theirs, graph = one_group(model, behavior), eap_ig.EapIg(model.hf), localize.graph_of(model)
    sources, readers = theirs.in_order_of(graph)
    theirs.graph.scores[sources[:, None], readers[None]] = localize.eap(model, behavior).scores.float()
    theirs.graph.apply_topn(int(FRACTION * graph.n_edges), absolute=True)
    mask = theirs.graph.in_graph[sources][:, readers].bool() & graph.allowed
    circuit = localize.Circuit.build(graph, mask, model=model)
    gap = (theirs.evaluate(group).double() - circuit.measure(behavior)).abs().max()
    jobs: dict[str, Job] = {
        "metric of the circuit": lambda: circuit.measure(behavior),
        "its faithfulness": lambda: circuit.faithfulness(behavior),
        "EAP-IG's evaluate_graph": lambda: theirs.evaluate(group),
    }
    spent = measure.interleaved(jobs, rounds, warm=0)
    pairs_of = list(zip(spent["EAP-IG's evaluate_graph"], spent["metric of the circuit"], strict=True))
    times = measure.Spread.of([a / b for a, b in pairs_of])
    measure.table(
        f"GPT-2-small, random weights, {PAIRS} pairs x {TOKENS} tokens, {int(mask.sum())} edges, two threads; "
        f"largest difference of the metric {gap:.1e}",
        ["", "CPU s"],
        [[job, measure.Spread.of(values).text()] for job, values in spent.items()],
    )
    print(f"  times faster than evaluate_graph: {times.text(1)}")
    measure.bar("one evaluation: times faster than EAP-IG's own code", times.median, 10.0, at_least=True)
    torch.set_num_threads(1)


def against_transformer_lens(rounds: int) -> None:
    """Every head, all positions. transformer-lens' generic patching runs the whole model once a head, whichever head it
    is, so one head a layer is timed and taken times the heads of a layer; headwater's time is that of all heads."""
    import pandas as pd
    from transformer_lens import patching

    model, behavior = setting("gpt2", PATCHED)
    group = one_group(model, behavior)
    hooked = models.hooked_gpt2(model.hf)
    config = hooked.cfg
    some = pd.DataFrame([{"layer": layer, "head": (5 * layer) % config.n_heads} for layer in range(config.n_layers)])
    with torch.inference_mode():
        clean_logits, cache = hooked.run_with_cache(group.clean)
        clean = float(eap_ig._difference(clean_logits, group).mean())
        corrupt = float(eap_ig._difference(hooked(group.corrupt), group).mean())

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (eap_ig._difference(logits, group).mean() - corrupt) / (clean - corrupt)

    def theirs() -> torch.Tensor:
        with torch.inference_mode():
            return patching.generic_activation_patch(
                hooked, group.corrupt, cache, metric, patching.layer_head_vector_patch_setter, "z", index_df=some,
            )  # fmt: skip

    mine = ours(model, behavior)["patching"]
    effects = mine().tables["effects"]  # type: ignore[attr-defined]
    own = {(row["layer"], row["head"]): row["effect"] for row in effects.iter_rows(named=True)}
    values = theirs()
    gap = max(abs(own[row.layer, row.head] - float(v)) for row, v in zip(some.itertuples(), values, strict=True))
    print(f"  patching: largest difference of {len(some)} effects {gap:.1e}")
    spent = measure.interleaved({"headwater": mine, "transformer-lens": theirs}, rounds, warm=0)
    scaled = {
        "headwater": spent["headwater"],
        "transformer-lens": [t * config.n_heads for t in spent["transformer-lens"]],
    }
    ratio = measure.ratios(scaled, "headwater")["transformer-lens"]
    measure.table(
        f"GPT-2-small, random weights: patching all {config.n_layers * config.n_heads} heads, "
        f"{PATCHED} pairs x {TOKENS} tokens, {rounds} rounds; "
        f"transformer-lens timed on {len(some)} heads and taken times {config.n_heads}",
        ["headwater CPU s", "transformer-lens CPU s", "times faster"],
        [
            [
                measure.Spread.of(scaled["headwater"]).text(),
                measure.Spread.of(scaled["transformer-lens"]).text(1),
                ratio.text(1),
            ]
        ],
    )
    measure.bar("patching: times faster than transformer-lens", ratio.median, 8.0, at_least=True)


def only(what: str) -> None:
    name, job = what.split(":")
    if name == "eapig":
        model, behavior = setting("gpt2", FEW)
        eap_ig.EapIg(model.hf).scores(one_group(model, behavior), job, STEPS)
    else:
        model, behavior = setting(name)
        group = one_group(model, behavior)
        if job == "bare":
            Floor(model.hf, group).forward(group.clean)
        else:
            ours(model, behavior)[job]()
    measure.print_peak()


def main() -> None:
    arguments = measure.begin("Circuits and patching", threads=1)
    if arguments.only:
        only(arguments.only)
        return
    rounds = arguments.rounds or 3
    parts = arguments.parts or ["floor", "lens", "eap_ig", "evaluation", "peaks"]
    if "floor" in parts:
        against_floor("gpt2", "GPT-2-small, random weights", rounds, peaks=True)
        against_floor("smollm2", "SmolLM2-135M, ioi", rounds, peaks=True)
    if "lens" in parts and measure.installed("transformer_lens"):
        against_transformer_lens(2)
    if "eap_ig" in parts and eap_ig.available():
        against_eap_ig(arguments.rounds or 2, peaks="peaks" in parts)
    if "evaluation" in parts and eap_ig.available():
        evaluation_beside_eap_ig(arguments.rounds or 5)


if __name__ == "__main__":
    sys.exit(main())
