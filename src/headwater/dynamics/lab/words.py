"""Tokenizers made here: one token a word, for generated data and for small texts."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from headwater.core.errors import MethodError

UNKNOWN, SEPARATOR = "<unk>", "<eos>"
LINE = "\n"
_WORD = re.compile(r"\w+|[^\w\s]+")  # what the pre-tokenizer `Whitespace` of the tokenizers library splits into


def words_of(text: str) -> list[str]:
    """The words and runs of punctuation of a text."""
    return _WORD.findall(text)


def vocabulary_of(texts: Iterable[str], size: int | None = None) -> list[str]:
    """The special tokens, then the words of these texts, commonest first (ties by spelling), at most `size` in all."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(words_of(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return [UNKNOWN, SEPARATOR, *ranked][: size if size is not None else len(ranked) + 2]


def word_tokenizer(words: Sequence[str], *, whole: bool = False) -> Any:
    """A `PreTrainedTokenizerFast` whose token i is `words[i]`; it adds no token of its own.

    `whole`: words are apart by spaces alone (generated data: "a b ="); else punctuation is a word of its own. Where a
    line's end is among the words it is a token, and punctuation is a word in any case. Where `<unk>` or `<eos>` are
    among the words they are the special tokens; without `<unk>` an unknown word is the first.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if not words or len(set(words)) < len(words) or any(not word.strip() and word != LINE for word in words):
        raise MethodError(
            "a vocabulary needs words, each once", got=f"{len(words)}, of them {len(set(words))} distinct"
        )
    unknown = UNKNOWN if UNKNOWN in words else words[0]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    if LINE in words:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{LINE}|{_WORD.pattern}"), "removed", invert=True)
    else:
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if whole else pre_tokenizers.Whitespace()
    special = {"unk_token": unknown} | ({"eos_token": SEPARATOR} if SEPARATOR in words else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
