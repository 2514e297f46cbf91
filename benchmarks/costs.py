"""Cost model of a V-JEPA training step on one GPU: floating-point operations, memory and communication.

For each mask, the encoder processes Kc context tokens of a clip and the predictor Kc + Kt tokens; those of all masks
form one sequence, see `tubelet.layers.segments`. The target encoder processes all N tokens. `s` is the number of bytes
per value of the compute dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from tubelet.layers import Block
from tubelet.layers.mlp import SwiGLU
from tubelet.objectives.vjepa import VJEPA

FP32 = 4
RESERVED = {"default allocator": 1.4, "expandable_segments": 1.01}
"""Memory that torch's allocator holds, divided by the peak of the tensors: an upper estimate for DDP.

A pretended GPU counted 1.39 for vjepa_vitl16 and 1.37 for vjepa_vith16_384 by default (an earlier version), and
tools/pretended_gpu 1.25 and 1.22 after four steps; 1.003 with expandable segments. FSDP on 8
processes, with expandable segments: 1.05 for vjepa_vitl16, 1.12 for a ViT-B of 6 blocks."""


class Tokens(NamedTuple):
    """Number of context and target tokens of a clip under one mask."""

    context: int
    target: int


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products.

    A product of [m, k] and [k, n] counts 2mkn, and its backward pass the same for each operand that needs a gradient.
    As usual, the recomputation of logits in flash attention is not counted (Chowdhery et al. 2022, appendix B).

    Attributes:
        forward: Operations of the forward pass.
        backward: Operations of the backward pass.
        recomputed: Operations that activation checkpointing repeats.
    """

    forward: float = 0
    backward: float = 0
    recomputed: float = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    def __mul__(self, factor: float) -> "Flops":
        return Flops(self.forward * factor, self.backward * factor, self.recomputed * factor)


def parameters(module: nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def encoder_flops(encoder: nn.Module, tokens: int) -> Flops:
    """Return the operations for one clip with this number of tokens. Pixels need no gradient."""
    pixels = 2 * _weights(encoder.patch_embed) * tokens
    return Flops(pixels, pixels) + _blocks_flops(encoder.blocks, tokens)


def predictor_flops(predictor: nn.Module, tokens: Tokens) -> Flops:
    """Return the operations for one clip under one mask. Noised targets are embedded, too, but need no gradient."""
    embed, project = _weights(predictor.predictor_embed), _weights(predictor.predictor_proj)
    linear = 2 * (embed * tokens.context + project * tokens.target)
    flops = Flops(linear, 2 * linear) + _blocks_flops(predictor.predictor_blocks, sum(tokens))
    if not predictor.use_mask_tokens:
        flops += Flops(2 * embed * tokens.target, 2 * embed * tokens.target)
    return flops


def step_flops(jepa: VJEPA, clips: int, masks: Sequence[Tokens]) -> dict[str, Flops]:
    """Return the operations of a step with `clips` clips on one GPU, for each part of the model."""
    contexts = [encoder_flops(jepa.encoder, tokens.context) for tokens in masks]
    predictions = [predictor_flops(jepa.predictor, tokens) for tokens in masks]
    return {
        "encoder on context": sum(contexts, Flops()) * clips,
        "target encoder on all": Flops(encoder_flops(jepa.target_encoder, jepa.encoder.num_patches).forward) * clips,
        "predictor on both": sum(predictions, Flops()) * clips,
    }


def _blocks_flops(blocks: nn.ModuleList, tokens: int) -> Flops:
    """Count every weight once per token, and two products [tokens, tokens] x width for attention."""
    width = _width(blocks[0])
    forward = 2 * _weights(blocks) * tokens + len(blocks) * 4 * tokens**2 * width
    # Recomputation stops at the input of the last layer of a block, whose output is not needed.
    last_layers = sum(block.mlp.output.weight.numel() for block in blocks)
    return Flops(forward, 2 * forward, forward - 2 * last_layers * tokens)


def _weights(module: nn.Module) -> int:
    """Count the weights of all linear and convolution layers, without biases."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d))
    return sum(layer.weight.numel() for layer in layers)


@dataclass(frozen=True)
class Strategy:
    """Parallelization over `world_size` GPUs.

    Attributes:
        fsdp: FSDP2 with every block and part of the model sharded separately; DDP otherwise.
        checkpointing: Whether activations are recomputed in the backward pass.
        world_size: Number of GPUs.
        bytes_per_value: Bytes per value of the compute dtype (s).
        reshard_after_forward: FSDP gathers the weights of trained parts again for the backward pass.
        shard_size: Number of GPUs that hold a copy of the model together with FSDP; all if None.
    """

    fsdp: bool
    checkpointing: bool
    world_size: int
    bytes_per_value: int
    reshard_after_forward: bool = False
    shard_size: int | None = None

    @property
    def shards(self) -> int:
        """Number of shards of weights, gradients and optimizer state."""
        return (self.shard_size or self.world_size) if self.fsdp else 1

    @property
    def replicas(self) -> int:
        """Number of copies of the model."""
        return self.world_size // self.shards

    def __str__(self) -> str:
        return ("FSDP" if self.fsdp else "DDP") + (" + checkpointing" if self.checkpointing else "")


def memory(
    jepa: VJEPA, strategy: Strategy, clips: int, parts: int, clip_bytes: int, masks: Sequence[Tokens]
) -> dict[str, float]:
    """Estimate the peak memory of a GPU.

    The CUDA context and NCCL buffers are not included, nor fragmentation of the allocator; see `RESERVED`.

    Args:
        jepa: The model.
        strategy: Parallelization.
        clips: Batch size on each GPU.
        parts: Number of micro-batches (gradient accumulation steps).
        clip_bytes: Bytes of a normalized clip.
        masks: Number of tokens under each mask.

    Returns:
        Bytes for each purpose.
    """
    encoder, predictor = parameters(jepa.encoder), parameters(jepa.predictor)
    trained, shards = encoder + predictor, strategy.shards
    peak = transient_memory(jepa, strategy, clips / parts, parts, masks)
    return {
        "weights": FP32 * (2 * encoder + predictor) / shards,
        "AdamW moments": 2 * FP32 * trained / shards,
        "gathered weights": peak.gathered,
        "clips": clips / parts * clip_bytes,
        "activations and gradients": peak.others,
    }


class Transient(NamedTuple):
    """Bytes of what exists at one point of a step only: weights that FSDP has gathered, and all else."""

    gathered: float
    others: float


def transient_memory(jepa: VJEPA, strategy: Strategy, clips: float, parts: int, masks: Sequence[Tokens]) -> Transient:
    """Estimate the peak of activations, gradients and the weights gathered by FSDP or cast by autocast.

    Activations are freed while gradients are created, so the peak is the maximum over several points of a step.
    """
    s, recompute, rope = strategy.bytes_per_value, strategy.checkpointing, jepa.encoder.positions.use_rope
    contexts = clips * encoder_saved(jepa, s, recompute, masks)
    predictions = clips * predictor_saved(jepa, s, recompute, masks)
    wide, narrow = jepa.encoder.blocks[0], jepa.predictor.predictor_blocks[0]

    def block_backward(block: Block, tokens: int) -> float:
        recomputed = _block_saved(block, s, rope, len(masks)) if recompute else 0
        return clips * tokens * (_block_gradients(block, s) + recomputed)

    encoder_backward = block_backward(wide, _total(masks).context)
    predictor_backward = block_backward(narrow, sum(_total(masks)))
    encoder, predictor = FP32 * parameters(jepa.encoder), FP32 * parameters(jepa.predictor)
    gradients = (encoder + predictor) / strategy.shards
    accumulated = gradients if parts > 1 else 0
    cast = s * cast_weights(jepa) if s < FP32 and not strategy.fsdp else 0
    # Checkpointed blocks free their cast weights after the forward pass and cast them again one block at a time.
    still_cast = min(cast, s * _weights(wide)) if recompute else cast
    # The current block and the prefetched one; in the backward pass also the gradients of the previous one while they
    # are reduced.
    two_blocks, reduced = (n * max(parameters(wide), parameters(narrow)) for n in (2 * s, FP32))
    of_encoder, of_both = (
        (two_blocks, two_blocks)
        if strategy.reshard_after_forward
        else (s * parameters(jepa.encoder), s * (parameters(jepa.encoder) + parameters(jepa.predictor)))
    )
    of_target = clips * jepa.encoder.num_patches
    points = [
        # Forward pass of the target encoder, which stores no activations.
        Transient(two_blocks, of_target * (2 * FP32 * jepa.encoder.embed_dim + 2 * s * wide.mlp.fc1.out_features)),
        # End of the forward pass; start of the backward passes of predictor and encoder; end of the backward pass.
        Transient(of_both, accumulated + contexts + predictions + cast),
        Transient(of_both + reduced, accumulated + contexts + predictions + still_cast + predictor_backward),
        Transient(
            of_encoder + reduced,
            max(accumulated, predictor / strategy.shards) + contexts + still_cast + encoder_backward,
        ),
        Transient(two_blocks + reduced, gradients + encoder_backward),
    ]
    return max((point if strategy.fsdp else point._replace(gathered=0) for point in points), key=sum)


def encoder_saved(jepa: VJEPA, s: int, checkpointing: bool, masks: Sequence[Tokens]) -> int:
    """Estimate the bytes that autograd saves per clip for the backward pass of the encoder, without weights.

    Norms are computed in fp32, everything else with s bytes per value. The residual stream is fp32 if sin-cos positions
    are added.
    """
    encoder, context = jepa.encoder, _total(masks).context
    patches = context * s * encoder.patch_embed.proj.weight[0].numel()
    blocks = _blocks_saved(encoder.blocks, encoder.positions, context, s, checkpointing, len(masks))
    return patches + blocks + context * _norm_saved(encoder.embed_dim)


def predictor_saved(jepa: VJEPA, s: int, checkpointing: bool, masks: Sequence[Tokens]) -> int:
    """Estimate the saved bytes per clip for predictor and loss.

    The loss saves differences and their absolute values.
    """
    predictor, wide = jepa.predictor, jepa.encoder.embed_dim
    narrow, (context, target) = predictor.predictor_embed_dim, _total(masks)
    tokens = context + target
    saved = context * s * wide + target * 2 * FP32 * wide
    saved += _blocks_saved(predictor.predictor_blocks, predictor.positions, tokens, s, checkpointing, len(masks))
    saved += tokens * _norm_saved(narrow) + target * s * narrow
    if not predictor.use_mask_tokens:
        saved += target * (s * wide + _norm_saved(narrow))
    return saved


def _total(masks: Sequence[Tokens]) -> Tokens:
    """Return the number of tokens of all masks together."""
    return Tokens(*(sum(tokens) for tokens in zip(*masks, strict=True)))


def _blocks_saved(
    blocks: nn.ModuleList, positions: nn.Module, tokens: int, s: int, checkpointing: bool, num_masks: int
) -> int:
    rope = positions.use_rope
    tables = 2 * FP32 * positions.head_dim * tokens if rope else 0
    if checkpointing:
        return tables + len(blocks) * tokens * _width(blocks[0]) * (s if rope else FP32)
    return tables + len(blocks) * tokens * _block_saved(blocks[0], s, rope, num_masks)


def _block_saved(block: Block, s: int, rope: bool, num_masks: int) -> int:
    """Return the saved bytes per token: inputs of norms, linear layers and activation; q, k, v and attention output.

    The attention output of several masks is saved for each mask by itself and joined.
    """
    width, swiglu = _width(block), isinstance(block.mlp, SwiGLU)
    outputs = 2 if num_masks > 1 else 1
    attention = s * width * (1 + 3 + outputs + (2 if rope else 0)) + FP32 * block.attn.num_heads
    feed_forward = s * (width + block.mlp.fc1.out_features * (4 if swiglu else 2))
    return 2 * _norm_saved(width) + attention + feed_forward


def _block_gradients(block: Block, s: int) -> int:
    """Return the bytes per token of gradients in a block's backward pass: residual stream and hidden layer."""
    return FP32 * _width(block) + s * block.mlp.fc1.out_features


def _norm_saved(width: int) -> int:
    """Return the saved bytes per token of a norm: input, mean and standard deviation in fp32."""
    return FP32 * (width + 2)


def cast_weights(jepa: VJEPA) -> int:
    """Count the trained weights that autocast casts."""
    predictor = jepa.predictor
    modules = (jepa.encoder.blocks, predictor.predictor_blocks, predictor.predictor_embed, predictor.predictor_proj)
    return sum(_weights(module) for module in modules)


def _width(block: Block) -> int:
    return block.attn.qkv.in_features


@dataclass(frozen=True)
class Traffic:
    """Size in bytes of the full tensors in the collectives of a step.

    All-gathers and reduce-scatters are among the GPUs that hold a copy of the model together, all-reduces among copies.
    """

    all_reduce: float = 0
    all_gather: float = 0
    reduce_scatter: float = 0

    def sent(self, strategy: Strategy) -> tuple[float, float]:
        """Return the bytes that each GPU sends in rings within copies of the model, and among copies.

        An all-reduce is a reduce-scatter and an all-gather.
        """
        shards, replicas = strategy.shards, strategy.replicas
        within = (self.all_gather + self.reduce_scatter) * (shards - 1) / shards
        return within, 2 * self.all_reduce * (replicas - 1) / replicas


def traffic(jepa: VJEPA, strategy: Strategy, parts: int) -> Traffic:
    """Return the communication of a step with `parts` micro-batches. Gradients are reduced in fp32.

    FSDP gathers the weights for the forward pass of each micro-batch, and with `reshard_after_forward` again for its
    backward pass, after which it reduces the gradients. Several copies of the model then reduce their shards.
    """
    trained = parameters(jepa.encoder) + parameters(jepa.predictor)
    if not strategy.fsdp:
        return Traffic(all_reduce=FP32 * trained)
    gathered = (2 if strategy.reshard_after_forward else 1) * trained + parameters(jepa.target_encoder)
    return Traffic(
        all_reduce=FP32 * trained * parts / strategy.shards if strategy.replicas > 1 else 0,
        all_gather=strategy.bytes_per_value * gathered * parts,
        reduce_scatter=FP32 * trained * parts,
    )
