"""Plan and body: how a packed graph runs.

The number of valid tokens is known only when the data is. The *plan* finds it (one host synchronisation), rounded up so that
few different numbers occur, and the *body* gets the packed rows' indices as an input whose length is an ordinary dynamic
size: one compiled graph for all numbers. When packing cannot pay, or a fact that it relies on does not hold, the padded graph
runs, exactly as the user wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from varlen_inductor import _compat, config
from varlen_inductor.ops import packing

if TYPE_CHECKING:
    from varlen_inductor.backend import InnerCompiler


class PackedProgram:
    """What Dynamo calls in the place of a graph that was packed.

    Args:
        plan: the plan graph: the inputs of the model's graph to the masks of ``domains`` domains and one flag for each fact.
        body: the packed graph: the same inputs, then ``index``, ``inverse`` and ``cu_seqlens`` of each domain.
        padded: the graph as Dynamo gave it.
        domains: how many there are.
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
        inner: InnerCompiler,
        dynamic: bool | None,
    ) -> None:
        self.plan = plan
        self.domains = domains
        # Knobs are read now: later calls may come from another thread, where `config.patch` of the compile does not reach.
        self.round_tokens = config.round_tokens
        self.max_density = config.max_density
        self.body = inner.nested(_as_function(body), dynamic=dynamic)
        self.padded = inner.nested(_as_function(padded), dynamic=dynamic)

    def __call__(self, *args: Any) -> Any:
        with _compat.plain_dispatch():
            outcome = self.plan(*args)
            masks = outcome[: self.domains]
            rows = self._rows(masks, outcome[self.domains :], args)
            plans = None if rows is None else [packing.plan_packed(mask, n) for mask, n in zip(masks, rows)]
        if plans is None:
            return self.padded(*args)
        inputs = [tensor for one in plans for tensor in one]
        for index in inputs[::3]:
            torch._dynamo.maybe_mark_dynamic(index, 0)
        return self.body(*args, *inputs)

    def _rows(self, masks: Sequence[torch.Tensor], flags: Sequence[torch.Tensor], args: Sequence[Any]) -> list[int] | None:
        """How many rows each domain is packed into, or None when the padded graph should run."""
        # One tensor and one copy, so that the host waits for the device once.
        numbers = torch.stack([mask.sum() for mask in masks] + [flag.to(torch.int64) for flag in flags]).tolist()
        counts, facts = numbers[: self.domains], numbers[self.domains :]
        positions = [mask.numel() for mask in masks]
        if not all(facts) or min(counts) == 0 or sum(counts) > self.max_density * sum(positions):
            return None
        taken: set[int] = {size for x in args if isinstance(x, torch.Tensor) and not x.requires_grad for size in x.shape}
        rows = []
        for count in counts:
            # One more than the count, so that there always is a dead row to make up their sequence. A size that some input
            # has too would be taken for the same size by the compiler, which would then compile again.
            n = -(-(count + 1) // self.round_tokens) * self.round_tokens
            while n in taken:
                n += self.round_tokens
            taken.add(n)
            rows.append(n)
        return rows if sum(rows) < sum(positions) else None


def _as_function(gm: fx.GraphModule) -> Callable[..., Any]:
    def graph(*args: Any) -> Any:
        return gm(*args)

    return graph
