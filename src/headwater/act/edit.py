"""Edit: a named change of a model's weights, small enough for a file, that can be put on, taken off to the bit, and
refused by any other model."""

import dataclasses
import json
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from headwater.core.errors import MethodError, StoreError
from headwater.core.files import plain, store_error, to_json, write_whole

if TYPE_CHECKING:
    from headwater.core.model import Model

FORMAT = 1
Kind = Literal["full", "low_rank", "slices"]
_PARTS: dict[str, tuple[str, ...]] = {"full": ("change",), "low_rank": ("left", "right"), "slices": ("index", "change")}


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """What is added to one parameter, in the layout in which its module stores it.

    kind: "full": `change`, of the parameter's shape · "low_rank": `left` [rows, R] @ `right` [R, columns] · "slices":
    `change`, whose axis `dim` holds the slices `index` of the parameter's (rows, columns, or experts).
    """

    parameter: str
    kind: Kind
    tensors: Mapping[str, Tensor]
    dim: int = 0

    def __post_init__(self) -> None:
        wanted = _PARTS.get(self.kind)
        if wanted is None or set(self.tensors) != set(wanted):
            raise MethodError(
                f"a change of {self.parameter} is not understood",
                got=f"{self.kind}: {', '.join(self.tensors)}",
                wanted="; ".join(f"{kind}: {', '.join(parts)}" for kind, parts in _PARTS.items()),
            )
        for name, value in self.tensors.items():
            if name != "index" and not bool(torch.isfinite(value).all()):
                raise MethodError(f"a change of {self.parameter} is not finite", fix="Make the edit weaker")
        if self.kind == "low_rank":
            left, right = self.tensors["left"], self.tensors["right"]
            if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
                got = f"{list(left.shape)} and {list(right.shape)}"
                raise MethodError(f"the factors of a change of {self.parameter} do not fit each other", got=got)
        if self.kind == "slices":
            index, change = self.tensors["index"], self.tensors["change"]
            fits = index.ndim == 1 and index.dtype == torch.int64 and 0 <= self.dim < change.ndim
            if not fits or change.shape[self.dim] != len(index) or len(index.unique()) != len(index):
                got = f"index {list(index.shape)}, change {list(change.shape)}, dim {self.dim}"
                raise MethodError(f"the slices of a change of {self.parameter} do not fit their index", got=got)

    @staticmethod
    def full(parameter: str, change: Tensor) -> "Delta":
        return Delta(parameter=parameter, kind="full", tensors={"change": change})

    @staticmethod
    def low_rank(parameter: str, left: Tensor, right: Tensor) -> "Delta":
        """`left` [rows, R] @ `right` [R, columns]."""
        return Delta(parameter=parameter, kind="low_rank", tensors={"left": left, "right": right})

    @staticmethod
    def slices(parameter: str, index: Sequence[int] | Tensor, change: Tensor, *, dim: int = 0) -> "Delta":
        """Some rows (dim 0) or columns (dim 1)."""
        where = torch.as_tensor(index, dtype=torch.int64)
        return Delta(parameter=parameter, kind="slices", tensors={"index": where, "change": change}, dim=dim)

    def check(self, parameter: Tensor) -> None:
        """Raise MethodError unless this fits the parameter."""
        shape = list(parameter.shape)
        if self.kind == "low_rank":
            fits = [self.tensors["left"].shape[0], self.tensors["right"].shape[1]] == shape
        elif self.kind == "full":
            fits = list(self.tensors["change"].shape) == shape
        else:
            index, change = self.tensors["index"], list(self.tensors["change"].shape)
            fits = len(change) == len(shape) and all(
                c == s for at, (c, s) in enumerate(zip(change, shape, strict=True)) if at != self.dim
            )
            fits = fits and (not len(index) or (int(index.min()) >= 0 and int(index.max()) < shape[self.dim]))
        if not fits:
            got = {name: list(value.shape) for name, value in self.tensors.items()}
            raise MethodError(f"a change does not fit {self.parameter}", got=got, wanted=f"shape {shape}")

    def where(self) -> tuple[slice | Tensor, ...]:
        """The index of what is changed, in the parameter."""
        if self.kind != "slices":
            return (slice(None),)
        return (*[slice(None)] * self.dim, self.tensors["index"])

    def value(self) -> Tensor:
        """What is added there, dense."""
        if self.kind == "low_rank":
            return self.tensors["left"] @ self.tensors["right"]
        return self.tensors["change"]

    def size(self, shape: Sequence[int]) -> int:
        """How many numbers of a parameter of that shape may change: of a low-rank change all those in rows and columns
        whose factors are not zero."""
        if self.kind == "low_rank":
            rows = int((self.tensors["left"] != 0).any(1).sum())
            return rows * int((self.tensors["right"] != 0).any(0).sum())
        return self.tensors["change"].numel() if self.kind == "slices" else math.prod(shape)

    @property
    def stored(self) -> int:
        """How many numbers the change takes in a file."""
        return sum(value.numel() for name, value in self.tensors.items() if name != "index")

    def times(self, factor: float) -> "Delta":
        """The change, `factor` times as strong."""
        scaled = "left" if self.kind == "low_rank" else "change"
        return dataclasses.replace(self, tensors={**self.tensors, scaled: factor * self.tensors[scaled]})

    def at_random(self, generator: torch.Generator) -> "Delta":
        """A random change of the same kind, place, rank and Frobenius norm."""

        def draw(like: Tensor) -> Tensor:
            noise = torch.randn(like.shape, generator=generator, dtype=torch.float64)
            return noise * (like != 0).cpu()  # what is left alone stays so

        made = {name: value if name == "index" else draw(value) for name, value in self.tensors.items()}
        fresh = dataclasses.replace(self, tensors=made)
        wanted, norm = float(self.value().double().norm()), float(fresh.value().norm())
        scaled = fresh.times(wanted / norm if norm else 0.0)
        return dataclasses.replace(
            self, tensors={name: value.to(self.tensors[name]) for name, value in scaled.tensors.items()}
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """A named set of changes of weights, made for one model.

    deltas: what is added, in order; several may change one parameter.
    fingerprint, model: of the model it was made for, as it was then. Any other refuses it.
    config: how it was made, as plain data.
    """

    name: str
    deltas: tuple[Delta, ...]
    fingerprint: str
    model: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.deltas:
            raise MethodError(f"the edit {self.name!r} changes nothing", wanted="at least one change of a parameter")

    @staticmethod
    def of(model: "Model", name: str, deltas: Sequence[Delta], **config: Any) -> "Edit":
        """An edit for a loaded model; each change is checked against its parameter. Raises MethodError."""
        made = Edit(
            name=name, deltas=tuple(deltas), fingerprint=model.fingerprint, model=model.name, config=plain(config)
        )
        made.sizes(model)
        return made

    @property
    def parameters(self) -> list[str]:
        """The parameters that it changes."""
        return list(dict.fromkeys(delta.parameter for delta in self.deltas))

    def sizes(self, model: "Model") -> dict[str, int]:
        """For each parameter, how many of its numbers may change. Raises MethodError where a change does not fit."""
        from headwater.act.applying import parameters_of

        known = parameters_of(model.hf, self.parameters)
        found: dict[str, int] = {}
        for delta in self.deltas:
            parameter = known[delta.parameter]
            delta.check(parameter)
            more = found.get(delta.parameter, 0) + delta.size(parameter.shape)
            found[delta.parameter] = min(parameter.numel(), more)
        return found

    def n_weights(self, model: "Model") -> int:
        """How many weights of the model it may change."""
        return sum(self.sizes(model).values())

    @property
    def norm(self) -> float:
        """The Frobenius norm of all changes, each on its own."""
        return math.sqrt(sum(float(delta.value().double().square().sum()) for delta in self.deltas))

    def scaled(self, factor: float) -> "Edit":
        """The same edit, `factor` times as strong."""
        deltas = tuple(delta.times(factor) for delta in self.deltas)
        return dataclasses.replace(self, name=f"{self.name} x {factor:g}", deltas=deltas)

    def at_random(self, seed: int) -> "Edit":
        """Changes of the same parameters, places, ranks and norms in random directions: what any change of that size
        would do."""
        generator = torch.Generator().manual_seed(seed)
        deltas = tuple(delta.at_random(generator) for delta in self.deltas)
        return dataclasses.replace(self, name=f"{self.name}, in random directions", deltas=deltas)

    def apply(self, model: "Model") -> None:
        """Change the model for good, until `undo(model)`. Raises ModelError for another model, or one whose weights
        something else has changed."""
        from headwater.act.applying import apply

        apply(model, self)

    @contextmanager
    def applied(self, model: "Model") -> Generator["Model"]:
        """The model is changed while this block lasts, and afterwards the same to the bit; runs in other threads
        wait."""
        from headwater.act.applying import apply, undo

        with model.held():
            apply(model, self)
            try:
                yield model
            finally:
                undo(model, self)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: the changes as tensors, all else as JSON in its header."""
        return save_tensors(Path(path), {"kind": "edit", **self.as_json()}, self.tensors())

    @staticmethod
    def load(path: str | Path) -> "Edit":
        """Read a file that `save` wrote (of an action with an edit: its edit). Raises StoreError."""
        facts, tensors = load_tensors(Path(path))
        if facts.get("kind") == "action":
            facts = facts.get("edit") or {}
        if "deltas" not in facts:
            raise StoreError(f"{path} holds no edit of weights", got=facts.get("kind", "an action of another sort"))
        return Edit.from_json(facts, tensors, str(path))

    # --- as plain data ------------------------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """Everything but the tensors."""
        deltas = [{"parameter": one.parameter, "kind": one.kind, "dim": one.dim} for one in self.deltas]
        return plain(
            {
                "name": self.name,
                "fingerprint": self.fingerprint,
                "model": self.model,
                "config": self.config,
                "deltas": deltas,
            }
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in a file: `edit.<delta>.<part>`."""
        return {
            f"edit.{at}.{name}": value.detach().cpu().contiguous()
            for at, delta in enumerate(self.deltas)
            for name, value in delta.tensors.items()
        }

    @staticmethod
    def from_json(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> "Edit":
        """The edit of `as_json` and `tensors`. Raises StoreError where they are not whole."""
        try:
            deltas = tuple(
                Delta(
                    parameter=str(one["parameter"]),
                    kind=one["kind"],
                    dim=int(one["dim"]),
                    tensors={name: tensors[f"edit.{at}.{name}"] for name in _PARTS[one["kind"]]},
                )
                for at, one in enumerate(facts["deltas"])
            )
            return Edit(
                name=str(facts["name"]),
                deltas=deltas,
                fingerprint=str(facts["fingerprint"]),
                model=str(facts["model"]),
                config=dict(facts["config"]),
            )
        except (KeyError, TypeError, ValueError, MethodError) as error:
            raise StoreError(f"{where} does not hold a whole edit", got=f"{type(error).__name__}: {error}") from None


def save_tensors(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a safetensors file, whole or not at all, with JSON facts in its header. Raises StoreError."""
    from safetensors.torch import save

    text = to_json({"format": FORMAT, **facts}, indent=None)
    write_whole(path, save({name: value.contiguous() for name, value in tensors.items()}, {"headwater": text}))
    return path


def load_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a file that `save_tensors` wrote. Raises StoreError."""
    import safetensors

    if path.is_dir():
        raise StoreError("a folder is no file of an edit", got=path, wanted="a safetensors file of `headwater act`")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("headwater")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(text) if text is not None else None
    except OSError as error:
        raise store_error(error, path, "read") from error
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise StoreError(f"{path} cannot be read as an edit", got=error) from None
    if not isinstance(facts, dict):
        raise StoreError(f"{path} was not written by headwater", wanted="a file of `headwater act` or Edit.save")
    if facts.get("format") != FORMAT:
        raise StoreError(f"{path} has another format", got=facts.get("format"), wanted=FORMAT)
    return facts, tensors
