"""EAP-IG's own code (hannamw/EAP-IG), run as it is from where HEADWATER_EAP_IG says it lies.

Two things only are put in its way: it asks for CUDA by name, which becomes the CPU, and it tokenizes text, where these
benchmarks hold token ids already. Its parameters keep their gradients, as in its own notebooks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import measure, models

VARIABLE = "HEADWATER_EAP_IG"


def available() -> bool:
    """Whether it can be run here; says what is missing."""
    place = os.environ.get(VARIABLE)
    if not place:
        print(f"EAP-IG's own code left out: {VARIABLE} does not name a folder with a checkout of hannamw/EAP-IG")
        return False
    if not (Path(place) / "src" / "eap").is_dir():
        print(f"EAP-IG's own code left out: {place} (from {VARIABLE}) has no folder src/eap")
        return False
    return measure.installed("transformer_lens", "matplotlib")


class _OnCpu(ModuleType):
    """torch as that code sees it, with "cuda" meaning the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu", **kwargs)


class EapIg:
    """The library on one GPT-2, given as transformer-lens has it."""

    def __init__(self, hf: Any) -> None:
        sys.path.insert(0, str(Path(os.environ[VARIABLE]) / "src"))
        import eap.attribute
        import eap.evaluate
        from eap.graph import Graph

        def ready(_model: Any, ids: torch.Tensor) -> Any:
            return ids, torch.ones_like(ids), torch.full((len(ids),), ids.shape[1]), ids.shape[1]

        for module in (eap.attribute, eap.evaluate):
            module.torch, module.tokenize_plus = _OnCpu("torch"), ready
        self.attribute, self.evaluate_graph = eap.attribute.attribute, eap.evaluate.evaluate_graph
        self.evaluate_baseline = eap.evaluate.evaluate_baseline
        self.model = models.hooked_gpt2(hf, use_attn_result=True, use_split_qkv_input=True, use_hook_mlp_in=True)
        self.graph = Graph.from_model(self.model)

    def scores(self, group: Any, method: str, steps: int | None = None) -> torch.Tensor:
        """[sources, readers], mean over pairs. `group`: token ids and answers of pairs of one length."""

        def loss(logits: torch.Tensor, _clean: Any, _lengths: Any, label: Any) -> torch.Tensor:
            return -_difference(logits, label).sum()

        self.model.zero_grad()
        loader = [(group.clean, group.corrupt, group)]
        self.attribute(self.model, self.graph, loader, loss, method, ig_steps=steps, quiet=True)
        return self.graph.scores.clone()

    def evaluate(self, group: Any) -> torch.Tensor:
        """[pairs]: the metric of the circuit that is in the graph."""
        loader = [(group.clean, group.corrupt, group)]
        return self.evaluate_graph(self.model, self.graph, loader, _metric, quiet=True)  # type: ignore[no-any-return]

    def faithfulness(self, group: Any, fractions: Sequence[float] | None = None) -> list[float]:
        """Of the circuit that is in the graph, or of the top edges by its scores at each size: (circuit - corrupt) /
        (clean - corrupt), which takes the metric of the whole model on both sides too.
        """
        loader = [(group.clean, group.corrupt, group)]
        clean = self.evaluate_baseline(self.model, loader, _metric, quiet=True).mean()
        corrupt = self.evaluate_baseline(self.model, loader, _metric, run_corrupted=True, quiet=True).mean()
        values = []
        for fraction in fractions or [None]:
            if fraction is not None:
                self.graph.apply_topn(int(fraction * int(self.graph.real_edge_mask.sum())), absolute=True)
            values.append(float((self.evaluate(group).mean() - corrupt) / (clean - corrupt)))
        return values

    def in_order_of(self, graph: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(sources, readers): where headwater's sources and readers stand in this library's tables."""
        nodes = self.graph.nodes
        sources = [self.graph.forward_index(nodes[name], attn_slice=False) for name in graph.sources]
        readers = []
        for name in graph.readers:
            node, _, part = name.partition("<")
            qkv = part.rstrip(">") or None
            readers.append(self.graph.backward_index(nodes[node], qkv=qkv, attn_slice=False))
        return torch.tensor(sources), torch.tensor(readers)


def _metric(logits: torch.Tensor, _clean: Any, _lengths: Any, label: Any) -> torch.Tensor:
    return _difference(logits, label)


def _difference(logits: torch.Tensor, group: Any) -> torch.Tensor:
    last = logits[:, -1]
    return (last.gather(1, group.answers) - last.gather(1, group.foils))[:, 0]
