"""Tokenizers of three sorts: GPT-2's own, one token a character, and one token a word."""

from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_tokenizer as make_tiny


@pytest.fixture(scope="session")
def gpt2(shared_data: Path) -> Any:
    """GPT-2's real tokenizer (two-digit tokens, names are single tokens)."""
    from transformers import GPT2Tokenizer

    folder = shared_data / "tokenizers"
    if not folder.is_dir():
        pytest.skip(f"no tokenizers at {folder}")
    return GPT2Tokenizer(vocab=str(folder / "gpt2_vocab.json"), merges=str(folder / "gpt2_merges.txt"))


@pytest.fixture(scope="session")
def tiny() -> Any:
    """A byte-level BPE where known words are single tokens and digits are tokens of their own."""
    return make_tiny()


@pytest.fixture(scope="session")
def characters() -> Any:
    """One token a character of printable ASCII; anything else is unknown."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, **{chr(code): code - 31 for code in range(32, 127)}}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
