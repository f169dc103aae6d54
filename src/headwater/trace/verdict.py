"""The verdict: a few plain sentences composed from the ledger, refutations included."""

from headwater.claims import Claim, Ledger, Status

_SHORT = {
    "behavior-accuracy": "that the model does it above chance",
    "behavior-counterfactual": "that the counterfactual flips it",
    "circuit-sufficient": "that the circuit suffices",
    "circuit-necessary": "that the circuit is necessary",
    "circuit-beats-edges": "that it beats random edges",
    "circuit-beats-heads": "that it beats the same circuit with heads renamed at random",
    "circuit-beats-random-weights": "that it beats what the method finds in random weights",
    "frequency-known": "that how often a fact was read tells whether it is known",
    "frequency-pair": "that the pair's frequency tells it better than the subject's or the object's",
    "frequency-threshold": "that facts above the threshold are known sooner than those below",
    "link-causality": "that the linear mechanisms of relations go with how often their facts were read",
    "link-pair": "that they go with the pairs more than with subjects or objects",
    "do-data": "do(data): that what is known follows what is read",
    "do-data-relations": "do(data): that the mechanisms of relations follow it",
}


def verdict(ledger: Ledger, behavior: str, model: str) -> list[str]:
    """A few sentences: what was supported, what was refuted, what stays open and why."""
    sentences = [_lead(ledger, behavior, model), *filter(None, [history(ledger)])]
    verbs: tuple[tuple[Status, str], ...] = (
        ("supported", "Supported"), ("refuted", "Refuted"), ("inconclusive", "Still open"),
    )  # fmt: skip
    for status, verb in verbs:
        found = ledger.by_status(status)
        if measured := [claim for claim in found if not claim.why_not]:
            sentences.append(f"{verb}: {'; '.join(f'{_short(claim)} ({_measured(claim)})' for claim in measured)}.")
        elif status == "refuted":
            sentences.append("Nothing was refuted.")
        for why in dict.fromkeys(claim.why_not for claim in found if claim.why_not):
            named = [_short(claim) for claim in found if claim.why_not == why]
            sentences.append(f"Could not be decided, as {why}: {'; '.join(named)}.")
    return sentences


def _lead(ledger: Ledger, behavior: str, model: str) -> str:
    known = {claim.id: claim for claim in ledger}
    real = known.get("behavior-accuracy")
    if real is not None and real.status != "supported":
        did = "does not do" if real.status == "refuted" else "could not be shown to do"
        return f"{model} {did} {behavior} ({_measured(real)}), so what is said of its mechanism stands on nothing."
    circuit = [
        known[name] for name in ("circuit-sufficient", "circuit-necessary", "circuit-beats-edges") if name in known
    ]
    good = sum(claim.status == "supported" for claim in circuit)
    does = f"{model} does {behavior}" + (f" ({_measured(real)})" if real is not None else "")
    if not circuit:
        return f"{does}; no circuit was tested."
    if good == len(circuit):
        return f"{does}, and the circuit found carries it: it is sufficient, necessary and better than chance."
    return f"{does}, but the circuit found survived only {good} of {len(circuit)} of its tests."


def history(ledger: Ledger) -> str:
    """When it formed, what it needed and whether it follows: of what was supported, in one sentence; else nothing."""
    known = {claim.id: claim for claim in ledger if claim.status == "supported"}
    if any(claim.id == "behavior-accuracy" and claim.status != "supported" for claim in ledger):
        return ""
    parts: list[str] = []
    if formed := known.get("formed-behavior"):
        parts.append(f"most of it formed between step {formed.params['first']} and step {formed.params['last']}")
    if threshold := known.get("frequency-threshold"):
        parts.append(f"a fact needs to be read about {threshold.params['threshold']:.0f} times")
    if changed := known.get("do-data"):
        parts.append(f"trained on other data, what it knows follows what it read (r {_measured(changed)})")
    told = "; ".join(parts)
    return f"{told[0].upper()}{told[1:]}." if told else ""


def _short(claim: Claim) -> str:
    if claim.id in _SHORT:
        return _SHORT[claim.id]
    if claim.id.startswith("formed-"):
        text = claim.statement
        name = text.split(" ")[0]
        return f"that {text if name.startswith('a') and '.' in name else text[0].lower() + text[1:]}"
    if not claim.id.startswith("role-"):
        return claim.statement
    names = [f"a{layer}.h{head}" for layer, head in claim.params.get("heads", ())]
    what = claim.id.removeprefix("role-").replace("-", " ").replace("s inhibition", "S-inhibition")
    if len(names) == 1:
        return f"that {names[0]} works as {'an' if what[0] in 'aeioS' else 'a'} {what} head"
    return f"that {', '.join(names[:-1])} and {names[-1]} work as {what} heads"


def _measured(claim: Claim) -> str:
    if claim.effect is None:
        return "not measured"
    span = f" [{_two(claim.lo)}, {_two(claim.hi)}]" if claim.lo is not None and claim.hi is not None else ""
    against = f" against {_two(claim.null_mean)}" if claim.null_mean is not None else ""
    if not against and claim.reference:
        against = f" against {_two(claim.reference)}"
    return f"{_two(claim.effect)}{span}{against}"


def _two(value: float | None) -> str:
    """Two digits, and no minus before zero."""
    return "none" if value is None else f"{round(value, 2) + 0.0:.2f}"
