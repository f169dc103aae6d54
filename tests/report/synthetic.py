"""A run as the stages would store it: small, made up, with the columns of the contract and hostile text in every
place that shows text.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import polars as pl

from headwater.claims.claim import Claim, Outcome
from headwater.claims.ledger import Ledger
from headwater.core.results import Provenance, Result
from headwater.report.gather import Found, Gathered

from .synthetic_acts import TABLES as ACTS
from .synthetic_bench import TABLES
from .synthetic_comparing import TABLES as COMPARING
from .synthetic_data import TABLES as DATA
from .synthetic_dynamics import TABLES as DYNAMICS
from .synthetic_examples import TABLES as EXAMPLES
from .synthetic_history import FACTS as HISTORY_FACTS
from .synthetic_history import TABLES as HISTORY
from .synthetic_safety import TABLES as SAFETY

HOSTILE = '<script>alert("x")</script>'
N_LAYERS, N_HEADS, N_KV = 30, 9, 3
POSITIONS = ["start", "IO", "S1", "S1+1", "S2", "END"]

PROVENANCE = Provenance(
    model="SmolLM2-135M-Instruct",
    fingerprint="9c1f0a77d2e34b5586aa",
    behavior="5d0be1c7a9",
    seed=0,
    command="headwater trace ioi --model smollm2 --out runs/ioi",
    versions={"python": "3.11.2", "headwater": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    date="2026-11-21T10:40:00+00:00",
    seconds=41.5,
)


def result(kind: str, tables: dict[str, Any], facts: dict[str, Any] | None = None, **config: Any) -> Result:
    """A Result of any kind, with `tables` as lists of rows or columns; not registered, so it stays in memory."""
    cls = type(f"Synthetic_{kind}", (Result,), {"kind": kind})
    frames = {name: pl.DataFrame(rows, infer_schema_length=None) for name, rows in tables.items()}
    return cls(tables=frames, facts=facts, config=config, provenance=PROVENANCE)


def behavior_report(seed: int = 0) -> Result:
    rng = random.Random(seed)
    names, places = ["Mary", "John", "Anna", "Paul", "Ruth"], ["store", "park", "school"]
    rows = []
    for i in range(100):
        io, s = rng.sample(names, 2)
        prompt = f"When {io} and {s} went to the {rng.choice(places)}, {s} gave a drink to"
        if i == 0:
            prompt = f"When {HOSTILE} and \u202eeliJ\u202c went\nto the store, \x00Jill gave =1+1 to"
        margin = rng.gauss(4.2, 2.4)
        rows.append(
            {
                "id": i, "prompt": prompt, "answer": f" {io}", "foil": f" {s}",
                "logit_diff": margin, "prob_diff": math.tanh(margin / 4),
                "correct": margin > 0, "rank": 0 if margin > 0 else 3, "cf_logit_diff": rng.gauss(-3.1, 2.2),
            }
        )  # fmt: skip
    metrics = [
        {"metric": "logit_diff", "slice_name": "all", "slice": "all", "value": 4.21, "lo": 3.74, "hi": 4.66, "n": 100},
        {"metric": "accuracy", "slice_name": "all", "slice": "all", "value": 0.94, "lo": 0.89, "hi": 0.98, "n": 100},
        {"metric": "prob_diff", "slice_name": "all", "slice": "all", "value": 0.41, "lo": 0.36, "hi": 0.46, "n": 100},
    ]
    for name, values in (
        ("template", [f"t{i}: When A and B went to the place" for i in range(6)]),
        ("order", ["ABBA", "BABA"]),
    ):
        for value in values:
            v = rng.gauss(4.2, 1)
            metrics.append(
                {
                    "metric": "logit_diff",
                    "slice_name": name,
                    "slice": value,
                    "value": v,
                    "lo": v - 0.9,
                    "hi": v + 0.8,
                    "n": 16,
                }
            )
            a = min(1.0, rng.uniform(0.8, 1.02))
            metrics.append(
                {
                    "metric": "accuracy",
                    "slice_name": name,
                    "slice": value,
                    "value": a,
                    "lo": a - 0.08,
                    "hi": min(1.0, a + 0.05),
                    "n": 16,
                }
            )
    canary = [
        {"format": f, "condition": c, "accuracy": a, "lo": a - 0.07, "hi": a + 0.07, "n": 60, "chance": ch}
        for f, c, a, ch in (
            ("cloze", "answer in prompt", 0.91, 0.25), ("copying", "answer in prompt", 0.97, 0.25),
            ("multiple choice", "labels A/B/C/D", 0.27, 0.25), ("multiple choice", "labels 1/2/3/4", 0.22, 0.25),
        )
    ]  # fmt: skip
    dropped = [{"id": 7, "reason": "answer is two tokens"}, {"id": 9, "reason": f"names differ in length {HOSTILE}"}]
    return result("behavior_report", {"metrics": metrics, "rows": rows, "canary": canary, "dropped": dropped})


def pairs() -> Result:
    """The behavior's pairs, as the first stage stores them."""
    prompt = f"When Mary {HOSTILE} and John went to the store, John gave a drink to"
    spans = {
        "END": [prompt.rindex("to"), len(prompt)],
        "IO": [5, 9],
        "S2": [prompt.rindex("John"), prompt.rindex("John") + 4],
    }
    row = {"id": "ioi-0", "prompt": prompt, "answers": [" Mary"], "foils": [" John"], "positions": json.dumps(spans)}
    return result("result", {"pairs": [row]}, {"name": "ioi", "hash": "5d0be1c7a9", "about": {"generator": "ioi"}})


def patching(seed: int = 1) -> Result:
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []

    def add(
        kind: str, layer: int, head: int | None, position: str | None, effect: float, direction: str = "denoise"
    ) -> None:
        head_text, at = ("" if head is None else f".h{head}"), ("" if position is None else f"@{position}")
        rows.append(
            {
                "site": f"{kind}.{layer}{head_text}{at}", "kind": kind, "layer": layer, "head": head,
                "position": position, "effect": effect,
                "lo": effect - 0.05, "hi": effect + 0.05, "n": 40, "direction": direction,
            }
        )  # fmt: skip

    for layer in range(N_LAYERS):
        for position in POSITIONS:
            early, late = 1 / (1 + math.exp(layer - 15)), 1 / (1 + math.exp(17 - layer))
            base = early if position == "S2" else late if position == "END" else 0.0
            add("resid_post", layer, None, position, base + rng.gauss(0, 0.02))
            add(
                "attn_out",
                layer,
                None,
                position,
                (0.35 if (layer, position) == (17, "END") else 0) + rng.gauss(0, 0.02),
            )
    for direction in ("denoise", "noise"):
        for layer in range(N_LAYERS):
            for head in range(N_HEADS):
                known = {(17, 3): 0.42, (15, 1): 0.25, (19, 7): -0.18, (9, 4): 0.14}
                add("head", layer, head, None, known.get((layer, head), 0.0) + rng.gauss(0, 0.012), direction)
    facts = {
        "clean": 4.2,
        "corrupt": -3.1,
        "metric": "logit_diff",
        "position_labels": {"IO": " Mary", "S2": " John", "END": " to", "start": HOSTILE},
    }
    return result("patching", {"effects": rows}, facts, direction="denoise", metric="logit_diff")


def attribution(seed: int = 2) -> Result:
    rng = random.Random(seed)
    nodes: list[dict[str, Any]] = [{"node": "input", "layer": -1, "score": 0.9}]
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            nodes.append(
                {
                    "node": f"a{layer}.h{head}",
                    "layer": layer,
                    "score": rng.gauss(0, 0.02) + {(17, 3): 0.5, (19, 7): -0.3}.get((layer, head), 0),
                }
            )
        nodes.append({"node": f"m{layer}", "layer": layer, "score": rng.gauss(0, 0.05)})
    edges = [{"source": "a17.h3", "target": "logits", "score": 0.45}, {"source": "input", "target": "m0", "score": 0.3}]
    return result("attribution", {"nodes": nodes, "edges": edges}, {"method": "eap_ig"}, steps=5)


def circuit(seed: int = 3, n_edges: int = 300) -> Result:
    rng = random.Random(seed)
    core = [
        "input",
        "m0",
        "a3.h2",
        "a5.h8",
        "a9.h4",
        "m9",
        "a11.h0",
        "a13.h6",
        "m14",
        "a15.h1",
        "a15.h5",
        "a17.h3",
        "a17.h4",
        "m18",
        "a19.h7",
        "a21.h2",
        "a22.h0",
        "m25",
        "a26.h8",
        "logits",
    ]
    every = core + [f"a{rng.randrange(1, 30)}.h{rng.randrange(9)}" for _ in range(50)]
    layer = {name: -1 if name == "input" else 30 if name == "logits" else int(name[1:].split(".")[0]) for name in every}
    edges: dict[tuple[str, str], float] = {}
    while len(edges) < n_edges:
        strong = len(edges) < 46
        pool = core if strong else every
        source, target = rng.choice(pool), rng.choice(pool)
        if layer[source] >= layer[target] or target == "input" or source == "logits":
            continue
        if target.startswith("a"):
            port = rng.choice("qkv")
            head = int(target.split("h")[1])
            target = f"{target}<q>" if port == "q" else f"{target.split('.')[0]}.g{head // (N_HEADS // N_KV)}<{port}>"
        edges[source, target] = (rng.lognormvariate(-2.2, 0.7) if strong else rng.uniform(0, 0.05)) * rng.choice(
            [1, 1, 1, -1]
        )
    rows = [{"source": s, "target": t, "score": v} for (s, t), v in edges.items()]
    names = sorted({s for s, _ in edges} | {"logits"})
    facts = {
        "n_edges": len(rows), "n_total_edges": 63_000, "n_nodes": len(names), "method": "eap_ig",
        "graph": {"n_layers": N_LAYERS, "n_heads": N_HEADS, "n_kv_heads": N_KV},
    }  # fmt: skip
    return result("circuit", {"edges": rows, "nodes": [{"node": name} for name in names]}, facts)


def faithfulness() -> Result:
    curve = [
        {
            "fraction": f,
            "edges": round(f * 63_000),
            "faithfulness": v,
            "lo": v - 0.07,
            "hi": v + 0.07,
            "metric": "logit_diff",
        }
        for f, v in (
            (0.001, 0.12),
            (0.002, 0.31),
            (0.005, 0.58),
            (0.01, 0.74),
            (0.02, 0.86),
            (0.05, 0.97),
            (0.1, 1.04),
            (0.2, 1.06),
            (0.5, 1.02),
            (1.0, 1.0),
        )
    ]
    return result("faithfulness", {"curve": curve}, {"cpr": 1.02, "cmd": 0.05, "full": 4.2, "corrupt": -3.1})


def null(seed: int = 4) -> Result:
    rng = random.Random(seed)
    draws = [
        {"kind": kind, "draw": i, "value": rng.gauss(mean, 0.05)}
        for kind, mean in (("edges", 0.06), ("heads", 0.15))
        for i in range(100)
    ]
    return result("null", {"draws": draws}, {"observed": 0.71, "p": 0.0099, "percentile": 100.0})


def search() -> Result:
    rng = random.Random(9)
    curve = [
        {"setting": 0.3 / 2**i, "edges": 3 * 2**i, "nodes": 2 + i, "value": 0.5 * i, "backward": 0.0}
        | {"faithfulness": 0.2 * i + rng.gauss(0, 0.02), "forward": 40.0 * (i + 1)}
        for i in range(6)
    ]
    return result("search", {"curve": curve}, {"method": "acdc"})


def incompleteness() -> Result:
    rng = random.Random(10)
    rows = [
        {"kind": kind, "nodes": f"a{i}.h1 m{i}", "size": 2, "model": rng.random(), "circuit": rng.random()}
        | {"incompleteness": rng.random(), "raw": rng.random()}
        for kind, n in (("whole", 1), ("random", 8), ("greedy", 3))
        for i in range(n)
    ]
    return result("incompleteness", {"subsets": rows})


def claim_rates() -> Result:
    rows = [
        {"kind": kind, "of": of, "supported": i, "n": 70, "rate": i / 70, "lo": 0.0, "hi": 0.1, "bound": 0.05}
        for i, (kind, of) in enumerate(
            (kind, of) for kind in ("random weights", "all nulls") for of in ("investigations", "claims")
        )
    ] + [
        {"kind": "true mechanism", "of": of, "supported": 20, "n": 22, "rate": 20 / 22, "lo": 0.7, "hi": 1.0}
        for of in ("claims", "behavior-accuracy", "circuit-sufficient")
    ]
    return result("claim_rates", {"rates": rows})


def optimal_ablation() -> Result:
    rng = random.Random(11)
    rows = [{"node": f"a{i // 3}.h{i % 3}", "layer": i // 3, "gap": rng.random(), "loss": 1.0} for i in range(12)]
    return result("optimal_ablation", {"nodes": rows})


def effect() -> Result:
    actions = (
        ("knock out the name movers", False, ""),
        ("amplify a17.h3", False, ""),
        ("random heads", True, "same number of heads"),
        (f"prompt: {HOSTILE}", True, "no weights touched"),
    )
    measures = (
        ("logit_diff", 4.2, 0.3, (-6.1, 1.4, -0.2, -1.8)),
        ("agreement accuracy", 0.95, 0.03, (-0.02, 0.0, -0.01, -0.1)),
        ("perplexity", 21.3, 0.4, (0.6, 0.9, 0.2, 0.0)),
    )
    rows = [
        {"action": action, "measure": measure, "before": before, "after": before + change, "change": change}
        | {"lo": change - spread, "hi": change + spread, "n": 60, "baseline": baseline, "note": note}
        for measure, before, spread, changes in measures
        for change, (action, baseline, note) in zip(changes, actions, strict=True)
    ]
    versus = [
        {"action": action, "control": control, "measure": "ioi logit_diff", "gain": gain, "control_gain": gain - by}
        | {"difference": by, "lo": by - 0.4, "hi": by + 0.4, "n": 60}
        for action, control, gain, by in (
            ("knock out the name movers", "random heads", 6.1, 5.9),
            ("knock out the name movers", f"prompt: {HOSTILE}", 6.1, 4.3),
            ("amplify a17.h3", "random heads", 1.4, 0.2),
        )
    ]
    return result("effect", {"rows": rows, "versus": versus})


def heads() -> Result:
    known = (
        (17, 3, "name_mover", 0.71, 0.42, 0.001),
        (21, 2, "name_mover", 0.44, 0.11, 0.012),
        (15, 1, "s_inhibition", 0.52, 0.25, 0.001),
        (19, 7, "negative_name_mover", 0.38, -0.18, 0.004),
        (5, 8, "duplicate_token", 0.61, 0.08, 0.03),
        (3, 2, "previous_token", 0.93, 0.03, 0.21),
        (9, 4, "induction", 0.35, 0.14, 0.006),
    )
    rows = [
        {"layer": layer, "head": head, "role": role, "attention": attention, "effect": effect}
        | {"lo": effect - 0.06, "hi": effect + 0.06, "null": 0.02, "p": p}
        for layer, head, role, attention, effect, p in known
    ]
    return result("heads", {"roles": rows})


def ledger(seed: int = 5) -> Ledger:
    rng = random.Random(seed)

    def draws(mean: float, spread: float) -> tuple[float, ...]:
        return tuple(rng.gauss(mean, spread) for _ in range(100))

    alone = {"effect": 0.71, "lo": 0.63, "hi": 0.79, "n": 60}
    entries: dict[str, tuple[str, Outcome]] = {
        "real": (
            "SmolLM2 prefers the indirect object to the subject, above chance",
            Outcome(effect=0.94, lo=0.89, hi=0.98, p=0.0002, n=100, reference=0.5),
        ),
        "sufficient": (
            "The circuit alone restores at least half of the logit difference",
            Outcome(**alone, p=0.0005, reference=0.5),
        ),
        "beats_null": (
            f"The circuit beats random circuits of its size and layer profile {HOSTILE}",
            Outcome(**alone, p=0.0099, null_draws=draws(0.15, 0.05)),
        ),
        "necessary": (
            "Without the circuit the rest of the model cannot do it",
            Outcome(effect=0.44, lo=0.36, hi=0.52, p=0.9, n=60, reference=0.2, side="less"),
        ),
        "name_mover": (
            "a17.h3 and a21.h2 copy the indirect object's name",
            Outcome(effect=0.53, lo=0.44, hi=0.61, p=0.001, n=60, null_draws=draws(0.01, 0.02)),
        ),
        "previous_token": (
            "a3.h2 matters because it attends to the previous token",
            Outcome(effect=0.03, lo=0.02, hi=0.05, p=0.21, n=60, null_draws=draws(0.03, 0.03)),
        ),
        "duplicate": ("a5.h8 detects the repeated name", Outcome(effect=0.08, lo=-0.01, hi=0.17, p=0.08, n=60)),
        "few": ("The same holds for four names", Outcome(effect=0.2, n=3, why_not="3 pairs, at least 10 are needed")),
    }
    claims = [
        Claim(
            id=name, statement=text, test=name, stage="claims", command=f"headwater verify runs/ioi --claim {name}"
        ).with_outcome(outcome)
        for name, (text, outcome) in entries.items()
    ]
    return Ledger.of(claims, q=0.05, provenance=PROVENANCE)


def mechanism() -> Result:
    edges = [
        {"source": "input", "target": "a0.h0<q>", "variable": HOSTILE, "live": True},
        {"source": "input", "target": "a0.h0<k>", "variable": "bos", "live": False},
        {"source": "a0.h0", "target": "m0", "variable": "share", "live": True},
        {"source": "m0", "target": "logits", "variable": "count", "live": True},
    ]
    return result("mechanism", {"edges": edges}, {"program": HOSTILE})


def interchange() -> Result:
    edges = [
        {"source": f"a{i}.h0", "target": f"m{j}", "live": i == j, "changed": 0.5 if i == j else 0.0, "effect": 1.0}
        for i in range(3)
        for j in range(i, 3)
    ]
    return result("interchange", {"edges": edges}, {"program": HOSTILE, "n": 8, "outside": 0.0})


def compression() -> Result:
    streams = [{"site": f"resid_post.{i}", "cosine": 0.9 + i / 100, "error": 0.1} for i in range(6)]
    return result("compression", {"streams": streams}, {"accuracy": 0.99, "d_model": 8, "d_wide": 16})


def comparison() -> Result:
    """Two circuits that share more edges than their layers give."""
    rows = [
        {
            "what": what, "measure": measure, "value": value, "expected": 0.2, "lo": 0.1, "hi": 0.3, "p": 0.001,
            "percentile": 0.999, "null": "heads" if what == "heads" else "edges", "a": 40, "b": 50, "shared": 20,
        }
        for what, measure, value in [("edges", "iou", 0.4), ("edges", "recall", 0.6), ("heads", "iou", 0.5)]
    ]  # fmt: skip
    return result("comparison", {"overlap": rows}, {"names": ["a", HOSTILE]})


def reuse() -> Result:
    """Three circuits on three behaviors."""
    names = ["ioi", "colors", HOSTILE]
    rows = [
        {
            "circuit": a, "behavior": b, "faithfulness": 0.9 if a == b else 0.3, "lo": 0.2, "hi": 1.0, "relative": 1.0,
            "null": 0.1, "p": 0.09, "edges": 100, "n": 50,
        }
        for a in names for b in names
    ]  # fmt: skip
    return result("reuse", {"matrix": rows})


def head_groups() -> Result:
    """Groups of heads beside random ones."""
    rows = [
        {
            "group": name, "role": None, "heads": "a1.h2", "n_heads": 1, "attention": None, "attention_null": None,
            "attention_p": None, "effect": effect, "lo": effect - 0.1, "hi": effect + 0.1, "null": 0.02, "p": 0.05,
            "n": 50, "draws": 20,
        }
        for name, effect in [("name_mover", 0.5), ("s_inhibition", 0.3), (HOSTILE, 0.01)]
    ]  # fmt: skip
    return result("head_groups", {"groups": rows})


def interference() -> Result:
    """Faulty votes that win where the model is wrong."""
    votes = {"sound": (4.2, 1.0), "faulty": (-1.3, -5.8), "mixed": (-0.3, 1.7), "rest": (0.0, 0.0), "all": (2.6, -3.1)}
    rows = [
        {"outcome": outcome, "group": name, "margin": margin, "lo": margin - 0.5, "hi": margin + 0.5, "n": 30}
        for i, outcome in enumerate(("right", "wrong"))
        for name, both in votes.items()
        for margin in [both[i]]
    ]
    return result("interference", {"components": [{"component": "a1.h2", "verdict": "sound"}], "sums": rows})


def subspace() -> Result:
    """A patch that works through a dormant pathway."""
    rows = [
        {
            "part": part,
            "effect": effect,
            "lo": effect - 0.05,
            "hi": effect + 0.05,
            "n": 40,
            "about": f"{part} {HOSTILE}",
        }
        for part, effect in [("whole", 0.95), ("rowspace", 0.1), ("nullspace", 0.0), ("site", 0.6), ("random", 0.01)]
    ]
    return result("subspace", {"parts": rows}, {"verdict": "dormant pathway"})


def mib_track() -> Result:
    """Two methods and random on two tasks."""
    rows = [
        {
            "task": task, "method": method, "rank": rank, "level": "edge", "ablation": "zero", "cpr": 1.0 - cmd,
            "cmd": cmd, "seconds": 3.0, "forward": 10.0, "backward": 5.0, "n": 50,
        }
        for task in ("ioi", HOSTILE)
        for method, cmd in [("eap_ig", 0.04), ("eap", 0.1), ("random", 0.74)]
        for rank in ("abs", "signed")
    ]  # fmt: skip
    return result("mib_track", {"track": rows})


def path_patching(seed: int = 8) -> Result:
    rng = random.Random(seed)
    edges = [(f"a{layer}.h{h}", f"a3.h{q}<q>") for layer in range(3) for h in range(4) for q in range(4)]
    effects = [rng.gauss(0, 0.1) for _ in edges]
    table = {
        "source": [source for source, _ in edges],
        "target": [target for _, target in edges],
        "effect": effects,
        "lo": [value - 0.05 for value in effects],
        "hi": [value + 0.05 for value in effects],
        "n": [20] * len(edges),
    }
    return result("path_patching", {"effects": table}, {"metric": "logit_diff"})


def causal_trace(seed: int = 9) -> Result:
    rng = random.Random(seed)
    groups = ("first subject", "middle subject", "last subject", "first after", "further", "last")
    cells = [(kind, group, layer) for kind in ("resid_post", "mlp_out") for group in groups for layer in range(5)]
    effects = [rng.uniform(0, 0.4) for _ in cells]
    table = {
        "kind": [kind for kind, _, _ in cells],
        "group": [group for _, group, _ in cells],
        "layer": [layer for _, _, layer in cells],
        "effect": effects,
        "lo": [value - 0.05 for value in effects],
        "hi": [value + 0.05 for value in effects],
        "n": [20] * len(cells),
    }
    return result("causal_trace", {"effects": table}, {"metric": "prob"})


def discovery() -> Result:
    """Two methods on ever more pairs, and random."""
    rows = [
        {
            "method": method, "options": "", "pairs": n, "forward": 2.0 * n, "backward": 1.0 * n, "passes": 3.0 * n,
            "seconds": 1.0, "cmd": 0.2, "cpr": 0.9, "closeness": at, "overlap": None,
        }
        for method, at, n in [
            ("eap", 0.5, 4), ("eap", 0.6, 16), ("eap", 0.65, 64), ("eap_ig", 0.7, 4), ("eap_ig", 0.8, 16),
            (HOSTILE, 0.3, 16), ("random", 0.1, 0),
        ]
    ]  # fmt: skip
    return result("discovery", {"curve": rows}, {"fraction": 0.05})


def node_map(kind: str) -> Result:
    """A search method's scores of nodes."""
    rng = random.Random(5)
    rows = [
        {"node": f"a{layer}.h{head}", "layer": layer, "score": rng.gauss(0, 1)}
        for layer in range(N_LAYERS)
        for head in range(N_HEADS)
    ]
    return result(kind, {"nodes": rows}, {"method": kind})


def attention_tracing() -> Result:
    rng = random.Random(6)
    rows = [
        {
            "layer": layer, "head": 3, "query_role": "END", "source_role": HOSTILE if layer == 4 else "S2",
            "n": 12, "share": 0.5, "attention": 0.4, "weight": 0.2, "effect": rng.gauss(0.1, 0.1), "lo": -0.1,
            "hi": 0.4, "control": 0.01, "p": 0.03,
        }
        for layer in range(12)
    ]  # fmt: skip
    return result("attention_tracing", {"steps": rows}, {"method": "attention_tracing"})


MAKERS = {
    "behavior_report": ("behavior", behavior_report),
    "patching": ("localize", patching),
    "attribution": ("localize", attribution),
    "circuit": ("circuit", circuit),
    "faithfulness": ("circuit", faithfulness),
    "null": ("circuit", null),
    "search": ("circuit", search),
    "path_patching": ("localize", path_patching),
    "causal_trace": ("localize", causal_trace),
    "incompleteness": ("circuit", incompleteness),
    "optimal_ablation": ("circuit", optimal_ablation),
    "heads": ("heads", heads),
    "ledger": ("claims", ledger),
    "claim_rates": ("claims", claim_rates),
    "effect": ("act", effect),
    "mechanism": ("circuit", mechanism),
    "interchange": ("circuit", interchange),
    "compression": ("circuit", compression),
    "comparison": ("circuit", comparison),
    "reuse": ("circuit", reuse),
    "head_groups": ("heads", head_groups),
    "interference": ("localize", interference),
    "subspace": ("localize", subspace),
    "mib_track": ("circuit", mib_track),
    "discovery": ("circuit", discovery),
    "flow_routes": ("localize", lambda: node_map("flow_routes")),
    "cdt": ("localize", lambda: node_map("cdt")),
    "head_codes": ("localize", lambda: node_map("head_codes")),
    "attention_tracing": ("localize", attention_tracing),
    **{
        kind: (stage, lambda kind=kind, make=make: result(kind, make(), HISTORY_FACTS.get(kind)))
        for kind, (stage, make) in {
            **TABLES,
            **DYNAMICS,
            **DATA,
            **EXAMPLES,
            **HISTORY,
            **SAFETY,
            **ACTS,
            **COMPARING,
        }.items()
    },
}


def gathered(folder: Path, *kinds: str) -> Gathered:
    """A run with results of these kinds (all of them if none is named), in memory."""
    found = [
        Found(stage=stage, name=kind, result=make(), content_hash=f"{i:02d}" * 32)
        for i, (kind, (stage, make)) in enumerate(MAKERS.items())
        if not kinds or kind in kinds
    ]
    if not kinds:
        found.append(Found(stage="behavior", name="pairs", result=pairs()))
    config = {"behavior": "ioi", "model": "smollm2", "n": 200, "seed": 0}
    return Gathered(folder=folder, config=config, found=found, facts={item.stage: {} for item in found})
