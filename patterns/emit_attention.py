"""Emit a canonical attention as a varlen call.

Keys and values are packed by the domain of the attention's mask. The queries come in one of three ways:

* packed, where the attention lies in a region: the whole row of padded queries is never computed;
* packed with a few more positions, where those are read by index (attention-only form, rule 3);
* all of them, where padded queries are observable (the exact form): sequences of ``S`` rows each.

Before (``attention_site``, masks in its metadata)        After, in a region
  site = attention_site(q, k, v)                            out = varlen_attn(q', k', v', cu_seqlens, cu_seqlens, S, S)[0]
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from . import wanted
from .builder import Builder, PackedView
from .dims import as_size, size_of
from .domain import Domain
from .site import Attention, attention_of
from .twins import NotPackable

aten = torch.ops.aten
UNBOUNDED = -1


class SiteRefused(Exception):
    """This attention stays as the user wrote it; ``reason`` says why, in words for the user."""

    def __init__(self, site: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.site = site
        self.reason = reason


@dataclass(frozen=True)
class Rows:
    """The packed queries or keys of a varlen call, the offsets of their sequences, and their positions where ranks won't do."""

    tensor: fx.Node
    cu_seqlens: fx.Node
    longest: Any
    position: Callable[[], fx.Node]
    used: fx.Node | None = None


@dataclass
class AttentionEmitter:
    """Emits sites; see the module's docstring.

    Attributes:
        domains: the domain of each proven key predicate.
        ranks_suffice: whether, in a domain, the distance of two valid positions is the distance of their ranks: by
            construction, or because the plan checks it.
        longest_dead: the most dead rows that a plan may add, 0 if it adds none.
        kernel: says which kernel runs a site, given whether it needs positions, or raises `SiteRefused`.
        one_order: whether queries and keys of every call made so far are packed by one plan, so that it may choose the order of
            sequences.
    """

    domain_of: Callable[[fx.Node], Domain]
    ranks_suffice: Callable[[Domain], bool]
    longest_dead: int
    kernel: Callable[[fx.Node, bool], str]
    one_order: bool = field(default=True, init=False)

    def __call__(self, builder: Builder, site: fx.Node) -> fx.Node:
        """Emit ``site``: its packed twin where it lies in a region, else the padded value.

        Raises:
            NotPackable: it lies in a region and has no twin; outside of it, it may have a padded form.
            SiteRefused: it has none either.
        """
        try:
            return self._emit(builder, site)
        except NotPackable as error:
            if builder.region_of.get(site) is not None:
                raise
            raise SiteRefused(site, f"its operands have no packed form: {error}") from error

    def _emit(self, builder: Builder, site: fx.Node) -> fx.Node:
        attention = attention_of(site)
        assert attention is not None
        domain = self.domain_of(site)
        view = builder.views[domain]
        query, key, value = (x for x in site.args[:3] if isinstance(x, fx.Node))
        keys = self._keys(view, key)
        values = self._heads(view, view.packed(value), value)
        region = builder.region_of.get(site)
        if region is not None:
            q_view = builder.views[region.domain]
            rows = self._packed_queries(q_view, query)
        else:
            q_view = view
            rows = self._all_queries(builder, view, query)
        same_ranks = region is not None and region.domain is domain
        out = self._call(builder, site, attention, rows, keys, values, same_ranks, domain)
        if region is not None:
            return builder.call(aten.reshape.default, out, q_view.shape(site))
        return self._as_padded(builder, out, site, query)

    # --- operands ----------------------------------------------------------------------------------------------------------

    def _heads(self, view: PackedView, packed: fx.Node, node: fx.Node) -> fx.Node:
        """(T, H, D) from a twin whose heads may be missing (one head, folded) or spread."""
        layout = view.layout(node)
        assert layout is not None
        if len(layout.rest) == 2:
            return packed
        head_dim = node.meta["val"].shape[-1]
        heads = as_size(1)
        for atoms in layout.rest[:-1]:
            heads = heads * size_of(atoms)
        return view.call(aten.reshape.default, packed, [-1, view.size(heads), view.size(head_dim)])

    def _longest(self, view: PackedView) -> Any:
        """A bound on the length of the sequences, the one of dead rows included."""
        length = view.size(view.domain.length)
        if not view.ready().dead_sequence:
            return length
        if isinstance(length, int):
            return max(length, self.longest_dead)
        return view.helper("longest", lambda: view.call(torch.sym_max, length, self.longest_dead))

    def _keys(self, view: PackedView, key: fx.Node) -> Rows:
        return Rows(
            self._heads(view, view.packed(key), key),
            view.ready().cu_seqlens,
            self._longest(view),
            lambda: _positions(view),
            view.ready().used,
        )

    def _packed_queries(self, view: PackedView, query: fx.Node) -> Rows:
        return self._keys(view, query)

    def _all_queries(self, builder: Builder, view: PackedView, query: fx.Node) -> Rows:
        """Every query: one sequence of S_q rows for each batch row."""
        shape = query.meta["val"].shape
        folded = len(shape) == 3
        batch = view.size(view.domain.batch_size)
        heads = view.size(as_size(shape[0]) / as_size(view.domain.batch_size)) if folded else view.size(shape[1])
        length, head_dim = view.size(shape[-2]), view.size(shape[-1])
        padded = builder.padded(query)
        if folded:
            padded = builder.call(aten.reshape.default, padded, [batch, heads, length, head_dim])
        rows = builder.call(aten.transpose.int, padded, 1, 2)
        rows = builder.call(aten.reshape.default, rows, [-1, heads, head_dim])
        sequences = 2 if view.ready().dead_sequence else 1
        name = f"offsets {shape[-2]}"

        def offsets() -> fx.Node:
            return builder.call(torch.ops.varlen_inductor.row_offsets.default, view.ready().inverse, batch, length, sequences - 1)

        def position() -> fx.Node:
            device = query.meta["val"].device
            static = isinstance(batch, int) and isinstance(length, int)
            total = batch * length if static else builder.call(operator.mul, batch, length)
            flat = builder.call(aten.arange.default, total, device=device)
            return builder.call(aten.remainder.Scalar, flat, length)

        return Rows(rows, view.helper(name, offsets), length, position)

    # --- the call ----------------------------------------------------------------------------------------------------------

    def _call(
        self,
        builder: Builder,
        site: fx.Node,
        attention: Attention,
        queries: Rows,
        keys: Rows,
        values: fx.Node,
        same_ranks: bool,
        domain: Domain,
    ) -> fx.Node:
        left, right = attention.proof.window_left, attention.proof.window_right
        windowed = (left, right) != (UNBOUNDED, UNBOUNDED)
        by_rank = same_ranks and ((left == UNBOUNDED and right == 0) or self.ranks_suffice(domain))
        needs_positions = windowed and not by_rank
        self.kernel(site, needs_positions)
        self.one_order &= queries.cu_seqlens is keys.cu_seqlens
        # Packing operators read the rows of tokens alone, in both directions, and lse goes nowhere.
        kwargs: dict[str, Any] = {"tails_unread": True}
        if attention.scale is not None:
            kwargs["scale"] = attention.scale
        if windowed:
            kwargs.update(window_left=left, window_right=right)
        if attention.softcap:
            kwargs["softcap"] = attention.softcap
        if attention.dropout_p:
            kwargs["dropout_p"] = attention.dropout_p
        if keys.used is not None:
            kwargs["seqused_k"] = keys.used
        if needs_positions:
            kwargs.update(position_q=queries.position(), position_k=keys.position())
        if (kernels := wanted.kernels()) != "auto":
            # What the knob is while the passes run: the graph may be traced later, outside of the options that set it.
            kwargs["kernels"] = kernels
        call = builder.call(
            torch.ops.varlen_inductor.varlen_attn.default,
            queries.tensor,
            keys.tensor,
            values,
            queries.cu_seqlens,
            keys.cu_seqlens,
            queries.longest,
            keys.longest,
            **kwargs,
        )
        return builder.call(operator.getitem, call, 0)

    def _as_padded(self, builder: Builder, out: fx.Node, site: fx.Node, query: fx.Node) -> fx.Node:
        """The layout of the original result from (B * S_q, H, D_v)."""
        shape = site.meta["val"].shape
        folded = len(shape) == 3
        view = builder.views[self.domain_of(site)]
        batch = view.size(view.domain.batch_size)
        heads = view.size(as_size(shape[0]) / as_size(view.domain.batch_size)) if folded else view.size(shape[1])
        length, head_dim = view.size(shape[-2]), view.size(shape[-1])
        rows = builder.call(aten.reshape.default, out, [batch, length, heads, head_dim])
        value = builder.call(aten.transpose.int, rows, 1, 2)
        if folded:
            value = builder.call(aten.reshape.default, value, [view.size(shape[0]), length, head_dim])
        return value


def _positions(view: PackedView) -> fx.Node:
    return view.position_index()
