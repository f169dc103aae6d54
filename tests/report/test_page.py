"""The page: whole, offline, safe with hostile text, and still a page when stages are missing or files are broken."""

import base64
import os
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from headwater.core.errors import StoreError
from headwater.core.results import Result
from headwater.core.store import RunFolder
from headwater.report import charts, write_report
from headwater.report.blocks import source
from headwater.report.charts.claims import distinct_measures
from headwater.report.gather import Found, Gathered
from headwater.report.page import render
from headwater.report.sections import base
from headwater.report.sections.localize import handover

from . import synthetic

_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_VOID = {"meta", "link", "br", "img", "hr", "input"}


class Parsed(HTMLParser):
    """Tags, attributes and text of a page; unbalanced tags are noted."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.style = ""
        self.ids: list[str] = []
        self.unbalanced: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        self.unbalanced += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.unbalanced.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.style += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def page() -> str:
    return render(synthetic.gathered(Path("runs/ioi")))


@pytest.fixture(scope="module")
def parsed(page: str) -> Parsed:
    return Parsed(page)


def test_it_is_well_formed_and_every_link_inside_it_arrives(parsed: Parsed) -> None:
    assert parsed.unbalanced == []
    assert len(parsed.ids) == len(set(parsed.ids)), "an id stands twice"
    for _, attributes in parsed.tags:
        href = attributes.get("href") or ""
        if href.startswith("#"):
            assert href[1:] in parsed.ids
        for value in attributes.values():
            for name in re.findall(r"url\(#([^)]+)\)", value or ""):
                assert name in parsed.ids


def test_nothing_in_it_reaches_out(parsed: Parsed) -> None:
    """Links only to the run's own files, no script, no import, and a policy that forbids all requests."""
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "iframe", "img", "image", "object", "embed", "base", "form", "video", "audio")
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} has a handler {name}"
            if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background"):
                assert re.match(r"(#|data:|stages/[\w./-]+$)", value or ""), f"{tag} {name}={value!r}"
            assert name in ("xmlns", "content") or "://" not in (value or "") or name == "href"
    assert "@import" not in parsed.style
    assert "http" not in parsed.style
    policy = next(a["content"] for t, a in parsed.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy


def test_hostile_text_stays_text(page: str, parsed: Parsed) -> None:
    assert page.count("<script") == 0
    assert synthetic.HOSTILE in parsed.text
    assert "\u202e" not in page and "\x00" not in page
    assert "\\u202eeliJ" in parsed.text


@pytest.mark.parametrize("title", ["verdict", "ledger", "behavior", "patching", "attribution", "circuit"])
def test_each_section_opens_with_this_runs_numbers(page: str, title: str) -> None:
    section = re.search(rf'<section id="{title}">.*?</section>', page, re.S)
    assert section
    lead = re.search(r'<p class="lead">(.*?)</p>', section[0], re.S)
    assert lead and re.search(r"\d", lead[1]), f"the section {title} opens without a number"


def test_the_verdict_says_what_was_refuted(parsed: Parsed) -> None:
    assert "Of 8 claims about how SmolLM2-135M-Instruct does ioi, 4 survived their tests, 2 were refuted" in parsed.text
    assert "3 pairs, at least 10 are needed" in parsed.text


def test_sentences_follow_the_data() -> None:
    run = synthetic.gathered(Path("runs/ioi"), "behavior_report")
    table = run.found[0].result.tables
    table["metrics"] = table["metrics"].with_columns(
        pl.when(pl.col("metric") == "accuracy", pl.col("slice_name") == "all")
        .then(0.37)
        .otherwise(pl.col("value"))
        .alias("value")
    )
    assert "prefers the right answer on 37% of 100 prompts" in render(run)


def test_handover_names_the_layers_where_the_answer_moves() -> None:
    rows = [
        {"layer": layer, "position": position, "effect": float((position == "S2") == (layer < 5))}
        for layer in range(10)
        for position in ("S2", "END")
    ]
    assert handover(rows) == "What decides the answer sits at S2 in layers 0–4 then at END in layers 5–9."
    assert handover([row for row in rows if row["position"] == "S2"]) == ""


def test_an_example_opens_the_page(page: str, parsed: Parsed) -> None:
    top = re.search(r'<p class="example">(.*?)</p>', page, re.S)
    assert top and "<mark>Mary</mark>" in top[1] and "and not John" in top[1]
    assert "&lt;script&gt;" in top[1]
    assert "Indirect objects: how does SmolLM2-135M-Instruct do it?" in parsed.text


def test_actions_stand_beside_their_controls(parsed: Parsed) -> None:
    assert "Of 2 actions, 1 did more than every control beyond chance: knock out the name movers." in parsed.text
    assert "“random heads” by 0.2 (difference 5.9 [5.5, 6.3])" in parsed.text


def test_measures_that_came_out_the_same_are_shown_once() -> None:
    rows = [
        {"action": action, "measure": measure, "change": change}
        for measure, changes in {"metric": (1.0, 2.0), "preference": (1.0, 2.0), "accuracy": (1.0, 0.0)}.items()
        for action, change in zip("ab", changes, strict=True)
    ]
    assert distinct_measures(rows) == ["metric", "accuracy"]


def test_positions_stand_as_in_the_prompt_with_its_tokens() -> None:
    labels = base.Context(synthetic.gathered(Path("runs/ioi"))).position_labels()
    assert list(labels.values()) == ["Mary\nIO", "John\nS2", "to\nEND"]


def test_a_stage_that_found_nothing_is_not_called_missing() -> None:
    run = synthetic.gathered(Path("runs/ioi"), "ledger")
    run.facts["heads"] = {}
    text = Parsed(render(run)).text
    assert "The stage “heads” was run and left nothing to show here." in text
    assert "Not in this run yet: the stage “act”" in text


def test_every_figure_has_its_data_and_its_code(page: str) -> None:
    figures = re.findall(r"<figure.*?</figure>", page, re.S)
    assert len(figures) >= 12
    for figure in figures:
        assert "<summary>Data: " in figure and "<summary>Code</summary>" in figure
        assert 'href="stages/' in figure
        assert "<title>" in figure, "nothing to hover over"


def test_data_travels_with_the_page_and_cannot_run_in_a_spreadsheet() -> None:
    table = pl.DataFrame(
        {"prompt": ["=HYPERLINK(1)", "plain", '"q", comma'], "x": [-1.5, 2.0, None], "a": [[1], [], [2, 3]]}
    )
    found = Found(stage="behavior", name="report", result=Result(tables={"rows": table}))
    carried = source(found, "rows")
    text = base64.b64decode(carried.csv.split(",")[1]).decode()
    assert text.splitlines()[1] == "'=HYPERLINK(1),-1.5,1"
    again = pl.read_csv(text.encode())
    assert again["prompt"].to_list()[1:] == ["plain", '"q", comma']
    assert again["a"].to_list()[2] == "2; 3"
    big = pl.DataFrame({"x": list(range(200_000))})
    assert source(Found(stage="s", name="n", result=Result(tables={"rows": big})), "rows").csv == ""


OF_HISTORY = {"timeline", "data", "do_data"}


@pytest.mark.parametrize("left_out", sorted({stage for stage, _ in synthetic.MAKERS.values()} - OF_HISTORY))
def test_a_missing_stage_is_named_with_its_command(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "inline", lambda *_, **__: "<svg></svg>")  # the drawings are not what is tested here
    kinds = [kind for kind, (stage, _) in synthetic.MAKERS.items() if stage != left_out]
    text = Parsed(render(synthetic.gathered(Path("runs/ioi"), *kinds))).text
    assert f"Not in this run yet: the stage “{left_out}”" in text
    assert "headwater resume runs/ioi" in text
    assert "could not be written" not in text and "could not be drawn" not in text


def test_an_empty_run_is_a_page_too() -> None:
    text = Parsed(render(Gathered(folder=Path("runs/new"), config={"behavior": "ioi", "model": "gpt2"}))).text
    assert "Indirect objects: how does gpt2 do it?" in text
    assert text.count("Not in this run yet") >= 6


@pytest.mark.parametrize("kind", charts.KINDS)
def test_a_table_of_another_shape_costs_its_figure_not_the_page(kind: str) -> None:
    run = synthetic.gathered(Path("runs/ioi"), kind, "ledger")
    for item in run.found:
        if item.result.kind == kind:
            item.result.tables = {name: pl.DataFrame({"surprise": ["x", "y"]}) for name in item.result.tables}
            item.result.facts = {"claims": "none", "graph": 3, "tokens": 4}
    text = Parsed(render(run)).text
    assert "Getting it again" in text
    assert "The verdict" in text


def test_other_kinds_are_shown_with_their_charts_or_as_tables() -> None:
    run = synthetic.gathered(Path("runs/ioi"), "ledger", "minimality")
    unknown = synthetic.result("some_kind", {"found": [{"node": "a7.h1", "drop": 0.25}]})
    run.found.append(Found(stage="circuit", name="some_kind", result=unknown))
    text = Parsed(render(run)).text
    assert "Other results" in text and "some kind" in text and "a7.h1" in text
    assert "faithfulness lost without it" in text


def test_the_same_results_give_the_same_bytes(page: str) -> None:
    assert render(synthetic.gathered(Path("runs/ioi"))) == page


def test_no_path_of_this_machine_is_in_it(tmp_path: Path) -> None:
    assert str(tmp_path) not in render(synthetic.gathered(tmp_path / "ioi", "ledger"))


class TestRunFolder:
    def test_the_report_of_a_stored_run(self, tmp_path: Path) -> None:
        with RunFolder.create(tmp_path / "ioi", {"behavior": "ioi", "model": "tiny"}) as run:
            run.save_stage("claims", synthetic.ledger())
            path = write_report(run)
        assert path == tmp_path / "ioi" / "report.html"
        text = Parsed(path.read_text(encoding="utf-8"))
        assert "4 survived their tests" in text.text
        first = path.read_bytes()
        assert write_report(tmp_path / "ioi").read_bytes() == first
        links = [a["href"] for t, a in text.tags if t == "a" and (a.get("href") or "").startswith("stages/")]
        assert links and all((path.parent / str(link)).exists() for link in links)

    def test_a_damaged_result_is_named_and_the_rest_is_shown(self, tmp_path: Path) -> None:
        with RunFolder.create(tmp_path / "ioi", {"behavior": "ioi", "model": "tiny"}) as run:
            run.save_stage("claims", synthetic.ledger())
            run.save_stage("circuit", {"broken": Result(tables={"x": pl.DataFrame({"a": [1]})})})
        (tmp_path / "ioi/stages/circuit/broken/x.parquet").write_bytes(b"not parquet")
        text = Parsed(write_report(tmp_path / "ioi").read_text(encoding="utf-8")).text
        assert "Stage circuit, result broken: " in text and "damaged" in text
        assert "4 survived their tests" in text

    def test_no_run_is_an_error_with_its_mend(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"run\.json"):
            write_report(tmp_path)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        with RunFolder.create(tmp_path / "ioi", {"behavior": "ioi"}):
            pass
        (tmp_path / "ioi").chmod(0o500)
        with pytest.raises(StoreError, match="write"):
            write_report(tmp_path / "ioi")


def browse(html: str, folder: Path, *, width: int = 1280) -> tuple[list[str], bytes]:
    """Console messages of a headless browser on the page, and the picture it takes."""
    assert _BROWSER
    (folder / "page.html").write_text(html, encoding="utf-8")
    command = [
        _BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=2000",
        f"--screenshot={folder / 'page.png'}", f"--window-size={width},2400", (folder / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return console, (folder / "page.png").read_bytes()


def picture_rows(png: bytes) -> list[bytes]:
    """A PNG's rows as stored (filtered), of an 8-bit image."""
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert depth == 8
    data, at = b"", 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + size]
        at += size + 12
    stride = 1 + width * {2: 3, 6: 4}[kind]
    raw = zlib.decompress(data)
    return [raw[i * stride : (i + 1) * stride] for i in range(height)]


@pytest.mark.skipif(_BROWSER is None, reason="no chromium on this machine (apt-get install chromium)")
class TestBrowser:
    @pytest.mark.parametrize("width", [1280, 420])
    def test_it_loads_without_a_complaint_and_shows_something(self, page: str, tmp_path: Path, width: int) -> None:
        console, png = browse(page, tmp_path, width=width)
        assert console == []
        rows = picture_rows(png)
        assert len(set(rows)) > len(rows) / 3, "the page looks empty"

    def test_the_policy_would_have_told(self, page: str, tmp_path: Path) -> None:
        """The same page with a picture and a script from elsewhere: the browser refuses both, and says so."""
        reaching = page.replace(
            "</main>", '<img src="http://127.0.0.1:9/x.png"><script>document.title=1</script></main>'
        )
        console, _ = browse(reaching, tmp_path)
        assert any("127.0.0.1:9" in line for line in console)
        assert any("script" in line for line in console)


def test_a_model_without_its_history_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "inline", lambda *_, **__: "<svg></svg>")
    kinds = [kind for kind, (stage, _) in synthetic.MAKERS.items() if stage not in OF_HISTORY]
    page = Parsed(render(synthetic.gathered(Path("runs/ioi"), *kinds)))
    assert page.text.count("came without its training history") == 1 and "--history" in page.text
    assert "data" not in page.ids and "Not in this run yet: the stage “timeline”" not in page.text
    unfinished = synthetic.gathered(Path("runs/ioi"), *(kind for kind in kinds if kind != "ledger"))
    unfinished.facts.pop("claims")
    text = Parsed(render(unfinished)).text
    assert "Not in this run yet: the stage “timeline”" in text and "Not in this run yet: the stage “data”" in text


def test_the_history_stands_beside_the_circuit_and_in_its_own_sections(page: str, parsed: Parsed) -> None:
    circuit = page[page.index('<section id="circuit"') :]
    circuit = circuit[: circuit.index("</section>")]
    assert circuit.count("<svg") == 3 and 'href="#when"' in circuit and 'href="#data"' in circuit
    assert {"when", "data"} <= set(parsed.ids)
    assert "Half of the facts are known from about 60 [30, 110] co-occurrences on" in parsed.text
    assert "between step 16 and step 256" in parsed.text


def test_a_history_that_is_known_in_part_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "inline", lambda *_, **__: "<svg></svg>")
    of_time = [kind for kind, (stage, _) in synthetic.MAKERS.items() if stage not in ("data", "do_data")]
    assert "Give it with --corpus" in Parsed(render(synthetic.gathered(Path("runs/ioi"), *of_time))).text
    unchanged = [kind for kind, (stage, _) in synthetic.MAKERS.items() if stage != "do_data"]
    assert "The data were not changed to see" in Parsed(render(synthetic.gathered(Path("runs/ioi"), *unchanged))).text
    run = synthetic.gathered(Path("runs/ioi"), *of_time)
    run.facts["data"] = {"skipped": f"no variables {synthetic.HOSTILE}"}
    assert "No frequency link: no variables <script>" in Parsed(render(run)).text
