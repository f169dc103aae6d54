"""Terms and pairs of terms to count: each term a name and its surface forms."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headwater.core.errors import MethodError, StoreError
from headwater.core.files import read_json, store_error


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What to count. terms: names. forms: the surface forms of each. of: [pairs, 2] (subject, object), as terms."""

    terms: tuple[str, ...]
    forms: tuple[tuple[str, ...], ...]
    of: NDArray[np.int64]

    @property
    def subjects(self) -> list[str]:
        return [self.terms[i] for i in self.of[:, 0].tolist()]

    @property
    def objects(self) -> list[str]:
        return [self.terms[i] for i in self.of[:, 1].tolist()]


def read_pairs(what: Any, *, terms: Iterable[str] = (), aliases: Mapping[str, Iterable[str]] | None = None) -> Pairs:
    """Pairs from a CSV, JSONL or Parquet file with `subject` and `object`, a relation's JSON (`samples`), or tuples.

    Further columns `subject_aliases` and `object_aliases` hold more surface forms: a list, or text parted by `|`.
    aliases: more forms of a term, by its name. terms: counted too, in no pair. A pair that is there twice counts once.
    The name of a term is one of its forms. Raises StoreError, MethodError.
    """
    if isinstance(what, Pairs):
        return what
    rows = _rows(Path(what)) if isinstance(what, str | Path) else [_row(one) for one in what]
    forms: dict[str, dict[str, None]] = {}

    def add(name: object, more: Any = None) -> str:
        given = more.split("|") if isinstance(more, str) else list(more or ())
        if not isinstance(name, str) or not all(isinstance(one, str) for one in given):
            raise MethodError("a term is a text", got=repr(name if not isinstance(name, str) else given))
        term = name.strip()
        own = forms.setdefault(term, {})
        for form in (term, *given):
            if not form.strip() or "\0" in form or any("\ud800" <= letter <= "\udfff" for letter in form):
                raise MethodError("a term cannot be counted", got=repr(form), wanted="text that is not empty")
            own[form.strip()] = None
        return term

    pairs: dict[tuple[str, str], None] = {}
    for row in rows:
        if row.get("subject") is None or row.get("object") is None:
            raise MethodError("a pair has a subject and an object", got=sorted(row))
        pair = add(row["subject"], row.get("subject_aliases")), add(row["object"], row.get("object_aliases"))
        pairs[pair] = None
    for term in terms:
        add(term)
    for name, more in (aliases or {}).items():
        if name not in forms:
            raise MethodError("aliases of a term that is in no pair", got=repr(name))
        add(name, [more] if isinstance(more, str) else more)
    if not forms:
        raise MethodError("nothing to count", wanted="pairs or terms")
    number = {name: index for index, name in enumerate(forms)}
    of = np.array([[number[s], number[o]] for s, o in pairs], dtype=np.int64).reshape(-1, 2)
    return Pairs(terms=tuple(forms), forms=tuple(tuple(own) for own in forms.values()), of=of)


def _row(one: Any) -> Mapping[str, Any]:
    if isinstance(one, Mapping):
        return cast(Mapping[str, Any], one)
    if not isinstance(one, list | tuple) or len(one) != 2:
        raise MethodError("a pair is (subject, object)", got=repr(one))
    return {"subject": one[0], "object": one[1]}


def _rows(path: Path) -> list[Mapping[str, Any]]:
    try:
        if path.suffix == ".json":
            samples: object = read_json(path, what="a relation").get("samples")
            if not isinstance(samples, list):
                raise StoreError(f"{path} holds no samples")
            return [_row(one) for one in cast(list[Any], samples)]
        if path.suffix == ".jsonl":
            # by bytes: `str.splitlines` cuts at signs that may stand within a text (U+2028, U+0085)
            return [_row(json.loads(line)) for line in path.read_bytes().splitlines() if line.strip()]
        if path.suffix in (".csv", ".parquet"):
            frame = pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path, infer_schema=False)
            return list[Mapping[str, Any]](frame.to_dicts())
    except OSError as error:
        raise store_error(error, path, "read") from error
    except (json.JSONDecodeError, UnicodeDecodeError, pl.exceptions.PolarsError) as error:
        raise StoreError(f"cannot read pairs from {path}", got=str(error).splitlines()[0]) from None
    raise StoreError("pairs in a file of unknown kind", got=path, wanted=".csv, .jsonl, .parquet or .json")
