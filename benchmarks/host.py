"""What one attention takes the host in a packed graph, beside the launch of its kernel by itself.

    python benchmarks/host.py [--output FOLDER]

A problem whose kernels are over at once, so that only the host counts: 128 tokens in 32 sequences, 12 heads of 64, bfloat16. All
calls take turns, and medians over rounds are told, with quartiles. By kernel, in inference, in training and with dropout:

- *launch*: the innermost call that gets the kernels to the device, again and again with the arguments that one attention gave it:
  cuDNN's ``execute``, flash-attn-4's compiled functions, Triton's compiled launcher (not ``kernel[grid]``, which takes longer), and
  PyTorch's operator for FlashAttention 2. Only the last one allocates its results.
- *call*: what generated code calls. It also allocates the results. (For FlashAttention 2 it calls PyTorch's operator itself.)
- *graph* (forward): by how much longer a compiled graph with twelve attentions more takes to enqueue, each; so with the checks of
  sizes that Inductor puts behind each call and, in training, what autograd takes to save the results.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import save
from torch import Tensor

from varlen_inductor import inductor_pass
from varlen_inductor.lowering import attention, direct
from varlen_inductor.ops.backends import BACKENDS, aten_flash, cudnn_plan, kept, launch, replay, triton_kernel
from varlen_inductor.ops.problem import Layout, Problem, Rule

TOKENS, SEQUENCES, HEADS, HEAD_DIM = 128, 32, 12, 64
BOUND = 512
ROUNDS, CALLS = 40, 30
FEW, MANY = 4, 16

Call = Callable[[], Any]


@contextmanager
def _noted(owner: Any, name: str, note: Callable[..., Call]) -> Iterator[list[Call]]:
    """What ``owner.name`` is called with in the context, each as a call that does its part again."""
    calls: list[Call] = []
    original = getattr(owner, name)

    def noting(*args: Any, **options: Any) -> Any:
        calls.append(note(original, *args, **options))
        return original(*args, **options)

    with patch.object(owner, name, noting):
        yield calls


def _triton_launch(original: Any, launcher: launch.Launcher, grid: tuple[int, ...], key: Any, stream: int, *args: Any) -> Call:
    compiled = launcher.compiled[key]
    return partial(compiled.run, *grid, stream, compiled.function, compiled.metadata, None, None, None, *args)


def _flash4_launch(original: Any, of: replay.Replay, key: Any, tensors: tuple[Any, ...], *rows: int) -> Call:
    note = of.notes[key]
    assert isinstance(note, replay.Note)
    scratch = tuple(replay._empty(x, tensors[note.like], rows[x.of_keys], rows[2]) for x in note.scratch)
    zeroed = replay._zeros(note.zeroed, tensors[note.like], *rows) if note.zeroed else ()
    values = (*tensors, *scratch, *zeroed, *note.constants)
    steps = [(kernel, arguments(values)) for kernel, arguments in note.steps]

    def steps_again() -> None:
        for kernel, args in steps:
            kernel(*args)

    return steps_again


def _none(*args: Any) -> None:
    return None


def innermost(kernels: str, backward: bool, call: Call) -> Call:
    """The launches that ``call`` makes, with the arguments that it gives them now.

    To be asked for when everything that shares memory between calls has run: they keep the addresses.
    """
    places: dict[str, tuple[Any, str, Callable[..., Call]]] = {
        "aten_flash": (aten_flash, "_flash_backward" if backward else "_flash", partial),
        "cudnn": (cudnn_plan.Plan, "run", partial),
        "flash4": (replay.Replay, "again", _flash4_launch),
        "triton": (launch.Launcher, "again", _triton_launch),
    }
    pool = torch.cuda.MemPool()  # launches write to results, and to what was freed since: nobody else may get it
    looks = patch.multiple(triton_kernel, usual_forward=_none, usual_backward=_none)  # prepared launches are made elsewhere
    with torch.cuda.use_mem_pool(pool), looks, _noted(*places[kernels]) as calls:
        results = call()
    if not calls:
        raise RuntimeError(f"{kernels} launched nothing where it was looked for")

    def again(kept: Any = (pool, results)) -> None:
        for one in calls:
            one()

    return again


def attention_calls(kernels: str, case: str, rule: Rule) -> dict[str, Call]:
    """All that is timed of one kernel in one case."""
    training = case != "inference"
    offsets = torch.arange(0, TOKENS + 1, TOKENS // SEQUENCES, dtype=torch.int32, device="cuda")
    kept.never_written(offsets)
    query, key, value = torch.randn(TOKENS, 3, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16).unbind(1)
    options: dict[str, Any] = {"scale": rule.scale, "dropout_p": rule.dropout_p, "kernels": kernels, "tails_unread": True}
    layout = Layout(offsets, offsets, BOUND, BOUND, tails_unread=True)
    found: dict[str, Call] = {}
    found["few"], found["many"] = graph(query, key, value, offsets, dict(options), training)
    # As the graph is lowered: Inductor draws the seeds of all layers at once.
    chosen, seeds = attention._chosen(query, key, value, layout, rule, kernels), {}
    if attention._is_one_launch(chosen, layout, rule):
        options["lse_by_row"] = True
    if attention._by_seeds(chosen, layout, rule):
        seeds["seeds"] = torch.randint(-(2**63), 2**63 - 1, (2,), device="cuda")
    args = (query, key, value, offsets, offsets, BOUND, BOUND)
    drawn = seeds or rule.dropout_p == 0.0
    site = direct.site("drawn", alone=not training, **options) if drawn else direct.site("forward", **options)
    call = partial(site, *args, **seeds)
    found["call"] = call
    if training:
        out, lse, *rng_state = call()
        nothing = torch.empty(0, dtype=torch.uint64, device="cuda")
        saved = (torch.randn_like(out), None, out, lse, *(seeds.values() or rng_state or [nothing]))
        found["backward, call"] = partial(direct.site("backward", **options), *saved, *args)
    return found


def graph(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, options: dict[str, Any], training: bool) -> tuple[Call, Call]:
    """Compiled graphs of a few attentions and of many, one behind the other, forward."""
    query = query.detach().requires_grad_(training)

    def chain(count: int, x: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> Tensor:
        for _ in range(count):
            x, _, _ = torch.ops.varlen_inductor.varlen_attn(x, key, value, offsets, offsets, BOUND, BOUND, **options)
        return x

    def compiled(count: int) -> Call:
        # With the passes that a packed graph is compiled with.
        options = inductor_pass.marked({})
        function = torch.compile(partial(chain, count), fullgraph=True, dynamic=False, options=options)
        return torch.set_grad_enabled(training)(partial(function, query, key, value, offsets))

    return compiled(FEW), compiled(MANY)


def in_turns(calls: dict[tuple[str, ...], Call]) -> dict[tuple[str, ...], list[float]]:
    """Microseconds that each takes the host, by round; below autograd, as generated code runs."""
    times: dict[tuple[str, ...], list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            of_graph = name[-1] in ("few", "many")
            with contextlib.nullcontext() if of_graph else torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(of_graph):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                times[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    torch.manual_seed(0)
    attention.register()
    torch._dynamo.config.recompile_limit = 64  # all chains are one function to it
    calls: dict[tuple[str, ...], Call] = {}
    for backend in BACKENDS:
        for case, dropout_p in (("inference", 0.0), ("training", 0.0), ("dropout", 0.1)):
            device, sizes = torch.device("cuda", 0), (HEADS, HEADS, HEAD_DIM, HEAD_DIM)
            problem = Problem(device, torch.bfloat16, *sizes, length=BOUND, dropout_p=dropout_p)
            if backend.name != "math" and backend.supports(problem) is None:
                found = attention_calls(backend.name, case, Rule(HEAD_DIM**-0.5, dropout_p=dropout_p))
                calls |= {(backend.name, case, what): call for what, call in found.items()}
    for call in calls.values():
        for _ in range(5):
            call()
    turns: dict[tuple[str, ...], Call] = {}
    for (name, case, what), call in calls.items():
        if what.endswith("call"):  # side by side, for a host has slow moments
            turns[name, case, what.replace("call", "launch")] = innermost(name, what != "call", call)
        turns[name, case, what] = call
    gc.collect()
    gc.disable()  # it would come in the middle of a call
    times = in_turns(turns)
    for name, case, what in list(times):
        if what == "few":
            few, many = times.pop((name, case, "few")), times.pop((name, case, "many"))
            times[name, case, "graph"] = [(b - a) / (MANY - FEW) for a, b in zip(few, many, strict=True)]
        elif name == "aten_flash" and what.endswith("call"):
            del times[name, case, what]  # nothing calls that: the graph has PyTorch's operator
    for (name, case, what), measured in list(times.items()):
        launch_of = "backward, launch" if what.startswith("backward") else "launch"
        if what != launch_of:
            launches = times[name, case, launch_of]
            times[name, case, f"{what}, more"] = [a - b for a, b in zip(measured, launches, strict=True)]
    rows: dict[str, dict[str, dict[str, list[float]]]] = {}
    for (name, case, what), measured in sorted(times.items()):
        row = rows.setdefault(name, {}).setdefault(case, {})
        row[what] = [round(x, 1) for x in statistics.quantiles(measured, n=4)]
    print("us of the host, median (quartiles); 'more' than the launch, round by round")
    for name, cases in rows.items():
        for case, row in cases.items():
            print(f"{name:12}{case:12}" + "  ".join(f"{what} {b:.1f} ({a:.1f}-{c:.1f})" for what, (a, b, c) in row.items()))
    print("wrote", save("host-cuda", "cuda", rows, options.output))


if __name__ == "__main__":
    main()
