"""What became of a graph, as data, as a table, and in PyTorch's own channels.

A pass fills a :class:`Report` while it works and hands it to :func:`publish` when it is done. From there it reaches

* ``TORCH_LOGS="varlen_inductor"``: one summary line per graph; ``"+varlen_inductor"``: each decision and both graphs;
* ``torch._dynamo.utils.counters["varlen_inductor"]``;
* the structured trace that tlparse reads;
* whoever is inside :func:`collect`, which is how ``varlen_inductor.explain`` gets its answer.

The text of a decision is written once, where the decision is made, and shown unchanged in all of them.
"""

from __future__ import annotations

import json
import logging
import re
import textwrap
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Literal

from torch import fx

from varlen_inductor import _compat

log = logging.getLogger(__name__)


@dataclass
class Site:
    """One attention of the graph and what became of it."""

    source: str
    """Where it stands in the user's model; see :func:`source_of`."""
    kind: str
    """How it was written, e.g. ``"scaled_dot_product_attention"`` or ``"matmul, softmax, matmul"``."""
    mask: str = "none"
    """What its mask was proven to be, in words; ``"not proven"`` if it was not."""
    decision: Literal["rewritten", "kept"] = "kept"
    form: str = ""
    """Which form a rewritten one was given: ``"packed"``, ``"zero rows"``, ``"exact"``."""
    reason: str = ""
    """Why it was kept, or why it was not given a faster form."""
    kernel: str = ""
    """The kernel that computes it, and that of its backward if it is another, as far as is known when the graph is compiled."""
    other_kernels: dict[str, str] = field(default_factory=dict)
    """Why each of the other kernels does not."""


@dataclass
class Edge:
    """A pack or an unpack at the border of a packed region."""

    kind: Literal["pack", "unpack"]
    node: str
    """The node whose value crosses the border."""
    why: str
    """For an unpack, the operation that ended the region and what it needs; for a pack, what entered."""
    source: str = ""


@dataclass
class Region:
    """A part of the graph that runs on valid tokens only. There is one for each padding mask."""

    mask: str
    """Which positions are valid, in words."""
    nodes_packed: int = 0
    edges: list[Edge] = field(default_factory=list)

    @property
    def packs(self) -> int:
        return sum(edge.kind == "pack" for edge in self.edges)

    @property
    def unpacks(self) -> int:
        return sum(edge.kind == "unpack" for edge in self.edges)


@dataclass
class Report:
    """What became of one graph."""

    graph_id: str = field(default_factory=_compat.compile_id)
    """Dynamo's name for the graph, like ``"0/0"``."""
    sites: list[Site] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Anything else a user should know: assumptions, obligations, warnings."""
    graph_before: str = ""
    """The graph as it came, as readable FX text. Empty unless somebody wants it; see :func:`wants_graphs`."""
    graph_after: str = ""
    error: str = ""
    """The traceback of the failure that made us compile the original graph."""

    @property
    def rewritten(self) -> list[Site]:
        return [site for site in self.sites if site.decision == "rewritten"]

    @property
    def kept(self) -> list[Site]:
        return [site for site in self.sites if site.decision == "kept"]

    def keep_all(self, reason: str) -> None:
        """Turn every decision into "kept": what happens when a later step fails or finds that it would not pay."""
        for site in self.sites:
            site.decision, site.form, site.kernel, site.other_kernels, site.reason = "kept", "", "", {}, reason
        self.regions.clear()

    def see_before(self, gm: fx.GraphModule) -> None:
        """Record the graph as it came, if anybody will look at it."""
        if wants_graphs():
            self.graph_before = readable(gm)

    def see_after(self, gm: fx.GraphModule) -> None:
        """Record the rewritten graph, if anybody will look at it."""
        if wants_graphs():
            self.graph_after = readable(gm)

    def summary(self) -> str:
        """One line."""
        if self.error:
            last = self.error.strip().splitlines()[-1]
            return f"graph {self.graph_id}: left as it is, because a pass failed: {last}"
        if not self.sites:
            return f"graph {self.graph_id}: no attention found"
        parts = [f"{len(self.rewritten)} of {_count(len(self.sites), 'attention')} rewritten"]
        if self.regions:
            nodes = sum(region.nodes_packed for region in self.regions)
            packs = sum(region.packs for region in self.regions)
            unpacks = sum(region.unpacks for region in self.regions)
            parts.append(
                f"{_count(nodes, 'operation')} on valid tokens only, in {_count(len(self.regions), 'region')}"
                f" ({_count(packs, 'pack')}, {_count(unpacks, 'unpack')})"
            )
        reasons = sorted({site.reason for site in self.kept if site.reason})
        if reasons:
            parts.append("kept: " + "; ".join(reasons))
        return f"graph {self.graph_id}: " + ", ".join(parts)

    def table(self, width: int = 120) -> str:
        """All of it, for a terminal ``width`` columns wide."""
        return render(self, width)

    def as_dict(self) -> dict[str, object]:
        """The report without its graphs, ready for JSON."""
        fields = asdict(self)
        del fields["graph_before"], fields["graph_after"]
        return fields


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# --- making reports --------------------------------------------------------------------------------------------------

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \S+')


def source_of(node: fx.Node) -> str:
    """Where a node stands in the user's model: ``"encoder.layer.0.attention.self (modeling_bert.py:192)"``.

    The path is that of the innermost ``nn.Module``. The line is the innermost one in the file that defines this module, so
    that it tells models apart that share a helper; failing that, the innermost one outside PyTorch itself.
    """
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    path, home = (_plain_path(modules[-1][0]), _file_of(modules[-1][1])) if modules else ("", "")
    frames = [(match["file"].replace("\\", "/"), match["line"]) for match in _FRAME.finditer(node.meta.get("stack_trace") or "")]
    outside = [frame for frame in frames if "/torch/" not in frame[0]]
    at_home = [frame for frame in outside if frame[0].endswith(f"/{home}.py")] if home else []
    file, number = (at_home or outside or frames or [("", "")])[-1]
    line = f"{file.rsplit('/', 1)[-1]}:{number}" if file else ""
    if path and line:
        return f"{path} ({line})"
    return path or line or node.name


def _file_of(module_class: type | str) -> str:
    """The last part of the Python module in which a class (or its qualified name, as some versions keep it) is defined."""
    qualified = module_class.rpartition(".")[0] if isinstance(module_class, str) else module_class.__module__
    return qualified.rpartition(".")[2]


def _plain_path(qualified: str) -> str:
    """``"L['self']._modules['encoder']._modules['layer'][0]"`` → ``"encoder.layer.0"``; the root itself is ``""``."""
    path = re.sub(r"^[LG]\['[^']*'\]", "", qualified)
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", path)
    path = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path)
    return path.strip(".")


def readable(gm: fx.GraphModule) -> str:
    """The graph as FX text with shapes, dtypes and devices."""
    return gm.print_readable(print_output=False, include_stride=True, include_device=True)


def wants_graphs() -> bool:
    """Whether the text of graphs would be seen by anyone. Printing a large graph takes a noticeable part of a second."""
    return bool(_collectors) or log.isEnabledFor(logging.DEBUG) or _compat.structured_trace_wanted()


# --- handing them out ------------------------------------------------------------------------------------------------

_recent: deque[Report] = deque(maxlen=64)
_collectors: list[list[Report]] = []


def recent() -> Sequence[Report]:
    """The last reports made in this process, oldest first."""
    return tuple(_recent)


def forget() -> None:
    """Drop the reports made so far (``torch._dynamo.reset()`` does this through the backend)."""
    _recent.clear()


@contextmanager
def collect() -> Iterator[list[Report]]:
    """All reports that are published inside the block, with the text of their graphs."""
    reports: list[Report] = []
    _collectors.append(reports)
    try:
        yield reports
    finally:
        _collectors.remove(reports)


def publish(report: Report) -> None:
    """Hand a finished report to the logs, the counters, the structured trace and the collectors."""
    _recent.append(report)
    for reports in _collectors:
        reports.append(report)
    _bump_counters(report)
    _write_logs(report)
    _compat.trace_artifact("varlen_inductor_report", "json", lambda: json.dumps({"summary": report.summary(), **report.as_dict()}))
    for name in ("graph_before", "graph_after"):
        text = getattr(report, name)
        if text:
            _compat.trace_artifact(f"varlen_inductor_{name}", "string", partial(str, text))


def _bump_counters(report: Report) -> None:
    counters = _compat.counters()
    counters["graphs"] += 1
    counters["failures"] += bool(report.error)
    counters["attention_seen"] += len(report.sites)
    counters["attention_rewritten"] += len(report.rewritten)
    counters["attention_kept"] += len(report.kept)
    counters["regions"] += len(report.regions)
    for region in report.regions:
        counters["nodes_packed"] += region.nodes_packed
        counters["packs"] += region.packs
        counters["unpacks"] += region.unpacks


def _write_logs(report: Report) -> None:
    if report.error:
        log.error("%s\n%s", report.summary(), report.error)
    else:
        log.info("%s", report.summary())
    if not log.isEnabledFor(logging.DEBUG):
        return
    if report.sites or report.notes:
        log.debug("%s", report.table())
    for title, text in (("before", report.graph_before), ("after", report.graph_after)):
        if text:
            log.debug("graph %s %s\n%s", report.graph_id, title, text)


# --- rendering -------------------------------------------------------------------------------------------------------


def render(report: Report, width: int = 120) -> str:
    """A report as text: the table of attentions, the packed regions with their borders, the notes."""
    blocks = [report.summary()]
    if report.sites:
        header = ("#", "attention", "mask", "decision", "kernel")
        rows = [
            (str(number), f"{site.kind}\n{site.source}", site.mask, _decision(site), site.kernel or "-")
            for number, site in enumerate(report.sites)
        ]
        blocks.append(table(header, rows, width))
        blocks.extend(_kernels(report.sites))
    for number, region in enumerate(report.regions):
        head = (
            f"region {number}: {_count(region.nodes_packed, 'operation')} on the tokens where {region.mask};"
            f" {_count(region.packs, 'pack')}, {_count(region.unpacks, 'unpack')}"
        )
        edges = [(edge.kind, edge.node, edge.why, edge.source or "-") for edge in region.edges]
        blocks.append(head + ("\n" + table(("edge", "value", "why", "source"), edges, width) if edges else ""))
    blocks.extend(f"note: {note}" for note in report.notes)
    if report.error:
        blocks.append(report.error.rstrip())
    return "\n\n".join(blocks)


def _kernels(sites: Sequence[Site]) -> Iterator[str]:
    """For each kernel that is used, why the others are not: once for all attentions that it is the same for."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], list[int]] = {}
    for number, site in enumerate(sites):
        if site.kernel:
            found.setdefault((site.kernel, tuple(site.other_kernels.items())), []).append(number)
    for (kernel, others), numbers in found.items():
        of = "all" if len(numbers) == len(sites) else ", ".join(map(str, numbers))
        alike: dict[str, list[str]] = {}
        for name, reason in others:
            alike.setdefault(reason, []).append(name)
        reasons = "; ".join(f"not {', '.join(names)}: {reason}" for reason, names in alike.items())
        yield f"kernel of {of}: {kernel}" + (f" ({reasons})" if reasons else "")


def _decision(site: Site) -> str:
    head = f"{site.decision} ({site.form})" if site.form else site.decision
    return f"{head}: {site.reason}" if site.reason else head


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int = 120) -> str:
    """Rows of text in columns; the widest columns are wrapped until the table fits ``width``."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    natural = [max(len(line) for row in cells for line in (row[i].splitlines() or [""])) for i in range(len(header))]
    widths = _fit(natural, width - 2 * (len(header) - 1))
    lines: list[str] = []
    for index, row in enumerate(cells):
        wrapped = [_wrap(cell, columns) for cell, columns in zip(row, widths, strict=True)]
        for i in range(max(len(cell) for cell in wrapped)):
            parts = [(cell[i] if i < len(cell) else "").ljust(columns) for cell, columns in zip(wrapped, widths, strict=True)]
            lines.append("  ".join(parts).rstrip())
        if index == 0:
            lines.append("  ".join("-" * columns for columns in widths))
    return "\n".join(lines)


def _fit(natural: list[int], room: int, least: int = 12) -> list[int]:
    """Column widths that together take no more than ``room`` if they can: the widest gives way first."""
    widths = list(natural)
    while sum(widths) > room:
        widest = max(range(len(widths)), key=widths.__getitem__)
        if widths[widest] <= least:
            break
        widths[widest] -= 1
    return widths


def _wrap(cell: str, columns: int) -> list[str]:
    return [piece for line in cell.splitlines() for piece in (textwrap.wrap(line, columns) or [""])] or [""]
