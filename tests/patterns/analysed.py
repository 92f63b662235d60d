"""Run the analyses of the packer on small functions, and read what they found by output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from varlen_inductor import driver, report
from varlen_inductor.patterns import demand, oprules, regions
from varlen_inductor.patterns.dims import leaves
from varlen_inductor.patterns.normalise import normalise

B, S, E, H = 3, 6, 8, 2


def attend(x: Tensor, valid: Tensor, heads: int = H) -> Tensor:
    """Masked self-attention without parameters, (B, S, E) to (B, S, E)."""
    q = x.view(*x.shape[:2], heads, -1).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, q * 2, q * 3, attn_mask=valid[:, None, None, :])
    return y.transpose(1, 2).reshape(x.shape)


def batch(b: int = B, s: int = S, e: int = E) -> tuple[Tensor, Tensor]:
    """Hidden states (B, S, E) and a mask (B, S)."""
    valid = torch.ones(b, s, dtype=torch.bool)
    valid[:, s // 2 :] = False
    return torch.randn(b, s, e), valid


@dataclass
class Analysed:
    """A graph with its typing and, if it has a proven attention, what was chosen to be packed."""

    graph: fx.Graph
    table: dict[fx.Node, oprules.Typing]
    choice: regions.Choice | None
    live: frozenset[fx.Node]
    gm: fx.GraphModule

    @property
    def inputs(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], Tensor)]

    @property
    def outputs(self) -> list[fx.Node]:
        return next(n for n in self.graph.nodes if n.op == "output").all_input_nodes

    def node(self, name: str, index: int = 0) -> fx.Node:
        """The ``index``-th call of an operator."""
        return [n for n in self.graph.nodes if n.op == "call_function" and oprules.op_name(n) == name][index]

    @property
    def region(self) -> regions.Region:
        assert self.choice is not None
        (region,) = self.choice.regions
        return region

    @property
    def analysis(self) -> demand.Analysis:
        assert self.choice is not None
        return self.choice.analyses[self.region.domain]

    def packed(self) -> set[str]:
        """The operators that run packed."""
        return {oprules.op_name(n) for n in self.region.nodes}

    def letters(self, node: fx.Node, names: str = "b s e") -> str:
        """The dimensions of a node in einops notation; atoms of the first input have the given names."""
        known = {}
        for dim, name in zip(self.table[self.inputs[0]].dims, names.split()):
            atoms = leaves(dim)
            known.update({a: name + (str(i) if len(atoms) > 1 else "") for i, a in enumerate(atoms)})
        dims = self.table[node].dims
        shown = [[known.get(a, "?") for a in leaves(dim)] for dim in dims]
        return " ".join(d[0] if len(d) == 1 else "1" if not d else "(" + " ".join(d) + ")" for d in shown)


def analysed(
    function: Callable[..., Any],
    *args: Tensor,
    mode: regions.Mode = "model",
    partial: bool = False,
    exact: bool = False,
    dynamic: bool | None = None,
) -> Analysed:
    """Trace ``function`` and run the analyses; without attention only the typing."""
    torch._dynamo.reset()
    captured: list[fx.GraphModule] = []
    torch.compile(function, backend=lambda gm, inputs: captured.append(gm) or gm, dynamic=dynamic, fullgraph=True)(*args)
    (dynamo,) = captured
    sites = driver._find_sites(dynamo, report.Report())
    gm = sites.gm if sites.lines else normalise(dynamo)
    table = oprules.infer(gm.graph)
    live = demand.live_nodes(gm.graph)
    choice = None
    if sites.lines:
        choice = regions.choose(
            gm.graph, table, live, mode=mode, partial_graph=partial, exact_outputs=exact, boundaries=sites.boundaries
        )
    return Analysed(gm.graph, table, choice, live, gm)
