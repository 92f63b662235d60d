"""Keys and values in pages, for tests of what reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_cases import Case


def in_pages(case: Case, page_size: int, spare: int = 2) -> Case:
    """The case with its keys in pages in any order, the rest of the last page of a sequence and ``spare`` pages holding NaN.

    Its table also names pages that there are not, behind those that a sequence uses.
    """
    lengths = case.cu_seq_k.diff().tolist()
    counts = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(counts) + spare).tolist()
    table = torch.full((len(lengths), max(counts, default=0) + 1), 1 << 30, dtype=torch.int32)
    pools = [x.new_full((len(order), page_size, *x.shape[1:]), float("nan")) for x in (case.key, case.value)]
    for i, (length, count) in enumerate(zip(lengths, counts)):
        start = int(case.cu_seq_k[i])
        for j in range(count):
            page, rows = order.pop(), slice(start + j * page_size, start + min((j + 1) * page_size, length))
            table[i, j] = page
            for pool, x in zip(pools, (case.key, case.value)):
                pool[page, : rows.stop - rows.start] = x[rows].detach()
    device = case.query.device
    used = torch.tensor(lengths, dtype=torch.int32, device=device)
    options = {**case.options, "seqused_k": used, "block_table": table.to(device)}
    return case._replace(query=case.query.detach(), key=pools[0], value=pools[1], cu_seq_k=case.cu_seq_q, options=options)


def strided_table(table: Tensor) -> Tensor:
    """The same table with neighbours of a row apart in memory."""
    return torch.stack((table, table + 1), 2)[..., 0]
