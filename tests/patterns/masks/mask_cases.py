"""What the tests of the mask prover share: record a mask program as a graph, prove it, and check the proof by brute force."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from varlen_inductor.patterns.masks import MaskOp, MaskProof, NotProven, Predicate, ScoreLayout, prove

LAYOUT = (("b",), ("h",), ("q",), ("k",))


def record(program: Callable[..., torch.Tensor], *inputs: torch.Tensor, dynamic: bool = False) -> fx.GraphModule:
    """The pre-dispatch graph of a program on inputs of these shapes and dtypes."""
    return make_fx(program, pre_dispatch=True, tracing_mode="symbolic" if dynamic else "fake")(*inputs)


def output_of(gm: fx.GraphModule) -> fx.Node:
    (node,) = (n for n in gm.graph.nodes if n.op == "output")
    return node.args[0]


@dataclass
class Case:
    """A mask of scores (b, h, q, k), computed by a graph; or several, with how each is applied."""

    gm: fx.GraphModule
    b: int
    h: int
    q: int
    k: int
    dtype: torch.dtype = torch.float32
    spelling: str = "sdpa"
    is_causal: bool = False
    dims: tuple[tuple[str, ...], ...] = LAYOUT
    applied: tuple[tuple[str, float | None], ...] | None = None  # kind and value of each output of the graph

    @property
    def ops(self) -> list[MaskOp]:
        out: Any = output_of(self.gm)
        if self.applied is None:
            return [MaskOp("bool" if out.meta["val"].dtype is torch.bool else "add", out)]
        return [MaskOp(kind, mask, value) for (kind, value), mask in zip(self.applied, out, strict=True)]  # type: ignore[arg-type]

    def prove(self, **options: Any) -> MaskProof:
        sizes = {"b": self.b, "h": self.h, "q": self.q, "k": self.k}
        return prove(
            self.ops,
            ScoreLayout(self.dims, sizes),
            self.dtype,
            is_causal=self.is_causal,
            spelling=self.spelling,
            **options,
        )

    def refusal(self, **options: Any) -> str:
        """The reason why the mask is refused; fails if it is proven."""
        try:
            proof = self.prove(**options)
        except NotProven as refusal:
            return refusal.reason
        raise AssertionError(f"proven: {proof.description}")


def summary(proof: MaskProof) -> str:
    """A proof on a few lines, for expected texts."""
    lines = [proof.description, f"no valid key: {proof.no_valid_key}"]
    lines += [f"obligation: {o.text}" for o in proof.obligations]
    lines += [f"assumption: {proof.assumption}"] if proof.assumption else []
    lines += ["prefix"] if proof.key is not None and proof.key.is_prefix else []
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- brute force


def values_of(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> dict[fx.Node, Any]:
    """The value of every node of the graph on these inputs."""
    interpreter = fx.Interpreter(gm)
    interpreter.garbage_collect_values = False
    interpreter.run(*inputs)
    return interpreter.env


def visible(proof: MaskProof, env: Mapping[fx.Node, Any], case: Case) -> torch.Tensor:
    """Which keys each query sees according to the proof: bool (b, 1, q, k)."""
    see = torch.ones(case.b, 1, case.q, case.k, dtype=torch.bool)
    if proof.key is not None:
        see = see & evaluate(proof.key, env, case.b, case.k)[:, None, None, :]
    if proof.query is not None:
        see = see & evaluate(proof.query, env, case.b, case.q)[:, None, :, None]
    offset = torch.arange(case.k)[None, :] - torch.arange(case.q)[:, None]
    if proof.window_left >= 0:
        see = see & (offset >= -proof.window_left)
    if proof.window_right >= 0:
        see = see & (offset <= proof.window_right)
    return see


def evaluate(predicate: Predicate, env: Mapping[fx.Node, Any], b: int, s: int) -> torch.Tensor:
    inputs = {n: v for n, v in env.items() if n.op == "placeholder"}  # they tell the sizes
    value = predicate.evaluate({**inputs, **{leaf: env[leaf] for leaf in predicate.leaves}}, b, s)
    assert value.shape == (b, s)
    assert value.dtype is torch.bool
    return value


def emitted(case: Case, predicate: Predicate, s: int, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The predicate as computed by the nodes that it emits into a copy of the graph."""
    made: dict[Any, fx.GraphModule] = case.gm.meta.setdefault("emitted", {})
    key = (predicate, case.b, s)
    if key not in made:
        made[key] = _emit_into_copy(case, predicate, s)
    return made[key](*inputs)


def _emit_into_copy(case: Case, predicate: Predicate, s: int) -> fx.GraphModule:
    nodes = dict(zip(case.gm.graph.nodes, copy_graph(case.gm).graph.nodes, strict=True))
    target = next(iter(nodes.values())).graph.owning_module
    moved = _on_copy(predicate, nodes)
    (out,) = (n for n in target.graph.nodes if n.op == "output")
    with target.graph.inserting_before(out):
        node = moved.emit(target.graph, case.b, s)
    fake = node.meta["val"]
    assert fake.shape == (case.b, s)
    assert fake.dtype is torch.bool
    out.args = (node,)
    target.graph.lint()
    target.graph.eliminate_dead_code()
    target.recompile()
    return target


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    new = fx.GraphModule(gm, fx.Graph())
    new.graph.output(new.graph.graph_copy(gm.graph, {}))
    (a,), (b,) = ([n for n in g.graph.nodes if n.op == "output"] for g in (gm, new))
    b.meta = copy.copy(a.meta)
    return new


def _on_copy(predicate: Predicate, nodes: Mapping[fx.Node, fx.Node]) -> Predicate:
    from varlen_inductor.patterns.masks.expr import Expr, intern_expr

    def move(e: Expr) -> Expr:
        payload = nodes[e.payload] if e.op == "load" else e.payload
        return intern_expr(e.op, tuple(move(a) for a in e.args), payload, e.dtype)

    return Predicate(move(predicate.expr), predicate.axis)


def mask_scores(scores: torch.Tensor, env: Mapping[fx.Node, Any], case: Case) -> torch.Tensor:
    """The scores after all steps, as eager computes them."""
    for op in case.ops:
        mask = env[op.mask]
        if op.kind == "bool":
            scores = scores.masked_fill(~mask, -torch.inf)
        elif op.kind == "add":
            scores = scores + mask
        elif op.kind == "fill":
            scores = scores.masked_fill(mask, op.value)
        else:
            scores = torch.where(mask, scores, op.value)
    return scores


def attend(scores: torch.Tensor, v: torch.Tensor, env: Mapping[fx.Node, Any] | None, case: Case) -> torch.Tensor:
    """Eager attention of these scores, masked as the case says (``env`` None: not at all)."""
    if case.spelling == "decomposed":
        masked = scores if env is None else mask_scores(scores, env, case)
        return torch.softmax(masked, -1).to(v.dtype) @ v
    # q = scores and k = identity: q @ k^T gives the scores back.
    eye = torch.eye(case.k, dtype=case.dtype).expand(case.b, case.h, case.k, case.k)
    mask = None if env is None else env[case.ops[0].mask]
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(case.dtype)
    return torch.nn.functional.scaled_dot_product_attention(scores, eye, v, attn_mask=mask, scale=1.0)


def check(case: Case, proof: MaskProof, inputs: Sequence[torch.Tensor]) -> bool:
    """Compare every claim of the proof with eager on these inputs; False if an obligation does not hold for them."""
    env = values_of(case.gm, inputs)
    if not all(o.evaluate({o.leaf: env[o.leaf]}) for o in proof.obligations):
        return False
    see = visible(proof, env, case).expand(case.b, case.h, case.q, case.k)
    shown = mask_scores(torch.zeros_like(see, dtype=case.dtype), env, case).expand_as(see) == 0
    sighted = see.any(-1)  # what becomes of the others is `no_valid_key`
    assert torch.equal(shown[sighted], see[sighted]), f"{proof.description}\n{shown}\n{see}"
    for predicate, s in ((proof.key, case.k), (proof.query, case.q)):
        if predicate is not None:
            assert torch.equal(emitted(case, predicate, s, inputs), evaluate(predicate, env, case.b, s))
    _check_attention(case, proof, see, env)
    return True


def _check_attention(case: Case, proof: MaskProof, see: torch.Tensor, env: Mapping[fx.Node, Any]) -> None:
    scores = torch.randn(case.b, case.h, case.q, case.k, dtype=case.dtype)
    v = torch.randn(case.b, case.h, case.k, 3, dtype=case.dtype)
    eager = attend(scores, v, env, case)
    blind = ~see.any(-1)
    tolerance = {"rtol": 1e-2, "atol": 2e-2} if case.dtype in (torch.float16, torch.bfloat16) else {"rtol": 2e-3, "atol": 2e-3}
    plain = (torch.softmax(scores.double().masked_fill(~see, -torch.inf), -1).nan_to_num() @ v.double()).to(case.dtype)
    torch.testing.assert_close(eager[~blind], plain[~blind], **tolerance)
    expected = {
        "zero": torch.zeros_like(eager),
        "nan": torch.full_like(eager, torch.nan),
        "uniform": v.mean(-2, keepdim=True).expand_as(eager),
        "unmasked": attend(scores, v, None, case),
        "other": eager,
    }[proof.no_valid_key]
    torch.testing.assert_close(eager[blind], expected[blind], equal_nan=True, **tolerance)
