"""Our own kernels in Triton, forward and backward, wherever Triton runs.

They read query, key and value in any strides from where each sequence starts, so rows of a padded batch need no copy, know
positions and the gradient of lse, and compute the same every time. ``triton_forward`` and ``triton_backward`` hold the
kernels, ``triton_usual`` which launches are alike.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from varlen_inductor import _compat_operators
from varlen_inductor.ops.backends.base import Backend
from varlen_inductor.ops.backends.launch import Launcher, Prepared, hooked, starts_early
from varlen_inductor.ops.backends.memory import empty, empty_results
from varlen_inductor.ops.backends.tails import REACH
from varlen_inductor.ops.backends.triton_usual import usual_backward, usual_forward
from varlen_inductor.ops.problem import UNBOUNDED, Layout, Problem, Rule

MAX_HEAD_DIM = 256
_LOG2_E = math.log2(math.e)
_WIDEST = 1 << 30
MAX_SEQUENCES = 65534
"""The grid has a dimension for the sequences and one more; CUDA allows 65535."""
REPAIRERS = 8
"""So many programs for each head repair a forward: few, for usually they find nothing to do."""
DELTA_ROWS = 64
"""So many queries at once are prepared for the backward."""


class Blocks(NamedTuple):
    """Queries and keys that a program holds at once, and how Triton is to compile it."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The blocks of the three kernels."""

    forward: Blocks
    query_gradient: Blocks
    key_gradient: Blocks


# By (bytes of an element, head dim up to); the first fit holds. Those of half precision up to 128 are the fastest of some ten to
# thirty measured on an H100, in the shapes of benchmarks/kernels.py and, for the backward, in four of them (head dim 64 and 128,
# 512 and 2048 tokens, one causal). The others were chosen so that registers do not spill (compiled for sm_90 and sm_86) and shared
# memory suffices: 227 KiB on Hopper, 99 KiB on consumer devices.
HOPPER = {
    (2, 64): Tiles(Blocks(128, 64, 8, 3), Blocks(64, 32, 4, 3), Blocks(128, 64, 4, 2)),
    (2, 128): Tiles(Blocks(128, 64, 8, 3), Blocks(64, 32, 4, 3), Blocks(64, 64, 4, 1)),
    (2, 256): Tiles(Blocks(128, 32, 8, 3), Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 1)),
    (4, 64): Tiles(Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 2)),
    (4, 128): Tiles(Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 16, 4, 1)),
    (4, 256): Tiles(Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
}
HOPPER_SHORT = {
    **HOPPER,
    (2, 64): Tiles(Blocks(64, 32, 4, 3), Blocks(64, 32, 4, 3), Blocks(64, 64, 4, 3)),
    (2, 128): Tiles(Blocks(64, 32, 4, 3), Blocks(64, 32, 4, 3), Blocks(64, 64, 4, 1)),
}
"""Where no sequence has more than ``SHORT`` queries: a large block would be half empty."""
HOPPER_WINDOWED = {
    **HOPPER,
    (2, 64): Tiles(Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 3), Blocks(64, 64, 4, 3)),
    (2, 128): Tiles(Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 3), Blocks(64, 64, 4, 1)),
}
"""A window goes through a large block in part."""
SHORT = 512
OTHER = {
    (2, 64): Tiles(Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2)),
    (2, 128): Tiles(Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 2)),
    (2, 256): Tiles(Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 16, 4, 1)),
    (4, 64): Tiles(Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2)),
    (4, 128): Tiles(Blocks(32, 16, 4, 1), Blocks(32, 16, 4, 1), Blocks(32, 16, 4, 1)),
    (4, 256): Tiles(Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
}
# Dropout needs registers and shared memory for its random bits. (Measured: the forward up to 128.)
HOPPER_DROPOUT = {
    kind: Tiles(Blocks(64, 32, 4, 3), *tiles[1:]) if kind in ((2, 64), (2, 128)) else tiles for kind, tiles in OTHER.items()
}


def supports(problem: Problem) -> str | None:
    """Why the kernels cannot run the problem, or ``None``."""
    if problem.device.type != "cuda":
        return "it runs on CUDA only"
    unavailable = supports_device(problem.device)
    if unavailable is not None:
        return unavailable
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float16, bfloat16 or float32, not {problem.dtype}"
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        return f"its head dim is at most {MAX_HEAD_DIM}, not {max(problem.head_dim, problem.head_dim_v)}"
    if problem.dropout_p == 1.0:
        return "it cannot drop everything"
    return None


@cache
def supports_device(device: torch.device) -> str | None:
    """Why none of the kernels can run on the CUDA device, or ``None``."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "it is not tested on ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0, and this device has {major}.{minor}"


def forward(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every sequence; see ``Forward``. Reads keys in pages where they lie. Fills ``out`` if it is given."""
    tokens, heads, _ = query.shape
    if out is None:
        out = empty(query, tokens, heads, value.shape[-1])
    lse = empty(query, heads, tokens, dtype=torch.float32)
    rng_state = _new_rng_state(query, rule if layout.seeds is None else rule._replace(dropout_p=0.0))
    _attend(out, lse, rng_state if layout.seeds is None else layout.seeds, query, key, value, layout, rule)
    return out, lse, rng_state


def forward_drawn(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, wants_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """``out`` and ``lse``; see ``ForwardDrawn``. What is not wanted is not written."""
    tokens, heads, _ = query.shape
    out, lse = empty_results(query, (tokens, heads, value.shape[-1]), (heads, tokens) if wants_lse else None)
    _attend(out, lse, layout.seeds, query, key, value, layout, rule)
    return out, lse


def _attend(
    out: Tensor,
    lse: Tensor | None,
    rng_state: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: Rule,
) -> None:
    """Writes all of ``out`` and ``lse``. ``rng_state`` is read where something is dropped."""
    index = query.get_device()
    if index >= 0 and index != _compat_operators.current_device_index():
        with torch.cuda.device(index):
            return _attend(out, lse, rng_state, query, key, value, layout, rule)
    if rule.dropout_p == 0.0:
        rng_state = None
    stream = _stream(index)
    usual = None if stream is None else usual_forward(out, lse, rng_state, query, key, value, layout, rule)
    if stream is not None and usual is not None:
        kind, at_query, at_key, at_value, at_out, at_lse, at_q, at_k, at_rng = usual
        prepared = _prepared.get(kind)
        if prepared is not None and not hooked():
            prepared.launch(stream, at_query, at_key, at_value, at_out, at_lse, at_q, at_k, None, None, None, at_rng, None)
            return None
    tokens, heads, _ = query.shape
    query, scale = _positive_scale(query, rule.scale)
    fixed = _fixed(index, query, key, value, layout, rule, scale)
    blocks = fixed.tiles.forward
    table, page_size, key_strides, value_strides, page_strides = _pages(key, value, layout)
    sequences = _sequences(layout)
    grid = (-(-max(layout.max_q, 1) // blocks.queries), heads, sequences + 1)
    tensors = (query, key, value, out, lse, *_data(layout, rule, rng_state), table)
    addresses, kinds = _places(tensors)
    strides = (*query.stride(), *key_strides, *value_strides, *out.stride()[:2], *page_strides)
    launch, options, constants = fixed.forward
    of_kernel = (fixed.number, kinds, strides, page_size)
    last = (*strides, sequences, tokens, *fixed.scales, *fixed.numbers, *constants, page_size)
    again = _launch(launch, grid, of_kernel, stream, tensors, addresses, last, options)
    if usual is not None and again is not None:
        _keep(_prepared, usual[0], again)
    return None


def _launch(
    launch: Launcher,
    grid: tuple[int, int, int],
    key: tuple[Any, ...],
    stream: int | None,
    tensors: Sequence[Tensor | None],
    addresses: Sequence[int | None],
    last: tuple[Any, ...],
    options: dict[str, Any],
) -> Prepared | None:
    """Launch, and prepare the same launch with other addresses, if it can be."""
    launch.with_addresses(grid, key, stream, tensors, addresses, *last, **options)
    return launch.prepared(grid, key, last)


def forward_into(out: Tensor, query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """The same into ``out``; see ``ForwardInto``."""
    _, lse, _ = forward(query, key, value, layout, rule, out)
    return lse


def repair_forward(out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> None:
    """Finishes what another kernel's forward has left that reads up to `REACH` keys and values behind those of a sequence.

    Behind the last sequence ``out`` becomes zero and ``lse`` -inf. Only where ``value`` holds NaN or infinity behind the last
    sequence, in reach, which make NaN of weights that are zero, are the sequences that reach them computed anew. One launch.

    Args:
        out: shape (T_q, H, D_v), the last dim contiguous.
        lse: shape (H, T_q), float32, contiguous.
        layout: without positions, pages or ``seqused_k``, its offsets contiguous.
        rule: without dropout, with a positive scale.
    """
    index = query.get_device()
    if index >= 0 and index != _compat_operators.current_device_index():
        with torch.cuda.device(index):
            return repair_forward(out, lse, query, key, value, layout, rule)
    (rows, heads, _), rows_k = query.shape, key.shape[0]
    attention = (index, query.dtype, heads, key.shape[1], query.shape[2], value.shape[2], rule)
    fixed = _known_repairs.get(attention)
    if fixed is None:
        table, dim = HOPPER_SHORT if _is_hopper(query.device) else OTHER, max(query.shape[2], value.shape[2])
        blocks = table[2, next(limit for limit in (64, 128, 256) if dim <= limit)].forward
        constants = (*_constants(query, key, value, rule, blocks, "tf32"), REACH, starts_early(index))
        options = {"num_warps": blocks.num_warps, "num_stages": 2, **({"launch_pdl": True} if starts_early(index) else {})}
        numbers = _scales(rule.scale, rule), _numbers(rule, False)[2:]
        fixed = _keep(_known_repairs, attention, (next(_numbering), *numbers, constants, options))
    number, scales, window, constants, options = fixed
    tensors = (query, key, value, out, lse, layout.cu_seq_q, layout.cu_seq_k)
    addresses, kinds = _places(tensors)
    strides = (*query.stride(), *key.stride(), *value.stride(), *out.stride()[:2])
    _launcher("triton_forward", "repair_kernel").with_addresses(
        (REPAIRERS, heads, 1),
        (number, kinds, strides),
        _stream(index),
        tensors,
        addresses,
        *strides,
        layout.cu_seq_q.shape[0] - 1,
        rows,
        rows_k,
        *scales,
        *window,
        *constants,
        **options,
    )
    return None


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; see ``Backward``."""
    grads = empty(query, *query.shape), empty(key, *key.shape), empty(value, *value.shape)
    _differentiate(grads, grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule)
    return grads


def backward_into(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: Rule,
) -> None:
    """The same into ``grads``; see ``BackwardInto``."""
    _differentiate(grads, grad_out, None, out, lse, rng_state, query, key, value, layout, rule)


def _differentiate(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: Rule,
) -> None:
    """Writes all rows of ``grads``, whose last dims are contiguous."""
    index = query.get_device()
    if index >= 0 and index != _compat_operators.current_device_index():
        with torch.cuda.device(index):
            return _differentiate(grads, grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule)
    stream = _stream(index)
    usual = None
    if stream is not None and grad_lse is None:
        usual = usual_backward(grads, grad_out, out, lse, rng_state, query, key, value, layout, rule)
        if usual is not None and _differentiate_again(usual, out, stream):
            return None
    query, scale = _positive_scale(query, rule.scale)
    fixed = _fixed(index, query, key, value, layout, rule, scale)
    sequences = _sequences(layout)
    (rows, heads, _), (rows_k, heads_k, _) = query.shape, key.shape
    data = _data(layout, rule, rng_state)
    delta, of_delta = _delta(fixed, stream, out, grad_out, grad_lse, data[0], sequences)
    operands = (query, key, value, grad_out, lse, delta)
    addresses, kinds = _places((*operands, *grads, *data))
    at_operands, at_grads, at_data = addresses[:6], addresses[6:9], addresses[9:]
    grad_query, grad_key, grad_value = grads
    strides = (*query.stride(), *key.stride(), *value.stride(), *grad_out.stride())
    strides_q, strides_kv = grad_query.stride()[:2], (*grad_key.stride()[:2], *grad_value.stride()[:2])
    launch, options, constants = fixed.query_gradient
    of_query = _launch(
        launch,
        (-(-max(layout.max_q, 1) // fixed.tiles.query_gradient.queries), heads, sequences + 1),
        (fixed.number, kinds, strides, strides_q),
        stream,
        (*operands, grad_query, *data),
        (*at_operands, at_grads[0], *at_data),
        (*strides, *strides_q, sequences, rows, *fixed.scales, rule.scale, *fixed.numbers, *constants),
        options,
    )
    launch, options, constants = fixed.key_gradient
    of_keys = _launch(
        launch,
        (-(-max(layout.max_k, 1) // fixed.tiles.key_gradient.keys), heads_k, sequences + 1),
        (fixed.number, kinds, strides, strides_kv),
        stream,
        (*operands, grad_key, grad_value, *data),
        (*at_operands, *at_grads[1:], *at_data),
        (*strides, *strides_kv, sequences, rows, rows_k, *fixed.scales, scale, *fixed.numbers, *constants),
        options,
    )
    if usual is not None and of_delta is not None and of_query is not None and of_keys is not None:
        _keep(_prepared_backward, usual[0], PreparedBackward(of_delta, of_query, of_keys))
    return None


def _differentiate_again(usual: tuple[Any, ...], out: Tensor, stream: int) -> bool:
    """Launch what was launched for a backward of this kind, if it was; says whether. ``usual`` is as `usual_backward` makes it."""
    kind, at_out, at_grad, at_query, at_key, at_value, at_lse, at_grads, at_q, at_k, at_rng = usual
    prepared = _prepared_backward.get(kind)
    if prepared is None or hooked():
        return False
    tokens, heads, _ = out.shape
    delta = empty(out, heads, tokens, dtype=torch.float32)
    at_delta = delta.data_ptr()
    of_delta, of_query, of_keys = prepared
    of_delta.launch(stream, at_out, at_grad, None, at_delta, at_q)
    operands, data = (at_query, at_key, at_value, at_grad, at_lse, at_delta), (at_q, at_k, None, None, None, at_rng)
    of_query.launch(stream, *operands, at_grads[0], *data)
    of_keys.launch(stream, *operands, at_grads[1], at_grads[2], *data)
    return True


def _delta(
    fixed: Fixed, stream: int | None, out: Tensor, grad_out: Tensor, grad_lse: Tensor | None, ends: Tensor | None, sequences: int
) -> tuple[Tensor, Prepared | None]:
    tokens, heads, dim_v = out.shape
    delta = empty(out, heads, tokens, dtype=torch.float32)
    tensors = (out, grad_out, None if grad_lse is None else grad_lse.contiguous(), delta, ends)
    addresses, kinds = _places(tensors)
    strides = (*out.stride(), *grad_out.stride())
    launch, grid = _launcher("triton_backward", "delta_kernel"), (-(-tokens // DELTA_ROWS), heads, 1)
    last = (*strides, sequences, tokens, dim_v, _padded(dim_v), DELTA_ROWS)
    return delta, _launch(launch, grid, (fixed.number, kinds, strides), stream, tensors, addresses, last, {})


def _stream(index: int) -> int | None:
    """The current stream of the device, which is the current one; ``None`` on the CPU."""
    return None if index < 0 else _compat_operators.current_stream_pointer(index)


def _sequences(layout: Layout) -> int:
    count = layout.cu_seq_q.shape[0] - 1
    if count > MAX_SEQUENCES:
        raise RuntimeError(f"cu_seq_q has {count} sequences; the kernels take {MAX_SEQUENCES}: split the batch")
    return count


def _data(layout: Layout, rule: Rule, rng_state: Tensor | None) -> tuple[Tensor | None, ...]:
    """What tells a kernel where sequences lie and what is dropped."""
    seqused_k, position_q, position_k = layout.seqused_k, layout.position_q, layout.position_k
    if not rule.windowed:
        position_q = position_k = None
    return (
        layout.cu_seq_q.contiguous(),
        layout.cu_seq_k.contiguous(),
        None if seqused_k is None else seqused_k.contiguous(),
        None if position_q is None else position_q.contiguous(),
        None if position_k is None else position_k.contiguous(),
        None if rng_state is None or rule.dropout_p == 0.0 else rng_state.view(torch.int64).contiguous()[layout.seeds_at :],
    )


class Pages(NamedTuple):
    """The table of pages, how many keys one holds, strides within one, and those of the table's rows and from page to page."""

    table: Tensor | None
    size: int
    key_strides: tuple[int, ...]
    value_strides: tuple[int, ...]
    page_strides: tuple[int | None, ...]


def _pages(key: Tensor, value: Tensor, layout: Layout) -> Pages:
    table = layout.block_table
    if table is None:
        return Pages(None, 0, key.stride(), value.stride(), (None, None, None))
    table = table if table.stride(1) == 1 else table.contiguous()
    key_strides, value_strides = key.stride(), value.stride()
    page_strides = (table.stride(0), key_strides[0], value_strides[0])
    return Pages(table, key.shape[1], key_strides[1:], value_strides[1:], page_strides)


def _scales(scale: float, rule: Rule) -> tuple[float, float | None]:
    """``scale`` and ``inner`` of the kernels: scores in powers of 2 are scale * x, or scale * tanh(inner * x)."""
    if rule.softcap > 0.0:
        return rule.softcap * _LOG2_E, scale / rule.softcap
    return scale * _LOG2_E, None


def _numbers(rule: Rule, positions: bool) -> tuple[int, float, int, int]:
    """Random 32-bit numbers below the first are kept, which happens with the second as probability; then the window."""
    threshold = round((1.0 - rule.dropout_p) * 2**32)
    left, right = rule.window_left, rule.window_right
    if not positions:
        # The kernels add places to a side in 32 bits, and no sequence is longer than this.
        left, right = min(left, _WIDEST), min(right, _WIDEST)
    return threshold, threshold / 2**32, left, right


def _constants(query: Tensor, key: Tensor, value: Tensor, rule: Rule, blocks: Blocks, precision: str) -> tuple[Any, ...]:
    """The kernels' constants from GROUPS on, in their order."""
    return (
        query.shape[1] // key.shape[-2],
        query.shape[2],
        value.shape[-1],
        _padded(query.shape[2]),
        _padded(value.shape[-1]),
        blocks.queries,
        blocks.keys,
        rule.window_left != UNBOUNDED,
        rule.window_right != UNBOUNDED,
        precision,
    )


def _places(tensors: tuple[Tensor | None, ...]) -> tuple[list[int | None], tuple[Any, ...]]:
    """Where these are, and what of them a compiled kernel depends on."""
    addresses = [x if x is None else x.data_ptr() for x in tensors]
    return addresses, tuple([x if x is None else (x.dtype, at % 16) for x, at in zip(tensors, addresses, strict=True)])  # type: ignore[operator]


class Kernel(NamedTuple):
    """One kernel of a kind of attention."""

    launch: Launcher
    options: dict[str, Any]
    """Triton's own."""
    constants: tuple[Any, ...]
    """The kernel's, from GROUPS on, in their order."""


class PreparedBackward(NamedTuple):
    """The three launches of a backward."""

    delta: Prepared
    query_gradient: Prepared
    key_gradient: Prepared


class Fixed(NamedTuple):
    """What calls of one kind of attention have in common."""

    number: int
    """Tells kinds apart in the keys of launchers."""
    tiles: Tiles
    forward: Kernel
    query_gradient: Kernel
    key_gradient: Kernel
    scales: tuple[float, float | None]
    numbers: tuple[int, float, int, int]


_known: dict[tuple[Any, ...], Fixed] = {}
_known_repairs: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_prepared: dict[tuple[Any, ...], Prepared] = {}
_prepared_backward: dict[tuple[Any, ...], PreparedBackward] = {}
_numbering = itertools.count()
_MOST_KNOWN = 4096
_Found = TypeVar("_Found")


def _keep(known: dict[tuple[Any, ...], _Found], kind: tuple[Any, ...], found: _Found) -> _Found:
    if len(known) >= _MOST_KNOWN:
        known.clear()
    known[kind] = found
    return found


def _fixed(index: int, query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, scale: float) -> Fixed:
    """``scale`` is the positive one."""
    dtype, positions = query.dtype, layout.position_q is not None
    precision = _precision(query, value) if dtype == torch.float32 else "tf32"  # means nothing to the other dtypes
    # How a sequence is cut into blocks must not depend on the others where the batch must not matter.
    short = layout.max_q <= SHORT and not rule.batch_invariant
    kind = (index, dtype, query.shape[1:], key.shape[-2], value.shape[-1], positions, scale, rule, precision, short)
    fixed = _known.get(kind)
    if fixed is None:
        tiles = _tiles(query, value, rule, short)

        def kernel(module: str, name: str, blocks: Blocks) -> Kernel:
            options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
            return Kernel(_launcher(module, name), options, _constants(query, key, value, rule, blocks, precision))

        made = Fixed(
            next(_numbering),
            tiles,
            kernel("triton_forward", "forward_kernel", tiles.forward),
            kernel("triton_backward", "query_kernel", tiles.query_gradient),
            kernel("triton_backward", "key_kernel", tiles.key_gradient),
            _scales(scale, rule),
            _numbers(rule, positions),
        )
        fixed = _keep(_known, kind, made)
    return fixed


@cache
def _launcher(module: str, kernel: str) -> Launcher:
    return Launcher(getattr(importlib.import_module(f"varlen_inductor.ops.backends.{module}"), kernel))


def _tiles(query: Tensor, value: Tensor, rule: Rule, short: bool) -> Tiles:
    dim = max(query.shape[2], value.shape[-1])
    if not _is_hopper(query.device):
        table = OTHER
    elif rule.dropout_p > 0.0:
        table = HOPPER_DROPOUT
    elif short:
        table = HOPPER_SHORT
    else:
        table = HOPPER_WINDOWED if rule.windowed else HOPPER
    return next(tiles for (size, limit), tiles in table.items() if size == query.element_size() and dim <= limit)


@cache
def _is_hopper(device: torch.device) -> bool:
    """Or later: matrix products across a warp group, and the shared memory for it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))


def _precision(query: Tensor, value: Tensor) -> str:
    """How float32 is multiplied. Three products in TF32 make nearly one in float32, and fit the registers up to 128."""
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3" if max(query.shape[2], value.shape[-1]) <= 128 else "ieee"


def _padded(dim: int) -> int:
    """What Triton's tiles need: a power of two, and at least 16 for a matrix product."""
    return max(16, 1 << (dim - 1).bit_length())


def _positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernels take the largest score before they scale it, so their scale must be positive."""
    if scale > 0.0:
        return query, scale
    return (-query, -scale) if scale < 0.0 else (torch.zeros_like(query), 1.0)


def _new_rng_state(query: Tensor, rule: Rule) -> Tensor:
    if rule.dropout_p == 0.0:
        return empty(query, 0, dtype=torch.uint64)
    # Drawn on the device: no wait, and a CUDA graph draws anew at each replay.
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=query.device).view(torch.uint64)


BACKEND = Backend("triton", supports, forward, backward, forward_into, backward_into, forward_drawn, takes_seeds=True)
