"""InterpBench (Gupta et al., 2024): do the nodes of a published circuit move its model's output, and no others?"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from headwater.bench.published.files import missing
from headwater.bench.published.result import SCHEMA, PublishedScores, score_row
from headwater.bench.siit.interpbench import load_interpbench
from headwater.bench.siit.recovering import auroc
from headwater.core.errors import MethodError
from headwater.core.interventions import replace
from headwater.core.progress import track
from headwater.core.results import Provenance


def interpbench(
    folder: str | Path,
    *,
    tokens: torch.Tensor | None = None,
    n: int = 64,
    length: int = 16,
    config: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    draws: int = 200,
    seed: int = 0,
) -> PublishedScores:
    """Interchange what each head and MLP writes, and compare how far the output moves with the published circuit.

    `effect`: the distance that the outputs move when a node gets what it writes on another input, as a share of the
    distance between both inputs' outputs (0: nothing; 1: as far as the whole other input moves them), for each node,
    `position` saying whether it is in the circuit. `node_auroc`: the chance that a node of the circuit has the larger
    effect; its interval is a bootstrap over inputs, and the row `random` that of rankings by chance. tokens: inputs
    [2 n, T], the second half serving the first as others; without them `n` pairs of random tokens of `length`. config,
    tokenizer: see `load_interpbench`. Raises BehaviorError for a folder that is not there, StoreError and ModelError as
    `load_interpbench` does, MethodError for tokens that make no pairs.

    Known failure: on random tokens a circuit that acts on real inputs only (IOI) has little to do: give inputs of its
    task.
    """
    began = time.perf_counter()
    path = Path(folder)
    if not path.is_dir():
        raise missing("InterpBench", path, "ll_model.pth, ll_model_cfg, edges, meta.json")
    found = load_interpbench(path, config=config, tokenizer=tokenizer)
    model, circuit, given = found.model, set(found.mechanism.live_nodes), tokens is not None
    if tokens is None:
        generator = torch.Generator().manual_seed(seed)
        size = (2 * n, min(length, model.max_length or length))
        tokens = torch.randint(model.d_vocab, size, generator=generator)
    if tokens.ndim != 2 or len(tokens) < 4 or len(tokens) % 2:
        raise MethodError("tokens make no pairs of inputs", got=list(tokens.shape), wanted="[2 n, T], n at least 2")
    base, other = tokens.chunk(2)
    graph = found.circuit.graph
    sites = {f"a{i}.h{h}": f"z.{i}.h{h}" for i in range(graph.n_layers) for h in range(graph.n_heads)}
    sites |= {f"m{i}": f"mlp_out.{i}" for i in range(graph.n_layers)}
    run = model.run(other, capture=list(sites.values()))
    clean, there = model.run(base).logits.float(), run.logits.float()
    whole = _distance(there, clean).clamp(min=1e-12)
    rows: list[dict[str, Any]] = []
    effects: dict[str, np.ndarray[Any, Any]] = {}
    for node, site in track(sites.items(), "nodes", total=len(sites)):
        moved = model.run(base, interventions=[replace(site, run[site])]).logits.float()
        effects[node] = (_distance(moved, clean) / whole).numpy()
        where = "circuit" if node in circuit else "outside"
        rows.append(score_row(path.name, "interchange", node, where, "effect", effects[node].tolist(), share=False))
    true = [node in circuit for node in sites]
    table = np.stack([effects[node] for node in sites])  # [nodes, n]
    rng = np.random.default_rng(seed)
    picks = rng.integers(table.shape[1], size=(draws, table.shape[1]))
    again = [auroc(table[:, pick].mean(1).tolist(), true) for pick in picks]
    chance = [auroc(rng.permutation(len(true)).tolist(), true) for _ in range(draws)]
    for method, value, drawn in (("interchange", auroc(table.mean(1).tolist(), true), again), ("random", 0.5, chance)):
        row = score_row(path.name, method, "all", "all", "node_auroc", [])
        lo, hi = np.quantile(drawn, (0.025, 0.975))
        rows.append({**row, "value": value, "lo": float(lo), "hi": float(hi), "n": table.shape[1]})
    return PublishedScores(
        tables={"scores": pl.DataFrame(rows, schema=SCHEMA)},
        facts={"benchmark": "InterpBench", "nodes": len(true), "in_circuit": sum(true), "edges": found.circuit.n_edges},
        config={"n": len(base), "length": base.shape[1], "random_tokens": not given, "seed": seed},
        provenance=Provenance.collect(model, seed=seed, seconds=time.perf_counter() - began),
    )


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).flatten(1).norm(dim=1).double()
