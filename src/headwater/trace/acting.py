"""The act stage: knock out and amplify the heads that were found, steer the behavior, all beside their baselines."""

from typing import TYPE_CHECKING, Any, cast

import polars as pl

from headwater.behavior.table import Behavior
from headwater.claims import Ledger
from headwater.core.errors import BehaviorError, MethodError
from headwater.core.results import Result
from headwater.localize.graph import head_of

if TYPE_CHECKING:
    from headwater.trace.stages import Work


def act_on(work: "Work") -> tuple[dict[str, Result], dict[str, Any]]:
    """Effect of each action on test pairs, two other behaviors and plain text, beside prompting and random versions;
    and facts of the stage: which behaviors could not be looked at."""
    from headwater.act.ablation import amplify, knock_out
    from headwater.act.effects import effect
    from headwater.act.measuring import plain_texts
    from headwater.act.steering import steer

    settings, model, seed = work.settings.act, work.model, work.seed("act")
    train, test = work.train(settings.n_train), work.test(settings.n)
    whole = work.behavior
    pairs = Behavior(pl.concat([train.frame, test.frame]), name=whole.name, metric=whole.metric, about=whole.about)
    chosen = heads_to_act_on(work)
    actions = []
    if chosen:
        actions += [knock_out(model, chosen, pairs), amplify(model, chosen, pairs, factor=settings.factor)]
    try:
        actions.append(steer(model, pairs, n=settings.n_search, seed=seed))
    except MethodError:
        if not actions:  # too few pairs to find a direction on: what was found can still be knocked out
            raise
    others, skipped = usable_others(work)
    made = effect(
        model,
        pairs,
        actions,
        others=others,
        text=plain_texts()[: settings.texts],
        controls=settings.controls,
        n_others=settings.n_others,
        text_tokens=settings.text_tokens,
        seed=seed,
    )
    return {"effect": made}, {"others_skipped": skipped} if skipped else {}


def usable_others(work: "Work") -> tuple[tuple[str, ...] | None, dict[str, str]]:
    """The behaviors that should stay as they are, of those that this tokenizer can align; and why not the rest."""
    from headwater.act.effects import OTHERS
    from headwater.behavior import make

    settings, whole = work.settings.act, work.behavior
    skipped: dict[str, str] = {}
    usable: list[str] = []
    for name in OTHERS if settings.others is None else settings.others:
        if settings.others is None and (name == whole.name or len(usable) == 2):
            continue
        try:
            make(name, n=2 * settings.n_others, seed=work.seed("act")).test.bind(work.model)
            usable.append(name)
        except BehaviorError as error:
            skipped[name] = f"{error.what} ({error.got})" if error.got else error.what
    return (None if settings.others is None else tuple(usable)), skipped


def heads_to_act_on(work: "Work", most: int = 4) -> list[str]:
    """The group of heads that survived its test with the largest effect.

    Where none did: the heads with a role that are needed most, else those with the highest score.
    """
    ledger = cast(Ledger, work.run.load("claims", "ledger"))
    survived = [claim for claim in ledger.by_status("supported") if claim.test == "heads_play_role"]
    helping = sorted((claim for claim in survived if (claim.effect or 0) > 0), key=lambda claim: -(claim.effect or 0))
    if helping:
        return [f"a{layer}.h{head}" for layer, head in helping[0].params["heads"][:most]]
    roles = work.heads.tables["roles"].filter(pl.col("effect") > 0).sort("effect", descending=True)
    named = [f"a{layer}.h{head}" for layer, head in roles.select("layer", "head").unique(maintain_order=True).rows()]
    if named:
        return named[:most]
    nodes = work.attribution.tables["nodes"].sort("score", descending=True, nulls_last=True)["node"].to_list()
    return [node for node in nodes if head_of(node) is not None][:most]
