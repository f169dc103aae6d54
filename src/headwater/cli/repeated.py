"""repeated: what sequences seen over and over do to a model."""

from pathlib import Path
from typing import Annotated

import typer

from headwater.cli.options import Json
from headwater.cli.settings import settings_of
from headwater.cli.show import show, show_json, show_rows


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    app.command()(repeated)


def repeated(
    config: Annotated[
        Path, typer.Argument(help="A YAML file of settings, as of `headwater train`, with a validation.")
    ],
    out: Annotated[Path, typer.Option(help="The runs lie here, and the result; gone on with if it exists.")],
    shares: Annotated[str, typer.Option(help="Shares of the samples that are repeats.")] = "0.5",
    sequences: Annotated[str, typer.Option(help="How many different sequences these are.")] = "8,64,512",
    seeds: Annotated[str, typer.Option(help="A training of each.")] = "0,1,2",
    source: Annotated[int, typer.Option(min=0, help="Which source of the data is repeated.")] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the run, as NAME=VALUE with dots within; may be repeated."),
    ] = None,
    json: Json = False,
) -> None:
    """Train with a share of repeated sequences, and measure fresh loss and induction heads against the repeats."""
    from headwater.core.errors import MethodError
    from headwater.dynamics.lab.config import TrainConfig
    from headwater.dynamics.repeated import repeated as run_repeated

    try:
        parts = [float(part) for part in shares.split(",") if part.strip()]
        numbers = [[int(part) for part in text.split(",") if part.strip()] for text in (sequences, seeds)]
    except ValueError:
        got = f"--shares {shares} --sequences {sequences} --seeds {seeds}"
        raise MethodError("shares, sequences and seeds are numbers", got=got, wanted="such as 0.1,0.5") from None
    settings = TrainConfig.from_yaml(config, **settings_of(option, dotted=True))
    found = run_repeated(settings, out / "runs", shares=parts, sequences=numbers[0], seeds=numbers[1], source=source)
    found.save(out / "result")
    if json:
        show_json({"points": found.tables["points"].to_dicts(), "worst": found.facts["worst"]})
        return
    show_rows(
        found.tables["points"].to_dicts(), as_json=False, title="Means over seeds, with the least and the greatest"
    )
    show("")
    show_rows(found.facts["worst"], as_json=False, title="Where the loss on fresh data is worst")
    show(f"All of it: {out / 'result'}")
