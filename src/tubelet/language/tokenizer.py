"""Tokenizers of language models: learned from the texts of a data set, or those of a model in a local folder."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tubelet.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, END = "<pad>", "<end>"
IGNORED = -100
"""Label of positions that do not count in the loss."""


def learn_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """Learn a byte-level BPE tokenizer (Sennrich et al. 2016); it knows every character.

    Args:
        texts: The texts to learn from.
        vocab_size: Number of tokens, at least 258: all bytes, padding and the end of a text.

    Returns:
        The tokenizer as JSON text, for `parse_tokenizer`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def parse_tokenizer(content: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer that `learn_tokenizer` has learned."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(content), pad_token=PAD, eos_token=END)


def load_tokenizer(folder: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a language model in a local folder; one without padding pads with the end of a text.

    Raises:
        ConfigError: The folder holds no tokenizer, or one without a token for the end of a text.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"language_model.folder: {folder} has no tokenizer of transformers: {error}") from None
    if tokenizer.eos_token is None:
        raise ConfigError(f"language_model.folder: the tokenizer in {folder} has no eos_token, the end of a text")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class TextEncoder:
    """Texts to token numbers.

    Args:
        tokenizer: The tokenizer.
        max_prompt: Tokens of a prompt; longer ones lose their beginning, the end being next to the answer.
        max_target: Tokens of a target, with the end of the text; longer ones lose their end.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_prompt: int, max_target: int):
        self.tokenizer, self.max_prompt, self.max_target = tokenizer, max_prompt, max_target

    def prompts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token numbers int64 [B, P] and which of them count, bool; padding is on the left.

        P is the length of the longest prompt, at most `max_prompt`.
        """
        rows = [row[-self.max_prompt :] if self.max_prompt else [] for row in self._numbers(texts)]
        ids = torch.full((len(texts), max(map(len, rows), default=0)), self.pad)
        used = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, ids.shape[1] - len(row) :] = torch.tensor(row, dtype=torch.int64)
            used[i, ids.shape[1] - len(row) :] = True
        return ids, used

    def targets(self, texts: Sequence[str]) -> Tensor:
        """Return token numbers int64 [B, L], with the end of the text, then IGNORED.

        L is the length of the longest target, at most `max_target`.
        """
        rows = [[*row, self.end][: self.max_target] for row in self._numbers(texts)]
        ids = torch.full((len(texts), max(map(len, rows), default=0)), IGNORED)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids

    def count(self, prompts: Sequence[str], targets: Sequence[str]) -> dict[str, int]:
        """Return the numbers of texts that lose a part, and of tokens that the tokenizer does not know."""
        rows, target_rows = self._numbers(prompts), self._numbers(targets)
        unknown = self.tokenizer.unk_token_id
        return {
            "long_prompts": sum(len(row) > self.max_prompt for row in rows),
            "long_targets": sum(len(row) + 1 > self.max_target for row in target_rows),
            "unknown_tokens": 0 if unknown is None else sum(row.count(unknown) for row in (*rows, *target_rows)),
        }

    def decode(self, ids: Tensor) -> list[str]:
        """Return the texts of token numbers [B, L], each up to its end."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def end(self) -> int:
        return self.tokenizer.eos_token_id

    def _numbers(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
