"""The Triton kernels compile for devices that this machine need not have, and fit their shared memory.

The interpreter forgives much that the compiler does not, and a tile that is too large fails only when it is launched.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from varlen_inductor.ops import plan_kernels
from varlen_inductor.ops.backends import cudnn_rows, order, rows, tails, triton_backward, triton_forward, triton_kernel

SHARED_MEMORY = {90: 227 * 1024, 86: 99 * 1024}
KERNELS = {
    "forward": triton_forward.forward_kernel,
    "query_gradient": triton_backward.query_kernel,
    "key_gradient": triton_backward.key_kernel,
}
TYPES = {
    **dict.fromkeys(("lse", "delta", "stats"), "*fp32"),
    **dict.fromkeys(("cu_q", "cu_k", "used_k", "used", "ends_q", "ends_k", "end", "end_q", "end_k"), "*i32"),
    **dict.fromkeys(("buffer", "block_table", "starts_q", "used_q", "starts_k"), "*i32"),
    **dict.fromkeys(("position_q", "position_k", "rng_state"), "*i64"),
    **dict.fromkeys(("scale", "inner", "scale_out", "keep"), "fp32"),
    "threshold": "i64",
}


PLAN_TYPES = {
    **dict.fromkeys(("mask", "index", "inverse", "count"), "*i64"),
    **dict.fromkeys(("rows", "cu_seqlens"), "*i32"),
    "flag": "*i1",
    "labels": "*i64",
}


def compiled(
    kernel: Any, constants: dict[str, Any], element: str, capability: int, types: dict[str, str] = TYPES, **options: Any
) -> Any:
    """``kernel`` for a device of this capability. Tensors are aligned and contiguous in their last dim."""
    signature, values, hints = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants or name in ("stride_qd", "stride_kd", "stride_vd", "stride_gd"):
            signature[name], values[(place,)] = "constexpr", constants.get(name, 1)
            continue
        stride = name.startswith("stride")
        tensor = name in ("query", "key", "value", "out", "kept") or name.startswith("grad")
        signature[name] = f"*{element}" if tensor else types.get(name, "i32")
        if tensor or stride:
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


NO_PAGES = ("block_table", "stride_t", "stride_kp", "stride_vp")
CASES = [
    (torch.bfloat16, 64, 90, {"RIGHT": True}, ("used_k", "position_q", "position_k", "rng_state", "inner")),
    (torch.bfloat16, 128, 90, {}, ("used_k", "position_q", "position_k", "rng_state", "inner")),
    (torch.float32, 64, 90, {"LEFT": True, "RIGHT": True}, ("used_k", "rng_state", "inner")),
    (torch.float16, 128, 86, {"RIGHT": True}, ("position_q", "position_k", "inner")),
    (torch.bfloat16, 64, 90, {"RIGHT": True}, ("used_k", "position_q", "position_k", "rng_state")),
    (torch.bfloat16, 128, 90, {"RIGHT": True}, ("used_k", "position_q", "position_k", "rng_state")),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("dtype", "dim", "capability", "flags", "absent"), CASES, ids=lambda x: str(x) if isinstance(x, int) else ""
)
def test_attention(
    kernel: str, dtype: torch.dtype, dim: int, capability: int, flags: dict[str, bool], absent: tuple[str, ...]
) -> None:
    for table in tables_of(capability, bool(flags), "rng_state" not in absent):
        constants = {**flags, "PAGE": 0, **dict.fromkeys((*absent, *NO_PAGES))}
        result = compiled_for(kernel, dtype, dim, capability, constants, table)
        assert result.metadata.shared <= SHARED_MEMORY[capability]
        if kernel == "forward" and "rng_state" in absent:
            alone = compiled_for(kernel, dtype, dim, capability, {**constants, "lse": None}, table)
            assert alone.metadata.shared <= result.metadata.shared


def tables_of(capability: int, windowed: bool, dropout: bool) -> list[dict[tuple[int, int], triton_kernel.Tiles]]:
    """Those that may be used."""
    if capability != 90:
        return [triton_kernel.OTHER]
    if dropout:
        return [triton_kernel.HOPPER_DROPOUT]
    return [triton_kernel.HOPPER_SHORT, triton_kernel.HOPPER_WINDOWED if windowed else triton_kernel.HOPPER]


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("early", [False, True])
def test_repair(early: bool, dim: int) -> None:
    blocks = triton_kernel.HOPPER_SHORT[2, dim].forward
    constants = {"GROUPS": 2, "BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys, "LEFT": True, "RIGHT": True, "PRECISION": "tf32"}
    dims = {"DIM": dim, "DIM_V": dim, "BLOCK_D": dim, "BLOCK_DV": dim, "inner": None}
    options = {"num_warps": blocks.num_warps, "num_stages": 2}
    kernel = triton_forward.repair_kernel
    result = compiled(kernel, {**constants, **dims, "REACH": triton_kernel.REACH, "EARLY": early}, "bf16", 90, **options)
    assert result.metadata.shared <= SHARED_MEMORY[90]
    before, waits, _ = result.asm["ptx"].partition("griddepcontrol.wait")
    assert bool(waits) == early
    if early:  # nothing but the two offsets may be read before
        assert before.count("ld.global") == 2
        assert "st.global" not in before and "bra" not in before


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [16, 256, 12])
def test_pages(page_size: int, dim: int) -> None:
    """Pages of whole blocks, of parts of one, and of what no block fits."""
    constants = dict.fromkeys(("position_q", "position_k", "rng_state", "inner"))
    for table in tables_of(90, windowed=True, dropout=False):
        result = compiled_for("forward", torch.bfloat16, dim, 90, {"RIGHT": True, "PAGE": page_size, **constants}, table)
        assert result.metadata.shared <= SHARED_MEMORY[90]


def compiled_for(
    kernel: str,
    dtype: torch.dtype,
    dim: int,
    capability: int,
    constants: dict[str, Any],
    table: dict[tuple[int, int], triton_kernel.Tiles],
) -> Any:
    """One of ``KERNELS`` with the blocks that the table has for these."""
    element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    blocks = getattr(table[dtype.itemsize, dim], kernel)
    constants = {
        "GROUPS": 2,
        "DIM": dim,
        "DIM_V": dim,
        "BLOCK_D": dim,
        "BLOCK_DV": dim,
        "PRECISION": "tf32x3",
        "BLOCK_M": blocks.queries,
        "BLOCK_N": blocks.keys,
        "LEFT": False,
        "RIGHT": False,
        **constants,
    }
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    return compiled(KERNELS[kernel], constants, element, capability, **options)


def test_what_is_around_them() -> None:
    constants = {"DIM_V": 64, "BLOCK_DV": 64, "BLOCK_M": 64, "stride_od": 1}
    compiled(triton_backward.delta_kernel, {**constants, "grad_lse": None}, "bf16", 90)
    lse = {"BLOCK_LSE": rows.BLOCK_LSE}
    compiled(rows._finish_forward, {"BLOCK": rows.BLOCK, **lse}, "bf16", 90)
    compiled(rows._finish_backward, {"BLOCK": rows.BLOCK}, "bf16", 90)
    sizes = {"HEADS": 12, "DIM": 64, "HEADS_K": 4, "DIM_V": 40, "REACH": tails.REACH, "BLOCK": tails.BLOCK}
    for putting_back in (True, False):
        compiled(tails._exchange_kernel, {**sizes, "PUTTING_BACK": putting_back}, "bf16", 90)
    sizes_v = {name: size for name, size in sizes.items() if name not in ("HEADS", "DIM")}
    few, many = order.lengths_at_once(2), order.lengths_at_once(order.MOST_SEQUENCES)
    for apart, most in ((False, 0), (False, few), (True, few), (False, many), (True, many)):
        compiled(tails._hide_value_kernel, {**sizes_v, "APART": apart, "MOST": most}, "bf16", 90)
    for early in (False, True):
        finishing = {**sizes_v, "HEADS": 12, "BLOCK_ROWS": rows.BLOCK, **lse, "EARLY": early}
        ptx = compiled(tails._restore_forward_kernel, finishing, "bf16", 90).asm["ptx"]
        assert ("griddepcontrol.wait" in ptx) == early
        if early:  # which nothing but the offsets may be read before
            before, after = ptx.split("griddepcontrol.wait")
            assert before.count("ld.global") == 2
            assert "st.global" not in before and "bra" not in before
            assert "st.global" in after
    compiled(tails._restore_backward_kernel, {**sizes, "BLOCK_ROWS": rows.BLOCK}, "bf16", 90)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("longest_first", [False, True])
@pytest.mark.parametrize("batch", [1, 32, plan_kernels._MOST_ROWS])
def test_plan(alone: bool, longest_first: bool, batch: int) -> None:
    options = {"ROUND": True, "ALONE": alone, "FLAGGED": not alone, "LONGEST_FIRST": longest_first}
    options |= {"LABELED": alone, "IGNORED": -100 if alone else 0}
    compiled(plan_kernels._fill, {"BLOCK": plan_kernels._BLOCK, "BATCH": batch, **options}, "bf16", 90, PLAN_TYPES)
    compiled(plan_kernels._count_rows, {"BLOCK": plan_kernels._BLOCK}, "bf16", 90, PLAN_TYPES)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("has_used", [False, True])
def test_what_is_around_cudnn(wide: bool, has_used: bool) -> None:
    used = {"HAS_USED": has_used}
    places = {**used, "WIDE": wide, "SEQUENCES": cudnn_rows.SEQUENCES}
    heads = {"HEADS": 12, "BLOCK_HEADS": 16, "ROWS": cudnn_rows.ROWS}
    compiled(cudnn_rows._place_kernel, places, "bf16", 90)
    compiled(cudnn_rows._place_backward_kernel, {**places, **heads}, "bf16", 90)
    compiled(cudnn_rows._finish_forward_kernel, {**used, **heads, "SIZE": 768, "BLOCK": cudnn_rows.BLOCK}, "bf16", 90)
    sizes = {"SIZE_Q": 768, "SIZE_K": 256, "SIZE_V": 320}
    compiled(cudnn_rows._finish_backward_kernel, {**used, **sizes, "BLOCK": cudnn_rows.BLOCK}, "bf16", 90)
