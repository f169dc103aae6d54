"""RASP to transformer, as Tracr does (Lindner et al., 2023): the list of passes, and what comes out.

infer bases -> lower to heads and neurons -> lay out -> assemble weights -> name the mechanism
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwater.bench.rasp.assembly import assemble, check_words
from headwater.bench.rasp.bases import infer_bases, ordered
from headwater.bench.rasp.interpreter import evaluate
from headwater.bench.rasp.language import RaspError, SOp, exact
from headwater.bench.rasp.layout import lay_out
from headwater.bench.rasp.lowering import lower
from headwater.bench.rasp.words import NONE, make_tokenizer, word

if TYPE_CHECKING:
    from headwater.bench.mechanism import TrueMechanism
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """max_length: most tokens of an input, without the beginning-of-sequence token; the model holds for these.

    causal: no position looks at a later one. sharpness: score of a selected position (0: of any other), so that
    attention is off by about e^-sharpness/2. spare_heads (a layer), spare_neurons, scratch: heads and neurons without a
    task, and the directions they write to. seed: of their weights.
    """

    max_length: int = 7
    causal: bool = False
    sharpness: float = 100.0
    spare_heads: int = 1
    spare_neurons: int = 4
    scratch: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_length < 7:
            raise RaspError(
                "max_length is too small", got=self.max_length, wanted="at least 7, as models are probed on 7"
            )
        if self.sharpness < 20 or min(self.spare_heads, self.spare_neurons) < 0 or self.scratch < 1:
            raise RaspError(
                "a compile config does not fit",
                got=f"sharpness={self.sharpness}, spare_heads={self.spare_heads}, "
                f"spare_neurons={self.spare_neurons}, scratch={self.scratch}",
                wanted="sharpness of at least 20 (less would blur what is selected), scratch of at least 1",
            )


@dataclass(eq=False)
class Compiled:
    """A program, the transformer that computes it, and the mechanism by which it does.

    hf, tokenizer: a transformers model and tokenizer like any other. answers: the values the program may have.
    """

    name: str
    program: SOp
    vocabulary: tuple[Any, ...]
    answers: tuple[Any, ...]
    config: CompileConfig
    hf: Any
    tokenizer: Any
    mechanism: "TrueMechanism"
    _model: "Model | None" = field(default=None, repr=False)

    @property
    def model(self) -> "Model":
        """The model in headwater, named after the program."""
        if self._model is None:
            from headwater.core.model import Model

            self._model = Model(self.hf, self.tokenizer, name=f"rasp-{self.name}")
        return self._model

    def interpret(self, inputs: Sequence[Any]) -> list[Any]:
        """What the program means: its value at each position."""
        return evaluate(self.program, inputs, causal=self.config.causal)

    def ids(self, inputs: Sequence[Any]) -> list[int]:
        """Token ids of an input, the beginning-of-sequence token first. Raises RaspError for what no input may be."""
        known = self.tokenizer.get_vocab()
        inputs = [exact(value) for value in inputs]
        strange = [value for value in inputs if value not in self.vocabulary]
        if strange or not 1 <= len(inputs) <= self.config.max_length:
            raise RaspError(
                f"{self.name} was not compiled for this input",
                got=f"{len(inputs)} tokens" + (f", among them {strange[0]!r}" if strange else ""),
                wanted=f"1 to {self.config.max_length} of {', '.join(map(str, self.vocabulary))}",
            )
        return [self.tokenizer.bos_token_id, *(known[word(value)] for value in inputs)]

    def logits(self, inputs: Sequence[Sequence[Any]]) -> Tensor:
        """[inputs, positions, V] of inputs of one length, without the beginning-of-sequence position."""
        ids = torch.tensor([self.ids(one) for one in inputs], device=next(self.hf.parameters()).device)
        with torch.inference_mode():
            return self.hf(input_ids=ids).logits[:, 1:]

    def outputs(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """What the model says at each position of each input (all of one length)."""
        names = {index: name for name, index in self.tokenizer.get_vocab().items()}
        values: dict[str, Any] = {word(value): value for value in self.answers} | {NONE: None}
        said = self.logits(inputs).argmax(dim=-1).tolist()
        return [[values.get(names[token], names[token]) for token in row] for row in said]

    def prompt(self, inputs: Sequence[Any]) -> str:
        """The input as text, which the tokenizer reads."""
        return " ".join(word(value) for value in inputs)

    def mistakes(self, inputs: Iterable[Sequence[Any]]) -> list[tuple[list[Any], list[Any], list[Any]]]:
        """(input, interpreter, model) wherever the two differ: empty for a model that is right.

        Inputs on which the program has no meaning (see `evaluate`) are left out.
        """
        found = []
        groups: dict[int, list[tuple[list[Any], list[Any]]]] = {}
        for one in inputs:
            try:
                groups.setdefault(len(one), []).append((list(one), self.interpret(one)))
            except RaspError:
                continue
        for group in groups.values():
            said = self.outputs([one for one, _ in group])
            found += [(one, meant, got) for (one, meant), got in zip(group, said, strict=True) if meant != got]
        return found

    def save(self, folder: str | Path) -> Path:
        """Write model, tokenizer and mechanism: `headwater.load(folder)` reads the model, `truth.load` all of it."""
        from headwater.core.loading_hf import calm

        path = Path(folder)
        with calm():
            self.hf.save_pretrained(path)
            self.tokenizer.save_pretrained(path)
        self.mechanism.save(path / "mechanism")
        return path


def compile_program(
    program: SOp, vocabulary: Iterable[Any], *, name: str = "program", config: CompileConfig | None = None
) -> Compiled:
    """Compile a program for inputs of these tokens. Raises RaspError, naming the expression that cannot be compiled."""
    from headwater.bench.mechanism import name_mechanism

    config = config or CompileConfig()
    tokens = ordered(vocabulary)
    if not isinstance(program, SOp):
        wanted = "a sequence operation, such as Aggregate(selector, tokens)"
        raise RaspError("a program gives a value at each position", got=type(program).__name__, wanted=wanted)
    if not tokens:
        raise RaspError("a program needs a vocabulary", wanted="at least one token")
    bases = infer_bases(program, tokens, config.max_length)
    output = bases[program]
    check_words(tokens, output)
    lowered = lower(program, bases, config.sharpness)
    layout = lay_out(
        lowered, spare_heads=config.spare_heads, spare_neurons=config.spare_neurons, scratch=config.scratch
    )
    tokenizer = make_tokenizer([*tokens, *output.listed])
    hf = assemble(
        layout,
        output,
        tokenizer.get_vocab(),
        max_length=config.max_length,
        causal=config.causal,
        seed=config.seed,
    )
    mechanism = name_mechanism(name, layout, output, tokens, config=asdict(config), causal=config.causal)
    return Compiled(name, program, tokens, output.listed, config, hf, tokenizer, mechanism)


def all_inputs(vocabulary: Sequence[Any], longest: int, *, shortest: int = 1) -> Iterator[tuple[Any, ...]]:
    """Every input of these tokens from `shortest` to `longest`."""
    for length in range(shortest, longest + 1):
        yield from itertools.product(vocabulary, repeat=length)
