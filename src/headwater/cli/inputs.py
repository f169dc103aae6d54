"""What several commands are given: a tokenizer by name, token ids, a model with the run that it is of."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater.core.model import Model


def tokenizer_named(name: str) -> Any:
    """A tokenizer from a folder or a hub id. Raises ModelError."""
    from transformers import AutoTokenizer

    from headwater.core.errors import ModelError

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load a tokenizer from {name}", got=str(error).splitlines()[0]) from None


def ids_of(text: str) -> list[int]:
    """Token ids that were typed, apart by blanks or commas. Raises MethodError."""
    from headwater.core.errors import MethodError

    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise MethodError("--ids takes numbers", got=repr(text), wanted="such as '12 7 300'") from None


def model_and_corpus(name: str, corpus: str | None) -> "tuple[Model, str]":
    """A model, and what it was trained on: `corpus`, else the run that it is the last checkpoint, or a checkpoint, of.

    Raises MethodError for a model of no run without a corpus.
    """
    from headwater.core.errors import MethodError
    from headwater.core.loading import load

    whole, of = ((folder / "train.json").exists() for folder in (Path(name), Path(name).parent))
    if corpus is None and not (whole or of):
        raise MethodError("whose sequences are to be searched?", got=name, fix="Give --corpus: token ids, or a run")
    read = corpus if corpus is not None else name if whole else str(Path(name).parent)
    if whole:
        from headwater.dynamics import TrainingRun

        return TrainingRun.open(name).load(), read
    return load(name), read
