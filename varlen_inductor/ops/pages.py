"""Keys in pages, for kernels that cannot read them where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from varlen_inductor.ops.problem import Layout


def gather_pages(key: Tensor, value: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Layout]:
    """Key and value, (pages, page_size, H_k, D), as (T_k, H_k, D) with the pages of each sequence one after the other.

    Also the layout with ``cu_seq_k`` where these sequences end, and no pages. Differentiable; no copy to the host.
    """
    table = layout.block_table
    assert table is not None
    pages = table.clamp(0, key.shape[0] - 1)  # behind the pages that a sequence uses anything may stand
    capacity = table.shape[1] * key.shape[1]
    ends = torch.arange(table.shape[0] + 1, dtype=torch.int32, device=table.device) * capacity
    return key[pages].flatten(0, 2), value[pages].flatten(0, 2), layout._replace(cu_seq_k=ends, block_table=None)
