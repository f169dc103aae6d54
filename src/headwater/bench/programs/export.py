"""A discrete program model as Python that a person can read and a machine can run."""

from collections.abc import Sequence
from typing import Any

import torch

from headwater.bench.programs.model import ProgramModel
from headwater.bench.programs.tasks import BOS

_ATTEND = '''def attend(keys, queries, looks_for):
    """For each query the nearest key it looks for (of two as near, the earlier); where there is none, the first."""
    found = []
    for i, query in enumerate(queries):
        best, distance = 0, len(keys)
        for j, key in enumerate(keys{until}):
            if key == looks_for[query] and abs(i - j) < distance:
                best, distance = j, abs(i - j)
        found.append(best)
    return found


'''
_COUNT = '''def count(keys, queries, looks_for):
    """For each query, how many keys it looks for."""
    return [sum(key == looks_for[query] for key in keys{until}) for i, query in enumerate(queries)]


'''
_BEST = '''def best(words, rows):
    """The word with the highest sum of scores."""
    totals = [sum(row[c] for row in rows) for c in range(len(words))]
    return words[totals.index(max(totals))]


'''


def to_python(
    model: ProgramModel, weights: torch.Tensor, kept: Sequence[int], words: Sequence[str], answers: Sequence[str]
) -> str:
    """The source of `program(xs)`: the likeliest choices, and integer output weights [variables, d, classes].

    words: the tokens by id; answers: the output words by class; kept: the variables that the output reads. Modules that
    nothing kept reads are left out.
    """
    choice = {name: value.argmax(-1) for name, value in model.logits.items()}
    names = variable_names(model)
    needed = _needed(model, choice, kept)

    def values(variable: int) -> list[Any]:
        """What a variable's ids stand for; ids that nothing writes are None."""
        domain = _domain(model, choice, variable)
        if domain == "tokens":
            return [*words, *[None] * (model.d - len(words))]
        return list(range(model.d))

    def looks_for(query: int, key: int, predicate: torch.Tensor) -> str:
        asked, found = values(query), values(key)
        pairs = [f"{asked[i]!r}: {found[j]!r}" for i, j in enumerate(predicate.tolist()) if asked[i] is not None]
        return "{" + ", ".join(pairs) + "}"

    lines: list[str] = []
    shape = model.shape
    for layer in range(shape.layers):
        seen = model.variables_before(layer)
        for h in range(shape.heads):
            if seen + h in needed:
                q, k, v = (int(choice[f"{layer}.{part}"][h]) for part in "qkv")
                rule = looks_for(q, k, choice[f"{layer}.predicate"][h])
                lines.append(f"looks_for = {rule}")
                place = f"attend({names[k]}, {names[q]}, looks_for)"
                lines.append(f"{names[seen + h]} = [{names[v]}[j] for j in {place}]")
        for c in range(shape.counts):
            if f"count_{layer}_{c}" in needed:
                q, k = (int(choice[f"{layer}.{part}"][c]) for part in ("cq", "ck"))
                lines.append(f"looks_for = {looks_for(q, k, choice[f'{layer}.cpredicate'][c])}")
                lines.append(f"count_{layer}_{c} = count({names[k]}, {names[q]}, looks_for)")
        at = seen + shape.heads
        for m in range(shape.mlps):
            if at + m in needed:
                a, b = (int(choice[f"{layer}.{part}"][m]) for part in "ab")
                table = choice[f"{layer}.table"][m]
                lines += _table(names[at + m], names[a], names[b], table, values(a), values(b))
        at += shape.mlps
        counted = count_names(model, layer + 1)
        for m in range(shape.count_mlps):
            if at + m in needed:
                a, b = (counted[int(choice[f"{layer}.{part}"][m])] for part in ("na", "nb"))
                levels = list(range(model.T + 1))
                lines += _table(names[at + m], a, b, choice[f"{layer}.ntable"][m], levels, levels)
    if len(kept) == 1:
        # One variable decides, so each of its values has its word.
        only = kept[0]
        rows = weights[only].tolist()
        body = ", ".join(
            f"{v!r}: {answers[row.index(max(row))]!r}"
            for v, row in zip(values(only), rows, strict=True)
            if v is not None
        )
        lines.append(f"says = {{{body}}}")
        lines.append(f"return [says[value] for value in {names[only]}[1:]]")
    else:
        for variable in kept:
            rows = weights[variable].int().tolist()
            body = ", ".join(f"{v!r}: {row}" for v, row in zip(values(variable), rows, strict=True) if v is not None)
            lines.append(f"scores_{names[variable]} = {{{body}}}")
        rows = ", ".join(f"scores_{names[v]}[{names[v]}[i]]" for v in kept)
        lines.append(f"return [best({list(answers)!r}, [{rows}]) for i in range(1, len(tokens))]")
    start = [f"tokens = [{BOS!r}] + list(xs)", "positions = list(range(len(tokens)))"]
    body = "\n".join(f"    {line}" for line in [*start, *lines])
    helpers = "".join(
        text for name, text in (("attend(", _ATTEND), ("count(", _COUNT), ("best(", _BEST)) if name in body
    )
    return helpers.replace("{until}", "[: i + 1]" if model.causal else "") + f"def program(xs):\n{body}\n"


def variable_names(model: ProgramModel) -> list[str]:
    """Names of the categorical variables, in their order."""
    names = ["tokens", "positions"]
    for layer in range(model.shape.layers):
        names += [f"head_{layer}_{h}" for h in range(model.shape.heads)]
        names += [f"table_{layer}_{m}" for m in range(model.shape.mlps)]
        names += [f"counted_{layer}_{m}" for m in range(model.shape.count_mlps)]
    return names


def count_names(model: ProgramModel, layers: int) -> list[str]:
    return [f"count_{layer}_{c}" for layer in range(layers) for c in range(model.shape.counts)]


def _domain(model: ProgramModel, choice: dict[str, torch.Tensor], variable: int) -> str:
    """Whose values a variable has: a copying head has those of what it copies."""
    while variable > 1:
        layer, at = divmod(variable - 2, model.shape.heads + model.shape.mlps + model.shape.count_mlps)
        if at >= model.shape.heads:
            return "table"
        variable = int(choice[f"{layer}.v"][at])
    return ("tokens", "positions")[variable]


def _needed(model: ProgramModel, choice: dict[str, torch.Tensor], kept: Sequence[int]) -> set[Any]:
    """The variables and counts that the kept ones are computed from."""
    shape = model.shape
    needed: set[Any] = set()
    todo: list[Any] = list(kept)
    while todo:
        one = todo.pop()
        if one in needed:
            continue
        needed.add(one)
        if isinstance(one, str):
            layer, c = map(int, one.split("_")[1:])
            todo += [int(choice[f"{layer}.{part}"][c]) for part in ("cq", "ck")]
        elif one > 1:
            layer, at = divmod(one - 2, shape.heads + shape.mlps + shape.count_mlps)
            if at < shape.heads:
                todo += [int(choice[f"{layer}.{part}"][at]) for part in "qkv"]
            elif at < shape.heads + shape.mlps:
                todo += [int(choice[f"{layer}.{part}"][at - shape.heads]) for part in "ab"]
            else:
                counted = count_names(model, layer + 1)
                at -= shape.heads + shape.mlps
                todo += [counted[int(choice[f"{layer}.{part}"][at])] for part in ("na", "nb")]
    return needed


def _table(name: str, a: str, b: str, table: torch.Tensor, first: list[Any], second: list[Any]) -> list[str]:
    """A table as a dictionary, its commonest value left out."""
    if a == b:
        entries = {f"{x!r}": int(table[i, i]) for i, x in enumerate(first) if x is not None}
        rows = f"[rule.get(x, other) for x in {a}]"
    else:
        entries = {
            f"({x!r}, {y!r})": int(table[i, j])
            for i, x in enumerate(first)
            for j, y in enumerate(second)
            if x is not None and y is not None
        }
        rows = f"[rule.get((x, y), other) for x, y in zip({a}, {b})]"
    values = list(entries.values())
    other = max(sorted(set(values)), key=values.count)
    body = ", ".join(f"{key}: {value}" for key, value in entries.items() if value != other)
    return [f"rule, other = {{{body}}}, {other}", f"{name} = {rows}"]
