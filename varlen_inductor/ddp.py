"""DistributedDataParallel: one rewrite for the whole graph, one compiled piece per gradient bucket.

When a compiled model is wrapped in DDP, Dynamo cuts each graph at the borders of DDP's buckets before a backend sees it, so
that gradients are sent while the backward still runs. Later pieces would then get a mask derived in an earlier one and no
proof about it. We take the cut from before our passes to after them: our backend is given the whole graph, and what it
compiles in the end is cut instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import fx

from varlen_inductor import _compat

Splitter = Callable[[fx.GraphModule, _compat.ExampleInputs, _compat.CompilerFn], _compat.CompiledFn]

_splitter: ContextVar[Splitter | None] = ContextVar("varlen_inductor_ddp_splitter", default=None)


def install(is_ours: Callable[[Any], bool]) -> None:
    """Make Dynamo's DDP optimizer hand whole graphs to the backends that ``is_ours`` recognises. Further calls do nothing."""
    optimizer_class = _compat.ddp_optimizer_class()
    if optimizer_class is None or hasattr(optimizer_class.compile_fn, "_varlen_inductor"):
        return
    cut = optimizer_class.compile_fn

    @functools.wraps(cut)
    def compile_fn(self: Any, gm: fx.GraphModule, example_inputs: _compat.ExampleInputs, **kwargs: Any) -> Any:
        if not is_ours(_compat.innermost_backend(self.backend_compile_fn)):
            return cut(self, gm, example_inputs, **kwargs)

        def split(rewritten: fx.GraphModule, inputs: _compat.ExampleInputs, compiler: _compat.CompilerFn) -> Any:
            _compat.adopt_dynamo_attributes(rewritten, gm)
            again = optimizer_class(
                bucket_bytes_cap=self.bucket_bytes_cap,
                backend_compile_fn=compiler,
                first_bucket_cap=self.first_bucket_cap,
            )
            return cut(again, rewritten, inputs)

        with _split_by(split):
            return self.backend_compile_fn(gm, example_inputs, **kwargs)

    compile_fn._varlen_inductor = True  # type: ignore[attr-defined]
    optimizer_class.compile_fn = compile_fn  # type: ignore[attr-defined]


@contextmanager
def _split_by(split: Splitter | None) -> Iterator[None]:
    token = _splitter.set(split)
    try:
        yield
    finally:
        _splitter.reset(token)


def compile_in_buckets(
    gm: fx.GraphModule, example_inputs: _compat.ExampleInputs, compiler: _compat.CompilerFn
) -> _compat.CompiledFn:
    """Compile a graph with ``compiler``: cut at DDP's buckets if Dynamo would have cut it, else in one piece."""
    split = _splitter.get()
    if split is None:
        return compiler(gm, example_inputs)
    with _split_by(None):
        return split(gm, example_inputs, compiler)
