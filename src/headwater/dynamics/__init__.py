"""dynamics, stage 3: when a mechanism formed.

`train` makes small models from scratch with a data order that can be rebuilt; `CheckpointSeries` reads the checkpoints
of a run, a folder or the hub; `track` measures them into a `Timeline`.
"""

from typing import TYPE_CHECKING

from headwater.core.lazy import lazy

_PLACES = {
    "CheckpointSeries": "headwater.dynamics.series",
    "Timeline": "headwater.dynamics.timeline",
    "track": "headwater.dynamics.timeline",
    "redo": "headwater.dynamics.lab.redo",
    "train": "headwater.dynamics.lab.training",
    "TrainConfig": "headwater.dynamics.lab.config",
    "TrainingRun": "headwater.dynamics.lab.run",
}

__all__ = ["CheckpointSeries", "Timeline", "TrainConfig", "TrainingRun", "redo", "track", "train"]


__getattr__, __dir__ = lazy(__name__, _PLACES, __all__)


if TYPE_CHECKING:
    from headwater.dynamics.lab.config import TrainConfig
    from headwater.dynamics.lab.redo import redo
    from headwater.dynamics.lab.run import TrainingRun
    from headwater.dynamics.lab.training import train
    from headwater.dynamics.series import CheckpointSeries
    from headwater.dynamics.timeline import Timeline, track
