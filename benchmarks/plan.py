"""How large is a pretraining: parameters, FLOPs, memory, bytes sent, time; without a GPU, in seconds.

    python -m benchmarks.plan --fname configs/pretrain/vjepa_vith16.yaml --nodes 16 --gpus-per-node 8 [key.path=value …]

Numbers of tokens are those of the masks that the run draws in its first steps. The formulas are in costs.py.
"""

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from app.vjepa.options import Options, Schedule
from app.vjepa.train import build_jepa
from benchmarks import costs
from benchmarks.costs import FP32, Flops, Strategy, Tokens
from tubelet.config import ConfigError
from tubelet.data.randomness import Purpose, generator
from tubelet.models.jepa import JEPA
from tubelet.models.vision_transformer import VisionTransformer
from tubelet.runtime.launch import Package, load

PRETRAINING = Package("app", key="app", module="train")
STEPS_SAMPLED = 32
GIB = 2**30
SOURCE_FPS = 30  # of the files, where the configuration counts frames


@dataclass(frozen=True)
class Cluster:
    """GPUs and their rates: FLOP/s, bytes/s. `flops`: reached in whole steps; `peak`: of the data sheet."""

    nodes: int
    gpus_per_node: int
    flops: float
    peak: float
    bandwidth: float
    nvlink: float

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def seconds_to_send(self, sent: float) -> float:
        """`sent` bytes of each GPU in rings that leave a node once for each of its GPUs, each by its own adapter."""
        inside = sent / self.nvlink if self.gpus_per_node > 1 else 0.0
        between = sent / self.gpus_per_node / self.bandwidth if self.nodes > 1 else 0.0
        return max(inside, between)


@dataclass(frozen=True)
class Step:
    """Expected seconds of a step under one strategy, and the part of them that the GPUs compute."""

    strategy: Strategy
    memory: dict[str, float]
    traffic: costs.Traffic
    computing: float
    sending: float
    seconds: float


class Plan:
    """What the configuration `options` costs on `cluster`. Raises ConfigError for an encoder that has no formula."""

    def __init__(self, options: Options, cluster: Cluster):
        self.options, self.cluster = options, cluster
        with torch.device("meta"):
            self.jepa = build_jepa(options)
        if not isinstance(self.jepa.encoder, VisionTransformer):
            raise ConfigError(
                f"model.encoder: the plan has formulas for vision_transformer, not for {options.model.encoder}; "
                "plan with a model_name of vision_transformer of about the same width and depth"
            )
        data = options.data
        self.clips = data.batch_size * data.num_clips
        self.global_clips = self.clips * cluster.gpus
        self.draws = draw_tokens(options, self.global_clips)
        self.flops = mean_flops(self.jepa, self.clips, self.draws)

    @property
    def total_flops(self) -> Flops:
        """Of a GPU in a step."""
        return sum(self.flops.values(), Flops())

    @property
    def clip_bytes(self) -> int:
        """Of a clip as uint8."""
        return 3 * self.options.data.num_frames * self.options.data.crop_size**2

    def step(self, fsdp: bool, checkpointing: bool) -> Step:
        options, cluster, total = self.options, self.cluster, self.total_flops
        parts = options.optimization.accumulation_steps
        strategy = Strategy(fsdp, checkpointing, cluster.gpus, options.dtype.itemsize)
        traffic = costs.traffic(self.jepa, strategy, len(options.mask), parts)
        sending = cluster.seconds_to_send(traffic.sent(cluster.gpus))
        work = total.forward + total.backward + (total.recomputed if checkpointing else 0)
        computing = work / cluster.flops
        if fsdp:
            seconds = max(computing, sending)
        else:
            # A gradient is sent when all masks have added to it: while the encoder's last backward pass goes on.
            last = statistics.mean(
                costs.encoder_flops(self.jepa.encoder, draw[0].context).backward for draw in self.draws
            )
            seconds = computing + max(0.0, sending - last * self.clips / parts / cluster.flops)
        memories = (
            costs.memory(self.jepa, strategy, self.clips, parts, FP32 * self.clip_bytes, draw)
            for draw in set(self.draws)
        )
        memory = max(memories, key=lambda rows: sum(rows.values()))
        return Step(strategy, memory, traffic, computing, sending, seconds)


def draw_tokens(options: Options, global_clips: int) -> list[tuple[Tokens, ...]]:
    """Tokens under each mask in the run's first steps, in the first of the groups that masks are drawn for."""
    masks, together = options.mask_collator(), options.data.mask_batch_size or global_clips
    draws = []
    for step in range(STEPS_SAMPLED):
        pairs = masks.sample_masks(together, generator(options.meta.seed, Purpose.MASKS, step, 0))
        draws.append(tuple(Tokens(context.shape[1], target.shape[1]) for context, target in zip(*pairs, strict=True)))
    return draws


def mean_flops(jepa: JEPA, clips: int, draws: list[tuple[Tokens, ...]]) -> dict[str, Flops]:
    """Of a GPU's `clips` clips, averaged over steps."""
    steps = [costs.step_flops(jepa, clips, draw) for draw in draws]
    return {part: sum((step[part] for step in steps), Flops()) * (1 / len(steps)) for part in steps[0]}


def encoded_bytes(options: Options, bits_per_second: float) -> float:
    """Bytes of video file that a clip spans; 0 for images."""
    data = options.data
    if data.clip_duration is not None:
        seconds = data.clip_duration
    elif data.fps is not None:
        seconds = data.num_frames / data.fps
    else:
        seconds = data.num_frames * (data.sampling_rate or 0) / SOURCE_FPS
    return seconds * bits_per_second / 8


def lines(plan: Plan, video_bits: float) -> Iterator[tuple[str, ...]]:
    """The table, cell by cell; a line of one cell is a heading."""
    options, cluster, jepa, total = plan.options, plan.cluster, plan.jepa, plan.total_flops
    grid = jepa.encoder.grid
    yield (
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs, {plan.clips} clips each, {plan.global_clips} clips a step",
    )
    yield "dtype", options.meta.dtype
    yield "tokens of a clip", f"{grid[0]} x {grid[1]} x {grid[2]} = {jepa.encoder.num_patches}"
    for index in range(len(options.mask)):
        context, target = (statistics.mean(draw[index][side] for draw in plan.draws) for side in (0, 1))
        yield f"  mask {index}", f"{context:.0f} context", f"{target:.0f} target"
    yield ("parameters, million",)
    for name in ("encoder", "target_encoder", "predictor"):
        yield f"  {name}", f"{costs.parameters(getattr(jepa, name)) / 1e6:.2f}"

    yield "TFLOP of a step and GPU", "forward", "backward", "recomputed with checkpointing"
    for name, flops in {**plan.flops, "sum of FLOPs": total}.items():
        yield f"  {name}", *(f"{value / 1e12:.3f}" for value in (flops.forward, flops.backward, flops.recomputed))

    steps = [plan.step(fsdp, checkpointing) for fsdp in (False, True) for checkpointing in (False, True)]
    yield "memory of a GPU, GiB", *(str(step.strategy) for step in steps)
    for name in steps[0].memory:
        yield f"  {name}", *(f"{step.memory[name] / GIB:.2f}" for step in steps)
    yield "  sum of memory", *(f"{sum(step.memory.values()) / GIB:.2f}" for step in steps)

    yield "GB a step", *(str(step.strategy) for step in steps)
    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        yield f"  {name}", *(f"{getattr(step.traffic, name) / 1e9:.4g}" for step in steps)
    sent = [step.traffic.sent(cluster.gpus) for step in steps]
    yield "  sent by each GPU", *(f"{value / 1e9:.4g}" for value in sent)
    between = cluster.gpus_per_node if cluster.nodes > 1 else math.inf
    yield "  of it to other nodes", *(f"{value / between / 1e9:.4g}" for value in sent)

    yield "time", *(str(step.strategy) for step in steps)
    yield "  computing, ms", *(f"{step.computing * 1e3:.0f}" for step in steps)
    yield "  sending, ms", *(f"{step.sending * 1e3:.0f}" for step in steps)
    yield "  step, ms", *(f"{step.seconds * 1e3:.0f}" for step in steps)
    yield "  share spent computing", *(f"{step.computing / step.seconds:.1%}" for step in steps)
    model_flops = total.forward + total.backward
    yield "  model FLOPs, of peak", *(f"{model_flops / step.seconds / cluster.peak:.1%}" for step in steps)
    yield "  clips/s", *(f"{plan.global_clips / step.seconds:.0f}" for step in steps)
    if options.optimization.ipe is None:
        yield (
            "  GPU-hours of the run",
            "set optimization.ipe: else a pass over the files decides, which are not read here",
        )
    else:
        count = Schedule(options.optimization, options.optimization.ipe).steps
        hours = [count * step.seconds / 3600 for step in steps]
        yield f"  hours of {count} steps", *(f"{value:.1f}" for value in hours)
        yield "  GPU-hours of the run", *(f"{value * cluster.gpus:.0f}" for value in hours)

    yield "read by all GPUs", *(str(step.strategy) for step in steps)
    yield "  uint8 clips, GB/s", *(f"{plan.global_clips * plan.clip_bytes / step.seconds / 1e9:.2f}" for step in steps)
    if (video := encoded_bytes(options, video_bits)) > 0:
        read = (plan.global_clips * video / step.seconds / 1e9 for step in steps)
        yield "  video files, GB/s", *(f"{value:.2f}" for value in read)


def aligned(rows: Iterator[tuple[str, ...]]) -> str:
    """Rows of cells as text with columns of equal width."""
    rows = list(rows)
    columns = itertools.zip_longest(*(row for row in rows if len(row) > 1), fillvalue="")
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.partition("\n")[0])
    parser.add_argument("--fname", required=True, help="the YAML file of a pretraining")
    parser.add_argument("--nodes", type=_whole, default=1)
    parser.add_argument("--gpus-per-node", type=_whole, default=8)
    parser.add_argument(
        "--peak-tflops",
        type=_positive,
        help="TFLOP/s of the GPU's data sheet (default: H100 SXM, dense: 989 for 16-bit types, 67 for float32)",
    )
    parser.add_argument(
        "--tflops",
        type=_positive,
        help="TFLOP/s that a GPU reaches in whole steps (default: 40%% of the peak: Llama 3's pretraining on H100 had "
        "38 to 43%% in bfloat16, Grattafiori et al. 2024, table 4; smaller models reach less: measure yours with "
        "python -m benchmarks step)",
    )
    parser.add_argument(
        "--bandwidth",
        type=_positive,
        default=50.0,
        help="GB/s that each GPU can send to other nodes (default: %(default)g, an adapter of 400 Gbit/s for each GPU, "
        "as DGX H100 has)",
    )
    parser.add_argument(
        "--nvlink",
        type=_positive,
        default=450.0,
        help="GB/s that each GPU can send within its node (default: %(default)g, H100's NVLink in one direction)",
    )
    parser.add_argument(
        "--video-mbit",
        type=_positive,
        default=1.0,
        help="Mbit/s of the encoded videos (default: %(default)g, about that of 340x256 pixels in h264)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replaces a value of the file")
    arguments = parser.parse_intermixed_args(argv)
    try:
        options = load(PRETRAINING, arguments.fname, arguments.overrides).options
        if not isinstance(options, Options):
            raise ConfigError(f"{arguments.fname}: app: the plan is for pretraining, app: vjepa")
        plan = Plan(options, _cluster(arguments, options))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(aligned(lines(plan, arguments.video_mbit * 1e6)))


def _cluster(arguments: argparse.Namespace, options: Options) -> Cluster:
    peak = arguments.peak_tflops or (67.0 if options.dtype == torch.float32 else 989.0)
    reached = arguments.tflops or 0.4 * peak
    if reached > peak:
        raise ConfigError(f"--tflops {reached:g} is above the peak of {peak:g}; set --peak-tflops too")
    rates = (reached * 1e12, peak * 1e12, arguments.bandwidth * 1e9, arguments.nvlink * 1e9)
    return Cluster(arguments.nodes, arguments.gpus_per_node, *rates)


def _whole(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': give a whole number from 1 on")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}': give a number above zero")
    return value


if __name__ == "__main__":
    main()
