"""`score`: every localizing method on every model whose mechanism is known."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from headwater.bench.interchange import Interchange, interchange
from headwater.bench.scoring import measures as m
from headwater.bench.scoring.baselines import BASELINES
from headwater.bench.scoring.readings import Reading, edge_rows, joined, node_rows, read, scored_edges
from headwater.bench.scoring.spending import Spent, spent
from headwater.bench.scoring.subjects import Source, Subject, made_or_why, sources
from headwater.bench.scoring.table import CELLS, FAILED, MODELS, UNSCORED, TruthScores, summed_up
from headwater.core.cells import Cells
from headwater.core.errors import HeadwaterError, MethodError, ModelError
from headwater.core.files import to_json, write_whole
from headwater.core.progress import track
from headwater.core.results import Provenance
from headwater.localize.catalog import described
from headwater.localize.catalog import methods as known_methods
from headwater.localize.engine.passes import for_discovery
from headwater.localize.judging.circuit_track import passes_of
from headwater.localize.selection import select

OPTIONS: dict[str, dict[str, Any]] = {
    "patch": {"sites": ["head", "mlp_out"]},
    "patch_noise": {"method": "patch", "sites": ["head", "mlp_out"], "direction": "noise"},
    "eap_ig_gauss": {"method": "eap_ig", "steps": 20, "rule": "gauss"},
}
"""What methods are run with where it is not their default, and further entries that are a method with other options."""
COSTLY = ("edge_pruning", "node_pruning", "optimal_ablation")
"""Methods that learn by hundreds of passes: they are run with fewer seeds."""
NO_SCORES = {
    "causal_trace": "scores tokens and layers of a subject that the behavior names, not nodes or edges",
    "subspace_check": "judges one subspace that it is given; ranks nothing",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the table: a method with its options, or a baseline."""

    label: str
    method: str
    what: str = "method"
    options: dict[str, Any] = field(default_factory=dict)
    seeded: bool = False

    def run(self, subject: Subject, seed: int) -> tuple[Reading, Any]:
        if self.what == "baseline":
            return BASELINES[self.method](subject.model, subject.behavior, seed), None
        options = {"seed": seed, **self.options} if self.seeded else self.options
        result = known_methods.get(self.method)(subject.model, subject.behavior, **options)
        return read(result, subject.mechanism.graph), result


def score(
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
    models: Sequence[Any] | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    costly_seeds: int = 1,
    pairs: int = 64,
    out: str | Path | None = None,
) -> TruthScores:
    """Score localizing methods against mechanisms that are known, as InterpBench does (Gupta et al., 2024), beside what
    chance and the size of weights and activations give.

    methods: names, or name -> options (an option `method` makes the name a label, so that one method may stand there
    twice); None: all that are registered, with `OPTIONS`. models: names of compiled programs, folders of trained
    models, or objects with model and mechanism; None: all compiled programs. pairs: of each model, half of them to find
    on. seeds: each gives other pairs, other spare parts of compiled programs, and goes to methods that draw at random;
    methods in `COSTLY` are run with the first `costly_seeds` of them. out: a folder that keeps every cell as it ends;
    given again, those are not run again. A method that fails on a model is counted with its error.

    A method that needs no counterfactual is judged by the same truth: parts whose interchange changes the answer. Known
    failure: compiled programs are not trained models; what wins here need not win there.

    Raises MethodError for unknown methods and models.
    """
    started = time.monotonic()
    if pairs < 4 or not seeds or len(set(seeds)) != len(seeds) or costly_seeds < 1:
        got = f"pairs={pairs}, seeds={list(seeds)}, costly_seeds={costly_seeds}"
        raise MethodError("scores need pairs and seeds", got=got, wanted="4 pairs or more, seeds that differ")
    entries, unscored = _entries(methods)
    found = sources(models)
    cells = Cells(None if out is None else Path(out))
    silent: dict[str, str] = {}
    jobs = [
        (source, seed, entry)
        for source in found
        for number, seed in enumerate(seeds)
        for entry in entries
        if number < costly_seeds or entry.method not in COSTLY
    ]
    bench = _Bench(cells, pairs)
    for source, seed, entry in track(jobs, "truth", total=len(jobs)):
        if entry.label in silent:
            continue
        row = bench.cell(source, seed, entry)
        if row.get("unscored"):
            silent[entry.label] = row["unscored"]
    rows = [row for job in jobs if job[2].label not in silent for row in bench.rows(*job)]
    result = _result(entries, rows, [bench.about(source, seed) for source in found for seed in seeds])
    result.tables["unscored"] = pl.DataFrame(sorted((unscored | silent).items()), schema=UNSCORED, orient="row")
    result.facts = {"models": len(found), "methods": len(entries), "pairs": pairs, "seeds": list(seeds)}
    result.config = {
        "pairs": pairs, "seeds": list(seeds), "costly_seeds": costly_seeds, "models": [source.name for source in found],
        "methods": {e.label: {"method": e.method, **e.options} for e in entries if e.what == "method"},
    }  # fmt: skip
    result.provenance = Provenance.collect(seed=seeds[0], seconds=time.monotonic() - started)
    if out is not None:
        result.save(Path(out) / "result")
        write_whole(Path(out) / "leaderboard.json", to_json(result.to_frame().to_dicts()).encode())
    return result


def names() -> list[str]:
    """What `score` runs where no methods are named: registered methods that score something, and `OPTIONS`."""
    return sorted({*known_methods.names(), *OPTIONS} - set(NO_SCORES))


def _entries(methods: Sequence[str] | Mapping[str, Mapping[str, Any]] | None) -> tuple[list[Entry], dict[str, str]]:
    """(rows of the table, methods that score nothing with the reason). Raises MethodError for an unknown name."""
    asked = names() if methods is None else list(methods)
    unscored = dict(NO_SCORES) if methods is None else {name: NO_SCORES[name] for name in asked if name in NO_SCORES}
    given = methods if isinstance(methods, Mapping) else {}
    entries = []
    for label in asked:
        if label in unscored or label in BASELINES:
            continue
        options = dict(given.get(label) or OPTIONS.get(label, {}))
        method = str(options.pop("method", label))
        known_methods.get(method)
        seeded = "seed" in described(method)["options"].split(", ")
        entries.append(Entry(label=label, method=method, options=options, seeded=seeded))
    entries += [Entry(label=name, method=name, what="baseline") for name in BASELINES]
    return entries, unscored


class _Bench:
    """Runs cells, keeping the one model at hand."""

    def __init__(self, cells: Cells, pairs: int) -> None:
        self.cells, self.pairs = cells, pairs
        self.at: tuple[Source, int] | None = None
        self.subject: Subject | str = ""
        self.exact: Interchange | None = None

    def cell(self, source: Source, seed: int, entry: Entry) -> dict[str, Any]:
        """One method on one model: stored before, or run now."""
        key = self._key(source, seed, entry)
        if key not in self.cells:
            about = self.about(source, seed)
            row = {"method": entry.label, "model": source.name, "seed": seed}
            if about["why_not"] is None:
                row |= self._run(source, seed, entry)
            self.cells.add(key, row)
        return self.cells[key]

    def rows(self, source: Source, seed: int, entry: Entry) -> Iterator[dict[str, Any]]:
        """The stored row of a cell, unless its model could not be had."""
        if self.about(source, seed)["why_not"] is None:
            yield self.cells[self._key(source, seed, entry)]

    def about(self, source: Source, seed: int) -> dict[str, Any]:
        """The row of a model."""
        key = self._key(source, seed, None)
        if key not in self.cells:
            self.cells.add(key, self._describe(source, seed))
        return self.cells[key]

    def _key(self, source: Source, seed: int, entry: Entry | None) -> str:
        own = None if entry is None else [entry.label, entry.method, entry.options]
        return to_json([source.name, source.mark, seed, self.pairs, own], indent=None)

    def _go_to(self, source: Source, seed: int) -> None:
        if self.at != (source, seed):
            self.at, self.exact = (source, seed), None
            self.subject = made_or_why(source, self.pairs, seed)
            if isinstance(self.subject, Subject):
                self.exact = _exact(self.subject)

    def _describe(self, source: Source, seed: int) -> dict[str, Any]:
        self._go_to(source, seed)
        row: dict[str, Any] = dict.fromkeys(MODELS) | {"model": source.name, "origin": source.origin, "seed": seed}
        if isinstance(self.subject, str):
            return row | {"why_not": self.subject}
        mechanism = self.subject.mechanism
        known, true = scored_edges(mechanism), mechanism.tensors["mask"]
        nodes = mechanism.tables["nodes"].filter(pl.col("node") != "input")
        row |= {
            "nodes": nodes.height, "true_nodes": int(nodes["live"].sum()),
            "edges": int(joined(known, mechanism).sum()), "true_edges": int(joined(true, mechanism).sum()),
            "n": for_discovery(self.subject.behavior).n,
        }  # fmt: skip
        return row if self.exact is None else row | {key: self.exact.facts[key] for key in ("needed", "outside")}

    def _run(self, source: Source, seed: int, entry: Entry) -> dict[str, Any]:
        self._go_to(source, seed)
        assert isinstance(self.subject, Subject)
        started = time.monotonic()
        try:
            with spent(self.subject.model, for_discovery(self.subject.behavior)) as ran:
                reading, result = entry.run(self.subject, seed)
        except MethodError as error:
            if "no scores of nodes to compare" in str(error):
                return {"unscored": str(error)}
            return {"error": _said(error)}
        except Exception as error:  # a method of somebody else must not end the table of all others
            return {"error": _said(error)}
        row = {"scope": reading.scope(self.subject.mechanism.graph), "seconds": time.monotonic() - started}
        return row | _cost(result, ran) | compare(reading, self.subject, self.exact)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, HeadwaterError) else f"{type(error).__name__}: {error}"


def _cost(result: Any, ran: Spent) -> dict[str, float]:
    """Passes a pair: what the method says, else what was seen to run."""
    said = passes_of(result) if result is not None else None
    n = float(result.facts.get("n") or ran.n) if result is not None else float(ran.n)
    forward, backward = (ran.forward, ran.backward) if said is None else (said["forward"] / n, said["backward"] / n)
    return {"forward": forward, "backward": backward, "passes": forward + backward}


def _exact(subject: Subject) -> Interchange | None:
    """What interchanging each node and edge really does, on the pairs that methods see; None for an architecture that
    the plain definition does not know.
    """
    try:
        return interchange(subject.model, subject.mechanism, for_discovery(subject.behavior))
    except ModelError:
        return None


def compare(reading: Reading, subject: Subject, exact: Interchange | None = None) -> dict[str, Any]:
    """Every measure of a reading against the known mechanism; None where it has no meaning."""
    mechanism = subject.mechanism
    nodes = node_rows(reading, mechanism)
    row = _ranked("node", nodes)
    if exact is not None:
        changed = dict(exact.tables["nodes"].select("node", "changed").iter_rows())
        row["node_spearman"] = m.spearman(nodes["score"].to_list(), [changed[node] for node in nodes["node"]])
    if reading.edges is not None:
        edges = edge_rows(reading.edges, mechanism)
        row |= _ranked("edge", edges)
        row |= _of_circuit("circuit", _cut(reading.edges, mechanism), mechanism)
        if exact is not None:
            table = exact.tables["edges"].select("source", "target", "changed")
            by_edge = {(source, target): changed for source, target, changed in table.iter_rows()}
            seen = [by_edge[edge] for edge in edges.select("source", "target").iter_rows()]
            row["edge_spearman"] = m.spearman(edges["score"].to_list(), seen)
    if reading.own is not None:
        row |= _of_circuit("own", reading.own, mechanism) | {"own_edges": int(joined(reading.own, mechanism).sum())}
    return {key: None if isinstance(value, float) and value != value else value for key, value in row.items()}


def _ranked(what: str, table: pl.DataFrame) -> dict[str, Any]:
    scores, true = table["score"].to_list(), table["true"].to_list()
    return {
        f"{what}_auroc": m.auroc(scores, true),
        f"{what}_ap": m.average_precision(scores, true),
        f"{what}_precision": m.precision_at_size(scores, true),
    }


def _cut(scores: Tensor, mechanism: Any) -> Tensor:
    """The circuit of as many best edges as are true, without dangling parts."""
    value = torch.where(torch.isnan(scores), torch.full_like(scores, -torch.inf), scores)
    return select(mechanism.graph, value, edges=int(mechanism.tensors["mask"].sum()), rank="signed")


def _of_circuit(what: str, mask: Tensor, mechanism: Any) -> dict[str, Any]:
    found, true = joined(mask, mechanism), joined(mechanism.tensors["mask"], mechanism)
    names = (f"{what}_precision", f"{what}_recall", f"{what}_f1")
    return dict(zip(names, m.precision_recall_f1(found, true), strict=True))


def _result(entries: list[Entry], rows: list[dict[str, Any]], about: list[dict[str, Any]]) -> TruthScores:
    cells = pl.DataFrame([_only(row, CELLS) for row in rows if not row.get("error")], schema=CELLS)
    failed = pl.DataFrame([_only(row, FAILED) for row in rows if row.get("error")], schema=FAILED)
    said = [(e.label, e.what, ", ".join(f"{k}={json.dumps(v)}" for k, v in e.options.items())) for e in entries]
    tried = set(cells["method"].to_list()) | set(failed["method"].to_list())
    board, scores = summed_up(cells, failed, [one for one in said if one[0] in tried])
    tables = {"leaderboard": board, "scores": scores, "cells": cells, "failed": failed}
    return TruthScores(tables=tables | {"models": pl.DataFrame([_only(row, MODELS) for row in about], schema=MODELS)})


def _only(row: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    return {column: row.get(column) for column in schema}
