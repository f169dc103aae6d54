"""Relations: subjects, objects and prompts, as the data of Hernandez et al. (2024) lays them out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from headwater.core.errors import BehaviorError
from headwater.core.files import read_json


@dataclass(frozen=True, kw_only=True)
class Relation:
    """A relation. samples: (subject, object) pairs. templates: prompts with one `{}` for the subject, answered by the
    object."""

    name: str
    templates: tuple[str, ...]
    samples: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        for template in self.templates:
            if template.count("{}") != 1:
                raise BehaviorError(f"a template of {self.name!r} has one place for the subject", got=repr(template))
        if not self.templates or len(self.samples) < 2:
            raise BehaviorError(
                f"{self.name!r} is no relation", got=f"{len(self.samples)} samples", wanted="two or more"
            )

    @classmethod
    def load(cls, path: str | Path) -> "Relation":
        """A relation from its JSON: `name`, `prompt_templates`, `samples` of `subject` and `object`.

        Raises StoreError for a file that cannot be read, BehaviorError for one that holds no relation.
        """
        file = Path(path)
        whole = read_json(file, what="a relation")
        templates, samples = whole.get("prompt_templates"), whole.get("samples")
        if not isinstance(templates, list) or not isinstance(samples, list):
            raise BehaviorError(f"{file} holds no relation", wanted="prompt_templates and samples")
        pairs: dict[tuple[str, str], None] = {}
        for one in cast(list[Any], samples):
            if not isinstance(one, dict) or not all(isinstance(one.get(key), str) for key in ("subject", "object")):
                raise BehaviorError(f"a sample in {file} is no pair", got=repr(one))
            pairs[one["subject"], one["object"]] = None
        return cls(name=str(whole.get("name", file.stem)), templates=tuple(map(str, templates)), samples=tuple(pairs))

    def prompt(self, subject: str, examples: Sequence[tuple[str, str]], template: str) -> tuple[str, int, int]:
        """(prompt, first and last character of the subject in it): a line an example, then the question.

        The example of the same subject is left out.
        """
        first, _, then = template.partition("{}")  # no `format`: other braces of a template are text
        before = "".join(f"{first}{s}{then} {o}\n" for s, o in examples if s != subject) + first
        return before + subject + then, len(before), len(before) + len(subject)
