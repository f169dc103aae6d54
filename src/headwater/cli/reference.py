"""The command reference as a page of the documentation: `python -m headwater.cli.reference docs/cli.md` writes it."""

import sys
from pathlib import Path
from typing import Any

HEAD = """# The command line

Every command takes `--help`. Tables are also printed as JSON with `--json`. A mistake that can be mended ends with one
paragraph on stderr and exit code 2; Ctrl-C ends with 130 and says how to go on; a bug ends with 1 and its traceback.
Progress is shown on stderr, so stdout can be piped. This page is written by
`python -m headwater.cli.reference docs/cli.md`, and a test keeps it equal to what the program says.
"""


def reference() -> str:
    """The whole page, from the commands themselves."""
    import typer.main

    from headwater.cli.app import app

    root: Any = typer.main.get_command(app)
    return HEAD + "".join(f"\n{section}" for section in _sections(root, "headwater"))


def _sections(command: Any, name: str) -> list[str]:
    subcommands: dict[str, Any] = getattr(command, "commands", {})
    own = [] if subcommands and not command.invoke_without_command else [_section(command, name)]
    return own + [section for sub, inner in subcommands.items() for section in _sections(inner, f"{name} {sub}")]


def _section(command: Any, name: str) -> str:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    usage = [name, *(f"[{_shown(one)}]" if not one.required else _shown(one) for one in arguments)]
    usage += [f"{one.opts[0]} {_value(one)}" for one in options if one.required]
    if any(not one.required for one in options):
        usage.append("[OPTIONS]")
    rows = [(f"`{_shown(one)}`", one) for one in arguments]
    rows += [(f"`{', '.join(one.opts)}{'' if one.is_flag else ' ' + _value(one)}`", one) for one in options]
    lines = [f"## {name}", "", _one_line(command.help), "", "```text", " ".join(usage), "```", ""]
    if rows:
        lines += ["| | |", "|---|---|", *(f"| {shown} | {_about(one)} |" for shown, one in rows), ""]
    return "\n".join(lines)


def _shown(argument: Any) -> str:
    return (argument.metavar or argument.name).upper()


def _value(option: Any) -> str:
    return option.metavar or option.name.upper()


def _about(parameter: Any) -> str:
    text = _one_line(getattr(parameter, "help", None))
    default = parameter.default
    if default not in (None, False, ()) and not callable(default) and "[default" not in text:
        text += f" [default: {default}]"
    return text.replace("|", "\\|")


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference())
