"""Each family of masks: what the prover makes of it, in the words that the user sees, and by brute force."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from mask_cases import Case, check, record, summary, values_of

from varlen_inductor.patterns.masks import MaskOp, NotProven, ScoreLayout, prove

B, H, S = 2, 3, 4
MIN = torch.finfo(torch.float32).min
INF = float("inf")


def attention_mask() -> torch.Tensor:
    return torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def inputs_like(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Other data for an input: 0/1 for masks, lengths within range, now and then something that breaks an obligation."""
    g = torch.Generator().manual_seed(seed)
    if x.dtype is torch.bool:
        return torch.randint(0, 2, x.shape, generator=g).bool()
    if x.dim() == 1:
        return torch.randint(0, S + 1, x.shape, generator=g)
    data = torch.randint(0, 3 if seed % 3 == 2 else 2, x.shape, generator=g)
    if x.is_floating_point() and seed % 2:
        return torch.zeros(x.shape).masked_fill(data == 0, -INF).to(x.dtype)
    return data.to(x.dtype)


def case(
    program: Callable[..., torch.Tensor], *inputs: torch.Tensor, spelling: str = "sdpa", k: int = S, **options: object
) -> Case:
    inputs = inputs or (attention_mask(),)
    return Case(record(program, *inputs), B, H, S, k, spelling=spelling, **options)  # type: ignore[arg-type]


def proven(program: Callable[..., torch.Tensor], *inputs: torch.Tensor, **options: object) -> str:
    """The proof in words, after it has been checked by brute force."""
    inputs = inputs or (attention_mask(),)
    made = case(program, *inputs, **options)  # type: ignore[arg-type]
    proof = made.prove()
    held = [check(made, proof, [inputs_like(x, seed) for x in inputs]) for seed in range(8)]
    assert any(held)
    return summary(proof)


def refused(program: Callable[..., torch.Tensor], *inputs: torch.Tensor, **options: object) -> str:
    return case(program, *inputs, **options).refusal()  # type: ignore[arg-type]


def q() -> torch.Tensor:
    """Positions of queries, as a column."""
    return torch.arange(S)[:, None]


def k() -> torch.Tensor:
    """Positions of keys, as a row."""
    return torch.arange(S)[None, :]


# --------------------------------------------------------------------------------------------------------- key padding


@pytest.mark.parametrize(
    "program",
    [
        lambda m: m[:, None, None, :].bool(),
        lambda m: m.bool()[:, None, None, :].expand(B, H, S, S),
        lambda m: m.view(B, 1, 1, S) != 0,
        lambda m: ~(m == 0).unsqueeze(1).unsqueeze(1),
        lambda m: torch.where(m.unsqueeze(1).unsqueeze(2) == 0, False, True),
        lambda m: m[:, None, None, :].to(torch.bfloat16).bool(),
        lambda m: torch.ones(B, 1, S, S, dtype=torch.bool).masked_fill((m == 0)[:, None, None, :], False),
    ],
)
def test_spellings_of_a_boolean_key_mask(program: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert proven(program) == "key: m_1[b, k] != 0\nno valid key: zero"


def test_key_mask_of_one_value() -> None:
    """``ids == 1`` is not ``ids``: the predicate is what was proven, not the truth of the leaf."""
    assert_expected_inline(proven(lambda ids: (ids == 1)[:, None, None, :]), """\
key: ids_1[b, k] == 1
no valid key: zero""")  # fmt: skip
    assert_expected_inline(proven(lambda ids: (ids != 1)[:, None, None, :]), """\
key: ids_1[b, k] != 1
no valid key: zero""")  # fmt: skip


def test_additive_mask() -> None:
    assert_expected_inline(proven(lambda m: (1.0 - m[:, None, None, :].float()) * MIN), """\
key: m_1[b, k] != 0
no valid key: uniform
obligation: every value of `m_1` is 0 or 1""")  # fmt: skip


def test_additive_mask_of_a_boolean_needs_no_fact() -> None:
    assert_expected_inline(proven(lambda m: (1.0 - m.bool()[:, None, None, :].float()) * MIN), """\
key: m_1[b, k] != 0
no valid key: uniform""")  # fmt: skip


def test_inverted_mask_filled() -> None:
    """The two-step spelling of older models: 1 - mask, then its non-zeros filled."""

    def program(m: torch.Tensor) -> torch.Tensor:
        inverted = 1.0 - m[:, None, None, :].expand(B, 1, S, S).float()
        return inverted.masked_fill(inverted.to(torch.bool), MIN)

    assert_expected_inline(proven(program), """\
key: m_1[b, k] != 0
no valid key: uniform
obligation: every value of `m_1` is 0 or 1""")  # fmt: skip


def test_minus_ten_thousand() -> None:
    assert_expected_inline(proven(lambda m: (1.0 - m[:, None, None, :].float()) * -10000.0), """\
key: m_1[b, k] != 0
no valid key: unmasked
obligation: every value of `m_1` is 0 or 1
assumption: adding -10000 hides a key: the attention scores of a query differ by less than 9896""")  # fmt: skip


def test_masked_fill_of_zeros() -> None:
    assert_expected_inline(proven(lambda m: torch.zeros(B, 1, 1, S).masked_fill((m == 0)[:, None, None, :], -INF)), """\
key: m_1[b, k] != 0
no valid key: zero""")  # fmt: skip


def test_log_of_a_mask() -> None:
    assert_expected_inline(proven(lambda m: m.bool().float().log()[:, None, None, :]), """\
key: m_1[b, k] != 0
no valid key: zero""")  # fmt: skip


def test_float_mask_input() -> None:
    assert_expected_inline(proven(lambda bias: bias[:, None, None, :], torch.zeros(B, S)), """\
key: bias_1[b, k] == 0
no valid key: zero
obligation: every value of `bias_1` is 0 or -inf""")  # fmt: skip


def test_lengths() -> None:
    assert_expected_inline(
        proven(lambda n: (torch.arange(S)[None, :] < n[:, None]).view(B, 1, 1, S), torch.tensor([4, 2])), """\
key: k < n_1[b]
no valid key: zero
prefix""")  # fmt: skip
    assert_expected_inline(proven(lambda m: (torch.arange(S) < m.sum(1, keepdim=True)).view(B, 1, 1, S)), """\
key: k < m_1.sum(1, True)[b, 0]
no valid key: zero
prefix""")  # fmt: skip
    assert_expected_inline(
        proven(lambda n: (torch.arange(S)[None, :] >= S - n[:, None]).view(B, 1, 1, S), torch.tensor([4, 2])), """\
key: k + n_1[b] > 3
no valid key: zero""")  # fmt: skip


def test_one_mask_for_all_rows() -> None:
    """The batch dimension of a mask may broadcast."""
    assert_expected_inline(proven(lambda m: m.view(1, 1, 1, S), torch.ones(1, S, dtype=torch.bool)), """\
key: m_1[0, k]
no valid key: zero""")  # fmt: skip
    assert_expected_inline(proven(lambda m: m.expand(S, S), torch.ones(S, dtype=torch.bool)), """\
key: m_1[k]
no valid key: zero""")  # fmt: skip


def test_two_key_masks() -> None:
    a, b = attention_mask(), attention_mask().bool()
    assert_expected_inline(proven(lambda a, b: (a.bool() & ~b)[:, None, None, :], a, b), """\
key: a_1[b, k] != 0 and not b_1[b, k]
no valid key: zero""")  # fmt: skip
    assert_expected_inline(proven(lambda a, b: (a.bool() | b)[:, None, None, :], a, b), """\
key: a_1[b, k] != 0 or b_1[b, k]
no valid key: zero""")  # fmt: skip


def test_folded_heads() -> None:
    """Through (B * H, 1, S), as nn.MultiheadAttention does."""

    def program(m: torch.Tensor) -> torch.Tensor:
        folded = m.bool().view(B, 1, 1, S).expand(-1, H, -1, -1).reshape(B * H, 1, S)
        return folded.view(B, H, 1, S)

    assert proven(program) == "key: m_1[b, k] != 0\nno valid key: zero"
    sizes = {"b": B, "h": H, "q": S, "k": S}
    for spread in (
        lambda m: m.bool()[:, None, None, :].expand(-1, H, -1, -1).reshape(B * H, 1, S),
        lambda m: m.bool()[:, None, :].repeat_interleave(H, 0),
        lambda m: m.bool()[:, None, None, :].repeat(1, H, 1, 1).flatten(0, 1),
    ):
        gm = record(spread, attention_mask())
        made = Case(gm, B, H, S, S, dims=(("b", "h"), ("q",), ("k",)))
        assert made.prove().key == _key(gm, sizes)
    wrong = record(lambda m: m.bool()[:, None, :].repeat(H, 1, 1), attention_mask())  # heads outermost
    reason = Case(wrong, B, H, S, S, dims=(("b", "h"), ("q",), ("k",))).refusal()
    assert_expected_inline(reason, """the mask differs between heads: `m_1[(3 * b + h) % 2, k]`""")


def _key(gm: torch.fx.GraphModule, sizes: dict[str, int]) -> object:
    (leaf,) = (n for n in gm.graph.nodes if n.op == "placeholder")
    with gm.graph.inserting_after(leaf):
        mask = gm.graph.call_function(torch.ops.aten.ne.Scalar, (leaf, 0))
        mask.meta["val"] = leaf.meta["val"] != 0
        row = gm.graph.call_function(torch.ops.aten.view.default, (mask, [B, 1, 1, S]))
        row.meta["val"] = mask.meta["val"].view(B, 1, 1, S)
    layout = ScoreLayout((("b",), ("h",), ("q",), ("k",)), sizes)
    return prove([MaskOp("bool", row)], layout, torch.float32, spelling="sdpa").key


# --------------------------------------------------------------------------------------------------- causal and windows


@pytest.mark.parametrize(
    "program",
    [
        lambda m: torch.ones(S, S, dtype=torch.bool).tril(),
        lambda m: torch.triu(torch.full((S, S), -INF), diagonal=1),
        lambda m: torch.arange(S)[:, None] >= torch.arange(S)[None, :],
        lambda m: ~(torch.arange(S)[:, None] < torch.arange(S)[None, :]),
        lambda m: torch.zeros(S, S).masked_fill(torch.ones(S, S).triu(1).bool(), -INF),
        lambda m: (torch.arange(S)[None] - torch.arange(S)[:, None]).clamp(min=0) == 0,
        lambda m: torch.full((S, S), MIN).triu(1) * (torch.arange(S) > torch.arange(S).reshape(-1, 1)),
    ],
)
def test_spellings_of_a_causal_mask(program: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert proven(program) == "causal\nno valid key: zero"


def test_windows() -> None:
    assert_expected_inline(proven(lambda m: (q() - k()).abs() <= 2), """\
window: q - 2 <= k <= q + 2
no valid key: zero""")  # fmt: skip
    assert_expected_inline(proven(lambda m: (k() > q() - 2) & (k() <= q())), """\
window: q - 1 <= k <= q
no valid key: zero""")  # fmt: skip
    assert_expected_inline(proven(lambda m: k() <= q() + 1), """\
window: k <= q + 1
no valid key: zero""")  # fmt: skip
    assert_expected_inline(proven(lambda m: (q() - k() < 100) & (k() - q() < 100)), """\
every key is visible
no valid key: zero""")  # fmt: skip


def test_causal_and_padding() -> None:
    def program(m: torch.Tensor) -> torch.Tensor:
        causal = torch.ones(S, S, dtype=torch.bool).tril()
        return m[:, None, None, :].bool() & causal

    assert proven(program) == "key: m_1[b, k] != 0; causal\nno valid key: zero"
    assert proven(program, spelling="decomposed") == "key: m_1[b, k] != 0; causal\nno valid key: nan"


def test_sum_of_additive_masks() -> None:
    """finfo.min twice is -inf: a query without keys sees some of one and some of the other."""

    def program(m: torch.Tensor) -> torch.Tensor:
        causal = torch.full((S, S), MIN).triu(1)
        padding = (1.0 - m.bool().float())[:, None, None, :] * MIN
        return causal + padding

    assert proven(program) == "key: m_1[b, k] != 0; causal\nno valid key: other"


def test_assignment_into_a_causal_mask() -> None:
    """``causal[..., :n] = causal[..., :n].masked_fill(...)`` made functional."""

    def program(m: torch.Tensor) -> torch.Tensor:
        causal = torch.full((B, 1, S, S), MIN).triu(1)
        padded = (causal[..., :S] + m[:, None, None, :].float()) == 0
        filled = causal[..., :S].masked_fill(padded, MIN)
        return torch.slice_scatter(causal, filled, 3, 0, S)

    assert_expected_inline(proven(program), """\
key: m_1[b, k] != 0; causal
no valid key: uniform
obligation: every value of `m_1` is 0 or 1""")  # fmt: skip


def test_is_causal() -> None:
    """SDPA's flag counts from the first query and the first key, whatever their numbers."""
    gm = record(lambda m: m.bool()[:, None, None, :], torch.ones(B, 6, dtype=torch.long))
    assert summary(Case(gm, B, H, S, 6, is_causal=True).prove()) == "key: m_1[b, k] != 0; causal\nno valid key: zero"
    layout = ScoreLayout((("b",), ("h",), ("q",), ("k",)), {"b": B, "h": H, "q": S, "k": 6})
    assert summary(prove([], layout, torch.float32, is_causal=True, spelling="sdpa")) == "causal\nno valid key: zero"
    q, k, v = torch.randn(1, 1, S, 2), torch.randn(1, 1, 6, 2), torch.randn(1, 1, 6, 2)
    mask = torch.arange(6)[None] <= torch.arange(S)[:, None]
    torch.testing.assert_close(
        F.scaled_dot_product_attention(q, k, v, is_causal=True), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    )


def test_no_mask() -> None:
    layout = ScoreLayout((("b",), ("h",), ("q",), ("k",)), {"b": B, "h": H, "q": S, "k": S})
    proof = prove([], layout, torch.float32, spelling="decomposed")
    assert (proof.key, proof.query, proof.window_left, proof.window_right) == (None, None, -1, -1)
    assert summary(proof) == "every key is visible\nno valid key: zero"


# ------------------------------------------------------------------------------------------------------------- queries


def test_query_predicate_equals_the_key_predicate() -> None:
    made = case(lambda m: m.bool()[:, None, :, None] & m.bool()[:, None, None, :])
    proof = made.prove()
    assert proof.description == "key: m_1[b, k] != 0; query: m_1[b, q] != 0"
    assert proof.query == proof.key
    assert hash(proof.query) == hash(proof.key)


def test_product_of_masks() -> None:
    assert_expected_inline(proven(lambda m: (m[:, None, :, None] * m[:, None, None, :]).bool()), """\
key: m_1[b, k] != 0; query: m_1[b, q] != 0
no valid key: zero
obligation: every value of `m_1` is 0 or 1""")  # fmt: skip


def test_outer_products() -> None:
    words = "key: m_1[b, k] != 0; query: m_1[b, q] != 0\nno valid key: zero\nobligation: every value of `m_1` is 0 or 1"
    assert proven(lambda m: torch.einsum("bi,bj->bij", m, m)[:, None] != 0) == words
    assert proven(lambda m: (m[:, None, :, None] @ m[:, None, None, :]) == 1) == words


def test_prompt_before_the_mask() -> None:
    made = case(lambda m: torch.cat([m.new_ones(B, 2), m], 1)[:, None, None, :].bool(), attention_mask(), k=S + 2)
    assert summary(made.prove()) == "key: k <= 1 or m_1[b, k - 2] != 0\nno valid key: zero"
    assert check(made, made.prove(), [attention_mask()])


# -------------------------------------------------------------------------------------------------- queries without keys


def _causal_and_padding(m: torch.Tensor) -> torch.Tensor:
    return m.bool()[:, None, None, :] & torch.ones(S, S, dtype=torch.bool).tril()


def test_rows_without_keys_unmasked() -> None:
    """The left-padding fix-up: a query without keys is shown all of them."""
    words = "key: m_1[b, k] != 0; causal\nno valid key: unmasked"

    def boolean(m: torch.Tensor) -> torch.Tensor:
        mask = _causal_and_padding(m)
        return mask | ~mask.any(-1, keepdim=True)

    def additive(m: torch.Tensor) -> torch.Tensor:
        mask = torch.where(_causal_and_padding(m), 0.0, MIN)
        return mask.mul(~torch.all(mask == MIN, dim=-1, keepdim=True))

    assert proven(boolean) == words
    assert proven(additive) == words


def test_rows_flagged_by_another_condition() -> None:
    """A flag that is not about this mask's own keys is no reason to trust it."""

    def stricter(m: torch.Tensor) -> torch.Tensor:
        causal = torch.ones(S, S, dtype=torch.bool).tril()
        return m.bool()[:, None, None, :] | ~(m.bool()[:, None, None, :] & causal).any(-1, keepdim=True)

    assert_expected_inline(
        refused(stricter), """`any over j0 of (m_1[b, j0] != 0 and q >= j0)` can be false for a query that sees a key"""
    )


def test_flag_per_row_of_the_batch() -> None:
    """Whether a sequence has any token is data like any other."""
    assert_expected_inline(
        proven(lambda m: (m.bool() | ~m.bool().any(-1, keepdim=True))[:, None, None, :]), """\
key: not m_1.any(-1, True)[b, 0] or m_1[b, k] != 0
no valid key: zero""")  # fmt: skip


NO_KEY = [
    ("sdpa", torch.float32, -INF, "zero"),
    ("sdpa", torch.float32, MIN, "uniform"),
    ("sdpa", torch.bfloat16, torch.finfo(torch.bfloat16).min, "uniform"),
    ("sdpa", torch.float16, torch.finfo(torch.float16).min, "unmasked"),
    ("sdpa", torch.float64, torch.finfo(torch.float64).min, "uniform"),
    ("sdpa", torch.float64, -1e9, "unmasked"),
    ("sdpa", torch.float32, -1e9, "other"),
    ("sdpa", torch.float32, -1e4, "unmasked"),
    ("decomposed", torch.float32, -INF, "nan"),
    ("decomposed", torch.float32, MIN, "uniform"),
    ("decomposed", torch.float32, -1e4, "unmasked"),
    ("decomposed", torch.float16, torch.finfo(torch.float16).min, "other"),
]


@pytest.mark.parametrize(("spelling", "dtype", "low", "expected"), NO_KEY)
def test_what_eager_gives_a_query_without_keys(spelling: str, dtype: torch.dtype, low: float, expected: str) -> None:
    made = case(
        lambda m: torch.zeros(B, 1, 1, S, dtype=dtype).masked_fill((m == 0)[:, None, None, :], low),
        spelling=spelling,
        dtype=dtype,
    )
    proof = made.prove()
    assert proof.no_valid_key == expected
    assert (proof.assumption is None) == (low <= max(-1e30, torch.finfo(dtype).min))
    # `check` compares with eager, also where a row of the batch has no valid key.
    assert all(check(made, proof, [m]) for m in (torch.zeros(B, S).long(), attention_mask(), torch.tensor([[0] * S, [1] * S])))


def test_a_float32_minimum_in_half_precision_is_infinite() -> None:
    made = case(lambda m: torch.where(m[:, None, None, :] == 0, MIN, 0.0).to(torch.bfloat16), dtype=torch.bfloat16)
    assert made.prove().no_valid_key == "zero"
    # The cast may also be SDPA's own, under autocast.
    made = case(lambda m: torch.where(m[:, None, None, :] == 0, MIN, 0.0), dtype=torch.bfloat16)
    assert made.prove().no_valid_key == "zero"


# ------------------------------------------------------------------------------------------------------- inline masking


def _decomposed(ops: Sequence[tuple[str, Callable[[torch.Tensor], torch.Tensor], float | None]]) -> str:
    gm = record(lambda m: [f(m) for _, f, _ in ops], attention_mask())
    (out,) = (n for n in gm.graph.nodes if n.op == "output")
    steps = [MaskOp(kind, node, value) for (kind, _, value), node in zip(ops, out.args[0], strict=True)]  # type: ignore[arg-type]
    layout = ScoreLayout((("b",), ("h",), ("q",), ("k",)), {"b": B, "h": H, "q": S, "k": S})
    try:
        return summary(prove(steps, layout, torch.float32, spelling="decomposed"))
    except NotProven as refusal:
        return refusal.reason


def test_fill_of_scores() -> None:
    padded = lambda m: (m == 0)[:, None, None, :]  # noqa: E731
    assert_expected_inline(_decomposed([("fill", padded, -INF)]), """\
key: m_1[b, k] != 0
no valid key: nan""")  # fmt: skip
    assert_expected_inline(_decomposed([("fill", padded, -1e9)]), """\
key: m_1[b, k] != 0
no valid key: uniform
assumption: a score of -1e+09 hides a key: all attention scores are above -1e+09""")  # fmt: skip
    reason = _decomposed([("fill", padded, 0.0)])
    assert_expected_inline(reason, """the mask replaces some scores by 0: a bias, which does not hide a key""")


def test_where_on_scores() -> None:
    causal = lambda m: torch.ones(S, S, dtype=torch.bool).tril()  # noqa: E731
    bias = lambda m: (1.0 - m.bool().float())[:, None, None, :] * MIN  # noqa: E731
    assert_expected_inline(_decomposed([("where_keep", causal, MIN), ("add", bias, None)]), """\
key: m_1[b, k] != 0; causal
no valid key: other""")  # fmt: skip


def test_scores_times_mask() -> None:
    reason = _decomposed([("mul", lambda m: m.float()[:, None, None, :], None)])
    assert_expected_inline(reason, """the scores are multiplied by `unsqueeze_1`: a zero score hides no key""")


# ------------------------------------------------------------------------------------------------------------ refusals


def test_refusals() -> None:
    pairs = torch.ones(B, 1, S, S, dtype=torch.bool)
    heads = torch.zeros(1, H, 1, S)
    reasons = {
        "mask of pairs": refused(lambda m: m, pairs),
        "bias of pairs": refused(lambda m: m, pairs.float()),
        "random": refused(lambda m: torch.rand(B, 1, S, S) > 0.5),
        "bias per head": refused(lambda m: m, heads),
        "mask per head": refused(lambda m: m == 0, heads),
        "alibi": refused(lambda m: (k() - q()) * 0.5 + torch.full((S, S), -INF).triu(1)),
        "small bias": refused(lambda m: m.bool()[:, None, None, :] * -5.0),
        "nan": refused(lambda m: (1.0 - m.bool().float())[:, None, None, :] * -INF),
        "documents": refused(lambda m: m[:, None, :, None] == m[:, None, None, :]),
        "chunks": refused(lambda m: q() // 2 == k() // 2),
        "prefix": refused(lambda m: (k() <= q()) | m.bool()[:, None, None, :]),
        "strictly causal": refused(lambda m: k() < q()),
        "not the diagonal": refused(lambda m: k() != q()),
        "offset per row": refused(lambda n: k()[None, None] <= q()[None, None] + n[:, None, None, None], torch.tensor([1, 2])),
        "nothing visible": refused(lambda m: torch.zeros(S, S, dtype=torch.bool)),
        "shape": refused(lambda m: m.bool()[:, None, None, :2]),
        "reversed": refused(lambda m: k() + q() < S),
    }
    text = "\n".join(f"{name}: {reason}" for name, reason in reasons.items())
    assert_expected_inline(
        text,
        """\
mask of pairs: the mask is data for every pair of positions: `m_1[b, 0, q, k]`
bias of pairs: the mask adds data for every pair of positions to the scores (`m_1[b, 0, q, k]`)
random: the mask is data for every pair of positions: `rand[b, 0, q, k]`
bias per head: the mask adds a bias that differs between heads (`m_1[0, h, 0, k]`)
mask per head: the mask differs between heads: `m_1[0, h, 0, k] == 0`
alibi: the mask adds a bias that depends on the position (`k`)
small bias: the mask adds -5 to some scores: a bias, which does not hide a key
nan: the mask is NaN somewhere (such as 0 * -inf)
documents: the mask separates documents within a row (by `m_1`): not rewritten yet
chunks: the mask keeps attention within chunks of positions (`(k // 2) - (q // 2)`): not rewritten yet
prefix: the mask combines conditions on key, query and position otherwise than by `and`: `m_1[b, k]`, `k - q`
strictly causal: the window of the mask (`k < q`) does not contain the query's own position
not the diagonal: the mask's rule on positions (`k != q`) is not a window
offset per row: the mask relates query and key in a way that is no window: `k - q - n_1[b]`
nothing visible: the mask hides every key
shape: the mask's shape (2, 1, 1, 2) does not broadcast to that of the scores
reversed: the mask relates query and key in a way that is no window: `k + q`""",
    )


def test_learned_bias() -> None:
    gm = record(lambda m: m.view(B, 1, 1, S), torch.zeros(B, S))
    made = Case(gm, B, H, S, S)
    (leaf,) = (n for n in gm.graph.nodes if n.op == "placeholder")
    leaf.meta["requires_grad"] = True
    assert_expected_inline(made.refusal(), """the mask adds a learned bias to the scores (`m_1[b, k]`)""")


def test_written_in_place() -> None:
    """What is written somewhere is refused, by the caller's word or because the graph shows it."""
    made = case(lambda m: m.bool()[:, None, None, :])
    leaf = next(n for n in made.gm.graph.nodes if n.op == "placeholder")
    assert_expected_inline(
        made.refusal(opaque=frozenset({leaf})), """the mask depends on `m_1[b, k]`, which is modified in place"""
    )

    def program(m: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
        view = mask[..., :2]
        view.zero_()
        mask.logical_and_(m.bool()[:, None, None, :])
        return mask & mask

    assert "in place" in refused(program)


def test_in_place_on_a_fresh_tensor() -> None:
    """``zeros_like(mask).masked_fill_(mask, -inf)``: nobody else sees the zeros."""
    assert_expected_inline(
        proven(lambda m: torch.zeros_like(m, dtype=torch.float32).masked_fill_(m == 0, -INF).view(B, 1, 1, S)), """\
key: m_1[b, k] != 0
no valid key: zero""")  # fmt: skip


def test_a_mask_that_does_not_matter_is_not_refused() -> None:
    """Only conditions on which the outcome depends are looked at."""
    assert proven(lambda m, x: m.bool()[:, None, None, :] | (x & ~x), attention_mask(), torch.ones(B, 1, S, S).bool()) == (
        "key: m_1[b, k] != 0\nno valid key: zero"
    )


# ------------------------------------------------------------------------------------------------------------- memory


def test_proofs_are_remembered_until_the_graph_changes() -> None:
    made = case(lambda m: m.bool()[:, None, None, :])
    first = made.prove()
    assert made.prove() is first
    cast = next(n for n in made.gm.graph.nodes if n.target is torch.ops.aten.to.dtype)
    with made.gm.graph.inserting_before(cast):
        inverted = made.gm.graph.call_function(torch.ops.aten.eq.Scalar, (cast.args[0], 0))
        inverted.meta["val"] = cast.meta["val"]
    cast.replace_all_uses_with(inverted)
    again = made.prove()
    assert again.description == "key: m_1[b, k] == 0"


def test_equal_leaves_are_one() -> None:
    """``mask.sum(1)`` written twice gives equal predicates."""

    def program(m: torch.Tensor) -> list[torch.Tensor]:
        return [(torch.arange(S)[None] < m.sum(1)[:, None]).view(B, 1, 1, S) for _ in range(2)]

    gm = record(program, attention_mask())
    (out,) = (n for n in gm.graph.nodes if n.op == "output")
    layout = ScoreLayout((("b",), ("h",), ("q",), ("k",)), {"b": B, "h": H, "q": S, "k": S})
    first, second = (prove([MaskOp("bool", m)], layout, torch.float32, spelling="sdpa").key for m in out.args[0])
    assert first == second
    assert values_of(gm, [attention_mask()])
