"""What is asked for: the sequences whose making is to be explained, and the baseline that every method has to beat."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError
from headwater.data.corpus import TokenCorpus

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Query:
    """ids [T]; at [T]: which of them are predicted; name: for people; pair: subject and object, where known."""

    name: str
    ids: torch.Tensor
    at: torch.Tensor
    pair: tuple[str, str] | None = None


def read_queries(model: Any, asked: Any, pairs: Sequence[Sequence[str]] | None = None) -> list[Query]:
    """Queries from a Behavior (each pair's prompt with its first answer), (prompt, answer) texts, which follow each
    other as they are (most answers begin with a space), or token ids [n, T].

    The loss of a query is that of the answer's tokens (a Behavior's first one; of token ids the last one). pairs: the
    subject and object of each, which the sequences are searched for.
    """
    found: list[Query] = []
    if isinstance(asked, Behavior):
        bound = asked.bind(model)
        numbers: list[int] = []
        for group in bound.groups:
            for row, clean, answers in zip(group.rows, group.clean, group.answers, strict=True):
                ids = torch.cat([clean, answers[:1]])
                found.append(_query(str(bound.frame["prompt"][row]), ids, 1))
                numbers.append(row)
        order = np.argsort(numbers)
        found = [found[int(i)] for i in order]
    elif isinstance(asked, torch.Tensor | np.ndarray):
        rows = torch.as_tensor(asked)
        if rows.ndim != 2 or rows.shape[1] < 2 or rows.is_floating_point():
            raise MethodError("queries are token ids in rows", got=list(rows.shape), wanted="integers [n, T], T >= 2")
        found = [_query(_said(model, row), row.long(), 1) for row in rows]
    else:
        for one in asked:
            if isinstance(one, str) or len(one) != 2:
                raise MethodError("a query is (prompt, answer)", got=repr(one))
            prompt = model.tokens(one[0])[0]
            # what a tokenizer puts before every text does not stand between prompt and answer
            answer = torch.tensor(model.tokenizer(one[1], add_special_tokens=False)["input_ids"], dtype=torch.long)
            if not len(answer):
                raise MethodError("an answer has no tokens", got=repr(one))
            found.append(_query(f"{one[0]}{one[1]}", torch.cat([prompt.cpu(), answer]), len(answer)))
    if not found:
        raise MethodError("nothing is asked for", wanted="at least one query")
    if pairs is None:
        return found
    if len(pairs) != len(found):
        raise MethodError("each query has its pair", got=f"{len(pairs)} pairs", wanted=f"{len(found)}")
    return [Query(one.name, one.ids, one.at, (str(s), str(o))) for one, (s, o) in zip(found, pairs, strict=True)]


def _query(name: str, ids: torch.Tensor, predicted: int) -> Query:
    at = torch.zeros(len(ids))
    at[-predicted:] = 1
    return Query(name, ids, at)


def _said(model: Any, row: torch.Tensor) -> str:
    return model.tokenizer.decode(row.tolist()) if model.tokenizer is not None else " ".join(map(str, row.tolist()))


def retrieval(
    queries: Sequence[Query], rows: Iterable[NDArray[Any]], together: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """[queries, sequences]: co-occurrence retrieval, which looks at no model.

    Sequences that mention subject and object both come first (where the pair is known); among them, and else, by the
    tokens that they share with the query, each worth log(sequences / those that hold it).
    """
    size = max(int(one.ids.max()) for one in queries) + 1
    wanted = np.zeros((len(queries), size))
    for number, one in enumerate(queries):
        wanted[number, one.ids.numpy()] = 1
    held: list[NDArray[np.bool_]] = []
    for part in rows:
        has = np.zeros((len(part), size), dtype=bool)
        row, column = np.nonzero(part < size)
        has[row, part[row, column]] = True
        held.append(has[:, wanted.any(axis=0)])
    has = np.concatenate(held)
    worth = np.log(len(has) / np.maximum(has.sum(axis=0), 1))
    scores = (wanted[:, wanted.any(axis=0)] * worth) @ has.T
    return scores + together * (1 + float(worth.sum()))


def mentioned_together(
    queries: Sequence[Query], corpus: TokenCorpus, numbers: Ints, tokenizer: Any, size: int
) -> NDArray[np.bool_]:
    """[queries, sequences] whether a sequence mentions both of the query's pair."""
    out = np.zeros((len(queries), len(numbers)), dtype=bool)
    asked = [number for number, one in enumerate(queries) if one.pair is not None]
    if not asked:
        return out
    from headwater.data.mentions import Mentioning

    pairs = [queries[number].pair for number in asked]
    distinct = list(dict.fromkeys(pairs))
    found = Mentioning([pair for pair in distinct if pair is not None], tokenizer=tokenizer)
    for start in range(0, len(numbers), size):
        pair, sequence = found.find(corpus.rows(numbers[start : start + size]))
        for number in asked:
            mine = pair == distinct.index(queries[number].pair)
            out[number, start + sequence[mine]] = True
    return out
