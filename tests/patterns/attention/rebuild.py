"""Put a plain formula, made of nothing but a candidate's fields, in place of each attention: then compare the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tests.patterns.zoo import Captured
from varlen_inductor.patterns.attention import Candidate, Rejected, find_candidates
from varlen_inductor.patterns.functionalise import functionalise
from varlen_inductor.patterns.simplify import drop_unused

Tensor = torch.Tensor


class Detected(Captured):
    """A backend that finds attention, keeps what was found, and runs the graph with a formula in place of each."""

    def __init__(self) -> None:
        super().__init__(functionalise, self.replace)
        self.candidates: list[Candidate] = []
        self.rejected: list[Rejected] = []
        self.text = ""

    def replace(self, gm: fx.GraphModule) -> None:
        candidates, rejected = find_candidates(gm)
        self.text = "\n".join(c.describe() for c in candidates)
        self.candidates += candidates
        self.rejected += rejected
        for candidate in candidates:
            put_formula(gm, candidate)
        gm.recompile()

    @property
    def reasons(self) -> list[str]:
        return [r.reason for r in self.rejected]


def put_formula(gm: fx.GraphModule, candidate: Candidate) -> None:
    """Replace the candidate's output, and check that its interior is then gone."""
    masks = [(op.kind, op.mask, op.value) for op in candidate.mask_ops]
    tensors = (candidate.query, candidate.key, candidate.value)
    with gm.graph.inserting_before(candidate.output):
        new = gm.graph.call_function(formula_of(candidate), (*tensors, masks))
    new.meta["val"] = candidate.output.meta["val"]
    candidate.output.replace_all_uses_with(new)
    # What draws random numbers is not dropped for being unused, so it has to go by name.
    interior = set(candidate.interior)
    for node in reversed([n for n in gm.graph.nodes if n in interior or interior & set(n.all_input_nodes)]):
        if node in interior or not node.users:
            gm.graph.erase_node(node)
    drop_unused(gm.graph)


def formula_of(candidate: Candidate) -> Callable[..., Tensor]:
    """softmax(scale * q k^T, capped, masked) v, as the fields say it."""
    scale, groups, layout, softcap = candidate.scale, candidate.kv_groups, candidate.layout, candidate.softcap
    dropout_p, is_causal, sdpa = candidate.dropout_p, candidate.is_causal, candidate.spelling == "sdpa"

    def formula(query: Tensor, key: Tensor, value: Tensor, masks: list[tuple[str, Tensor, Any]]) -> Tensor:
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.matmul(query, key.transpose(-2, -1)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        shape = scores.shape
        # Only how the dimensions are put together, not the sizes: those may be symbols of the graph.
        if len(layout.dims) == 4 and scores.dim() == 3:
            scores = scores.unflatten(0, (-1, int(layout.sizes["h"])))
        elif len(layout.dims) == 3 and scores.dim() == 4:
            scores = scores.flatten(0, 1)
        for kind, mask, fill in masks:
            scores = apply(kind, scores, mask, fill)
        if is_causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
        weights = torch.softmax(scores.float(), -1).to(value.dtype).view(shape)
        if sdpa:
            weights = weights.nan_to_num()
        return torch.matmul(torch.nn.functional.dropout(weights, dropout_p), value)

    return formula


def apply(kind: str, scores: Tensor, mask: Tensor, value: Any) -> Tensor:
    if kind == "bool":
        return scores.masked_fill(~mask, -math.inf)
    if kind == "add":
        return scores + mask
    if kind == "fill":
        return scores.masked_fill(mask, value)
    assert kind == "where_keep"
    return torch.where(mask, scores, value)


def detect(model: Callable[..., Any], **inputs: Any) -> Detected:
    """What is found in the one graph of a model or function."""
    backend = Detected()
    torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    return backend
