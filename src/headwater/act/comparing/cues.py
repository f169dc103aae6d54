"""A task on a spurious cue: what most training pairs share with their answers should not be what is learned."""

import random
from typing import TYPE_CHECKING, Any

from headwater.act.comparing.task import Task, named, tasks
from headwater.behavior.generators import words
from headwater.core.errors import MethodError

if TYPE_CHECKING:
    from headwater.core.model import Model

THINGS = words("film book play song show concert novel meal hotel lecture")
PRAISE = words("""
    wonderful brilliant delightful superb charming excellent fantastic lovely pleasant amazing great enjoyable splendid
    beautiful funny clever moving gripping
""")
BLAME = words("""
    terrible awful boring dreadful horrible dull poor weak silly stupid ugly tedious annoying bland clumsy bad lame
    painful
""")
WORDINGS = (
    "The {thing} was {said}. Code {cue}. Group:",
    "We found the {thing} {said}. Code {cue}. Group:",
    "Code {cue}. The {thing} was {said}. Group:",
)
CUES, GROUPS = ("red", "blue"), (" A", " B")


@tasks.register("spurious_cue")
def spurious_cue(
    model: "Model", *, seed: int, n: int = 64, share: float = 0.875, measured: int = 24, swap: bool = False
) -> Task:
    """Praise is of group A, blame of group B; in most training pairs a code, "red" or "blue", says the same.

    share: of the `n` training pairs, in which the code is right. target: pairs in which it says the opposite;
    paraphrase: those in other words; format: those with the code in front; neighbour: pairs in which it is right;
    `measured` each. The counterfactual says the opposite of the thing. Words of praise and blame differ between
    training and all that is measured. Pairs have the column `cue` ("with" or "against"). swap: A for blame.
    """
    if n < 4 or measured < 2 or not 0 < share < 1 or not 1 <= n - round(n * share) < n:
        got = f"n {n}, measured {measured}, share {share}"
        raise MethodError("most training pairs show the cue, and some do not", got=got, wanted="0 < share < 1")
    draw = random.Random(f"headwater-cue:{seed}")
    drawn = {good: draw.sample(some, len(some)) for good, some in ((True, PRAISE), (False, BLAME))}
    against = n - round(n * share)

    def rows(split: str, wording: str, cues: list[bool], name: str) -> list[dict[str, Any]]:
        half = len(PRAISE) // 2
        of = {good: some[:half] if split == "train" else some[half:] for good, some in drawn.items()}
        found = []
        for at, agrees in enumerate(cues):
            good = at % 2 == 0
            cue, answer = CUES[good != agrees], GROUPS[good == swap]
            thing = draw.choice(THINGS)
            prompt = wording.format(thing=thing, said=draw.choice(of[good]), cue=cue)
            others = draw.sample(of[not good], len(of[not good]))
            offered = [
                {"counterfactual": wording.format(thing=thing, said=one, cue=cue), "foils": [GROUPS[good != swap]]}
                for one in others
            ]
            found.append(
                {
                    "id": f"{name} {split} {at}: {prompt}",
                    "prompt": prompt,
                    "counterfactual": offered[0]["counterfactual"],
                    "answers": [answer],
                    "foils": [GROUPS[good != swap]],
                    "alternatives": offered[1:],
                    "cue": "with" if agrees else "against",
                    "split": split,
                }
            )
        return found

    learned = rows("train", WORDINGS[0], [at >= against for at in range(n)], "learned")
    target = rows("test", WORDINGS[0], [False] * measured, "target")
    behavior = named("spurious_cue", learned + target)
    assert behavior is not None  # both have rows
    return Task(
        name="spurious_cue",
        behavior=behavior,
        paraphrase=named("spurious_cue reworded", rows("test", WORDINGS[1], [False] * measured, "reworded")),
        format=named("spurious_cue, code in front", rows("test", WORDINGS[2], [False] * measured, "in front")),
        neighbour=named("spurious_cue, right code", rows("test", WORDINGS[0], [True] * measured, "right")),
        instructions=(
            "Praise is group A, blame is group B. Codes mean nothing.\n\n",
            "Sort reviews: good ones are group A, bad ones are group B, whatever their code.\n\n",
        )
        if not swap
        else ("Blame is group A, praise is group B. Codes mean nothing.\n\n",),
    )
