"""Running Python source that headwater itself has written: checked against a short list of what it may hold, then run
with the few built-in functions it needs and nothing else."""

import ast
from collections.abc import Callable
from typing import Any

from headwater.core.errors import MethodError

_NODES = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Assign, ast.AugAssign, ast.Expr, ast.For),
    *(ast.If, ast.IfExp, ast.Call, ast.Name, ast.Load, ast.Store, ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Set),
    *(ast.Subscript, ast.Slice, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop),
    *(ast.cmpop, ast.GeneratorExp, ast.ListComp, ast.comprehension, ast.keyword, ast.Lambda),
)
_BUILTINS = {
    f.__name__: f for f in (abs, enumerate, int, len, list, max, min, range, reversed, sum, tuple, zip, sorted, bool)
}
_METHODS = ("append", "get", "index")


def check_source(source: str) -> ast.Module:
    """The parsed source, if it holds nothing but functions, loops, arithmetic and tables. Raises MethodError."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise MethodError("a generated program is not Python", got=str(error)) from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            allowed = node.attr in _METHODS
        elif isinstance(node, ast.Name):
            allowed = not node.id.startswith("__")
        else:
            allowed = isinstance(node, _NODES)
        if not allowed:
            raise MethodError(
                "a program holds what generated programs never do",
                got=f"{ast.unparse(node)!r} on line {getattr(node, 'lineno', '?')}",
                wanted="functions, loops, arithmetic and tables only",
            )
    return tree


def load_function(source: str, name: str) -> Callable[..., Any]:
    """The function `name` that the source defines, run without access to anything but a dozen plain built-ins.

    For source that headwater wrote. The check keeps a stored program from doing anything but compute when it is loaded
    again; it is no sandbox against programs that run forever. Raises MethodError.
    """
    tree = check_source(source)
    namespace: dict[str, Any] = {"__builtins__": dict(_BUILTINS)}
    exec(compile(tree, "<generated>", "exec"), namespace)  # noqa: S102 (checked above, and our own)
    function = namespace.get(name)
    if not callable(function):
        raise MethodError(f"the source defines no function {name!r}")
    return function
