"""Plan and body: how a packed graph runs.

The number of valid tokens is known only when the data is. The *plan* finds it (one host synchronisation), rounded up so that
few different numbers occur, and the *body* gets the packed rows' indices as an input whose length is an ordinary dynamic
size: one compiled graph for all numbers. When packing cannot pay, or a fact that it relies on does not hold, the padded graph
runs, exactly as the user wrote it.
"""

from __future__ import annotations

import functools
import logging
import operator
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from varlen_inductor import _compat, config, report
from varlen_inductor.lowering.quick_launches import QuickLaunches
from varlen_inductor.nested import MOST_KEYS
from varlen_inductor.ops import packing, plan_kernels
from varlen_inductor.ops.backends import kept
from varlen_inductor.patterns import nodes

if TYPE_CHECKING:
    from varlen_inductor.backend import InnerCompiler

PATIENCE = 8
"""After so many batches in a row that were not worth packing, the next is taken for another such."""
LOOKS_BACK_ON = ("cuda",)
"""Devices that the host waits for."""

_UNCOMPILED = (
    "varlen_inductor: a CUDA graph is being recorded around a packed model. How many tokens a batch has cannot be found out there, "
    "so it runs padded; and as it never ran padded before, what is recorded are PyTorch's own operators, not compiled code. "
    'Compile it with options={"varlen.packing": "attention"}, which waits for nothing and can be recorded, or with '
    'mode="reduce-overhead", which records graphs by itself.'
)

_log = logging.getLogger("varlen_inductor")


class PackedProgram:
    """What Dynamo calls in the place of a graph that was packed.

    Args:
        plan: the plan graph: the inputs of the model's graph to the masks of ``domains`` domains and one flag for each fact.
        body: the packed graph: the same inputs, then ``index``, ``inverse`` and ``cu_seqlens`` of each domain.
        padded: the graph as Dynamo gave it.
        domains: how many there are.
        min_positions: batches of fewer positions, padded ones included, run padded.
        longest_first: the plans lay the longest sequences first, so that a kernel has none of them left to begin at its end.
        varying: which inputs (by place) may differ in size or stride from call to call.
        inner: compiles both.
        dynamic: ``True`` when sizes of the inputs are symbolic, else None.
    """

    def __init__(
        self,
        *,
        plan: fx.GraphModule,
        body: fx.GraphModule,
        padded: fx.GraphModule,
        domains: int,
        min_positions: int,
        longest_first: bool = False,
        varying: Sequence[int],
        inner: InnerCompiler,
        dynamic: bool | None,
    ) -> None:
        self._ignored = _leave_labels_to_the_kernel(plan, domains)
        _leave_comparisons_to_the_kernel(plan, domains)
        self._plans_inputs = _drop_unused_inputs(plan)
        # The generated function itself: calling the module costs several times as much, on the way of every step.
        self.plan = plan.forward
        self.domains = domains
        self.varying = tuple(varying)
        self.sizes_vary = dynamic is not False and dynamic is not None
        self._sizes: frozenset[int] | None = None
        # Knobs are read now: later calls may come from another thread, where `config.patch` of the compile does not reach.
        self.round_tokens = config.round_tokens
        self.max_density = config.max_density
        self.min_positions = min_positions
        self.longest_first = longest_first
        self._offsets_stay = not inner.records_cuda_graphs
        self.strict = config.strict
        self.broken = False
        self.too_small = False
        self.body = inner.nested(_with_whole_chunks(body, domains, self.round_tokens), dynamic=dynamic, packed=True)
        self._padded_as_given = _as_function(padded)
        self.padded = inner.nested(self._padded_as_given, dynamic=dynamic)
        self._ran_padded: set[tuple[Any, ...]] = set()
        self.launches = QuickLaunches((self.body, self.padded))
        # Where random numbers are drawn, the two bodies draw different ones, and a step that is computed again (checkpointing)
        # must draw the same.
        self.may_look_back = not nodes.draws_random_numbers(body)
        self._in_vain = 0
        self._before: deque[_Pending] = deque()

    def __call__(self, *args: Any) -> Any:
        pending = None
        if not self.broken and not self.too_small:
            looks_back = self.may_look_back and self._in_vain >= PATIENCE and not torch.is_grad_enabled()
            with torch.no_grad():
                pending = self._look(args, looks_back)
        known_by = self._known_by(args)  # while the device is at it
        inputs = self._plan(pending, args)
        if inputs is None:
            return self._padded_step(args, known_by)
        key = (*known_by, *[index.shape[0] for index in inputs[::3]])
        if not self.body.knows(key):
            for index in inputs[::3]:
                torch._dynamo.maybe_mark_dynamic(index, 0)
        try:
            result = self.body(*args, *inputs, key=key)
        except _compat.compile_failures():
            # The body compiles when it is first called, long after the driver's own net. Nothing of it has run.
            if self.strict:
                raise
            self.broken = True
            report.publish(report.Report(error=traceback.format_exc()))
            return self._padded_step(args, known_by)
        self.launches.called()
        _compat.counters()["packed_steps"] += 1
        return result

    def _padded_step(self, args: Sequence[Any], key: tuple[Any, ...]) -> Any:
        _compat.counters()["padded_steps"] += 1
        if key not in self._ran_padded:
            if _records_users_graph(x.device for x in args if isinstance(x, Tensor)):
                # To compile and tune kernels is not allowed now. What is recorded here runs as often as its owner likes.
                _log.warning(_UNCOMPILED)
                return self._padded_as_given(*args)
            if len(self._ran_padded) >= MOST_KEYS:
                self._ran_padded.clear()
        result = self.padded(*args, key=key)
        self._ran_padded.add(key)
        self.launches.called()
        return result

    def _known_by(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """What tells apart calls that reach us through one and the same graph of Dynamo's. It has looked at the rest just now."""
        inputs = [args[i] for i in self.varying]
        sizes = [(x.shape, x.stride()) if isinstance(x, Tensor) else x for x in inputs]
        return (torch.is_grad_enabled(), *sizes)

    def _look(self, args: Sequence[Any], looks_back: bool) -> _Pending | None:
        """What is being found out about this batch, or None when the padded graph should run.

        Args:
            looks_back: not to wait for what is found out about this batch, but to run it padded, which is always right, unless
                the batch before it, when that was done with it, would have been worth packing.
        """
        outcome = self.plan(*[args[i] for i in self._plans_inputs])
        masks, flags = outcome[: self.domains], outcome[self.domains :]
        labels = None
        if self._ignored is not None:
            *flags, given = flags
            labels = (given, self._ignored)
        positions = sum(mask.numel() for mask in masks)
        if positions < self.min_positions:
            self.too_small = not self.varying  # where no size can change, there is nothing to look at again
            return None
        if _records_users_graph(mask.device for mask in masks):
            # Nothing can be found out now, and its replays would write into a number of somebody else's.
            return None
        pending = _Pending(masks, flags, self.round_tokens, positions, self.longest_first, labels)
        if looks_back and masks[0].device.type in LOOKS_BACK_ON and not self._worth_it_before(pending):
            return None
        return pending

    def _plan(self, pending: _Pending | None, args: Sequence[Any]) -> list[Tensor] | None:
        """The inputs that the body has besides those of the graph, or None when the padded graph should run. Waits."""
        if pending is None:
            return None
        counts = pending.counts()
        rows = self._rows(pending.plans, counts, args) if self._worth_it(pending, counts) else None
        if rows is None or sum(rows) >= pending.positions:
            self._in_vain += 1
            return None
        self._in_vain = 0
        finished = [plan.finish(count, n) for plan, count, n in zip(pending.plans, counts, rows)]
        if self._offsets_stay:
            for _, _, cu_seqlens in finished:
                kept.never_written(cu_seqlens)  # the body only reads it
        return [tensor for tensors in finished for tensor in tensors]

    def _worth_it(self, pending: _Pending, counts: Sequence[int]) -> bool:
        return all(counts) and sum(counts) <= self.max_density * pending.positions

    def _worth_it_before(self, pending: _Pending) -> bool:
        """Whether the batch before was worth packing, though nobody waited to know. If not, ``pending`` is the next such."""
        try:
            before = self._before.popleft()  # by one thread only, for its counts are asked for once
        except IndexError:
            before = None
        if before is not None and self._worth_it(before, before.counts()):
            return True
        self._before.append(pending)
        return False

    def _rows(self, pending: Sequence[packing.PendingPlan], counts: Sequence[int], args: Sequence[Any]) -> list[int]:
        """How many rows each domain is packed into.

        A size that some input has too would be taken for the same size by the compiler, which would then compile again when
        they differ; so such a number is passed over. Just once: attention presumes no more than two roundings of dead rows.
        """
        if self._sizes is None or self.sizes_vary:
            self._sizes = frozenset(n for x in args if isinstance(x, Tensor) and not x.requires_grad for n in x.shape)
        taken = set(self._sizes)
        rows = []
        for plan, count in zip(pending, counts):
            n = plan.rows_for(count)
            if n in taken:
                n += self.round_tokens
            taken.add(n)
            rows.append(n)
        return rows


class _Pending:
    """What the plan finds out about one batch, which the host need not know at once.

    Args:
        masks: (B, S) of each domain.
        flags: one number each: whether a fact holds that the body relies on. One that does not hold makes a count zero: then, as
            with no valid token, the padded graph runs.
        positions: how many there are in all domains.
        longest_first: how to lay the sequences.
        labels: those of the first domain, and the one that counts for nothing: all padded positions must have that.
    """

    def __init__(
        self,
        masks: Sequence[Tensor],
        flags: Sequence[Tensor],
        round_tokens: int,
        positions: int,
        longest_first: bool,
        labels: tuple[Tensor, int] | None = None,
    ) -> None:
        self.positions = positions
        self._on_host = all(map(plan_kernels.available, masks))
        flag = functools.reduce(operator.mul, flags).to(masks[0].device) if flags else None
        first, *others = masks
        self.plans = [packing.PendingPlan(first, round_tokens, self._on_host, flag, longest_first, labels)]
        self.plans += [packing.PendingPlan(mask, round_tokens, self._on_host, None, longest_first) for mask in others]

    def counts(self) -> list[int]:
        """The valid positions of each domain; waits for the device, once. To be called once."""
        if self._on_host:
            return [plan.count.wait(plan.mask.device) for plan in self.plans]  # type: ignore[union-attr]
        found: list[Any] = [plan.count for plan in self.plans]
        return (found[0] if len(found) == 1 else torch.cat(found)).tolist()  # type: ignore[no-any-return]


def _records_users_graph(devices: Iterable[torch.device]) -> bool:
    """Whether what runs on one of the devices is being recorded into a CUDA graph.

    That is a graph of the user's own: while Inductor records one of its graphs, it calls compiled code, and never the plan.
    """
    return any(d.type == "cuda" for d in devices) and torch.cuda.is_current_stream_capturing()


def _leave_labels_to_the_kernel(plan: fx.GraphModule, domains: int) -> int | None:
    """One fact that says of the first domain's labels what padded positions must have is given as these labels, the last result.

    So nothing has to be launched for it. Returns what they must have there; ``None`` if there is no such fact.
    """
    (output,) = (n for n in plan.graph.nodes if n.op == "output")
    results = list(output.args[0])
    for i, fact in enumerate(results[domains:], start=domains):
        found = _labels_of(fact, results[0])
        if found is not None:
            labels, ignored = found
            output.args = ((*results[:i], *results[i + 1 :], labels),)
            plan.graph.eliminate_dead_code()
            plan.recompile()
            return ignored
    return None


def _labels_of(fact: Any, mask: Any) -> tuple[fx.Node, int] | None:
    """Of ``all(logical_or(labels == ignored, mask.reshape(-1)))``, as `patterns.facts` writes it, the labels and ``ignored``."""
    aten = torch.ops.aten
    if fact.target is not aten.all.default or fact.args[0].target is not aten.logical_or.default:
        return None
    equal, valid = fact.args[0].args
    if equal.target is not aten.eq.Scalar or valid.target is not aten.reshape.default or valid.args != (mask, [-1]):
        return None
    labels, ignored = equal.args
    if not isinstance(ignored, int):
        return None
    flat = labels.target is aten.reshape.default and labels.args[1:] == ([-1],)
    return labels.args[0] if flat else labels, ignored


def _leave_comparisons_to_the_kernel(plan: fx.GraphModule, masks: int) -> None:
    """Masks that are `x != 0` and nothing else's business are given as `x`: one kernel less before the host can go on."""
    (output,) = (n for n in plan.graph.nodes if n.op == "output")
    results = list(output.args[0])
    for i, mask in enumerate(results[:masks]):
        if mask.target is torch.ops.aten.ne.Scalar and mask.args[1] == 0 and set(mask.users) == {output}:
            results[i] = mask.args[0]
    output.args = (tuple(results),)
    plan.graph.eliminate_dead_code()
    plan.recompile()


def _drop_unused_inputs(plan: fx.GraphModule) -> list[int]:
    """Leave the plan only the inputs that it reads, for there are hundreds; returns their places."""
    inputs = plan.graph.find_nodes(op="placeholder")
    used = [i for i, node in enumerate(inputs) if node.users]
    for node in inputs:
        if not node.users:
            plan.graph.erase_node(node)
    plan.recompile()
    return used


def _with_whole_chunks(body: fx.GraphModule, domains: int, round_tokens: int) -> Callable[..., Any]:
    """The body as a function which says of its packed rows that they are whole chunks.

    Sums over rows are made chunk by chunk (`lowering.row_sums`).
    """
    chunks = tuple(n for n in packing.CHUNKS if round_tokens % n == 0)

    def graph(*args: Any) -> Any:
        for index in args[len(args) - 3 * domains :: 3]:
            for n in chunks:
                torch._check(index.shape[0] % n == 0)
        return body(*args)

    return graph


def _as_function(gm: fx.GraphModule) -> Callable[..., Any]:
    def graph(*args: Any) -> Any:
        return gm(*args)

    return graph
