"""Toy models with an answer key: features in superposition, modular addition, group composition.

`toys.train("superposition_phases")` and the rest of `toys.toys.names()`; each gives a Result with its checks.
"""

from typing import TYPE_CHECKING

from headwater.core.lazy import lazy

_NAMES = {
    "Algebra": "headwater.bench.toys.algebra",
    "AlgebraConfig": "headwater.bench.toys.training",
    "AlgebraModel": "headwater.bench.toys.training",
    "Group": "headwater.core.groups",
    "Superposition": "headwater.bench.toys.superposing",
    "SuperpositionConfig": "headwater.bench.toys.superposing",
    "by_hand": "headwater.bench.toys.exact",
    "cyclic": "headwater.core.groups",
    "dihedral": "headwater.core.groups",
    "group": "headwater.core.groups",
    "group_composition": "headwater.bench.toys.training",
    "load": "headwater.bench.toys.training",
    "measure": "headwater.bench.toys.algebra",
    "modular_addition": "headwater.bench.toys.training",
    "superposition": "headwater.bench.toys.superposing",
    "symmetric": "headwater.core.groups",
    "toys": "headwater.bench.toys.catalog",
    "train": "headwater.bench.toys.catalog",
}

__all__ = [
    "Algebra",
    "AlgebraConfig",
    "AlgebraModel",
    "Group",
    "Superposition",
    "SuperpositionConfig",
    "by_hand",
    "cyclic",
    "dihedral",
    "group",
    "group_composition",
    "load",
    "measure",
    "modular_addition",
    "superposition",
    "symmetric",
    "toys",
    "train",
]


__getattr__, __dir__ = lazy(__name__, _NAMES, __all__)


if TYPE_CHECKING:
    from headwater.bench.toys.algebra import Algebra, measure
    from headwater.bench.toys.catalog import toys, train
    from headwater.bench.toys.exact import by_hand
    from headwater.bench.toys.superposing import Superposition, SuperpositionConfig, superposition
    from headwater.bench.toys.training import AlgebraConfig, AlgebraModel, group_composition, load, modular_addition
    from headwater.core.groups import Group, cyclic, dihedral, group, symmetric
