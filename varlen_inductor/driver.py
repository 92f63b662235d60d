"""The way of a graph: normalise → attention → masks → regions → plan and body, or one graph rewritten in place.

The passes themselves live in `varlen_inductor.patterns`; this module calls them in order, keeps the report, and decides which
of three programs a graph becomes:

* *packed*: a plan graph, then a body that runs on valid tokens only (`varlen_inductor.runtime`);
* *attention only*: one graph of the same size, whose attentions are varlen calls;
* as it was, when nothing could be proven.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from varlen_inductor import _compat, _compat_inductor, config, report, runtime
from varlen_inductor.patterns import align, demand, facts, oprules, recompute, regions, upstream_varlen, wanted, worth
from varlen_inductor.patterns import builder as packing
from varlen_inductor.patterns.attention import find_candidates
from varlen_inductor.patterns.builder import Builder, Plan
from varlen_inductor.patterns.domain import Domain
from varlen_inductor.patterns.emit_attention import AttentionEmitter, SiteRefused
from varlen_inductor.patterns.functionalise import functionalise, written_storages
from varlen_inductor.patterns.losses import spell_losses
from varlen_inductor.patterns.masks import NotProven, prove
from varlen_inductor.patterns.normalise import NotNormalisable, normalise, replace_body
from varlen_inductor.patterns.site import attention_of, insert_site, remove_site
from varlen_inductor.patterns.twins import NotPackable

if TYPE_CHECKING:
    from varlen_inductor.backend import InnerCompiler, Route

log = logging.getLogger(__name__)

_OFF = 'config.packing is "off"'
_ATTENTION_HINTS = ("scaled_dot_product", "softmax", "multi_head_attention", "transformer_encoder_layer")


@dataclass
class Rewrite:
    """What the passes made of a graph.

    ``plan`` is None for the attention-only form; ``gm`` is None if nothing was rewritten. ``padded`` is what runs where packing
    does not pay, if it is not the graph as it came. Batches of fewer than ``min_positions`` run padded. ``longest_first``: whether
    the plan may lay the longest sequences first.
    """

    report: report.Report
    gm: fx.GraphModule | None = None
    plan: fx.GraphModule | None = None
    domains: int = 0
    min_positions: int = 0
    padded: fx.GraphModule | None = None
    longest_first: bool = False


@dataclass
class Sites:
    """The proven attentions of one graph, with the line of the report that tells of each."""

    gm: fx.GraphModule
    lines: dict[fx.Node, report.Site] = field(default_factory=dict)
    boundaries: frozenset[fx.Node] = frozenset()
    kept_by_objects: frozenset[fx.Node] = frozenset()
    uncheckable: dict[fx.Node, str] = field(default_factory=dict)

    def give_up(self, site: fx.Node, reason: str) -> None:
        line = self.lines.pop(site)
        line.decision, line.form, line.kernel, line.other_kernels, line.reason = "kept", "", "", {}, reason
        remove_site(site)


def compile_graph(
    gm: fx.GraphModule, example_inputs: _compat.ExampleInputs, inner: InnerCompiler, route: Route
) -> Callable[..., Any]:
    """Compile a Dynamo graph through the passes.

    Args:
        gm: Dynamo's graph; it is not changed.
        example_inputs: what Dynamo gave the backend.
        inner: the compiler for what the passes made.
        route: how we were called (for the report).
    """
    _compat.import_operators()
    if not _may_have_attention(gm):
        report.publish(report.Report())
        return inner.compile(gm, example_inputs)
    rewrite = rewrite_graph(gm, mode=config.packing, cuda_graphs=inner.records_cuda_graphs)
    if rewrite.report.rewritten and inner.options.get("max_autotune"):
        rewrite.report.notes.append(
            "max_autotune: the kernels are timed when the graph is lowered, and the fastest is taken; TORCH_LOGS=+varlen_inductor "
            "shows the times"
        )
    report.publish(rewrite.report)
    if rewrite.gm is None:
        return inner.compile(gm, example_inputs)
    if rewrite.plan is None:
        return inner.compile(rewrite.gm, example_inputs)
    symbolic = any(isinstance(x, torch.SymInt) for x in example_inputs)
    return runtime.PackedProgram(
        plan=rewrite.plan,
        body=rewrite.gm,
        padded=gm if rewrite.padded is None else rewrite.padded,
        domains=rewrite.domains,
        min_positions=rewrite.min_positions,
        longest_first=rewrite.longest_first,
        varying=[i for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if not _is_fixed(node)],
        inner=inner,
        dynamic=True if symbolic else None,
    )


def _is_fixed(placeholder: fx.Node) -> bool:
    """Whether Dynamo lets only inputs of this size and these strides reach the graph: it has given a fake without symbols.

    Parameters are among them, and there are hundreds.
    """
    example: Any = placeholder.meta.get("example_value")
    return _compat.is_fake(example) and all(isinstance(n, int) for n in (*example.shape, *example.stride()))


def rewrite_in_place(gm: fx.GraphModule) -> report.Report:
    """The pass form: attention only, in the module that Inductor goes on with."""
    _compat.import_operators()
    replayed = bool(_compat_inductor.inductor_setting("triton.cudagraphs"))
    rewrite = rewrite_graph(gm, mode="off" if config.packing == "off" else "attention", cuda_graphs=replayed)
    if rewrite.gm is not None:
        replace_body(gm, rewrite.gm)
    return rewrite.report


def rewrite_graph(gm: fx.GraphModule, *, mode: str, cuda_graphs: bool = False) -> Rewrite:
    """Run the passes over a copy of ``gm``.

    Args:
        mode: ``"model"``, ``"attention"`` or ``"off"`` (only look).
        cuda_graphs: whether Inductor is to record CUDA graphs.
    """
    with wanted.for_graph(replayed=cuda_graphs):
        return _rewrite(gm, mode, cuda_graphs)


def _rewrite(gm: fx.GraphModule, mode: str, cuda_graphs: bool) -> Rewrite:
    made = report.Report()
    made.see_before(gm)
    varlen = _rewrite_varlen(gm, made, mode)
    if varlen is not None:
        made.see_after(varlen)
        if not _has(gm, _ATTENTION_HINTS):
            return Rewrite(made, varlen)
    rewrite = _rewrite_padded(gm if varlen is None else varlen, made, mode, cuda_graphs)
    if rewrite.gm is None:
        rewrite.gm = varlen
    rewrite.padded = varlen
    return rewrite


def _rewrite_padded(gm: fx.GraphModule, made: report.Report, mode: str, cuda_graphs: bool) -> Rewrite:
    """The way of the attentions that know of padding by a mask."""
    try:
        sites = _find_sites(gm, made)
    except NotNormalisable as refusal:
        made.notes.append(f"left as it is: {refusal.reason}")
        return Rewrite(made)
    if mode == "off":
        for line in sites.lines.values():
            line.reason = _OFF
        return Rewrite(made)
    partial = _compat.is_partial_graph(gm) or _compat.called_by_uncompiled_code()
    attempts: list[regions.Mode] = ["model", "attention"] if mode == "model" else ["attention"]
    if mode == "model" and not _compat.DYNAMO_TRACES_AUTOCAST_CALLS and _enters_autocast(gm):
        attempts = ["attention"]
        made.notes.append(
            "the model is not packed as a whole: it enters autocast, and Dynamo of this PyTorch cannot compile such a graph a "
            "second time; enter autocast outside of the compiled function, or take PyTorch 2.13"
        )
    for attempt in attempts:
        rewrite = _rewrite_until_settled(sites, made, attempt, partial, cuda_graphs)
        if rewrite is not None:
            made.see_after(rewrite.gm)  # type: ignore[arg-type]
            return rewrite
    return Rewrite(made)


def _enters_autocast(gm: fx.GraphModule) -> bool:
    """Whether the graph, or one that its higher-order operators are given, changes autocast itself."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return any(graph.find_nodes(op="call_function", target=_compat.ENTER_AUTOCAST) for graph in graphs)


def _may_have_attention(gm: fx.GraphModule) -> bool:
    """Whether there is anything to look for, in the graph or in those that its higher-order operators are given."""
    return _has(gm, (*_ATTENTION_HINTS, "_varlen_attn"))


def _has(gm: fx.GraphModule, hints: tuple[str, ...]) -> bool:
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            if any(hint in name for hint in hints):
                return True
    return False


# --- PyTorch's own varlen attention ------------------------------------------------------------------------------------------


def _rewrite_varlen(gm: fx.GraphModule, made: report.Report, mode: str) -> fx.GraphModule | None:
    """A copy of the graph that calls our varlen attention in the place of PyTorch's, or None if it calls PyTorch's nowhere."""
    found = upstream_varlen.find(gm)
    for call in found.all():
        kind = upstream_varlen.KIND_BACKWARD if call.backward else upstream_varlen.KIND
        line = report.Site(report.source_of(call.node), kind)
        made.sites.append(line)
        if call.reason is None:
            call.reason = _OFF if mode == "off" else _kernel_of_call(call, line)
        line.decision, line.reason = ("rewritten", "") if call.reason is None else ("kept", call.reason)
    if all(call.reason is not None for call in found.all()):
        return None
    return upstream_varlen.rewrite(gm, found)


def _kernel_of_call(call: upstream_varlen.Call, line: report.Site) -> str | None:
    """Note the kernel that a call gets; the reason to leave the call to PyTorch if it is no fast one."""
    from varlen_inductor.ops.backends import choose as choose_kernel

    problem = upstream_varlen.problem_of(call)
    if _compat_inductor.compiles_ahead_of_time():
        line.kernel = "ATen operators"
        return "AOTInductor compiles forwards only" if call.backward else None
    try:
        chosen = choose_kernel(problem, wanted.kernels(), call.backward)
    except RuntimeError as refusal:
        return str(refusal)
    if chosen.backend.name == "math" and problem.device.type != "cpu":
        return "no fast kernel for it: " + "; ".join(f"{k}: {v}" for k, v in chosen.refused.items())
    line.kernel, line.other_kernels = chosen.backend.name, dict(chosen.refused)
    return None


# --- attention and masks -----------------------------------------------------------------------------------------------------


def _find_sites(gm: fx.GraphModule, made: report.Report) -> Sites:
    normal = normalise(gm)
    functionalise(normal)
    opaque = written_storages(normal.graph)
    candidates, rejected = find_candidates(normal)
    outputs = _outputs(normal)
    kept = frozenset(outputs[i] for i in _compat.outputs_that_objects_keep(len(outputs)) if isinstance(outputs[i], fx.Node))
    sites = Sites(normal, boundaries=opaque, kept_by_objects=kept)
    for rejection in rejected:
        made.sites.append(report.Site(report.source_of(rejection.node), "attention", reason=rejection.reason))
    for candidate in candidates:
        kind = "scaled_dot_product_attention" if candidate.spelling == "sdpa" else "matmul, softmax, matmul"
        line = report.Site(report.source_of(candidate.output), kind)
        made.sites.append(line)
        try:
            proof = prove(
                candidate.mask_ops,
                candidate.layout,
                candidate.score_dtype,
                is_causal=candidate.is_causal,
                spelling=candidate.spelling,  # type: ignore[arg-type]
                opaque=opaque,
            )
        except NotProven as refusal:
            line.mask, line.reason = "not proven", str(refusal)
            continue
        line.mask = proof.description
        reason = _no_use(proof, candidate, opaque)
        if reason is not None:
            line.reason = reason
            continue
        if proof.assumption is not None and proof.assumption not in made.notes:
            made.notes.append(proof.assumption)
        sites.lines[insert_site(normal.graph, candidate, proof)] = line
    if sites.lines:
        spell_losses(normal.graph, opaque)
    return sites


def _outputs(gm: fx.GraphModule) -> list[Any]:
    (returned,) = gm.graph.find_nodes(op="output")[-1].args
    return pytree.tree_leaves(returned)


def _no_use(proof: Any, candidate: Any, opaque: frozenset[fx.Node]) -> str | None:
    if proof.key is None:
        return "its mask hides no padding"
    if proof.document is not None:
        return "it masks documents within a row, which is not supported yet"
    if any(x in opaque for x in (candidate.query, candidate.key, candidate.value)):
        return "its query, key or value is written in place"
    return None


# --- regions and emission ------------------------------------------------------------------------------------------------------


def _rewrite_until_settled(
    sites: Sites, made: report.Report, mode: regions.Mode, partial: bool, cuda_graphs: bool
) -> Rewrite | None:
    """Rewrite; whenever one attention turns out to be impossible, give it up and start over."""
    while sites.lines:
        try:
            return _rewrite_once(sites, made, mode, partial, cuda_graphs)
        except SiteRefused as refusal:
            sites.give_up(refusal.site, refusal.reason)
        except recompute.NotRegroupable as refusal:
            made.notes.append(f"left as it is: {refusal.reason}")
            return None
        except facts.FactNotCheckable as refusal:
            log.debug("not to be found out beforehand: %s", refusal.reason)
            if refusal.asker in sites.lines:
                sites.give_up(refusal.asker, f"what it relies on cannot be checked: {refusal.reason}")
            elif refusal.asker is not None:
                sites.uncheckable[refusal.asker] = refusal.reason
            else:
                made.notes.append(f"the model is not packed as a whole, because of its mask: {refusal.reason}")
                return None
    return None


def _rewrite_once(
    sites: Sites, made: report.Report, mode: regions.Mode, partial: bool, cuda_graphs: bool
) -> Rewrite | None:
    graph = sites.gm.graph
    table = oprules.infer(graph)
    live = demand.live_nodes(graph)
    choice = regions.choose(
        graph,
        table,
        live,
        mode=mode,
        partial_graph=partial,
        exact_outputs=config.padded_rows == "keep",
        kept_by_objects=sites.kept_by_objects,
        boundaries=sites.boundaries,
        uncheckable=sites.uncheckable,
    )
    for site, reason in choice.refused.items():
        raise SiteRefused(site, reason)
    if mode == "model" and not worth.worth_packing(choice):
        return None
    relied_on = facts.facts_of(choice, table) if mode == "model" else []
    if mode == "attention":
        _refuse_what_needs_facts(choice)
    emitter = AttentionEmitter(
        domain_of=choice.domains.__getitem__,
        ranks_suffice=lambda domain: mode == "model" or domain.predicate.is_prefix,
        longest_dead=2 * config.round_tokens if mode == "model" else 0,
        kernel=lambda site, positions: _kernel(site, positions, sites, mode == "attention" and _stays_in_place(choice)),
    )
    build = Builder(sites.gm, table, choice.regions, emitter, live, sites.boundaries)
    build.placeholders()
    domains = [region.domain for region in choice.regions]
    plan = None
    if mode == "model":
        plan = facts.plan_graph(sites.gm, domains, relied_on, sites.boundaries)
        for region in choice.regions:
            name = f"tokens_{region.domain.index}"
            index, inverse, cu_seqlens = (build.add_input(f"{name}_{part}") for part in ("index", "inverse", "cu_seqlens"))
            build.views[region.domain].plan = Plan(index, inverse, cu_seqlens, dead_sequence=True)
    else:
        _plans_in_graph(build, sites.gm.graph, domains, _stays_in_place(choice))
    built = build.build()
    if mode == "model":
        align.align_wide_linears(built)
    body = recompute.regroup(built)
    min_positions = 0
    if mode == "model":
        min_positions = config.min_positions if config.min_positions >= 0 else worth.smallest_batch(choice, cuda_graphs)
        made.notes.append(_when_packed(min_positions))
    _fill_report(made, sites, choice, relied_on, mode)
    return Rewrite(made, body, plan, len(domains), min_positions, longest_first=emitter.one_order)


def _refuse_what_needs_facts(choice: regions.Choice) -> None:
    """In one graph without a plan nothing can be checked: an attention that would need it stays as it is."""
    for site in choice.domains:
        needed = facts.facts_of_site(choice, site, windows_by_rank=False)
        if needed:
            raise SiteRefused(site, f"without a look at the data it is not known that {needed[0].text}")


def _stays_in_place(choice: regions.Choice) -> bool:
    """Whether no row need be moved: each sequence comes first in its row, and all queries are packed.

    Not in training on CUDA: the forward gains by it, but the backward of packed rows is faster by more than their copies cost
    (benchmarks/attention.py on one H200, before and after; docs/benchmarks at f5f851b has the numbers).
    """
    inside = {node for region in choice.regions for node in region.nodes}
    return all(
        site in inside and domain.predicate.is_prefix and not (_on_cuda(site) and _trains(site))
        for site, domain in choice.domains.items()
    )


def _on_cuda(site: fx.Node) -> bool:
    return bool(site.meta["val"].is_cuda)


def _trains(site: fx.Node) -> bool:
    return torch.is_grad_enabled() and bool(site.meta.get("requires_grad", True))


def _plans_in_graph(build: Builder, graph: fx.Graph, domains: list[Domain], in_place: bool) -> None:
    for domain in domains:
        # A mask that no input decides is there from the start.
        behind = max(domain.predicate.leaves).next if domain.predicate.leaves else next(iter(graph.nodes))
        while behind.op == "placeholder":
            behind = behind.next
        with graph.inserting_before(behind):
            mask = facts.emit_mask(graph, domain)
        build.live |= demand.ancestors_of(mask)

        def make(build: Builder, mask: fx.Node = mask) -> Plan:
            operators = torch.ops.varlen_inductor
            made = build.call((operators.plan_in_place if in_place else operators.plan_static).default, build.padded(mask))
            index, inverse, cu_seqlens = (build.call(operator.getitem, made, i) for i in range(3))
            used = build.call(operator.getitem, made, 3) if in_place else None
            return Plan(index, inverse, cu_seqlens, dead_sequence=False, used=used)

        build.plan_in_graph(domain, make, {mask})


def _kernel(site: fx.Node, positions: bool, sites: Sites, in_place: bool) -> str:
    from varlen_inductor.lowering import ahead
    from varlen_inductor.ops.backends import choose as choose_kernel
    from varlen_inductor.ops.problem import Problem, length_class, must_be_deterministic

    attention = attention_of(site)
    assert attention is not None
    query, key, value = (x.meta["val"] for x in site.args[:3])  # type: ignore[union-attr]
    heads = query.shape[1] if query.dim() == 4 else query.shape[0] // attention.batch
    heads_k = key.shape[1] if key.dim() == 4 else key.shape[0] // attention.batch
    problem = Problem(
        device=query.device,
        dtype=query.dtype,
        num_heads=int(heads),
        num_heads_k=int(heads_k),
        head_dim=int(query.shape[-1]),
        head_dim_v=int(value.shape[-1]),
        window_left=attention.proof.window_left,
        window_right=attention.proof.window_right,
        dropout_p=attention.dropout_p,
        softcap=attention.softcap,
        seqused_k=in_place,
        positions=positions,
        length=length_class(query.shape[-2]),
        deterministic=must_be_deterministic(),
        tails_unread=True,
    )
    if _compat_inductor.compiles_ahead_of_time():
        reason = ahead.refusal(problem, config.kernels)
        if reason is not None:
            raise SiteRefused(site, reason)
        sites.lines[site].kernel = "aten_flash"
        return "aten_flash"
    chosen = choose_kernel(problem, wanted.kernels())
    if chosen.backend.name == "math" and query.device.type != "cpu":
        raise SiteRefused(site, "no fast kernel for it: " + "; ".join(f"{k}: {v}" for k, v in chosen.refused.items()))
    line = sites.lines[site]
    line.kernel, line.other_kernels = chosen.backend.name, dict(chosen.refused)
    if _trains(site):
        behind = choose_kernel(problem, wanted.kernels(), True).backend.name
        if behind != line.kernel:
            line.kernel = f"{line.kernel}, backward {behind}"
            line.other_kernels.pop(behind, None)
    return chosen.backend.name


# --- the report ------------------------------------------------------------------------------------------------------------------


def _fill_report(
    made: report.Report, sites: Sites, choice: regions.Choice, relied_on: list[facts.Fact], mode: regions.Mode
) -> None:
    for site, line in sites.lines.items():
        line.decision = "rewritten"
        inside = any(site in region.nodes for region in choice.regions)
        leak = choice.analyses[choice.domains[site]].of(site)
        if inside:
            line.form, line.reason = ("packed" if mode == "model" else "zero rows"), ""
        else:
            line.form = "exact"
            line.reason = _leak_text(leak)
    for region in choice.regions:
        shown = report.Region(region.domain.predicate.text, nodes_packed=len(region.nodes))
        for crossing in region.crossings:
            shown.edges.append(_edge(crossing, choice, region))
        made.regions.append(shown)
    made.notes.extend(text for text in choice.assumptions if text not in made.notes)
    made.notes.extend(f"checked at run time: {fact.text}; if not, the padded graph runs" for fact in relied_on)


def _when_packed(min_positions: int) -> str:
    smallest = f"fewer than {min_positions} positions (config.min_positions), or with " if min_positions else ""
    return f"batches with {smallest}more than {config.max_density:.0%} of them valid (config.max_density) run padded"


def _leak_text(leak: demand.Demand) -> str:
    if leak.leak is not None:
        return f"its padded rows are needed: {packing.twin_kind(leak.leak)} ({report.source_of(leak.leak)}) {leak.why}"
    if leak.reads:
        return "some of its padded rows may be read: " + ", ".join(sorted(report.source_of(r.node) for r in leak.reads))
    return ""


def _edge(crossing: packing.Crossing, choice: regions.Choice, region: packing.Region) -> report.Edge:
    kind = packing.twin_kind(crossing.user)
    if crossing.user.op == "output":
        why = "an output of the graph"
    elif crossing.kind == "pack":
        why = f"first used packed by {kind}"
    else:
        reason = region.refused.get(crossing.user) or choice.analyses[region.domain].of(crossing.node).why
        why = f"{kind} runs on padded rows" + (f": {reason}" if reason else "")
    return report.Edge(crossing.kind, crossing.node.name, why, report.source_of(crossing.user))  # type: ignore[arg-type]


__all__ = ["NotPackable", "Rewrite", "compile_graph", "rewrite_graph", "rewrite_in_place"]
