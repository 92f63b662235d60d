"""The fused inference operators of `nn.TransformerEncoderLayer` and `nn.MultiheadAttention`, in plain operators.

In inference these modules call one operator for a whole layer (`_transformer_encoder_layer_fwd`) or a whole attention
(`_native_multi_head_attention`).  With a mask they are written out, so that the attention in them can be seen:

    before                                                     after
    %y = torch._native_multi_head_attention(                   %q, %k, %v = ... linear, view, permute, unbind ...
        %x, %x, %x, 32, 4, ..., %mask, ..., 1)                 %scores = matmul(%q * 32**-0.5, %k.transpose(-1, -2))
                                                               %scores = masked_fill(%scores, %mask, -inf)
                                                               %y = linear(matmul(softmax(%scores, -1), %v) ..., ...)

Without a mask there is nothing to gain and they stay fused.

Both operators read any mask as a boolean one, True where a key is hidden (a floating-point mask is hidden wherever it
is not 0), and give NaN to a query that sees no key; so does what is written here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_S_BY_S, _KEY_PADDING, _FULL = 0, 1, 2  # the values of `mask_type`


def decomposition(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """The function to call in place of `target`, or None to leave it as it is."""
    entry = _FUSED.get(target)
    if entry is None:
        return None
    function, mask_index, tensors = entry
    mask = kwargs.get("mask", args[mask_index] if len(args) > mask_index else None)
    if mask is None or any(isinstance(x, Tensor) and x.is_nested for x in args[:tensors]):
        return None
    return function


def transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """`aten::_transformer_encoder_layer_fwd` on (B, S, E)."""

    def attention(x: Tensor) -> Tensor:
        q, k, v = _project(x, qkv_weight, qkv_bias, num_heads)
        context, _ = _attend(q, k, v, mask, mask_type)
        return F.linear(context, proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attention(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attention(src))
    return norm_2(x + feed_forward(x))


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`aten::_native_multi_head_attention` on (B, S, E); the weights are an empty tensor if not asked for."""
    if query is key and key is value:
        q, k, v = _project(query, qkv_weight, qkv_bias, num_head)
    else:
        projected = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
        q, k, v = (_heads(F.linear(x, w, b), num_head) for x, w, b in projected)
    context, weights = _attend(q, k, v, mask, mask_type)
    out = F.linear(context, proj_weight, proj_bias)
    if not need_weights:
        return out, query.new_empty(0)
    return out, weights.mean(1) if average_attn_weights else weights


def _project(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """(B, S, E) -> three times (B, H, S, D)."""
    batch, length, _ = x.shape
    qkv = F.linear(x, weight, bias).view(batch, length, 3, num_heads, -1)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    batch, length, _ = x.shape
    return x.view(batch, length, num_heads, -1).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, mask_type: int | None) -> tuple[Tensor, Tensor]:
    """Attention on (B, H, S, D) -> context (B, S, H * D), weights (B, H, S, S)."""
    batch, _, length, head_dim = q.shape
    scores = torch.matmul(q * head_dim**-0.5, k.transpose(-2, -1))
    if mask is not None:
        hidden = mask if mask.dtype == torch.bool else mask != 0
        if mask_type == _KEY_PADDING:
            hidden = hidden.view(batch, 1, 1, -1)
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    context = torch.matmul(weights, v)
    return context.transpose(1, 2).reshape(batch, length, -1), weights


# The operator as Dynamo writes it and as ATen does -> (function, position of the mask, arguments that may be nested).
_FUSED: dict[Any, tuple[Callable[..., Any], int, int]] = {}
_entries: dict[str, tuple[Callable[..., Any], int, int]] = {
    "_transformer_encoder_layer_fwd": (transformer_encoder_layer, 18, 1),
    "_native_multi_head_attention": (multi_head_attention, 9, 3),
}
for _name, _entry in _entries.items():
    for _spelling in (
        getattr(torch, _name, None),
        getattr(torch.ops.aten, _name, None),
        getattr(getattr(torch.ops.aten, _name, None), "default", None),
    ):
        if _spelling is not None:
            _FUSED[_spelling] = _entry
