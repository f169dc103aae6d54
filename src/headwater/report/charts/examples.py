"""Charts of training examples: which sequences a behavior is put down to, what it is worth without them, repeats."""

from typing import Any

import altair as alt

from headwater.report.charts.parts import WIDTH, Row, data, intervals, nothing, rows, themed
from headwater.report.theme import color
from headwater.report.words import number

_BASE, _RETRIEVAL = "base rate", "retrieval"
_PANELS = 6  # queries that are drawn
_OF = {"relevant": "they truly made it", "together": "they mention both", "retrieval": "the retrieval's own first"}


def data_attribution(result: Any) -> Any:
    """Of the first k of each ranking, how many are such; the base rate dashed. Never without both baselines."""
    found = rows(result.tables.get("summary"), "ranking", "of", "k", "precision", "lo", "hi", "n")
    found = [row for row in found if row["precision"] is not None]
    base = {row["of"]: row["precision"] for row in found if row["ranking"] == _BASE}
    searched = {row["of"] for row in found if row["ranking"] == _RETRIEVAL}
    shown: list[Row] = []
    for row in found:
        if row["of"] not in base or row["of"] not in searched:
            continue
        of = _OF.get(str(row["of"]), str(row["of"]))
        tip = f"{row['ranking']}, first {row['k']}: {number(row['precision'])}"
        tip += f" ({number(row['lo'])} to {number(row['hi'])}); base rate {number(base[row['of']])}"
        kind = "baseline" if row["ranking"] in (_BASE, _RETRIEVAL) else "method"
        shown.append({
            "label": row["ranking"], "value": row["precision"], "lo": row["lo"], "hi": row["hi"], "tip": tip,
            "group": f"of the first {row['k']}: {of}", "hue": kind, "reference": base[row["of"]],
        })  # fmt: skip
    hues = {"method": color("pos"), "baseline": color("null")}
    return themed(intervals(shown, x="share", hues=hues, grouped=True, domain=(0.0, 1.0)))


def data_removal(result: Any) -> Any:
    """How the behavior changed by training without what each ranking puts first; the random removal dashed."""
    found = rows(result.tables.get("effect"), "removed", "measure", "change", "lo", "hi", "more", "p", "sequences", "n")
    found = [row for row in found if row["change"] is not None]
    chance = {row["measure"]: row["change"] for row in found if row["removed"] == "random"}
    shown: list[Row] = []
    for row in found:
        tip = f"without the first of {row['removed']} ({number(row['sequences'])} sequences): {row['measure']} "
        tip += f"{number(row['change'])} ({number(row['lo'])} to {number(row['hi'])})"
        if row["p"] is not None:
            tip += f"; beyond random {number(row['more'])}, p {number(row['p'])}"
        shown.append({
            "label": row["removed"], "value": row["change"], "lo": row["lo"], "hi": row["hi"], "tip": tip,
            "group": f"change of {row['measure']}", "reference": chance.get(row["measure"]),
            "hue": "baseline" if row["removed"] in ("random", _RETRIEVAL) else "method",
        })  # fmt: skip
    hues = {"method": color("pos"), "baseline": color("null")}
    return themed(intervals(shown, x="after - before", hues=hues, grouped=True, independent=True))


def nearest_sequences(result: Any) -> Any:
    """The cosines of each query's neighbours; the mean over all sequences dashed."""
    means = {row["query"]: row for row in rows(result.tables.get("queries"), "query", "name", "mean", "sd")}
    shown: list[Row] = []
    for row in rows(result.tables.get("nearest"), "query", "rank", "sequence", "cosine", "text"):
        if row["cosine"] is None or row["query"] not in list(means)[:_PANELS]:
            continue
        about = means[row["query"]]
        tip = f"sequence {row['sequence']}: cosine {number(row['cosine'])}; all sequences {number(about['mean'])}, "
        tip += f"standard deviation {number(about['sd'])}: {str(row['text'])[:160]}"
        place = "" if row["rank"] is None else row["rank"] + 1
        shown.append({
            "label": f"{place}. {str(row['text'])[:40]}", "value": row["cosine"], "tip": tip,
            "group": f"{row['query']}: {str(about['name'])[:70]}", "reference": about["mean"],
        })  # fmt: skip
    return themed(intervals(shown, x="cosine", grouped=True))


def memorized(result: Any) -> Any:
    """The share of sequences given back word for word, by how often they were seen; of those never seen dashed."""
    found = rows(result.tables.get("repeats"), "seen_from", "seen_to", "n", "share", "lo", "hi", "matched")
    found = [row for row in found if row["share"] is not None]
    null = next((row["share"] for row in found if row["seen_to"] == 0), None)
    shown: list[Row] = []
    for row in found:
        times = f"{row['seen_from']} to {row['seen_to']} times" if row["seen_to"] != row["seen_from"] else "once"
        name = "never (held out)" if row["seen_to"] == 0 else times
        tip = f"seen {name}: {number(row['share'])} ({number(row['lo'])} to {number(row['hi'])}) of {row['n']} "
        tip += f"extractable; {number(row['matched'])} tokens given back in the mean"
        sides = {"value": row["share"], "lo": row["lo"], "hi": row["hi"], "reference": null}
        shown.append({"label": name, "tip": tip, **sides})
    return themed(intervals(shown, x="share given back", domain=(0.0, 1.0)))


def repeated_data(result: Any) -> Any:
    """Each measure against how often the repeated sequences were seen, a line a share; the run without any dashed."""
    found = rows(result.tables.get("points"), "share", "repeats", "measure", "value", "lo", "hi", "n")
    found = [row for row in found if row["value"] is not None and row["measure"] is not None]
    panels: list[Any] = []
    for measure in dict.fromkeys(row["measure"] for row in found):
        mine = [row for row in found if row["measure"] == measure]
        plain = [row["value"] for row in mine if not row["share"]]
        shown: list[Row] = []
        for row in mine:
            if not row["share"] or not row["repeats"]:
                continue
            tip = f"{measure}, {number(row['share'])} of the samples, {number(row['repeats'])} times each: "
            tip += f"{number(row['value'])} ({number(row['lo'])} to {number(row['hi'])})"
            shown.append({**row, "name": f"share {number(row['share'])}", "tip": tip})
        if not shown:
            continue
        base = alt.Chart(data(shown)).encode(
            x=alt.X(
                "repeats:Q", title="times that each was seen", scale=alt.Scale(type="log"), axis=alt.Axis(tickCount=6)
            ),
            y=alt.Y("value:Q", title=str(measure), scale=alt.Scale(zero=False)),
            color=alt.Color("share:Q", scale=alt.Scale(range=[color("neg"), color("pos")]), legend=None),
            detail="name:N",
            description="tip:N",
            tooltip="tip:N",
        )
        both = base.mark_line(strokeWidth=1.5) + base.mark_point(size=26, filled=True, opacity=1)
        if plain:
            line = alt.Chart(data([{"value": plain[0], "tip": f"{measure} without repeats: {number(plain[0])}"}]))
            both += line.mark_rule(color=color("null"), strokeDash=[3, 3]).encode(y="value:Q", description="tip:N")
        panels.append(both.properties(width=(WIDTH - 140) // 2, height=180))
    return themed(alt.hconcat(*panels, spacing=24) if panels else nothing())
