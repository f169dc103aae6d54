"""`attribute`: which training sequences a behavior is put down to."""

import importlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from headwater.core.errors import MethodError
from headwater.core.methods import configured
from headwater.core.model import Model
from headwater.core.progress import track
from headwater.core.results import Provenance
from headwater.data.attribution.gradients import SequenceGradients
from headwater.data.attribution.queries import Query, mentioned_together, read_queries, retrieval
from headwater.data.attribution.result import QUERIES, RETRIEVAL, TOP, AttributionToData, first_k, summary
from headwater.data.attribution.scoring import Setting, scorers, several
from headwater.data.corpus import Corpus, TokenCorpus


@dataclass(frozen=True, kw_only=True)
class AttributionConfig:
    """How to attribute.

    method: "cosine", "tracin", "trak", "ekfac", or one that was registered. k: how many of the first are told.
    checkpoints: how many of a series, evenly over its steps (where `steps` does not name them); cosine and ekfac take
    the last. weights: patterns of parameter names; empty means all. projection: gradients are projected to so many
    numbers (trak: 1024 where it is not said). damping, normalize: see the methods. sequences: score only the first so
    many of the corpus. batch: sequences at a time: each holds a gradient of all the weights that are asked for, so of a
    model of more than some million weights name a few, or set batch to 1. vectorized: False for models that
    torch.func.vmap cannot run.
    """

    method: str = "tracin"
    k: int = 10
    checkpoints: int = 3
    steps: tuple[int, ...] = ()
    weights: str | tuple[str, ...] = ()
    projection: int | None = None
    damping: float = 0.1
    normalize: bool = False
    sequences: int | None = None
    batch: int = 32
    vectorized: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = [self.k, self.checkpoints, self.batch, self.projection, self.sequences]
        if any(number is not None and number < 1 for number in numbers) or self.damping < 0:
            raise MethodError("the settings of attribution to data do not fit", got=self, wanted="numbers above 0")
        object.__setattr__(self, "steps", tuple(self.steps))
        if self.method == "trak" and self.projection is None:
            object.__setattr__(self, "projection", 1024)


def attribute(
    model: Any,
    behavior: Any,
    corpus: Any = None,
    *,
    pairs: Sequence[Sequence[str]] | None = None,
    truth: Any = None,
    config: AttributionConfig | None = None,
    **options: Any,
) -> AttributionToData:
    """Score the sequences of a corpus by how much training on each would help a behavior. Options are those of
    `AttributionConfig`.

    model: a Model (one checkpoint); a run of the lab, a CheckpointSeries, or what it is made of; {step: Model}.
    behavior: a Behavior, (prompt, answer) texts, or token ids [n, T] whose last is the answer. corpus: a `Corpus` of
    token ids, or what `Corpus.open` takes; of a run its own data if not said. pairs: (subject, object) of each query.
    truth: bool [queries, sequences], which sequences truly made it, where that is known (planted facts).

    The result holds the base rate and a co-occurrence retrieval beside the method: without them no score says anything,
    as a plain search for the words often finds more. And a score is no cause: `headwater.data.remove_and_retrain` is
    the test. Raises MethodError for options and shapes that do not fit.

    Known failure: see each method; all of them are a linear guess at what a nonlinear training would have done.

    >>> found = attribute("runs/world", behavior, pairs=pairs)                               # doctest: +SKIP
    >>> found.text                                                                           # doctest: +SKIP
    """
    started = time.monotonic()
    config = configured(AttributionConfig, config, options)
    scorer = scorers.get(config.method)
    source = _Source(model, config)
    data = _tokens(corpus if corpus is not None else source.order)
    numbers = np.arange(min(data.n_sequences, config.sequences or data.n_sequences), dtype=np.int64)
    if config.k > len(numbers):
        raise MethodError("fewer sequences than are asked for", got=len(numbers), wanted=f"k = {config.k} or more")
    last = source.last()
    queries = read_queries(last, behavior, pairs)
    device = last.hf.device

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        starts = range(0, len(numbers), config.batch)
        for start in track(starts, f"{config.method}: sequences"):
            rows, at = _rows(data, numbers[start : start + config.batch])
            yield torch.from_numpy(rows).to(device), torch.from_numpy(at).to(device)

    asked = [(one.ids.to(device), one.at.to(device)) for one in queries]
    chosen = source.steps if config.method in several else source.steps[-1:]
    rates = [source.rate(step) for step in chosen]
    weights = (config.weights,) if isinstance(config.weights, str) else config.weights
    setting = Setting(
        rates=rates, weights=weights, projection=config.projection, damping=config.damping,
        normalize=config.normalize, vectorized=config.vectorized, seed=config.seed,
    )  # fmt: skip
    scores = scorer(source.models(chosen), asked, batches, setting).double().numpy()
    tokenizer = data.tokenizer if data.tokenizer is not None else last.tokenizer
    together = mentioned_together(queries, data, numbers, tokenizer, 4096)
    size = 4096
    plain = retrieval(queries, (data.rows(numbers[i : i + size]) for i in range(0, len(numbers), size)), together)
    relevant = _truth(truth, len(queries), len(numbers))
    known = together if pairs is not None else None
    losses = SequenceGradients(last.hf, weights, vectorized=config.vectorized)
    loss = [float(losses.losses(ids[None], at[None])) for ids, at in asked]
    rankings = {config.method: scores, RETRIEVAL: plain}
    tables = {
        "summary": summary(rankings, config.k, known, relevant),
        "top": _top(rankings, config.k, numbers, known, relevant, data, tokenizer),
        "queries": _queries(queries, loss, known, relevant),
    }
    tensors = {
        "scores": torch.from_numpy(scores),
        "retrieval": torch.from_numpy(plain),
        "sequences": torch.from_numpy(numbers),
    }
    return AttributionToData(
        tables=tables,
        tensors=tensors,
        facts={
            "method": config.method,
            "steps": chosen,
            "rates": rates,
            "sequences": len(numbers),
            "corpus": data.name,
        },
        config=asdict(config),
        provenance=Provenance.collect(last, behavior, seed=config.seed, seconds=time.monotonic() - started),
    )


class _Source:
    """The checkpoints that are looked at, and at what learning rate each was made."""

    def __init__(self, model: Any, config: AttributionConfig) -> None:
        self.order: Any = None
        self._rates: dict[int, float] = {}
        self._models: dict[int, Model] = {}
        self._series: Any = None
        if isinstance(model, Model):
            self._models, self.steps = {0: model}, [0]
            return
        if isinstance(model, dict) and all(isinstance(one, Model) for one in model.values()):
            self._models, known = dict(model), sorted(model)
        else:
            # By name: rooms of stages do not import each other.
            runs = importlib.import_module("headwater.dynamics.lab.run").TrainingRun
            run: Any = model if isinstance(model, runs) else None
            if isinstance(model, str | Path) and (Path(model) / "train.json").exists():
                run = runs.open(model)
            if run is not None:
                self.order = run.order
                self._rates = {int(step): float(lr) for step, lr in run.curve.select("step", "lr").iter_rows()}
            self._series = importlib.import_module("headwater.dynamics.series").CheckpointSeries.of(model)
            known = self._series.steps
        self.steps = _steps(known, config)

    def last(self) -> Model:
        """The model of the last step."""
        if self.steps[-1] not in self._models:
            self._models[self.steps[-1]] = next(iter(self._series.select(steps=self.steps[-1:]).load()))[1]
        return self._models[self.steps[-1]]

    def models(self, steps: Sequence[int]) -> Iterator[Any]:
        """Each step's transformers model, the earlier ones not kept."""
        for step in steps:
            if step in self._models:
                yield self._models[step].hf
            else:
                yield next(iter(self._series.select(steps=[step]).load()))[1].hf

    def rate(self, step: int) -> float:
        """The learning rate of the update that made this checkpoint; 1 where it is not known."""
        return self._rates.get(step, 1.0)


def _steps(known: Sequence[int], config: AttributionConfig) -> list[int]:
    if config.steps:
        if missing := [step for step in config.steps if step not in known]:
            raise MethodError("no checkpoint of these steps", got=missing, wanted=f"of {list(known)}")
        return sorted(set(config.steps))
    trained = [step for step in known if step > 0] or list(known)
    wanted = np.linspace(0, trained[-1], config.checkpoints + 1)[1:]
    return sorted({min(trained, key=lambda step: abs(step - one)) for one in wanted.tolist()})


def _tokens(corpus: Any) -> TokenCorpus:
    if corpus is None:
        raise MethodError(
            "whose sequences are to be scored?", fix="Give a corpus, or a run of the lab, which has its own"
        )
    found = Corpus.open(corpus)
    if not isinstance(found, TokenCorpus):
        raise MethodError(
            f"{found.name} holds texts", wanted="sequences of token ids, as the model was trained on",
            fix="Give the run, or its token ids",
        )  # fmt: skip
    return found


def _rows(data: TokenCorpus, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(ids, which are predicted): a run knows which of its tokens it predicts; else all but the first."""
    own = getattr(getattr(data, "source", None), "data", None)
    if own is not None and hasattr(own, "at"):
        rows, at = own.at(numbers)
        return np.asarray(rows, dtype=np.int64), np.asarray(at, dtype=np.float32)
    rows = np.asarray(data.rows(numbers), dtype=np.int64)
    at = np.ones(rows.shape, dtype=np.float32)
    at[:, 0] = 0
    return rows, at


def _truth(truth: Any, queries: int, sequences: int) -> NDArray[np.bool_] | None:
    if truth is None:
        return None
    found = np.asarray(truth)
    if found.dtype != bool or found.shape != (queries, sequences):
        got = f"{found.dtype} {list(found.shape)}"
        raise MethodError("the truth does not fit", got=got, wanted=f"bool [{queries} queries, {sequences} sequences]")
    return found


def _top(
    rankings: dict[str, NDArray[Any]],
    k: int,
    numbers: NDArray[np.int64],
    together: NDArray[np.bool_] | None,
    relevant: NDArray[np.bool_] | None,
    data: TokenCorpus,
    tokenizer: Any,
) -> pl.DataFrame:
    rows: list[list[Any]] = []
    texts: dict[int, str] = {}
    for name, scores in rankings.items():
        for query, places in enumerate(first_k(scores, k)):
            for rank, at in enumerate(places.tolist()):
                number = int(numbers[at])
                if number not in texts:
                    ids = data.tokens(number).tolist()
                    texts[number] = tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids))
                rows.append([
                    query, name, rank, number, float(scores[query, at]),
                    None if together is None else bool(together[query, at]),
                    None if relevant is None else bool(relevant[query, at]), texts[number][:400],
                ])  # fmt: skip
    return pl.DataFrame(rows, schema=TOP, orient="row")


def _queries(
    queries: list[Query], loss: list[float], together: NDArray[np.bool_] | None, relevant: NDArray[np.bool_] | None
) -> pl.DataFrame:
    rows: list[list[Any]] = []
    for number, one in enumerate(queries):
        subject, obj = one.pair or (None, None)
        rows.append([
            number, one.name, subject, obj, loss[number],
            None if together is None else int(together[number].sum()),
            None if relevant is None else int(relevant[number].sum()),
        ])  # fmt: skip
    return pl.DataFrame(rows, schema=QUERIES, orient="row")
