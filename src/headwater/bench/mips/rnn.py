"""The networks of the tasks: the smallest recurrent network that does a task, trained by Levenberg-Marquardt.

h_t = f(h_{t-1}, x_t), y_t = g(h_t), h_0 = 0, in float64. With at most a few hundred weights the whole Jacobian fits,
and a damped Gauss-Newton step uses it: a task that has an exact solution is fitted to rounding error in tens of
steps, and the hidden states then lie on their lattice to many digits. Adam would stop at some 1e-3, where no lattice
can be read off.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from headwater.bench.mips.tasks import Task

Update = Literal["linear", "bilinear", "mlp"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shape of a network.

    update: "linear": h' = W h + U x + b · "bilinear": h' = W[x] h, a matrix a letter, from
    h_0 = (1, 0, ...) (small alphabets; the second-order networks of Giles et al., 1992, which hold every finite-state
    machine) · "mlp": h' = A relu(W h + U x + b) + c, with `width` units. embedded: x is
    one-hot, so that U holds any function of the input (small alphabets only). readout: units of g's hidden layer (0: g
    is linear).
    """

    hidden: int
    update: Update = "linear"
    width: int = 0
    readout: int = 0
    embedded: bool = False

    @property
    def one_hot(self) -> bool:
        """Whether it reads its inputs as letters."""
        return self.embedded or self.update == "bilinear"

    def start(self, n: int) -> torch.Tensor:
        """h_0 of `n` sequences."""
        h = torch.zeros(n, self.hidden, dtype=torch.float64)
        if self.update == "bilinear":
            h[:, 0] = 1.0
        return h

    def __str__(self) -> str:
        inner = f" of {self.width} units" if self.update == "mlp" else ""
        outer = f"an MLP of {self.readout} units" if self.readout else "linear"
        inputs = "one-hot inputs, " if self.embedded else ""
        return f"{inputs}{self.update} update{inner}, {self.hidden} hidden, output {outer}"


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network. `step` and `output` are f and g on tensors [B, .]; inputs and outputs in the task's units."""

    task: Task
    arch: Architecture
    weights: dict[str, torch.Tensor]
    error: float
    """Largest error on fresh sequences; below 0.5 every output rounds to the right integer."""
    iterations: int

    def step(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return _step(self.weights, self.arch, h, _encoded(self.task, self.arch, x))

    def output(self, h: torch.Tensor) -> torch.Tensor:
        return _output(self.weights, self.arch, h) * output_scale(self.task)

    def states(self, xs: np.ndarray[Any, Any]) -> torch.Tensor:
        """The hidden states along sequences [N, T, width] -> [N, T, hidden]."""
        h = self.arch.start(len(xs))
        found = []
        for t in range(xs.shape[1]):
            h = self.step(h, torch.as_tensor(xs[:, t]))
            found.append(h)
        return torch.stack(found, dim=1)


def output_scale(task: Task) -> float:
    """Targets are divided by their spread, so that one tolerance fits all tasks."""
    _, ys = task.sample(256, seed=7)
    return max(1.0, float(ys.std()))


def _encoded(task: Task, arch: Architecture, x: torch.Tensor) -> torch.Tensor:
    if arch.one_hot:
        size = task.high - task.low
        index = sum(((x[..., i] - task.low) * size**i for i in range(task.width)), torch.zeros_like(x[..., 0]))
        return torch.nn.functional.one_hot(index, size**task.width).double()
    return x.double() / max(abs(task.low), task.high - 1)


def _shapes(task: Task, arch: Architecture) -> dict[str, tuple[int, ...]]:
    inputs = (task.high - task.low) ** task.width if arch.one_hot else task.width
    h = arch.hidden
    shapes: dict[str, tuple[int, ...]] = {}
    if arch.update == "mlp":
        shapes |= {"W": (arch.width, h), "U": (arch.width, inputs), "b": (arch.width,)}
        shapes |= {"A": (h, arch.width), "c": (h,)}
    elif arch.update == "bilinear":
        shapes |= {"W": (inputs, h, h)}
    else:
        shapes |= {"W": (h, h), "U": (h, inputs), "b": (h,)}
    if arch.readout:
        shapes |= {"R": (arch.readout, h), "r": (arch.readout,)}
        shapes |= {"C": (task.outputs, arch.readout), "d": (task.outputs,)}
    else:
        shapes |= {"C": (task.outputs, h), "d": (task.outputs,)}
    return shapes


def _unflatten(flat: torch.Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    out, at = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        out[name] = flat[at : at + size].reshape(shape)
        at += size
    return out


def _step(w: dict[str, torch.Tensor], arch: Architecture, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if arch.update == "bilinear":
        return torch.einsum("ba,aij,bj->bi", x, w["W"], h)
    inner = h @ w["W"].T + x @ w["U"].T + w["b"]
    return inner if arch.update == "linear" else torch.relu(inner) @ w["A"].T + w["c"]


def _output(w: dict[str, torch.Tensor], arch: Architecture, h: torch.Tensor) -> torch.Tensor:
    inner = torch.relu(h @ w["R"].T + w["r"]) if arch.readout else h
    return inner @ w["C"].T + w["d"]


def _outputs(w: dict[str, torch.Tensor], arch: Architecture, xs: torch.Tensor) -> torch.Tensor:
    h = arch.start(xs.shape[0])
    out = []
    for t in range(xs.shape[1]):
        h = _step(w, arch, h, xs[:, t])
        out.append(_output(w, arch, h))
    return torch.stack(out, dim=1)


def train(task: Task, arch: Architecture, *, seed: int, iterations: int = 120) -> Network:
    """Fit a network to a task from one random start; `error` says how well.

    Sequences grow from 2 positions to the task's length as they are mastered: through long ones a random start has no
    useful gradient.
    """
    shapes = _shapes(task, arch)
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    rng = np.random.default_rng([seed, arch.hidden, arch.width, arch.readout, *task.name.encode()])
    start = [_drawn(rng, name, shape) for name, shape in shapes.items()]
    flat = torch.as_tensor(np.concatenate([one.ravel() for one in start]))
    n = max(48, 4 * size // (task.length * task.outputs))
    scale = output_scale(task)
    xs, ys = task.sample(n, seed=seed)
    inputs, targets = _encoded(task, arch, torch.as_tensor(xs)), torch.as_tensor(ys).double() / scale
    lengths = [length for length in (2, 3, 5) if length < task.length] + [task.length]
    used = 0
    with torch.no_grad():
        for length in lengths:
            flat, steps = _fit(flat, shapes, arch, inputs[:, :length], targets[:, :length], iterations - used)
            used += steps
            if used >= iterations:
                break
    weights = {name: value.clone() for name, value in _unflatten(flat, shapes).items()}
    fresh, wanted = task.sample(512, seed=seed + 1000)
    found = _outputs(weights, arch, _encoded(task, arch, torch.as_tensor(fresh))) * scale
    error = (found - torch.as_tensor(wanted)).abs().max()
    return Network(task, arch, weights, float(error) if bool(error.isfinite()) else float("inf"), used)


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    if len(shape) == 3:
        return np.linalg.qr(rng.normal(0, 1, shape))[0]  # rotations: products of many of them neither die nor grow
    return rng.normal(0, 1, shape) / np.sqrt(shape[-1] if len(shape) > 1 and name != "U" else 1)


def _fit(
    flat: torch.Tensor,
    shapes: dict[str, tuple[int, ...]],
    arch: Architecture,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    budget: int,
) -> tuple[torch.Tensor, int]:
    """Levenberg-Marquardt on one batch, until the error is nil, nothing improves, or the budget is spent."""

    def residual(theta: torch.Tensor) -> torch.Tensor:
        return (_outputs(_unflatten(theta, shapes), arch, inputs) - targets).ravel()

    r, damping = residual(flat), 1.0
    loss, slow = float(r @ r), 0
    for done in range(budget):
        if loss / len(r) < 1e-24 or slow >= 12:
            return flat, done
        if arch.update == "bilinear":
            jacobian = bilinear_jacobian(_unflatten(flat, shapes), arch, inputs)
        else:
            jacobian = _jacobian(residual, flat)
        gram, gradient = jacobian.T @ jacobian, jacobian.T @ r
        before = loss
        for _ in range(6):
            lifted = gram + damping * (torch.diag(gram.diagonal()) + 1e-9 * torch.eye(len(flat), dtype=gram.dtype))
            lifted = lifted + 1e-14 * torch.eye(len(flat), dtype=gram.dtype)
            step, info = torch.linalg.solve_ex(lifted, gradient)
            trial = flat - step
            new = residual(trial) if int(info) == 0 else torch.full_like(r, torch.inf)
            new_loss = float(new @ new)
            if np.isfinite(new_loss) and new_loss < loss:
                flat, r, loss, damping = trial, new, new_loss, max(damping / 5, 1e-15)
                break
            damping = min(damping * 4, 1e12)
        # A plateau is left at once, unless the loss is so low that only the last digits are still to come.
        slow = slow + 1 if loss > before * (1 - 1e-3) else 0
    return flat, budget


def _jacobian(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Forward mode: there are fewer weights than outputs."""
    with warnings.catch_warnings():
        # torch's own forward-mode rules are compiled, on first use, by a function that torch has deprecated
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
        return torch.func.jacfwd(function)(at)


def bilinear_jacobian(w: dict[str, torch.Tensor], arch: Architecture, inputs: torch.Tensor) -> torch.Tensor:
    """d outputs / d weights of a bilinear network, [B * T * outputs, weights]: what autograd gives, far sooner.

    The output at t moves with the matrix of the letter at s by (C W[x_t] ... W[x_s+1]) outer h_{s-1}.
    """
    B, T, A = inputs.shape
    letters, h, rows = inputs.argmax(-1), arch.hidden, torch.arange(B)
    outputs = len(w["C"])
    states = [arch.start(B)]
    steps = [w["W"][letters[:, t]] for t in range(T)]
    for step in steps:
        states.append(torch.einsum("bij,bj->bi", step, states[-1]))
    of_w = torch.zeros(B, T, A, outputs, h, h, dtype=torch.float64)
    of_c = torch.zeros(B, T, outputs, outputs, h, dtype=torch.float64)
    of_d = torch.eye(outputs, dtype=torch.float64).expand(B, T, outputs, outputs)
    for t in range(T):
        onward = w["C"].expand(B, outputs, h)
        for s in range(t, -1, -1):
            of_w[rows, t, letters[:, s]] += torch.einsum("boi,bj->boij", onward, states[s])
            onward = onward @ steps[s]
        for o in range(outputs):
            of_c[:, t, o, o] = states[t + 1]
    parts = {"W": of_w.movedim(3, 2).reshape(B * T * outputs, -1), "C": of_c.reshape(B * T * outputs, -1)}
    parts["d"] = of_d.reshape(B * T * outputs, -1)
    return torch.cat([parts[name] for name in w], dim=1)


def linear_enough(task: Task) -> bool:
    """Whether each output is an affine function of the inputs so far: only then can a linear network do the task."""
    xs, ys = task.sample(64 + 8 * task.length * task.width, seed=11)
    for t in range(task.length):
        seen = np.concatenate([xs[:, : t + 1].reshape(len(xs), -1), np.ones((len(xs), 1))], axis=1).astype(float)
        coefficients, *_ = np.linalg.lstsq(seen, ys[:, t].astype(float), rcond=None)
        if np.abs(seen @ coefficients - ys[:, t]).max() > 1e-6:
            return False
    return True
