"""bench programs|mips|published: learned programs, programs from recurrent networks, published benchmarks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwater.cli.options import Json
from headwater.cli.settings import settings_of
from headwater.cli.show import show, show_json, show_rows

if TYPE_CHECKING:
    from headwater.bench.published import PublishedScores
    from headwater.core.model import Model
    from headwater.core.results import Result

Settings = Annotated[list[str] | None, typer.Option("--set", help="An option, as NAME=VALUE; may be repeated.")]
Out = Annotated[Path | None, typer.Option(help="The folder for the result.")]


def add_to(group: typer.Typer) -> None:
    """Put these commands into the group `bench`."""
    group.command("programs")(programs)
    group.command("mips")(mips_)
    group.command("published")(published)


def programs(
    task: Annotated[str, typer.Argument(help="reverse, histogram, sort, most_frequent, dyck1, dyck2 or induction.")],
    out: Out = None,
    setting: Settings = None,
    json: Json = False,
) -> None:
    """Learn a task as a transformer that is a Python program, and check the source against the discrete model."""
    from headwater.bench.programs import learn_program

    result = learn_program(task, **settings_of(setting))
    _save(result, out, {"program.py": result.source})
    if json:
        show_json({"facts": result.facts, "rows": result.to_frame().to_dicts()})
        return
    show_rows(result.to_frame().to_dicts(), as_json=False, title=f"{task}: {result.facts['about']}")
    show("")
    show(result.source)
    _saved(out)


def mips_(
    task: Annotated[list[str] | None, typer.Argument(help="Tasks; without any, all 62 (tens of minutes).")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder for outcomes; a run that was stopped goes on.")] = None,
    setting: Settings = None,
    json: Json = False,
) -> None:
    """Train a small recurrent network on each task and read a Python program off it; what is not solved says why."""
    from headwater.bench.mips import mips

    result = mips(task or None, out=None if out is None else out / "tasks", **settings_of(setting))
    _save(result, out, {f"{name}.py": source for name, source in result.facts["sources"].items()})
    if json:
        show_json({"facts": result.facts, "rows": result.to_frame().to_dicts()})
        return
    columns = ["task", "solved", "form", "states", "lines", "networks", "held_out", "longer", "why"]
    rows = result.to_frame().select(columns).to_dicts()
    show_rows(rows, as_json=False, title=f"{result.facts['solved']} of {result.facts['n']} tasks solved")
    if len(rows) == 1:
        for source in result.facts["sources"].values():
            show("")
            show(source)
    _saved(out)


def published(
    name: Annotated[str, typer.Argument(help="ravel, causalgym, mib (causal variables), find or interpbench.")],
    data: Annotated[Path | None, typer.Option(help="The benchmark's own file or folder: none is fetched.")] = None,
    model: Annotated[str | None, typer.Option(help="An alias, hub id, local folder or GGUF file.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="ravel: an attribute. causalgym: a template's name. mib: ioi, mcqa, arithmetic, or the kind of "
            "counterfactual of a file of rows."
        ),
    ] = None,
    domain: Annotated[str, typer.Option(help="ravel: which of its five domains.")] = "city",
    site: Annotated[list[str] | None, typer.Option(help="Where; the middle layer's stream. May be repeated.")] = None,
    n: Annotated[int | None, typer.Option(min=2, help="How many pairs are judged.")] = None,
    proposals: Annotated[Path | None, typer.Option(help="find: a JSON object, function name to Python source.")] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="find: run the published and the proposed code.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The seed of everything drawn.")] = 0,
    setting: Settings = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Score a model (or programs) on a published benchmark, read from its authors' own files. MIB's circuits are
    `headwater circuit mib`.
    """
    from headwater.core.errors import MethodError, did_you_mean

    options = settings_of(setting) | {"seed": seed}
    known = ("ravel", "causalgym", "mib", "find", "interpbench")
    if name not in known:
        raise MethodError("unknown benchmark", got=repr(name), wanted=did_you_mean(name, known))
    if name == "find":
        result = _find(_given(data, "--data"), _given(proposals, "--proposals"), allow_code, settings_of(setting))
    elif name == "interpbench":
        from headwater.bench.published import interpbench

        size: dict[str, Any] = {} if n is None else {"n": n}
        result = interpbench(_given(data, "--data"), **options, **size)
    else:
        from headwater.core.loading import load

        loaded = load(_given(model, "--model"))
        sites = site or [f"resid_post.{loaded.n_layers // 2}"]
        if name == "causalgym":
            result = _causalgym(loaded, _given(data, "--data"), task, sites, n or 50, options)
        elif len(sites) > 1:
            raise MethodError(f"{name} is scored at one site a run", got=sites, fix="Give one --site")
        elif name == "ravel":
            result = _ravel(loaded, _given(data, "--data"), domain, _given(task, "--task"), sites[0], n or 64, options)
        else:
            result = _mib(loaded, data, _given(task, "--task"), sites[0], n or 64, options)
    _save(result, out, {})
    if json:
        show_json({"facts": result.facts, "rows": result.to_frame().to_dicts()})
        return
    show_rows(result.to_frame().to_dicts(), as_json=False, title=str(result.facts["benchmark"]))
    show("")
    show("  ".join(f"{key} {value}" for key, value in result.facts.items() if key != "benchmark"))
    _saved(out)


def _ravel(
    model: "Model", data: Path, domain: str, attribute: str, site: str, n: int, options: dict[str, Any]
) -> "PublishedScores":
    from headwater.bench.published import Ravel, ravel

    return ravel(model, Ravel.load(data, domain), attribute, site=site, n=n, **options)


def _causalgym(
    model: "Model", data: Path, task: str | None, sites: list[str], n: int, options: dict[str, Any]
) -> "PublishedScores":
    from headwater.bench.published import causalgym, read_pairs, sample_template

    train = int(options.get("n_train", 100))
    pairs = (
        read_pairs(data) if task is None else sample_template(data, task, n=3 * (n + train), seed=int(options["seed"]))
    )
    return causalgym(model, pairs, sites=sites, n=n, **options)


def _mib(model: "Model", data: Path | None, task: str, site: str, n: int, options: dict[str, Any]) -> "PublishedScores":
    from headwater.bench import published

    drawn = {"n": 2 * n, "seed": int(options["seed"])}  # half of the pairs fit the subspaces
    variable = options.pop("variable", None)
    named = {} if variable is None else {"variable": variable}
    if task == "arithmetic":
        pairs = published.arithmetic(**drawn, **named, digits=bool(options.pop("digits", False)))
    elif task == "ioi":
        pairs = published.indirect_object(_given(data, "--data"), **drawn)
    elif task == "mcqa":
        path = _given(data, "--data")
        path = path / "mcqa_object_color_pairs.json" if path.is_dir() else path
        pairs = published.multiple_choice(path, **drawn, **named)
    else:
        pairs = published.read_rows(_given(data, "--data"), task, **named)[: 2 * n]
    return published.causal_variable(model, pairs, site=site, **options)


def _find(data: Path, proposals: Path, allow_code: bool, options: dict[str, Any]) -> "PublishedScores":
    from headwater.bench.published import find, load_find
    from headwater.core.files import read_json

    sources = read_json(proposals, what="the file of proposals")
    return find(load_find(data), sources, allow_code=allow_code, **options)


def _given(value: Any, option: str) -> Any:
    from headwater.core.errors import MethodError

    if value is None:
        raise MethodError("this benchmark needs another option", wanted=option, fix="See docs/published.md")
    return value


def _save(result: "Result", out: Path | None, files: dict[str, str]) -> None:
    from headwater.core.files import write_whole

    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    result.save(out / "result")
    for name, text in files.items():
        write_whole(out / name, text.encode())


def _saved(out: Path | None) -> None:
    if out is not None:
        show(f"All of it: {out}")
