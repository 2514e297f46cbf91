"""Estimate parameters, FLOPs, memory, communication and time of a pretraining run, without a GPU.

    python -m benchmarks.plan --fname configs/pretrain/vjepa_vith16.yaml --nodes 16 --gpus-per-node 8 [key.path=value …]

The numbers of tokens are those of the masks in the first steps of the run. The formulas are in costs.py.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from app.vjepa.options import Options
from benchmarks import costs
from benchmarks.costs import FP32, Flops, Strategy, Tokens
from tubelet import objectives
from tubelet.config import ConfigError
from tubelet.data.mask_draws import draw_masks
from tubelet.models.vision_transformer import VisionTransformer
from tubelet.objectives.vjepa import VJEPA
from tubelet.runtime import command_line, precision
from tubelet.runtime.launch import Package, load
from tubelet.runtime.text import text_table

PRETRAINING = Package("app", key="app", module="train")
STEPS_SAMPLED = 32
GIB = 2**30
SOURCE_FPS = 30  # assumed frame rate of the files if the configuration specifies clips in frames


@dataclass(frozen=True)
class Cluster:
    """GPUs and their rates.

    Attributes:
        nodes: Number of nodes.
        gpus_per_node: GPUs per node.
        flops: FLOP/s that a GPU achieves in training steps.
        peak: FLOP/s of the data sheet.
        bandwidth: Bytes/s that each GPU can send to other nodes.
        nvlink: Bytes/s that each GPU can send within its node.
    """

    nodes: int
    gpus_per_node: int
    flops: float
    peak: float
    bandwidth: float
    nvlink: float

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def sent(self, traffic: costs.Traffic, strategy: Strategy) -> tuple[float, float]:
        """Return the bytes that each GPU sends within its node, and to other nodes.

        Rings leave a node once for each of their GPUs in it, so that these share the bytes for other nodes. Consecutive
        GPUs hold a copy of the model.
        """
        within, among = traffic.sent(strategy)
        in_copy = math.gcd(strategy.shards, self.gpus_per_node)
        copies = self.gpus_per_node // in_copy
        inside = within + (among if copies > 1 else 0.0)
        between = (within / in_copy if strategy.shards > in_copy else 0.0) + (among / copies if self.nodes > 1 else 0.0)
        return inside if self.gpus_per_node > 1 else 0.0, between


@dataclass(frozen=True)
class Step:
    """Estimated memory in bytes, communication and times in seconds of a step under one strategy.

    `sent` are the bytes that each GPU sends in total and to other nodes.
    """

    strategy: Strategy
    memory: dict[str, float]
    traffic: costs.Traffic
    sent: tuple[float, float]
    compute: float
    communication: float
    seconds: float


class Plan:
    """Estimated cost of a pretraining configuration on a cluster.

    Raises:
        ConfigError: If there is no formula for the encoder, or the GPUs cannot be divided as configured.
    """

    def __init__(self, options: Options, cluster: Cluster):
        self.options, self.cluster = options, cluster
        with torch.device("meta"):
            objective = objectives.build(options.objective, options.setup(schedule_steps=1))
        if type(objective) is not VJEPA:
            raise ConfigError(f"objective.name: the plan has formulas for vjepa, not for {options.objective.name}")
        self.jepa = objective
        if not isinstance(self.jepa.encoder, VisionTransformer):
            raise ConfigError(
                f"encoder.name: the plan has formulas for vision transformers, not for {options.encoder.name}; take "
                "one of about the same width and depth, such as vit_base"
            )
        size = options.distributed.shard_size or cluster.gpus
        if cluster.gpus % size:
            raise ConfigError(f"distributed.shard_size: {size} does not divide the {cluster.gpus} GPUs")
        data = options.data
        self.clips = data.batch_size * data.num_clips
        self.global_clips = self.clips * cluster.gpus
        steps = draw_tokens(options, self.global_clips)
        self.draws = [draw for groups in steps for draw in groups]
        by_draw = {draw: costs.step_flops(self.jepa, self.clips, draw) for draw in set(self.draws)}
        self.flops = mean_flops([by_draw[draw] for draw in self.draws])
        self.imbalance = statistics.mean(_slowest([by_draw[draw] for draw in groups]) for groups in steps)

    @property
    def total_flops(self) -> Flops:
        """Operations per GPU and step."""
        return sum(self.flops.values(), Flops())

    @property
    def clip_bytes(self) -> int:
        """Bytes of a uint8 clip."""
        clip = self.options.data.clip_shape
        return 3 * clip.num_frames * clip.height * clip.width

    def step(self, fsdp: bool, checkpointing: bool) -> Step:
        """Estimate a step under one strategy."""
        options, cluster, total = self.options, self.cluster, self.total_flops
        parts = options.optimization.accumulation_steps
        distributed = options.distributed
        sharding = (distributed.reshard_after_forward, distributed.shard_size)
        strategy = Strategy(fsdp, checkpointing, cluster.gpus, _dtype(options).itemsize, *sharding)
        traffic = costs.traffic(self.jepa, strategy, parts)
        inside, between = cluster.sent(traffic, strategy)
        communication = max(inside / cluster.nvlink, between / cluster.bandwidth)
        operations = total.forward + total.backward + (total.recomputed if checkpointing else 0)
        compute = operations / cluster.flops * self.imbalance
        if fsdp:
            seconds = max(compute, communication)
        else:
            # Gradients are complete, and reduced, during the last backward pass of the encoder.
            last = statistics.mean(
                sum(costs.encoder_flops(self.jepa.encoder, tokens.context).backward for tokens in draw)
                for draw in self.draws
            )
            seconds = compute + max(0.0, communication - last * self.clips / parts / cluster.flops)
        memories = (
            costs.memory(self.jepa, strategy, self.clips, parts, FP32 * self.clip_bytes, draw)
            for draw in set(self.draws)
        )
        memory = max(memories, key=lambda rows: sum(rows.values()))
        sent = (sum(traffic.sent(strategy)), between)
        return Step(strategy, memory, traffic, sent, compute, communication, seconds)


def draw_tokens(options: Options, global_clips: int) -> list[list[tuple[Tokens, ...]]]:
    """Return the number of tokens under each mask in the first steps of the run, for each group of clips.

    The clips of a group have equally many tokens. A group is the whole batch, or `data.mask_batch_size` clips, such as
    those of one process.
    """
    masks, group_size = options.mask_collator(), options.data.mask_batch_size or global_clips
    steps = []
    for step in range(STEPS_SAMPLED):
        groups = []
        for group in range(max(1, global_clips // group_size)):
            lengths, seed = options.data.mask_lengths, options.meta.seed
            pairs = draw_masks(masks, group_size, seed=seed, step=step, group=group, lengths=lengths)
            groups.append(tuple(Tokens(c.shape[1], t.shape[1]) for c, t in zip(*pairs, strict=True)))
        steps.append(groups)
    return steps


def mean_flops(draws: list[dict[str, Flops]]) -> dict[str, Flops]:
    """Return the operations of each part, averaged over steps and groups."""
    return {part: sum((draw[part] for draw in draws), Flops()) * (1 / len(draws)) for part in draws[0]}


def _slowest(groups: list[dict[str, Flops]]) -> float:
    """Return the operations of the group with the most, for which the others wait, divided by their mean."""
    totals = [sum(group.values(), Flops()) for group in groups]
    operations = [total.forward + total.backward for total in totals]
    return max(operations) / statistics.mean(operations)


def encoded_bytes(options: Options, bits_per_second: float) -> float:
    """Return the bytes of encoded video that a clip spans; 0 for images."""
    data = options.data
    if data.clip_duration is not None:
        seconds = data.clip_duration
    elif data.fps is not None:
        seconds = data.num_frames / data.fps
    else:
        seconds = data.num_frames * (data.sampling_rate or 0) / SOURCE_FPS
    return seconds * bits_per_second / 8


def rows(plan: Plan, video_bits: float) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table; a row with one cell is a heading."""
    options, cluster, jepa, total = plan.options, plan.cluster, plan.jepa, plan.total_flops
    grid = jepa.encoder.grid
    yield (f"{cluster.nodes} x {cluster.gpus_per_node} GPUs, {plan.clips} clips per GPU, {plan.global_clips} per step",)
    yield "dtype", precision.name(_dtype(options))
    yield "tokens per clip", f"{grid[0]} x {grid[1]} x {grid[2]} = {jepa.encoder.num_patches}"
    for index in range(len(options.mask)):
        context, target = (statistics.mean(draw[index][side] for draw in plan.draws) for side in (0, 1))
        yield f"  mask {index}", f"{context:.0f} context", f"{target:.0f} target"
    yield ("parameters, million",)
    for name in ("encoder", "target_encoder", "predictor"):
        yield f"  {name}", f"{costs.parameters(getattr(jepa, name)) / 1e6:.2f}"

    yield "TFLOP per step and GPU", "forward", "backward", "recomputed with checkpointing"
    for name, flops in {**plan.flops, "total FLOPs": total}.items():
        yield f"  {name}", *(f"{value / 1e12:.3f}" for value in (flops.forward, flops.backward, flops.recomputed))

    yield "  slowest GPU over the mean", f"{plan.imbalance:.3f}"

    steps = [plan.step(fsdp, checkpointing) for fsdp in (False, True) for checkpointing in (False, True)]
    yield "memory per GPU, GiB", *(str(step.strategy) for step in steps)
    for name in steps[0].memory:
        yield f"  {name}", *(f"{step.memory[name] / GIB:.2f}" for step in steps)
    totals = [sum(step.memory.values()) / GIB for step in steps]
    yield "  total memory", *(f"{total:.2f}" for total in totals)
    for name, factor in costs.RESERVED.items():
        yield f"  reserved, {name}", *(f"{total * factor:.2f}" for total in totals)

    yield "communication per step, GB", *(str(step.strategy) for step in steps)
    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        yield f"  {name}", *(f"{getattr(step.traffic, name) / 1e9:.4g}" for step in steps)
    for name, index in (("sent by each GPU", 0), ("of which to other nodes", 1)):
        yield f"  {name}", *(f"{step.sent[index] / 1e9:.4g}" for step in steps)

    yield "time", *(str(step.strategy) for step in steps)
    yield "  compute, ms", *(f"{step.compute * 1e3:.0f}" for step in steps)
    yield "  communication, ms", *(f"{step.communication * 1e3:.0f}" for step in steps)
    yield "  step, ms", *(f"{step.seconds * 1e3:.0f}" for step in steps)
    yield "  fraction of compute", *(f"{step.compute / step.seconds:.1%}" for step in steps)
    model_flops = total.forward + total.backward
    yield "  model FLOPs utilization", *(f"{model_flops / step.seconds / cluster.peak:.1%}" for step in steps)
    yield "  clips/s", *(f"{plan.global_clips / step.seconds:.0f}" for step in steps)
    if options.optimization.ipe is None:
        yield (
            "  GPU-hours of the run",
            "set optimization.ipe (by default an epoch is a pass over the files, which are not read here)",
        )
    else:
        count = options.optimization.schedule(options.optimization.ipe).last_step
        hours = [count * step.seconds / 3600 for step in steps]
        yield f"  hours for {count} steps", *(f"{value:.1f}" for value in hours)
        yield "  GPU-hours of the run", *(f"{value * cluster.gpus:.0f}" for value in hours)

    yield "input of all GPUs", *(str(step.strategy) for step in steps)
    yield "  uint8 clips, GB/s", *(f"{plan.global_clips * plan.clip_bytes / step.seconds / 1e9:.2f}" for step in steps)
    if (video := encoded_bytes(options, video_bits)) > 0:
        read = (plan.global_clips * video / step.seconds / 1e9 for step in steps)
        yield "  video files, GB/s", *(f"{value:.2f}" for value in read)


def main(argv: list[str] | None = None) -> None:
    arguments = command_line.parse(_parser(), argv)
    try:
        options = load(PRETRAINING, arguments.fname, arguments.overrides).options
        if not isinstance(options, Options):
            raise ConfigError(f"{arguments.fname}: app: the plan is for pretraining, app: vjepa")
        plan = Plan(options, _cluster(arguments, options))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(text_table(rows(plan, arguments.video_mbit * 1e6)))


def _parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser(
        "benchmarks.plan", __doc__.partition("\n")[0], options="[options]", configs=("pretrain",)
    )
    parser.add_argument("--nodes", type=_positive_int, default=1, help="number of nodes (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=_positive_int, default=8, help="GPUs per node (default: %(default)s)")
    parser.add_argument(
        "--peak-tflops",
        type=_positive_float,
        help="TFLOP/s of a GPU in its data sheet (default: H100 SXM, dense: 989 for 16-bit types, 67 for float32)",
    )
    parser.add_argument(
        "--tflops",
        type=_positive_float,
        help="TFLOP/s that a GPU achieves in training steps (default: 40%% of the peak; the pretraining of Llama 3 on "
        "H100 achieved 38 to 43%% in bfloat16, Grattafiori et al. 2024, table 4; smaller models achieve less, measure "
        "yours with python -m benchmarks step)",
    )
    parser.add_argument(
        "--bandwidth",
        type=_positive_float,
        default=50.0,
        help="GB/s that each GPU can send to other nodes (default: %(default)g, one 400 Gbit/s adapter per GPU, "
        "as in DGX H100)",
    )
    parser.add_argument(
        "--nvlink",
        type=_positive_float,
        default=450.0,
        help="GB/s that each GPU can send within its node (default: %(default)g, NVLink of H100 in one direction)",
    )
    parser.add_argument(
        "--video-mbit",
        type=_positive_float,
        default=1.0,
        help="bit rate of the videos in Mbit/s (default: %(default)g, typical of 340x256 pixels in H.264)",
    )
    return parser


def _cluster(arguments: argparse.Namespace, options: Options) -> Cluster:
    peak = arguments.peak_tflops or (67.0 if _dtype(options) == torch.float32 else 989.0)
    achieved = arguments.tflops or 0.4 * peak
    if achieved > peak:
        raise ConfigError(f"--tflops {achieved:g} exceeds the peak of {peak:g}; set --peak-tflops as well")
    rates = (achieved * 1e12, peak * 1e12, arguments.bandwidth * 1e9, arguments.nvlink * 1e9)
    return Cluster(arguments.nodes, arguments.gpus_per_node, *rates)


def _dtype(options: Options) -> torch.dtype:
    """Return the type of forward passes on the GPUs of the plan, which have bfloat16 instructions."""
    return torch.bfloat16 if options.meta.dtype == "auto" else getattr(torch, options.meta.dtype)


def _positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a positive integer")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}': expected a positive number")
    return value


if __name__ == "__main__":
    main()
