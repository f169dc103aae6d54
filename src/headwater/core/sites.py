"""Sites: one address inside a model, the same in the API, in files, in URLs and on the screen."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from headwater.core.errors import SiteError, did_you_mean

STREAM_KINDS = ("resid_pre", "resid_mid", "resid_post")
ATTENTION_KINDS = ("attn_in", "attn_out", "q", "k", "v", "scores", "pattern", "z", "head")
MLP_KINDS = ("mlp_in", "mlp_out", "neurons")
MIXER_KINDS = ("mixer_in", "mixer_out")
CROSS_KINDS = tuple(f"cross_{kind}" for kind in ATTENTION_KINDS)
WHOLE_KINDS = ("embed", "logits")
KINDS = (*WHOLE_KINDS, *STREAM_KINDS, *ATTENTION_KINDS, *MLP_KINDS, *MIXER_KINDS, *CROSS_KINDS)

_HEADED = {"q", "k", "v", "scores", "pattern", "z", "head"}
HEADED_KINDS = frozenset(_HEADED | {f"cross_{kind}" for kind in _HEADED})
"""Kinds with an axis of heads; `.hN` selects along it (key/value heads for `k` and `v`)."""

Position = int | slice | str | tuple[int, ...]

_TEXT = re.compile(
    r"^(?:(?P<stack>[A-Za-z0-9_*]+)/)?(?P<kind>[a-z_*]+)"
    r"(?:\.(?P<layer>\d+|\*))?(?:\.h(?P<head>\d+|\*))?(?:\.e(?P<expert>\d+|\*))?(?:@(?P<pos>[^@]+))?$"
)

_LENS_NAMES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_in": "attn_in",
    "hook_attn_out": "attn_out",
    "hook_mlp_in": "mlp_in",
    "hook_mlp_out": "mlp_out",
    "attn.hook_q": "q",
    "attn.hook_rot_q": "q",
    "attn.hook_k": "k",
    "attn.hook_rot_k": "k",
    "attn.hook_v": "v",
    "attn.hook_z": "z",
    "attn.hook_result": "head",
    "attn.hook_pattern": "pattern",
    "attn.hook_attn_scores": "scores",
    "mlp.hook_post": "neurons",
}


@dataclass(frozen=True, order=True)
class Site:
    """One address: `[stack/]kind.layer[.hN|.eN][@pos]`.

    `layer` is None for `embed` and `logits`. `pos` is an index (negative: from the end of the prompt), a slice `a:b`,
    several indices `1,4`, or the name of a position of a Behavior (`S2`). A site whose layer, head or kind is `*` is a
    pattern.
    """

    kind: str
    layer: int | str | None = None
    head: int | str | None = None
    expert: int | str | None = None
    pos: str | None = None
    stack: str = ""

    @staticmethod
    def parse(text: str | Site) -> Site:
        """Read a site's text form, a TransformerLens hook name or a circuit node name (`input`, `a5.h3`, `m5`,
        `logits`)."""
        return text if isinstance(text, Site) else _parse(text)

    @staticmethod
    def _read(text: str) -> Site:
        match = _TEXT.match(_alias(text))
        if not match:
            raise SiteError(
                f"cannot read the site {text!r}",
                wanted="[stack/]kind.layer[.hN][@pos], such as resid_post.5, z.7.h3, mlp_out.2@-1, pattern.4.h1",
            )
        kind = match["kind"]
        if "*" not in kind and kind not in KINDS:
            raise SiteError(
                f"unknown kind of site in {text!r}", got=repr(kind), wanted=did_you_mean(kind, KINDS, limit=40)
            )
        site = Site(
            kind,
            _number(match["layer"]),
            _number(match["head"]),
            _number(match["expert"]),
            match["pos"],
            match["stack"] or "",
        )
        return site._checked(text)

    def _checked(self, text: str) -> Site:
        if self.kind in WHOLE_KINDS and self.layer is not None:
            raise SiteError(f"{text!r} names a layer, but {self.kind!r} has none", fix=f"Write {self.kind!r}")
        if self.kind not in WHOLE_KINDS and "*" not in self.kind and self.layer is None:
            raise SiteError(f"{text!r} names no layer", wanted=f"{self.kind}.0 or, for every layer, {self.kind}.*")
        if self.head is not None and "*" not in self.kind and self.kind not in HEADED_KINDS:
            raise SiteError(
                f"{text!r} names a head, but {self.kind!r} has no axis of heads", fix=f"Heads: {sorted(HEADED_KINDS)}"
            )
        if self.expert is not None and "*" not in self.kind and self.kind != "neurons":
            raise SiteError(f"{text!r} names an expert, but only neurons have experts")
        if self.pos is not None:
            parse_position(self.pos)  # so that a malformed one is refused here, and not in the middle of a run
        return self

    @property
    def is_pattern(self) -> bool:
        return "*" in f"{self.kind}{self.layer}{self.head}{self.expert}{self.stack}"

    @property
    def whole(self) -> Site:
        """The same site without head, expert and position: the tensor that it is a part of."""
        return replace(self, head=None, expert=None, pos=None)

    def at(self, pos: object) -> Site:
        """The same site at a position."""
        return replace(self, pos=None if pos is None else str(pos))

    def matches(self, pattern: str | Site) -> bool:
        """Whether this site is one of those a pattern means (`resid_post.*`, `z.*.h3`, `encoder/*.2`)."""
        want = Site.parse(pattern) if isinstance(pattern, str) and pattern != "*" else pattern
        if want == "*":
            return True
        pairs = ((want.stack, self.stack), (want.kind, self.kind), (want.layer, self.layer), (want.head, self.head))
        return all(_glob(wanted, have) for wanted, have in pairs)

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        text = f"{self.stack}/" if self.stack else ""
        text += self.kind
        text += f".{self.layer}" if self.layer is not None else ""
        text += f".h{self.head}" if self.head is not None else ""
        text += f".e{self.expert}" if self.expert is not None else ""
        return text + (f"@{self.pos}" if self.pos is not None else "")


_parse = lru_cache(maxsize=4096)(Site._read)  # pyright: ignore[reportPrivateUsage]


def _number(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdigit() else text


def _glob(wanted: object, have: object) -> bool:
    if wanted is None or wanted == "":
        return have is None or have == ""
    if "*" not in str(wanted):
        return wanted == have
    return re.fullmatch(str(wanted).replace("*", ".*"), "" if have is None else str(have)) is not None


def _alias(text: str) -> str:
    """Names of other tools for the same place."""
    body, at, pos = text.strip().partition("@")
    if match := re.fullmatch(r"blocks\.(\d+|\*)\.(.+)", body):
        layer, hook = match.groups()
        if hook not in _LENS_NAMES:
            raise SiteError(f"no site corresponds to {text!r}", wanted=did_you_mean(hook, _LENS_NAMES, limit=40))
        body = f"{_LENS_NAMES[hook]}.{layer}"
    elif match := re.fullmatch(r"a(\d+)\.h(\d+)", body):
        body = f"head.{match[1]}.h{match[2]}"
    elif match := re.fullmatch(r"m(\d+)", body):
        body = f"mlp_out.{match[1]}"
    elif body in ("input", "hook_embed"):
        body = "embed"
    return body + at + pos


def parse_position(pos: str) -> int | slice | tuple[int, ...] | str:
    """The meaning of what stands after `@`: an index, a slice, several indices, or a name."""
    if re.fullmatch(r"-?\d+", pos):
        return int(pos)
    if match := re.fullmatch(r"(-?\d+)?:(-?\d+)?", pos):
        return slice(*(int(part) if part else None for part in match.groups()))
    if re.fullmatch(r"-?\d+(,-?\d+)+", pos):
        return tuple(int(part) for part in pos.split(","))
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", pos):
        return pos
    raise SiteError(
        f"cannot read the position {pos!r}", wanted="an index (-1), a slice (2:5), indices (1,4) or a name (S2)"
    )
