"""Text that a model gives back word for word, by how often it was seen."""

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from headwater.behavior import metrics
from headwater.core.errors import MethodError
from headwater.core.methods import configured
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.data.corpus import Corpus, TokenCorpus

if TYPE_CHECKING:
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class MemorizedConfig:
    """What counts as given back.

    prompt, continuation: the first so many tokens of a sequence are given, and the next so many must come by greedy
    decoding. sequences: so many distinct ones are tried, drawn by the seed (None: all); of `held` as many.
    """

    prompt: int = 32
    continuation: int = 32
    sequences: int | None = 2000
    batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.prompt, self.continuation, self.batch, self.sequences or 1) < 1:
            raise MethodError("the settings of memorized do not fit", got=self, wanted="numbers above 0")


@register_result
class Memorized(Result):
    """What is extractable.

    `tables["repeats"]`: seen_from, seen_to (how often such a sequence stands in the corpus; 0: held out), n, share
    (extractable), lo, hi (Wilson), matched (mean tokens given back before the first wrong one). `tables["sequences"]`:
    sequence (the first place where it stands; of held ones its number there), held, seen, matched, extractable. Facts:
    prompt, continuation, distinct, share, held_share.
    """

    kind: ClassVar[str] = "memorized"
    main: ClassVar[str | None] = "repeats"


def memorized(
    model: "Model", corpus: Any, held: Any, *, config: MemorizedConfig | None = None, **options: Any
) -> Memorized:
    """Which sequences of the training data the model continues word for word (extractable, by Carlini et
    al., 2023), by how often they were seen, beside sequences that it never saw.

    corpus: what was trained on, as token ids (of a run its order, so that what came again counts). held: sequences of
    the same kind that were not (the null: what looks memorized may be easy). Options are those of `MemorizedConfig`.

    Greedy decoding gives the text back exactly where at every place, after the true text so far, the likeliest token is
    the true one; so one pass tells it, without decoding. Known failure: by the wrong prompt nothing comes, though it is
    memorized; sequences that differ in one token count as seen once.
    """
    started = time.monotonic()
    config = configured(MemorizedConfig, config, options)
    length = config.prompt + config.continuation
    trained, others = _tokens(corpus, length), _tokens(held, length)
    first, seen = _distinct(trained, length)
    draw = np.random.default_rng(config.seed)
    size = min(len(first), config.sequences or len(first))
    chosen = np.sort(draw.choice(len(first), size=size, replace=False))
    numbers = draw.permutation(others.n_sequences)[: min(others.n_sequences, size)]
    rows: list[dict[str, Any]] = []
    known = {row.tobytes() for row in _starts(trained, first, length)}
    for kind, source, places in (("trained", trained, first[chosen]), ("held", others, numbers)):
        counts = seen[chosen] if kind == "trained" else np.zeros(len(places), dtype=np.int64)
        for start in track(range(0, len(places), config.batch), f"memorized: {kind}"):
            part = places[start : start + config.batch]
            ids = _starts(source, part, length)
            for at, (number, n, row) in enumerate(zip(part, matched(model, ids, config.prompt), ids, strict=True)):
                if kind == "held" and row.tobytes() in known:
                    continue  # it stands in the training data after all
                rows.append({
                    "sequence": int(number), "held": kind == "held", "seen": int(counts[start + at]), "matched": int(n),
                    "extractable": bool(n == config.continuation),
                })  # fmt: skip
    table = pl.DataFrame(
        rows,
        schema={
            "sequence": pl.Int64,
            "held": pl.Boolean,
            "seen": pl.Int64,
            "matched": pl.Int64,
            "extractable": pl.Boolean,
        },
    )
    grouped = _by_repeats(table)
    null = grouped.filter(pl.col("seen_to") == 0)
    if null.is_empty():
        raise MethodError(
            "none of the held sequences is left", got="all stand in the training data", wanted="unseen ones"
        )
    return Memorized(
        tables={"repeats": grouped, "sequences": table},
        facts={
            "prompt": config.prompt, "continuation": config.continuation, "distinct": len(first),
            "share": float(table.filter(~pl.col("held"))["extractable"].cast(pl.Float64).to_numpy().mean()),
            "held_share": float(null["share"][0]), "corpus": trained.name,
        },
        config=asdict(config),
        provenance=Provenance.collect(model, seed=config.seed, seconds=time.monotonic() - started),
    )  # fmt: skip


def matched(model: "Model", ids: NDArray[np.int64], prompt: int) -> NDArray[np.int64]:
    """[n] how many tokens after the first `prompt` greedy decoding gives back before the first wrong one."""
    rows = torch.from_numpy(np.ascontiguousarray(ids))
    logits: torch.Tensor = model.run(rows[:, :-1], logits="all").logits
    right = logits[:, prompt - 1 :].argmax(dim=-1).cpu() == rows[:, prompt:]
    return right.long().cumprod(dim=1).sum(dim=1).numpy()


def _tokens(corpus: Any, length: int) -> TokenCorpus:
    found = Corpus.open(corpus)
    if not isinstance(found, TokenCorpus):
        raise MethodError(f"{found.name} holds texts", wanted="sequences of token ids")
    if found.sequence_length < length:
        wanted = f"{length} (prompt and continuation)"
        raise MethodError("the sequences are too short", got=found.sequence_length, wanted=wanted, fix="Ask for fewer")
    if not found.n_sequences:
        raise MethodError(f"{found.name} holds no sequences", wanted="one or more")
    return found


def _starts(corpus: TokenCorpus, numbers: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    return np.ascontiguousarray(np.asarray(corpus.rows(numbers), dtype=np.int64)[:, :length])


def _distinct(corpus: TokenCorpus, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(first place, how often) of each distinct beginning of a sequence."""
    held: dict[bytes, list[int]] = {}
    for first, piece, _ in corpus.pieces():
        for at, row in enumerate(np.ascontiguousarray(np.asarray(piece, dtype=np.int64)[:, :length])):
            held.setdefault(row.tobytes(), [first + at, 0])[1] += 1
    both = np.array(list(held.values()), dtype=np.int64)
    return both[:, 0], both[:, 1]


def _by_repeats(table: pl.DataFrame) -> pl.DataFrame:
    """Held out; seen once; then by powers of two."""
    rows: list[dict[str, Any]] = []
    seen = table["seen"].to_numpy()
    bins = np.where(seen == 0, -1, np.floor(np.log2(np.maximum(seen, 1)))).astype(int)
    for one in np.unique(bins).tolist():
        mine = table.filter(pl.Series(bins == one))
        values = mine["extractable"].cast(pl.Float64).to_numpy()
        share, lo, hi = metrics.interval(values, share=True)
        first, last = (0, 0) if one < 0 else (2**one, 2 ** (one + 1) - 1)
        matched = float(mine["matched"].cast(pl.Float64).to_numpy().mean())
        sides = {"share": share, "lo": lo, "hi": hi, "matched": matched}
        rows.append({"seen_from": first, "seen_to": last, "n": mine.height, **sides})
    return pl.DataFrame(rows)
