"""Names for the tokens of a behavior's prompts, so that what happens at the same place in different prompts counts as
the same.
"""

from typing import TYPE_CHECKING, Any

import polars as pl

if TYPE_CHECKING:
    from headwater.behavior.bind import Group

START, OTHER = "start", "other"
_REACH = 2  # tokens this near to a named one are named after it


def token_roles(group: "Group") -> list[list[str]]:
    """Of each prompt, the name of each token.

    A named position of the behavior by its name (where two fall on one token, the first), the first token `start`, a
    token at most two away from a named one after the nearest (`S2+1`), all else `other`.
    """
    length = group.length
    every = []
    for row in range(len(group)):
        named: dict[int, str] = {}
        for name, index in group.positions.items():
            named.setdefault(int(index[row]), name)
        names = []
        for token in range(length):
            if token in named:
                names.append(named[token])
                continue
            near = min(named, key=lambda place: (abs(token - place), place), default=None)
            if token == 0:
                names.append(START)
            elif near is not None and abs(token - near) <= _REACH:
                names.append(f"{named[near]}{token - near:+d}")
            else:
                names.append(OTHER)
        every.append(names)
    return every


def token_table(group: "Group", roles: list[list[str]], tokenizer: Any) -> pl.DataFrame:
    """row, position, token, role: what stands where in each prompt."""
    ids = group.clean.tolist()
    rows = [
        (group.rows[i], at, str(token) if tokenizer is None else tokenizer.decode([token]), roles[i][at])
        for i, tokens in enumerate(ids)
        for at, token in enumerate(tokens)
    ]
    schema = {"row": pl.Int64, "position": pl.Int64, "token": pl.String, "role": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")
