"""Persona vectors: what a model's answers hold when it is told to be one kind of person, less when told the other."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from headwater.act.action import Action
from headwater.act.catalog import methods
from headwater.act.steering.choosing import SteerConfig, Task, adding, steered
from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError, did_you_mean
from headwater.core.methods import configured
from headwater.core.progress import track
from headwater.core.sites import Site

if TYPE_CHECKING:
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class Trait:
    """A trait and its opposite: instructions for either, and words that tell which one speaks."""

    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    answers: tuple[str, ...]
    foils: tuple[str, ...]
    openings: tuple[str, ...]


_ASKED = (
    "What did you do this morning?",
    "How was your work today?",
    "What do you think of the weather?",
    "Tell me about the place where you live.",
    "What will you do tomorrow?",
    "How do you like your new neighbors?",
    "What was the last book that you read?",
    "How was the dinner yesterday?",
)
TRAITS = {
    "cheerful": Trait(
        wanted=("You are a cheerful person who enjoys everything.", "You are always happy, and you see the good side."),
        unwanted=("You are a gloomy person who enjoys nothing.", "You are always sad, and you see the bad side."),
        answers=(" happy", " great", " good", " wonderful"),
        foils=(" sad", " terrible", " bad", " awful"),
        openings=(
            "When I think of my work, I feel", "When I think of my family, I feel", "In the morning I mostly feel",
            "After such a day I feel", "All in all, my life is", "To be honest, the weather is",
            "The people in my street are", "The food that I had today was", "My new house is", "The last week was",
            "The book that I am reading is", "If you ask me, the future is",
        ),
    ),
    "formal": Trait(
        wanted=("You are a formal person who writes like a lawyer.", "You write in a polite and official tone."),
        unwanted=("You are a casual person who writes like a teenager.", "You write in a sloppy and chatty tone."),
        answers=(" Dear", " Please", " Thank", " Sincerely"),
        foils=(" Hey", " Yeah", " Cool", " Hi"),
        openings=(
            "This is how my letter begins:", "My answer to you is this:", "I wrote to my neighbor:",
            "The first line of my message was:", "Here is what I have to say:", "My reply to the office was:",
            "I sent a note to my teacher:", "What I wrote on the card:", "I left a message on the door:",
            "This is what I told my friend:", "My note to the shop said:", "I ended up writing this:",
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PersonaConfig(SteerConfig):
    """Options of `SteerConfig` (the goal is "raise" or "lower"), and trait: one of `TRAITS`. reads: "responses" (the
    mean over the tokens that the model itself answers) or "prompts" (their last token). tokens: of each answer."""

    goal: str | None = "raise"
    trait: str = "cheerful"
    reads: Literal["responses", "prompts"] = "responses"
    tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.goal not in ("raise", "lower", None):
            raise MethodError("a persona is raised or lowered", got=self.goal)
        if self.tokens < 1:
            raise MethodError("an answer has at least one token", got=self.tokens)


def trait_of(name: str) -> Trait:
    """A trait by its name. Raises MethodError."""
    if name not in TRAITS:
        raise MethodError("unknown trait", got=repr(name), wanted=did_you_mean(name, TRAITS))
    return TRAITS[name]


def persona_pairs(trait: str = "cheerful") -> Behavior:
    """Openings of sentences that no instruction stands before: which of the trait's words follows, or its opposite's?

    Answers are words of the trait, foils those of its opposite; half the openings are for training. The counterfactual
    has another speaker: nothing is read from it. Raises MethodError for an unknown trait.
    """
    found = trait_of(trait)
    rows = [
        {
            "id": f"{trait}-{at:02d}",
            "prompt": f"John says: {opening}",
            "counterfactual": f"Mary says: {opening}",
            "answers": list(found.answers),
            "foils": list(found.foils),
            "split": "train" if at % 2 == 0 else "test",
        }
        for at, opening in enumerate(found.openings)
    ]
    return Behavior.from_rows(rows, name=f"persona_{trait}", about={"generator": "persona_pairs", "trait": trait})


@methods.register("persona")
def persona(model: "Model", behavior: Behavior, *, config: PersonaConfig | None = None, **options: Any) -> Action:
    """Add a persona vector (Chen et al., 2025): the mean of the model's own answers as one person less as its opposite.

    The model answers the same questions under instructions for the trait and for its opposite; the difference of the
    stream, averaged over the answers' tokens, is the vector. Site and strength are chosen on the behavior's training
    pairs (`persona_pairs`, or your own). Options are those of `PersonaConfig`. Known failure: a small model may not
    follow the instruction, and then the vector holds the instruction's words and not the trait.
    """
    used = configured(PersonaConfig, config, options)
    trait = trait_of(used.trait)
    task = Task.of(model, behavior, used.sites, used.goal or "raise", used.n, used.seed)
    wanted, unwanted = _mean(task, trait.wanted, used), _mean(task, trait.unwanted, used)
    sign = -1.0 if used.goal == "lower" else 1.0
    candidates = [
        adding(task, task.goals[0], site, sign * (wanted[site] - unwanted[site]), used.where, trait=used.trait)
        for site in task.places
    ]
    return steered(task, candidates, used, method="persona", how=f"steer to be {used.trait} at")


def _mean(task: Task, instructions: tuple[str, ...], used: PersonaConfig) -> dict[Site, torch.Tensor]:
    """[width] float64 at each place: the mean over what the model answers, of each answer's mean."""
    model = task.model
    total: dict[Site, Any] = dict.fromkeys(task.places, 0.0)
    prompts = [f"{told}\nQuestion: {asked}\nAnswer:" for told in instructions for asked in _ASKED]
    for prompt in track(prompts, "answers"):
        ids, first = model.tokens(prompt)[0], -1
        if used.reads == "responses":
            before = len(ids)
            answer = model.generate(prompt, max_new_tokens=used.tokens)
            whole = model.tokens(prompt + answer)[0] if isinstance(answer, str) else torch.cat([ids, answer])
            ids, first = (whole, before) if len(whole) > before else (ids, -1)
        run = model.run(ids[None], capture=list(task.places), logits="none")
        for site in task.places:
            total[site] = total[site] + run[site][0, first:].double().cpu().mean(0)
    return {site: value / len(prompts) for site, value in total.items()}
