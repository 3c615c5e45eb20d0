"""Trains MemoryLLM models with the Trainer of transformers, on any number of processes.

    accelerate launch --num_processes 8 -m tolhouse.integrations.train \\
        --preset 250m --kind flex --beta 2 --tokenizer TOKENIZER_FOLDER --text TEXTS \\
        --output_dir runs/250m --max_steps 95000 --bf16

Text is read and tokenised while the model trains. All options of `TrainingArguments` apply. The
result and every saved step are checkpoints that `tolhouse build` takes.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, tensor
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from tolhouse.errors import InvalidArgumentError, TolhouseError
from tolhouse.integrations.transformers import MemoryLLMConfig
from tolhouse.model.config import ModelConfig, preset
from tolhouse.train.corpus import documents

_SHUFFLED = 1000  # windows in the buffer from which the next one is drawn


@dataclass
class ModelOptions:
    """What to train: a checkpoint, or a new model of a preset and a tokenizer."""

    text: str = field(metadata={"help": "Text file, or folder of text files, to train on."})
    checkpoint: str = field(default="", metadata={"help": "Checkpoint to continue from."})
    preset: str = field(default="", metadata={"help": "Size of a new model: tiny, 250m, ..."})
    kind: str = field(default="memory", metadata={"help": "base, memory, flex or wide."})
    beta: int = field(default=0, metadata={"help": "flex: 1, 2 or 3."})
    ffn_c: str = field(default=ModelConfig.ffn_c, metadata={"help": "flex: form of FFN-C."})
    ffn_m: str = field(default=ModelConfig.ffn_m, metadata={"help": "Form of FFN-M."})
    ffn_share: float = field(
        default=ModelConfig.ffn_share, metadata={"help": "moc, avgk: share of channels."}
    )
    ffn_by: str = field(default=ModelConfig.ffn_by, metadata={"help": "moc: gate or activation."})
    ffn_blocks: int = field(
        default=ModelConfig.ffn_blocks, metadata={"help": "avgk: blocks of channels."}
    )
    ffn_heads: int = field(default=ModelConfig.ffn_heads, metadata={"help": "flashmhf: heads."})
    ffn_experts: int = field(
        default=ModelConfig.ffn_experts, metadata={"help": "flashmhf: networks of a head."}
    )
    ffn_bits: int = field(
        default=ModelConfig.ffn_bits, metadata={"help": "lookup: bits of a code."}
    )
    tokenizer: str = field(default="", metadata={"help": "Folder of a tokenizer."})
    sequence_tokens: int = field(default=0, metadata={"help": "Default: the model's context."})


@dataclass
class Options(TrainingArguments):
    """TrainingArguments with the optimiser and the schedule of the paper (section 3)."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict | str | None = '{"min_lr": 1e-5}'
    report_to: None | str | list[str] = "tensorboard"  # noqa: RUF036 - the parser needs the order


class Windows(IterableDataset):
    """Windows of `size` tokens of the documents at `path`, in an order that depends on `seed`."""

    def __init__(self, path: Path, tokenizer: Any, size: int, seed: int) -> None:
        self._path, self._tokenizer, self._size, self._seed = path, tokenizer, size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        random_, buffer = random.Random(self._seed + self._epoch), list[list[int]]()
        for window in self._windows():
            buffer.append(window)
            if len(buffer) >= _SHUFFLED:
                yield self._item(buffer, random_.randrange(len(buffer)))
        while buffer:
            yield self._item(buffer, random_.randrange(len(buffer)))

    def _item(self, buffer: list[list[int]], index: int) -> dict[str, Tensor]:
        buffer[index], buffer[-1] = buffer[-1], buffer[index]
        ids = tensor(buffer.pop())
        return {"input_ids": ids, "labels": ids}

    def _windows(self) -> Iterator[list[int]]:
        ids = list[int]()
        for _, text in documents(self._path):
            ids += [*self._tokenizer(text, verbose=False).input_ids, self._tokenizer.eos_token_id]
            while len(ids) >= self._size:
                yield ids[: self._size]
                del ids[: self._size]


def train(model_options: ModelOptions, options: Options) -> None:
    """Train until `max_steps`, from the last saved step in `output_dir` if there is one.

    Raises InvalidArgumentError for options that contradict each other, and NotFoundError for a
    missing text.
    """
    if options.max_steps < 1:
        raise InvalidArgumentError("give --max_steps: the length of a streamed text is unknown")
    if bool(model_options.checkpoint) == bool(model_options.preset):
        raise InvalidArgumentError("give either --checkpoint or --preset")
    folder = model_options.tokenizer or model_options.checkpoint
    if not folder:
        raise InvalidArgumentError("a new model needs a --tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise InvalidArgumentError(f"the tokenizer of {folder} has no eos_token to end documents")
    model = _model(model_options, len(tokenizer), tokenizer.eos_token_id)
    size = model_options.sequence_tokens or model.config.max_position_embeddings
    windows = Windows(Path(model_options.text), tokenizer, size, options.seed)
    if next(iter(windows), None) is None:
        message = f"the text at {model_options.text} has fewer than {size} tokens"
        raise InvalidArgumentError(f"{message}: give more text or fewer --sequence_tokens")
    trainer = Trainer(
        model=model,
        args=options,
        data_collator=default_data_collator,
        train_dataset=windows,
        processing_class=tokenizer,
    )
    out = Path(str(options.output_dir))
    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    trainer.train(resume_from_checkpoint=options.resume_from_checkpoint or last)
    trainer.save_model()


def _model(options: ModelOptions, vocab_size: int, end: int) -> Any:
    if options.checkpoint:
        return AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype="float32")
    fields: dict[str, Any] = {"vocab_size": vocab_size, "eos_token_id": end}
    fields |= {name: value for name, value in vars(options).items() if name.startswith("ffn_")}
    shape = preset(options.preset, options.kind, options.beta, **fields)
    return AutoModelForCausalLM.from_config(MemoryLLMConfig(**shape.to_json()), dtype="float32")


def main() -> None:
    """Run the command."""
    try:
        kinds: Any = (ModelOptions, Options)
        train(*HfArgumentParser(kinds).parse_args_into_dataclasses())
    except TolhouseError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
