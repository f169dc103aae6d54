"""Reading the files of published benchmarks: what is missing or misshapen is said with where to get it."""

import json
from pathlib import Path
from typing import Any

from headwater.core.errors import BehaviorError

_SOURCES = {
    "RAVEL": "data.tgz of github.com/explanare/ravel",
    "CausalGym": "data/templates/syntaxgym.json of github.com/aryamanarora/causalgym, or pairs in its format",
    "MIB": "the lists or exported rows of github.com/aaronmueller/MIB",
    "FIND": "find-dataset of github.com/multimodal-interpretability/FIND",
    "InterpBench": "a model folder of huggingface.co/cybershiptrooper/InterpBench",
}


def missing(benchmark: str, path: Path, wanted: str = "") -> BehaviorError:
    """The error for data that is not there: which file, from where, and where to put it."""
    return BehaviorError(
        f"{benchmark}'s data is not at {path}",
        wanted=wanted or path.name,
        fix=f"Put there {_SOURCES[benchmark]}; headwater downloads no data",
    )


def read_list(path: str | Path, benchmark: str) -> list[Any]:
    """The list in a JSON file, or the lines of a JSONL file. Raises BehaviorError."""
    path = Path(path)
    if not path.is_file():
        raise missing(benchmark, path)
    try:
        text = path.read_text(encoding="utf-8")
        whole = text.lstrip().startswith("[")
        return json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise BehaviorError(f"{path.name} is no JSON or JSONL file", got=str(error)) from None
