"""Predicates and obligations: equality, text, and what they put into a graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from mask_cases import output_of, record
from torch import fx

from varlen_inductor.patterns.masks import MaskOp, MaskProof, Obligation, Predicate, ScoreLayout, prove

B, H, S = 2, 3, 4


def mask() -> torch.Tensor:
    return torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def graph_and_proof(
    program: Callable[..., torch.Tensor], *inputs: torch.Tensor, dynamic: bool = False
) -> tuple[fx.GraphModule, MaskProof]:
    inputs = inputs or (mask(),)
    gm = record(program, *inputs, dynamic=dynamic)
    out = output_of(gm)
    rows, _, _, keys = out.meta["val"].shape
    layout = ScoreLayout((("b",), ("h",), ("q",), ("k",)), {"b": rows, "h": H, "q": keys, "k": keys})
    kind = "bool" if out.meta["val"].dtype is torch.bool else "add"
    return gm, prove([MaskOp(kind, out)], layout, torch.float32, spelling="sdpa")


def emit(gm: fx.GraphModule, what: Predicate | Obligation, *sizes: int | torch.SymInt | fx.Node) -> fx.GraphModule:
    """The graph with nothing left but the condition."""
    (out,) = (n for n in gm.graph.nodes if n.op == "output")
    with gm.graph.inserting_before(out):
        node = what.emit(gm.graph, *sizes)
    out.args = (node,)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    for n in gm.graph.nodes:
        assert n.op in ("placeholder", "output") or "val" in n.meta
    return gm


def listing(gm: fx.GraphModule) -> str:
    lines = [f"{n.name} = {n.target}({', '.join(map(str, n.args))})" for n in gm.graph.nodes if n.op == "call_function"]
    return "\n".join(lines)


def test_a_mask_is_compared_where_it_stands() -> None:
    gm, proof = graph_and_proof(lambda m: (1.0 - m[:, None, None, :].float()) * -1e9)
    assert proof.key is not None
    assert_expected_inline(listing(emit(gm, proof.key, B, S)), """ne_scalar = aten.ne.Scalar(m_1, 0)""")
    assert torch.equal(gm(mask()), mask() != 0)


def test_a_boolean_mask_is_used_as_it_is() -> None:
    gm, proof = graph_and_proof(lambda m: m[:, None, None, :], mask().bool())
    assert proof.key is not None
    assert_expected_inline(listing(emit(gm, proof.key, B, S)), """""")
    assert torch.equal(gm(mask().bool()), mask().bool())


def test_a_four_dimensional_leaf_is_selected_from() -> None:
    gm, proof = graph_and_proof(lambda m: m, mask().bool()[:, None, None, :])
    assert proof.key is not None
    assert_expected_inline(listing(emit(gm, proof.key, B, S)), """\
select_int = aten.select.int(m_1, 1, 0)
select_int_1 = aten.select.int(select_int, 1, 0)""")  # fmt: skip
    assert torch.equal(gm(mask().bool()[:, None, None, :]), mask().bool())


def test_a_shared_row_is_expanded() -> None:
    gm, proof = graph_and_proof(lambda m: m.expand(B, 1, S, S), mask().bool()[1].view(1, 1, 1, S))
    assert proof.key is not None
    assert "expand" in listing(emit(gm, proof.key, B, S))
    assert torch.equal(gm(mask().bool()[1].view(1, 1, 1, S)), mask()[1].bool().expand(B, S))


def test_lengths() -> None:
    gm, proof = graph_and_proof(lambda n: (torch.arange(S) < n[:, None])[:, None, None, :], torch.tensor([4, 2]))
    assert proof.key is not None
    assert proof.key.is_prefix
    assert_expected_inline(listing(emit(gm, proof.key, B, S)), """\
unsqueeze_default = aten.unsqueeze.default(n_1, 1)
arange_default = aten.arange.default(4)
lt_tensor = aten.lt.Tensor(arange_default, unsqueeze_default)""")  # fmt: skip
    assert torch.equal(gm(torch.tensor([0, 3])), torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]]).bool())


@pytest.mark.parametrize("given", ["numbers", "symbols", "nodes"])
def test_dynamic_sizes(given: str) -> None:
    """One graph for every size; B and S may be given as numbers, as SymInts or as nodes."""
    gm, proof = graph_and_proof(
        lambda m: (torch.arange(m.shape[1]) >= m.shape[1] - m.sum(1, keepdim=True))[:, None, None, :], dynamic=True
    )
    assert proof.key is not None
    (leaf,) = proof.key.leaves
    m = next(n for n in gm.graph.nodes if n.op == "placeholder")
    b, s = m.meta["val"].shape
    if given == "nodes":
        with gm.graph.inserting_after(leaf):
            b, s = (gm.graph.call_function(torch.ops.aten.sym_size.int, (m, d)) for d in (0, 1))
        b.meta["val"], s.meta["val"] = m.meta["val"].shape
    if given == "numbers":
        b, s = 2, 4
    emit(gm, proof.key, b, s)
    for rows, length in ((2, 4), (3, 6)) if given != "numbers" else ((2, 4),):
        data = torch.randint(0, 2, (rows, length))
        expected = torch.arange(length) >= length - data.sum(1, keepdim=True)
        assert torch.equal(gm(data), expected)
        assert torch.equal(proof.key.evaluate({leaf: data.sum(1, keepdim=True), m: data}, rows, length), expected)


def test_shifted_masks_never_read_outside() -> None:
    """Keys before the mask (a prompt, say) are visible; the mask is read for the others only."""
    gm, proof = graph_and_proof(lambda m: torch.cat([torch.ones(B, 2, dtype=torch.bool), m.bool()], 1)[:, None, None, :], mask())
    assert proof.key is not None
    assert proof.key.text == "k <= 1 or m_1[b, k - 2] != 0"
    emit(gm, proof.key, B, S + 2)
    assert torch.equal(gm(mask()), torch.cat([torch.ones(B, 2).bool(), mask().bool()], 1))


def test_obligation() -> None:
    gm, proof = graph_and_proof(lambda m: (1.0 - m[:, None, None, :].float()) * -1e9)
    (obligation,) = proof.obligations
    assert obligation.text == "every value of `m_1` is 0 or 1"
    leaf = obligation.leaf
    assert obligation.evaluate({leaf: mask()})
    assert not obligation.evaluate({leaf: mask() * 2})
    emit(gm, obligation)
    assert gm(mask()).shape == ()
    assert bool(gm(mask()))
    assert not bool(gm(-mask()))


def test_equality_across_spellings() -> None:
    def program(m: torch.Tensor) -> list[torch.Tensor]:
        row = m[:, None, None, :]
        return [row.bool(), row != 0, ~(row == 0), (1 - row) * -1e9, torch.where(row == 0, -torch.inf, 0.0), row == 1, row > 0]

    gm = record(program, mask())
    layout = ScoreLayout((("b",), ("h",), ("q",), ("k",)), {"b": B, "h": H, "q": S, "k": S})
    proofs = [
        prove([MaskOp("bool" if n.meta["val"].dtype is torch.bool else "add", n)], layout, torch.float32, spelling="sdpa")
        for n in output_of(gm)
    ]
    first, *others = [p.key for p in proofs]
    assert [p == first for p in others] == [True, True, True, True, False, False]
    assert [p.text for p in others[-2:]] == ["m_1[b, k] == 1", "m_1[b, k] > 0"]
    assert len({first, *others}) == 3


def test_prefixes() -> None:
    def is_prefix(program: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> bool:
        key = graph_and_proof(lambda *x: program(*x)[:, None, None, :], *inputs)[1].key
        assert key is not None
        return key.is_prefix

    n, position = torch.tensor([4, 2]), lambda: torch.arange(S)
    assert is_prefix(lambda n: position() < n[:, None], n)
    assert is_prefix(lambda n: position() <= n[:, None], n)
    assert is_prefix(lambda n: ~(position() >= n[:, None]), n)
    assert is_prefix(lambda n: (position() < n[:, None]) & (n[:, None] > 1), n)
    assert is_prefix(lambda n: position().float() < n[:, None], n.float())
    assert is_prefix(lambda n: position()[None].expand(B, S) < 2, n)
    assert not is_prefix(lambda n: position() >= S - n[:, None], n)
    assert not is_prefix(lambda n: position() != n[:, None], n)
    assert not is_prefix(lambda m: m != 0, mask())
