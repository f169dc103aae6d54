"""Arguments and options that several commands have in the same words."""

from typing import Annotated

import typer

ModelName = Annotated[str, typer.Option(help="An alias, hub id, local folder or GGUF file.")]
BehaviorName = Annotated[str, typer.Argument(help="A behavior's name or a file of pairs.")]
Pairs = Annotated[int | None, typer.Option(min=2, help="How many pairs.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
