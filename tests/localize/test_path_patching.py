"""Path patching equals plain hooks that read, freeze and run on, edge by edge, in every family."""

from typing import Any

import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater.behavior.metrics import metric
from headwater.core.errors import MethodError
from headwater.localize.engine.passes import Engine, Scored, make_batches
from headwater.localize.engine.planning import plan
from headwater.localize.graph import Graph
from headwater.localize.patching.paths import PathPatchConfig, Route, _Setting, routes_of
from localize_families import LAYERS, Plain, bound, make, pairs

DIFF = metric("logit_diff")


def setting(model: Any, batch: Any, routes: list[Route], **options: Any) -> _Setting:
    engine = Engine(model)
    config = PathPatchConfig(**options)
    nothing: Any = None
    return _Setting(engine, config, Scored.named("logit_diff"), routes, nothing, nothing, [batch], 60, True)


def paths(model: Any, group: Any, routes: list[Route], **options: Any) -> dict[Route, Tensor]:
    (batch,) = make_batches(bound(group), 1000)
    return setting(model, batch, routes, **options).run(batch)[0]


def plain_frozen(plain: Plain, base: dict[str, Any], deltas: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits of the base run in which each reader reads its base stream plus what is given for it."""

    def reading(reader: str) -> Any:
        layer = LAYERS if reader == "logits" else int(reader[1])
        streams = [*base["resid"], base["final"]]
        stream = streams[layer]
        if reader.startswith("m") and not plain.layout.parallel:
            heads = plain.writes(base)
            stream = stream + sum(value for name, value in heads.items() if name.startswith(f"a{layer}."))
        return lambda _: stream + deltas[reader]

    return plain.run(ids, plain.reading({reader: reading(reader) for reader in deltas}))["logits"]


FAMILIES = ["llama", "gpt2", "neox", "phi", "gemma2", "qwen3", "olmo2", "granite", "opt", "mixtral"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_edges_equal_plain_hooks(name: str, direction: str) -> None:
    model, group = make(name), pairs(3, 6, 2)
    graph = hw.localize.graph_of(model)
    plain = Plain(model, name)
    base_ids, other_ids = (group.clean, group.corrupt) if direction == "noise" else (group.corrupt, group.clean)
    with torch.no_grad():
        base, other = plain.run(base_ids), plain.run(other_ids)
        ours, theirs = plain.writes(base), plain.writes(other)
        delta = {source: theirs[source] - ours[source] for source in ours}
        single = [Route((tuple(edge),)) for edge in graph.allowed.nonzero().tolist()][
            :: 3 if direction == "noise" else 11
        ]
        sets = [
            Route((graph.edge("input->m0"), graph.edge("a0.h1->m1"), graph.edge("a0.h2->logits"))),
            Route((graph.edge("a0.h1->a1.h0<q>"), graph.edge("a0.h3->a1.h0<q>"), graph.edge("input->a0.h1<k>"))),
            Route((graph.edge("m0->a1.h1<v>"), graph.edge("input->m1"))),
        ]
        found = paths(model, group, [*single, *sets], direction=direction)
        moved = 0
        for route in [*single, *sets]:
            deltas = {
                graph.readers[reader]: sum(delta[graph.sources[s]] for s in sources)
                for reader, sources in route.readers.items()
            }
            expected = DIFF(plain_frozen(plain, base, deltas, base_ids), group.answers, group.foils)  # type: ignore[arg-type]
            torch.testing.assert_close(
                found[route], expected, rtol=1e-8, atol=1e-8,
                msg=lambda m, r=route: f"{[(graph.sources[s], graph.readers[t]) for s, t in r.edges]}: {m}",
            )  # fmt: skip
            moved += int(not torch.allclose(expected, DIFF(base["logits"], group.answers, group.foils)))
    assert moved > len(single) // 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2", "opt"])
def test_recomputed_mlps_follow_the_sender(name: str) -> None:
    """By plain hooks: attention held at its base output but for the sender's part, what receivers read kept, put in."""
    model, group = make(name), pairs(3, 6, 2)
    graph, plain = hw.localize.graph_of(model), Plain(model, name)
    receivers = ["logits", "m1", "a1.h0<q>"]
    routes = [
        Route(
            tuple(
                graph.edge(f"{sender}->{reader}") for reader in receivers if not (sender == "m1" and reader != "logits")
            )
        )
        for sender in ("a0.h1", "m0", "input")
    ]
    found = paths(model, group, routes, mlps="recomputed")
    frozen = paths(model, group, routes)
    with torch.no_grad():
        base, other = plain.run(group.clean), plain.run(group.corrupt)
        ours, theirs = plain.writes(base), plain.writes(other)
        for route, sender in zip(routes, ("a0.h1", "m0", "input"), strict=True):
            read = held_streams(plain, group.clean, base, ours, sender, theirs[sender] - ours[sender])
            streams = [*base["resid"], base["final"]]
            readers = {}
            for reader in receivers:
                readers[reader] = lambda _, x=read[reader]: x
            assert len(streams) == LAYERS + 1
            logits = plain.run(group.clean, plain.reading(readers))["logits"]
            torch.testing.assert_close(found[route], DIFF(logits, group.answers, group.foils), rtol=1e-8, atol=1e-8)
            assert not torch.allclose(found[route], frozen[route])


def held_streams(
    plain: Plain, ids: Tensor, base: dict[str, Any], ours: dict[str, Tensor], sender: str, delta: Tensor
) -> dict[str, Tensor]:
    """What logits, m1 and a1.h0<q> read when heads stay as they are in the base run and MLPs follow the sender."""
    layout, read = plain.layout, {}
    stream = ours["input"] + (delta if sender == "input" else 0)
    for layer in range(LAYERS):
        read[f"a{layer}.h0<q>"] = stream
        heads = sum(value for name, value in ours.items() if name.startswith(f"a{layer}."))
        mid = stream + heads + (delta if sender.startswith(f"a{layer}.") else 0)
        reads = stream if layout.parallel else mid
        read[f"m{layer}"] = reads
        seen = plain.run(ids, plain.reading({f"m{layer}": lambda _, x=reads: x}))
        write = plain.writes(seen)[f"m{layer}"]
        if sender == f"m{layer}":
            write = ours[sender] + delta
        stream = mid + write
    return read | {"logits": stream}


def test_a_table_of_paths(tiny_model64: Any) -> None:
    ioi = hw.behavior("ioi", n=8, seed=0)
    graph = hw.localize.graph_of(tiny_model64)
    result: Any = hw.localize.path_patch(tiny_model64, ioi)
    assert result.to_frame().height == graph.n_edges
    exact = result.attribution()
    assert exact.circuit(edges=10).n_edges <= 10
    approximate: Any = hw.localize.eap(tiny_model64, ioi)
    # the edges into logits differ from their first-order estimate by the norm and the softmax only
    both = torch.stack([exact.scores[graph.allowed], approximate.scores[graph.allowed]])
    assert float(torch.corrcoef(both)[0, 1]) > 0.7
    row = result.to_frame().filter(source="m2", target="logits").row(0, named=True)
    assert row["change"] == pytest.approx(-float(exact.scores[graph.edge("m2->logits")]))
    assert row["effect"] == pytest.approx(row["change"] / (result.facts["corrupt"] - result.facts["clean"]))
    assert plan("path_patch", tiny_model64, ioi).counts() == result.facts["ran"]
    loaded: Any = hw.localize.path_patch(
        tiny_model64, ioi, senders="heads", receivers=["a2.*<q>", "logits"], mlps="recomputed"
    )
    assert loaded.to_frame()["source"].to_list() == [f"a{layer}.h{h}" for layer in range(3) for h in range(4)]
    counts = plan(
        "path_patch", tiny_model64, ioi, senders="heads", receivers=["a2.*<q>", "logits"], mlps="recomputed"
    ).counts()
    assert counts == loaded.facts["ran"]
    with pytest.raises(MethodError, match="by itself"):
        loaded.attribution()
    one = hw.localize.path_patch(tiny_model64, ioi, senders=["a0.h1"], receivers="a1.*<q>", apart=True)
    assert one.to_frame().height == 4
    few = hw.localize.path_patch(tiny_model64, ioi, edges=["a0.h1->a1.h0<q>", "a0.h1->a1.h0<q>+a0.h1->a1.h0<k>"])
    assert few.to_frame()["effect"][0] == pytest.approx(one.to_frame()["effect"][0])
    assert few.to_frame()["target"][1] == "a1.h0<q>+a1.g0<k>"


def test_patched_together_the_edges_into_logits_are_the_counterfactual(tiny_model64: Any) -> None:
    ioi = hw.behavior("ioi", n=8, seed=0)
    graph = hw.localize.graph_of(tiny_model64)
    every = "+".join(f"{source}->logits" for source in graph.sources)
    result = hw.localize.path_patch(tiny_model64, ioi, edges=every)
    assert result.to_frame()["effect"].item() == pytest.approx(1.0, abs=1e-9)


def test_wrong_paths_are_refused(tiny_model: Any) -> None:
    ioi = hw.behavior("ioi", n=4, seed=0)
    for wrong in (
        {"edges": ["a1.h0->a0.h0<q>"]},
        {"edges": ["a0.h0"]},
        {"senders": "heads"},
        {"senders": "a7.h0", "receivers": "logits"},
        {"senders": "m2", "receivers": "a0.h0<q>"},
        {"senders": "heads", "receivers": "logits", "edges": ["input->m0"]},
        {"mlps": "thawed"},
        {"direction": "up"},
    ):
        with pytest.raises(MethodError):
            hw.localize.path_patch(tiny_model, ioi, **wrong)
    graph = Graph(n_layers=2, n_heads=2, n_kv_heads=2)
    assert len(routes_of(graph, PathPatchConfig(senders="mlps", receivers=("logits", "m1")))) == 2
