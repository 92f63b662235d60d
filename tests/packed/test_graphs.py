"""The graphs that small models become, as text: the plan, and the body that runs on valid tokens.

After a deliberate change: ``EXPECTTEST_ACCEPT=1 python -m pytest tests/packed/test_graphs.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch.nn import functional as F

from varlen_inductor import config, driver, explain
from varlen_inductor.driver import Rewrite

B, S, E = 2, 6, 8


class Attention(nn.Module):
    """One head, and no more than what must be there."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key_value = nn.Linear(E, E, bias=False), nn.Linear(E, 2 * E, bias=False)

    def forward(self, x: Tensor, memory: Tensor, valid: Tensor) -> Tensor:
        key, value = self.key_value(memory).unsqueeze(1).chunk(2, -1)
        return F.scaled_dot_product_attention(self.query(x).unsqueeze(1), key, value, attn_mask=valid[:, None, None, :]).squeeze(1)


class Encoder(nn.Module):
    def __init__(self, pool: Callable[[Tensor, Tensor], Tensor] = lambda x, valid: x) -> None:
        super().__init__()
        self.attend, self.norm, self.feed = Attention(), nn.LayerNorm(E), nn.Linear(E, E)
        self.pool = pool

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = self.norm(x + self.attend(x, x, valid))
        return self.pool(x + F.relu(self.feed(x)), valid)


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.cross = Attention(), Attention(), Attention()

    def forward(self, source: Tensor, source_valid: Tensor, target: Tensor, target_valid: Tensor) -> Tensor:
        memory = source + self.encode(source, source, source_valid)
        target = target + self.decode(target, target, target_valid)
        return target + self.cross(target, memory, source_valid)


def rewrite(model: nn.Module, *inputs: Tensor) -> Rewrite:
    """What the passes make of a model."""
    found: list[Rewrite] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        found.append(driver.rewrite_graph(gm, mode="model"))
        return gm.forward

    with config.patch(strict=True):
        torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    (only,) = found
    return only


def tokens() -> tuple[Tensor, Tensor]:
    return torch.randn(B, S, E), torch.arange(S) < torch.tensor([[5], [2]])


def text(gm: fx.GraphModule | None) -> str:
    """One line for each node, operators without their namespace, inputs by the names the model gave them."""
    assert gm is not None
    lines = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            continue
        args = [fx.node._format_arg(arg) for arg in node.args]
        args += [f"{name}={fx.node._format_arg(arg)}" for name, arg in node.kwargs.items()]
        if node.op == "output":
            lines.append(f"return {args[0]}")
        else:
            target = "getitem" if "getitem" in str(node.target) else str(node.target)
            target = re.sub(r"^(aten|varlen_inductor)\.|\.(default|Tensor)$", "", target)
            lines.append(f"{node.name} = {target}({', '.join(args)})")
    return "\n".join(_plain(line) for line in lines)


def _plain(line: str) -> str:
    """Dynamo's name of a parameter or input back to the model's own, other names without what FX appends to them."""
    line = re.sub(r"_(default|tensor)(?=(_\d+)?\b)", "", line.replace("%", ""))
    line = re.sub(r"\btokens_(\d)_(\w+)", r"\2_\1", line)
    line = re.sub(r"l_self_modules_(\w+?)_parameters_(\w+?)_(?=\W)", lambda m: f"{m[1]}.{m[2]}".replace("_modules_", "."), line)
    return re.sub(r"\bl_(\w+)_(?=\W|$)", r"\1", line)


def test_encoder() -> None:
    found = rewrite(Encoder(), *tokens())
    assert found.longest_first
    assert_expected_inline(text(found.plan), """return (valid,)""")
    assert_expected_inline(
        text(found.gm),
        """\
reshape = reshape(x, [12, 8])
pack = pack(reshape, index_0, inverse_0)
linear = linear(pack, attend.key_value.weight)
reshape_1 = reshape(linear, [-1, 1, 16])
chunk = chunk(reshape_1, 2, 2)
getitem = getitem(chunk, 0)
getitem_1 = getitem(chunk, 1)
linear_1 = linear(pack, attend.query.weight)
reshape_2 = reshape(linear_1, [-1, 1, 8])
varlen_attn = varlen_attn(reshape_2, getitem, getitem_1, cu_seqlens_0, cu_seqlens_0, 256, 256, tails_unread=True)
getitem_2 = getitem(varlen_attn, 0)
reshape_3 = reshape(getitem_2, [-1, 1, 8])
reshape_4 = reshape(reshape_3, [-1, 8])
add = add(pack, reshape_4)
layer_norm = layer_norm(add, [8], norm.weight, norm.bias)
linear_2 = linear(layer_norm, feed.weight, feed.bias)
relu = relu(linear_2)
add_1 = add(layer_norm, relu)
unpack = unpack(add_1, index_0, inverse_0, 0.0, False)
reshape_5 = reshape(unpack, [2, 6, 8])
contiguous = contiguous(reshape_5)
return (contiguous,)""",
    )


def test_encoder_and_decoder() -> None:
    found = rewrite(EncoderDecoder(), *tokens(), *tokens())
    assert not found.longest_first, "the rows of source and target must stay side by side"
    assert_expected_inline(text(found.plan), """return (source_valid, target_valid)""")
    assert_expected_inline(
        text(found.gm),
        """\
reshape_5 = reshape(target, [12, 8])
pack_1 = pack(reshape_5, index_1, inverse_1)
reshape = reshape(source, [12, 8])
pack = pack(reshape, index_0, inverse_0)
linear = linear(pack, encode.key_value.weight)
reshape_1 = reshape(linear, [-1, 1, 16])
chunk = chunk(reshape_1, 2, 2)
getitem = getitem(chunk, 0)
getitem_1 = getitem(chunk, 1)
linear_1 = linear(pack, encode.query.weight)
reshape_2 = reshape(linear_1, [-1, 1, 8])
varlen_attn = varlen_attn(reshape_2, getitem, getitem_1, cu_seqlens_0, cu_seqlens_0, 256, 256, tails_unread=True)
getitem_2 = getitem(varlen_attn, 0)
reshape_3 = reshape(getitem_2, [-1, 1, 8])
reshape_4 = reshape(reshape_3, [-1, 8])
add = add(pack, reshape_4)
linear_2 = linear(pack_1, decode.key_value.weight)
reshape_6 = reshape(linear_2, [-1, 1, 16])
chunk_1 = chunk(reshape_6, 2, 2)
getitem_3 = getitem(chunk_1, 0)
getitem_4 = getitem(chunk_1, 1)
linear_3 = linear(pack_1, decode.query.weight)
reshape_7 = reshape(linear_3, [-1, 1, 8])
varlen_attn_1 = varlen_attn(reshape_7, getitem_3, getitem_4, cu_seqlens_1, cu_seqlens_1, 256, 256, tails_unread=True)
getitem_5 = getitem(varlen_attn_1, 0)
reshape_8 = reshape(getitem_5, [-1, 1, 8])
reshape_9 = reshape(reshape_8, [-1, 8])
add_1 = add(pack_1, reshape_9)
linear_4 = linear(add, cross.key_value.weight)
reshape_10 = reshape(linear_4, [-1, 1, 16])
chunk_2 = chunk(reshape_10, 2, 2)
getitem_6 = getitem(chunk_2, 0)
getitem_7 = getitem(chunk_2, 1)
linear_5 = linear(add_1, cross.query.weight)
reshape_11 = reshape(linear_5, [-1, 1, 8])
varlen_attn_2 = varlen_attn(reshape_11, getitem_6, getitem_7, cu_seqlens_1, cu_seqlens_0, 256, 256, tails_unread=True)
getitem_8 = getitem(varlen_attn_2, 0)
reshape_12 = reshape(getitem_8, [-1, 1, 8])
reshape_13 = reshape(reshape_12, [-1, 8])
add_2 = add(add_1, reshape_13)
unpack = unpack(add_2, index_1, inverse_1, 0.0, False)
reshape_14 = reshape(unpack, [2, 6, 8])
contiguous = contiguous(reshape_14)
return (contiguous,)""",
    )


def test_mean_of_valid_tokens() -> None:
    """Only what is reduced comes back to padded rows."""

    def mean(x: Tensor, valid: Tensor) -> Tensor:
        weight = valid.unsqueeze(-1)
        return (x * weight).sum(1) / weight.sum(1)

    found = rewrite(Encoder(mean), *tokens())
    assert_expected_inline(text(found.plan), """return (valid,)""")
    assert_expected_inline(
        text(found.gm),
        """\
reshape_5 = reshape(valid, [12])
pack_1 = pack(reshape_5, index_0, inverse_0)
reshape = reshape(x, [12, 8])
pack = pack(reshape, index_0, inverse_0)
linear = linear(pack, attend.key_value.weight)
reshape_1 = reshape(linear, [-1, 1, 16])
chunk = chunk(reshape_1, 2, 2)
getitem = getitem(chunk, 0)
getitem_1 = getitem(chunk, 1)
linear_1 = linear(pack, attend.query.weight)
reshape_2 = reshape(linear_1, [-1, 1, 8])
varlen_attn = varlen_attn(reshape_2, getitem, getitem_1, cu_seqlens_0, cu_seqlens_0, 256, 256, tails_unread=True)
getitem_2 = getitem(varlen_attn, 0)
reshape_3 = reshape(getitem_2, [-1, 1, 8])
reshape_4 = reshape(reshape_3, [-1, 8])
add = add(pack, reshape_4)
layer_norm = layer_norm(add, [8], norm.weight, norm.bias)
linear_2 = linear(layer_norm, feed.weight, feed.bias)
relu = relu(linear_2)
add_1 = add(layer_norm, relu)
reshape_6 = reshape(pack_1, [-1, 1])
unpack_1 = unpack(reshape_6, index_0, inverse_0, 0.0, False)
reshape_8 = reshape(unpack_1, [2, 6, 1])
mul = mul(add_1, reshape_6)
unpack = unpack(mul, index_0, inverse_0, 0.0, False)
reshape_7 = reshape(unpack, [2, 6, 8])
sum_1 = sum.dim_IntList(reshape_7, [1])
sum_2 = sum.dim_IntList(reshape_8, [1])
div = div(sum_1, sum_2)
return (div,)""",
    )


def test_first_token() -> None:
    """That it is valid is for the plan to find out."""
    found = rewrite(Encoder(lambda x, valid: x[:, 0]), *tokens())
    assert_expected_inline(
        text(found.plan),
        """\
slice = slice(valid, 1, 0, 1)
all = all(slice)
return (valid, all)""",
    )
    assert_expected_inline(
        text(found.gm),
        """\
reshape = reshape(x, [12, 8])
pack = pack(reshape, index_0, inverse_0)
linear = linear(pack, attend.key_value.weight)
reshape_1 = reshape(linear, [-1, 1, 16])
chunk = chunk(reshape_1, 2, 2)
getitem = getitem(chunk, 0)
getitem_1 = getitem(chunk, 1)
linear_1 = linear(pack, attend.query.weight)
reshape_2 = reshape(linear_1, [-1, 1, 8])
varlen_attn = varlen_attn(reshape_2, getitem, getitem_1, cu_seqlens_0, cu_seqlens_0, 256, 256, tails_unread=True)
getitem_2 = getitem(varlen_attn, 0)
reshape_3 = reshape(getitem_2, [-1, 1, 8])
reshape_4 = reshape(reshape_3, [-1, 8])
add = add(pack, reshape_4)
layer_norm = layer_norm(add, [8], norm.weight, norm.bias)
linear_2 = linear(layer_norm, feed.weight, feed.bias)
relu = relu(linear_2)
add_1 = add(layer_norm, relu)
unpack = unpack(add_1, index_0, inverse_0, 0.0, True)
reshape_5 = reshape(unpack, [2, 6, 8])
select = select.int(reshape_5, 1, 0)
return (select,)""",
    )


def test_explain() -> None:
    said = explain(Encoder(lambda x, valid: x[:, 0]), *tokens())
    shown = re.sub(r"\(test_graphs.py:\d+\)|test_graphs.py:\d+", "(line)", said.reports[0].table(130))
    assert_expected_inline(
        "\n".join(line.rstrip() for line in shown.splitlines()),
        """\
graph 0/0: 1 of 1 attention rewritten, 14 operations on valid tokens only, in 1 region (1 pack, 1 unpack)

#  attention                     mask              decision            kernel
-  ----------------------------  ----------------  ------------------  ------
0  scaled_dot_product_attention  key: valid[b, k]  rewritten (packed)  cpu
   attend (line)

kernel of all: cpu (not aten_flash, triton, cudnn, flash4, flash3, flash2: it runs on CUDA only; not math: cpu comes first)

region 0: 14 operations on the tokens where valid[b, k]; 1 pack, 1 unpack
edge    value        why                          source
------  -----------  ---------------------------  ------------------------------------
pack    l_kwargs_x_  first used packed by linear  attend.key_value (line)
unpack  add_1        select runs on padded rows   (line)

note: batches with more than 90% of them valid (config.max_density) run padded

note: checked at run time: position 0 of every sequence is valid (valid[b, k]); if not, the padded graph runs""",
    )
