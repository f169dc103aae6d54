"""models: what loads by a short name, the families that are tested, and what a model looks like inside."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwater.cli.options import Json
from headwater.cli.show import show, show_json, show_rows

if TYPE_CHECKING:
    from headwater.core.anatomy.types import Block, Stack
    from headwater.core.model import Model

# The families of the conformance test (a test keeps this equal to its list); others often work, and are measured alike.
# fmt: off
FAMILIES = (
    "gpt2", "gpt_neox", "gptj", "opt", "phi", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma",
    "gemma2", "gemma3", "olmo", "olmo2", "stablelm", "granite", "gpt_oss", "bert", "modernbert", "t5", "whisper",
    "vit", "clip",
)
# fmt: on
BLOCK_SITES_ONLY = ("mamba",)

SHAPES = {
    "embed": "B T D",
    "q": "B T H K",
    "k": "B S G K",
    "v": "B S G K",
    "scores": "B H T S",
    "pattern": "B H T S",
    "z": "B T H K",
    "head": "B T H D",
    "logits": "B T V",
}


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    group = typer.Typer(invoke_without_command=True)
    group.callback()(models)
    group.command("show")(show_)
    app.add_typer(group, name="models")


def models(context: typer.Context, json: Json = False) -> None:
    """List what loads by a short name, and the families that are tested; `models show` looks inside one."""
    if context.invoked_subcommand is not None:
        return
    from headwater.core.loading import ALIASES

    rows = [{"name": name, "what": alias.summary, "hub": alias.hub} for name, alias in sorted(ALIASES.items())]
    if json:
        show_json({"models": rows, "families": FAMILIES, "block_sites_only": BLOCK_SITES_ONLY})
        return
    show_rows(rows, as_json=False)
    show("\nAlso: a hub id, a local folder, a GGUF file; in Python, a transformers model that you hold.")
    show(f"Families tested: {', '.join(FAMILIES)}.")
    show(f"With block and mixer sites only: {', '.join(BLOCK_SITES_ONLY)}. Other families are measured when they load.")


def show_(
    model: Annotated[str, typer.Argument(help="An alias, hub id, local folder or GGUF file.")], json: Json = False
) -> None:
    """Print what a model looks like inside: where each kind of site lives, as measured when it was loaded."""
    from headwater.core.loading import load

    loaded = load(model)
    facts = _facts(loaded)
    sites = [row for stack in loaded.anatomy.stacks.values() for row in _stack_rows(loaded, stack)]
    refused = [{"kind": kind, "why": why} for kind, why in sorted(loaded.anatomy.refused.items())]
    if json:
        show_json({**facts, "sites": sites, "refused": refused})
        return
    show("  ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    show("")
    show_rows(sites, as_json=False)
    if refused:
        show("")
        show_rows(refused, as_json=False, title="Not to be had in this model")


def _facts(model: "Model") -> dict[str, Any]:
    names = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_vocab", "max_length")
    facts = {name: getattr(model, name) for name in names}
    return {
        "name": model.name,
        "family": model.anatomy.family,
        **facts,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _stack_rows(model: "Model", stack: "Stack") -> Iterator[dict[str, Any]]:
    """One row a kind of site: its layers, its shape, and where it is read (`*` stands for the layer's number)."""
    layers: dict[str, list[int]] = {}
    places: dict[str, str] = {}
    for block in stack.blocks:
        for kind, present in model.anatomy.kinds(stack, block).items():
            if present:
                layers.setdefault(kind, []).append(block.index)
                places.setdefault(kind, re.sub(r"\.\d+(?=\.|$)", ".*", _place(block, kind), count=1))
    prefix = f"{stack.prefix}/" if stack.prefix else ""
    yield {"site": f"{prefix}embed", "layers": None, "shape": SHAPES["embed"], "where": "what enters the first block"}
    for kind, numbers in layers.items():
        yield {"site": prefix + kind, "layers": _ranges(numbers), "shape": _shape(kind, stack), "where": places[kind]}
    if stack is model.anatomy.main and model.anatomy.has_logits:
        yield {"site": "logits", "layers": None, "shape": SHAPES["logits"], "where": "the model's output"}


def _place(block: "Block", kind: str) -> str:
    if kind in ("resid_pre", "resid_post", "resid_mid"):
        return str({"resid_pre": block.input, "resid_post": block.output, "resid_mid": block.mid}[kind])
    part: Any = block.cross if kind.startswith("cross_") else block.attention
    match kind.removeprefix("cross_"):
        case "attn_in":
            return str(part.entry)
        case "attn_out":
            return str(part.write.port)
        case "head":
            return f"{part.out_proj_name}, a head's slice of it"
        case "mlp_in" | "mlp_out" if block.mlp is not None:
            return str(block.mlp.entry if kind == "mlp_in" else block.mlp.write.port)
        case "neurons" if block.mlp is not None:
            return str(block.mlp.neurons) if block.mlp.neurons is not None else block.mlp.experts_name
        case "mixer_in" | "mixer_out" if block.mixer is not None:
            return str(block.mixer.entry if kind == "mixer_in" else block.mixer.write.port)
        case _:
            return f"{part.name}, inside its attention function"


def _shape(kind: str, stack: "Stack") -> str:
    if kind == "neurons":
        experts = any(block.mlp is not None and block.mlp.experts is not None for block in stack.blocks)
        return "B T E M" if experts else "B T M"
    return SHAPES.get(kind.removeprefix("cross_"), "B T D")


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
