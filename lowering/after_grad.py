"""The passes over the graphs that autograd has made, in their order.

Inductor calls them last among its own passes: those of ``JOINT_PASSES`` while forward and backward are one graph, through
`inductor_pass.InJointGraph`, those of ``PASSES`` on each of the two, through `inductor_pass.AfterGrad`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import fx

from varlen_inductor import config
from varlen_inductor.lowering.drawn_seeds import keep_seeds, read_seeds_in_place
from varlen_inductor.lowering.joined_gradients import join_gradients
from varlen_inductor.lowering.joined_products import join_products
from varlen_inductor.lowering.row_sums import split_row_sums
from varlen_inductor.lowering.short_erf import shorten_erf
from varlen_inductor.lowering.table_gradients import add_up_in_single

_log = logging.getLogger("varlen_inductor")

PASSES = (
    join_gradients,  # makes the copy go away whose rows are then summed
    join_products,  # of those gradients that the one before has left apart; makes their sums one
    split_row_sums,
    add_up_in_single,
    shorten_erf,
)
JOINT_PASSES = (read_seeds_in_place, keep_seeds)


def rewrite(graph: fx.Graph, passes: tuple[Callable[[fx.Graph], int], ...]) -> None:
    """Rewrite ``graph`` in place. A pass that fails is logged with its traceback, unless ``config.strict``: then it raises.

    Each pass changes one place at a time, completely or not at all, so what one that failed has left behind is right.
    """
    for each in passes:
        try:
            changed = each(graph)
        except Exception:
            if config.strict:
                raise
            _log.warning("%s failed; the graph is compiled without it", each.__name__, exc_info=True)
        else:
            if changed:
                _log.debug("%s changed %d places", each.__name__, changed)
