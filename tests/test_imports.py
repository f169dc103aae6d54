"""The house keeps its direction, and looking at it costs nothing."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "headwater"
STAGES = {"behavior", "localize", "act", "dynamics", "data"}
BELOW = {"core": set[str](), "claims": {"core"}}
BELOW |= {stage: {"core", "claims", "behavior"} for stage in STAGES}
BELOW["report"] = {"core", "claims", *STAGES}
BELOW["trace"] = {*BELOW["report"], "report"}
BELOW["bench"] = {*BELOW["trace"], "trace"}
BELOW["cli"] = {*BELOW["bench"], "bench"}
# Result.chart() finds its drawing by name: the only arrow that points upwards.
# A corpus that is a run of the lab is rebuilt by the lab, found by name too.
BY_NAME = {("core/results.py", "report"), ("data/corpus.py", "dynamics")}
# A world is one of the lab's sources, and mechanisms are related to counts checkpoint by checkpoint.
BY_NAME |= {("data/world.py", "dynamics"), ("data/link_strengths.py", "dynamics")}
# The edges of a circuit over checkpoints are the edges that `localize` finds at each.
BY_NAME |= {("dynamics/measures/circuit.py", "localize")}
# Which sequences mention a pair of terms is for `data` to say, when the lab leaves them out.
BY_NAME |= {("dynamics/lab/redo.py", "data")}
# Attribution reads checkpoints and the data of runs, and its test trains again: that is the lab's.
BY_NAME |= {("data/attribution/attributing.py", "dynamics"), ("data/attribution/removing.py", "dynamics")}
# Data curation trains again: that is the lab's.
BY_NAME |= {("act/curation.py", "dynamics")}
HEAVY = ["torch", "transformers", "polars", "altair", "scipy", "numpy", "pandas", "jinja2", "vl_convert"]

MODULES = sorted(SRC.rglob("*.py"))


def imported(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str, bool]]:
    """Each headwater module that `tree` imports: (line, dotted name, named by a string only)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from ((node.lineno, f"{module}.{alias.name}", False) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            text = ast.unparse(node.args[0]) if node.args else ""
            yield node.lineno, text.removeprefix("f").strip("'\""), True


def broken_rules(source: str, where: str) -> list[str]:
    """What in this module's imports goes against the direction; `where` is its path inside the package."""
    parts = Path(where).parts
    room = parts[0] if len(parts) > 1 else ""
    if not room:
        return []  # headwater/__init__.py names everything, lazily
    faults = []
    for line, name, by_string in imported(ast.parse(source), ["headwater", *parts[:-1]]):
        package, _, rest = name.partition(".")
        if package != "headwater" or rest == "__version__":
            continue
        target = rest.split(".")[0]
        if target == room or target in BELOW[room] or (by_string and (where, target) in BY_NAME):
            continue
        faults.append(
            f"{where}:{line} imports {name}: {room} may import {sorted(BELOW[room]) or 'nothing of the house'}"
        )
    return faults


def test_every_room_is_known() -> None:
    rooms = {path.relative_to(SRC).parts[0] for path in MODULES if path.parent != SRC}
    assert rooms == set(BELOW)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SRC).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    assert broken_rules(path.read_text(), path.relative_to(SRC).as_posix()) == []


@pytest.mark.parametrize(
    ("where", "source", "fault"),
    [
        ("core/model.py", "from headwater.localize import patch", True),
        ("core/model.py", "def f():\n    from ..behavior.table import Behavior", True),
        ("core/model.py", "from headwater import behavior", True),
        ("core/model.py", "import headwater as hw", True),
        ("core/model.py", "from .sites import Site\nfrom headwater import __version__\nimport torch", False),
        ("core/model.py", "import importlib\nimportlib.import_module('headwater.report.charts')", True),
        ("core/results.py", "import importlib\nimportlib.import_module('headwater.report.charts')", False),
        ("core/results.py", "from headwater.report import charts", True),
        ("localize/patch.py", "from headwater.behavior import Behavior", False),
        ("localize/patch.py", "from headwater.act import steer", True),
        ("report/page.py", "from headwater.trace import investigation", True),
        ("cli/trace.py", "from headwater.trace import investigation", False),
    ],
)
def test_the_rule_itself(where: str, source: str, fault: bool) -> None:
    assert bool(broken_rules(source, where)) is fault


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SRC).as_posix())
def test_the_library_does_not_print(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    prints = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert prints == [], f"{path.relative_to(SRC)} prints on lines {prints}"


def loaded_after(python: Any, code: str) -> list[str]:
    """The heavy packages a fresh process has loaded after running `code`, with warnings as errors."""
    show = "import json as _json, sys as _sys; _sys.stderr.write('LOADED' + _json.dumps(sorted(_sys.modules)))"
    done = python("-W", "error", "-c", f"{code}\n{show}")
    assert done.returncode == 0, done.stderr
    return [name for name in json.loads(done.stderr.rsplit("LOADED", 1)[1]) if name in HEAVY]


def test_import_is_light(python: Any) -> None:
    assert loaded_after(python, "import headwater; dir(headwater); headwater.HeadwaterError") == []


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["trace", "--help"], ["behavior", "--help"]])
def test_help_is_light(python: Any, arguments: list[str]) -> None:
    code = f"""
from headwater.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code
"""
    assert loaded_after(python, code) == []


def test_names_resolve() -> None:
    import headwater

    assert set(headwater.__all__) <= set(dir(headwater))
    missing = []
    for name in headwater.__all__:
        try:
            getattr(headwater, name)
        except (ImportError, AttributeError) as error:
            missing.append(f"{name}: {error}")
    assert missing == []
    with pytest.raises(AttributeError, match="no attribute 'nothing_like_it'"):
        headwater.nothing_like_it  # noqa: B018


@pytest.mark.parametrize("room", ["act", "localize", "bench", "bench.siit", "bench.toys", "data", "dynamics"])
def test_names_of_a_room_are_found_on_first_use(room: str, python: Any) -> None:
    done = python("-W", "error", "-c", f"""
import sys
import headwater.{room} as room
assert "torch" not in sys.modules and dir(room) == sorted(room.__all__)
assert not set(room.__all__) & set(vars(room))
for name in room.__all__:
    value = getattr(room, name)
    assert vars(room)[name] is value
try:
    room.nothing_like_it
except AttributeError as error:
    assert str(error) == "module 'headwater.{room}' has no attribute 'nothing_like_it'"
else:
    raise SystemExit("found")
""")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_name_has_a_place() -> None:
    import headwater

    assert set(headwater.__all__) == {*headwater._PLACES, *headwater._ROOMS, "__version__"}
