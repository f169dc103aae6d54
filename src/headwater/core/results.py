"""Result: what a method returns.

Data, config and provenance that save to plain files and load back as the same type.
"""

import hashlib
import html
import importlib
import io
import math
import pkgutil
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

import polars as pl

from headwater.core.errors import StoreError
from headwater.core.files import plain, read_json, store_error, to_json, whole_folder, write_bytes
from headwater.core.registry import Registry

if TYPE_CHECKING:
    import torch

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
# Where result types live; asked only when a folder holds a kind that nothing imported so far registers. By name, so
# that no import points upwards.
_ROOMS = (
    "headwater.behavior",
    "headwater.localize",
    "headwater.claims",
    "headwater.act",
    "headwater.dynamics",
    "headwater.data",
    "headwater.bench",
)
_results: Registry["type[Result]"] = Registry("result", error=StoreError)
R = TypeVar("R", bound="type[Result]")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a result comes from.

    Kept beside the result, outside its content hash: the date is no part of what was found.
    """

    model: str | None = None
    fingerprint: str | None = None
    behavior: str | None = None
    """The behavior's hash."""
    seed: int | None = None
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict[str, str])
    date: str = ""
    seconds: float | None = None
    timings: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds of the parts that a method times on their own."""

    @classmethod
    def collect(
        cls,
        model: object = None,
        behavior: object = None,
        *,
        seed: int | None = None,
        seconds: float | None = None,
        timings: Mapping[str, float] | None = None,
    ) -> "Provenance":
        """Fill in what this process knows: model name and fingerprint, behavior hash, versions, command, date (UTC)."""
        return cls(
            model=getattr(model, "name", None),
            fingerprint=getattr(model, "fingerprint", None),
            behavior=getattr(behavior, "hash", None),
            seed=seed,
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv and sys.argv[0] else "",
            versions=_versions(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=seconds,
            timings=dict(timings or {}),
        )


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("headwater", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


class Result:
    """Tables, tensors and facts that a method found, its config, and where they come from.

    Subclasses set `kind` (the name under which the type is found again on loading) and, where a result has several
    tables, `main`: the one that `to_frame` returns. They keep this constructor and add properties. `tables` maps names
    to polars frames, `tensors` to torch tensors, `facts` and `config` hold plain JSON data.
    """

    kind: ClassVar[str] = "result"
    main: ClassVar[str | None] = None

    def __init__(
        self,
        *,
        tables: Mapping[str, pl.DataFrame] | None = None,
        tensors: "Mapping[str, torch.Tensor] | None" = None,
        facts: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        self.tables: dict[str, pl.DataFrame] = dict(tables or {})
        self.tensors: dict[str, torch.Tensor] = dict(tensors or {})
        self.facts: dict[str, Any] = dict(facts or {})
        self.config: dict[str, Any] = dict(config or {})
        self.provenance = provenance or Provenance()

    @property
    def content_hash(self) -> str:
        """sha256 of kind, config, facts, tables, tensors (not provenance); equal before saving and after loading."""
        digest = hashlib.sha256()
        digest.update(to_json([FORMAT, self.kind, self.config, self.facts], indent=None).encode())
        for name, table in sorted(self.tables.items()):
            schema = [(column, str(dtype)) for column, dtype in table.schema.items()]
            digest.update(to_json(["table", name, table.height, schema], indent=None).encode())
            for column in table.get_columns():
                # the repr of a float is its shortest exact text: as good as the bits, and NaN stays apart from null
                digest.update(repr(column.to_list()).encode())
        for name, tensor in sorted(self.tensors.items()):
            header: list[object] = ["tensor", name, str(tensor.dtype), list(tensor.shape)]
            digest.update(to_json(header, indent=None).encode())
            digest.update(_tensor_bytes({name: tensor}))
        return digest.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write the result into `folder`, whole or not at all, and return its path.

        The files: `result.json` (kind, config, facts, content hash), one Parquet file a table, `tensors.safetensors`,
        `provenance.json`. A result already saved there is replaced; any other non-empty folder is refused. Raises
        StoreError.
        """
        path = Path(folder)
        with whole_folder(path, replaces="result.json") as temporary:
            self.write_into(temporary)
        return path

    def write_into(self, folder: Path) -> None:
        """Write the files of `save` into an existing empty folder; who calls this makes it atomic."""
        for name in (*self.tables, *self.tensors):
            if not _NAME.fullmatch(name):
                raise StoreError("a table or tensor has a name that cannot be a file's", got=repr(name))
        for name, table in sorted(self.tables.items()):
            buffer = io.BytesIO()
            table.write_parquet(buffer)
            write_bytes(folder / f"{name}.parquet", buffer.getvalue())
        if self.tensors:
            write_bytes(folder / "tensors.safetensors", _tensor_bytes(self.tensors))
        head = {
            "format": FORMAT,
            "kind": self.kind,
            "config": self.config,
            "facts": self.facts,
            "tables": sorted(self.tables),
            "tensors": sorted(self.tensors),
            "content_hash": self.content_hash,
        }
        write_bytes(folder / "provenance.json", to_json(self.provenance).encode())
        write_bytes(folder / "result.json", to_json(head).encode())

    @classmethod
    def load(cls, folder: str | Path, *, check: bool = False) -> Self:
        """The result saved in `folder`, which must be of this type. `check=True` recomputes the content hash."""
        result = load_result(folder, check=check)
        if not isinstance(result, cls):
            raise StoreError(f"{folder} holds another kind of result", got=result.kind, wanted=cls.kind)
        return result

    def to_frame(self) -> pl.DataFrame:
        """The main table; where there is none, the facts as a table of one row a fact."""
        if self.main is not None and self.main in self.tables:
            return self.tables[self.main]
        if self.tables:
            return next(iter(self.tables.values()))
        return pl.DataFrame(
            {"fact": list(self.facts), "value": [to_json(value, indent=None) for value in self.facts.values()]},
            schema={"fact": pl.String, "value": pl.String},
        )

    def chart(self) -> Any:
        """The Altair chart of this kind of result. Raises StoreError where the report has none."""
        charts = importlib.import_module("headwater.report.charts")
        function = getattr(charts, self.kind, None)
        if not callable(function):
            raise StoreError(f"no chart for results of kind {self.kind!r}", fix="Use .to_frame() and draw your own")
        return function(self)

    def __repr__(self) -> str:
        shapes = [f"{name} {table.height}x{table.width}" for name, table in self.tables.items()]
        shapes += [f"{name} {list(tensor.shape)}" for name, tensor in self.tensors.items()]
        scalars = [f"{name}={_short(value)}" for name, value in self.facts.items() if _is_scalar(value)]
        return f"{type(self).__name__}({', '.join(scalars[:8] + shapes)})"

    def _repr_html_(self) -> str:
        """Chart, facts and the first rows of the main table; text escaped, as it may come from a model or a file."""
        scalars = {name: value for name, value in self.facts.items() if _is_scalar(value)}
        facts = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(_short(value))}</td></tr>"
            for name, value in scalars.items()
        )
        frame = self.to_frame().head(10)
        header = "".join(f"<th>{html.escape(column)}</th>" for column in frame.columns)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_short(cell))}</td>" for cell in row) + "</tr>"
            for row in frame.iter_rows()
        )
        return (
            f"<div><b>{html.escape(type(self).__name__)}</b>{self._drawing()}"
            f"<table>{facts}</table><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>"
        )

    def _drawing(self) -> str:
        """The chart as inline SVG; nothing for a kind without one, or for data that cannot be drawn."""
        charts = importlib.import_module("headwater.report.charts")
        try:
            return str(charts.as_svg(self))
        except Exception:  # a notebook shows the tables of a result that cannot be drawn; `.chart()` says why
            return ""


def register_result(cls: R) -> R:
    """Make a Result type known by its `kind`, so that `load_result` gives it back."""
    _results.register(cls.kind)(cls)
    return cls


def load_result(folder: str | Path, *, check: bool = False) -> Result:
    """The result saved in `folder`, as the type that saved it. `check=True` recomputes the content hash.

    Raises StoreError for a folder that holds no result, a format this version does not know, a damaged file, or an
    unknown kind.
    """
    path = Path(folder)
    head = read_json(path / "result.json", what="result.json of a saved result")
    check_format(head.get("format"), FORMAT, path)
    cls = _result_type(str(head.get("kind")))
    tables: dict[str, pl.DataFrame] = {}
    tensors: dict[str, torch.Tensor] = {}
    try:
        for name in _names(head, "tables", path):
            tables[name] = pl.read_parquet(io.BytesIO((path / f"{name}.parquet").read_bytes()))
        wanted = _names(head, "tensors", path)
        if wanted:
            import safetensors.torch

            found = safetensors.torch.load((path / "tensors.safetensors").read_bytes())
            tensors = {name: found[name] for name in wanted}
    except OSError as error:
        raise store_error(error, path, "read") from error
    except Exception as error:  # polars and safetensors raise their own types for a damaged file
        raise StoreError(
            f"a saved result in {path} is damaged", got=f"{type(error).__name__}: {error}", fix="Run the step again"
        ) from error
    result = cls(
        tables=tables,
        tensors=tensors,
        facts=cast(dict[str, Any], head.get("facts") or {}),
        config=cast(dict[str, Any], head.get("config") or {}),
        provenance=_read_provenance(path),
    )
    if check and result.content_hash != head.get("content_hash"):
        raise StoreError(
            f"the files in {path} are not what was saved",
            got=f"content hash {result.content_hash[:12]}",
            wanted=str(head.get("content_hash"))[:12],
            fix="Someone changed them: remove the folder and run the step again",
        )
    return result


def check_format(found: object, known: int, path: Path) -> None:
    """Refuse a format version that this code cannot read, with the mend."""
    if found == known:
        return
    newer = isinstance(found, int) and found > known
    raise StoreError(
        f"{path} was written in a format that this version of headwater does not read",
        got=f"format {found}",
        wanted=f"format {known}",
        fix="Update headwater" if newer else "Run again into a new folder, or read it with the version that wrote it",
    )


def _result_type(kind: str) -> "type[Result]":
    if kind == Result.kind:
        return Result
    if kind not in _results:
        for room in _ROOMS:
            package = importlib.import_module(room)
            for module in pkgutil.walk_packages(package.__path__, f"{room}."):
                importlib.import_module(module.name)
    return _results.get(kind)


def _names(head: dict[str, Any], key: str, path: Path) -> list[str]:
    """File names come from a file: none may leave its folder."""
    names = cast(list[object], head.get(key) or [])
    if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        raise StoreError(f"result.json in {path} lists {key} with unusable names", got=names)
    return cast(list[str], names)


def _read_provenance(path: Path) -> Provenance:
    file = path / "provenance.json"
    if not file.exists():
        return Provenance()
    known = {name: value for name, value in read_json(file, what="provenance.json").items() if name in _PROVENANCE}
    return Provenance(**known)


_PROVENANCE = frozenset(Provenance.__dataclass_fields__)


def _tensor_bytes(tensors: "Mapping[str, torch.Tensor]") -> bytes:
    import safetensors.torch

    # clone: safetensors refuses tensors that share memory, and a slice would drag its whole storage along
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    )


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _short(value: object) -> str:
    if isinstance(value, float):
        return "not measured" if math.isnan(value) else f"{value:.4g}"
    text = value if isinstance(value, str) else to_json(plain(value), indent=None)
    return text if len(text) <= 120 else text[:117] + "..."
