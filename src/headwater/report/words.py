"""Numbers, names and untrusted text as a reader should see them."""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

NOTHING = "–"
_METRICS = {
    "logit_diff": "logit difference",
    "prob_diff": "probability difference",
    "kl": "KL divergence",
    "cf_logit_diff": "logit difference under the counterfactual",
}


def finite(value: Any) -> float | None:
    """`value` as a float, or None where there is no number to show (null, NaN, infinite, not a number at all)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, digits: int = 3) -> str:
    """A number with `digits` significant digits and a real minus sign; a dash where there is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace("-", "−")
    found = finite(value)
    if found is None:
        return NOTHING
    if found == 0:
        return "0"
    if abs(found) >= 1e6 or abs(found) < 1e-3:
        text = f"{found:.{digits - 1}e}"
    else:
        text = f"{found:,.{max(0, digits - 1 - math.floor(math.log10(abs(found))))}f}"
    if "." in text and "e" not in text:
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", "−")


def percent(value: Any) -> str:
    """A share as a percentage: `.0483` is `4.8%`, `1.0` is `100%`."""
    found = finite(value)
    if found is None:
        return NOTHING
    share = 100 * found
    near = 99 <= abs(share) < 99.95  # one wrong answer in 200 is not none
    digits = 1 if near or 0.1 <= abs(share) < 10 else 2 if 0 < abs(share) < 0.1 else 0
    return f"{share:.{digits}f}%".replace("-", "−")


def metric_name(name: Any) -> str:
    """A metric as one says it: `logit_diff` is the logit difference."""
    words = ("" if name is None else str(name)).split(" ")
    return visible(" ".join(_METRICS.get(word, word.replace("_", " ")) for word in words), 80)


def role_name(role: Any) -> str:
    """A head's role as one says it."""
    text = "no role" if role in (None, "") else str(role).replace("_", " ")
    return visible(re.sub(r"^s inhibition$", "S-inhibition", text), 60)


def p_value(value: Any) -> str:
    """A p-value; below one in a thousand only that it is."""
    found = finite(value)
    if found is None:
        return NOTHING
    return "< 0.001" if found < 0.001 else f"{found:.3f}" if found < 0.1 else f"{found:.2f}"


def interval(lo: Any, hi: Any) -> str:
    """`[0.61, 0.84]`, rounded to what the interval's width can tell; nothing where an end is missing."""
    low, high = finite(lo), finite(hi)
    if low is None or high is None:
        return ""
    return f"[{_rounded(low, low, high)}, {_rounded(high, low, high)}]"


def estimate(value: Any, lo: Any = None, hi: Any = None) -> str:
    """A value and, where there is one, its interval; as many decimals as the interval's width can tell."""
    found, low, high = finite(value), finite(lo), finite(hi)
    if found is None or low is None or high is None:
        return number(value)
    return f"{_rounded(found, low, high)} {interval(lo, hi)}"


def beside(value: Any, lo: Any, hi: Any) -> str:
    """A number that is compared with an estimate (a null's mean), rounded as the estimate is."""
    found, low, high = finite(value), finite(lo), finite(hi)
    if found is None or low is None or high is None:
        return number(value)
    return _rounded(found, low, high)


def _rounded(value: float, lo: float, hi: float) -> str:
    """`value` with the decimals of an estimate between `lo` and `hi`: two as a rule, more where they lie closer."""
    size, width = max(abs(lo), abs(hi)), abs(hi - lo)
    if size >= 1e6:
        return number(value)
    least = 2 if size < 10 else 1 if size < 100 else 0
    # two digits of the width
    decimals = max(least, min(6, math.ceil(-math.log10(width)) + 1)) if width > 0 else max(least, 3)
    text = f"{value:,.{decimals}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text.replace("-", "−")


def duration(seconds: Any) -> str:
    """`42 s`, `3 min 20 s`, `1 h 05 min`."""
    found = finite(seconds)
    if found is None:
        return NOTHING
    if found < 60:
        return f"{found:.1f} s" if found < 10 else f"{found:.0f} s"
    minutes, rest = divmod(round(found), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(n: int, one: str, many: str | None = None) -> str:
    """`1 head`, `3 heads`, `no heads`."""
    return f"{'no' if n == 0 else f'{n:,}'} {one if n == 1 else many or one + 's'}"


def listing(parts: Iterable[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    items = list(parts)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}" if items else ""


def visible(text: Any, limit: int | None = None) -> str:
    """Text of a model or a file with nothing in it that a reader cannot see.

    Control characters, and the marks that reverse the writing direction, would make a page say something else than
    the file does; they are shown as escapes. Tabs and line ends become arrows. `limit` cuts with an ellipsis.
    """
    shown = "".join(map(_visible, "" if text is None else str(text)))
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def _visible(char: str) -> str:
    if char == "\n":
        return "↵"
    if char == "\t":
        return "→"
    category = unicodedata.category(char)
    if category in ("Cc", "Cf", "Cs", "Co", "Cn") or char in "\u2028\u2029":
        return f"\\u{ord(char):04x}"
    return char


def token(text: Any, limit: int = 18) -> str:
    """A token as a label: a leading space, in whatever way the tokenizer writes it, as a low line."""
    return visible(re.sub(r"^[ĠĊ▁ ]", "␣", "" if text is None else str(text)), limit)


_NODE = re.compile(
    r"(?:a(?P<attn>\d+)\.(?P<sort>[hg])(?P<head>\d+)|m(?P<mlp>\d+))(?:<(?P<port>[qkv])>)?(?:@(?P<pos>.+))?"
)


def node_parts(name: str) -> dict[str, Any]:
    """A node's name taken apart: sort (`head`, `group`, `mlp`, `input`, `logits`, `other`), layer, head, port,
    position.
    """
    found = _NODE.fullmatch(name)
    if found is None:
        base, _, pos = name.partition("@")
        sort = base if base in ("input", "logits") else "other"
        return {"sort": sort, "layer": None, "head": None, "port": None, "pos": pos or None}
    head, attn = found["head"], found["attn"]
    return {
        "sort": "mlp" if found["mlp"] else "head" if found["sort"] == "h" else "group",
        "layer": int(found["mlp"] or attn),
        "head": None if head is None else int(head),
        "port": found["port"],
        "pos": found["pos"],
    }


def strongest(rows: Sequence[dict[str, Any]], key: str, n: int = 3) -> list[dict[str, Any]]:
    """The `n` rows whose `key` is furthest from zero, strongest first; rows without a number are left out."""
    kept = [row for row in rows if finite(row.get(key)) is not None]
    return sorted(kept, key=lambda row: -abs(row[key]))[:n]


def middle_95(values: list[float]) -> tuple[float, float] | None:
    """The ends of the middle 95% of the values, or None where there are none."""
    ordered = sorted(values)
    cut = int(0.025 * (len(ordered) - 1))
    return (ordered[cut], ordered[-1 - cut]) if ordered else None
