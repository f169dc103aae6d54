"""Result types that live in rooms of this room: `load_result` looks for an unknown kind in modules one level deep."""

from headwater.bench.siit.checks import SiitReport
from headwater.bench.siit.recovering import Recovery
from headwater.bench.toys.algebra import Algebra
from headwater.bench.toys.superposing import Superposition

__all__ = ["Algebra", "Recovery", "SiitReport", "Superposition"]
