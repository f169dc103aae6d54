"""Learned programs: transformers whose every module is a line of Python (Friedman, Wettig & Chen, 2023)."""

from headwater.bench.programs.learning import SHAPES, LearnedProgram, ProgramsConfig, learn_program
from headwater.bench.programs.model import ProgramShape
from headwater.bench.programs.tasks import SequenceTask, sequence_tasks

__all__ = [
    "SHAPES",
    "LearnedProgram",
    "ProgramShape",
    "ProgramsConfig",
    "SequenceTask",
    "learn_program",
    "sequence_tasks",
]
