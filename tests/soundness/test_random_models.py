"""Random models over random padding against eager: outputs, gradients, and padding that is not a number.

More seeds: VARLEN_TEST_SEEDS=5000 (`make test` takes 120). One seed: VARLEN_TEST_SEEDS=1234:1235.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from soundness.harness import Outcome, compare, cotangents_for, direct_backend, poisoned, quick, tensors, watched_runs
from soundness.random_models import LEAKY, Batch, Hierarchy, RandomModel, random_batch, random_documents
from varlen_inductor import report

CHUNK = 20


def _seeds() -> range:
    first, _, last = os.environ.get("VARLEN_TEST_SEEDS", "120").rpartition(":")
    return range(int(first or 0), int(last))


SEEDS = _seeds()


@dataclass
class Case:
    """One seed: a model, batches of one shape, and how it is compiled."""

    seed: int
    model: RandomModel | Hierarchy
    batches: list[Batch]
    form: str
    dynamic: bool
    train: bool
    keep: bool
    tolerance: float
    forms: list[str] = field(default_factory=list)
    packed: int = 0
    poisoned: int = 0

    @staticmethod
    def of(seed: int) -> Case:
        rng = random.Random(f"case {seed}")
        dtype = torch.float32 if rng.random() < 0.2 else torch.float64
        batch, length = rng.choice([1, 2, 2, 3, 3, 4, 5]), rng.choice([2, 3, 4, 5, 6, 8, 9])
        memory_length = length if rng.random() < 0.5 else rng.choice([2, 3, 7])
        torch.manual_seed(seed)
        model: RandomModel | Hierarchy
        if rng.random() < 0.1:
            model = Hierarchy(seed, max(length, 3)).to(dtype)
            batches = [random_documents(seed * 7 + i, batch, 3, length, dtype) for i in range(2)]
        else:
            model = RandomModel(seed, max(length, memory_length)).to(dtype)
            batches = [random_batch(seed * 7 + i, batch, length, memory_length, dtype) for i in range(2)]
        form = "attention" if rng.random() < 0.25 else "model"
        tolerance = 1e-8 if dtype is torch.float64 else 2e-4
        return Case(seed, model, batches, form, rng.random() < 0.1, rng.random() < 0.85, rng.random() < 0.07, tolerance)

    def __str__(self) -> str:
        batch = self.batches[0]
        shape = f"{tuple(batch.x.shape)} memory {batch.memory.shape[1]} {batch.x.dtype}"
        flags = " ".join(flag for flag in ("dynamic", "train", "keep") if getattr(self, flag))
        return "\n  ".join([f"seed {self.seed} {self.form} {flags} {shape}", *self.model.recipe])

    def errors(self) -> list[str]:
        """Compile, run all batches, and compare."""
        torch._dynamo.reset()
        found: list[str] = []
        knobs = {"packing": self.form, "padded_rows": "keep" if self.keep else "zero"}
        with quick(**knobs), report.collect() as reports, watched_runs() as runs:
            compiled = torch.compile(self.model, backend=direct_backend, dynamic=self.dynamic or None, fullgraph=True)
            for batch in self.batches:
                before = runs["packed"]
                ours, eager = self._forward(compiled, batch), self._forward(self.model, batch)
                self.forms = [site.form or "kept" for one in reports for site in one.sites]
                rows = self.model.rows(batch, all(form != "kept" for form in self.forms))
                rows = [None] * len(rows) if self.keep else rows
                found += self._compare(ours, batch, eager, batch, rows)
                if found or runs["packed"] == before or set(self.forms) != {"packed"}:
                    continue
                if self._padding_is_irrelevant(batch, rows):
                    self.poisoned += 1
                    bad = batch._replace(x=poisoned(batch.x, batch.valid))
                    ours, eager = self._forward(compiled, bad), self._forward(self.model, batch)
                    found += [f"poisoned: {e}" for e in self._compare(ours, bad, eager, batch, rows)]
            self.packed = runs["packed"]
        return found

    def _forward(self, call: Callable[..., Any], batch: Batch) -> list[Any]:
        with torch.set_grad_enabled(self.train):
            return tensors(call(*batch))

    def _outcome(self, outputs: list[Any], batch: Batch, cotangents: list[Tensor | None]) -> Outcome:
        gradients: dict[str, Tensor | None] = {}
        pairs = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if y.requires_grad and c is not None]
        if self.train and pairs:
            wanted = {**dict(self.model.named_parameters()), "x": batch.x, "memory": batch.memory}
            found = torch.autograd.grad([y for y, _ in pairs], list(wanted.values()), [c for _, c in pairs], allow_unused=True)
            gradients = dict(zip(wanted, found, strict=True))
        return Outcome([y.detach() for y in outputs], gradients, {})

    def _compare(self, ours: list[Any], own_batch: Batch, eager: list[Any], batch: Batch, rows: list[Tensor | None]) -> list[str]:
        cotangents = cotangents_for(eager, rows)
        return compare(self._outcome(ours, own_batch, cotangents), self._outcome(eager, batch, cotangents), rows, self.tolerance)

    def _padding_is_irrelevant(self, batch: Batch, rows: list[Tensor | None]) -> bool:
        """Whether eager gives the same with other numbers in the padding."""
        if self.model.masks != {("valid", False)} or not LEAKY.keys().isdisjoint(self.model.recipe):
            return False
        other = batch._replace(x=torch.where(batch.valid[..., None], batch.x.detach(), 0.3).requires_grad_())
        eager = self._forward(self.model, batch)
        cotangents = cotangents_for(eager, rows)
        one, two = self._outcome(eager, batch, cotangents), self._outcome(self._forward(self.model, other), other, cotangents)
        for y, valid in zip([*one.outputs, *two.outputs], [*rows, *rows], strict=True):
            if valid is not None and y.shape[:2] == valid.shape:
                y[~valid] = 0
            elif valid is not None:
                y[~valid.reshape(-1)] = 0
        return not compare(two, one, [None] * len(rows), self.tolerance)


_coverage: Counter[str] = Counter()


@pytest.mark.parametrize("first", range(SEEDS.start, SEEDS.stop, CHUNK))
def test_random_models(first: int) -> None:
    for seed in range(first, min(first + CHUNK, SEEDS.stop)):
        case = Case.of(seed)
        errors = case.errors()
        assert not errors, f"{case}\n  forms: {case.forms}\n" + "\n".join(errors)
        _coverage.update(dict.fromkeys(set(case.forms), 1))
        _coverage.update({"packed runs": case.packed, "poisoned runs": case.poisoned, "models": 1})


def test_coverage() -> None:
    """The generator must keep making models that take each of the roads."""
    if _coverage["models"] < 100:
        pytest.skip("most models ran in other processes")
    share = {name: count / _coverage["models"] for name, count in _coverage.items()}
    assert share.get("packed", 0) > 0.25, share
    assert share.get("exact", 0) > 0.15, share
    assert share.get("zero rows", 0) > 0.02, share
    assert share.get("packed runs", 0) > 0.3, share
    assert share.get("poisoned runs", 0) > 0.1, share


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
