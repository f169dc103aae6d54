"""Toy models by name, with the settings that they are trained with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from headwater.core.errors import MethodError
from headwater.core.registry import Registry
from headwater.core.results import Result

Toy = Callable[..., Result]
"""toy(out=folder or None, **options) -> Result; where it has a model, the folder holds it too."""

toys: Registry[Toy] = Registry("toy", error=MethodError)
"""Toys by name; outside packages add theirs by the entry point group `headwater.toys`."""


def train(name: str, *, out: str | Path | None = None, **options: Any) -> Result:
    """Train a toy by its name and give its result: `Superposition`, or `Algebra` (the answer key of a model).

    out: the folder for it; of a model with weights, tokenizer and pairs too. Raises MethodError for an unknown name.
    """
    return toys.get(name)(out=out, **options)


def _superposed(defaults: dict[str, Any], about: str) -> Toy:
    def make(*, out: str | Path | None = None, **options: Any) -> Result:
        from headwater.bench.toys.superposing import superposition

        found = superposition(**{**defaults, **options})
        if out is not None:
            found.save(out)
        return found

    make.__doc__ = about
    return make


def _composed(group: str, defaults: dict[str, Any], about: str) -> Toy:
    def make(*, out: str | Path | None = None, **options: Any) -> Result:
        from headwater.bench.toys.training import group_composition

        return group_composition(group, out=out, **{**defaults, **options}).answer

    make.__doc__ = about
    return make


# Equal features over ten sparsities: how many dimensions does each get?
_POLYTOPES = {
    "features": 60,
    "hidden": 15,
    "densities": (1.0, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02),
    "importances": (1.0,),
    "weighting": "decay",
    "tries": 1,
    "steps": 4000,
}
_PENTAGON = _POLYTOPES | {"features": 5, "hidden": 2, "tries": 4, "steps": 2000}
toys.register("superposition_phases")(
    _superposed({}, "Two features, one dimension: phase diagram over sparsity and relative importance.")
)
toys.register("superposition_polytopes")(
    _superposed(_POLYTOPES, "60 equal features in 15 dimensions: dimensions a feature, over sparsity.")
)
toys.register("superposition_pentagon")(
    _superposed(_PENTAGON, "Five equal features in two dimensions: from two axes to a pentagon, over sparsity.")
)
toys.register("modular_addition")(_composed("C43", {}, "Addition modulo 43 by a one-layer transformer."))
# A group of 30 is memorized at any decay that was tried; one of 46, with more of its table and more decay, is learned.
_DIHEDRAL = {"share": 0.9, "weight_decay": 3.0}
toys.register("dihedral")(_composed("D23", _DIHEDRAL, "Composition of the symmetries of a 23-gon."))
toys.register("symmetric")(_composed("S4", {}, "Composition of the permutations of four things."))
