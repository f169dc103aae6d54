"""circuit show|compare|evaluate|mib: circuits in files, against each other, against the model, on MIB's track."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwater.cli.options import BehaviorName, Json, ModelName
from headwater.cli.show import show, show_json, show_rows

if TYPE_CHECKING:
    from headwater.localize.circuit import Circuit

File = Annotated[Path, typer.Argument(help="A circuit in MIB's JSON form, or the folder of a saved one.")]
Seed = Annotated[int, typer.Option(help="The seed of everything drawn.")]


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    group = typer.Typer(no_args_is_help=True, help="Circuits: subgraphs of a model that cause a behavior.")
    group.command("show")(show_)
    group.command("compare")(compare)
    group.command("evaluate")(evaluate)
    group.command("mib")(mib)
    app.add_typer(group, name="circuit")


def show_(
    file: File,
    top: Annotated[int, typer.Option(min=1, help="How many edges to print.")] = 20,
    json: Json = False,
) -> None:
    """Show a circuit's size, its nodes and its strongest edges."""
    circuit = _circuit(file)
    edges = circuit.tables["edges"]
    edges = edges.sort(edges["score"].abs(), descending=True).head(top).to_dicts()
    facts = {"edges": circuit.n_edges, "of": circuit.facts["n_total_edges"], "nodes": circuit.nodes}
    if json:
        show_json({**facts, "strongest": edges})
        return
    show(f"{circuit.n_edges} of {circuit.facts['n_total_edges']} edges, {len(circuit.nodes)} nodes")
    show(", ".join(circuit.nodes))
    show_rows(edges, as_json=False, title=f"The {len(edges)} strongest edges")


def compare(
    a: File,
    b: File,
    n: Annotated[int, typer.Option(min=1, help="Draws of the nulls.")] = 1000,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Say how much two circuits of one graph share, beside what their layer profiles alone give."""
    from headwater.localize.comparing.compare import compare as compared

    result = compared(_circuit(a), _circuit(b), n=n, seed=seed, names=(str(a), str(b)))
    rows = result.to_frame().to_dicts()
    show_rows(rows, as_json=json, title=f"{a} and {b} share {len(result.facts['shared_heads'])} heads")


def evaluate(
    file: File,
    behavior: BehaviorName,
    model: ModelName,
    n: Annotated[int | None, typer.Option(min=2, help="How many pairs; half of them are judged on.")] = None,
    seed: Seed = 0,
    metric: Annotated[str, typer.Option(help="What is explained.")] = "logit_diff",
    ablation: Annotated[
        list[str] | None,
        typer.Option(help="What edges outside carry: counterfactual, zero, mean, ...; may be repeated."),
    ] = None,
    json: Json = False,
) -> None:
    """Say how faithful a circuit is on a behavior's test pairs, and how complete."""
    from headwater import behavior as behaviors
    from headwater.core.loading import load

    loaded = load(model)
    circuit = _circuit(file, loaded)
    pairs = behaviors.make(behavior, n=n, seed=seed).test
    options: dict[str, Any] = {"metric": metric, "ablation": ablation or ["counterfactual"]}
    measured = {
        "faithfulness": circuit.faithfulness(pairs, **options),
        "completeness": circuit.completeness(pairs, **options),
    }
    rows = [
        {"measure": name, "ablation": kind, "value": found["faithfulness"], "lo": found["lo"], "hi": found["hi"],
         "n": result.facts["n"]}
        for name, result in measured.items()
        for kind, found in result.facts["by_ablation"].items()
    ]  # fmt: skip
    show_rows(rows, as_json=json, title=f"{circuit.n_edges} edges on {pairs.name}")


def mib(
    tasks: Annotated[
        list[str], typer.Argument(help="MIB tasks (ioi, mcqa, arithmetic_addition, arc_easy, ...) or behaviors.")
    ],
    model: ModelName,
    method: Annotated[list[str] | None, typer.Option(help="A method that scores edges; may be repeated.")] = None,
    ablation: Annotated[
        list[str] | None,
        typer.Option(help="What edges outside carry (counterfactual is MIB's patching); may be repeated."),
    ] = None,
    level: Annotated[str, typer.Option(help="Budgets of edges or of nodes: edge, node.")] = "edge",
    data: Annotated[Path | None, typer.Option(help="A folder with MIB's lists or rows.")] = None,
    n: Annotated[int | None, typer.Option(min=2, help="How many pairs of each task.")] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Also save the whole result into this folder.")] = None,
    submission: Annotated[
        Path | None, typer.Option(help="Also write the rankings as MIB's JSON into this folder.")
    ] = None,
    json: Json = False,
) -> None:
    """Run MIB's circuit track: CPR and CMD of each method on each task, by both rankings, beside random."""
    from headwater import behavior as behaviors
    from headwater.behavior.mib import TASKS, mib_task, track_pairs
    from headwater.core.loading import load
    from headwater.localize.judging.circuit_track import mib_track

    loaded = load(model)
    made = {}
    for task in tasks:
        if task in TASKS and (data is not None or task.startswith(("arithmetic", "arc"))):
            made[task] = track_pairs(mib_task(task, data=data, n=n, seed=seed), loaded)
        else:
            made[Path(task).stem] = behaviors.make(task, n=n, seed=seed)
    result = mib_track(
        loaded,
        tasks=made,
        methods=method or ["eap_ig"],
        ablations=ablation or ["counterfactual"],
        level=level,
        seed=seed,
    )
    if out is not None:
        result.save(out)
    if submission is not None:
        result.submission(submission)
    show_rows(result.to_frame().to_dicts(), as_json=json, title=f"CPR and CMD on {loaded.name}, by {level}s")


def _circuit(path: Path, model: Any = None) -> "Circuit":
    """A circuit from MIB's JSON, or from the folder of a saved result."""
    from headwater.core.errors import StoreError
    from headwater.core.results import load_result
    from headwater.localize.circuit import Circuit

    if not path.is_dir():
        return Circuit.from_json(path, model=model)
    found = load_result(path)
    if not isinstance(found, Circuit):
        raise StoreError(f"{path} holds no circuit", got=found.kind, wanted="circuit")
    return found if model is None else found.bind(model)
