"""cuDNN's plans: a graph for one kind of attention, built once and run with the pointers of each call.

A plan knows no token count. Sequences are cuDNN's batch; where each lies in the rows, and how long it is, are tensors that the
device reads. Names of ``nvidia-cudnn-frontend`` that are not public were read in 1.32.
"""

from __future__ import annotations

import itertools
import threading
from array import array
from functools import cache
from typing import Any, NamedTuple

import torch

from varlen_inductor import _compat_operators
from varlen_inductor.ops.problem import UNBOUNDED, Rule

FORWARD = ("q", "k", "v", "o", "stats")
FORWARD_ALONE = FORWARD[:4]
BACKWARD = ("q", "k", "v", "o", "stats", "g", "dq", "dk", "dv")
"""The tensors of a graph, in the order of their pointers. Then come, in the same order, the offsets of each; then the lengths
of query and key, and for dropout the seed and the offset of the random numbers."""

STRIDED = ("q", "k", "v", "g", "dq", "dk", "dv")
"""Those whose strides are the caller's, in the order of ``Key.strides``; a forward has the first three."""

OF_QUERIES = frozenset({"q", "o", "stats", "g", "dq"})
"""Those whose rows are queries; the rows of the others are keys."""


class Key(NamedTuple):
    """All that a plan depends on. Counts and bounds are rounded up, so that a model with varying lengths has few plans."""

    backward: bool
    device: torch.device
    dtype: torch.dtype
    sequences: int
    max_q: int
    max_k: int
    heads: int
    heads_k: int
    head_dim: int
    head_dim_v: int
    strides: tuple[tuple[int, ...], ...]
    """Of query, key and value, and in a backward of the gradient of out and of the three gradients that are written: between
    tokens, heads and elements."""
    square: bool
    """Whether every sequence has as many keys as queries."""
    wide: bool
    """Whether offsets need 64 bits."""
    rule: Rule
    deterministic: bool = False
    stats: bool = True
    """Whether a forward writes them."""


class Scratch(NamedTuple):
    """The memory of one call in one piece: the workspace, the numbers of queries and of keys, the offsets of each tensor, stats.

    A call that needs no stats, or brings its own workspace, can do without the ends of it.

    Places are in bytes and multiples of 16, which cuDNN's pointers must be.
    """

    pitch: int
    """How many numbers a row of numbers or offsets has."""
    lengths: int
    """Where the numbers of queries are; then come those of keys, and then the offsets, which may be wide."""
    pointers: tuple[int, ...]
    """Where the offsets of each tensor are, in the plan's order, then where the numbers of queries and of keys are."""
    stats: int
    """Where (T, H) float32 begin."""
    arguments: tuple[int, ...]
    """Of the kernel that writes offsets and numbers, as far as they follow from the plan: how many of each it writes, ``pitch``,
    the rows' strides of ``BACKWARD``, and whether offsets are wide."""


def scratch_of(key: Key, token_strides: tuple[int, ...], workspace_size: int) -> Scratch:
    """For a plan with tensors of these strides from row to row."""
    pitch = -(-(key.sequences + 1) // 4) * 4
    row = 4 * pitch
    step = 2 * row if key.wide else row
    lengths = -(-workspace_size // 16) * 16
    offsets = lengths + 2 * row
    # The kernel that writes offsets writes those of stats, too, where there are none.
    stats = offsets + max(len(token_strides), len(FORWARD)) * step
    padding = (0,) * (len(BACKWARD) - len(token_strides))
    arguments = (key.sequences, pitch, *token_strides, *padding, key.wide)
    pointers = (*range(offsets, offsets + len(token_strides) * step, step), lengths, lengths + row)
    return Scratch(pitch, lengths, pointers, stats, arguments)


class Plan:
    """A built graph. ``run`` starts it.

    Attributes:
        key: what it is for.
        number: tells plans apart in the keys of other caches.
        names: the tensors that have rows, ``FORWARD``, ``FORWARD_ALONE`` or ``BACKWARD``.
        token_strides: elements from one row to the next, for each of ``names``.
        most_rows: with more rows an offset may not fit.
        scratch: the memory that a run needs, the workspace among it.
    """

    _numbers = itertools.count()

    def __init__(self, key: Key) -> None:
        self.key, self.number = key, next(Plan._numbers)
        self.names = names_of(key)
        layouts = layouts_of(key)
        self.token_strides = tuple(layouts[name][1][2] for name in self.names)
        self.most_rows = (2**63 if key.wide else 2**31) // max(self.token_strides) - 1
        graph = _build(key, layouts, self.names)
        self.scratch = scratch_of(key, self.token_strides, graph.get_workspace_size())
        graph._prepare_variant_pack_template()
        order = list(graph._get_variant_pack_uids_sorted())
        count = 2 * len(self.names) + (4 if key.rule.dropout_p > 0.0 else 2)
        if order != list(range(1, count + 1)):
            raise RuntimeError(f"cuDNN's graph wants the tensors {order}, not 1 to {count}")
        self._graph = graph  # owns what _execute is bound to
        self._execute = graph._execute_with_raw_ptrs
        self._count = count

    def run(self, index: int, stream: int, pointers: tuple[int, ...], workspace: int) -> None:
        """Run on ``stream`` of device ``index``, which is the current device."""
        numbers = array("Q", pointers)
        self._execute(numbers.buffer_info()[0], self._count, workspace, _handle(index, stream))


_plans: dict[Key, Plan] = {}
"""All plans ever made: a recorded CUDA graph may replay one at any time. Sizes are rounded, so there are few."""
_building = threading.Lock()


def plan_for(key: Key) -> Plan:
    """The plan for ``key``, built if there is none yet."""
    plan = _plans.get(key)
    return _new_plan(key) if plan is None else plan


def _new_plan(key: Key) -> Plan:
    with _building:
        plan = _plans.get(key)
        if plan is None:
            plan = _plans[key] = Plan(key)
        return plan


# --- the library -----------------------------------------------------------------------------------------------------


@cache
def library() -> Any:
    """The package ``cudnn``, which is imported when first needed.

    Raises:
        Exception: whatever its import does; also an ``ImportError`` where it is not the package that this module knows.
    """
    import cudnn  # type: ignore[import-not-found,unused-ignore]

    graph = getattr(getattr(cudnn, "_pybind_module", None), "backend_graph", None)
    if not hasattr(graph, "_execute_with_raw_ptrs"):
        version = getattr(cudnn, "__version__", "of unknown version")
        raise ImportError(f"nvidia-cudnn-frontend {version} is installed, and 1.32 or later is needed")
    return cudnn


class _Handles(threading.local):
    """cuDNN's handles, by the index of their device. A handle must not be used by two threads."""

    def __init__(self) -> None:
        self.by_device: dict[int, Any] = {}


_handles = _Handles()


def _handle(index: int, stream: int) -> int:
    """cuDNN's handle for this thread and device ``index``, set to ``stream``."""
    handle = _handles.by_device.get(index)
    if handle is None:
        with torch.cuda.device(index):
            handle = _handles.by_device[index] = library().create_handle()
    if handle.stream != stream:
        library().set_stream(handle, stream)
    return handle.backend_handle  # type: ignore[no-any-return]


# --- graphs ----------------------------------------------------------------------------------------------------------


def names_of(key: Key) -> tuple[str, ...]:
    """The tensors of the graph."""
    if key.backward:
        return BACKWARD
    return FORWARD if key.stats else FORWARD_ALONE


def layouts_of(key: Key) -> dict[str, tuple[list[int], list[int]]]:
    """Sizes and strides (sequence, head, row, element) of each tensor.

    With offsets the stride between sequences is not used, but must look like one.
    """
    heads, heads_k, dim, dim_v = key.heads, key.heads_k, key.head_dim, key.head_dim_v
    packed = {
        "o": (heads * dim_v, dim_v, 1),
        "stats": (heads, 1, 1),
    }
    strides = {**packed, **dict(zip(STRIDED, key.strides, strict=False))}
    of_keys, dims = {"k": dim, "dk": dim, "v": dim_v, "dv": dim_v}, {"q": dim, "dq": dim, "stats": 1}
    layouts = {}
    for name, (token, head, element) in strides.items():
        if name in of_keys:
            size = [key.sequences, heads_k, key.max_k, of_keys[name]]
        else:
            size = [key.sequences, heads, key.max_q, dims.get(name, dim_v)]
        layouts[name] = (size, [size[2] * token, head, token, element])
    return layouts


def _build(key: Key, layouts: dict[str, tuple[list[int], list[int]]], names: tuple[str, ...]) -> Any:
    cudnn = library()
    types = cudnn.data_type
    data = types.HALF if key.dtype == torch.float16 else types.BFLOAT16
    graph = cudnn._pybind_module.backend_graph(
        name="varlen_attn",
        io_data_type=data,
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
        handle=_handle(key.device.index, _compat_operators.current_stream_pointer(key.device.index)),
    )
    uids = itertools.count(len(names) + 1)

    def numbers(count: int, dtype: Any) -> Any:
        return graph.tensor(dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=dtype, uid=next(uids))

    offsets = {name: numbers(key.sequences + 1, types.INT64 if key.wide else types.INT32) for name in names}
    options = _options(key, numbers)

    def operand(name: str) -> Any:
        size, stride = layouts[name]
        dtype = types.FLOAT if name == "stats" else data
        uid = names.index(name) + 1
        return graph.tensor(dim=size, stride=stride, data_type=dtype, ragged_offset=offsets[name], uid=uid, name=name)

    if key.backward:
        inputs = {name: operand(name) for name in ("q", "k", "v", "o", "stats")}
        results = graph.sdpa_backward(**inputs, dO=operand("g"), use_deterministic_algorithm=key.deterministic, **options)
    else:
        inputs = {name: operand(name) for name in ("q", "k", "v")}
        results = graph.sdpa(**inputs, generate_stats=key.stats, **options)[: 1 + key.stats]
    for name, result in zip(names[-3:] if key.backward else names[3:], results, strict=True):
        size, stride = layouts[name]
        result.set_output(True).set_uid(names.index(name) + 1).set_dim(size).set_stride(stride)
        result.set_data_type(types.FLOAT if name == "stats" else data).set_ragged_offset(offsets[name])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph


def _options(key: Key, numbers: Any) -> dict[str, Any]:
    """What forward and backward are told alike; ``numbers`` makes a tensor of integers."""
    cudnn = library()
    types, rule = cudnn.data_type, key.rule
    options: dict[str, Any] = {
        "attn_scale": rule.scale,
        "use_padding_mask": True,
        "seq_len_q": numbers(key.sequences, types.INT32),
        "seq_len_kv": numbers(key.sequences, types.INT32),
    }
    if rule.windowed:
        # Both corners are the same where a sequence has as many keys as queries. cuDNN has more kernels for the first.
        corner = cudnn.diagonal_alignment
        options["diagonal_alignment"] = corner.TOP_LEFT if key.square else corner.BOTTOM_RIGHT
    if rule.window_left != UNBOUNDED:
        options["diagonal_band_left_bound"] = rule.window_left + 1  # it counts the query's own key
    if rule.window_right != UNBOUNDED:
        options["diagonal_band_right_bound"] = rule.window_right
    if rule.dropout_p > 0.0:
        options["dropout"] = (rule.dropout_p, numbers(1, types.INT64), numbers(1, types.INT64))
    return options
