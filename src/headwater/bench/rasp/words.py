"""The tokenizer of a compiled model: one word a token, apart by spaces, the beginning-of-sequence token in front."""

from collections.abc import Iterable
from typing import Any

from headwater.bench.rasp.language import RaspError, exact

UNKNOWN, BOS, NONE = "<unk>", "<bos>", "<none>"
"""<none> is what the model says where the program's value is undefined."""


def word(value: Any) -> str:
    """How a value is spelled: `3`, `1/2`, `True`, `a`, `<none>`. Raises RaspError for what is no single word."""
    if value is None:
        return NONE
    text = str(exact(value))
    if not text or text.split() != [text]:
        raise RaspError(
            "a token or an answer has to be one word", got=repr(value), fix="Map it to a text without spaces"
        )
    return text


def make_tokenizer(values: Iterable[Any]) -> Any:
    """A `PreTrainedTokenizerFast` over the words of these values (each once) after the three special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = dict.fromkeys([UNKNOWN, BOS, NONE, *(word(value) for value in values)])
    vocabulary = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN,
        bos_token=BOS,
        clean_up_tokenization_spaces=False,
    )
