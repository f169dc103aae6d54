"""Models whose mechanism is known, with the pairs to explain them on: compiled programs, trained models, one's own."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.bench import truth
from headwater.core.errors import HeadwaterError, MethodError, did_you_mean

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.bench.mechanism import TrueMechanism
    from headwater.core.model import Model


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """A model at hand, with what is known of it."""

    model: "Model"
    mechanism: "TrueMechanism"
    behavior: "Behavior"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from. origin: "compiled", "trained" or "given"; mark: what tells two of one name apart."""

    name: str
    origin: str
    mark: str = ""
    given: Any = None

    def make(self, pairs: int, seed: int) -> Subject:
        """The model and its pairs. Seeds give other pairs and, of compiled programs, other spare parts.

        Raises BehaviorError for a model that has no pairs.
        """
        made: Any = self.given
        if self.origin == "compiled":
            made = truth.compile(self.name, seed=seed)
        elif self.origin == "trained":
            from headwater.bench import siit

            made = siit.load(self.given)
        if hasattr(made, "behavior"):
            return Subject(model=made.model, mechanism=made.mechanism, behavior=made.behavior(pairs, seed=seed))
        behavior = truth.behavior(made, pairs, seed=seed)
        return Subject(model=made.model, mechanism=made.mechanism, behavior=behavior)


def sources(models: Sequence[Any] | None) -> list[Source]:
    """Programs by name (None: all of the library), folders that `bench train` wrote, or objects with `model`,
    `mechanism` and, but for compiled programs, `behavior(n, seed=)`.

    Raises MethodError for anything else, and for two of one name.
    """
    found = [_source(one) for one in (truth.names() if models is None else models)]
    names = [one.name for one in found]
    if not found or len(set(names)) != len(names):
        raise MethodError("a table needs models, each of a name of its own", got=", ".join(names) or "none")
    return found


def _source(model: Any) -> Source:
    if isinstance(model, str) and model in truth.names():
        return Source(name=model, origin="compiled")
    if isinstance(model, str | Path):
        known = Path(model) / "siit.json"
        if not known.is_file():
            wanted = f"{did_you_mean(str(model), truth.names())}, or a folder that `headwater bench train` wrote"
            raise MethodError("no model whose mechanism is known", got=str(model), wanted=wanted)
        mark = hashlib.sha256(known.read_bytes()).hexdigest()[:12]
        return Source(name=f"trained {Path(model).name}", origin="trained", mark=mark, given=Path(model))
    if not (hasattr(model, "model") and hasattr(model, "mechanism")):
        raise MethodError("no model whose mechanism is known", got=type(model).__name__, wanted="a name or a folder")
    mark = str(model.mechanism.content_hash)[:12]
    return Source(name=str(getattr(model, "name", "given")), origin="given", mark=mark, given=model)


def made_or_why(source: Source, pairs: int, seed: int) -> Subject | str:
    """The model, or why it cannot be had."""
    try:
        return source.make(pairs, seed)
    except HeadwaterError as error:
        return str(error)
