"""link and lre: mechanisms of relations, against how often their facts were read."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli.options import Json
from headwater.cli.settings import settings_of
from headwater.cli.show import show, show_json, show_rows


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    app.command()(link)
    app.command()(lre)


def link(
    run: Annotated[Path, typer.Argument(help="A run of `headwater train`, such as one of examples/world.yaml.")],
    out: Annotated[Path, typer.Option(help="The folder of what is measured; killed, it goes on where it was.")],
    relation: Annotated[
        list[str] | None,
        typer.Option(help="A relation: of the run's world by name, or a JSON file; may be repeated. [default: all]"),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="The folder of another link: the same facts under other frequencies.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Only these checkpoints, such as 0,100,1000.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the measurement, such as n_test=50 or ranks=8,16.")
    ] = None,
    json: Json = False,
) -> None:
    """Relate how strong the linear mechanism of each relation is to how often its facts had been read by then."""
    from headwater.core.errors import MethodError
    from headwater.core.methods import fitted
    from headwater.core.results import load_result
    from headwater.data.link import link as run_link
    from headwater.data.link_strengths import StrengthConfig
    from headwater.data.link_worlds import compare_worlds

    try:
        chosen = [int(one) for one in steps.split(",") if one.strip()] if steps is not None else None
    except ValueError:
        raise MethodError("--steps takes steps", got=repr(steps), wanted="such as 0,100,1000") from None
    settings = fitted(StrengthConfig, _settings(option))
    found = run_link(run, _relations(run, relation or []), out=out, steps=chosen, strengths=settings)
    parts: dict[str, Any] = {name: found.tables[name].to_dicts() for name in ("correlations", "thresholds")}
    parts |= {name: found.tables[name].to_dicts() for name in ("predictions", "overlaps")}
    if against is not None:
        one, other = ({name: load_result(at / where) for name, where in _PARTS.items()} for at in (against, out))
        worlds: Any = compare_worlds(
            *(part[name] for part in (one, other) for name in _PARTS)  # pyright: ignore[reportArgumentType]
        )
        worlds.save(out / "worlds")
        ledger = worlds.ledger()
        ledger.save(out / "ledger")
        parts["claims"] = ledger.to_frame().select("statement", "status", "effect", "lo", "hi", "p", "n").to_dicts()
        parts["worlds"] = worlds.tables["correlations"].to_dicts()
    if json:
        show_json({"facts": found.facts, **parts})
        return
    _show(found.facts, parts)
    show(f"All of it: {out}")


_PARTS = {"strengths": "measured", "counts": "counts/counts"}


def _show(facts: dict[str, Any], parts: dict[str, Any]) -> None:
    mine = [row for row in parts["correlations"] if row["strength"] == "causality"]
    columns = ("counts", "subjects", "steps", "facts", "r", "lo", "hi", "less", "less_lo", "less_hi")
    shown = [{name: row[name] for name in columns} for row in mine]
    show_rows(shown, as_json=False, title="Causality against log10(1 + times seen)")
    show("")
    show_rows(parts["thresholds"], as_json=False, title="Times together at which a level is reached")
    show("")
    show_rows(parts["predictions"], as_json=False, title="How often a pair was seen, from the model alone")
    flagged = [row for row in parts["overlaps"] if row["flagged"]]
    if flagged:
        show("")
        show_rows(flagged, as_json=False, title="Confounds: facts that lines of another relation say too")
    if "worlds" in parts:
        show("")
        show_rows(parts["claims"], as_json=False, title="do(data)")
        show("")
        show_rows(parts["worlds"], as_json=False, title="Other frequencies, other mechanisms: change against change")
    show(f"{len(facts['relations'])} relations at {len(facts['steps'])} checkpoints")


def lre(
    model: Annotated[str, typer.Argument(help="A model: a name, a folder, a checkpoint of a run.")],
    relation: Annotated[Path, typer.Argument(help="The JSON file of a relation: prompt_templates and samples.")],
    out: Annotated[Path | None, typer.Option(help="Keep the result in this folder.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="An option, such as layers=embed,4 or ranks=8,16 or known=false.")
    ] = None,
    json: Json = False,
) -> None:
    """Fit a linear relational embedding: how linearly a model decodes a relation (Hernandez et al., 2024)."""
    from headwater.core.loading import load
    from headwater.core.methods import fitted
    from headwater.data.lre import LreConfig, linear_relation

    config = fitted(LreConfig, _settings(option))
    found = linear_relation(load(model), relation, config=config)
    if out is not None:
        found.save(out)
    if json:
        show_json({"facts": found.facts, "sweep": found.to_frame().to_dicts()})
        return
    facts = found.facts
    where = "the embedding" if facts["layer"] < 0 else f"layer {facts['layer']}"
    show(f"{facts['relation']}: {facts['n']} subjects judged, of which the model knows {facts['n_known']}")
    best = f"faithfulness {facts['faithfulness']:.2f} (beta {facts['beta']:g})"
    show(f"best at {where}: {best}, causality {facts['causality']:.2f} (rank {facts['rank']})")
    show_rows(found.tables["examples"].head(12).to_dicts(), as_json=False)
    if out is not None:
        show(f"All of it: {out}")


def _relations(run: Path, named: list[str]) -> list[Any]:
    """Relations by name of the world that the run was trained on, or by file; all of the world where none is named."""
    from headwater.core.errors import MethodError, did_you_mean
    from headwater.data.relations import Relation

    files = [one for one in named if one.endswith(".json")]
    others = [one for one in named if one not in files]
    found = [Relation.load(one) for one in files]
    if others or not named:
        from headwater.data.world import relations_of, world_of
        from headwater.dynamics import TrainingRun

        known = relations_of(world_of(TrainingRun.open(run)).facts)
        for one in others:
            if one not in known:
                raise MethodError("unknown relation of this world", got=repr(one), wanted=did_you_mean(one, known))
        found += [known[one] for one in (others or known)]
    return found


def _settings(option: list[str] | None) -> dict[str, Any]:
    """Settings, of which a value with commas is a list, and what must be a list is one."""
    found = settings_of(option)
    for name, value in found.items():
        many = value.split(",") if isinstance(value, str) and "," in value else value
        if isinstance(many, list):
            found[name] = [int(one) if str(one).strip().isdigit() else one for one in many]
        elif name in ("layers", "ranks", "betas"):
            found[name] = [many]
    return found
