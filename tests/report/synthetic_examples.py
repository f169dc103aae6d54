"""Synthetic results of attribution to examples and of repeated data, shaped as their tables are documented."""

from collections.abc import Callable
from typing import Any

HOSTILE = "</script><script>alert(1)</script>"


def data_attribution() -> dict[str, Any]:
    summary = [
        {"ranking": ranking, "of": of, "k": 10, "precision": at / 10, "lo": at / 10 - 0.1, "hi": at / 10 + 0.1, "n": 24}
        for of in ("relevant", "together")
        for at, ranking in enumerate((f"tracin{HOSTILE}", "retrieval", "base rate"), 1)
    ]
    top = [
        {"query": query, "ranking": "tracin", "rank": rank, "sequence": 10 * rank, "score": 1.0 / (rank + 1),
         "together": True, "relevant": rank % 2 == 0, "text": HOSTILE}
        for query in range(2)
        for rank in range(4)
    ]  # fmt: skip
    queries = [
        {"query": query, "name": HOSTILE, "subject": "a", "object": "b", "loss": 0.5, "together": 4, "relevant": 3}
        for query in range(2)
    ]
    return {"summary": summary, "top": top, "queries": queries}


def data_removal() -> dict[str, Any]:
    effect = [
        {"removed": removed, "measure": measure, "change": at / 2, "lo": at / 3, "hi": at / 1.5, "more": at / 4,
         "more_lo": 0.0, "more_hi": 1.0, "p": 0.01, "sequences": 200, "n": 24, "seeds": 3}
        for measure in ("loss", "accuracy")
        for at, removed in enumerate((f"tracin{HOSTILE}", "retrieval", "random"), 1)
    ]  # fmt: skip
    runs = [
        {"removed": "tracin", "seed": 0, "query": query, "loss": 2.0, "right": False, "before": 0.5,
         "before_right": True, "sequences": 200}
        for query in range(4)
    ]  # fmt: skip
    return {"effect": effect, "runs": runs}


def nearest_sequences() -> dict[str, Any]:
    nearest = [
        {"query": query, "rank": rank, "sequence": 10 * rank, "cosine": 1.0 / (rank + 1), "text": f"{rank}{HOSTILE}"}
        for query in range(2)
        for rank in range(5)
    ]
    queries = [{"query": query, "name": HOSTILE, "mean": 0.01, "sd": 0.2, "n": 900} for query in range(2)]
    return {"nearest": nearest, "queries": queries}


def memorized() -> dict[str, Any]:
    repeats = [
        {"seen_from": first, "seen_to": last, "n": 40, "share": last / 16, "lo": 0.0, "hi": 1.0, "matched": 3.5}
        for first, last in ((0, 0), (1, 1), (2, 3), (4, 7), (8, 15))
    ]
    sequences = [{"sequence": i, "held": i % 2 == 0, "seen": i, "matched": i, "extractable": i > 2} for i in range(5)]
    return {"repeats": repeats, "sequences": sequences}


def repeated_data() -> dict[str, Any]:
    points = [
        {"share": share, "sequences": sequences, "repeats": 3.0 * repeats, "measure": measure,
         "value": share + 1 / repeats, "lo": share, "hi": share + 2.0, "n": 3}
        for measure in (f"fresh loss{HOSTILE}", "induction")
        for share in (0.0, 0.1, 0.5)
        for repeats, sequences in ((1, 300), (10, 30), (100, 3))
    ]  # fmt: skip
    runs = [{**point, "seed": seed} for point in points for seed in range(2)]
    return {"points": points, "runs": [{k: v for k, v in run.items() if k not in ("lo", "hi", "n")} for run in runs]}


TABLES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "data_attribution": ("localize", data_attribution),
    "data_removal": ("localize", data_removal),
    "nearest_sequences": ("localize", nearest_sequences),
    "memorized": ("localize", memorized),
    "repeated_data": ("localize", repeated_data),
}
