"""ngrams: how often an n-gram stands in a corpus, and what follows it."""

from pathlib import Path
from typing import Annotated

import typer

from headwater.cli.inputs import ids_of, tokenizer_named
from headwater.cli.options import Json
from headwater.cli.show import show, show_json, show_rows


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    app.command()(ngrams)


def ngrams(
    corpus: Annotated[str, typer.Argument(help="Token ids, a run of `headwater train`, or an index that was kept.")],
    ids: Annotated[str | None, typer.Option(help="Token ids to look for, such as '12 7 300'.")] = None,
    text: Annotated[str | None, typer.Option(help="Or a text, which --tokenizer cuts.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A folder or a hub id: the one the corpus was cut by.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the index here.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of what follows to print.")] = 10,
    json: Json = False,
) -> None:
    """Count an n-gram of any length in a corpus, and list what follows it."""
    from headwater.core.errors import MethodError
    from headwater.data import NgramIndex

    if (ids is None) == (text is None) and (ids is not None or out is None):
        raise MethodError("what is to be looked for?", fix="Give --ids or --text; or only --out, to keep an index")
    wanted: list[int] = []
    if ids is not None:
        wanted = ids_of(ids)
    elif text is not None:
        if tokenizer is None:
            raise MethodError("a text is cut by a tokenizer", fix="Give --tokenizer, the one of the corpus")
        wanted = list(tokenizer_named(tokenizer)(text, add_special_tokens=False)["input_ids"])
    if out is None and not wanted:
        raise MethodError("nothing to look for", got=repr(ids if ids is not None else text), wanted="one token or more")
    kept = (Path(corpus) / "index.json").exists()
    index = NgramIndex.open(corpus) if kept else NgramIndex.build(corpus)
    if out is not None:
        index.save(out)
    if not wanted:
        show(f"{index.n_sequences:,} sequences of {index.sequence_length} tokens in {out}")
        return
    count, (used, times) = index.count(wanted), index.longest(wanted)
    after = index.next(wanted)
    rows = [
        {"token": int(token), "count": int(n), "share": float(share)}
        for token, n, share in zip(after.tokens[:top], after.counts[:top], after.shares[:top], strict=True)
    ]
    if json:
        show_json({"ids": wanted, "count": count, "longest": used, "next_of": after.used, "next": rows})
        return
    show(f"{wanted} stands {count} times")
    if not count:
        show(f"its last {used} tokens stand {times} times")
    show_rows(rows, as_json=False, title=f"After its last {after.used} tokens")
