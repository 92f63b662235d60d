"""How each operator carries tensor dimensions from its inputs to its output.

A rule answers with a `Typing`: the dimensions of the result, and which input dimensions are *mixed* (reduced, contracted,
normalised over, sorted, …). What is not mixed is carried element by element, so the operator acts on each index of it alone:
a node is row-wise over the tokens when it mixes none of their dimensions. An operator without a rule is opaque: its result has
fresh dimensions, and every dimension of its inputs counts as mixed.

To teach the packer a new operator, add its name to a set or write a rule, in the file of its kind; nothing else needs to know.
"""

from .core import Args, Typing, is_tensor, op_name
from .graph import infer
from .losses import LOSSES_OF_TOKENS
from .pointwise import POINTWISE
from .views import looked_up, permutation

__all__ = ["LOSSES_OF_TOKENS", "POINTWISE", "Args", "Typing", "infer", "is_tensor", "looked_up", "op_name", "permutation"]
