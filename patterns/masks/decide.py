"""From the truth table of a mask to the proof: is what it keeps a conjunction that varlen attention can express?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from .algebra import Builder
from .errors import NotProven
from .expr import Expr, intern_expr, parts, tensor_name, text
from .interpret import Interpreter, where_in_source
from .predicate import Obligation, Predicate
from .proof import MaskProof, NoValidKey, Spelling
from .scores import Outcome, ScoreStep, apply_steps
from .table import Variable, build_predicate, evaluate, find_variables, is_document, table_lowering

__all__ = ["decide", "may_require_grad"]


def decide(it: Interpreter, steps: Sequence[ScoreStep], dtype: torch.dtype, spelling: Spelling) -> MaskProof:
    exprs = [e for step in steps for e in (step.mask, step.value) if e is not None]
    for e in _loads_of(exprs):
        if e.payload in it.written:
            raise NotProven(f"the mask depends on `{text(e)}`{where_in_source(e.payload)}, which is modified in place")
    refusal = NotProven("the mask cannot be decided")
    for variables in find_variables(it.b, exprs):
        for v in variables:
            if v.kind == "value":
                _refuse_bias(it, v.expr)
        try:
            return _Decision(it, steps, variables, dtype, spelling).proof()
        except NotProven as error:
            refusal = error
    raise refusal


def _refuse_bias(it: Interpreter, load: Expr) -> None:
    """Refuse numbers that go into the scores and cannot be a mask."""
    if may_require_grad(load.payload):
        raise NotProven(f"the mask adds a learned bias to the scores ({_leaf(it, load)})")
    if "h" in load.free:
        raise NotProven(f"the mask adds a bias that differs between heads ({_leaf(it, load)})")
    if {"q", "k"} <= load.free:
        raise NotProven(f"the mask adds data for every pair of positions to the scores ({_leaf(it, load)})")


def _leaf(it: Interpreter, e: Expr) -> str:
    """Names the tensor behind a load, where it is made, and why it was not looked into."""
    why = it.why.get(e.payload, "")
    return f"`{text(e)}`{where_in_source(e.payload)}" + (f": {why}" if why and not why.startswith("`") else "")


def _loads_of(exprs: Sequence[Expr]) -> list[Expr]:
    return [e for e in parts(*exprs) if e.op == "load"]


def may_require_grad(node: fx.Node) -> bool:
    """Whether autograd may record the node's value."""
    if "requires_grad" in node.meta:
        return bool(node.meta["requires_grad"])
    pending, seen = [node], {node}
    while pending:
        n = pending.pop()
        value = n.meta.get("example_value", n.meta.get("val"))
        if n.op in ("placeholder", "get_attr") and isinstance(value, torch.Tensor) and value.requires_grad:
            return True
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            continue
        pending += [m for m in n.all_input_nodes if m not in seen]
        seen.update(n.all_input_nodes)
    return False


class _Decision:
    """Decides one truth table."""

    def __init__(
        self,
        it: Interpreter,
        steps: Sequence[ScoreStep],
        variables: Sequence[Variable],
        dtype: torch.dtype,
        spelling: Spelling,
    ) -> None:
        self.it, self.b, self.variables, self.spelling = it, it.b, variables, spelling
        self.lowering = table_lowering(variables)
        self.shape = [*(len(v.values) for v in variables), 1]
        self.outcome: Outcome = apply_steps(steps, self.lowering, self.shape, dtype, spelling)
        # Where some key is visible, every "any key ..." that the mask asks for is true.
        self.flags = [i for i, v in enumerate(variables) if v.kind == "any"]

    def proof(self) -> MaskProof:
        self.outcome.check()
        keep = self._with_flags(self.outcome.keep)
        if not bool(keep.any()):
            raise NotProven("the mask hides every key")
        groups = self._groups(keep)
        self._check_conjunction(keep, groups)
        key, query = self._predicate(keep, groups["key"], "k"), self._predicate(keep, groups["query"], "q")
        left, right = self._window(keep, groups["position"])
        no_valid_key = self._no_valid_key()
        if key is None and query is None and self._always_a_key(left, right):
            no_valid_key = "zero"
        return MaskProof(
            key=key,
            query=query,
            window_left=left,
            window_right=right,
            document=None,
            no_valid_key=no_valid_key,
            obligations=tuple(dict.fromkeys(Obligation(v.expr.payload, v.values) for v in self.variables if v.kind == "value")),
            assumption=self.outcome.assumption(),
            description=_describe(key, query, left, right),
        )

    # ------------------------------------------------------------------------------------------------- the conjunction

    def _with_flags(self, table: torch.Tensor) -> torch.Tensor:
        """The slice of a table (over all variables) in which every flag is true, flags kept as dimensions of size 1."""
        for axis in self.flags:
            table = table.narrow(axis, 1, 1)
        return table

    def _groups(self, keep: torch.Tensor) -> dict[str, list[int]]:
        """The variables that matter, by what they depend on."""
        groups: dict[str, list[int]] = {"key": [], "query": [], "position": []}
        for axis, v in enumerate(self.variables):
            if axis in self.flags or bool((keep == keep.narrow(axis, 0, 1)).all()):
                continue
            groups[self._kind(v)].append(axis)
        if len(groups["position"]) > 1:
            raise NotProven("more than one condition on positions: " + self._texts(groups["position"]))
        return groups

    def _kind(self, v: Variable) -> str:
        free = v.expr.free
        if "h" in free:
            raise NotProven(f"the mask differs between heads: `{v.text}`{self._where(v)}")
        if not {"q", "k"} <= free:
            return "query" if "q" in free else "key"
        x = v.expr
        if x.op == "linear" and x.args == (self.b.index("k"), self.b.index("q")) and x.payload == ((1, -1), 0):
            return "position"
        if is_document(x):
            name = tensor_name(x.args[0].payload)
            raise NotProven(f"the mask separates documents within a row (by `{name}`): not rewritten yet")
        pairs = next((e for e in _loads_of([x]) if {"q", "k"} <= e.free), None)
        if pairs is not None:
            raise NotProven(f"the mask is data for every pair of positions: {_leaf(self.it, pairs)}")
        if any(t.op == "floordiv" for t in (x.args if x.op == "linear" else (x,))):
            raise NotProven(f"the mask keeps attention within chunks of positions (`{v.text}`){self._where(v)}: not rewritten yet")
        raise NotProven(f"the mask relates query and key in a way that is no window: `{v.text}`{self._where(v)}")

    def _where(self, v: Variable) -> str:
        return next((where for e in _loads_of([v.expr]) if (where := where_in_source(e.payload))), "")

    def _texts(self, axes: Sequence[int]) -> str:
        return ", ".join(f"`{self.variables[i].text}`" for i in axes)

    def _project(self, keep: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        """For which values of these variables any row keeps the score; other dimensions get size 1."""
        others = [i for i in range(keep.dim()) if i not in axes]
        return keep.any(dim=others, keepdim=True) if others else keep

    def _check_conjunction(self, keep: torch.Tensor, groups: dict[str, list[int]]) -> None:
        product = torch.ones_like(keep)
        for axes in groups.values():
            product = product & self._project(keep, axes)
        if not torch.equal(product, keep):
            every = [i for axes in groups.values() for i in axes]
            raise NotProven(
                "the mask combines conditions on key, query and position otherwise than by `and`: " + self._texts(every)
            )

    def _predicate(self, keep: torch.Tensor, axes: Sequence[int], name: str) -> Predicate | None:
        if not axes:
            return None
        variables = [self.variables[i] for i in axes]
        table = self._project(keep, axes).reshape([len(v.values) for v in variables])
        if name == "k":
            return Predicate(build_predicate(self.b, variables, table), "k")
        return Predicate(self._about_keys(variables, table), "q")

    def _about_keys(self, variables: Sequence[Variable], table: torch.Tensor) -> Expr:
        """A query predicate in the same variables as key predicates, so that the two can be compared."""
        rename = _Renamer(self.b, {"q": "k"})
        renamed = [Variable(rename(v.expr), v.kind, v.values, v.intervals) for v in variables]
        order = sorted(range(len(renamed)), key=lambda i: renamed[i].text)
        return build_predicate(rename.b, [renamed[i] for i in order], table.permute(order).contiguous())

    # ------------------------------------------------------------------------------------------------------- the window

    def _window(self, keep: torch.Tensor, axes: Sequence[int]) -> tuple[int, int]:
        if not axes:
            return -1, -1
        v = self.variables[axes[0]]
        table = self._project(keep, axes).flatten().tolist()
        inside = [interval for interval, kept in zip(v.intervals, table, strict=True) if kept]
        rule = text(build_predicate(self.b, [v], torch.tensor(table)))
        first, last = inside[0][0], inside[-1][1]
        if len(inside) != max(table_index(table)) - min(table_index(table)) + 1:
            raise NotProven(f"the mask's rule on positions (`{rule}`) is not a window")
        if (first is not None and first > 0) or (last is not None and last < 0):
            raise NotProven(f"the window of the mask (`{rule}`) does not contain the query's own position")
        return (-1 if first is None else -first), (-1 if last is None else last)

    def _always_a_key(self, left: int, right: int) -> bool:
        """Whether the window alone leaves every query a key."""
        longer = self.b.sub(self.b.size(self.b.sizes["q"]), self.b.size(self.b.sizes["k"]))
        return left == -1 or self.b.never_above(longer, 0)

    # -------------------------------------------------------------------------------------------- queries without keys

    def _no_valid_key(self) -> NoValidKey:
        keep = self.outcome.keep
        hidden = ~keep
        if not self.flags:
            return self.outcome.no_valid_key(hidden, self.spelling)
        bodies = {i: evaluate(self.lowering, self.variables[i].expr.args[1], keep.dim()).expand_as(keep) for i in self.flags}
        normal = self._with_flags(keep)
        exact = False
        for i, body in bodies.items():
            condition = self._with_flags(body)
            if bool((normal & ~condition).any()):
                raise NotProven(f"`{self.variables[i].text}` can be false for a query that sees a key")
            exact = exact or not bool((condition & ~normal).any())
        possible = torch.zeros_like(keep)
        for i, body in bodies.items():
            unset = torch.zeros_like(keep)
            unset.narrow(i, 0, 1).fill_(True)
            possible = possible | (unset & ~body)
            # A false flag means that no key has its condition, this one included.
        for i, body in bodies.items():
            falsified = torch.zeros_like(keep)
            falsified.narrow(i, 0, 1).copy_(body.narrow(i, 0, 1))
            possible = possible & ~falsified
        if not exact:
            possible = possible | self._all_flags_set(keep)
        if not bool((possible & hidden).any()) and exact:
            return "unmasked"
        if bool((possible & keep).any()):
            return "other"
        return self.outcome.no_valid_key(possible & hidden, self.spelling)

    def _all_flags_set(self, keep: torch.Tensor) -> torch.Tensor:
        """Rows that a query without keys can show although every flag is true."""
        rows = torch.zeros_like(keep)
        self._with_flags(rows).copy_(~self._with_flags(keep))
        return rows


def table_index(table: Sequence[bool]) -> list[int]:
    return [i for i, kept in enumerate(table) if kept]


class _Renamer:
    """Rewrites expressions with other index variables."""

    def __init__(self, b: Builder, names: dict[str, str]) -> None:
        sizes = {**b.sizes, **{new: b.sizes[old] for old, new in names.items()}}
        self.b, self.names, self.memo = Builder(sizes), names, {}  # type: ignore[var-annotated]

    def __call__(self, e: Expr) -> Expr:
        if e not in self.memo:
            self.memo[e] = self._rename(e)
        return self.memo[e]

    def _rename(self, e: Expr) -> Expr:
        if e.op == "index":
            return self.b.index(self.names.get(e.payload, e.payload))
        args = tuple(self(a) for a in e.args)
        if e.op == "linear":
            total = self.b.integer(e.payload[1])
            for a, c in zip(args, e.payload[0], strict=True):
                total = self.b.add(total, a, c)
            return total
        return intern_expr(e.op, args, e.payload, e.dtype)


def _describe(key: Predicate | None, query: Predicate | None, left: int, right: int) -> str:
    words = [f"key: {key.text}"] if key is not None else []
    words += [f"query: {query.text}"] if query is not None else []
    if (left, right) == (-1, 0):
        words.append("causal")
    elif left != -1 or right != -1:
        low = f"q - {left} <= " if left != -1 else ""
        high = "" if right == -1 else f" <= q + {right}" if right else " <= q"
        words.append(f"window: {low}k{high}")
    return "; ".join(words) or "every key is visible"
