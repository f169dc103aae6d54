"""InterpBench's checks (Gupta et al., 2024): the circuit's nodes carry its variables, and no node outside has an
effect.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch
from torch import Tensor

from headwater.behavior.metrics import interval
from headwater.bench.siit.causal import NO_VALUE
from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result

if TYPE_CHECKING:
    from headwater.bench.siit.config import SiitConfig
    from headwater.bench.siit.training import Task

RIGHT, QUIET = 0.99, 0.01


@register_result
class SiitReport(Result):
    """How far a model is what its causal graph says.

    `tables["nodes"]`: node, role ("inside", "outside", "all inside", "all outside", "model"), variables, accuracy
    (share of inputs on which, after the node took its value of another input, *every* answer is what the causal graph
    says after the same swap: interchange-intervention accuracy; of a node outside, what it says without a swap; of the
    model, without a swap at all) with lo and hi (Wilson's 95% interval), n, moved (share of those inputs on which the
    causal graph's answers differ from those before the swap: where it is 0, nothing was tested), accuracy_moved (on
    those inputs alone), shift (mean over answers of the total variation between the model's answer distributions with
    and without the swap, 0 to 1).
    facts: accuracy, iia (the smallest `accuracy` inside), iia_lo, iia_moved (the smallest `accuracy_moved`), outside
    (the largest share of inputs with a wrong answer for a node outside alone), outside_hi, outside_all, shift_outside
    (largest), passed (accuracy and iia at least RIGHT, outside and outside_all at most QUIET, whatever the training
    asked for before it stopped).
    """

    kind: ClassVar[str] = "siit_report"
    main: ClassVar[str] = "nodes"


@torch.no_grad()
def check(
    task: "Task", *, n: int = 1000, seed: int = 1, config: "SiitConfig | None" = None, batch: int = 500
) -> SiitReport:
    """Swap each place of the circuit, all of them, each node outside and all of those, on `n` fresh inputs.

    Known failure: it tests the places it is given. A model may pass and still compute a variable twice, with one copy
    that it does not use; and a place whose variable never changes an answer (`moved` 0) is not tested by it.
    """
    if n < 2:
        raise MethodError("a check needs inputs", got=f"n={n}", wanted="at least 2")
    generator = torch.Generator().manual_seed(seed + 7919)
    inputs = task.causal.sample(n, generator)
    partners = task.causal.partners(inputs, generator)
    places = len(task.alignment.places)
    swaps: list[tuple[str, str, list[str], Tensor | None, Tensor | None]] = [("model", "model", [], None, None)]
    for index, place in enumerate(task.alignment.places):
        which = torch.zeros(places, dtype=torch.bool)
        which[index] = True
        swaps.append((" ".join(place.nodes), "inside", list(place.variables), which, None))
    if places > 1:
        swaps.append(("inside", "all inside", [], torch.ones(places, dtype=torch.bool), None))
    for node in task.alignment.outside(task.swapper.graph):
        swaps.append((node, "outside", [], None, task.swapper.mask([node])))
    if task.outside is not None and len(task.outside) > 1:
        swaps.append(("outside", "all outside", [], None, task.outside.any(dim=0)))
    rows = [_row(task, inputs, partners, batch, *swap) for swap in track(swaps, "checks")]
    table = pl.DataFrame(rows, schema_overrides={"variables": pl.List(pl.String), "accuracy_moved": pl.Float64})
    facts = _facts(table) | {"graph": task.causal.name, "n": n}
    facts["passed"] = bool(
        min(facts["accuracy"], facts["iia"]) >= RIGHT and max(facts["outside"], facts["outside_all"]) <= QUIET
    )
    return SiitReport(
        tables={"nodes": table},
        facts=facts,
        config={"n": n, "seed": seed, "right": RIGHT, "quiet": QUIET}
        | ({"training": asdict(config)} if config is not None else {}),
        provenance=Provenance.collect(task.model, seed=seed),
    )


def _row(
    task: "Task",
    inputs: Tensor,
    partners: Tensor,
    batch: int,
    name: str,
    role: str,
    variables: list[str],
    places: Tensor | None,
    nodes: Tensor | None,
) -> dict[str, Any]:
    right: list[Tensor] = []
    moved: list[Tensor] = []
    shifts: list[Tensor] = []
    for start in range(0, len(inputs), batch):
        mine, theirs = inputs[start : start + batch], partners[start : start + batch]
        before = task.causal.run(mine)[task.causal.output]
        plain, _ = task.swapper.record(task.ids(mine))
        if places is None and nodes is None:
            logits, after = plain, before
        else:
            _, writes = task.swapper.record(task.ids(theirs))
            if places is not None:
                rows, after, _ = task.interchange(mine, theirs, places.expand(len(mine), -1))
            else:
                rows, after = nodes.expand(len(mine), -1), before  # type: ignore[union-attr]
            logits = task.swapper.swapped(task.ids(mine), writes, rows)
        labels = task.labels(after)
        asked = labels >= 0
        keep = asked.any(dim=1)
        said = task.read(logits).argmax(dim=-1)
        right.append(((said == labels) | ~asked).all(dim=1)[keep])
        moved.append(((after != before) & (after != NO_VALUE))[:, task.positions].any(dim=1)[keep])
        apart = (task.read(logits).softmax(-1) - task.read(plain).softmax(-1)).abs().sum(-1) / 2
        shifts.append(apart[keep].mean(dim=1))
    good, changed = torch.cat(right), torch.cat(moved)
    mean, low, high = interval(good.double().tolist(), share=True)
    return {
        "node": name,
        "role": role,
        "variables": variables,
        "accuracy": mean,
        "lo": low,
        "hi": high,
        "n": len(good),
        "moved": float(changed.double().mean()),
        "accuracy_moved": float(good[changed].double().mean()) if bool(changed.any()) else None,
        "shift": float(torch.cat(shifts).double().mean()),
    }


def _facts(table: pl.DataFrame) -> dict[str, Any]:
    inside = table.filter(pl.col("role").is_in(["inside", "all inside"])).sort("accuracy")
    outside = table.filter(pl.col("role") == "outside").sort("accuracy")
    everything = table.filter(pl.col("role") == "all outside")
    moved = inside["accuracy_moved"].drop_nulls()
    alone = float(1 - outside["accuracy"][0]) if outside.height else 0.0
    return {
        "accuracy": float(table["accuracy"][0]),
        "iia": float(inside["accuracy"][0]),
        "iia_lo": float(inside["lo"][0]),
        "iia_moved": float(moved.min()) if len(moved) else None,  # type: ignore[arg-type]
        "outside": alone,
        "outside_hi": float(1 - outside["lo"][0]) if outside.height else 0.0,
        "outside_all": float(1 - everything["accuracy"][0]) if everything.height else alone,
        "shift_outside": float(outside["shift"].max()) if outside.height else 0.0,  # type: ignore[arg-type]
    }


@torch.no_grad()
def quick_check(task: "Task", n: int, *, seed: int) -> dict[str, float]:
    """accuracy, iia (over random places), outside (share wrong when all nodes outside are swapped), on `n` inputs."""
    from headwater.bench.siit.training import draw_places

    generator = torch.Generator().manual_seed(seed + 104_729)
    inputs = task.causal.sample(n, generator)
    partners = task.causal.partners(inputs, generator)
    _, writes = task.swapper.record(task.ids(partners))
    places = draw_places(n, len(task.alignment.places), generator)
    rows, after, before = task.interchange(inputs, partners, places)

    def right(logits: Tensor, output: Tensor) -> float:
        labels = task.labels(output)
        asked = labels >= 0
        keep = asked.any(dim=1)
        same = ((task.read(logits).argmax(dim=-1) == labels) | ~asked).all(dim=1)[keep]
        return float(same.double().mean())

    found = {"accuracy": right(task.swapper.record(task.ids(inputs))[0], before)}
    found["iia"] = right(task.swapper.swapped(task.ids(inputs), writes, rows), after)
    found["outside"] = 0.0
    if task.outside is not None:
        everything = task.outside.any(dim=0).expand(n, -1)
        found["outside"] = 1 - right(task.swapper.swapped(task.ids(inputs), writes, everything), before)
    return found
