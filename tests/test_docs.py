"""The documentation cannot rot: snippets run, commands parse, links lead somewhere, the reference is true."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import docs_setup
from headwater.cli import app
from headwater.cli.reference import reference

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.M | re.S)
NAMED = re.compile(r"<!--\s*(?P<key>setup|not run):\s*(?P<value>.*?)\s*-->", re.S)


@dataclass(frozen=True)
class Snippet:
    language: str
    text: str
    line: int
    setups: tuple[str, ...]
    not_run: str | None


def snippets(page: str) -> list[Snippet]:
    """The fenced blocks of a page, each with the comments that stand between it and the block before it."""
    found, after = [], 0
    for match in FENCE.finditer(page):
        comments = NAMED.findall(page[after : match.start()])
        after = match.end()
        indent = match["indent"]
        text = "".join(line.removeprefix(indent) for line in match["text"].splitlines(keepends=True))
        setups = tuple(value for key, value in comments if key == "setup")
        reasons = [value for key, value in comments if key == "not run"]
        line = page.count("\n", 0, match.start()) + 2
        found.append(Snippet(match["language"], text, line, setups, reasons[-1] if reasons else None))
    return found


def run_page(page: str, name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    """Run a page's Python snippets in order in one namespace; how many ran."""
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    ran = 0
    for snippet in snippets(page):
        for setup in snippet.setups:
            namespace |= docs_setup.SETUPS[setup](monkeypatch, folder)
        if snippet.language == "python" and snippet.not_run is None:
            # Empty lines in front, so that a traceback names the page's own line.
            exec(compile("\n" * (snippet.line - 1) + snippet.text, name, "exec"), namespace)  # noqa: S102
            ran += 1
    return ran


def commands(page: str) -> list[list[str]]:
    """Each `headwater ...` line of the console blocks, as arguments."""
    lines = [line for one in snippets(page) if one.language == "console" for line in one.text.splitlines()]
    split = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [words[1:] for words in split if words and words[0] == "headwater"]


def parse(arguments: list[str]) -> None:
    """Read a command line as the program would, without running it."""
    command: Any = typer.main.get_command(app)
    name = "headwater"
    while True:
        subcommands = getattr(command, "commands", None)
        if subcommands is None or not arguments:
            command.make_context(name, list(arguments))
            return
        name, *arguments = arguments
        assert name in subcommands, f"no command {name!r}"
        command = subcommands[name]


def page_id(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(s.language == "python" and s.not_run is None for s in snippets(page.read_text()))],
    ids=page_id,
)
def test_snippets_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run_page(page.read_text(), page_id(page), monkeypatch, tmp_path) > 0


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_parse(page: Path) -> None:
    for arguments in commands(page.read_text()):
        parse(arguments)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    prose = FENCE.sub("", page.read_text())
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link and not link.startswith("#")]
    missing = [link for link in links if not (page.parent / link.split("#")[0]).exists()]
    assert missing == []


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.load((REPO / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)
    listed = {page for entry in config["nav"] for page in entry.values()}
    assert listed == {path.relative_to(REPO / "docs").as_posix() for path in PAGES[1:]}


def test_the_command_reference_is_what_the_program_says() -> None:
    written = (REPO / "docs" / "cli.md").read_text()
    assert written == reference(), "run: python -m headwater.cli.reference docs/cli.md"


def test_a_broken_snippet_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = "text\n<!-- setup: fresh -->\n```python\nx = 1\n```\n```python\nassert x == 2\n```\n"
    with pytest.raises(AssertionError):
        run_page(page, "page", monkeypatch, tmp_path)
    assert run_page(page.replace("== 2", "== 1"), "page", monkeypatch, tmp_path) == 2
    with pytest.raises(KeyError):
        run_page(page.replace("fresh", "nosuch"), "page", monkeypatch, tmp_path)


def test_a_broken_command_is_noticed() -> None:
    page = "```console\n$ headwater trace ioi --model m --out o  # a comment\nls\n```"
    assert commands(page) == [["trace", "ioi", "--model", "m", "--out", "o"]]
    parse(commands(page)[0])
    for wrong in (["trace", "--nosuch"], ["evaluate"], ["behavior", "check"]):
        with pytest.raises(Exception, match=r"No such option|Missing"):
            parse(wrong)
    with pytest.raises(AssertionError, match="no command"):
        parse(["nosuch"])
