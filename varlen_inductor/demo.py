"""``python -m varlen_inductor demo``: BERT on real text, plain ``torch.compile`` beside ``backend="varlen_inductor"``.

The text is the documentation that comes with Python: its paragraphs have the lengths that paragraphs have. It is cut into word
pieces, padded into batches in the order in which it stands, and a BERT with random weights learns to fill in masked words for
a few steps; then it fills in words without learning. Both compilers get the same batches, the same weights and no dropout, so
that their results can be compared, and take turns, so that a busy machine disturbs both.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

PAD, UNKNOWN, START, END, MASK = range(5)
IGNORED = -100
Batch = dict[str, torch.Tensor]


def paragraphs() -> list[str]:
    """The paragraphs of Python's own documentation topics, in their order, shorter ones than a line left out."""
    from pydoc_data.topics import topics

    texts = (" ".join(part.split()) for topic in topics.values() for part in re.split(r"\n\s*\n", topic))
    return [text for text in texts if len(text.split()) >= 4]


def tokenise(texts: list[str], vocabulary: int, length: int) -> list[list[int]]:
    """Word pieces learnt from the text itself, between a start and an end mark, cut to ``length``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=marks, show_progress=False)
    )
    return [[START, *encoding.ids[: length - 2], END] for encoding in tokenizer.encode_batch(texts)]


def batches(rows: list[list[int]], size: int, length: int, vocabulary: int, device: str) -> Iterator[Batch]:
    """Padded batches for masked language modelling, (B, S) each: 15% of the pieces are to be found again."""
    generator = torch.Generator().manual_seed(0)
    # A stride through the text mixes topics without sorting by length.
    order = torch.randperm(len(rows), generator=generator).tolist()
    for start in range(0, len(order) - size + 1, size):
        ids = torch.full((size, length), PAD)
        for i, row in enumerate(order[start : start + size]):
            ids[i, : len(rows[row])] = torch.tensor(rows[row])
        valid = ids != PAD
        hidden = (torch.rand(ids.shape, generator=generator) < 0.15) & valid & (ids != START) & (ids != END)
        labels = torch.where(hidden, ids, IGNORED)
        ids = torch.where(hidden, MASK, ids)
        batch = {"input_ids": ids, "attention_mask": valid.long(), "labels": labels}
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def bert(args: argparse.Namespace) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        intermediate_size=4 * args.width,
        max_position_embeddings=args.length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)  # type: ignore[no-any-return]


@dataclass
class Contender:
    """One way to compile the model, and what it was measured to do."""

    name: str
    model: nn.Module
    compiled: Callable[..., Any]
    autocast: Callable[[], Any]
    optimizer: torch.optim.Optimizer = field(init=False)
    compile_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    milliseconds: dict[str, list[float]] = field(default_factory=lambda: {"training": [], "inference": []})

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def loss(self, batch: Batch) -> torch.Tensor:
        with self.autocast():
            return self.compiled(**batch).loss  # type: ignore[no-any-return]

    def gradients(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The gradients of one batch; the weights stay as they are."""
        self.model.train()
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        named = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        found = {name: gradient.float().clone() for name, gradient in named.items() if gradient is not None}
        self.optimizer.zero_grad()
        return found

    def train(self, batch: Batch) -> None:
        self.model.train()
        start = clock()
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.milliseconds["training"].append(1e3 * (clock() - start))
        self.losses.append(loss.item())

    def infer(self, batch: Batch) -> torch.Tensor:
        """Scores (B, S, V) for each position."""
        self.model.eval()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        start = clock()
        with torch.no_grad(), self.autocast():
            logits = self.compiled(**inputs).logits
        self.milliseconds["inference"].append(1e3 * (clock() - start))
        return logits.float()  # type: ignore[no-any-return]

    def median(self, what: str) -> float:
        return statistics.median(self.milliseconds[what])


def clock() -> float:
    """Seconds, when all that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Differences:
    """The largest differences between the two, relative to the largest value; padded rows are not part of the contract."""

    logits: float
    gradients: float
    worst: str
    losses: float


def compare(plain: Contender, ours: Contender, batch: Batch) -> Differences:
    """Both contenders have the same weights here. Also compiles everything that is measured afterwards."""
    gradients = []
    logits = []
    # What the first compile of a process pays for (a pool of compiler processes, headers) is nobody's in particular.
    torch.compile(torch.nn.ReLU())(torch.ones(8, device=batch["input_ids"].device))
    for contender in progress((plain, ours), "compiling"):
        start = clock()
        gradients.append(contender.gradients(batch))
        logits.append(contender.infer(batch))
        contender.compile_seconds = clock() - start
        contender.milliseconds["inference"].clear()
    valid = batch["attention_mask"].bool()
    theirs, mine = (each[valid] for each in logits)
    largest = max(gradient.abs().max().item() for gradient in gradients[0].values())
    errors = {name: (gradients[1][name] - gradient).abs().max().item() / largest for name, gradient in gradients[0].items()}
    worst = max(errors, key=errors.__getitem__)
    return Differences(((mine - theirs).abs().max() / theirs.abs().max()).item(), errors[worst], worst, 0.0)


def progress(steps: Any, text: str) -> Any:
    """A progress bar on the terminal."""
    from tqdm import tqdm

    return tqdm(steps, desc=f"{text:<12}", ncols=100, file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """The whole demonstration; returns the exit status: 1 if the two disagree."""
    import varlen_inductor
    from varlen_inductor.backend import register_by_name

    register_by_name()
    torch.manual_seed(0)
    rows = tokenise(paragraphs(), args.vocabulary, args.length)
    data = list(batches(rows, args.batch, args.length, args.vocabulary, args.device))
    model = bert(args).to(args.device)
    on_cuda = args.device.startswith("cuda")
    tokens = sum(int(batch["attention_mask"].sum()) for batch in data)
    density = tokens / (len(data) * args.batch * args.length)
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name() if on_cuda else 'the CPU'}")
    print(f"BERT: {args.layers} layers, width {args.width}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    print(f"text: {len(rows)} paragraphs in batches of {args.batch} x {args.length}; {density:.0%} of the positions are text\n")

    twin = copy.deepcopy(model)
    example = {name: data[0][name] for name in ("input_ids", "attention_mask")}
    print("varlen_inductor.explain(model, **batch):\n")
    print(varlen_inductor.explain(copy.deepcopy(model).eval(), **example), "\n")

    def autocast() -> Any:
        return torch.autocast("cuda", torch.bfloat16) if on_cuda else nullcontext()

    plain = Contender("torch.compile(model)", model, torch.compile(model), autocast)
    flag = 'torch.compile(model, backend="varlen_inductor")'
    ours = Contender(flag, twin, torch.compile(twin, backend="varlen_inductor"), autocast)
    differences = compare(plain, ours, data[0])
    for step in progress(range(args.steps), "training"):
        for contender in (plain, ours) if step % 2 else (ours, plain):
            contender.train(data[(step + 1) % len(data)])
    for step in progress(range(args.steps), "inference"):
        for contender in (plain, ours) if step % 2 else (ours, plain):
            contender.infer(data[(step + 2) % len(data)])
    differences.losses = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, plain.losses, strict=True))
    return tell(plain, ours, differences, 3e-2 if on_cuda else 1e-3)


def tell(plain: Contender, ours: Contender, differences: Differences, tolerance: float) -> int:
    """Print what was measured; 1 if a difference is larger than rounding explains."""
    from varlen_inductor.report import table

    kinds = ("training", "inference")
    rows = [(one.name, f"{one.compile_seconds:.1f} s", *(f"{one.median(kind):.1f} ms" for kind in kinds)) for one in (plain, ours)]
    ratios = [f"{plain.median(what) / ours.median(what):.2f}x" for what in kinds]
    rows.append(("ratio of medians", f"{plain.compile_seconds / ours.compile_seconds:.2f}x", *ratios))
    print("\n" + table(("", "first run", "training step", "inference"), rows))
    print(f"\nloss: {plain.losses[0]:.4f} -> {plain.losses[-1]:.4f} plain, {ours.losses[0]:.4f} -> {ours.losses[-1]:.4f} ours")
    print("largest difference, relative to the largest value:")
    print(f"  logits at valid positions  {differences.logits:.1e}")
    print(f"  gradients                  {differences.gradients:.1e}  ({differences.worst})")
    print(f"  losses while training      {differences.losses:.1e}")
    wrong = not max(differences.logits, differences.gradients, differences.losses) < tolerance
    if wrong:
        print(f"\nThis is more than rounding explains (tolerance {tolerance:.0e}): please report it.")
    return int(wrong)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the demonstration; the defaults are larger where there is a GPU."""
    on_cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--steps", type=int, default=20 if on_cuda else 10, help="training steps, then inference batches")
    parser.add_argument("--layers", type=int, default=12 if on_cuda else 4)
    parser.add_argument("--width", type=int, default=768 if on_cuda else 256)
    parser.add_argument("--batch", type=int, default=64 if on_cuda else 32)
    parser.add_argument("--length", type=int, default=256 if on_cuda else 128)
    parser.add_argument("--vocabulary", type=int, default=2048)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="varlen_inductor demo", description=__doc__)
    arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
