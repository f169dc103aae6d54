"""FIND (Schwettmann et al., 2023): functions to be described, and how right a proposed program for one is.

Reads the published folders: CATEGORY/data.json (numeric: formula, domain), CATEGORY/test_data.json and
unit_test_data.json (strings: descriptions, and inputs with three candidate outputs each),
CATEGORY/fNNNNN/function_code.py. The code in those folders is text to this adapter. It runs only where the user says
allow_code=True, in a process of its own that is ended after some seconds and works in the function's own folder (the
numeric functions read a file of weights there): that keeps a mistake away from this process, and is no protection
against malice.
"""

import ast
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from headwater.bench.published.files import missing
from headwater.bench.published.result import SCHEMA, PublishedScores, score_row
from headwater.core.errors import BehaviorError, MethodError, did_you_mean
from headwater.core.results import Provenance

CATEGORIES = ("numeric", "strings", "neurons_entities", "neurons_relations")
THRESHOLD = 0.1  # of the normalized squared error below which a numeric program counts as right, as published
_POINTS = [i + 0.5 for i in range(-128, 128)]  # where numeric functions are compared, as published
Proposal = Callable[[Any], Any] | str


@dataclass(frozen=True)
class FindFunction:
    """One function: its metadata, its code as text with the folder it came from, and for strings the published test
    inputs with their outputs."""

    name: str
    category: str
    metadata: dict[str, Any]
    code: str | None
    tests: list[tuple[str, str]]
    folder: Path | None = None

    @property
    def defines(self) -> list[str]:
        """The names of the functions that its code defines, read without running it."""
        if self.code is None:
            return []
        try:
            tree = ast.parse(self.code)
        except SyntaxError:
            return []
        return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def load(folder: str | Path, category: str | None = None) -> dict[str, FindFunction]:
    """The functions of one category folder, by name; nothing in it is run.

    category: what they are; None takes the folder's name. Raises BehaviorError for a folder that holds none.
    """
    folder = Path(folder)
    category = category or folder.name
    if category not in CATEGORIES:
        raise BehaviorError("FIND has no such category", got=category, wanted=did_you_mean(category, CATEGORIES))
    found: dict[str, dict[str, Any]] = {}
    for row in _json_list(folder / "data.json"):
        found.setdefault(str(row.get("dir", row.get("name"))), {}).update(row)
    for row in _json_list(folder / "test_data.json"):
        found.setdefault(str(row.get("name")), {}).update(row)
    vectors = {str(row.get("name")): row for row in _json_list(folder / "unit_test_data.json")}
    names = {*found, *vectors, *(path.parent.name for path in folder.glob("*/function_code.py"))}
    if not names:
        raise missing("FIND", folder, "data.json, test_data.json, or fNNNNN/function_code.py")
    functions = {}
    for name in sorted(names):
        if not name.isidentifier():  # names come from a file, and are put into a path
            raise BehaviorError(f"{folder} names a function oddly", got=repr(name), wanted="a name such as f00001")
        path = folder / name / "function_code.py"
        code = path.read_text(encoding="utf-8") if path.is_file() else None
        tests = _tests(vectors.get(name)) if category == "strings" else []
        functions[name] = FindFunction(name, category, found.get(name, {}), code, tests, folder / name)
    return functions


def _json_list(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BehaviorError(f"{path.name} is not JSON", got=str(error)) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BehaviorError(f"{path.name} is no list of functions", got=type(rows).__name__)
    return rows


def _tests(row: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(input, right output): each test vector offers three, of which `correct_inx` (from 1) is this function's."""
    if row is None:
        return []
    pairs = []
    for (inputs, outputs), right in zip(row["test_vec"], row["correct_inx"], strict=True):
        index = int(right) - 1
        pairs.append((str(inputs[index]), str(outputs[index])))
    return pairs


def find(
    functions: Mapping[str, FindFunction],
    proposals: Mapping[str, Proposal],
    *,
    truths: Mapping[str, Callable[[float], float]] | None = None,
    allow_code: bool = False,
    points: Sequence[float] | None = None,
    seconds: float = 30.0,
) -> PublishedScores:
    """How far proposed programs agree with the functions they are meant to be.

    After Schwettmann et al. (2023). strings: the share of the published test inputs with exactly the right output
    (`agreement`; as a baseline `copy`, the share where the output is the input). numeric: 1 where the squared error
    over `points` (the published 256 half-integers from -127.5 to 127.5) is below a tenth of the function's own square
    (`indicator`), with the normalized error beside it (`nmse`; of the baseline `zero` it is 1). proposals: callables,
    or Python source (its `function`, or the last that it defines). truths: numeric functions as callables; otherwise
    the published code is run. Source of either kind needs allow_code=True; seconds: each may take. `all`: the mean
    over functions of one measure. Raises MethodError without allow_code, and for a proposal to an unknown function.

    Known failure: a published function that draws at random is matched by no program (strings f00004 agrees with its
    own published outputs on 1 of 10), and one huge value decides the normalized error of a function with a pole.
    """
    began = time.perf_counter()
    xs = [float(x) for x in points] if points is not None else _POINTS
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for name, proposal in proposals.items():
        if name not in functions:
            raise MethodError("a proposal for an unknown function", got=name, wanted=did_you_mean(name, functions))
        function = functions[name]
        if function.tests:
            said = _outputs(proposal, [x for x, _ in function.tests], allow_code, seconds)
            hits = [float(a == y) for a, (_, y) in zip(said.values, function.tests, strict=True)]
            rows.append(score_row(name, "proposal", "", "", "agreement", hits))
            rows.append(score_row(name, "copy", "", "", "agreement", [float(x == y) for x, y in function.tests]))
        elif function.category == "numeric":
            truth: Proposal | None = (truths or {}).get(name) or function.code
            if truth is None:
                raise MethodError(
                    f"{name} has no code and no truth to compare with", fix="Pass truths={name: callable}"
                )
            wanted = _outputs(truth, xs, allow_code, seconds, function.folder)
            said = _outputs(proposal, xs, allow_code, seconds)
            if wanted.error and not any(value is not None for value in wanted.values):
                raise MethodError(f"the published code of {name} does not run", got=wanted.error)
            error = normalized_error(wanted.values, said.values)
            # one number a function has no interval; where the program gives none it is not measured
            error_row = score_row(name, "proposal", "", "", "nmse", [])
            rows.append({**error_row, "value": error if math.isfinite(error) else None, "n": len(xs)})
            rows.append(score_row(name, "proposal", "", "", "indicator", [float(error < THRESHOLD)]))
        else:
            raise MethodError(f"{name} has no tests", got=function.category, fix="Score strings or numeric functions")
        if said.error:
            failed[name] = said.error
    for measure, method in dict.fromkeys((row["measure"], row["method"]) for row in rows if row["measure"] != "nmse"):
        values = [row["value"] for row in rows if (row["measure"], row["method"]) == (measure, method)]
        rows.append(score_row("all", method, "", "", measure, values, share=measure == "indicator"))
    return PublishedScores(
        tables={"scores": pl.DataFrame(rows, schema=SCHEMA)},
        facts={"benchmark": "FIND", "failed": failed, "n_functions": len(proposals)},
        config={"allow_code": allow_code, "points": xs, "seconds": seconds},
        provenance=Provenance.collect(seconds=time.perf_counter() - began),
    )


def normalized_error(wanted: Sequence[Any], said: Sequence[Any]) -> float:
    """Sum of squared errors over sum of squared values, where the function has a finite value; infinite where the
    program has none there."""
    error = scale = 0.0
    for y, value in zip(wanted, said, strict=True):
        if not isinstance(y, int | float) or not math.isfinite(y):
            continue
        if not isinstance(value, int | float) or not math.isfinite(value):
            return math.inf
        error += (y - value) ** 2
        scale += y**2
    if scale == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / scale


@dataclass(frozen=True)
class _Said:
    values: list[Any]
    error: str = ""


def _outputs(
    proposal: Proposal, inputs: Sequence[Any], allow_code: bool, seconds: float, folder: Path | None = None
) -> _Said:
    if callable(proposal):
        values: list[Any] = []
        error = ""
        for x in inputs:
            try:
                values.append(proposal(x))
            except Exception as problem:  # a proposal may fail in any way; that input then counts as wrong
                values.append(None)
                error = error or f"{type(problem).__name__}: {problem}"
        return _Said(values, error)
    if not allow_code:
        raise MethodError(
            "this would run Python code that headwater has not written",
            fix="Pass allow_code=True if you trust it, or give a callable",
        )
    return _run_source(proposal, inputs, seconds, folder)


# Reads {"source", "file", "inputs"} as JSON, runs the function that the source defines, and writes what it gave.
_RUNNER = """
import ast, json, sys
job = json.load(sys.stdin)
space = {"__name__": "proposal", "__file__": job["file"]}
names = [n.name for n in ast.parse(job["source"]).body if isinstance(n, ast.FunctionDef)]
name = "function" if "function" in names else names[-1]
if "torch.load" in job["source"]:  # the published weights were saved on a GPU
    import functools, torch
    torch.load = functools.partial(torch.load, map_location="cpu", weights_only=True)
exec(compile(job["source"], "proposal.py", "exec"), space)
out, error = [], ""
for x in job["inputs"]:
    try:
        y = space[name](x)
        out.append(y if isinstance(y, (str, int, float, bool)) or y is None else float(y))
    except Exception as problem:
        out.append(None)
        error = error or f"{type(problem).__name__}: {problem}"
sys.stdout.write("\\n" + json.dumps({"values": out, "error": error}))
"""


def _run_source(source: str, inputs: Sequence[Any], seconds: float, folder: Path | None) -> _Said:
    file = str((folder or Path()).absolute() / "function_code.py")
    job = json.dumps({"source": source, "file": file, "inputs": list(inputs)})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _RUNNER],
            input=job,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _Said([None] * len(inputs), f"not finished after {seconds:g} seconds")
    try:
        found = json.loads(done.stdout.rsplit("\n", 1)[-1])
    except ValueError:
        last = done.stderr.strip().splitlines()[-1:] or ["it wrote nothing"]
        return _Said([None] * len(inputs), last[0])
    return _Said(found["values"], found["error"])
