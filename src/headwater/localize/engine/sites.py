"""Which patches a text means: kinds, layers, heads, positions, windows of layers, and sets patched together."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from headwater.core.errors import MethodError, SiteError, did_you_mean
from headwater.core.sites import Site
from headwater.localize.engine.schedule import HEADED, KINDS, Joint, Kind, Patch, Target
from headwater.localize.graph import Graph

_SPEC = re.compile(r"(?P<kind>[a-z_]+)(?:\.(?P<layer>\d+|\*))?(?:\.h(?P<head>\d+|\*))?(?:@(?P<pos>[^@]+))?$")
_EVERY = "*"
_PLACE = re.compile(r"-?\d+(,-?\d+)*$|(-?\d+)?:(-?\d+)?$")


@dataclass(frozen=True)
class Spec:
    """A site to patch; `position` is None (all at once), "*" (each), a name, a span, a slice or indices."""

    kind: Kind
    layer: int
    head: int | None
    position: str | None


@dataclass(frozen=True)
class Set:
    """Sites patched together, as they were written."""

    text: str
    specs: tuple[Spec, ...]


def read_sites(wanted: Sequence[str], graph: Graph) -> list[Spec | Set]:
    """What each text means; `one+other` is a set. Raises SiteError with the known kinds, layers or heads."""
    found: list[Spec | Set] = []
    for text in wanted:
        parts = [read_spec(part, graph) for part in text.split("+")]
        if len(parts) == 1:
            found += parts[0]
        else:
            found.append(Set(text.strip(), tuple(spec for part in parts for spec in part)))
    return found


def read_spec(text: str, graph: Graph) -> list[Spec]:
    """What one site's text means: the sites of every layer or head that it leaves open."""
    if re.match(r"(a\d+\.h\d+|m\d+|blocks\.)", text.strip()):
        text = str(Site.parse(text))
    match = _SPEC.match(text.strip())
    if match is None or match["kind"] not in KINDS:
        kind = text.split(".")[0].split("@")[0]
        raise SiteError(
            f"cannot patch {text!r} in a sweep",
            wanted=did_you_mean(kind, KINDS),
            fix="Other sites: model.run(..., interventions=[hw.resample(site, run)])",
        )
    kind, layer, head, position = match["kind"], match["layer"], match["head"], match["pos"]
    if kind == "resid_mid" and graph.parallel:
        raise SiteError(
            f"this model has no {text}: its attention and MLP read the stream side by side",
            wanted="resid_pre, resid_post",
        )
    if head is not None and kind not in HEADED:
        raise SiteError(f"{text!r} names a head, but {kind} has none", wanted="head.LAYER.hHEAD")
    layers = range(graph.n_layers) if layer in (None, _EVERY) else [int(layer)]
    n_heads = graph.n_kv_heads if kind in ("k", "v") else graph.n_heads
    heads: Iterable[int | None] = [None]
    if kind in HEADED:
        heads = range(n_heads) if head in (None, _EVERY) else [int(head)]
    if any(one >= graph.n_layers for one in layers):
        raise SiteError(f"this model has no layer for {text!r}", wanted=f"0 to {graph.n_layers - 1}")
    if any(one is not None and one >= n_heads for one in heads):
        raise SiteError(f"this model has no head for {text!r}", wanted=f"h0 to h{n_heads - 1}")
    return [Spec(kind, one, which, position) for one in layers for which in heads]  # type: ignore[arg-type]


def positions_of(specs: Iterable[Spec | Set]) -> list[str | None]:
    """Every position that is asked for, once."""
    every = [spec.position for one in specs for spec in (one.specs if isinstance(one, Set) else (one,))]
    return list(dict.fromkeys(every))


def check_positions(specs: Iterable[Spec | Set], named: dict[str, Tensor]) -> None:
    """Raises SiteError for a position that is neither a name of the behavior, a span, indices nor a slice."""
    for position in positions_of(specs):
        if position is None or position == _EVERY or position in named or _PLACE.match(position):
            continue
        if position.endswith("[:]") and f"{position[:-3]}[0]" in named:
            continue
        known = did_you_mean(position, [name for name in named if not name.endswith("[0]")])
        raise SiteError("unknown position", got=repr(position), wanted=f"*, indices, a slice, or {known}")


def patches(specs: Iterable[Spec | Set], graph: Graph, length: int, window: int) -> Iterator[Patch]:
    """Every patch for prompts of this length; `@*` is each position, counted from the end."""
    each = [str(p - length) for p in range(length)]
    for spec in specs:
        own = spec.specs if isinstance(spec, Set) else (spec,)
        starred = any(part.position == _EVERY for part in own)
        for place in each if starred else [None]:
            targets = tuple(_target(part, place) for part in own)
            if isinstance(spec, Set):
                name = spec.text.replace("@*", f"@{place}") if starred else spec.text
                yield Joint(parts=targets, layer=min(t.layer for t in targets), name=name)
            elif window > 1:
                yield windowed(targets[0], graph.n_layers, window)
            else:
                yield targets[0]


def _target(spec: Spec, place: str | None) -> Target:
    position = place if spec.position == _EVERY else spec.position
    return Target(kind=spec.kind, layer=spec.layer, head=spec.head, position=position)


def windowed(target: Target, n_layers: int, window: int) -> Joint:
    """The same site at `window` layers around one (fewer at the ends of the model), as Meng et al. (2022) count
    them.
    """
    low, high = max(0, target.layer - window // 2), min(n_layers, target.layer - (-window // 2))
    head = "" if target.head is None else f".h{target.head}"
    place = "" if target.position is None else f"@{target.position}"
    parts = tuple(
        Target(kind=target.kind, layer=layer, head=target.head, position=target.position) for layer in range(low, high)
    )
    return Joint(parts=parts, layer=target.layer, name=f"{target.kind}.{low}-{high - 1}{head}{place}")


def check_window(window: int, specs: Iterable[Spec | Set]) -> None:
    """Raises MethodError for a window that is no number of layers, or of sets, which have no layer of their own."""
    if window < 1:
        raise MethodError("a window is a number of layers", got=window, wanted="1 or more")
    if window > 1 and any(isinstance(spec, Set) for spec in specs):
        raise MethodError("a set of sites cannot be slid over layers", fix="Give a window, or sets, not both")
