"""Who needs the padded rows of a value exactly as eager computes them.

For one padding domain the analysis walks the graph backwards. A value's *demand* says what of its padded rows can be observed:
nothing, a few positions that are read by index (facts that the plan can check on the data), or everything. A demand travels
from a row-wise operation to its operands, from an attention's output to its query, and *not* through a key or value that
the attention masks at these very rows. What the analysis does not know demands everything: it leaks.

The rules are those of the contract on padded rows (docs/contract.md).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from .dims import Dims, Size, as_size, leaves
from .domain import Domain, layout_of, token_dims, touches
from .oprules import LOSSES_OF_TOKENS, Args, Typing, is_tensor, op_name
from .padvalue import PadValues
from .site import attention_of


@dataclass(frozen=True)
class Read:
    """A use of some rows that is harmless if the data says so.

    ``kind``: ``"position"`` reads position ``position`` of every sequence; ``"index"`` and ``"gather"`` read the positions that
    ``node``'s index tensor names; ``"loss"`` reads the rows whose label is not ``ignore_index``.
    """

    kind: str
    node: fx.Node
    position: int = 0


@dataclass(frozen=True)
class Demand:
    """What of a value's padded rows is observable; ``leak`` names the use that needs them all, with its operation."""

    leak: fx.Node | None = None
    why: str = ""
    reads: frozenset[Read] = frozenset()

    def __or__(self, other: Demand) -> Demand:
        if self.leak is not None:
            return self
        if other.leak is not None:
            return other
        return Demand(reads=self.reads | other.reads) if other.reads - self.reads else self

    def __bool__(self) -> bool:
        return self.leak is not None or bool(self.reads)


NOTHING = Demand()


def live_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes that an output or an effect needs. (The originals of canonical attentions stay in the graph without being live.)"""
    # Dropping a random operator shifts the generator; that is no change that anyone relies on.
    return ancestors_of(*(n for n in graph.nodes if n.op in ("output", "placeholder") or n.is_impure(impure_random=False)))


def ancestors_of(*nodes: fx.Node) -> frozenset[fx.Node]:
    """The nodes and all that they are computed from."""
    stack = list(nodes)
    found: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return frozenset(found)


_SIZES = frozenset({"sym_size", "sym_numel", "sym_stride", "sym_storage_offset"})
# Operations that move tokens to other positions: what follows is no longer aligned with the mask.
_MOVES_TOKENS = frozenset(
    "flip roll sort topk argsort gather index index_select scatter scatter_add index_put index_add slice cat concat narrow repeat "
    "constant_pad_nd pad chunk split split_with_sizes tensor_split cummax cummin glu".split()
)


@dataclass
class Analysis:
    """The demand on every value that carries a domain's tokens, and which values keep them at their own positions."""

    domain: Domain
    demand: dict[fx.Node, Demand] = field(default_factory=dict)
    aligned: dict[fx.Node, bool] = field(default_factory=dict)

    def of(self, node: fx.Node) -> Demand:
        return self.demand.get(node, NOTHING)


_REPEATS = frozenset(
    "expand expand_as repeat view reshape unsqueeze squeeze transpose swapaxes swapdims permute clone contiguous".split()
)


def _repeats(node: fx.Node, count: Size) -> bool:
    """Whether ``node`` shows ``count`` elements, each as often as there is room for."""
    while op_name(node) in _REPEATS and _elements(node) != count:
        node = node.args[0]  # type: ignore[assignment]
    return _elements(node) == count


def _elements(node: fx.Node) -> Size:
    return math.prod((as_size(n) for n in node.meta["val"].shape), start=as_size(1))


def dims_of(typing: Typing) -> list[Dims]:
    """The dimensions of each tensor of a typing."""
    if typing.dims and isinstance(typing.dims[0], tuple) and typing.dims[0] and isinstance(typing.dims[0][0], tuple):
        return [d for d in typing.dims if d is not None]
    return [typing.dims]


def _is_multi(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (list, tuple))


def mixes_tokens(node: fx.Node, source: fx.Node, table: Mapping[fx.Node, Typing], domain: Domain) -> bool:
    """Whether ``node`` lets rows of ``source`` that hold different tokens influence each other."""
    tokens = {*domain.batch, *domain.position}
    return any(
        x is source and not tokens.isdisjoint(leaves(table[x].dims[dim]))
        for x, dim in table[node].mixed
        if dim < len(table[x].dims)
    )


def analyse(
    graph: fx.Graph,
    table: Mapping[fx.Node, Typing],
    domain: Domain,
    pad_values: PadValues,
    *,
    partial_graph: bool,
    exact_outputs: bool,
    live: frozenset[fx.Node],
    kept_by_objects: frozenset[fx.Node] = frozenset(),
    boundaries: frozenset[fx.Node] = frozenset(),
    uncheckable: Mapping[fx.Node, str] | None = None,
) -> Analysis:
    """The demand on each value of ``graph`` for ``domain``.

    Args:
        partial_graph: the graph is a piece of the user's program, so that its outputs may be used in any way (rule 10).
        exact_outputs: ``config.padded_rows == "keep"``.
        kept_by_objects: outputs that the model puts into objects (`_compat.outputs_that_objects_keep`); its next call may read
            them, which makes them state of the model like what it writes to.
        live: the nodes that some output or effect needs (`live_nodes`); others demand nothing.
        boundaries: values whose storage is written somewhere (rule 6); their rows are demanded as a whole.
        uncheckable: operations that read some rows, of which data cannot tell in time whether that is harmless, and why not.
    """
    analysis = Analysis(domain)
    carries: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        carries[node] = is_tensor(node) and layout_of(table[node].dims, domain) is not None
        analysis.aligned[node] = _aligned(node, table, domain, analysis, boundaries)
    wanted = _wanted_values(graph, table, live)
    walk = _Walk(table, domain, analysis, carries, pad_values, partial_graph, exact_outputs, kept_by_objects, uncheckable or {})
    for node in reversed(graph.nodes):
        demand = NOTHING
        if node in boundaries and carries[node]:
            demand = Demand(node, "its storage is written in place")
        for user in node.users:
            if user in wanted:
                demand = demand | walk.through(user, node)
        analysis.demand[node] = demand
    return analysis


def _wanted_values(graph: fx.Graph, table: Mapping[fx.Node, Typing], live: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """The nodes of whose values something is made, and not only of their shapes."""
    wanted: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        effect = node.op == "output" or node.is_impure(impure_random=False)
        read = any(
            u in wanted and op_name(u) not in _SIZES and (u.op == "output" or node not in table[u].shape_only) for u in node.users
        )
        if node in live and (effect or read):
            wanted.add(node)
    return frozenset(wanted)


def _aligned(
    node: fx.Node, table: Mapping[fx.Node, Typing], domain: Domain, analysis: Analysis, boundaries: frozenset[fx.Node]
) -> bool:
    """Whether each row of ``node`` belongs to the token at its own position."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op == "output":
        return False
    ignored = table[node].shape_only
    sources = [x for x in node.all_input_nodes if x not in ignored and (is_tensor(x) or _is_multi(x))]
    # Also what is moved and no longer typed as tokens (a slice of them) may become so again (by padding the slice).
    if not all(analysis.aligned[x] for x in sources):
        return False
    touching = [x for x in sources if any(touches(d, domain) for d in dims_of(table[x]))]
    if table[node].opaque and touching and node.target is not operator.getitem:
        return False
    moved = op_name(node) in _MOVES_TOKENS and any(mixes_tokens(node, x, table, domain) for x in touching if is_tensor(x))
    return not moved


@dataclass
class _Walk:
    table: Mapping[fx.Node, Typing]
    domain: Domain
    analysis: Analysis
    carries: Mapping[fx.Node, bool]
    pad_values: PadValues
    partial_graph: bool
    exact_outputs: bool
    kept_by_objects: frozenset[fx.Node]
    uncheckable: Mapping[fx.Node, str]

    def through(self, user: fx.Node, node: fx.Node) -> Demand:
        """What ``user`` demands of the padded rows of ``node``."""
        if _is_multi(node):
            return self.analysis.of(user) if user.target is operator.getitem else Demand(user, "uses several results at once")
        if not is_tensor(node) or not any(touches(d, self.domain) for d in dims_of(self.table[node])):
            return NOTHING
        if user.op == "output":
            return self._output(user, node)
        if node in self.table[user].shape_only or op_name(user) in _SIZES:
            return NOTHING
        if attention_of(user) is not None:
            return self._attention(user, node)
        if not self.carries[node]:
            # Not a row per token: whatever reads it may read all of it.
            return Demand(user, "does not keep one row per token")
        special = self._special(user, node)
        if special is not None:
            why = self.uncheckable.get(user)
            return (
                special if why is None else Demand(user, f"reads some rows, and whether they are padded cannot be checked: {why}")
            )
        if self.table[user].opaque:
            return Demand(user, "is not known to work row by row")
        if self._weighed_by_zero(user, node):
            return NOTHING
        if mixes_tokens(user, node, self.table, self.domain):
            return Demand(user, "mixes rows of different tokens")
        if _is_multi(user) or self.carries.get(user):
            return NOTHING if self.pad_values.known(user) else self.analysis.of(user)
        return Demand(user, "does not keep one row per token")

    def _output(self, user: fx.Node, node: fx.Node) -> Demand:
        if self.partial_graph:
            return Demand(user, "leaves a partial graph (the compiled program has a graph break)")
        if self.exact_outputs:
            return Demand(user, 'is an output, and padded_rows="keep" asks for exact rows')
        if node in self.kept_by_objects:
            return Demand(user, "is an output that the model keeps in an object, an attribute or a list, for its next call to read")
        layout = layout_of(self.table[node].dims, self.domain)
        if layout is None:
            return Demand(user, "is an output without one row per token")
        if not self.analysis.aligned[node]:
            return Demand(user, "is an output whose tokens were moved to other positions")
        if layout.token_last:
            return Demand(user, "is an output whose last axis is the token axis")
        if self.domain.shared:
            return Demand(user, "is an output of tokens that another mask may keep")
        return NOTHING

    def _attention(self, user: fx.Node, node: fx.Node) -> Demand:
        query, key, value = user.args[:3]
        demand = NOTHING
        if node is query:
            demand = demand | self.analysis.of(user)
        if node in (key, value) and user not in self.domain.sites:
            demand = demand | Demand(user, "reads these rows as keys or values under another mask")
        return demand

    def _special(self, user: fx.Node, node: fx.Node) -> Demand | None:
        """Uses that read a few rows only, which data can prove harmless."""
        name = op_name(user)
        if name == "select" and is_tensor(user):
            a = Args(user, self.table)
            dim, index = a["dim"] % len(self.table[node].dims), a["index"]
            if leaves(self.table[node].dims[dim]) == self.domain.position and isinstance(index, int):
                return Demand(reads=frozenset({Read("position", user, index)}))
        if name == "slice" and is_tensor(user):
            return self._short_slice(user, node)
        if name in LOSSES_OF_TOKENS and user.args[0] is node:
            return self._loss(user, node)
        if name == "index" and user.args[0] is node:
            return self._indexed(user, node)
        if name == "gather" and user.args[0] is node:
            return self._gathered(user, node)
        return None

    def _weighed_by_zero(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether a matrix product sums over positions with weights that are zero at padded ones."""
        if op_name(user) == "einsum":
            return self._weighed_in_einsum(user, node)
        if op_name(user) not in ("matmul", "bmm", "mm"):
            return False
        weights = [x for x in user.args[:2] if x is not node]
        if len(weights) != 1 or not isinstance(weights[0], fx.Node) or self.pad_values.value(weights[0]) != 0:
            return False
        summed = {x: leaves(self.table[x].dims[dim]) for x, dim in self.table[user].mixed}
        # Both take part row by row of the batch; else a row is weighed by the weights of others.
        by_row = all(
            set(self.domain.batch) <= {atom for dim in self.table[x].dims[:-2] for atom in leaves(dim)} for x in (node, weights[0])
        )
        return by_row and summed[node] == summed[weights[0]] == self.domain.position

    def _weighed_in_einsum(self, user: fx.Node, node: fx.Node) -> bool:
        equation, operands = user.args[0], user.args[1]
        terms = str(equation).replace(" ", "").split("->")[0].split(",")
        if not isinstance(operands, (list, tuple)) or len(terms) != len(operands) or operands.count(node) != 1:
            return False
        letters = {x: self._token_letters(x, term) for x, term in zip(operands, terms) if isinstance(x, fx.Node)}
        weights = [x for x in letters if x is not node and self.pad_values.value(x) == 0]
        return letters[node] is not None and any(letters[x] == letters[node] for x in weights)

    def _token_letters(self, x: fx.Node, term: str) -> list[str] | None:
        """The letters of an einsum term that stand for batch and position."""
        dims = [leaves(dim) for dim in self.table[x].dims]
        if len(dims) != len(term):
            return None
        wanted = [self.domain.batch, self.domain.position] if self.domain.batch else [self.domain.position]
        found = [letter for tokens in wanted for letter, dim in zip(term, dims) if dim == tokens]
        return found if len(found) == len(wanted) else None

    def _short_slice(self, user: fx.Node, node: fx.Node) -> Demand | None:
        """``x[:, :1]`` and the like: at most four positions from either end."""
        a = Args(user, self.table)
        dim, start, end = a["dim"] % len(self.table[node].dims), a["start"] or 0, a["end"]
        if leaves(self.table[node].dims[dim]) != self.domain.position or a["step"] != 1:
            return None
        if not isinstance(start, int) or not isinstance(end, int):
            return None
        positions = range(start, end) if start < 0 or end >= 0 else None
        if start < 0 and end >= 0:
            positions = range(start, 0)
        if positions is None or len(positions) > 4:
            return None
        return Demand(reads=frozenset(Read("position", user, p) for p in positions))

    def _loss(self, user: fx.Node, node: fx.Node) -> Demand | None:
        a = Args(user, self.table)
        target = a["target"]
        layout = layout_of(self.table[target].dims, self.domain) if is_tensor(target) else None
        if layout is None or target.meta["val"].is_floating_point():
            return None
        in_order = [kind for kind, _ in layout.order] == (["b", "s"] if self.domain.batch else ["s"])
        if len(self.table[node].dims) != 2 or not in_order or a["reduction"] == 0:
            return None
        return Demand(reads=frozenset({Read("loss", user)}))

    def _indexed(self, user: fx.Node, node: fx.Node) -> Demand | None:
        """``x[arange(B), last]``: one position per sequence, named by a tensor."""
        indices = user.args[1]
        dims = self.table[node].dims
        if not isinstance(indices, (list, tuple)) or len(indices) != 2 or not all(is_tensor(i) for i in indices):
            return None
        if not self.domain.batch or leaves(dims[0]) != self.domain.batch or leaves(dims[1]) != self.domain.position:
            return None
        rows, positions = indices
        if not isinstance(rows, fx.Node) or not isinstance(positions, fx.Node) or rows.target is not torch.ops.aten.arange.default:
            return None
        if positions.meta["val"].dim() != 1 or positions.meta["val"].is_floating_point() or node in ancestors_of(positions):
            return None
        return Demand(reads=frozenset({Read("index", user)}))

    def _gathered(self, user: fx.Node, node: fx.Node) -> Demand | None:
        """``x.gather(1, last)``: one position per sequence.

        Not more: where one of many is padded in every batch (pointers into padding), the padded graph would always run.
        """
        a = Args(user, self.table)
        index, dims = a["index"], self.table[node].dims
        tokens = token_dims(dims, self.domain)
        if tokens is None or a["dim"] % len(dims) != tokens[1] or node in ancestors_of(index):
            return None
        shape = index.meta["val"].shape
        sequences = 1 if tokens[0] is None else shape[tokens[0]]
        if as_size(shape[tokens[1]]) != 1 or not _repeats(index, as_size(sequences)):
            return None
        return Demand(reads=frozenset({Read("gather", user)}))
