"""Says what is wrong with an argument before any kernel sees it.

Checks of shape, dtype and device cost a microsecond or two and always run. What can be known only by reading ``cu_seq_q`` and
``cu_seq_k`` (a copy to the host, which waits for the device) is checked under ``varlen_inductor.config.debug``.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from varlen_inductor.ops.problem import Layout, Rule

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_operands(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> None:
    """Raises ``TypeError`` for a wrong dtype, ``ValueError`` for a wrong shape, device or number."""
    cu_seq_q, cu_seq_k, _, _, seqused_k, position_q, position_k, _, block_table, _, seeds_at, seeds = layout
    _, window_left, window_right, dropout_p, softcap, _ = rule
    if block_table is not None and seqused_k is None:
        raise ValueError("block_table is given without seqused_k, which must say how many keys of its pages a sequence uses")
    _check_tokens(query, key, value, block_table is not None)
    device = query.device
    _check_offsets("cu_seq_q", cu_seq_q, device)
    if cu_seq_k is not cu_seq_q:
        _check_offsets("cu_seq_k", cu_seq_k, device)
        if _differ(cu_seq_k.shape[0], cu_seq_q.shape[0]):
            raise ValueError(
                f"cu_seq_k has {cu_seq_k.shape[0]} entries and cu_seq_q {cu_seq_q.shape[0]}; both need one more than there are "
                f"sequences"
            )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must lie between 0 and 1")
    if not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap is {type(softcap).__name__}; it must be a number, 0 for no cap")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; it must be a positive number, or 0 for no cap")
    if window_left < -1 or window_right < -1:
        raise ValueError(f"window_size is ({window_left}, {window_right}); each side must be a number of keys, or -1 for no limit")
    if seqused_k is not None:
        _check_vector("seqused_k", seqused_k, cu_seq_q.shape[0] - 1, "sequence", (torch.int32,), device)
    check_seeds(seeds, seeds_at, device)
    if block_table is not None:
        _check_pages(block_table, layout, device)
    if (position_q is None) != (position_k is None):
        given, missing = ("position_k", "position_q") if position_q is None else ("position_q", "position_k")
        raise ValueError(f"{given} is given and {missing} is not; give both or neither")
    if position_q is not None and position_k is not None:
        integers = (torch.int32, torch.int64)
        _check_vector("position_q", position_q, query.shape[0], "query token", integers, device)
        _check_vector("position_k", position_k, key.shape[0], "key token", integers, device)


def check_out(out: Tensor, query: Tensor, value: Tensor) -> None:
    """Raises ``ValueError`` if the result does not fit ``out``. Query and value are as they must be."""
    expected = (*query.shape[:-1], value.shape[-1])
    if out.shape != expected or out.dtype != query.dtype or out.device != query.device:
        raise ValueError(
            f"out is {out.dtype} of shape {_shape(out)} on {out.device}; it must be {query.dtype} of shape {expected} on "
            f"{query.device}: that of query, with the head dim of value"
        )


def _check_pages(block_table: Tensor, layout: Layout, device: torch.device) -> None:
    if layout.position_q is not None or layout.position_k is not None:
        raise ValueError("block_table and positions are given; keys in pages have no positions but their places in the sequence")
    sequences = layout.cu_seq_q.shape[0] - 1
    if block_table.dtype != torch.int32:
        raise TypeError(f"block_table is {block_table.dtype}; it must be torch.int32 (use block_table.to(torch.int32))")
    if block_table.dim() != 2 or _differ(block_table.shape[0], sequences):
        raise ValueError(f"block_table has shape {_shape(block_table)}; it must be ({sequences}, pages_per_sequence)")
    _check_device("block_table", block_table, device)


def _check_tokens(query: Tensor, key: Tensor, value: Tensor, paged: bool) -> None:
    shape, shape_k, shape_v = query.shape, key.shape, value.shape
    dims = 4 if paged else 3
    if len(shape) != 3 or len(shape_k) != dims or len(shape_v) != dims:
        raise ValueError(_wrong_rank(query, key, value, dims))
    dtype, device = query.dtype, query.device
    if dtype not in DTYPES:
        raise TypeError(f"query is {dtype}; it must be one of {', '.join(map(str, DTYPES))}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != dtype:
            raise TypeError(f"{name} is {x.dtype} and query is {dtype}; cast them to one dtype")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device} and query on {device}; move them to one device")
    heads, dim, tokens_k, heads_k = shape[1], shape[2], shape_k[0], shape_k[-2]
    if _differ(shape_v[0], tokens_k) or shape_v[-2] != heads_k:
        raise ValueError(
            f"value has shape {_shape(value)}; it must have the {tokens_k} {'pages' if paged else 'tokens'} and {heads_k} heads of "
            f"key {_shape(key)}"
        )
    if shape_k[-1] != dim:
        raise ValueError(f"key has head dim {shape_k[-1]} and query {dim}; they must be equal (only value's may differ)")
    if heads_k == 0 or heads % heads_k != 0:
        raise ValueError(f"query has {heads} heads and key {heads_k}; query's must be a multiple of key's")
    if dim == 0 or shape_v[-1] == 0:
        raise ValueError(f"query has head dim {dim} and value {shape_v[-1]}; both must be at least 1")
    if paged and _differ(shape_v[1], shape_k[1]):
        raise ValueError(f"value has pages of {shape_v[1]} keys and key of {shape_k[1]}; they must be equal")


def _wrong_rank(query: Tensor, key: Tensor, value: Tensor, dims: int) -> str:
    operands = (("query", query, 3), ("key", key, dims), ("value", value, dims))
    name, x, rank = next((name, x, rank) for name, x, rank in operands if x.dim() != rank)
    expected = "tokens, heads, head_dim), the sequences one after the other"
    if rank == 4:
        expected = "pages, page_size, heads, head_dim), since block_table is given"
    return f"{name} has shape {_shape(x)}; it must be ({expected}"


def _check_offsets(name: str, offsets: Tensor, device: torch.device) -> None:
    if offsets.dtype != torch.int32:
        raise TypeError(f"{name} is {offsets.dtype}; it must be torch.int32 (use {name}.to(torch.int32))")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name} has shape {_shape(offsets)}; it must be (sequences + 1,): 0, then the end of each sequence")
    _check_device(name, offsets, device)


def _check_vector(name: str, x: Tensor, length: int, per: str, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if x.dtype not in dtypes:
        raise TypeError(f"{name} is {x.dtype}; it must be {' or '.join(map(str, dtypes))}")
    if x.dim() != 1 or _differ(x.shape[0], length):
        raise ValueError(f"{name} has shape {_shape(x)}; it must be ({length},), one entry per {per}")
    _check_device(name, x, device)


def check_seeds(seeds: Tensor | None, seeds_at: int, device: torch.device) -> None:
    """Raises ``TypeError`` for a wrong dtype, ``ValueError`` for a place where there are no two random numbers."""
    if seeds is None and not seeds_at:
        return
    if seeds is None:
        raise ValueError(f"seeds_at is {seeds_at} and no seeds are given; it says where in them two random numbers are")
    if seeds.dtype != torch.int64:
        raise TypeError(f"seeds is {seeds.dtype}; it must be torch.int64")
    if seeds_at < 0 or seeds.dim() != 1 or seeds.shape[0] < seeds_at + 2:
        raise ValueError(f"seeds has shape {_shape(seeds)} and seeds_at is {seeds_at}; two entries from there on must be in it")
    _check_device("seeds", seeds, device)


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} and query on {device}; move it there (with no copy per call if it can be)")


def check_lengths(layout: Layout, query: Tensor, key: Tensor) -> None:
    """Raises ``ValueError`` if the offsets do not describe sequences within the tokens. Waits for the device."""
    cu_seq_q, cu_seq_k, max_q, max_k, seqused_k, *_ = layout
    tokens_k = key.shape[0]
    _check_sequences("cu_seq_q", cu_seq_q, query.shape[0], "query", "max_q", max_q)
    if layout.block_table is not None:
        _check_table(layout, pages=key.shape[0], page_size=key.shape[1])
        return
    lengths = _check_sequences("cu_seq_k", cu_seq_k, tokens_k, "key", "max_k", max_k if seqused_k is None else tokens_k)
    if seqused_k is not None:
        _check_used(seqused_k, lengths, max_k)


def _check_table(layout: Layout, pages: int, page_size: int) -> None:
    table, used = layout.block_table, layout.seqused_k
    assert table is not None and used is not None
    _check_used(used, [table.shape[1] * page_size] * table.shape[0], layout.max_k)
    for i, (row, length) in enumerate(zip(table.tolist(), used.tolist(), strict=True)):
        for j, page in enumerate(row[: -(-length // page_size)]):
            if not 0 <= page < pages:
                raise ValueError(
                    f"block_table[{i}, {j}] is {page}; it must be one of the {pages} pages of key, the first of which is 0"
                )


def _check_used(seqused_k: Tensor, lengths: list[int], max_k: int) -> None:
    for i, (used, length) in enumerate(zip(seqused_k.tolist(), lengths, strict=True)):
        if not 0 <= used <= min(length, max_k):
            raise ValueError(
                f"seqused_k[{i}] is {used}; it must lie between 0 and the {length} keys of its sequence, and be at most "
                f"max_k = {max_k}"
            )


def _check_sequences(name: str, offsets: Tensor, tokens: int, operand: str, bound_name: str, bound: int) -> list[int]:
    ends: list[int] = offsets.tolist()
    if ends[0] != 0:
        raise ValueError(f"{name} begins with {ends[0]}; it must begin with 0")
    lengths = [after - before for before, after in itertools.pairwise(ends)]
    for i, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"{name} falls from {ends[i]} to {ends[i + 1]} at entry {i + 1}; it must never fall")
        if length > bound:
            raise ValueError(f"{name} gives sequence {i} {length} tokens, more than {bound_name} = {bound}; raise {bound_name}")
    if ends[-1] > tokens:
        raise ValueError(f"{name} ends with {ends[-1]}, but {operand} has {tokens} tokens")
    return lengths


def _differ(size: int | torch.SymInt, expected: int | torch.SymInt) -> bool:
    """Whether two sizes differ. While a graph is traced and neither is known yet, it is noted that they must be equal."""
    if isinstance(size, int) and isinstance(expected, int):
        return size != expected
    torch._check(size == expected)
    return False


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))
