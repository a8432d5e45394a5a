"""Fine-tune an exported model with plain transformers; ssm_lm need not be installed.

    python examples/finetune.py exports/quickstart --text README.md --output exports/tuned

A minute on two cores, for the model of `make quickstart`.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments


class StateSpaceTrainer(Trainer):
    """Weight decay pulls the state spaces' step sizes and eigenvalues away from their start, so they are left out."""

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if name not in model.no_weight_decay()]


def windows(ids: list[int], length: int) -> list[dict]:
    """The text cut into windows of `length` tokens; the model shifts the labels itself."""
    starts = range(0, len(ids) - length + 1, length)
    return [{"input_ids": ids[i : i + length], "labels": ids[i : i + length]} for i in starts]


def main(argv: list[str] | None = None) -> list[float]:
    """Train as the arguments say and return the losses, one a step."""
    parser = argparse.ArgumentParser(description="Fine-tune an exported model on a text.")
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    args = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    training = TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=args.learning_rate,
        weight_decay=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
    )
    data = windows(tokenizer(args.text.read_text())["input_ids"], args.length)
    trainer = StateSpaceTrainer(model=model, args=training, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    return losses


if __name__ == "__main__":
    main()
