"""A short fine-tuning by the Trainer of transformers on real text: the program that test_trainer.py runs in fresh processes.

Prints a JSON object: the loss of each step, that of an evaluation afterwards, and what was compiled and ran.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pydoc_data import topics
from typing import Any

import torch
import transformers
from torch import Tensor

from varlen_inductor._autoload import autoload

LENGTH, BATCH, STEPS = 64, 8, 10


class Paragraphs(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The paragraphs of Python's documentation, a word a token, padded; every seventh word is to be guessed."""

    def __init__(self) -> None:
        texts = [" ".join(topics.topics[name].split(" ")) for name in sorted(topics.topics)]
        paragraphs = [re.findall(r"\w+", part.lower()) for text in texts for part in text.split("\n\n")]
        kept = [words for words in paragraphs if len(words) >= 3][: BATCH * STEPS * 2]
        words = sorted({word for paragraph in kept for word in paragraph})
        self.number = {word: i + 5 for i, word in enumerate(words)}
        self.rows = [self._row([1, *(self.number[word] for word in paragraph)][:LENGTH]) for paragraph in kept]

    def _row(self, ids: list[int]) -> dict[str, Tensor]:
        tokens = torch.tensor(ids + [0] * (LENGTH - len(ids)))
        valid = torch.arange(LENGTH) < len(ids)
        guessed = valid & (torch.arange(LENGTH) % 7 == 2)
        return {
            "input_ids": torch.where(guessed, 4, tokens),
            "attention_mask": valid.long(),
            "labels": torch.where(guessed, tokens, -100),
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


def model_for(kind: str, vocabulary: int) -> Any:
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": LENGTH,
    }
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, use_cache=False))
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **dropout))


class Watched(transformers.Trainer):
    """Keeps each loss unrounded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def main(kind: str) -> None:
    autoload()  # a checkout that is not installed has no entry points
    torch.manual_seed(0)
    data = Paragraphs()
    model = model_for(kind, len(data.number) + 5)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        arguments = transformers.TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, learning_rate=5e-3,
            torch_compile=True, logging_strategy="no", **options,
        )  # fmt: skip
        held_out = torch.utils.data.Subset(data, range(BATCH * 3))
        trainer = Watched(model=model, args=arguments, train_dataset=data, eval_dataset=held_out)
        trainer.train()
        evaluation = trainer.evaluate()["eval_loss"]
    counters = torch._dynamo.utils.counters
    print(
        json.dumps(
            {
                "losses": trainer.losses,
                "evaluation": evaluation,
                "ours": dict(counters["varlen_inductor"]),
                "compiled": counters["aot_autograd"]["total"],
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
