"""Names the mechanism of a trained model, and makes the pairs to find it on."""

import random
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import polars as pl
import torch

from headwater.behavior.table import Behavior
from headwater.bench.mechanism import TrueMechanism
from headwater.bench.siit.alignment import true_edges
from headwater.bench.siit.causal import NO_VALUE
from headwater.bench.siit.ioi import IOI
from headwater.core.errors import BehaviorError
from headwater.core.results import Provenance

if TYPE_CHECKING:
    from headwater.bench.siit.causal import CausalGraph
    from headwater.bench.siit.config import SiitConfig
    from headwater.bench.siit.training import Task


def name_truth(task: "Task", config: "SiitConfig | None" = None, *, name: str) -> TrueMechanism:
    """The mechanism that a model was trained to have, as a TrueMechanism.

    Training fixes what a node writes, not through which of query, key and value a head reads it: `facts["granularity"]`
    is "head", and a true edge into a head stands in the mask for all three. `tensors["unscored"]` [sources, readers]
    marks the edges of which nothing is known: from `input` into nodes of the circuit that the causal graph does not
    have read it (they may take positions from it). Directions are learned, not given: `variables` has width 0.
    """
    causal, alignment, graph = task.causal, task.alignment, task.swapper.graph
    varies = _varying(causal)
    edges = [
        row | {"live": row["variable"] == "input" or row["variable"] in varies} for row in true_edges(causal, alignment)
    ]
    table = pl.DataFrame(
        edges, schema={"source": pl.String, "target": pl.String, "variable": pl.String, "live": pl.Boolean}
    ).unique(maintain_order=True)
    mask, unscored = torch.zeros_like(graph.allowed), torch.zeros_like(graph.allowed)
    readers = {
        node: [i for i, reader in enumerate(graph.readers) if reader.split("<")[0] == node] for node in graph.nodes
    }
    for source, target in table.filter(pl.col("live")).select("source", "target").iter_rows():
        mask[graph.source(source), readers[target]] = True
    for node in alignment.inside():
        unscored[0, readers[node]] = ~mask[0, readers[node]]
    written = {node: place.variables for place in alignment.places for node in place.nodes}
    nodes = [
        {
            "node": node,
            "role": "task" if node in written or node == "input" else "spare",
            "variables": list(written.get(node, ())),
            "live": node == "input" or any(variable in varies for variable in written.get(node, ())),
        }
        for node in graph.sources
    ]
    variables = [
        {
            "variable": variable,
            "encoding": "learned",
            "node": " ".join(alignment.nodes_of(variable)),
            "first": 0,
            "width": 0,
            "values": [],
            "varies": variable in varies,
            "description": f"{causal.kind(variable)} of {', '.join(causal.parents(variable)) or 'position'}",
        }
        for variable in causal.variables
    ]
    facts: dict[str, Any] = {
        "program": name,
        "output": causal.output,
        "vocabulary": list(causal.vocabulary),
        "answers": list(causal.answers),
        "scratch": [0, 0],
        "graph": graph.to_dict(),
        "granularity": "head",
        "alignment": alignment.to_list(),
    }
    schema = {"node": pl.String, "role": pl.String, "variables": pl.List(pl.String), "live": pl.Boolean}
    return TrueMechanism(
        tables={
            "edges": table,
            "variables": pl.DataFrame(variables, schema_overrides={"values": pl.List(pl.String)}),
            "nodes": pl.DataFrame(nodes, schema=schema),
        },
        tensors={
            "directions": torch.zeros(0, graph.d_model),
            "mask": mask & graph.allowed,
            "unscored": unscored & graph.allowed,
        },
        facts=facts,
        config=asdict(config) if config is not None else {},
        provenance=Provenance.collect(task.model, seed=config.seed if config is not None else None),
    )


def _varying(causal: "CausalGraph") -> set[str]:
    """Variables that differ between some two inputs of one kind."""
    generator = torch.Generator().manual_seed(0)
    inputs = causal.sample(256, generator)
    first, second = causal.run(inputs), causal.run(causal.partners(inputs, generator))
    return {name for name in causal.variables if bool((first[name] != second[name]).any())}


def pairs(causal: "CausalGraph", n: int = 64, *, seed: int = 0, name: str | None = None, near: float = 0.5) -> Behavior:
    """Pairs of inputs whose answers at the last position differ, in the model's words.

    near: the share of pairs that differ in one token (of `ioi`: in who gives, always). variables: both answers.
    Raises BehaviorError where there are hardly any such pairs.
    """
    if n < 2:
        raise BehaviorError("cannot make so few pairs", got=f"n={n}", wanted="n of at least 2")
    generator = torch.Generator().manual_seed(seed + 15_485_863)
    draw = random.Random(f"headwater-siit:{causal.name}:{seed}")
    rows: list[dict[str, Any]] = []
    taken: set[tuple[int, ...]] = set()
    for attempt in range(60):
        if len(rows) == n:
            break
        one = causal.sample(4 * n, generator)
        nudged, others = causal.nudged(one, generator), causal.partners(one, generator)
        close = torch.tensor([isinstance(causal, IOI) or draw.random() < near for _ in range(len(one))])
        other = torch.where(close[:, None], nudged, others)
        said, foil = (causal.run(x)[causal.output][:, -1] for x in (one, other))
        good = (said != foil) & (said != NO_VALUE) & (foil != NO_VALUE)
        for index in good.nonzero().flatten().tolist():
            key = tuple(one[index].tolist())
            # Short inputs are few: those already used come back only when new ones have become rare.
            if len(rows) < n and (key not in taken or attempt > 20):
                taken.add(key)
                words = causal.answers[int(said[index])], causal.answers[int(foil[index])]
                rows.append(_row(causal, one[index], other[index], words, bool(close[index]), len(rows)))
    if len(rows) < n:
        raise BehaviorError(f"{causal.name} has too few pairs whose answers differ", got=len(rows), wanted=f"{n}")
    about = {"causal graph": causal.name, "length": causal.length, "seed": seed, "near": near}
    return Behavior.from_rows(rows, name=f"siit-{name or causal.name}", about=about)


def _row(
    causal: "CausalGraph", one: torch.Tensor, other: torch.Tensor, words: tuple[str, str], close: bool, index: int
) -> dict[str, Any]:
    texts = [causal.vocabulary[code] for code in one.tolist()]
    starts = [sum(len(text) + 1 for text in texts[:at]) for at in range(len(texts))]
    named: dict[str, int] = {"END": len(texts) - 1}
    if isinstance(causal, IOI):
        where = {key: int(value[0]) for key, value in causal.positions_of(one[None]).items()}
        same = int(one[where["first"]]) == int(one[where["S2"]])
        named |= {
            "S1": where["first" if same else "second"],
            "IO": where["second" if same else "first"],
            "S2": where["S2"],
        }
    return {
        "id": f"{index:05d}",
        "prompt": " ".join(texts),
        "counterfactual": " ".join(causal.vocabulary[code] for code in other.tolist()),
        "answers": [f" {words[0]}"],
        "foils": [f" {words[1]}"],
        "positions": {key: [starts[at], starts[at] + len(texts[at])] for key, at in named.items()},
        "variables": {"answer": words[0], "counterfactual_answer": words[1]},
        "template": "near" if close else "far",
    }
