"""Features in superposition (Elhage et al., 2022): the ReLU output model, many instances at once.

x' = ReLU(W'W x + b), trained to give back sparse features x of unequal importance through fewer dimensions than there
are features. Features are known (columns of W), so dictionaries trained on `hidden` can be scored against them.
"""

import time
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.catalog import fitted

FRACTIONS = tuple(Fraction(*pair) for pair in ((1, 1), (3, 4), (2, 3), (1, 2), (2, 5), (3, 8), (0, 1)))
"""Dimensions a feature: alone, tetrahedron, triangle, antipodal pair, pentagon, square antiprism, none."""
REPRESENTED = 0.5  # norm of a feature's direction; trained ones are near 0 or 1
SHARED = 0.2  # interference at which a direction counts as shared


@dataclass(frozen=True, kw_only=True)
class SuperpositionConfig:
    """features, hidden: n and m. densities: chances that a feature is not zero, importances: one instance for each pair
    of the two. weighting: "last" (the last feature's importance relative to the others': the phase diagram) or "decay"
    (feature i has importance**i). tries: trained side by side for each instance, the one of least loss is kept, as
    gradient descent stops in local minima. steps, batch, lr: Adam's, with a cosine to zero.
    """

    features: int = 2
    hidden: int = 1
    densities: tuple[float, ...] = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03)
    importances: tuple[float, ...] = (0.1, 0.17, 0.3, 0.5, 0.8, 1.25, 2.0, 3.3, 6.0, 10.0)
    weighting: Literal["last", "decay"] = "last"
    tries: int = 4
    steps: int = 2000
    batch: int = 512
    lr: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        good = (
            1 <= self.hidden <= self.features
            and min(self.tries, self.steps, self.batch) >= 1
            and self.lr > 0
            and bool(self.densities)
            and bool(self.importances)
            and all(0 < density <= 1 for density in self.densities)
            and all(importance > 0 for importance in self.importances)
        )
        if not good:
            raise MethodError(
                "a superposition config does not fit",
                got=f"{self}",
                wanted="hidden of 1 to features, densities above 0 and at most 1, positive importances, steps and lr",
            )


@register_result
class Superposition(Result):
    """`tables["instances"]`: instance, density, importance, loss (mean over samples of the weighted squared error),
    floor (that of the best solution that gives each of the m most important features a dimension and the others none,
    with the best bias), represented (features), dimensions_per_feature (m / ||W||^2), phase (of the last feature:
    "not represented", "superposition" or "dedicated"), predicted (the phase that `predicted_phase` gives: of two
    features in one dimension only).
    `tables["features"]`: instance, density, feature, importance, norm, dimensionality ||W_i||^2 / sum_j (Ŵ_i·W_j)^2,
    interference sum_{j != i} (Ŵ_i·W_j)^2, fraction (the nearest of `FRACTIONS`), away (from it).
    `tensors["W"]`: [instances, m, n], `tensors["b"]`: [instances, n]. facts: n_instances, phases (counts), agreement
    (share of instances in the predicted phase), sticky (share of represented features whose dimensionality is within
    .03 of a fraction).
    """

    kind: ClassVar[str] = "superposition"
    main: ClassVar[str] = "instances"

    def directions(self, instance: int) -> Tensor:
        """[n, m]: where each feature is in the hidden layer; rows of features that are not represented are near
        zero.
        """
        return self.tensors["W"][self._known(instance)].T

    def hidden(self, instance: int, n: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(features [N, n], hidden activations [N, m]) of fresh samples: what a dictionary learns from, and its key."""
        density = float(self.tables["instances"]["density"][self._known(instance)])
        generator = torch.Generator().manual_seed(seed + 32_452_843)
        weights = self.tensors["W"][instance]
        x = draw_features((n, weights.shape[1]), density, generator)
        return x, x @ weights.T

    def _known(self, instance: int) -> int:
        if not 0 <= instance < self.tables["instances"].height:
            raise MethodError("no such instance", got=instance, wanted=f"0 to {self.tables['instances'].height - 1}")
        return instance


def superposition(config: SuperpositionConfig | None = None, **options: Any) -> Superposition:
    """Train every instance of a grid of densities and importances, and measure the geometry of its features.

    Known failure: which of several polytopes a run ends in depends on its start, so near a border between phases one
    try's answer is not the best solution; `tries` helps, and nothing says that the best was found.
    """
    config = fitted(SuperpositionConfig, {**(asdict(config) if config else {}), **options})
    started = time.monotonic()
    cells = [(density, importance) for density in config.densities for importance in config.importances]
    densities = torch.tensor([density for density, _ in cells])
    importance = torch.stack([_weights(config, one) for _, one in cells])
    w, b, loss = _train(config, densities, importance)
    w, b, loss = _align_best(w, b, loss)
    features = _feature_rows(w, config, importance)
    instances = _instance_rows(config, cells, w, loss, importance, features)
    table = pl.DataFrame(features)
    there = table.filter(pl.col("norm") > REPRESENTED)
    phases = instances["phase"].value_counts().sort("phase")
    predicted = instances["predicted"].null_count() == 0
    facts = {
        "n_instances": len(cells),
        "phases": dict(zip(phases["phase"].to_list(), phases["count"].to_list(), strict=True)),
        "agreement": float((instances["phase"] == instances["predicted"]).mean()) if predicted else None,  # type: ignore[arg-type]
        "sticky": float((there["away"] < 0.03).mean()) if there.height else None,  # type: ignore[arg-type]
    }
    return Superposition(
        tables={"instances": instances, "features": table},
        tensors={"W": w, "b": b},
        facts=facts,
        config=asdict(config),
        provenance=Provenance.collect(seed=config.seed, seconds=time.monotonic() - started),
    )


def draw_features(shape: tuple[int, ...], density: Tensor | float, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1] with chance `density`, else 0."""
    values, there = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    return torch.where(there < density, values, 0.0)


def reconstruct(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """ReLU(W'W x + b): x [I, N, n], w [I, m, n], b [I, n]."""
    return torch.relu(x @ w.transpose(-1, -2) @ w + b[:, None])


def dimensionality(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """([..., n] norms, dimensionalities, interferences) of the columns of w [..., m, n]; no direction: 0, 0."""
    norm = w.norm(dim=-2)
    unit = w / norm.clamp(min=1e-12)[..., None, :]
    overlaps = (unit.transpose(-1, -2) @ w).square()
    total = overlaps.sum(dim=-1)
    own = norm.square()
    return norm, torch.where(total > 1e-12, own / total.clamp(min=1e-12), 0.0), (total - own).clamp(min=0)


def predicted_losses(density: float, importance: float) -> dict[str, float]:
    """The loss of each candidate of Elhage et al. (2022) for two features in one dimension, the first of importance 1.

    The last left out (W = (1, 0), its bias its mean), dedicated (W = (0, 1)), or antipodal to the first (W = (1, -1),
    no bias: wrong by the smaller of the two where both are there, whose mean square is 1/6).
    """
    variance = density / 3 - density**2 / 4
    return {
        "not represented": importance * variance,
        "superposition": (1 + importance) * density**2 / 6,
        "dedicated": variance,
    }


def predicted_phase(density: float, importance: float) -> str:
    """The candidate of least loss. Training may do better than any of them, as it also scales W and shifts biases."""
    losses = predicted_losses(density, importance)
    return min(losses, key=lambda phase: losses[phase])


def _weights(config: SuperpositionConfig, importance: float) -> Tensor:
    if config.weighting == "decay":
        return importance ** torch.arange(config.features, dtype=torch.float32)
    weights = torch.ones(config.features)
    weights[-1] = importance
    return weights


def _train(config: SuperpositionConfig, densities: Tensor, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """([tries, I, m, n], [tries, I, n], [tries, I] loss on fresh samples)."""
    generator = torch.Generator().manual_seed(config.seed)
    cells, n, m = len(densities), config.features, config.hidden
    many = config.tries * cells
    w = torch.randn(many, m, n, generator=generator) / m**0.5 * 0.7
    b = torch.zeros(many, n)
    w.requires_grad_(True)
    b.requires_grad_(True)
    density = densities.repeat(config.tries)[:, None, None]
    weight = importance.repeat(config.tries, 1)[:, None]
    adam = torch.optim.Adam([w, b], lr=config.lr, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, config.steps)
    for _ in track(range(config.steps), "superposition"):
        x = draw_features((many, config.batch, n), density, generator)
        # sparse instances have small losses: divided by their density, all learn at one rate
        error = (weight * (x - reconstruct(x, w, b)).square()).mean(dim=1).sum(dim=-1)
        (error / density[:, 0, 0]).sum().backward()
        adam.step()
        schedule.step()
        adam.zero_grad(set_to_none=True)
    with torch.no_grad():
        total = torch.zeros(many)
        for _ in range(8):
            x = draw_features((many, 2048, n), density, generator)
            total += (weight * (x - reconstruct(x, w, b)).square()).mean(dim=1).sum(dim=-1) / 8
    shape = (config.tries, cells)
    return w.detach().view(*shape, m, n), b.detach().view(*shape, n), total.view(shape)


def _align_best(w: Tensor, b: Tensor, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    best = loss.argmin(dim=0)
    cells = torch.arange(loss.shape[1])
    return w[best, cells], b[best, cells], loss[best, cells]


def _feature_rows(w: Tensor, config: SuperpositionConfig, importance: Tensor) -> list[dict[str, Any]]:
    norm, dims, interference = dimensionality(w)
    found: list[dict[str, Any]] = []
    for i in range(w.shape[0]):
        for j in range(w.shape[2]):
            value = float(dims[i, j]) if float(norm[i, j]) > 1e-3 else 0.0
            nearest = min(FRACTIONS, key=lambda fraction: abs(float(fraction) - value))
            found.append(
                {
                    "instance": i,
                    "density": config.densities[i // len(config.importances)],
                    "feature": j,
                    "importance": float(importance[i, j]),
                    "norm": float(norm[i, j]),
                    "dimensionality": value,
                    "interference": float(interference[i, j]),
                    "fraction": str(nearest),
                    "away": abs(float(nearest) - value),
                }
            )
    return found


def _instance_rows(
    config: SuperpositionConfig,
    cells: list[tuple[float, float]],
    w: Tensor,
    loss: Tensor,
    importance: Tensor,
    features: list[dict[str, Any]],
) -> pl.DataFrame:
    rows: list[dict[str, Any]] = []
    smallest = (config.features, config.hidden, config.weighting) == (2, 1, "last")
    for i, (density, relative) in enumerate(cells):
        own = [row for row in features if row["instance"] == i]
        last = own[-1]
        phase = "dedicated" if last["interference"] < SHARED else "superposition"
        # a feature left out costs its variance: its best constant guess is its mean, density / 2
        variance = density / 3 - density**2 / 4
        left = importance[i].sort(descending=True).values[config.hidden :]
        rows.append(
            {
                "instance": i,
                "density": density,
                "importance": relative,
                "loss": float(loss[i]),
                "floor": float(left.sum()) * variance,
                "represented": sum(row["norm"] > REPRESENTED for row in own),
                "dimensions_per_feature": config.hidden / max(float(w[i].square().sum()), 1e-12),
                "phase": phase if last["norm"] > REPRESENTED else "not represented",
                "predicted": predicted_phase(density, relative) if smallest else None,
            }
        )
    return pl.DataFrame(rows, schema_overrides={"predicted": pl.String})
