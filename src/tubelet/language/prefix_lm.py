"""A causal language model that reads vectors of a video before the text (ClipCap, Mokady et al. 2021)."""

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from tubelet.config import Config, ConfigError
from tubelet.language.packages import ADAPTERS, MODELS, check_installed
from tubelet.language.tokenizer import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tune = Literal["all", "lora", "none"]


class LanguageModelConfig(Config):
    """YAML section `language_model`."""

    folder: str | None = None
    """Local folder of a causal language model of transformers with its tokenizer; null: a small decoder (GPT-2's
    architecture) and a BPE tokenizer, both learned from the texts."""
    tune: Tune = "all"
    """What is trained of the language model: `all`, low-rank updates of its matrices (`lora`), or `none`."""
    lora_rank: int = Field(8, ge=1)
    """Rank of LoRA's matrices."""
    lora_alpha: float = Field(16.0, gt=0)
    """Scale of LoRA's update, divided by its rank."""
    vocab_size: int = Field(1000, ge=258)
    """Of a new tokenizer; it has fewer tokens where the texts have fewer words."""
    embed_dim: int = Field(192, ge=1)
    """Of a new decoder, as `depth` and `num_heads`."""
    depth: int = Field(3, ge=1)
    """Blocks of a new model."""
    num_heads: int = Field(3, ge=1)
    """Attention heads of a new model."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout of a new model."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights of a new decoder; a narrow one learns faster with 0.1."""


class PrefixLanguageModel(nn.Module):
    """A causal language model of transformers with a prefix of vectors.

    The input is the prefix, the prompt and the target, one after the other. Positions of padding in the prompt are not
    attended to and not counted.

    Args:
        model: A causal language model that accepts `inputs_embeds`; one whose weights are frozen is used without
            dropout.
        adapted: Whether only few of the model's weights are trained, which are then the only ones to store.
    """

    def __init__(self, model: "PreTrainedModel", *, adapted: bool = False):
        super().__init__()
        self.model, self.adapted = model, adapted

    @property
    def embed_dim(self) -> int:
        """Width D of the prefix's vectors."""
        return self._embed.weight.shape[1]

    @property
    def _embed(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model.get_input_embeddings())

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and any(p.requires_grad for p in self.model.parameters()))

    def freeze_output(self) -> None:
        """Freeze the weights that only the logits depend on, where features are all that is used."""
        output = self.model.get_output_embeddings()
        if output is not None and output.weight is not self._embed.weight:
            output.requires_grad_(False)

    def stored(self) -> nn.Module:
        """Return the module with the weights that a checkpoint stores."""
        if not self.adapted:
            return self
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return nn.ParameterDict({name.replace(".", "/"): p for name, p in trained.items()})

    def forward(self, prefix: Tensor, prompt: Tensor, prompt_used: Tensor, target: Tensor) -> Tensor:
        """Return the logits of the target's tokens.

        Args:
            prefix: [B, Q, D].
            prompt: Token numbers int64 [B, P], padded on the left.
            prompt_used: Which of them are no padding, bool [B, P].
            target: Token numbers int64 [B, L], then IGNORED.

        Returns:
            Logits [B, L, vocab].
        """
        inputs = self._inputs(prefix, prompt, prompt_used, target.clamp_min(0))
        logits = self.model(**inputs, use_cache=False).logits
        first = prefix.shape[1] + prompt.shape[1] - 1  # the position that predicts the first token of the target
        return logits[:, first : first + target.shape[1]]

    def loss(self, prefix: Tensor, prompt: Tensor, prompt_used: Tensor, target: Tensor) -> Tensor:
        """Return the mean over the samples of the mean cross-entropy of their tokens."""
        return -self.log_likelihood(prefix, prompt, prompt_used, target, per_token=True).mean()

    def log_likelihood(
        self, prefix: Tensor, prompt: Tensor, prompt_used: Tensor, target: Tensor, *, per_token: bool = False
    ) -> Tensor:
        """Return the logarithm of the probability of each target, [B]; with `per_token` divided by its length."""
        logits = self(prefix, prompt, prompt_used, target)
        terms = -nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(target.shape)
        total = terms.sum(1)
        return total / (target != IGNORED).sum(1).clamp_min(1) if per_token else total

    def features_at_end(self, target: Tensor) -> Tensor:
        """Return the last layer at the last token of texts [B, D], given as int64 [B, L], then IGNORED."""
        used = target != IGNORED
        hidden = self._hidden({"inputs_embeds": self._embed(target.clamp_min(0)), "attention_mask": used.long()})
        return hidden[torch.arange(len(hidden), device=hidden.device), used.sum(1) - 1]

    def features_after(self, prefix: Tensor, prompt: Tensor, prompt_used: Tensor) -> Tensor:
        """Return the last layer at the last token of prefix and prompt [B, D]; see `forward`."""
        return self._hidden(self._inputs(prefix, prompt, prompt_used))[:, -1]

    @torch.no_grad()
    def generate(self, prefix: Tensor, prompt: Tensor, prompt_used: Tensor, **options: Any) -> Tensor:
        """Continue prefix and prompt; returns token numbers [B, L]. `options` are those of transformers' `generate`."""
        inputs = self._inputs(prefix, prompt, prompt_used)
        generate = cast(Any, self.model).generate  # that of peft is not typed
        return generate(inputs_embeds=inputs["inputs_embeds"], attention_mask=inputs["attention_mask"], **options)

    def _hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the last layer at all positions, without the logits."""
        model = cast(Any, self.model)
        model = model.get_base_model() if self.adapted else model
        return model.base_model(**inputs, use_cache=False).last_hidden_state

    def _inputs(
        self, prefix: Tensor, prompt: Tensor, prompt_used: Tensor, target: Tensor | None = None
    ) -> dict[str, Tensor]:
        used = torch.cat([prompt_used.new_ones(prefix.shape[:2]), prompt_used], 1)
        embedded = torch.cat([prefix, self._embed(prompt).to(prefix.dtype)], 1)
        # The padding comes first, so that the token before the target is none, also where there is no prompt.
        order = used.int().argsort(dim=1, stable=True)
        embedded = embedded.gather(1, order[..., None].expand_as(embedded))
        used = used.gather(1, order)
        if target is not None:
            embedded = torch.cat([embedded, self._embed(target).to(prefix.dtype)], 1)
            used = torch.cat([used, torch.ones_like(target, dtype=torch.bool)], 1)
        attended = used.long()
        positions = (attended.cumsum(1) - 1).clamp_min(0)
        return {"inputs_embeds": embedded, "attention_mask": attended, "position_ids": positions}


def build_language_model(
    options: LanguageModelConfig, *, vocab_size: int, pad: int, end: int, max_length: int
) -> PrefixLanguageModel:
    """Build or load a language model.

    Args:
        options: Section `language_model`.
        vocab_size: Tokens of the tokenizer.
        pad: Token number of the padding.
        end: Token number of the end of a text.
        max_length: Positions of prefix, prompt and target together.

    Raises:
        ConfigError: The folder holds no causal language model, or one that reads fewer positions or knows fewer tokens,
            or a package is missing.
    """
    check_installed((*MODELS, *(ADAPTERS if options.tune == "lora" else ())))
    from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel

    model: Any

    if options.folder is None:
        if options.embed_dim % options.num_heads:
            raise ConfigError(
                f"language_model.num_heads: {options.num_heads} heads do not divide embed_dim {options.embed_dim}"
            )
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=max_length,
            n_embd=options.embed_dim,
            n_layer=options.depth,
            n_head=options.num_heads,
            resid_pdrop=options.dropout,
            embd_pdrop=options.dropout,
            attn_pdrop=options.dropout,
            initializer_range=options.init_std,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=pad,
        )
        model = GPT2LMHeadModel(config)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(options.folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"language_model.folder: {options.folder}: {error}") from None
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and limit < max_length:
        raise ConfigError(
            f"language_model.folder: {options.folder} reads {limit} positions, prefix, prompt and target have "
            f"{max_length}; lower text.max_prompt, text.max_target or pooler.num_queries"
        )
    if (known := model.get_input_embeddings().weight.shape[0]) < vocab_size:
        raise ConfigError(
            f"language_model.folder: the tokenizer in {options.folder} has {vocab_size} tokens, the model {known}"
        )
    # The section `decoding` alone says how texts are written.
    model.generation_config = GenerationConfig(pad_token_id=pad, eos_token_id=end, bos_token_id=end)
    if options.tune == "lora":
        return PrefixLanguageModel(_with_lora(model, options), adapted=True)
    model.requires_grad_(options.tune == "all")
    return PrefixLanguageModel(model)


def _with_lora(model: "PreTrainedModel", options: LanguageModelConfig) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,  # type: ignore[arg-type]  # which is a factor, so that fractions are allowed
        target_modules="all-linear",
        lora_dropout=options.dropout,
    )
    return get_peft_model(model, config)
