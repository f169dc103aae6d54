"""Arithmetic: "12+35=" -> "47", written without spaces so that digits are the next token in every tokenizer."""

import random

from headwater.behavior.generators import Made, Pair, draw, generator, one_of, whole

_SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b}


@generator("arithmetic")
def arithmetic(n: int | None, rng: random.Random, *, digits: int = 2, operation: str = "+", shots: int = 2) -> Made:
    """Arithmetic: sums and differences of one- and two-digit numbers.

    The counterfactual changes one operand, so that the result begins with another digit and is the foil. What is scored
    is the first token of the result: all of it where the tokenizer has the number, else its first digit. Positions a,
    b and END (the equals sign); slices by operation and number of digits of the result. Train and test share no pair of
    operands, whichever way round.

    Options
    -------
    digits: digits of each operand, 1 or 2.
    operation: "+", "-" or "both".
    shots: how many solved examples stand before the question (0 to 8).
    """
    whole("digits", digits, 1, 2)
    one_of("operation", operation, ("+", "-", "both"))
    whole("shots", shots, 0, 8)
    low, high = (0, 9) if digits == 1 else (10, 99)
    signs = tuple(_SIGNS) if operation == "both" else (operation,)

    def operands(rng: random.Random, sign: str) -> tuple[int, int]:
        a, b = rng.randint(low, high), rng.randint(low, high)
        return (max(a, b), min(a, b)) if sign == "-" else (a, b)

    def side(a: int, b: int) -> str:
        # Which split an unordered pair of operands belongs to: half of them each, by the same rule for every seed.
        return ("train", "test")[(7 * (a + b) + 3 * a * b + abs(a - b)) // 2 % 2]

    def make(index: int, split: str, rng: random.Random) -> Pair | None:
        sign = rng.choice(signs)
        solve = _SIGNS[sign]
        a, b = operands(rng, sign)
        c = rng.randint(low, high)
        if side(a, b) != split or side(a, c) != split or (sign == "-" and c > a):
            return None
        right, wrong = str(solve(a, b)), str(solve(a, c))
        if right[0] == wrong[0]:
            return None
        shown = ""
        for _ in range(shots):
            x, y = operands(rng, sign)
            if {x, y} in ({a, b}, {a, c}):
                return None
            shown += f"{x}{sign}{y}={solve(x, y)}\n"
        prompt = f"{shown}{a}{sign}{b}="
        at = len(shown)
        middle = at + len(f"{a}{sign}")
        return Pair(
            prompt=prompt,
            counterfactual=f"{shown}{a}{sign}{c}=",
            answers=[right],
            foils=[wrong],
            positions={
                "a": (at, at + len(str(a))),
                "b": (middle, len(prompt) - 1),
                "END": (len(prompt) - 1, len(prompt)),
            },
            variables={"a": a, "b": b, "operation": sign, "result": int(right)},
            template=f"{digits}-digit",
            split=split,
            slices={"operation": sign, "result_digits": str(len(right))},
        )

    return Made(pairs=draw(100 if n is None else n, rng, make, name="arithmetic"))
