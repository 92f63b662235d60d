"""What flash-attn-4 looks like to its caller (as in 4.0.0b36), computed slowly on the CPU.

As there, a function looks compiled kernels up in a cache and calls them; the backward is three kernels that share scratch memory,
and more with shared heads. As on Hopper, blocks are read past the end of a sequence, and what is not written is anything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

TILE_Q, TILE_K = 64, 128
LOG2_E = math.log2(math.e)


class AuxData(NamedTuple):
    tensors: Any = None
    scalars: Any = None


class Cache:
    """As the package's, which is not a dict."""

    def __init__(self) -> None:
        self.cache: dict[Any, Any] = {}

    def __setitem__(self, key: Any, fn: Any) -> None:
        self.cache[key] = fn

    def __getitem__(self, key: Any) -> Any:
        return self.cache[key]

    def __contains__(self, key: Any) -> bool:
        return key in self.cache


def check_operands(*tensors: Tensor) -> None:
    for x in tensors:
        assert not x.requires_grad
        assert x.stride(2) == 1
        assert x.stride(0) % 8 == x.stride(1) % 8 == 0
        assert x.shape[2] % 8 == 0
        assert 0 not in x.stride()


def padded(offset: int, sequence: int, tile: int) -> int:
    return (offset + sequence * tile) // tile * tile


def spans(cu: Tensor, used: Tensor | None) -> list[tuple[int, int]]:
    """The first row and the length of each sequence."""
    ends = cu.tolist()
    lengths = [b - a for a, b in itertools.pairwise(ends)] if used is None else used.tolist()
    return list(zip(ends, lengths))


def visible(lq: int, lk: int, left: int | None, right: int | None) -> Tensor:
    distance = torch.arange(lk)[None, :] - (torch.arange(lq)[:, None] + lk - lq)
    seen = torch.ones(lq, lk, dtype=torch.bool)
    if left is not None:
        seen &= distance >= -left
    return seen if right is None else seen & (distance <= right)


def reached(x: Tensor, start: int, length: int, tile: int) -> Tensor:
    """0 * what a kernel reads in ``x`` behind a sequence: NaN if that is."""
    return 0 * x[start + length : start + max(-(-length // tile), 1) * tile].sum()


class FlashAttn4:
    """The module ``flash_attn.cute.interface``; ``calls`` counts those of its functions, and of kernels, by name."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.compiled = 0
        self.module = ModuleType("flash_attn.cute.interface")
        forward, backward = self.functions()
        pre: Any = self.kernel_caller("bwd_pre", preprocess)
        post: Any = self.kernel_caller("bwd_post", postprocess)
        for function in (forward, backward, pre, post):
            function.compile_cache = Cache()
        self.pre, self.post, self.forward, self.backward = pre, post, forward, backward
        self.module.__dict__.update(_flash_attn_fwd=forward, _flash_attn_bwd=backward, _bwd_preprocess=pre, _bwd_post=post)

    def count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def compile(self, cache: Cache, key: Any, name: str, kernel: Callable[..., None]) -> None:
        if key in cache:
            return
        self.compiled += 1

        def compiled(*args: Any) -> None:
            self.count(f"kernel {name}")
            kernel(*key, *args)

        cache[key] = compiled

    def kernel_caller(self, name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def call(key: Any, *args: Any) -> None:
            self.compile(call.compile_cache, key, name, kernel)  # type: ignore[attr-defined]
            call.compile_cache[key](*args)  # type: ignore[attr-defined]

        return call

    def functions(self) -> tuple[Any, Any]:
        def _flash_attn_fwd(
            q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
            max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
            window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
            intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
            block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None, q_descale=None,
            k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None, seqlen_k_per_split=None,
            disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
        ):  # fmt: skip
            self.count("forward")
            check_operands(q, k, v, out)
            assert type(max_seqlen_q) is int
            assert type(max_seqlen_k) is int
            assert v.shape[2] <= q.shape[2]
            assert lse.shape == (q.shape[1], q.shape[0])
            assert lse.dtype == torch.float32
            assert softcap is None
            causal, left, right = resolved(causal, window_size_left, window_size_right)
            key = (causal, left is not None, right is not None, seqused_k is None, max_seqlen_q <= 128, q.shape[1] // k.shape[1])
            cache = _flash_attn_fwd.compile_cache
            self.compile(cache, key, "fwd", forward_kernel)
            cache[key](
                q, k, v, out.detach(), lse, softmax_scale, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table, left,
                right, learnable_sink, None, AuxData(), None, None,
            )  # fmt: skip
            return out, lse, None, None, None

        def _flash_attn_bwd(
            q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None, window_size_right=None,
            m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False,
            dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False,
            cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
            deterministic=False, dq=None, dk=None, dv=None, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None,
            aux_scalars=None, block_sparse_tensors=None, dlse=None, learnable_sink=None,
        ):  # fmt: skip
            self.count("backward")
            check_operands(q, k, v, out, dout, dq, dk, dv)
            assert softcap == 0.0
            causal, left, right = resolved(causal, window_size_left, window_size_right)
            dim, dim_v = (-(-x.shape[2] // 32) * 32 for x in (q, v))
            rows_q, rows_k = (
                (x.shape[0] + cu.shape[0] * tile - 1) // tile * tile
                for x, cu, tile in ((q, cu_seqlens_q, TILE_Q), (k, cu_seqlens_k, TILE_K))
            )
            heads, heads_k = q.shape[1], k.shape[1]
            dpsum, lse_log2 = (dirty(torch.empty(heads, rows_q)) for _ in range(2))
            dq_accum = dirty(torch.empty(heads, rows_q * dim))
            shared = heads > heads_k
            dk_to, dv_to = (torch.zeros(heads_k, rows_k * dim), torch.zeros(heads_k, rows_k * dim_v)) if shared else (dk, dv)
            self.pre((dlse is not None,), out, dout, dpsum, lse, lse_log2, dq_accum, cu_seqlens_q, seqused_q, dlse, None, 1.0)
            key = (causal, left is not None, right is not None, seqused_k is None, dim, dim_v)
            cache = _flash_attn_bwd.compile_cache
            self.compile(cache, key, "bwd", backward_kernel)
            semaphore = torch.zeros(4, dtype=torch.int32) if deterministic else None
            cache[key](
                q.detach(), k.detach(), v.detach(), dout, lse_log2, dpsum, dq_accum, dk_to, dv_to, softmax_scale, cu_seqlens_q,
                cu_seqlens_k, seqused_q, seqused_k, left, right, semaphore, None, None, AuxData(), None, None,
            )  # fmt: skip
            self.post((dim, TILE_Q), dq_accum, dq, softmax_scale, cu_seqlens_q, seqused_q, None)
            if shared:
                self.post((dim, TILE_K), dk_to, dk, softmax_scale, cu_seqlens_k, seqused_k, None)
                self.post((dim_v, TILE_K), dv_to, dv, 1.0, cu_seqlens_k, seqused_k, None)
            return dq, dk, dv

        return _flash_attn_fwd, _flash_attn_bwd


def resolved(causal: bool, left: int | None, right: int | None) -> tuple[bool, int | None, int | None]:
    assert left is None or left >= 0
    assert right is None or right >= 0
    assert causal == (left is None and right == 0)
    return causal, left, None if causal else right


def dirty(x: Tensor) -> Tensor:
    return x.fill_(math.nan)


def forward_kernel(causal, _left, _right, _used, _short, shared, q, k, v, out, lse, scale, cu_q, cu_k, used_q, used, *rest):
    left, right = rest[1], 0 if causal else rest[2]
    dirty(out), dirty(lse)
    for (at_q, lq), (at_k, lk) in zip(spans(cu_q, used_q), spans(cu_k, used)):
        rows_q, rows_k = slice(at_q, at_q + lq), slice(at_k, at_k + lk)
        queries, keys, values = (x.double() for x in (q[rows_q], k[rows_k], v[rows_k]))
        scores = torch.einsum("qhd,khd->hqk", queries, keys.repeat_interleave(shared, 1)) * scale
        scores = scores.masked_fill(~visible(lq, lk, left, right), -math.inf)
        found = scores.logsumexp(2)
        weights = (scores - found.masked_fill(found == -math.inf, 0.0)[..., None]).exp()
        result = torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(shared, 1))
        out[rows_q], lse[:, rows_q] = (result + reached(v, at_k, lk, TILE_K)).to(out.dtype), found.float()


def preprocess(has_dlse, out, dout, dpsum, lse, lse_log2, dq_accum, cu_q, _used, dlse, _row_max, _scale):
    assert (dlse is not None) == has_dlse
    width = dq_accum.shape[1] // dpsum.shape[1]
    for i, (at, length) in enumerate(spans(cu_q, None)):
        rows, to, size = slice(at, at + length), padded(at, i, TILE_Q), -(-length // TILE_Q) * TILE_Q
        dq_accum[:, to * width : (to + size) * width] = 0.0
        lse_log2[:, to : to + size], dpsum[:, to : to + size] = math.inf, 0.0
        dpsum[:, to : to + length] = (out[rows].float() * dout[rows].float()).sum(2).T - (0 if dlse is None else dlse[:, rows])
        found = lse[:, rows]
        lse_log2[:, to : to + length] = found.masked_fill(found == -math.inf, 0.0) * LOG2_E


def backward_kernel(
    causal, _l, _r, _u, dim, dim_v, q, k, v, dout, lse_log2, dpsum, dq_accum, dk, dv, scale, cu_q, cu_k, _uq, used, left, right,
    *_rest,
):  # fmt: skip
    right = 0 if causal else right
    heads, shared = q.shape[1], q.shape[1] // k.shape[1]
    for i, ((at_q, lq), (at_k, lk)) in enumerate(zip(spans(cu_q, None), spans(cu_k, used))):
        rows_q, rows_k = slice(at_q, at_q + lq), slice(at_k, at_k + lk)
        to_q, to_k = padded(at_q, i, TILE_Q), padded(at_k, i, TILE_K)
        past = sum(reached(x, at, n, t) for x, at, n, t in ((q, at_q, lq, TILE_Q), (dout, at_q, lq, TILE_Q), (k, at_k, lk, TILE_K)))
        past = past + reached(v, at_k, lk, TILE_K)
        for head in range(heads):
            head_k = head // shared
            qh, kh, vh, gh = (x.double() for x in (q[rows_q, head], k[rows_k, head_k], v[rows_k, head_k], dout[rows_q, head]))
            weights = torch.exp2(qh @ kh.T * scale * LOG2_E - lse_log2[head, to_q : to_q + lq, None])
            weights = weights.masked_fill(~visible(lq, lk, left, right), 0.0)
            ds = weights * (gh @ vh.T - dpsum[head, to_q : to_q + lq, None]) + past
            rows = dq_accum[head, to_q * dim : (to_q + lq) * dim].view(lq, dim)
            rows[:, : q.shape[2]] += (ds @ kh).float()
            more_k, more_v = ds.T @ qh, weights.T @ gh
            if shared == 1:
                dk[rows_k, head], dv[rows_k, head] = (more_k * scale).to(dk.dtype), more_v.to(dv.dtype)
                continue
            for to, more, width in ((dk, more_k, dim), (dv, more_v, dim_v)):
                to[head_k, to_k * width : (to_k + lk) * width].view(lk, width)[:, : more.shape[1]] += more.float()


def postprocess(width, tile, accumulated, result, scale, cu, used, _blocks):
    for i, (at, length) in enumerate(spans(cu, used)):
        to = padded(at, i, tile)
        rows = accumulated[:, to * width : (to + length) * width].view(result.shape[1], length, width)
        result[at : at + length] = (rows[..., : result.shape[2]] * scale).transpose(0, 1).to(result.dtype)
