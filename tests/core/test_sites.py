"""Sites: text forms, aliases, patterns, positions, and errors that name what is near."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.core.errors import SiteError
from headwater.core.sites import HEADED_KINDS, KINDS, WHOLE_KINDS, Site, parse_position

positions = st.one_of(
    st.none(),
    st.integers(-99, 99).map(str),
    st.tuples(st.integers(-9, 9), st.integers(-9, 9)).map(lambda p: f"{p[0]}:{p[1]}"),
    st.lists(st.integers(-9, 9), min_size=2, max_size=4).map(lambda p: ",".join(map(str, p))),
    st.sampled_from([":", "2:", ":-1", "S2", "END", "subject_last"]),
)


@st.composite
def sites(draw: Any) -> Site:
    kind = draw(st.sampled_from(KINDS))
    stack = draw(st.sampled_from(["", "encoder", "decoder", "text", "stack2"]))
    pos = draw(positions)
    if kind in WHOLE_KINDS:
        return Site(kind, pos=pos, stack=stack)
    layer = draw(st.one_of(st.integers(0, 200), st.just("*")))
    head = draw(st.one_of(st.none(), st.integers(0, 200), st.just("*"))) if kind in HEADED_KINDS else None
    expert = draw(st.one_of(st.none(), st.integers(0, 200))) if kind == "neurons" else None
    return Site(kind, layer, head, expert, pos, stack)


@given(sites())
def test_text_and_back(site: Site) -> None:
    assert Site.parse(str(site)) == site
    assert Site.parse(site) is site
    assert site.is_pattern == ("*" in str(site))
    assert site.at(None) == Site(site.kind, site.layer, site.head, site.expert, None, site.stack)
    assert str(site.whole) == str(site).partition("@")[0].partition(".h")[0].partition(".e")[0]
    if not site.is_pattern:
        assert site.matches(site)


@pytest.mark.parametrize(
    ("alias", "site"),
    [
        ("blocks.5.hook_resid_post", "resid_post.5"),
        ("blocks.0.hook_resid_pre@-1", "resid_pre.0@-1"),
        ("blocks.*.hook_mlp_out", "mlp_out.*"),
        ("blocks.7.attn.hook_z", "z.7"),
        ("blocks.7.attn.hook_result", "head.7"),
        ("blocks.7.attn.hook_rot_k", "k.7"),
        ("blocks.7.attn.hook_pattern", "pattern.7"),
        ("blocks.7.attn.hook_attn_scores", "scores.7"),
        ("blocks.2.mlp.hook_post", "neurons.2"),
        ("hook_embed", "embed"),
        ("input", "embed"),
        ("a5.h3", "head.5.h3"),
        ("a5.h3@S2", "head.5.h3@S2"),
        ("m11", "mlp_out.11"),
        ("logits", "logits"),
        ("  z.7.h3 ", "z.7.h3"),
    ],
)
def test_names_of_other_tools(alias: str, site: str) -> None:
    assert str(Site.parse(alias)) == site


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("resid_pots.3", "resid_post"),
        ("", "cannot read"),
        ("z.7.h", "cannot read"),
        ("z.x", "cannot read"),
        ("z.7@1@2", "cannot read"),
        ("z", "names no layer"),
        ("logits.3", "has none"),
        ("resid_post.3.h1", "no axis of heads"),
        ("mlp_out.3.e1", "only neurons have experts"),
        ("blocks.3.attn.hook_zz", "attn.hook_z"),
    ],
)
def test_what_cannot_be_read_is_refused_with_near_names(text: str, says: str) -> None:
    with pytest.raises(SiteError, match=says):
        Site.parse(text)


@pytest.mark.parametrize(
    ("pattern", "site", "matches"),
    [
        ("*", "z.3", True),
        ("resid_post.*", "resid_post.3", True),
        ("resid_post.*", "resid_pre.3", False),
        ("resid_*.2", "resid_mid.2", True),
        ("resid_*.2", "resid_mid.12", False),
        ("*.1", "z.1", True),
        ("*.1", "z.11", False),
        ("z.*.h3", "z.5.h3", True),
        ("z.*.h3", "z.5.h13", False),
        ("z.*.h*", "z.5.h13", True),
        ("encoder/resid_post.*", "encoder/resid_post.1", True),
        ("encoder/resid_post.*", "decoder/resid_post.1", False),
        ("*/resid_post.1", "decoder/resid_post.1", True),
        ("resid_post.*", "encoder/resid_post.1", False),
        ("cross_*.0", "cross_z.0", True),
    ],
)
def test_patterns(pattern: str, site: str, matches: bool) -> None:
    assert Site.parse(site).matches(pattern) is matches


def test_positions() -> None:
    assert parse_position("-1") == -1
    assert parse_position("2:5") == slice(2, 5)
    assert parse_position(":-2") == slice(None, -2)
    assert parse_position(":") == slice(None)
    assert parse_position("1,-4") == (1, -4)
    assert parse_position("S2") == "S2"
    for wrong in ("1.5", "a b", "1:2:3", "1,", "²"):
        with pytest.raises(SiteError, match="position"):
            parse_position(wrong)


@pytest.mark.parametrize("pos", ["1-", "a b", "1:2:3", "*", "S.2"])
def test_a_malformed_position_is_refused_where_it_is_read(pos: str) -> None:
    with pytest.raises(SiteError, match="cannot read the position"):
        Site.parse(f"resid_post.1@{pos}")
