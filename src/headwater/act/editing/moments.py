"""Second moments of what a matrix reads, over a text corpus: kept on disk for each model, as they take a while."""

import hashlib
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwater.act.edit import load_tensors, save_tensors
from headwater.act.measuring import plain_texts
from headwater.core.cache import cache_root
from headwater.core.errors import MethodError, StoreError
from headwater.core.progress import track

if TYPE_CHECKING:
    from headwater.core.model import Model

_LONGEST = 256  # tokens of a piece
_PIECE = 800  # characters of a piece before it is cut into tokens
_CHARACTERS = 20  # characters read for each token that is asked for, at most
_AT_ONCE = 4  # pieces a forward


def second_moments(
    model: "Model",
    layers: Sequence[int],
    corpus: str | Path | None = None,
    *,
    tokens: int = 10_000,
    cache: str | Path | None = None,
) -> dict[int, Tensor]:
    """E[k k^T] of each layer's neurons k [M, M] (float64), over the first `tokens` tokens of a corpus.

    corpus: a text file; None is the package's own few paragraphs, which are too few for a wide model. The first token
    of a piece is left out, as its values are far out of line. Moments are kept in the cache folder (`cache`, else
    `$HEADWATER_CACHE`, else the platform's) by the model's fingerprint, the text and the number of tokens.

    Raises MethodError for a corpus that cannot be read or is empty.
    """
    from headwater.act.editing.parts import mlp_of

    for layer in layers:
        mlp_of(model, layer)
    ids = _pieces(model, corpus, tokens)
    total = sum(len(piece) - 1 for piece in ids)
    said = hashlib.sha256(b"".join(piece.to(torch.int64).numpy().tobytes() for piece in ids)).hexdigest()[:16]
    folder = cache_root(cache) / "moments" / model.fingerprint
    files = {layer: folder / f"neurons.{layer}-{said}.safetensors" for layer in layers}
    found = {layer: moment for layer, file in files.items() if (moment := _stored(file)) is not None}
    missing = [layer for layer in layers if layer not in found]
    if missing:
        made = _measure(model, missing, ids)
        for layer in missing:
            found[layer] = made[layer] / total
            save_tensors(files[layer], {"kind": "moment", "tokens": total}, {"moment": found[layer]})
    return found


def _measure(model: "Model", layers: list[int], ids: list[Tensor]) -> dict[int, Tensor]:
    sites = {layer: f"neurons.{layer}" for layer in layers}
    sums: dict[int, Tensor] = {}
    batches = [
        group[start : start + _AT_ONCE]
        for length in sorted({len(piece) for piece in ids})
        for group in [[piece for piece in ids if len(piece) == length]]
        for start in range(0, len(group), _AT_ONCE)
    ]
    for batch in track(batches, "second moments"):
        run = model.run(torch.stack(batch), capture=list(sites.values()), logits="none")
        for layer, site in sites.items():
            keys_NM = run[site][:, 1:].flatten(0, 1).double()
            sums[layer] = sums.get(layer, 0.0) + keys_NM.T @ keys_NM
    return {layer: value.cpu() for layer, value in sums.items()}


def _pieces(model: "Model", corpus: str | Path | None, tokens: int) -> list[Tensor]:
    """Token ids of pieces of text, `tokens` in all but their first."""
    if corpus is None:
        whole = " ".join(plain_texts())
    else:
        try:
            with Path(corpus).expanduser().open(encoding="utf-8") as file:
                whole = file.read(_CHARACTERS * tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise MethodError(f"cannot read the corpus {corpus}", got=error, wanted="a text file") from None
    texts = textwrap.wrap(" ".join(whole.split()), _PIECE, break_on_hyphens=False)
    longest = min(_LONGEST, model.max_length or _LONGEST)
    found: list[Tensor] = []
    left = tokens
    for text in texts:
        # Not model.tokens: a piece may be longer than the context before it is cut.
        for piece in torch.as_tensor(model.tokenizer(text)["input_ids"], dtype=torch.long).split(longest):
            piece = piece[: left + 1]
            if len(piece) > 1 and left > 0:
                found.append(piece)
                left -= len(piece) - 1
        if left <= 0:
            break
    if not found:
        raise MethodError("the corpus has no text of two tokens", got=str(corpus or "plain texts"))
    return found


def _stored(file: Path) -> Tensor | None:
    try:
        return load_tensors(file)[1].get("moment")
    except StoreError:
        return None
