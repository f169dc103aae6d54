"""RAVEL (Huang et al., 2024): does a subspace hold one attribute of an entity, and that attribute only?

Reads the files of the published data: `ravel_DOMAIN_entity_attributes.json`, `..._attribute_to_prompts.json`,
`..._entity_to_split.json` and `..._prompt_to_split.json`.
"""

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from headwater.bench.published.files import missing
from headwater.bench.published.interchange import (
    Interchange,
    base_vectors,
    first_token,
    fit_subspace,
    known,
    source_vectors,
    swapped,
)
from headwater.bench.published.result import SCHEMA, PublishedScores, score_row
from headwater.core.errors import BehaviorError, did_you_mean
from headwater.core.files import read_json
from headwater.core.model import Model
from headwater.core.results import Provenance

_TRIED = 6  # times as many pairs are tried as asked for, of which the model must know both answers


@dataclass(frozen=True)
class Ravel:
    """One domain: entities with their attributes, prompt templates by attribute (`%s` is the entity), the splits."""

    domain: str
    attributes: dict[str, dict[str, str]]
    prompts: dict[str, list[str]]
    entity_split: dict[str, str]
    prompt_split: dict[str, str]

    @classmethod
    def load(cls, folder: str | Path, domain: str = "city") -> "Ravel":
        """Read a domain from the folder of the published files. Raises BehaviorError naming what is there."""
        folder = Path(folder)
        found = sorted(path.name[6:-23] for path in folder.glob("ravel_*_entity_attributes.json"))
        if not found:
            raise missing("RAVEL", folder, f"ravel_{domain}_entity_attributes.json and its three neighbours")
        if domain not in found:
            raise BehaviorError(f"{folder} holds no such RAVEL domain", got=domain, wanted=did_you_mean(domain, found))

        def read(name: str) -> Any:
            return read_json(folder / f"ravel_{domain}_{name}.json", what=f"RAVEL's {name}")

        return cls(
            domain,
            read("entity_attributes"),
            read("attribute_to_prompts"),
            read("entity_to_split"),
            read("prompt_to_split"),
        )

    @property
    def measured(self) -> list[str]:
        """The attributes that are asked for and that entities have values of (two of them at least)."""
        values = {name: {one[name] for one in self.attributes.values() if one.get(name)} for name in self.prompts}
        return [name for name, found in values.items() if len(found) > 1]

    def pairs(self, attribute: str, *, n: int, split: str = "test", seed: int = 0) -> list[Interchange]:
        """`n` interchanges that should cause a change and `n` that should not.

        cause: the base asks for the attribute, and the source entity's value is expected. isolate: the base asks for
        another attribute, and the base entity's own value of it is expected. In both the two entities differ in both
        attributes, and come from the split. Raises BehaviorError for an attribute that is unknown, or has no values
        (the published occupations have prompts for a gender bias and no values of it).
        """
        if attribute not in self.measured:
            raise BehaviorError(
                f"the domain {self.domain} has no values of this attribute",
                got=attribute,
                wanted=", ".join(self.measured),
            )
        rng = random.Random(f"headwater-ravel:{self.domain}:{attribute}:{split}:{seed}")
        entities = [name for name, part in self.entity_split.items() if part == split and name in self.attributes]
        others = [name for name in self.measured if name != attribute]
        templates = {
            name: [t for t in texts if self.prompt_split.get(t, split) == split] or list(texts)
            for name, texts in self.prompts.items()
        }
        made: list[Interchange] = []
        for group in ("cause", "isolate"):
            seen: set[tuple[str, str]] = set()
            for _ in range(200 * n):
                if len(seen) == n or len(entities) < 2:
                    break
                base, source = rng.sample(entities, 2)
                asked = attribute if group == "cause" else rng.choice(others)
                own, other = self.attributes[base], self.attributes[source]
                differ = all(
                    own.get(name) and other.get(name) and own[name] != other[name] for name in (attribute, asked)
                )
                template, source_template = rng.choice(templates[asked]), rng.choice(templates[attribute])
                prompt, source_prompt = template.replace("%s", base, 1), source_template.replace("%s", source, 1)
                if not differ or (prompt, source_prompt) in seen:
                    continue
                seen.add((prompt, source_prompt))
                made.append(
                    Interchange(
                        base=prompt,
                        source=source_prompt,
                        answer=spaced(prompt, own[asked]),
                        expected=spaced(prompt, other[asked] if group == "cause" else own[asked]),
                        base_end=template.index("%s") + len(base),
                        source_end=source_template.index("%s") + len(source),
                        label=own[attribute],
                        source_label=other[attribute],
                        source_answer=spaced(source_prompt, other[attribute]),
                        group=group,
                        details={"asked": asked, "entity": base, "source_entity": source},
                    )
                )
        if not made:
            raise BehaviorError("no pairs of this kind", got=f"{attribute}, split {split!r}")
        return made


def spaced(prompt: str, answer: str) -> str:
    """The answer as it follows the prompt: with a space unless the prompt ends in one or in an opening mark."""
    return answer if prompt[-1:] in (" ", "\n", '"', "'", "(", "[", "{", "/", "-") else f" {answer}"


def ravel(
    model: Model,
    data: Ravel,
    attribute: str,
    *,
    site: str,
    methods: Sequence[str] = ("full", "pca", "mean", "probe", "random"),
    bases: dict[str, torch.Tensor | None] | None = None,
    rank: int = 16,
    n: int = 64,
    n_train: int = 128,
    only_known: bool = True,
    seed: int = 0,
) -> PublishedScores:
    """Cause, isolate and disentangle scores of subspaces for one attribute, at the last token of the entity.

    After Huang et al. (2024): a share of interchanges with the attribute changed (cause), a share of those on other
    attributes left alone (isolate), and their mean (disentangle). An answer counts by its first token, where the
    published score reads the generated text. methods: baselines, fitted on the training entities; bases: subspaces of
    one's own, [R, width] by name. only_known: keep pairs whose two prompts the model answers rightly. A change of
    nothing scores 0 on cause and 1 on isolate, so that disentangle is worth something above one half only. The interval
    of disentangle takes its two parts as independent. Raises BehaviorError where nothing is left.

    Known failure: first tokens that two values share make a change look like none; and where the model knows few
    entities the pairs left are of a few famous ones.
    """
    began = time.perf_counter()
    dropped: Counter[str] = Counter()
    tested = _usable(model, data.pairs(attribute, n=n if not only_known else _TRIED * n, seed=seed), dropped)
    if only_known:
        tested = _known(model, tested, dropped)
    by_group = {group: [pair for pair in tested if pair.group == group][:n] for group in ("cause", "isolate")}
    if not all(by_group.values()):
        raise BehaviorError(
            f"the model answers too little about {attribute} for a score",
            got=f"{ {g: len(p) for g, p in by_group.items()} } pairs, dropped {dict(dropped)}",
            fix="Take another attribute, a larger n, or only_known=False",
        )
    train = data.pairs(attribute, n=n_train, split="train", seed=seed)
    x = torch.cat([base_vectors(model, site, train), source_vectors(model, site, train)])
    labels = [pair.label for pair in train] + [pair.source_label for pair in train]
    chosen = {name: fit_subspace(name, x, labels, rank=rank, seed=seed) for name in methods} | dict(bases or {})
    rows: list[dict[str, Any]] = []
    for group, pairs in by_group.items():
        source = source_vectors(model, site, pairs)
        wanted = torch.tensor([first_token(model, pair.base, pair.expected) for pair in pairs])
        for name, basis in chosen.items():
            said = swapped(model, site, pairs, basis, source=source).argmax(-1)
            rows.append(score_row(attribute, name, site, "entity", group, (said == wanted).float().tolist()))
    for name in chosen:
        parts = {row["measure"]: row for row in rows if row["method"] == name}
        cause, isolate = parts["cause"], parts["isolate"]
        half = (((cause["hi"] - cause["lo"]) ** 2 + (isolate["hi"] - isolate["lo"]) ** 2) ** 0.5) / 4
        middle = (cause["value"] + isolate["value"]) / 2
        rows.append(
            {
                **cause,
                "measure": "disentangle",
                "value": middle,
                "lo": max(0.0, middle - half),
                "hi": min(1.0, middle + half),
                "n": cause["n"] + isolate["n"],
            }
        )
    return PublishedScores(
        tables={"scores": pl.DataFrame(rows, schema=SCHEMA)},
        facts={"benchmark": "RAVEL", "domain": data.domain, "dropped": dict(dropped), "only_known": only_known},
        config={"attribute": attribute, "site": site, "rank": rank, "n": n, "n_train": n_train, "seed": seed},
        provenance=Provenance.collect(model, seed=seed, seconds=time.perf_counter() - began),
    )


def _usable(model: Model, pairs: Sequence[Interchange], dropped: Counter[str]) -> list[Interchange]:
    """Pairs whose answers are tokens of their own, and tell base and source apart where they should."""
    kept = []
    for pair in pairs:
        answer, expected = (first_token(model, pair.base, text) for text in (pair.answer, pair.expected))
        if answer is None or expected is None:
            dropped["the answer does not follow as a token of its own"] += 1
        elif pair.group == "cause" and answer == expected:
            dropped["both values begin with the same token"] += 1
        else:
            kept.append(pair)
    return kept


def _known(model: Model, pairs: Sequence[Interchange], dropped: Counter[str]) -> list[Interchange]:
    kept = [pair for pair, right in zip(pairs, known(model, pairs), strict=True) if right]
    dropped["the model does not know it"] += len(pairs) - len(kept)
    return kept
