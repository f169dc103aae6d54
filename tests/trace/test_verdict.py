from headwater.claims import Claim, Ledger, Outcome
from headwater.trace.verdict import verdict


def claim(id, **outcome):
    return Claim(id=id, statement=id, test="t", params={"heads": [[1, 2]]}).with_outcome(Outcome(**outcome))


GOOD = {"effect": 0.9, "lo": 0.8, "hi": 1.0, "p": 1e-4, "reference": 0.5}
BAD = {"effect": 0.2, "lo": 0.1, "hi": 0.3, "p": 0.99, "reference": 0.5}


def test_verdict_says_what_was_supported_and_refuted():
    ledger = Ledger.of([
        claim("behavior-accuracy", **GOOD), claim("circuit-sufficient", **GOOD), claim("circuit-necessary", **GOOD),
        claim("circuit-beats-edges", **GOOD), claim("role-name-mover", **BAD),
        claim("role-s-inhibition", effect=1.0, why_not="it is so"),
    ])  # fmt: skip
    lead, supported, refuted, still = verdict(ledger, "ioi", "smollm2")
    assert (
        lead.startswith("smollm2 does ioi (0.90 [0.80, 1.00]")
        and "sufficient, necessary and better than chance" in lead
    )
    assert supported.startswith("Supported: ") and "that the circuit suffices" in supported
    assert refuted == "Refuted: that a1.h2 works as a name mover head (0.20 [0.10, 0.30] against 0.50)."
    assert still == "Could not be decided, as it is so: that a1.h2 works as an S-inhibition head."


def test_verdict_does_not_praise_a_circuit_of_a_behavior_that_is_not_there():
    ledger = Ledger.of([claim("behavior-accuracy", **BAD), claim("circuit-sufficient", **GOOD)])
    assert "stands on nothing" in verdict(ledger, "ioi", "m")[0]
    partly = Ledger.of([claim("behavior-accuracy", **GOOD), claim("circuit-sufficient", **BAD)])
    sentences = verdict(partly, "ioi", "m")
    assert "survived only 0 of 1" in sentences[0] and not any(s == "Nothing was refuted." for s in sentences)
    assert "Nothing was refuted." in verdict(Ledger.of([claim("behavior-accuracy", **GOOD)]), "ioi", "m")


def test_the_history_is_said_in_one_sentence_as_far_as_it_was_supported():
    params = {"formed-behavior": {"first": 16, "last": 64}, "frequency-threshold": {"threshold": 23.2}}

    def filed(id, **outcome):
        made = Claim(id=id, statement=f"The {id} came up", test="t", params=params.get(id, {}))
        return made.with_outcome(Outcome(**outcome))

    good = [filed(id, **GOOD) for id in ("behavior-accuracy", "formed-behavior", "frequency-threshold", "do-data")]
    sentences = verdict(Ledger.of(good), "capitals", "world")
    assert sentences[1] == (
        "Most of it formed between step 16 and step 64; a fact needs to be read about 23 times; trained on other data, "
        "what it knows follows what it read (r 0.90 [0.80, 1.00] against 0.50)."
    )
    assert "that the formed-behavior came up" in sentences[2]
    open_ones = [filed("frequency-threshold", effect=1.0, why_not="nothing was changed"), *good[:2]]
    assert verdict(Ledger.of(open_ones), "capitals", "world")[1] == "Most of it formed between step 16 and step 64."
    undone = [filed("behavior-accuracy", **BAD), *good[1:]]
    assert "formed between" not in verdict(Ledger.of(undone), "capitals", "world")[1]
