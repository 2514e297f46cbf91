"""What one step of V-JEPA costs a GPU, by formula: floating-point operations, memory, bytes sent.

M masks; for each of them the encoder reads Kc context tokens of a clip and the predictor Kc + Kt; the target encoder
reads all N. Symbols of widths: D, hidden, heads; s is the number of bytes of the computation's type.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from tubelet.layers import Block
from tubelet.layers.mlp import SwiGLU
from tubelet.models.jepa import JEPA

FP32 = 4


class Tokens(NamedTuple):
    """Tokens of a clip under one mask."""

    context: int
    target: int


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products; `recomputed`: those that activation checkpointing repeats.

    A product of [m, k] and [k, n] counts 2mkn, its backward pass as much for each operand that needs a gradient. That
    flash attention computes its logits again is not counted, as is usual (Chowdhery et al. 2022, appendix B).
    """

    forward: float = 0
    backward: float = 0
    recomputed: float = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    def __mul__(self, factor: float) -> "Flops":
        return Flops(self.forward * factor, self.backward * factor, self.recomputed * factor)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def encoder_flops(encoder: nn.Module, tokens: int) -> Flops:
    """One clip, `tokens` of which are read. Pixels need no gradient."""
    pixels = 2 * _weights(encoder.patch_embed) * tokens
    return Flops(pixels, pixels) + _blocks_flops(encoder.blocks, tokens)


def predictor_flops(predictor: nn.Module, tokens: Tokens) -> Flops:
    """One clip under one mask. A noised target passes the embedding too, and needs no gradient."""
    embed, project = _weights(predictor.predictor_embed), _weights(predictor.predictor_proj)
    linear = 2 * (embed * tokens.context + project * tokens.target)
    flops = Flops(linear, 2 * linear) + _blocks_flops(predictor.predictor_blocks, sum(tokens))
    if not predictor.use_mask_tokens:
        flops += Flops(2 * embed * tokens.target, 2 * embed * tokens.target)
    return flops


def step_flops(jepa: JEPA, clips: int, masks: Sequence[Tokens]) -> dict[str, Flops]:
    """Of a GPU with `clips` clips in its batch."""
    contexts = [encoder_flops(jepa.encoder, tokens.context) for tokens in masks]
    predictions = [predictor_flops(jepa.predictor, tokens) for tokens in masks]
    return {
        "encoder on context": sum(contexts, Flops()) * clips,
        "target encoder on all": Flops(encoder_flops(jepa.target_encoder, jepa.encoder.num_patches).forward) * clips,
        "predictor on both": sum(predictions, Flops()) * clips,
    }


def _blocks_flops(blocks: nn.ModuleList, tokens: int) -> Flops:
    """Every weight once a token, and two products [tokens, tokens] × width for attention."""
    width = _width(blocks[0])
    forward = 2 * _weights(blocks) * tokens + len(blocks) * 4 * tokens**2 * width
    # Recomputation stops at the input of a block's last layer, whose output nobody asks for.
    last_layers = sum(block.mlp.output.weight.numel() for block in blocks)
    return Flops(forward, 2 * forward, forward - 2 * last_layers * tokens)


def _weights(module: nn.Module) -> int:
    """Elements of all matrices and kernels."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d))
    return sum(layer.weight.numel() for layer in layers)


@dataclass(frozen=True)
class Strategy:
    """How a run is spread over `world_size` GPUs: DDP, or FSDP2 with every block and part sharded on its own."""

    fsdp: bool
    checkpointing: bool
    world_size: int
    bytes_per_value: int
    """s: of the type that the networks compute in."""

    @property
    def shards(self) -> int:
        return self.world_size if self.fsdp else 1

    def __str__(self) -> str:
        return ("FSDP" if self.fsdp else "DDP") + (" + checkpointing" if self.checkpointing else "")


def memory(
    jepa: JEPA, strategy: Strategy, clips: int, parts: int, clip_bytes: int, masks: Sequence[Tokens]
) -> dict[str, float]:
    """Bytes that a GPU holds at most for a batch of `clips` clips, run in `parts` parts under masks with these tokens.

    Not in it: the CUDA context, NCCL's buffers, and what the allocator loses between blocks of memory. `clip_bytes` are
    those of a normalised clip.
    """
    encoder, predictor = parameters(jepa.encoder), parameters(jepa.predictor)
    trained, shards = encoder + predictor, strategy.shards
    block = max(parameters(jepa.encoder.blocks[0]), parameters(jepa.predictor.predictor_blocks[0]))
    # The block in use, the next one, and the last one's gradients on their way.
    gathered = 2 * strategy.bytes_per_value * block + FP32 * block
    return {
        "weights": FP32 * (2 * encoder + predictor) / shards,
        "AdamW moments": 2 * FP32 * trained / shards,
        "gathered weights": gathered if strategy.fsdp else 0,
        "clips": clips / parts * clip_bytes,
        "activations and gradients": passing_memory(jepa, strategy, clips / parts, parts, masks),
    }


def passing_memory(jepa: JEPA, strategy: Strategy, clips: float, parts: int, masks: Sequence[Tokens]) -> float:
    """Bytes of activations, gradients and autocast's copies of weights when they are most.

    Activations go as gradients come, so it is the largest of some moments of a step.
    """
    s, recompute, rope = strategy.bytes_per_value, strategy.checkpointing, jepa.encoder.positions.use_rope
    contexts = [clips * encoder_saved(jepa, s, recompute, tokens.context) for tokens in masks]
    predictions = [clips * predictor_saved(jepa, s, recompute, tokens) for tokens in masks]
    wide, narrow = jepa.encoder.blocks[0], jepa.predictor.predictor_blocks[0]

    def at_work(block: Block, tokens: int) -> float:
        return clips * tokens * (_block_gradients(block, s) + (_block_saved(block, s, rope) if recompute else 0))

    reading = max(at_work(wide, tokens.context) for tokens in masks)
    predicting = max(at_work(narrow, sum(tokens)) for tokens in masks)
    encoder, predictor = parameters(jepa.encoder), FP32 * parameters(jepa.predictor) / strategy.shards
    gradients = FP32 * encoder / strategy.shards + predictor
    earlier = gradients if parts > 1 else 0
    cast = s * cast_weights(jepa) if s < FP32 and not strategy.fsdp else 0
    # Recomputed blocks let go of their copies with the forward pass, and make them again one block at a time.
    still_cast = min(cast, s * _weights(wide)) if recompute else cast
    moments = [
        # The target encoder, which keeps nothing.
        clips * jepa.encoder.num_patches * (2 * FP32 * jepa.encoder.embed_dim + 2 * s * wide.mlp.fc1.out_features),
        # The forward pass ends; the backward pass begins; it ends.
        earlier + sum(contexts) + sum(predictions) + cast,
        earlier + sum(contexts) + sum(predictions) + still_cast + predicting,
        gradients + reading,
    ]
    if len(masks) > 1:
        # Only the encoder under the first mask is left. What the other masks give to its weights' gradients waits for
        # this last share, in the computation's type and, under FSDP, not sharded.
        moments.append(max(earlier, predictor) + contexts[0] + still_cast + reading + s * encoder)
    return max(moments)


def encoder_saved(jepa: JEPA, s: int, checkpointing: bool, context: int) -> int:
    """Bytes that autograd keeps of one clip for the encoder's backward pass, weights not included.

    Norms compute in fp32, all else in s bytes; the stream between blocks is fp32 where sin-cos positions are added.
    """
    encoder = jepa.encoder
    patches = context * s * encoder.patch_embed.proj.weight[0].numel()
    blocks = _blocks_saved(encoder.blocks, encoder.positions, context, s, checkpointing)
    return patches + blocks + context * _norm_saved(encoder.embed_dim)


def predictor_saved(jepa: JEPA, s: int, checkpointing: bool, tokens: Tokens) -> int:
    """The same for the predictor under one mask, and for the loss, which keeps differences and absolute values."""
    predictor, wide = jepa.predictor, jepa.encoder.embed_dim
    narrow, (context, target) = predictor.predictor_embed_dim, tokens
    saved = context * s * wide + target * 2 * FP32 * wide
    saved += _blocks_saved(predictor.predictor_blocks, predictor.positions, context + target, s, checkpointing)
    saved += (context + target) * FP32 * narrow + target * (2 * FP32 + s * narrow)
    if not predictor.use_mask_tokens:
        saved += target * (s * wide + _norm_saved(narrow))
    return saved


def _blocks_saved(blocks: nn.ModuleList, positions: nn.Module, tokens: int, s: int, checkpointing: bool) -> int:
    rope = positions.use_rope
    tables = 2 * FP32 * positions.head_dim * tokens if rope else 0
    if checkpointing:
        return tables + len(blocks) * tokens * _width(blocks[0]) * (s if rope else FP32)
    return tables + len(blocks) * tokens * _block_saved(blocks[0], s, rope)


def _block_saved(block: Block, s: int, rope: bool) -> int:
    """Bytes a token: inputs of norms, linear layers and activation; queries, keys, values and output of attention."""
    width, swiglu = _width(block), isinstance(block.mlp, SwiGLU)
    attention = s * width * (1 + 3 + 1 + (2 if rope else 0)) + FP32 * block.attn.num_heads
    feed_forward = s * (width + block.mlp.fc1.out_features * (4 if swiglu else 2))
    return 2 * _norm_saved(width) + attention + feed_forward


def _block_gradients(block: Block, s: int) -> int:
    """Bytes a token that a block's backward pass has at once: the gradients of the stream and of the hidden layer."""
    return FP32 * _width(block) + s * block.mlp.fc1.out_features


def _norm_saved(width: int) -> int:
    """Bytes a token: the input in fp32, its mean and deviation."""
    return FP32 * (width + 2)


def cast_weights(jepa: JEPA) -> int:
    """Elements of the trained matrices that autocast makes copies of."""
    predictor = jepa.predictor
    modules = (jepa.encoder.blocks, predictor.predictor_blocks, predictor.predictor_embed, predictor.predictor_proj)
    return sum(_weights(module) for module in modules)


def _width(block: Block) -> int:
    return block.attn.qkv.in_features


@dataclass(frozen=True)
class Traffic:
    """Bytes that enter the collectives of a step: what each GPU gives to, or gets from, all others together."""

    all_reduce: float = 0
    all_gather: float = 0
    reduce_scatter: float = 0

    def sent(self, world_size: int) -> float:
        """Bytes that each GPU sends in rings: an all-reduce is a reduce-scatter and an all-gather."""
        return (2 * self.all_reduce + self.all_gather + self.reduce_scatter) * (world_size - 1) / world_size


def traffic(jepa: JEPA, strategy: Strategy, num_masks: int, parts: int) -> Traffic:
    """Of a step whose batch is run in `parts` parts; gradients are reduced in fp32.

    Under FSDP weights are gathered for each mask's forward pass and again for its backward pass, and gradients are
    reduced after each part's backward pass.
    """
    trained = parameters(jepa.encoder) + parameters(jepa.predictor)
    if not strategy.fsdp:
        return Traffic(all_reduce=FP32 * trained)
    blocks = parameters(jepa.encoder.blocks)
    # Pixels need no gradient, so nothing tells when the patch embedding's backward pass ends: it stays gathered.
    ends = parameters(jepa.encoder) - blocks
    gathered = (
        2 * num_masks * (blocks + parameters(jepa.predictor)) + (num_masks + 1) * ends + parameters(jepa.target_encoder)
    )
    return Traffic(all_gather=strategy.bytes_per_value * gathered * parts, reduce_scatter=FP32 * trained * parts)
