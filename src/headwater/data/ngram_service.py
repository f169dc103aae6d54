"""The public n-gram service over corpora of trillions of tokens, as a client."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from headwater.core.errors import MethodError, StoreError

URL = "https://api.infini-gram.io/"


class NgramService:
    """The infini-gram service (Liu et al., 2024), or one that speaks as it does at another `url`.

    index: which of its corpora, such as "v4_dolma-v1_7_llama". Nothing is asked before a method is called. A query is a
    text, which the index's own tokenizer cuts, or that tokenizer's token ids.

    Known failure: an index has one tokenizer, mostly not your model's: ids of another one count other words. And counts
    of "A AND B" are the service's own conjunctions within a span of tokens, not sequences or documents that hold both;
    so this client does not ask for them (count them by `headwater.data.count`).
    """

    def __init__(self, index: str, *, url: str = URL, timeout: float = 30.0) -> None:
        if not url.startswith(("https://", "http://")):
            raise MethodError("the service has a web address", got=repr(url), wanted="https://...")
        self.index, self.url, self.timeout = index, url, timeout

    def count(self, query: str | Sequence[int]) -> int:
        """How often it stands in the corpus."""
        found = self._ask("count", query, "count")
        if not isinstance(found, int):
            raise self._odd({"count": found})
        return found

    def probability(self, query: str | Sequence[int], *, backoff: bool = True) -> float | None:
        """The share with which the query's last token follows the ones before; with `backoff` the longest end of them
        that is there. None where nothing is there."""
        found = self._answer("infgram_prob" if backoff else "prob", query)
        share = found.get("prob")
        if share is not None and not isinstance(share, int | float):
            raise self._odd(found)
        return None if share is None or share < 0 else float(share)

    def next(self, query: str | Sequence[int], *, backoff: bool = True) -> dict[int, tuple[str, float]]:
        """{token id: (token, share)} of what follows."""
        found = self._ask("infgram_ntd" if backoff else "ntd", query, "result_by_token_id")
        try:
            return {int(token): (str(one.get("token", "")), float(one["prob"])) for token, one in found.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._odd(found) from error

    def _ask(self, what: str, query: str | Sequence[int], field: str) -> Any:
        found = self._answer(what, query)
        if field not in found:
            raise self._odd(found)
        return found[field]

    def _answer(self, what: str, query: str | Sequence[int]) -> dict[str, Any]:
        asked: dict[str, Any] = {"index": self.index, "query_type": what}
        if isinstance(query, str):
            asked["query"] = query
        else:
            asked["query_ids"] = [int(token) for token in query]
        request = urllib.request.Request(
            self.url, json.dumps(asked).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        fix = "Look at the connection and the address, or index the corpus here (headwater.data.NgramIndex)"
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            raise StoreError(f"the n-gram service at {self.url} refused", got=f"HTTP {error.code}", fix=fix) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            raise StoreError(f"the n-gram service at {self.url} cannot be reached", got=str(reason), fix=fix) from None
        try:
            found: object = json.loads(body)
        except ValueError:
            raise self._odd(body[:80]) from None
        if not isinstance(found, dict):
            raise self._odd(found)
        if "error" in found:
            raise MethodError(
                "the n-gram service could not answer", got=str(found["error"]), wanted=f"{what} of {query}"
            )
        return found

    def _odd(self, got: object) -> StoreError:
        return StoreError(f"the n-gram service at {self.url} gave no answer that is known", got=str(got)[:200])
