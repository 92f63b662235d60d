"""Atoms: unifying, splitting and regrouping dimensions."""

from __future__ import annotations

import pytest
import sympy

from varlen_inductor.patterns.dims import Atom, DimConflict, broadcast, fresh, fresh_dims, leaves, quotient, regroup, size_of, unify


def sizes(dims: object) -> list[list[int]]:
    return [[int(a.size) for a in leaves(dim)] for dim in dims]  # type: ignore[union-attr]


def test_a_dimension_of_one_holds_no_atoms() -> None:
    assert fresh(1) == ()
    assert sizes(fresh_dims((1, 4, 1))) == [[], [4], []]


def test_unified_dimensions_are_the_same_everywhere() -> None:
    x, y, z = (fresh_dims((3, 4)) for _ in range(3))
    unify(x[0], y[0])
    unify(y[0], z[0])
    assert leaves(x[0]) == leaves(z[0])
    assert leaves(x[1]) != leaves(y[1])


def test_unifying_splits_what_the_other_side_splits() -> None:
    folded, batch, heads = fresh(12), fresh(3), fresh(4)
    unify(folded, (*batch, *heads))
    assert leaves(folded) == [*leaves(batch), *leaves(heads)]
    # And so does everything that was unified before.
    other = fresh(12)
    unify(other, folded)
    assert leaves(other) == leaves(folded)


@pytest.mark.parametrize(("left", "right"), [((6,), (4,)), ((2, 3), (3, 2)), ((4,), (4, 2)), ((), (3,))])
def test_sizes_that_cannot_be_lined_up(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    with pytest.raises(DimConflict):
        unify([Atom(n) for n in left], [Atom(n) for n in right])


@pytest.mark.parametrize(
    ("left", "right", "expected"), [((4, 3), (2, 6), [2, 2, 3]), ((2, 9), (6, 3), [2, 3, 3]), ((12,), (2, 3, 2), [2, 3, 2])]
)
def test_splits_on_both_sides(left: tuple[int, ...], right: tuple[int, ...], expected: list[int]) -> None:
    one, other = [Atom(n) for n in left], [Atom(n) for n in right]
    unify(one, other)
    assert [int(a.size) for a in leaves(one)] == expected
    assert leaves(one) == leaves(other)


def test_views_regroup_and_split() -> None:
    b, s, e = dims = fresh_dims((3, 4, 10))
    flat = regroup(dims, (12, 10))
    assert [leaves(d) for d in flat] == [[*leaves(b), *leaves(s)], leaves(e)]
    heads = regroup(flat, (3, 4, 2, 5))
    assert leaves(heads[0]) == leaves(b)
    assert sizes(heads) == [[3], [4], [2], [5]]
    assert leaves(e) == [*leaves(heads[2]), *leaves(heads[3])]
    assert [leaves(d) for d in regroup(dims, (3, 1, 4, 10, 1))] == [leaves(b), [], leaves(s), leaves(e), []]


def test_a_view_of_equal_sizes_keeps_the_order() -> None:
    """(B, S) seen as (S, B) with B == S is still batch first; with B != S pieces of S go with the batch."""
    b, s = dims = fresh_dims((4, 4))
    assert [leaves(d) for d in regroup(dims, (4, 4))] == [leaves(b), leaves(s)]
    b, s = dims = fresh_dims((2, 6))
    mixed = regroup(dims, (6, 2))
    assert leaves(mixed[0])[0] is leaves(b)[0]
    assert sizes(mixed) == [[2, 3], [2]]


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 11), (3, 4, 10, 2), (3, 4)])
def test_views_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(DimConflict):
        regroup(fresh_dims((3, 4, 10)), shape)


def test_broadcasting_aligns_from_the_right() -> None:
    x, bias, column = fresh_dims((3, 4, 10)), fresh_dims((10,)), fresh_dims((4, 1))
    result = broadcast([x, bias, column], (3, 4, 10), "")
    assert [leaves(d) for d in result] == [leaves(d) for d in x]
    assert leaves(bias[0]) == leaves(x[2])
    assert leaves(column[0]) == leaves(x[1])


def test_broadcasting_of_equal_sizes_is_by_place() -> None:
    """(S, S) + (S,) with all sizes equal: only the last dimensions are the same."""
    x, y = fresh_dims((4, 4)), fresh_dims((4,))
    broadcast([x, y], (4, 4), "")
    assert leaves(y[0]) == leaves(x[1]) != leaves(x[0])


def test_symbolic_sizes() -> None:
    s, t = sympy.symbols("s t", positive=True, integer=True)
    assert quotient(s * t, t) == s
    assert quotient(s * t * 4, t * 2) == 2 * s
    assert quotient(s, t) is None
    assert quotient(s, 2) is None
    assert quotient(s + 1, s) is None
    b, e = Atom(s), Atom(12)
    flat = regroup(((b,), (e,)), (s * 4, 3))  # type: ignore[arg-type]
    assert [size_of(d) for d in flat] == [4 * s, 3]
    with pytest.raises(DimConflict):
        unify([Atom(s)], [Atom(t)])
