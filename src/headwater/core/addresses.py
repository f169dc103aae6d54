"""Which sites a model has, and what a site or a pattern means in it."""

from typing import Any

from headwater.core.anatomy import Anatomy
from headwater.core.errors import SiteError, did_you_mean
from headwater.core.sites import KINDS, Site


def sites_of(anatomy: Anatomy, pattern: str | Site = "*") -> list[Site]:
    """The whole sites (no head, no position) that a model has, or those of them that a pattern means."""
    found: list[Site] = []
    for prefix, stack in anatomy.stacks.items():
        found.append(Site("embed", stack=prefix))
        for block in stack.blocks:
            found += [Site(k, block.index, stack=prefix) for k, yes in anatomy.kinds(stack, block).items() if yes]
    if anatomy.has_logits:
        found.append(Site("logits"))
    return found if pattern == "*" else [site for site in found if site.matches(Site.parse(pattern).whole)]


def resolved(anatomy: Anatomy, wanted: Site, name: str) -> list[Site]:
    """The concrete sites that a site or pattern means, with head, expert and position kept. Raises SiteError, which
    names the model, where there is none."""
    main = anatomy.main.prefix
    if not wanted.stack and main and wanted.kind != "logits":
        # An unprefixed site of a model with several stacks is one of its main stack.
        wanted = Site(wanted.kind, wanted.layer, wanted.head, wanted.expert, wanted.pos, main)
    whole = wanted.whole
    known = sites_of(anatomy)
    matches = [site for site in known if site.matches(whole)] if whole.is_pattern else [s for s in known if s == whole]
    if not matches:
        raise _no_such_site(anatomy, wanted, name)
    found: list[Site] = []
    for site in matches:
        heads: list[Any] = [wanted.head]
        if wanted.head == "*":
            heads = list(range(_n_heads_at(anatomy, site)))
        found += [Site(site.kind, site.layer, head, wanted.expert, wanted.pos, site.stack) for head in heads]
    for site in found:
        if isinstance(site.head, int) and site.head >= _n_heads_at(anatomy, site):
            raise SiteError(
                f"{site} names a head that {name} does not have",
                got=f"h{site.head}",
                wanted=f"h0 to h{_n_heads_at(anatomy, site) - 1}",
            )
    return found


def _n_heads_at(anatomy: Anatomy, site: Site) -> int:
    block = anatomy.stacks[site.stack].blocks[int(site.layer or 0)]
    part = block.cross if site.kind.startswith("cross_") else block.attention
    if part is None:
        return 0
    return part.n_kv_heads if site.kind.removeprefix("cross_") in ("k", "v") else part.n_heads


def _no_such_site(anatomy: Anatomy, site: Site, name: str) -> SiteError:
    known = sites_of(anatomy)
    prefix = f"{site.stack}/" if site.stack else ""
    if site.stack not in anatomy.stacks and site.kind != "logits":
        single = list(anatomy.stacks) == [""]
        wanted = "a site without a prefix: it has one stack" if single else None
        return SiteError(
            f"{name} has no stack {site.stack!r}",
            wanted=wanted or did_you_mean(site.stack, anatomy.stacks),
        )
    kinds = sorted({s.kind for s in known if s.stack == site.stack} | {s.kind for s in known if s.kind == "logits"})
    if site.kind not in kinds and site.kind in KINDS:
        why = anatomy.refused.get(prefix + site.kind)
        order = anatomy.stacks[site.stack].blocks[0].order if site.stack in anatomy.stacks else ""
        if why is None and site.kind == "resid_mid" and order == "parallel":
            why = "its attention and MLP read the stream side by side, so there is no stream between them"
        if why is None and order == "mixer":
            why = "it has no attention: its sites are resid_pre, resid_post, mixer_in and mixer_out"
        fix = f"Reason: {why}" if why else None
        return SiteError(f"{name} ({anatomy.family}) has no site {site}", wanted=f"kinds: {', '.join(kinds)}", fix=fix)
    layers = len(anatomy.stacks[site.stack])
    if isinstance(site.layer, int) and site.layer >= layers:
        return SiteError(f"{name} has no layer {site.layer}, asked for in {site}", wanted=f"0 to {layers - 1}")
    return SiteError(f"{name} has no site {site}", wanted=did_you_mean(str(site), map(str, known)))
