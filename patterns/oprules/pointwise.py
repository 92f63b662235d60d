"""Operators that act on each element alone, and tensors that are made."""

from __future__ import annotations

from ..dims import DimConflict, broadcast, fresh_dims
from .core import RULES, Args, Typing, is_tensor, op_name, rule

POINTWISE = frozenset(
    """
    add sub mul div true_divide floor_divide rsub pow neg abs exp exp2 expm1 log log1p log2 sqrt rsqrt square
    reciprocal tanh sigmoid silu gelu relu relu6 leaky_relu elu selu celu softplus softsign hardtanh hardswish
    hardsigmoid mish log_sigmoid threshold dropout alpha_dropout native_dropout sin cos tan asin acos atan atan2 sinh
    cosh erf erfc sign ceil floor round trunc frac fmod remainder where masked_fill maximum minimum fmax fmin clamp
    clamp_min clamp_max clip eq ne lt le gt ge isnan isinf isfinite nan_to_num __and__ __or__ __xor__ bitwise_and
    bitwise_or bitwise_xor bitwise_not logical_and logical_or logical_xor logical_not to _to_copy type_as float bool
    clone contiguous detach alias lift_fresh lift_fresh_copy positive conj lerp addcmul addcdiv bernoulli rand_like
    randn_like xlogy logaddexp hypot copysign polar complex real imag angle sgn convert_element_type
    mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div soft_margin_loss
    poisson_nll_loss
    """.split()
)
# Inputs whose values do not reach the result.
_SHAPE_ONLY = {"type_as": ("other",), "rand_like": ("self",), "randn_like": ("self",)}


def pointwise(a: Args) -> Typing:
    name = op_name(a.node)
    tensors = [x for x in a.node.all_input_nodes if is_tensor(x)]
    ignored = tuple(a[n] for n in _SHAPE_ONLY.get(name, ()))
    if name == "type_as":
        tensors = [a["self"]]
    value = a.node.meta["val"]
    shape = value[0].shape if isinstance(value, (tuple, list)) else value.shape
    if any(len(a.dims(x)) > len(shape) for x in tensors):
        raise DimConflict("not element by element")  # `where` of a condition alone lists indices; a loss may be reduced
    dims = broadcast([a.dims(x) for x in tensors], shape, a.origin)
    return Typing((dims,) * len(value) if isinstance(value, (tuple, list)) else dims, shape_only=ignored)


for _name in POINTWISE:
    RULES[_name] = pointwise


@rule("zeros_like", "ones_like", "full_like", "empty_like")
def _constant_like(a: Args) -> Typing:
    return Typing(a.dims("self"), shape_only=(a["self"],))


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def _new(a: Args) -> Typing:
    return Typing(fresh_dims(a.shape, a.origin), shape_only=(a["self"],))


@rule("arange", "zeros", "ones", "full", "empty", "scalar_tensor", "rand", "randn", "eye", "iota", "linspace")
def _create(a: Args) -> Typing:
    return Typing(fresh_dims(a.shape, a.origin))
