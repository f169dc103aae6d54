"""Recalibration: components stop voting for an answer's letter or place, whatever the question."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.edit import Delta
from headwater.act.editing.closed import insert, ridged
from headwater.act.editing.making import EditConfig, candidate, chosen
from headwater.act.editing.parts import Matrix, check_direct, down_projection, head_columns, out_projection
from headwater.act.steering.choosing import Task
from headwater.core.errors import MethodError
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class RecalibrateConfig(EditConfig):
    """Options of `EditConfig`, and parts: "heads", "mlps" or both; top: how many of them, those with the largest
    constant votes; ridge: as in `FactConfig`. Strength 1 takes the constant votes out."""

    parts: Literal["heads", "mlps", "both"] = "both"
    top: int = 8
    ridge: float = 0.1
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1 or self.ridge < 0:
            raise MethodError("top is at least 1, and ridge not negative")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """A head or an MLP. columns: of the matrix (None: all); key: its mean input [I]; moment [I, I]; write: its mean
    write [D]; votes: for each option, what the mean write says of it beyond the others."""

    name: str
    matrix: Matrix
    columns: Tensor | None
    key: Tensor
    moment: Tensor
    write: Tensor
    votes: Tensor


@methods.register("recalibrate")
def recalibrate(
    model: "Model", behavior: "Behavior", *, config: RecalibrateConfig | None = None, **options: Any
) -> Action:
    """Take the constant votes for answer letters out of heads and MLPs (after Li and Gao, 2025): position bias.

    Over training prompts in which each option is right equally often, a component's mean write at the last token should
    speak for no option. For those whose mean write does most, the smallest change of their output matrix, in the second
    moment of what they read there, takes that part out of the mean; what varies with the question stays. The options
    are the first tokens of answers and foils. Options are those of `RecalibrateConfig`. Known failure: a bias that
    depends on the question (of long options, of what was right in examples) is no constant, and stays; where the right
    options are not balanced in the training pairs, a sound vote is taken for a bias.
    """
    used = configured(RecalibrateConfig, config, options)
    site = f"resid_post.{model.n_layers - 1}"
    task = Task.of(model, behavior, site, Goal.parse(used.goal), used.n, used.seed)
    reads_OD = _option_readouts(task)
    parts = sorted(_parts(task, used.parts, reads_OD), key=lambda one: -float(one.votes.norm()))[: used.top]
    basis = torch.linalg.svd(reads_OD, full_matrices=False).Vh  # the directions in which options are told apart
    keep = torch.linalg.svdvals(reads_OD) > 1e-6 * torch.linalg.svdvals(reads_OD)[0]
    basis = basis[keep]

    def make(strength: float) -> list[Delta]:
        deltas: list[Delta] = []
        for one in parts:
            change = -strength * (one.write @ basis.T) @ basis / one.matrix.scale
            left, right = insert(one.key, change, ridged(one.moment, used.ridge))
            if one.columns is not None:
                whole = torch.zeros(1, one.matrix.weight.shape[1], dtype=right.dtype)
                whole[:, one.columns] = right
                right = whole
            deltas.append(one.matrix.low_rank(left, right))
        return deltas

    names = [one.name for one in parts]
    made = candidate(task, task.goals[0], task.places[0], f"recalibrate {len(parts)} parts", make, parts=names)
    return chosen(task, [made], used, method="recalibrate", passes=3 * task.fit.n)


def _option_readouts(task: Task) -> Tensor:
    """[options, D]: for each option, the mean gradient at the last stream of its logit less the mean of its pair's
    options."""
    model = task.model
    last = f"resid_post.{model.n_layers - 1}"
    total: dict[int, Any] = {}
    met: dict[int, int] = {}
    for group in task.fit.groups:
        run = model.run(group.clean, capture=[last], logits="last", grad=True)
        options_BO = torch.cat([group.answers, group.foils], 1)
        for token in options_BO[options_BO >= 0].unique().tolist():
            there = (options_BO == token).any(1)
            some = options_BO[there]
            logits = run.logits[there.to(run.logits.device)]
            mask = (some >= 0).to(logits)
            mean = (logits.gather(1, some.clamp(min=0).to(logits.device)) * mask).sum(1) / mask.sum(1)
            slope = run.grads((logits[:, token] - mean).sum(), [last])[last][:, -1]
            total[token] = total.get(token, 0.0) + slope.detach().double().cpu().sum(0)
            met[token] = met.get(token, 0) + int(there.sum())
    common = [token for token in total if met[token] >= 2]
    if len(common) < 2:
        raise MethodError("there are no options that pairs share", fix="Use a multiple-choice behavior")
    return torch.stack([total[token] / met[token] for token in common])


def _parts(task: Task, which: str, reads_OD: Tensor) -> list[_Part]:
    model = task.model
    kinds = {"heads": ("z",), "mlps": ("neurons",), "both": ("z", "neurons")}[which]
    sites = [site for site in model.sites() if site.kind in kinds]
    inputs: dict[str, list[Tensor]] = {str(site): [] for site in sites}
    for group in task.fit.groups:
        ends = [site.at(-1) for site in sites]
        run = model.run(group.clean, capture=ends, logits="none")
        for site, end in zip(sites, ends, strict=True):
            inputs[str(site)].append(run[end].double().cpu())
    found: list[_Part] = []
    for site in sites:
        layer, read = int(site.layer or 0), torch.cat(inputs[str(site)])
        if site.kind == "neurons":
            check_direct(model, layer, "mlp_out")
            found.append(_part(f"m{layer}", down_projection(model, layer), None, read, reads_OD))
            continue
        check_direct(model, layer, "attn_out")
        matrix = out_projection(model, layer)
        for head in range(read.shape[1]):
            columns = head_columns(model, layer, head)
            found.append(_part(f"a{layer}.h{head}", matrix, columns, read[:, head], reads_OD))
    return found


def _part(name: str, matrix: Matrix, columns: Tensor | None, read_NI: Tensor, reads_OD: Tensor) -> _Part:
    weight = matrix.weight.double().cpu()
    weight = weight if columns is None else weight[:, columns]
    key = read_NI.mean(0)
    write = matrix.scale * (weight @ key)
    if columns is None and matrix.bias is not None:
        write = write + matrix.scale * matrix.bias.double().cpu()
    moment = read_NI.T @ read_NI / len(read_NI)
    return _Part(name=name, matrix=matrix, columns=columns, key=key, moment=moment, write=write, votes=reads_OD @ write)
