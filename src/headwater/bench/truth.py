"""Models with a known mechanism: compile a program, load it again, and make the pairs to explain it on."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headwater.behavior.table import Behavior
from headwater.bench.compress import CompressConfig, Compression
from headwater.bench.compress import compress as compress_compiled
from headwater.bench.interchange import interchange
from headwater.bench.mechanism import TrueMechanism
from headwater.bench.rasp.compiler import CompileConfig, Compiled, all_inputs, compile_program
from headwater.bench.rasp.language import RaspError, SOp
from headwater.bench.rasp.library import Program, programs
from headwater.bench.rasp.words import word
from headwater.core.errors import BehaviorError, MethodError
from headwater.core.results import load_result
from headwater.localize.catalog import fitted

_TRIES = 400  # draws a pair

__all__ = ["behavior", "compile", "compress", "interchange", "load", "names", "programs"]


def names() -> list[str]:
    """The programs of the library."""
    return programs.names()


def compile(
    program: str | SOp,
    vocabulary: Iterable[Any] | None = None,
    *,
    name: str | None = None,
    config: CompileConfig | None = None,
    **options: Any,
) -> Compiled:
    """A transformer that computes a program of the library (by name) or one of your own (with its `vocabulary`).

    `options` are fields of CompileConfig: max_length, causal, sharpness, spare_heads, spare_neurons, scratch, seed.
    Raises RaspError, naming the expression that cannot be compiled, and MethodError for an unknown name or option.
    """
    known = programs.get(program) if isinstance(program, str) else None
    if known is not None and config is None:
        options = {"causal": known.causal, **options}
    chosen = fitted(CompileConfig, {**(asdict(config) if config else {}), **options})
    if known is not None:
        tokens = known.vocabulary if vocabulary is None else vocabulary
        return compile_program(known.make(), tokens, name=name or known.name, config=chosen)
    if vocabulary is None or isinstance(program, str):
        raise RaspError("a program of your own needs a vocabulary", fix="Pass the tokens that inputs are made of")
    return compile_program(program, vocabulary, name=name or getattr(program, "label", "") or "program", config=chosen)


def compress(compiled: str | Compiled, config: CompressConfig | None = None, **options: Any) -> Compression:
    """The same program in a narrower stream, with how faithful it is: see `headwater.bench.compress`.

    `options` are fields of CompressConfig: d_model (needed), steps, batch, lr, init, stream_weight, seed.
    """
    wide = compile(compiled) if isinstance(compiled, str) else compiled
    if config is None and "d_model" not in options:
        raise MethodError("say how narrow", wanted=f"d_model below {wide.hf.config.hidden_size}")
    return compress_compiled(wide, fitted(CompressConfig, {**(asdict(config) if config else {}), **options}))


def load(folder: str | Path) -> tuple[Any, TrueMechanism]:
    """(model, mechanism) from a folder that `Compiled.save` or `headwater truth compile` wrote."""
    from headwater.core.loading import load as load_model

    mechanism = load_result(Path(folder) / "mechanism")
    if not isinstance(mechanism, TrueMechanism):
        raise RaspError(f"{folder} holds no mechanism", got=mechanism.kind)
    return load_model(folder), mechanism


def behavior(
    program: str | Compiled, n: int = 64, *, length: int | None = None, minimal: float = 0.5, seed: int = 0
) -> Behavior:
    """Pairs of inputs of one length whose answers at the last position differ, in the words of the compiled model.

    length: of the inputs (None: the longest of which there are pairs). minimal: the share of pairs that differ in one
    token only; the others differ anywhere. variables: the two inputs' answers. Raises BehaviorError for a program whose
    answer at the last position is the same for every input of that length (the length, say).
    """
    compiled = compile(program) if isinstance(program, str) else program
    longest = compiled.config.max_length
    if not 1 <= (length or 1) <= longest or not 0 <= minimal <= 1 or n < 2:
        raise BehaviorError(
            f"cannot make pairs of {compiled.name}",
            got=f"n={n}, length={length}, minimal={minimal}",
            wanted=f"n of at least 2, length of 1 to {longest}, minimal of 0 to 1",
        )
    rows: list[dict[str, Any]] = []
    for tried in (length,) if length else range(longest, 0, -1):
        rows = _pairs(compiled, n, tried, minimal, random.Random(f"headwater-truth:{compiled.name}:{seed}:{tried}"))
        if len(rows) >= 2:
            about = {"program": compiled.name, "length": tried, "seed": seed, "minimal": minimal}
            return Behavior.from_rows(rows, name=f"rasp-{compiled.name}", about=about)
    raise BehaviorError(
        f"{compiled.name} has no pairs" + (f" of length {length}" if length else ""),
        got=f"{len(rows)} of {_TRIES * n} tried whose answers at the last position differ",
        fix="Take another length; a program whose answer depends on the length only has no such pairs",
    )


def _pairs(compiled: Compiled, n: int, length: int, minimal: float, draw: random.Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    taken: set[tuple[Any, ...]] = set()
    answers: dict[tuple[Any, ...], str | None] = {}

    def answer(inputs: list[Any]) -> str | None:
        if tuple(inputs) not in answers:
            answers[tuple(inputs)] = _answer(compiled, inputs)
        return answers[tuple(inputs)]

    for attempt in range(_TRIES * n):
        if len(rows) == n:
            break
        one = [draw.choice(compiled.vocabulary) for _ in range(length)]
        small = draw.random() < minimal
        other = list(one) if small else [draw.choice(compiled.vocabulary) for _ in range(length)]
        if small:
            other[draw.randrange(length)] = draw.choice(compiled.vocabulary)
        # Short inputs are few: those already used come back only when new ones have become rare.
        if tuple(one) in taken and attempt < _TRIES * n // 8:
            continue
        both = answer(one), answer(other)
        if both[0] is None or both[1] is None or both[0] == both[1]:
            continue
        taken.add(tuple(one))
        rows.append(_row(compiled, one, other, both, "one token" if small else "any", len(rows)))
    return rows


def _answer(compiled: Compiled, inputs: Sequence[Any]) -> str | None:
    """The word that the program gives at the last position; None where it has no meaning there."""
    try:
        return word(compiled.interpret(inputs)[-1])
    except RaspError:
        return None


def _row(
    compiled: Compiled, one: Sequence[Any], other: Sequence[Any], answers: Sequence[str | None], kind: str, index: int
) -> dict[str, Any]:
    return {
        "id": f"{index:05d}",
        "prompt": compiled.prompt(one),
        "counterfactual": compiled.prompt(other),
        "answers": [f" {answers[0]}"],
        "foils": [f" {answers[1]}"],
        "variables": {"answer": answers[0], "counterfactual_answer": answers[1]},
        "template": kind,
    }


def exhaustive(program: Program, longest: int | None = None) -> list[tuple[Any, ...]]:
    """Every input up to `longest` (the program's own) on which it has a meaning."""
    inputs = all_inputs(program.vocabulary, program.longest if longest is None else longest)
    return [one for one in inputs if program.valid is None or program.valid(one)]
