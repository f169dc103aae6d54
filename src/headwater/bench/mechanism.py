"""The mechanism of a compiled model: which head or MLP computes which variable, along which directions, from what.

The circuit is read off the program, not searched for. What cannot differ between two inputs of one length (positions,
the length itself) takes part in the computation but carries nothing that an interchange could show, so it is marked.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch
from torch import Tensor

from headwater.bench.rasp.assembly import closest
from headwater.bench.rasp.bases import Variable
from headwater.bench.rasp.interpreter import Interpreter
from headwater.bench.rasp.language import RaspError
from headwater.bench.rasp.layout import Layout
from headwater.bench.rasp.lowering import BOS, Head
from headwater.bench.rasp.words import word
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.circuit import Circuit
from headwater.localize.graph import Graph

if TYPE_CHECKING:
    from headwater.core.model import Model

_TRIED = 150  # inputs a length on which it is seen which variables differ


@register_result
class TrueMechanism(Result):
    """The known mechanism of a model.

    `tables["variables"]`: variable, encoding, node (that writes it), first, width (its directions: rows of
    `tensors["directions"]`), values (of a numerical one the first 50), gap (the smallest distance between two of them),
    varies (it differs between some two inputs of one length at one position), description. `tables["edges"]`: source,
    target, variable, live (the variable and what the target makes of it both vary, so that interchanging it can
    matter). `tables["nodes"]`: node, role ("task" or "spare"), variables, live (it writes a variable that varies).
    `tensors["directions"]`: [directions, d_model], where each is in the stream; `tensors["mask"]`: [sources, readers]
    bool, the live edges of headwater's graph.
    """

    kind: ClassVar[str] = "mechanism"
    main: ClassVar[str] = "edges"

    @property
    def graph(self) -> Graph:
        return Graph(**self.facts["graph"])

    def circuit(self, model: "Model | None" = None, *, live: bool = True) -> Circuit:
        """The circuit, bound to `model` where one is given; `live=False` also takes edges that carry only what never
        differs between inputs of one length.
        """
        graph = self.graph
        mask = self.tensors["mask"] if live else _mask(graph, self.tables["edges"])
        circuit = Circuit.build(graph, mask, method=f"truth: {self.facts['program']}")
        return circuit if model is None else circuit.bind(model)

    def directions(self, variable: str) -> Tensor:
        """[width, d_model]: where a variable is written, a row a value (one row where it is numerical)."""
        rows = self.tables["variables"].filter(pl.col("variable") == variable)
        if not rows.height:
            known = ", ".join(self.tables["variables"]["variable"].to_list())
            raise RaspError("unknown variable of this program", got=repr(variable), wanted=f"one of: {known}")
        row = rows.row(0, named=True)
        return self.tensors["directions"][row["first"] : row["first"] + row["width"]]

    @property
    def live_nodes(self) -> list[str]:
        """Sources whose interchange can matter."""
        return self.tables["nodes"].filter(pl.col("live"))["node"].to_list()


def name_mechanism(
    name: str, layout: Layout, output: Variable, vocabulary: Sequence[Any], *, config: dict[str, Any], causal: bool
) -> TrueMechanism:
    """Pass 5: say where everything is."""
    graph = Graph(
        n_layers=layout.n_layers,
        n_heads=layout.n_heads,
        n_kv_heads=layout.n_heads,
        d_model=layout.d_model,
    )
    varies = varying(layout, vocabulary, causal=causal, longest=int(config["max_length"]))
    edges = [
        {
            "source": layout.sources[read],
            "target": reader,
            "variable": read.name,
            "live": read in varies and (writes is None or writes in varies),
        }
        for reader, read, writes in _reads(layout, output)
    ]
    edge_table = pl.DataFrame(
        edges,
        schema={"source": pl.String, "target": pl.String, "variable": pl.String, "live": pl.Boolean},
    ).unique(maintain_order=True)
    variables = pl.DataFrame([_variable_row(variable, layout, varies) for variable in layout.first])
    written: dict[str, list[Variable]] = {}
    for variable, node in layout.sources.items():
        written.setdefault(node, []).append(variable)
    nodes = pl.DataFrame(
        [
            {
                "node": node,
                "role": "task" if node in written else "spare",
                "variables": [variable.name for variable in written.get(node, [])],
                "live": any(variable in varies for variable in written.get(node, [])),
            }
            for node in graph.sources
        ],
        schema={"node": pl.String, "role": pl.String, "variables": pl.List(pl.String), "live": pl.Boolean},
    )
    facts = {
        "program": name,
        "output": output.name,
        "vocabulary": [word(value) for value in vocabulary],
        "answers": [word(value) for value in output.listed],
        "scratch": [layout.scratch.start, layout.scratch.stop],
        "graph": graph.to_dict(),
    }
    live = edge_table.filter(pl.col("live"))
    return TrueMechanism(
        tables={"edges": edge_table, "variables": variables, "nodes": nodes},
        tensors={"directions": torch.eye(layout.d_model), "mask": _mask(graph, live)},
        facts=facts,
        config=config,
        provenance=Provenance.collect(seed=config.get("seed")),
    )


def _reads(layout: Layout, output: Variable) -> Iterator[tuple[str, Variable, Variable | None]]:
    """(reader, variable it reads, variable made of it): every read there is, also of the first token's mark."""
    for placed in layout.placed:
        part = placed.part
        if isinstance(part, Head):
            for letter, projection in (("q", part.q), ("k", part.k), ("v", part.v)):
                reader = f"{placed.node}<{letter}>"
                yield from ((reader, r.variable, part.writes) for r in projection.reads if bool(r.weight.any()))
                if bool(projection.bos.any()):
                    yield reader, BOS, part.writes
        else:
            yield from ((placed.node, read.variable, part.writes) for read in part.reads if bool(read.weight.any()))
            yield placed.node, BOS, part.writes
    yield "logits", output, None


def varying(layout: Layout, vocabulary: Sequence[Any], *, causal: bool, longest: int) -> set[Variable]:
    """The variables that differ between some two inputs of one length at one position, seen on seeded inputs."""
    import random

    draw = random.Random("headwater-varying")
    found: set[Variable] = set()
    wanted = [v for v in layout.first if v.expression is not None and not v.constant]
    for length in range(1, longest + 1):
        seen: dict[Variable, list[Any]] = {}
        for _ in range(_TRIED):
            interpreter = Interpreter([draw.choice(list(vocabulary)) for _ in range(length)], causal=causal)
            try:
                values = {v: interpreter.values(v.expression) for v in wanted if v not in found}  # type: ignore[arg-type]
            except RaspError:  # no meaning on this input
                continue
            for variable, row in values.items():
                if seen.setdefault(variable, row) != row:
                    found.add(variable)
        if len(found) == len(wanted):
            break
    return found


def _variable_row(variable: Variable, layout: Layout, varies: set[Variable]) -> dict[str, Any]:
    shown = variable.values if variable.encoding == "categorical" else (variable.values or ())[:50]
    return {
        "variable": variable.name,
        "encoding": variable.encoding,
        "node": layout.sources[variable],
        "first": layout.first[variable],
        "width": variable.width,
        "values": [str(value) for value in shown or ()],
        "gap": closest(variable.values) if variable.encoding == "numerical" and variable.values else None,
        "varies": variable in varies,
        "description": variable.expression.describe() if variable.expression is not None else "the first token",
    }


def _mask(graph: Graph, edges: pl.DataFrame) -> Tensor:
    mask = torch.zeros_like(graph.allowed)
    for source, target in edges.select("source", "target").iter_rows():
        mask[graph.edge(f"{source}->{target}")] = True
    return mask
