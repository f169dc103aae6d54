"""count: how often terms, and pairs of terms, stood in a corpus."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli.inputs import tokenizer_named
from headwater.cli.options import Json
from headwater.cli.show import show, show_json, show_rows


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    app.command()(count)


def count(
    corpus: Annotated[
        str, typer.Argument(help="A run of `headwater train`, text (JSONL, Parquet, txt), token ids, a folder of them.")
    ],
    pairs: Annotated[
        Path, typer.Option(help="CSV, JSONL or Parquet with subject, object (and subject_aliases, object_aliases).")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Keep what is counted here; killed, it goes on where it was.")
    ] = None,
    scope: Annotated[str, typer.Option(help="document, sentence or window.")] = "document",
    window: Annotated[int | None, typer.Option(min=1, help="Of a window: how many words (or tokens) apart.")] = None,
    ranges: Annotated[str | None, typer.Option(help="Steps at which counts are cut, such as 0,100,1000.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences or documents a step.")] = None,
    layout: Annotated[
        str | None, typer.Option(help="run, text, tokens, megatron or olmo. [default: told from the files]")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the corpus, such as column=body or dtype=uint32.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Of token ids: a folder or a hub id.")] = None,
    inside_words: Annotated[bool, typer.Option("--inside-words", help="Match inside longer words too.")] = False,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", help="Of text.")] = False,
    separator: Annotated[int | None, typer.Option(min=0, help="The token id that ends a document.")] = None,
    json: Json = False,
) -> None:
    """Count how often terms, and pairs of terms, stood in a corpus, by step of training."""
    from headwater.core.errors import MethodError
    from headwater.data import Corpus
    from headwater.data import count as run_count

    settings: dict[str, Any] = {"batch": batch} if batch is not None else {}
    for one in option or []:
        name, equals, value = one.partition("=")
        if not equals:
            raise MethodError("--set takes name=value", got=repr(one))
        settings[name] = _value(value)
    cut: tuple[int, ...] = ()
    if ranges is not None:
        try:
            cut = tuple(int(part) for part in ranges.split(",") if part.strip())
        except ValueError:
            raise MethodError("--ranges takes steps", got=repr(ranges), wanted="such as 0,100,1000") from None
    result = run_count(
        Corpus.open(corpus, layout=layout, **settings),
        pairs,
        tokenizer=tokenizer_named(tokenizer) if tokenizer is not None else None,
        out=out,
        scope=scope,
        window=window,
        ranges=cut,
        whole_words=not inside_words,
        ignore_case=ignore_case,
        separator=separator,
    )
    tables = result.tables
    if json:
        show_json({"facts": result.facts, "pairs": tables["pairs"].to_dicts(), "terms": tables["terms"].to_dicts()})
        return
    best = tables["pairs"].sort("n", descending=True).head(20)
    show_rows(best.to_dicts(), as_json=False, title=f"Together in a {scope}, the most frequent first")
    show("")
    best = tables["terms"].sort("n", descending=True).head(20)
    show_rows(best.to_dicts(), as_json=False, title="Mentions")
    units = "tokens" if result.facts["form"] == "tokens" else "characters"
    show(f"{result.facts['documents']:,} documents, {result.facts['size']:,} {units}")
    if out is not None:
        show(f"All of it: {out / 'counts'}")


def _value(text: str) -> Any:
    """A number, true or false where the text is one."""
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.lstrip("-").isdigit() else text
