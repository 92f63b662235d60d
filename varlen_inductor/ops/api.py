"""``varlen_attn``: attention over packed sequences; takes what ``torch.nn.attention.varlen.varlen_attn`` takes, and more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from varlen_inductor import _compat_operators
from varlen_inductor.ops import attention, eager, into
from varlen_inductor.ops.pages import gather_pages
from varlen_inductor.ops.problem import Layout, Rule
from varlen_inductor.ops.validate import check_operands


class AuxRequest(NamedTuple):
    """Which auxiliary outputs ``varlen_attn`` returns."""

    lse: bool = False
    """The logarithm of the sum of the exponentiated scores; shape (H_q, T_q)."""


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    dropout_p: float = 0.0,
    position_q: Tensor | None = None,
    position_k: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Scaled dot product attention within each of N sequences that lie one after the other, without padding.

    Differentiable in ``query``, ``key`` and ``value``, also through the returned lse. Runs on the CPU and on CUDA.

    Args:
        query: shape (T_q, H_q, D); float32, float64, bfloat16 or float16; any strides. Sequence ``i`` has the rows
            ``cu_seq_q[i]`` to ``cu_seq_q[i + 1]``. Rows behind ``cu_seq_q[-1]`` are not read.
        key: shape (T_k, H_kv, D), dtype of ``query``; or (pages, page_size, H_kv, D) with ``block_table``.
        value: shape (T_k, H_kv, D_v), dtype of ``query``; or (pages, page_size, H_kv, D_v) with ``block_table``.
        cu_seq_q: shape (N + 1,), int32: 0, then the end of each sequence of queries.
        cu_seq_k: the same for keys and values. ``None`` only with ``block_table``, which takes its place.
        max_q: an upper bound of the lengths of the query sequences, e.g. the length they were once padded to.
        max_k: the same for the key sequences.
        return_aux: with ``AuxRequest(lse=True)``, lse is returned too.
        scale: multiplies the scores; ``1 / sqrt(D)`` by default.
        window_size: (left, right): query ``i`` of a sequence with ``lq`` queries and ``lk`` keys sees the keys from
            ``i + lk - lq - left`` to ``i + lk - lq + right``, so the last query is level with the last key; -1 is no limit.
            (-1, -1) is full attention, (-1, 0) is causal, (w, 0) is causal with a sliding window.
        enable_gqa: allow ``key`` and ``value`` fewer heads than ``query``: H_q must be a multiple of H_kv, and each run of
            ``H_q / H_kv`` query heads shares one.
        seqused_k: shape (N,), int32: sequence ``i`` uses only its first ``seqused_k[i]`` keys.
        block_table: shape (N, pages_per_sequence), int32: sequence ``i`` has its keys and values in these pages, in this
            order. Requires ``seqused_k``; ``cu_seq_k`` is not read then. Read where they lie if a kernel can, else gathered into a
            copy, as they are when a gradient is asked for.
        num_splits: how many parts of a sequence's keys are worked on at the same time; each kernel chooses by default. With 1 the
            result for a sequence is the same bit by bit whatever the others in the batch are.
        dropout_p: the probability with which an attention weight is dropped; apply it in training only. Drawn from the
            default generator of the device, so ``torch.manual_seed`` reproduces it.
        position_q: shape (T_q,), int32 or int64. With both, ``window_size`` speaks of these positions, not of the places
            within the sequence: a query at ``p`` sees the keys at ``p - left`` to ``p + right``.
        position_k: shape (T_k,), int32 or int64.
        softcap: if above 0, scores (behind the scale) become ``softcap * tanh(scores / softcap)`` before mask and softmax.

    Gradients are the same bit by bit every time if ``torch.use_deterministic_algorithms(True)`` is set when they are computed.

    Returns:
        out, shape (T_q, H_q, D_v), dtype of ``query``, contiguous; with ``return_aux.lse`` also lse, shape (H_q, T_q),
        float32 (float64 for float64). A query that sees no key, or that lies behind ``cu_seq_q[-1]``, has out 0 and lse -inf.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value. The message names it.
            That ``cu_seq_q`` and ``cu_seq_k`` rise, end within the tokens and keep to ``max_q`` and ``max_k`` is checked only
            if ``varlen_inductor.config.debug`` is set, because it waits for the device.

    Example::

        >>> lengths = torch.tensor([3, 5])
        >>> cu_seq = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        >>> q, k, v = (torch.randn(8, 4, 16) for _ in range(3))
        >>> varlen_attn(q, k, v, cu_seq, cu_seq, 5, 5, window_size=(-1, 0)).shape
        torch.Size([8, 4, 16])
    """
    _check_types(query=query, key=key, value=value, cu_seq_q=cu_seq_q)
    window_left, window_right = _window(window_size)
    cu_seq_k = _key_offsets(cu_seq_q, cu_seq_k, block_table)
    _check_splits(num_splits)
    _check_heads(query, key, enable_gqa)
    if block_table is not None and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        paged = Layout(cu_seq_q, cu_seq_q, max_q, max_k, seqused_k, block_table=block_table)
        check_operands(query, key, value, paged, Rule(1.0))
        key, value, gathered = gather_pages(key, value, paged)
        cu_seq_k, block_table = gathered.cu_seq_k, None
    want_lse = return_aux is not None and return_aux.lse
    if not torch.compiler.is_compiling() and _compat_operators.goes_straight(query, key, value):
        scale = 1.0 / math.sqrt(query.shape[-1] or 1) if scale is None else float(scale)
        layout = Layout(cu_seq_q, cu_seq_k, int(max_q), int(max_k), seqused_k, position_q, position_k, False, block_table)
        rule = Rule(scale, window_left, window_right, dropout_p, softcap, num_splits == 1)
        return eager.attend(query, key, value, layout, rule, want_lse)
    out, lse, _ = attention.varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        scale=scale,
        window_left=window_left,
        window_right=window_right,
        dropout_p=dropout_p,
        seqused_k=seqused_k,
        position_q=position_q,
        position_k=position_k,
        softcap=softcap,
        block_table=block_table,
        batch_invariant=num_splits == 1,
    )
    return (out, lse) if want_lse else out


def varlen_attn_out(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`varlen_attn` into a tensor that is there already. It has no gradient.

    Triton's kernel writes it where it is, if its last dim is contiguous; the others write a tensor of their own, which is copied.

    Args:
        out: shape (T_q, H_q, D_v), dtype and device of ``query``; any strides; no memory shared with ``key`` or ``value``.
            Overwritten.

    Returns:
        ``out``; with ``return_aux.lse`` also lse.

    Raises:
        TypeError, ValueError: as for :func:`varlen_attn`, and if ``out`` does not fit.
        RuntimeError: a gradient is asked for.
    """
    _check_types(out=out, query=query, key=key, value=value, cu_seq_q=cu_seq_q)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (out, query, key, value)):
        raise RuntimeError("varlen_attn_out has no gradient: call varlen_attn, or this one under torch.no_grad()")
    window_left, window_right = _window(window_size)
    cu_seq_k = _key_offsets(cu_seq_q, cu_seq_k, block_table)
    _check_splits(num_splits)
    _check_heads(query, key, enable_gqa)
    lse = into.varlen_attn_out(
        out,
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        scale=scale,
        window_left=window_left,
        window_right=window_right,
        seqused_k=seqused_k,
        block_table=block_table,
        batch_invariant=num_splits == 1,
    )
    return (out, lse) if return_aux is not None and return_aux.lse else out


def _check_types(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is {type(x).__name__}; it must be a torch.Tensor")


def _window(window_size: Sequence[int]) -> tuple[int, int]:
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ValueError(f"window_size is {window_size!r}; it must be a pair (left, right), -1 for no limit") from None
    return left, right


def _key_offsets(cu_seq_q: Tensor, cu_seq_k: Tensor | None, block_table: Tensor | None) -> Tensor:
    if block_table is not None:
        return cu_seq_q  # not read
    if cu_seq_k is None:
        raise ValueError("cu_seq_k is None; it must give the end of each sequence of keys, unless block_table does")
    return cu_seq_k


def _check_splits(num_splits: int | None) -> None:
    if num_splits is not None and num_splits < 0:
        raise ValueError(f"num_splits is {num_splits}; it must be None, 0 (both: automatic) or a number of splits")


def _check_heads(query: Tensor, key: Tensor, enable_gqa: bool) -> None:
    if not enable_gqa and query.dim() == 3 and key.dim() >= 3 and query.shape[1] != key.shape[-2]:
        raise ValueError(
            f"query has {query.shape[1]} heads and key {key.shape[-2]}; pass enable_gqa=True to share key heads between query "
            f"heads, or give both as many"
        )
