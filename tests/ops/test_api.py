"""``varlen_inductor.varlen_attn``: its arguments, and what it says about wrong ones."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen as upstream

import varlen_inductor
from attention_cases import assert_close, make_case, offsets
from varlen_inductor import AuxRequest, varlen_attn
from varlen_inductor.ops.reference import varlen_attn_reference


def test_takes_what_upstream_takes() -> None:
    """Every parameter of PyTorch's function, in its order and with its default, is one of ours."""
    ours = inspect.signature(varlen_attn).parameters
    theirs = inspect.signature(upstream.varlen_attn).parameters
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == parameter.default, name
    positional = [name for name, parameter in ours.items() if parameter.kind == parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [name for name, p in theirs.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert set(upstream.AuxRequest._fields) <= set(AuxRequest._fields)


def test_returns_lse_on_request() -> None:
    case = make_case((5, 3))
    out = varlen_attn(*case.operands)
    again, lse = varlen_attn(*case.operands, return_aux=upstream.AuxRequest(lse=True))
    assert torch.equal(out, again)
    assert lse.shape == (2, 8)
    assert isinstance(varlen_attn(*case.operands, return_aux=AuxRequest()), torch.Tensor)


def test_gqa_must_be_asked_for() -> None:
    case = make_case((5, 3), heads=(4, 2))
    with pytest.raises(ValueError, match="query has 4 heads and key 2; pass enable_gqa=True"):
        varlen_attn(*case.operands)
    out = varlen_attn(*case.operands, enable_gqa=True)
    assert_close(out, varlen_attn_reference(*case.operands[:5])[0], torch.float32, "out")


def test_paged_keys() -> None:
    """Pages in any order, the last one of a sequence partly used, entries behind it meaningless."""
    page_size, used = 4, (6, 3, 8)
    case = make_case((2, 1, 3), used)
    table = torch.tensor([[5, 2, -1], [0, 99, 7], [1, 4, -5]], dtype=torch.int32)
    pages = [torch.full((6, page_size, 2, 8), float("nan")) for _ in range(2)]
    ends = offsets(used)
    for i, length in enumerate(used):
        for pool, rows in zip(pages, (case.key, case.value)):
            for j in range(length):
                pool[table[i, j // page_size], j % page_size] = rows[ends[i] + j].detach()
    for cu_seq_k in (None, case.cu_seq_k):
        out = varlen_attn(
            case.query,
            *pages,
            case.cu_seq_q,
            cu_seq_k,
            3,
            8,
            window_size=(-1, 0),
            seqused_k=torch.tensor(used, dtype=torch.int32),
            block_table=table,
            num_splits=1,
        )
        expected, _ = varlen_attn_reference(*case.operands[:5], window_size=(-1, 0))
        assert_close(out, expected, torch.float32, "out")


def test_batch_does_not_change_a_sequence() -> None:
    """Bit by bit the same, whatever the others in the batch are."""
    case = make_case((17, 5, 17))
    together = varlen_attn(*case.operands, num_splits=1)
    alone = varlen_attn(*(x[:17] for x in case.operands[:3]), offsets((17,)), offsets((17,)), 17, 17, num_splits=1)
    assert torch.equal(together[:17], alone)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "query type": ({"query": None}, TypeError, "query is NoneType; it must be a torch.Tensor"),
    "query rank": (
        {"query": torch.zeros(2, 3, 4, 8)},
        ValueError,
        r"query has shape \(2, 3, 4, 8\); it must be \(tokens, heads",
    ),
    "query dtype": ({"query": torch.zeros(8, 2, 8, dtype=torch.int32)}, TypeError, "query is torch.int32; it must be one of"),
    "key dtype": ({"key": torch.zeros(8, 2, 8).half()}, TypeError, "key is torch.float16 and query is torch.float32; cast"),
    "key head dim": ({"key": torch.zeros(8, 2, 4)}, ValueError, "key has head dim 4 and query 8"),
    "key device": ({"key": torch.zeros(8, 2, 8, device="meta")}, ValueError, "key is on meta and query on cpu"),
    "value tokens": ({"value": torch.zeros(7, 2, 8)}, ValueError, r"value has shape \(7, 2, 8\); it must have the 8 tokens"),
    "value heads": ({"value": torch.zeros(8, 1, 8)}, ValueError, "and 2 heads of key"),
    "head ratio": (
        {"query": torch.zeros(8, 3, 8), "enable_gqa": True},
        ValueError,
        "query has 3 heads and key 2; query's must be a multiple of key's",
    ),
    "offsets dtype": (
        {"cu_seq_q": offsets((5, 3)).long()},
        TypeError,
        r"cu_seq_q is torch.int64; .*cu_seq_q.to\(torch.int32\)",
    ),
    "offsets rank": ({"cu_seq_k": offsets((5, 3))[None]}, ValueError, r"cu_seq_k has shape \(1, 3\); it must be"),
    "offsets count": ({"cu_seq_k": offsets((5, 2, 1))}, ValueError, "cu_seq_k has 4 entries and cu_seq_q 3"),
    "no key offsets": ({"cu_seq_k": None}, ValueError, "cu_seq_k is None"),
    "window": ({"window_size": (1, 2, 3)}, ValueError, r"window_size is \(1, 2, 3\); it must be a pair"),
    "window side": ({"window_size": (-2, 0)}, ValueError, r"window_size is \(-2, 0\); each side must be"),
    "dropout": ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5; it must lie between 0 and 1"),
    "splits": ({"num_splits": -1}, ValueError, "num_splits is -1"),
    "used": ({"seqused_k": torch.zeros(3, dtype=torch.int32)}, ValueError, r"seqused_k has shape \(3,\); it must be \(2,\)"),
    "used dtype": ({"seqused_k": torch.zeros(2)}, TypeError, "seqused_k is torch.float32; it must be torch.int32"),
    "one position": ({"position_q": torch.arange(8)}, ValueError, "position_q is given and position_k is not"),
    "positions": (
        {"position_q": torch.arange(7), "position_k": torch.arange(8)},
        ValueError,
        r"position_q has shape \(7,\); it must be \(8,\), one entry per query token",
    ),
    "pages": ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, "block_table is given without seqused_k"),
}


@pytest.mark.parametrize("name", WRONG)
def test_says_what_is_wrong(name: str) -> None:
    changes, error, message = WRONG[name]
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    arguments = {**dict(zip(names, make_case((5, 3)).operands)), **changes}
    with pytest.raises(error, match=message):
        varlen_attn(**arguments)


OFFSETS: dict[str, tuple[dict[str, Any], str]] = {
    "falls": ({"cu_seq_q": (0, 5, 4, 8)}, "cu_seq_q falls from 5 to 4 at entry 2"),
    "does not begin with 0": ({"cu_seq_k": (1, 5, 6, 8)}, "cu_seq_k begins with 1"),
    "ends outside": ({"cu_seq_k": (0, 5, 6, 9)}, "cu_seq_k ends with 9, but key has 8 tokens"),
    "is too long": ({"cu_seq_q": (0, 6, 6, 8)}, "cu_seq_q gives sequence 0 6 tokens, more than max_q = 5; raise max_q"),
    "uses too much": ({"seqused_k": (5, 2, 3)}, r"seqused_k\[1\] is 2; it must lie between 0 and the 1 keys"),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_debug_reads_the_offsets(name: str) -> None:
    changes, message = OFFSETS[name]
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    case = make_case((5, 1, 2))
    arguments = dict(zip(names, case.operands))
    arguments |= {key: torch.tensor(value, dtype=torch.int32) for key, value in changes.items()}
    with varlen_inductor.config.patch(debug=True), pytest.raises(ValueError, match=message):
        varlen_attn(**arguments)
    with varlen_inductor.config.patch(debug=True):
        varlen_attn(*case.operands)
