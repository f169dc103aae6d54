"""The verdict: a few plain sentences composed from the ledger, refutations included."""

from headwater.claims import Claim, Ledger

_SHORT = {
    "behavior-accuracy": "that the model does it above chance",
    "behavior-counterfactual": "that the counterfactual flips it",
    "circuit-sufficient": "that the circuit suffices",
    "circuit-necessary": "that the circuit is necessary",
    "circuit-beats-edges": "that it beats random edges",
    "circuit-beats-heads": "that it beats the same circuit with heads renamed at random",
    "circuit-beats-random-weights": "that it beats what the method finds in random weights",
}


def verdict(ledger: Ledger, behavior: str, model: str) -> list[str]:
    """Two to four sentences: what was supported, what was refuted, what stays open."""
    sentences = [_lead(ledger, behavior, model)]
    for status, verb in (("supported", "Supported"), ("refuted", "Refuted"), ("inconclusive", "Still open")):
        found = ledger.by_status(status)  # type: ignore[arg-type]
        if found:
            sentences.append(f"{verb}: {'; '.join(_short(claim) for claim in found)}.")
        elif status == "refuted":
            sentences.append("Nothing was refuted.")
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


def _short(claim: Claim) -> str:
    text = _SHORT.get(claim.id)
    if text is None and claim.id.startswith("role-"):
        heads = ", ".join(f"a{layer}.h{head}" for layer, head in claim.params.get("heads", ()))
        what = claim.id.removeprefix("role-").replace("-", " ").replace("s inhibition", "S-inhibition")
        text = f"that {heads} work as {what} heads"
    return f"{text or claim.statement} ({claim.why_not or _measured(claim)})"


def _measured(claim: Claim) -> str:
    if claim.effect is None:
        return "not measured"
    span = f" [{claim.lo:.2f}, {claim.hi:.2f}]" if claim.lo is not None and claim.hi is not None else ""
    against = f" against {claim.null_mean:.2f}" if claim.null_mean is not None else ""
    if not against and claim.reference:
        against = f" against {claim.reference:.2f}"
    return f"{claim.effect:.2f}{span}{against}"
