"""Indirect object identification as a causal graph (Wang et al., 2022; as Gupta et al., 2024 train it).

duplicate_token -> s_inhibition -> name_mover. Of two introduced people one gives; at the giver's name the
duplicate-token variable says whether it is the first or the second of the two, the inhibition brings that to the last
position, and the mover says the other name.
"""

import torch
from torch import Tensor

from headwater.bench.siit.causal import NO_VALUE, Variable, Written

NAMES = ("Mary", "John", "Tom", "Anna", "Paul", "Lucy", "Mark", "Sara", "Adam", "Kate")
PLACES = ("store", "park", "school", "office")
THINGS = ("drink", "book", "ring", "letter")
# Every template has as many words, its names stand elsewhere: what matters is not a position but what stands there.
TEMPLATES = (
    "When <1> and <2> went to the <place> then <S> gave a <thing> to",
    "Then in the <place> <1> and <2> met and <S> gave a <thing> to",
    "After <1> met with <2> at the <place> today <S> handed a <thing> to",
    "The friends <1> and <2> left the <place> so <S> sent a <thing> to",
    "Later <2> and then <1> came to the <place> where <S> gave <thing> to",
    "While <1> and <2> were at the <place> <S> handed over a <thing> to",
)
_WIDTH = {len(template.split()) for template in TEMPLATES}


class IOI(Written):
    """The IOI graph over its own small vocabulary; `length` is 14 tokens, the answer is asked for at the last."""

    def __init__(self, names: int = len(NAMES)) -> None:
        self.names = NAMES[:names]
        plain = {word for template in TEMPLATES for word in template.split() if not word.startswith("<")}
        vocabulary = (*self.names, *PLACES, *THINGS, *sorted(plain))
        codes = {word: code for code, word in enumerate(vocabulary)}
        rows: list[list[int]] = []
        slots: list[tuple[int, int, int, int, int]] = []
        for template in TEMPLATES:
            words = template.split()
            rows.append([codes.get(word, 0) for word in words])
            places = tuple(words.index(mark) for mark in ("<1>", "<2>", "<S>", "<place>", "<thing>"))
            slots.append(places)  # type: ignore[arg-type]
        self._rows, self._slots = torch.tensor(rows), torch.tensor(slots)
        variables = [
            Variable(
                name="duplicate_token",
                parents=("input",),
                compute=self._duplicate,
                kind="attention",
                about="at a name said before: 0 where that was the first of the two, 1 where it was the second",
            ),
            Variable(
                name="s_inhibition",
                parents=("duplicate_token",),
                compute=self._inhibition,
                kind="attention",
                about="at the end: which of the two names not to say",
            ),
            Variable(
                name="name_mover",
                parents=("input", "s_inhibition"),
                compute=self._mover,
                kind="attention",
                about="at the end: the name to say",
            ),
        ]
        super().__init__(
            "ioi", variables, vocabulary=vocabulary, answers=self.names, length=self._rows.shape[1], positions=(-1,),
            about="Of two people, who is given the thing? (duplicate token, S-inhibition, name mover)",
        )  # fmt: skip

    # --- inputs

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self._fill(torch.randint(len(TEMPLATES), (n,), generator=generator), generator)

    def partners(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Inputs of the same templates: names stand at the same positions."""
        return self._fill(self.templates(inputs), generator)

    def nudged(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """The other person gives."""
        places = self._slots[self.templates(inputs)]
        rows = torch.arange(len(inputs))
        first, second, giver = (inputs[rows, places[:, k]] for k in range(3))
        changed = inputs.clone()
        changed[rows, places[:, 2]] = torch.where(giver == first, second, first)
        return changed

    def templates(self, inputs: Tensor) -> Tensor:
        """[B]: which template each input was made from (their fixed words tell)."""
        fixed = torch.ones_like(self._rows, dtype=torch.bool)
        fixed[torch.arange(len(self._rows))[:, None], self._slots] = False
        same = (inputs[:, None] == self._rows[None]) | ~fixed[None]
        return same.all(-1).float().argmax(-1)

    def positions_of(self, inputs: Tensor) -> dict[str, Tensor]:
        """[B] each: where the first, the second and the repeated name stand."""
        places = self._slots[self.templates(inputs)]
        return {name: places[:, k] for k, name in enumerate(("first", "second", "S2"))}

    def _fill(self, which: Tensor, generator: torch.Generator) -> Tensor:
        n, rows = len(which), torch.arange(len(which))
        inputs, places = self._rows[which].clone(), self._slots[which]
        names = torch.rand(n, len(self.names), generator=generator).argsort(dim=1)[:, :2]
        giver = torch.randint(2, (n,), generator=generator)
        inputs[rows, places[:, 0]], inputs[rows, places[:, 1]] = names[:, 0], names[:, 1]
        inputs[rows, places[:, 2]] = names[rows, giver]
        for column, words, start in ((3, PLACES, 0), (4, THINGS, len(PLACES))):
            code = len(self.names) + start + torch.randint(len(words), (n,), generator=generator)
            inputs[rows, places[:, column]] = code
        return inputs

    # --- variables

    def _duplicate(self, inputs: Tensor) -> Tensor:
        places, rows = self._slots[self.templates(inputs)], torch.arange(len(inputs))
        found = torch.full_like(inputs, NO_VALUE)
        giver = inputs[rows, places[:, 2]]
        found[rows, places[:, 2]] = torch.where(giver == inputs[rows, places[:, 0]], 0, 1)
        return found

    def _inhibition(self, duplicate: Tensor) -> Tensor:
        found = torch.full_like(duplicate, NO_VALUE)
        found[:, -1] = duplicate.amax(dim=1)  # there is one such name in a sentence
        return found

    def _mover(self, inputs: Tensor, inhibited: Tensor) -> Tensor:
        places, rows = self._slots[self.templates(inputs)], torch.arange(len(inputs))
        slot = 1 - inhibited[:, -1].clamp(min=0)
        found = torch.full_like(inputs, NO_VALUE)
        said = inputs[rows, places[rows, slot]]
        found[:, -1] = torch.where(inhibited[:, -1] >= 0, said, NO_VALUE)
        return found
