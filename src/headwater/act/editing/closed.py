"""The closed forms behind edits of linear maps: the smallest change, in the metric of what the map reads elsewhere,
that sends given keys to given values.

Shapes: O outputs, I inputs, R keys.
"""

import torch
from torch import Tensor

from headwater.core.errors import MethodError


def ridged(moment_II: Tensor, share: float) -> Tensor:
    """The moment plus `share` of its mean diagonal on the diagonal: inputs that the corpus never varied cost something
    too. Raises MethodError where nothing is left to invert."""
    mean = float(moment_II.diagonal().mean())
    if not mean > 0:
        raise MethodError("the moments of the keys are zero", fix="Take more text")
    return moment_II + share * mean * torch.eye(len(moment_II), dtype=moment_II.dtype, device=moment_II.device)


def insert(key_I: Tensor, change_O: Tensor, moment_II: Tensor) -> tuple[Tensor, Tensor]:
    """(left [O, 1], right [1, I]): the change of a map that moves its output for `key` by `change` and is the smallest
    for other keys, E |change of output|^2 over keys of second moment `moment` (Meng et al., 2022):

    change (C^-1 k)^T / (k^T C^-1 k).
    """
    spread = torch.linalg.solve(moment_II, key_I)
    along = key_I @ spread
    if not float(along) > 0:
        raise MethodError("the key is zero, or its moments are not positive", fix="Raise ridge")
    return change_O[:, None], (spread / along)[None]


def least_squares(keys_IR: Tensor, changes_OR: Tensor, moment_II: Tensor) -> tuple[Tensor, Tensor]:
    """(left [O, R], right [R, I]): the change of a map that least squares gives between moving the outputs of `keys` by
    `changes` and leaving those of other keys, whose second moment is `moment` (Meng et al., 2023):

    changes K^T (C + K K^T)^-1.
    """
    return changes_OR, torch.linalg.solve(moment_II + keys_IR @ keys_IR.T, keys_IR).T
