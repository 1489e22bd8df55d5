"""RigL in the Hugging Face Trainer: a tiny BERT, a quarter of its weights from the first step on.

Killed at any moment, the same command goes on, to the same bits::

    python examples/hf_trainer.py runs/hf --stop-after-step 40    # as a power cut would
    python examples/hf_trainer.py runs/hf
"""

import argparse
import os
import signal
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from gossamer import DynamicSparse
from gossamer.integrations.transformers import (
    MethodCallback,
    from_pretrained,
    last_checkpoint,
    save_pretrained,
)
from gossamer.prune.dynamic import FAMILY

STEPS = 60


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def sentences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Eight tokens of 32 kinds; the label says of which half the first one is."""
    tokens = torch.randint(0, 32, (count, 8), generator=torch.Generator().manual_seed(seed))
    labels = (tokens[:, 0] < 16).long()
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


parser = argparse.ArgumentParser()
parser.add_argument("out", nargs="?", default="runs/hf-trainer", type=Path)
parser.add_argument("--stop-after-step", type=int)
options = parser.parse_args()

set_seed(0)
config = BertConfig(
    vocab_size=32,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=8,
)
model = BertForSequenceClassification(config)
trainer = Trainer(
    model,
    TrainingArguments(
        str(options.out),
        max_steps=STEPS,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        save_steps=16,
        save_total_limit=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    ),
    train_dataset=sentences(960, seed=1),
)
generator = torch.Generator().manual_seed(0)
sparse = DynamicSparse(FAMILY["rigl"], 0.25, steps=STEPS, every=10, generator=generator)
MethodCallback(trainer, [sparse])
if options.stop_after_step:
    trainer.add_callback(Kill(options.stop_after_step))
trainer.train(resume_from_checkpoint=last_checkpoint(options.out))

folder = save_pretrained(model, options.out / "packed")
network = from_pretrained(folder)
test = sentences(500, seed=2)
with torch.no_grad():
    found = network(torch.stack([row["input_ids"] for row in test])).logits.argmax(1)
accuracy = (found == torch.stack([row["labels"] for row in test])).float().mean()
size = (folder / "model.gsm").stat().st_size
print(f"accuracy {accuracy:.4f} at density {sparse.masks.density:.2f}, {size:,} bytes")
