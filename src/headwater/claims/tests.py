"""Tests by name: a claim stores its test's name and params, so that anyone can run it again."""

from collections.abc import Callable, Mapping
from typing import Any

from headwater.claims.claim import Claim, Outcome
from headwater.core.errors import ClaimError, did_you_mean
from headwater.core.registry import Registry


class Context(dict[str, Any]):
    """What tests may use, by name: the model, the behavior, stored results. A missing thing raises ClaimError."""

    def __missing__(self, name: str) -> Any:
        raise ClaimError("a test needs what this run has not stored", got=did_you_mean(name, self), wanted=name)


Test = Callable[..., Outcome]
_tests: Registry[Test] = Registry("test", error=ClaimError)


def test(name: str) -> Callable[[Test], Test]:
    """Register `f(context, *, seed, **params) -> Outcome` as the test of that name. Params must be plain JSON data.

    A test takes all its randomness from `seed`, so that it gives the same outcome when it is run again.
    """
    return _tests.register(name)


test.__test__ = False  # type: ignore[attr-defined]  # not for pytest to collect


def test_names() -> list[str]:
    """The names of all registered tests."""
    return _tests.names()


test_names.__test__ = False  # type: ignore[attr-defined]


def run_test(name: str, context: Mapping[str, Any], params: Mapping[str, Any], *, seed: int = 0) -> Outcome:
    """Run a registered test. Raises ClaimError for an unknown name, or params that the test does not take."""
    function = _tests.get(name)
    try:
        import inspect

        inspect.signature(function).bind(context, seed=seed, **params)
    except TypeError as error:
        raise ClaimError(f"test {name!r} does not take these params", got=error) from None
    return function(context if isinstance(context, Context) else Context(context), seed=seed, **params)


def claim_from_test(
    id: str,
    statement: str,
    test: str,
    context: Mapping[str, Any],
    params: Mapping[str, Any] | None = None,
    *,
    stage: str = "",
    seed: int = 0,
    command: str = "",
) -> Claim:
    """Run a test and return the claim with what it measured, ready to be filed."""
    claim = Claim(
        id=id, statement=statement, test=test, stage=stage, params=dict(params or {}), seed=seed, command=command
    )
    return claim.with_outcome(run_test(test, context, claim.params, seed=seed))
