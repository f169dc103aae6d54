"""How often headwater says `supported` where nothing is to be found, and how often where something is.

A null investigation is a whole one (behavior, attribution, circuit, heads, claims) of a model and pairs between which
chance alone decides, so that every claim of it is false:

- `random weights`: a fresh random model; answer and foil of each pair are drawn at random;
- `shuffled counterfactuals`: a model that does a task; a coin says, pair by pair, which prompt is the counterfactual;
- `absent behavior`: a model that does a task; answer and foil are drawn at random among the words it knows.

A true investigation is one of a compiled program on its own pairs.
"""

import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch

from headwater.behavior.table import Behavior
from headwater.bench import truth
from headwater.bench.rasp.words import BOS, NONE, UNKNOWN, make_tokenizer
from headwater.core.errors import HeadwaterError, MethodError, did_you_mean
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.catalog import fitted

if TYPE_CHECKING:
    from headwater.core.model import Model

NULLS = ("random weights", "shuffled counterfactuals", "absent behavior")
TRUE = "true mechanism"
DEPENDS_ON_GRAPH = ("circuit-necessary", "circuit-beats-edges", "circuit-beats-heads", "circuit-beats-random-weights")
"""Claims that compare with random circuits of the same size and layers. A true mechanism need not pass them: where a
program fills its small model, as many random edges are mostly the same edges, and lose or keep as much.
"""
_TRIES = 8
"""Draws for one null at most: some programs hardly ever give pairs that tell anything."""


@dataclass(frozen=True, kw_only=True)
class RatesConfig:
    """nulls: how many null investigations, of each kind in turn (see `kinds`); one that is refused before it files a
    claim, as nothing differs between its prompts and counterfactuals, is replaced by the next draw.
    programs: the compiled programs of the true ones (None: all that have pairs; (): none). repeats: true investigations
    a program, each of its own pairs. pairs: of each investigation, half of them to find on. q: the false-discovery rate
    of every ledger.
    """

    nulls: int = 210
    kinds: tuple[str, ...] = NULLS
    programs: tuple[str, ...] | None = None
    repeats: int = 1
    pairs: int = 64
    q: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in NULLS:
                raise MethodError("unknown kind of null", got=repr(kind), wanted=did_you_mean(kind, NULLS))
        if self.nulls < 0 or self.repeats < 0 or self.pairs < 16 or not self.kinds:
            raise MethodError("rates need pairs to find on and to judge", got=asdict(self), wanted="16 pairs or more")


@register_result
class ClaimRates(Result):
    """`tables["claims"]`: investigation, kind, subject, claim, stage, status, effect, lo, hi, p, p_adj, n, why_not.

    `tables["rates"]`: kind, of ("claims": all that were filed; "investigations": those with any claim supported; or a
    claim's id), supported, n, rate, lo, hi (Clopper-Pearson, 95%), bound (what it may be at most; None for power).
    `tables["failed"]`: draws that were refused before any claim was filed, with the reason; they are in no count.
    """

    kind: ClassVar[str] = "claim_rates"
    main: ClassVar[str] = "rates"

    def rate(self, kind: str, of: str = "investigations") -> tuple[float, float, float]:
        """(rate, low, high) of one row. Raises MethodError for a row that there is not."""
        rows = self.tables["rates"].filter(kind=kind, of=of)
        if rows.height != 1:
            known = sorted(set(self.tables["rates"]["kind"].to_list()))
            raise MethodError("no such rate", got=f"{kind}, {of}", wanted=f"kinds: {', '.join(known)}")
        row = rows.row(0, named=True)
        return row["rate"], row["lo"], row["hi"]


def claim_rates(config: RatesConfig | None = None, *, out: str | Path | None = None, **options: Any) -> ClaimRates:
    """Run the investigations and count. Options are those of `RatesConfig`.

    `out`: a folder that keeps each investigation's claims as it ends; given again, those are not run again.
    """
    used = config if config is not None else fitted(RatesConfig, options)
    started = time.monotonic()
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    draws = {kind: _null_draws(kind, used) for kind in used.kinds}
    jobs = [used.kinds[number % len(used.kinds)] for number in range(used.nulls)] + [TRUE] * len(_true_draws(used))
    draws[TRUE] = iter(_true_draws(used))
    for kind in track(jobs, "investigations"):
        for name, subject, seed in islice(draws[kind], 1 if kind == TRUE else _TRIES):
            stored = None if folder is None else folder / f"{name}-{seed}-{used.pairs}"
            found, why = _read(stored) if stored is not None else (None, "")
            if found is None and not why:
                try:
                    model, behavior = _material(kind, subject, seed, used.pairs)
                    found = _investigated(model, behavior, seed, used.q)
                except HeadwaterError as error:
                    why = str(error)
                if stored is not None:
                    _write(stored, found, why)
            if found is not None:
                rows += [{"investigation": name, "kind": kind, "subject": subject, **claim} for claim in found]
                break
            failed.append({"investigation": name, "kind": kind, "subject": subject, "why": why})
    claims = pl.DataFrame(rows, schema=_SCHEMA)
    tables = {
        "rates": _rates(claims, used.q),
        "claims": claims,
        "failed": pl.DataFrame(failed, schema=dict.fromkeys(("investigation", "kind", "subject", "why"), pl.String)),
    }
    return ClaimRates(
        tables=tables,
        facts={"q": used.q, "investigations": claims["investigation"].n_unique(), "failed": len(failed)},
        config=asdict(used),
        provenance=Provenance.collect(seed=used.seed, seconds=time.monotonic() - started),
    )


def _read(stored: Path) -> tuple[list[dict[str, Any]] | None, str]:
    """(claims, "") or (None, why it was refused) of an investigation that was run before; (None, "") of another."""
    if stored.with_suffix(".json").exists():
        return None, str(json.loads(stored.with_suffix(".json").read_text())["why"])
    table = stored.with_suffix(".parquet")
    return (pl.read_parquet(table).to_dicts(), "") if table.exists() else (None, "")


def _write(stored: Path, found: list[dict[str, Any]] | None, why: str) -> None:
    temporary = stored.with_suffix(".part")
    if found is None:
        temporary.write_text(json.dumps({"why": why}))
    else:
        kept = {name: kind for name, kind in _SCHEMA.items() if name not in ("investigation", "kind", "subject")}
        pl.DataFrame(found, schema=kept).write_parquet(temporary)
    temporary.replace(stored.with_suffix(".json" if found is None else ".parquet"))


_SCHEMA: dict[str, Any] = {
    **dict.fromkeys(("investigation", "kind", "subject", "claim", "stage", "status"), pl.String),
    **dict.fromkeys(("effect", "lo", "hi", "p", "p_adj"), pl.Float64),
    "n": pl.Int64,
    "why_not": pl.String,
}


# --- what is investigated


def _null_draws(kind: str, config: RatesConfig) -> Iterator[tuple[str, str, int]]:
    """(name, program or "", seed) of draw after draw of one kind; they do not depend on the other kinds."""
    own = NULLS.index(kind)
    hosts = [""] if kind == NULLS[0] else _with_pairs()
    for number in count():
        yield f"null-{own}-{number:04d}", hosts[number % len(hosts)], 1_000_003 * config.seed + 100_000 * own + number


def _true_draws(config: RatesConfig) -> list[tuple[str, str, int]]:
    programs = _with_pairs() if config.programs is None else config.programs
    return [
        (f"true-{repeat}-{name}", name, 1_000_003 * config.seed + 500_000 + repeat)
        for repeat in range(config.repeats)
        for name in programs
    ]


def _with_pairs() -> list[str]:
    return [name for name in truth.names() if _has_pairs(name)]


@lru_cache(maxsize=256)
def _has_pairs(name: str) -> bool:
    try:
        return len(truth.behavior(name, 16)) >= 16
    except HeadwaterError:
        return False  # its answer at the last position never differs: there is nothing to explain


def _material(kind: str, subject: str, seed: int, pairs: int) -> "tuple[Model, Behavior]":
    if kind == "random weights":
        return _random_model(seed), _random_pairs([f"w{i}" for i in range(_WORDS)], pairs, seed, length=8)
    compiled = truth.compile(subject)
    behavior = truth.behavior(compiled, pairs, seed=seed)
    draw = random.Random(f"headwater-rates:{seed}")
    rows = behavior.frame.to_dicts()
    if kind == "shuffled counterfactuals":
        for row in rows:
            if draw.random() < 0.5:
                row["prompt"], row["counterfactual"] = row["counterfactual"], row["prompt"]
    elif kind == "absent behavior":
        special = {UNKNOWN, BOS, NONE}
        words = [word for word in compiled.model.tokenizer.get_vocab() if word not in special]
        for row in rows:
            answer, foil = draw.sample(sorted(words), 2)
            row["answers"], row["foils"] = [f" {answer}"], [f" {foil}"]
    keys = ("id", "prompt", "counterfactual", "answers", "foils")
    return compiled.model, Behavior.from_rows([{key: row[key] for key in keys} for row in rows], name=behavior.name)


_WORDS = 40


def _random_model(seed: int) -> "Model":
    """A fresh random model: Llama, GPT-2 and NeoX in turn, two or three layers."""
    import transformers

    from headwater.core.model import Model

    tokenizer = make_tokenizer(f"w{i}" for i in range(_WORDS))
    size: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2 + seed % 2, "num_attention_heads": 4,
        "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    wide: dict[str, Any] = {"intermediate_size": 64, "max_position_embeddings": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if seed % 3 == 0:
            config = transformers.LlamaConfig(**size, **wide, num_key_value_heads=2, tie_word_embeddings=bool(seed % 2))
            hf: Any = transformers.LlamaForCausalLM(config)
        elif seed % 3 == 1:
            hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, n_positions=64))
        else:
            hf = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**size, **wide))
    return Model(hf.eval(), tokenizer, name=f"random-{type(hf).__name__}-{seed}")


def _random_pairs(words: Sequence[str], n: int, seed: int, *, length: int) -> Behavior:
    """Prompts of random words, counterfactuals that differ in one of them, answers and foils at random."""
    draw = random.Random(f"headwater-rates-pairs:{seed}")
    rows = []
    for number in range(n):
        prompt = [draw.choice(words) for _ in range(length)]
        other = list(prompt)
        at = draw.randrange(length)
        other[at] = draw.choice([word for word in words if word != prompt[at]])
        answer, foil = draw.sample(words, 2)
        rows.append({
            "id": f"{number:05d}", "prompt": " ".join(prompt), "counterfactual": " ".join(other),
            "answers": [f" {answer}"], "foils": [f" {foil}"],
        })  # fmt: skip
    return Behavior.from_rows(rows, name="random-pairs")


# --- an investigation, and the counting


def _investigated(model: "Model", behavior: Behavior, seed: int, q: float) -> list[dict[str, Any]]:
    """The claims of a whole investigation, as headwater files them."""
    from headwater.trace.investigation import Investigation

    folder = Path(tempfile.mkdtemp(prefix="headwater-rates-"))
    try:
        table = folder / "pairs.parquet"
        behavior.save(table)
        half = len(behavior) // 2
        investigation = Investigation(
            behavior=str(table), model=model.name, out=folder / "run", seed=seed,
            stages=("behavior", "localize", "circuit", "heads", "claims"),
            localize={"n_patch": 3, "patch_sites": ("resid_post.*",), "n_attribution": half},
            circuit={"n_choose": half, "n_test": 8, "fractions": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)},
            heads={"sequences": 4, "length": 6, "n_train": half, "n_test": 8},
            claims={"q": q, "n_test": half, "n_null": half, "n_heads_test": half, "n_random_models": half},
        )  # fmt: skip
        run = investigation.run(model=model)
        table = run.load("claims", "ledger").tables["claims"].rename({"id": "claim"})
        return table.select([name for name in _SCHEMA if name in table.columns]).to_dicts()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rates(claims: pl.DataFrame, q: float) -> pl.DataFrame:
    from scipy.stats import binomtest

    rows: list[dict[str, Any]] = []

    def add(kind: str, of: str, supported: int, n: int, bound: float | None) -> None:
        if n:
            exact = binomtest(supported, n).proportion_ci(method="exact")
            rows.append({
                "kind": kind, "of": of, "supported": supported, "n": n, "rate": supported / n,
                "lo": float(exact.low), "hi": float(exact.high), "bound": bound,
            })  # fmt: skip

    said = claims.with_columns(supported=pl.col("status") == "supported")
    nulls = said.filter(pl.col("kind") != TRUE)
    for kind, part in (*((one, nulls.filter(kind=one)) for one in NULLS), ("all nulls", nulls)):
        by_run = part.group_by("investigation").agg(pl.col("supported").any())
        add(kind, "investigations", int(by_run["supported"].sum()), by_run.height, q)
        add(kind, "claims", int(part["supported"].sum()), part.height, q)
    true = said.filter(kind=TRUE)
    named = true.filter(~pl.col("stage").is_in(["heads"]))
    sure = named.filter(~pl.col("claim").is_in(list(DEPENDS_ON_GRAPH)))
    add(TRUE, "claims", int(sure["supported"].sum()), sure.height, None)
    for claim in named["claim"].unique(maintain_order=True).to_list():
        part = named.filter(claim=claim)
        add(TRUE, claim, int(part["supported"].sum()), part.height, None)
    schema = {
        "kind": pl.String, "of": pl.String, "supported": pl.Int64, "n": pl.Int64, "rate": pl.Float64, "lo": pl.Float64,
        "hi": pl.Float64, "bound": pl.Float64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema)
