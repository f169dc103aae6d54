"""Facts that a model was found to know (Meng et al., 2022), read from their authors' file into a Behavior."""

import json
import random
from pathlib import Path
from typing import Any

from headwater.behavior.table import Behavior
from headwater.core.errors import BehaviorError

_ALTERNATIVES = 12
_NEEDED = ("subject", "attribute", "prompt")


def known_facts(path: str | Path, n: int | None = None, seed: int = 0) -> Behavior:
    """The facts of a `known_1000.json`: a prompt about a subject, whose attribute comes next.

    Each pair names the position `subject`. Its counterfactual is the same prompt about another subject with another
    attribute (of the same relation where there is one), which is the foil; of several, binding takes the first that
    has as many tokens. `n` keeps that many facts, drawn with `seed`. The rows' slice `relation` is the relation's id.

    Raises BehaviorError for a file that does not hold such facts.
    """
    file = Path(path)
    try:
        rows: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BehaviorError(f"{file.name} cannot be read as facts", got=error) from None
    if not isinstance(rows, list) or not rows:
        raise BehaviorError(f"{file.name} holds no facts", wanted="a JSON list of objects")
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key] for key in _NEEDED):
            raise BehaviorError(f"fact {index} of {file.name} lacks a text", wanted=", ".join(_NEEDED))
    draw = random.Random(f"headwater-known:{seed}")
    kept = [row for row in rows if row["subject"] in row["prompt"]]
    if not kept:
        raise BehaviorError(f"no prompt of {file.name} contains its subject")
    if n is not None and n < len(kept):
        kept = [kept[i] for i in sorted(draw.sample(range(len(kept)), n))]
    pairs = [pair for row in kept if (pair := _pair(row, rows, draw)) is not None]
    if not pairs:
        raise BehaviorError(f"no fact of {file.name} has another attribute to stand against")
    return Behavior.from_rows(
        pairs, name="known_facts", about={"file": file.name, "source": "known_1000 of Meng et al. (2022)", "seed": seed}
    )


def _pair(row: dict[str, Any], rows: list[dict[str, Any]], draw: random.Random) -> dict[str, Any] | None:
    subject, prompt = row["subject"], row["prompt"]
    others = [one for one in rows if one["attribute"] != row["attribute"] and one["subject"] != subject]
    draw.shuffle(others)

    def far(one: dict[str, Any]) -> tuple[bool, int, int]:
        """Another relation, then another number of words, then another length: the likelier to have other tokens."""
        words = abs(len(one["subject"].split()) - len(subject.split()))
        return one.get("relation_id") != row.get("relation_id"), words, abs(len(one["subject"]) - len(subject))

    near = sorted(others, key=far)[:_ALTERNATIVES]
    if not near:
        return None
    start = prompt.index(subject)
    made = [
        {
            "counterfactual": prompt[:start] + one["subject"] + prompt[start + len(subject) :],
            "foils": [f" {one['attribute']}"],
        }
        for one in near
    ]
    return {
        "id": str(row.get("known_id", rows.index(row))),
        "prompt": prompt,
        "answers": [f" {row['attribute']}"],
        **made[0],
        "alternatives": made[1:],
        "positions": {"subject": [start, start + len(subject)]},
        "variables": {"subject": subject, "attribute": row["attribute"]},
        "relation": str(row.get("relation_id", "")),
    }
