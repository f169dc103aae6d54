"""Programs from recurrent networks (Michaud et al., 2024): 62 tasks, small networks, integer states, Python."""

from headwater.bench.mips.synthesis import Mips, MipsConfig, mips, solve
from headwater.bench.mips.tasks import Task, tasks

__all__ = ["Mips", "MipsConfig", "Task", "mips", "solve", "tasks"]
