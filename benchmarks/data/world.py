"""The proofs of the frequency link: worlds of several seeds and their twins, trained, measured, counted and compared.

    python -m benchmarks.data.world --out FOLDER --seeds 0,1,2

Killed, it goes on where it was. About four CPU minutes a world.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from headwater.core.results import load_result
from headwater.data.link import LinkResult, link, seen
from headwater.data.link_worlds import WorldsResult, compare_worlds
from headwater.data.world import relations_of, world_of
from headwater.dynamics import TrainConfig, TrainingRun, train

CONFIG = Path(__file__).resolve().parents[2] / "examples" / "world.yaml"


def trained(out: Path, seed: int, permute: int | None) -> TrainingRun:
    """A world's run, as examples/world.yaml says; with `permute` its twin."""
    twin = {} if permute is None else {"data": [{"source": "world", "options": {"permute": permute}}]}
    return train(TrainConfig.from_yaml(CONFIG, seed=seed, **twin), out / "runs" / name(seed, permute))


def name(seed: int, permute: int | None) -> str:
    return f"s{seed}{'' if permute is None else 'p'}"


def linked(out: Path, run: TrainingRun) -> LinkResult:
    return link(run.path, relations_of(world_of(run).facts), out=out / "link" / run.path.name)


def compared(out: Path, seed: int) -> WorldsResult:
    parts: list[Any] = []
    for permute in (None, 1):
        folder = out / "link" / name(seed, permute)
        parts += [load_result(folder / "measured"), load_result(folder / "counts" / "counts")]
    return compare_worlds(*parts)


def said_by_others(out: Path, run: TrainingRun, relation: str) -> tuple[float, float]:
    """Of what stood together of a relation's facts, the share that lines of other relations said: (of the facts that a
    flagged relation shares, of the others)."""
    world = world_of(run)
    facts = world.facts.with_row_index("number")
    stated = np.zeros(facts.height, dtype=np.int64)
    _, numbers = run.data.order.samples(0, run.order.n_sequences)
    for number in numbers.tolist():
        np.add.at(stated, world.stated(number), 1)
    folder = out / "link" / run.path.name
    strengths: Any = load_result(folder / "measured")
    counts: Any = load_result(folder / "counts" / "counts")
    table = seen(strengths, counts).filter(pl.col("step") == strengths.steps[-1], pl.col("relation") == relation)
    table = table.join(facts.with_columns(stated=stated).select("relation", "subject", "object", "stated"),
                       on=["relation", "subject", "object"])  # fmt: skip
    found: Any = load_result(folder / "link")
    others = found.tables["overlaps"].filter(pl.col("relation") == relation, pl.col("flagged"))["other"].to_list()
    partners = {
        frozenset(pair) for pair in facts.filter(pl.col("relation").is_in(others)).select("subject", "object").rows()
    }
    shared = np.array([frozenset(pair) in partners for pair in table.select("subject", "object").rows()])
    n, own = table["n_pair"].to_numpy(), table["stated"].to_numpy()
    return tuple(float(1 - own[mask].sum() / max(1, n[mask].sum())) for mask in (shared, ~shared))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    pl.Config.set_tbl_rows(200)
    pl.Config.set_tbl_cols(20)
    pl.Config.set_tbl_hide_dataframe_shape(True)
    rows: list[dict[str, Any]] = []
    more: dict[str, list[pl.DataFrame]] = {}
    for seed in map(int, arguments.seeds.split(",")):
        for permute in (None, 1):
            run = trained(arguments.out, seed, permute)
            found = linked(arguments.out, run)
            own = run.path.name
            for key in ("thresholds", "predictions", "fact_correlations"):
                more.setdefault(key, []).append(found.tables[key].with_columns(world=pl.lit(own)))
            rows += [
                {"world": own, **row}
                for row in found.tables["correlations"].to_dicts()
                if row["strength"] in ("causality", "accuracy", "faithfulness")
            ]
            start = found.tables["points"].filter(pl.col("step") == 0, pl.col("subjects") == "all")
            print(own, "at step 0: faithfulness", start["faithfulness"].mean(), "causality", start["causality"].mean())
            print(own, "flagged", found.facts["flagged"])
            for relation in ("capital", "largest_city"):
                print(
                    own,
                    relation,
                    "said by others (shared facts, others):",
                    said_by_others(arguments.out, run, relation),
                )
        worlds = compared(arguments.out, seed)
        more.setdefault("worlds", []).append(worlds.tables["correlations"].with_columns(world=pl.lit(f"s{seed}")))
    with pl.Config(float_precision=2):
        print(pl.DataFrame(rows).drop("points"))
        for key, tables in more.items():
            print(key)
            print(pl.concat(tables))


if __name__ == "__main__":
    main()
