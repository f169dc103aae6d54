"""Binding: what a tokenizer makes of a behavior. Pairs it cannot align are dropped, and counted with the reason."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import torch

from headwater.behavior import files
from headwater.behavior._verb import make_verb
from headwater.behavior.table import Behavior
from headwater.core.errors import BehaviorError

END = "END"
_CHUNK = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Pairs whose prompts have the same number of tokens T, so that nothing is padded.

    rows: [B], indices into the behavior's frame. clean, corrupt: [B, T] token ids. answers [B, A] and foils [B, F]:
    the ids of their first tokens, -1 where a row has fewer. positions: name -> [B], the index of the last token of
    that span in the clean prompt.
    """

    rows: list[int]
    clean: torch.Tensor
    corrupt: torch.Tensor
    answers: torch.Tensor
    foils: torch.Tensor
    positions: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, some: slice) -> "Group":
        """Some of the pairs, as a Group: `group[:8]`."""
        return Group(
            rows=self.rows[some],
            clean=self.clean[some],
            corrupt=self.corrupt[some],
            answers=self.answers[some],
            foils=self.foils[some],
            positions={name: index[some] for name, index in self.positions.items()},
        )

    @property
    def length(self) -> int:
        """T, the number of tokens of every prompt here."""
        return self.clean.shape[1]

    def parts(self, size: int) -> "Iterator[Group]":
        """The pairs in order, at most `size` at a time: a vocabulary of logits a pair is what takes the memory."""
        return (self[start : start + size] for start in range(0, len(self), size))


@dataclass(frozen=True, kw_only=True, eq=False)
class Bound:
    """A behavior aligned with a tokenizer.

    groups: pairs of equal length, shortest first. dropped: (id, reason), the pairs that could not be used. removed:
    (id, column, text, reason), single answers and foils left out of pairs that were kept. frame: the kept rows, with
    the counterfactual and foils that were used. positions: the names that every kept pair has; `END`, the last token,
    is always one.
    """

    behavior: Behavior
    groups: list[Group]
    dropped: pl.DataFrame
    removed: pl.DataFrame
    frame: pl.DataFrame
    positions: list[str]

    @property
    def n(self) -> int:
        """How many pairs were kept."""
        return sum(len(group) for group in self.groups)

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    @property
    def reasons(self) -> dict[str, int]:
        """How many pairs were dropped for each reason (the part of the reason before its colon)."""
        return dict(Counter(reason.split(":")[0] for reason in self.dropped["reason"]).most_common())

    def __repr__(self) -> str:
        lengths = ", ".join(f"{len(group)}x{group.length}" for group in self.groups)
        kept = f"{self.n} of {self.behavior.n} pairs"
        return f"Bound({self.behavior.name!r}, {kept} in groups {lengths}, dropped {self.reasons})"


def bind(behavior: Behavior, model: Any, *, max_length: int | None = None) -> Bound:
    """Align a behavior with a model's tokenizer.

    A pair is kept where prompt and counterfactual have the same number of tokens and differ (in tokens that the
    tokenizer knows), where `prompt + answer` is tokenized as the prompt's tokens and then the answer's, where answers
    and foils begin with different tokens, where every named position falls on a token, and where the prompt leaves room
    for an answer in the model's context.

    Parameters
    ----------
    behavior: the pairs.
    model: a headwater Model (anything with `.tokenizer` and `.max_length`), or a tokenizer of transformers.
    max_length: the longest prompt in tokens; None means the model's own (a tokenizer: none).

    Several texts that begin with the same token count once. A token that begins both an answer and a foil tells
    nothing: it is taken from both sides, and the pair is dropped only where a side has nothing left. (So two-digit
    answers are scored by their first digit under a tokenizer without two-digit tokens.)

    Raises BehaviorError where no pair is left, with the reasons counted.
    """
    rows = behavior.frame.to_dicts()
    kept, dropped = _sort_out(rows, model, max_length)
    if not kept:
        counts = Counter(reason.split(":")[0] for _id, reason in dropped)
        counted = "; ".join(f"{reason} ({count})" for reason, count in counts.most_common(4))
        raise BehaviorError(
            f"no pair of behavior {behavior.name!r} fits this tokenizer",
            got=f"{len(rows)} pairs dropped: {counted}. The first: {dropped[0][1]}",
            wanted="prompts and counterfactuals of equal length in tokens, with answers that follow the prompt",
            fix="Reword the pairs so that what changes has the same number of tokens, or take another model",
        )
    shared = set(kept[0].positions)
    for pair in kept:
        shared &= set(pair.positions)
    names = [name for name in kept[0].positions if name in shared]
    lengths = sorted({len(pair.clean) for pair in kept})
    groups = [_group([pair for pair in kept if len(pair.clean) == length], names) for length in lengths]
    frame = behavior.frame[[pair.row for pair in kept]].with_columns(
        pl.Series("counterfactual", [pair.counterfactual for pair in kept], dtype=pl.String),
        pl.Series("foils", [pair.foil_texts for pair in kept], dtype=pl.List(pl.String)),
    )
    removed = [(rows[pair.row]["id"], *what) for pair in kept for what in pair.removed]
    return Bound(
        behavior=behavior,
        groups=groups,
        dropped=pl.DataFrame(dropped, schema={"id": pl.String, "reason": pl.String}, orient="row"),
        removed=pl.DataFrame(
            removed, schema=dict.fromkeys(("id", "column", "text", "reason"), pl.String), orient="row"
        ),
        frame=frame,
        positions=names,
    )


def reasons_to_drop(behavior: Behavior, model: Any, *, max_length: int | None = None) -> list[tuple[str, str]]:
    """(id, reason) of the pairs that `bind` would drop, also where it would drop all of them."""
    return _sort_out(behavior.frame.to_dicts(), model, max_length)[1]


def _sort_out(
    rows: list[dict[str, Any]], model: Any, max_length: int | None
) -> tuple[list["_Pair"], list[tuple[str, str]]]:
    tokenizer, own = tokenizer_of(model)
    limit = max_length if max_length is not None else own
    table = TokenTable(tokenizer)
    table.learn(text for row in rows for text in _first_texts(row))
    kept: list[_Pair] = []
    dropped: list[tuple[str, str]] = []
    for index, row in enumerate(rows):
        pair = _align_any(index, row, table, limit)
        if isinstance(pair, str):
            dropped.append((row["id"], pair))
        else:
            kept.append(pair)
    return kept, dropped


@dataclass(kw_only=True)
class _Pair:
    row: int
    clean: list[int]
    corrupt: list[int]
    answers: list[int]
    foils: list[int]
    positions: dict[str, int]
    counterfactual: str
    foil_texts: list[str]
    removed: list[tuple[str, str, str]] = field(default_factory=list)


def tokenizer_of(model: Any) -> tuple[Any, int | None]:
    """The tokenizer, and the model's context length where one is known."""
    if callable(model) and hasattr(model, "decode"):
        return model, None
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise BehaviorError(
            "a behavior is bound to a model with a tokenizer",
            got=type(model).__name__,
            wanted="a headwater Model that was loaded with its tokenizer, or a tokenizer of transformers",
            fix="Give `load(..., tokenizer=...)` a tokenizer",
        )
    return tokenizer, getattr(model, "max_length", None)


class TokenTable:
    """Texts and their tokens, each text tokenized once, many at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.fast = bool(getattr(tokenizer, "is_fast", False))
        # what a word that the tokenizer lacks becomes; None where that cannot be told from a token with a use
        others = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep", "pad"))
        unknown = getattr(tokenizer, "unk_token_id", None)
        self.unknown: int | None = None if unknown in {*others} else unknown
        self.ids: dict[str, list[int]] = {}
        self.spans: dict[str, list[tuple[int, int]]] = {}

    def learn(self, texts: Any) -> None:
        new = list(dict.fromkeys(text for text in texts if text and text not in self.ids))
        for start in range(0, len(new), _CHUNK):
            chunk = new[start : start + _CHUNK]
            self.ids.update(zip(chunk, self.tokenizer(chunk)["input_ids"], strict=True))

    def of(self, text: str) -> list[int]:
        if text not in self.ids:
            self.learn([text])
        return self.ids.get(text, [])

    def lacks(self, text: str) -> bool:
        """Whether the text holds a word that the tokenizer does not know."""
        if self.unknown is None or self.unknown not in self.of(text):
            return False
        return str(self.tokenizer.unk_token) not in text

    def last_token(self, text: str, end: int) -> int | None:
        """The index of the last token that covers character `end - 1` of `text`; None where none does."""
        if self.fast:
            if text not in self.spans:
                self.spans[text] = self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            covering = [i for i, (first, past) in enumerate(self.spans[text]) if first < end <= past]
            return covering[-1] if covering else None
        # Without offsets: the text up to there must be tokenized as the whole text begins.
        ids, start = self.of(text), self.of(text[:end])
        return len(start) - 1 if start and ids[: len(start)] == start else None


def _first_texts(row: dict[str, Any]) -> list[str]:
    prompt, others = row["prompt"], files.as_json(row.get("alternatives")) or []
    foils = [*row["foils"], *(text for other in others for text in other.get("foils", ()))]
    prompts = [prompt, row["counterfactual"], *(other["counterfactual"] for other in others)]
    return prompts + [prompt + text for text in (*row["answers"], *foils)]


def _align_any(index: int, row: dict[str, Any], table: TokenTable, limit: int | None) -> "_Pair | str":
    """The pair with its first counterfactual that aligns; where none does, the reason of the first."""
    first = _align(index, row, row["counterfactual"], row["foils"], table, limit)
    if not isinstance(first, str):
        return first
    for other in files.as_json(row.get("alternatives")) or []:
        pair = _align(index, row, other["counterfactual"], other.get("foils", row["foils"]), table, limit)
        if not isinstance(pair, str):
            return pair
    return first


def _align(
    index: int, row: dict[str, Any], counterfactual: str, foil_texts: list[str], table: TokenTable, limit: int | None
) -> "_Pair | str":
    """The pair as tokens, or why it cannot be one. A reason is `kind: detail`, so that kinds can be counted."""
    prompt: str = row["prompt"]
    if not prompt or not counterfactual:
        return "empty prompt or counterfactual"
    clean, corrupt = table.of(prompt), table.of(counterfactual)
    if not clean or not corrupt:
        return "the tokenizer makes no tokens of the prompt or counterfactual"
    if len(clean) != len(corrupt):
        return f"lengths differ: {len(clean)} tokens in the prompt, {len(corrupt)} in the counterfactual"
    if clean == corrupt:
        return "prompt and counterfactual have the same tokens"
    # a line's end that is unknown in both does no harm; a word that is what the two differ in does
    if any(table.unknown in pair for pair in zip(clean, corrupt, strict=True) if pair[0] != pair[1]):
        for name, text in (("prompt", prompt), ("counterfactual", counterfactual)):
            if table.lacks(text):
                return f"a word that the tokenizer does not know: in the {name}"
    if limit is not None and len(clean) > limit:
        return f"too long for the model: {len(clean)} tokens, its context is {limit}"
    removed: list[tuple[str, str, str]] = []
    answers = first_tokens(prompt, clean, row["answers"], "answers", table, removed)
    foils = first_tokens(prompt, clean, foil_texts, "foils", table, removed)
    if not answers:
        return f"no answer: {removed[0][2]}" if removed else "no answer"
    if foil_texts and not foils:
        return f"no foil: {removed[-1][2]}"
    both = set(answers) & set(foils)
    if both:
        reason = "it begins with the same token as one of the other side"
        removed += [("answers", text, reason) for token, text in answers.items() if token in both]
        removed += [("foils", text, reason) for token, text in foils.items() if token in both]
        clash = next(text for token, text in answers.items() if token in both)
        answers = {token: text for token, text in answers.items() if token not in both}
        foils = {token: text for token, text in foils.items() if token not in both}
        if not answers or not foils:
            return f"answer and foil begin with the same token: {clash!r}"
    positions: dict[str, int] = {}
    for name, span in (files.as_json(row["positions"]) or {}).items():
        found = table.last_token(prompt, span[1])
        if found is None or found >= len(clean):
            return f"a position falls on no token: {name!r} at characters {span[0]} to {span[1]}"
        positions[name] = found
    positions.setdefault(END, len(clean) - 1)
    return _Pair(
        row=index,
        clean=clean,
        corrupt=corrupt,
        answers=list(answers),
        foils=list(foils),
        positions=positions,
        counterfactual=counterfactual,
        foil_texts=list(foil_texts),
        removed=removed,
    )


def first_tokens(
    prompt: str,
    clean: list[int],
    texts: list[str],
    column: str,
    table: TokenTable,
    removed: list[tuple[str, str, str]],
) -> dict[int, str]:
    """First token -> the first text that begins with it, for the texts that follow the prompt as tokens of their
    own."""
    found: dict[int, str] = {}
    for text in texts:
        ids = table.of(prompt + text)
        if not text:
            removed.append((column, text, "it is empty"))
        elif ids[: len(clean)] != clean or len(ids) == len(clean):
            removed.append((column, text, f"{text!r} does not follow the prompt as tokens of its own"))
        elif ids[len(clean)] == table.unknown and table.lacks(prompt + text):
            removed.append((column, text, f"{text!r} begins with a word that the tokenizer does not know"))
        else:
            found.setdefault(ids[len(clean)], text)
    return found


def _group(pairs: list[_Pair], names: list[str]) -> Group:
    return Group(
        rows=[pair.row for pair in pairs],
        clean=torch.tensor([pair.clean for pair in pairs]),
        corrupt=torch.tensor([pair.corrupt for pair in pairs]),
        answers=_padded([pair.answers for pair in pairs]),
        foils=_padded([pair.foils for pair in pairs]),
        positions={name: torch.tensor([pair.positions[name] for pair in pairs]) for name in names},
    )


def _padded(lists: list[list[int]]) -> torch.Tensor:
    width = max(len(ids) for ids in lists)
    return torch.tensor([ids + [-1] * (width - len(ids)) for ids in lists], dtype=torch.long).reshape(len(lists), width)


make_verb(__name__, bind)
