"""The cost model compared with what torch counts during a step."""

import re
import weakref
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from app.vjepa.options import Options
from benchmarks import costs, plan
from tests import processes
from tubelet import objectives
from tubelet.config.translation import to_canonical
from tubelet.data import Batch
from tubelet.layers import attention
from tubelet.objectives import vjepa
from tubelet.objectives.vjepa import VJEPA
from tubelet.runtime.distributed import World
from tubelet.runtime.parallelize import DistributedConfig, parallelize
from tubelet.training.objective import StepRng
from tubelet.training.optimizer import adamw

ROOT = Path(__file__).parents[2]
CLIPS = 3
MLP = {"model_name": "vit_tiny"}
SWIGLU = {"model_name": "vit_tiny", "use_silu": True, "use_rope": True}
DIFFUSION = {"use_mask_tokens": False}
MODELS = {"mlp": MLP, "swiglu": SWIGLU, "mlp-diffusion": MLP | DIFFUSION, "swiglu-diffusion": SWIGLU | DIFFUSION}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
each_checkpointing = pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])


class Case:
    """A small model and one batch: 2x4x4 tokens per clip, two masks, three encoder and two predictor blocks."""

    def __init__(self, model: dict, checkpointing: bool = False, clips: int = CLIPS):
        model = model | {"encoder_args": {"depth": 3}, "pred_depth": 2, "pred_embed_dim": 96, "pred_num_heads": 2}
        sizes = {"num_frames": 4, "tubelet_size": 2, "crop_size": 64, "patch_size": 16}
        raw = {
            "app": "vjepa",
            "folder": "none",
            "data": {"datasets": ["none"], "batch_size": clips, "sampling_rate": 1, **sizes},
            "mask": [{"spatial_scale": (scale, scale), "aspect_ratio": (0.75, 1.5)} for scale in (0.3, 0.6)],
            "model": model | {"use_activation_checkpointing": checkpointing},
        }
        self.options = Options.model_validate(to_canonical(raw))
        self.jepa = build_objective(self.options)
        self.clips = torch.randn(clips, 3, 4, 64, 64)
        _, self.contexts, self.targets = self.options.mask_collator()([0] * clips)
        pairs = zip(self.contexts, self.targets, strict=True)
        self.tokens = [costs.Tokens(context.shape[1], target.shape[1]) for context, target in pairs]

    def loss(self, model: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            index = torch.arange(len(self.clips))
            batch = Batch({"clip": self.clips}, {}, index, ("",) * len(index), index, 0)
            batch = batch.with_masks(self.contexts, self.targets)
            return (model or self.jepa)(batch, StepRng(0, 0, 0))["loss"]


def build_objective(options: Options) -> VJEPA:
    return objectives.build(options.objective, options.setup(schedule_steps=1))


def test_block_parameters_equal_timm():
    with torch.device("meta"):
        peer = timm.create_model("vit_large_patch16_224")
    options = plan.load(plan.PRETRAINING, str(ROOT / "configs/pretrain/vjepa_vitl16.yaml"), []).options
    with torch.device("meta"):
        jepa = build_objective(options)
    assert costs.parameters(jepa.encoder.blocks) == costs.parameters(peer.blocks)


@each_checkpointing
@each_model
def test_flops(model, checkpointing):
    case = Case(model, checkpointing)
    # Other kernels recompute the logits in the backward pass.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = case.loss()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        loss.backward()
    flops = sum(costs.step_flops(case.jepa, CLIPS, case.tokens).values(), costs.Flops())
    assert forward.get_total_flops() == pytest.approx(flops.forward, rel=0.005)
    expected = flops.backward + (flops.recomputed if checkpointing else 0)
    assert backward.get_total_flops() == pytest.approx(expected, rel=0.005)


@pytest.fixture
def attention_of_gpus(monkeypatch):
    """Attention in the type of its inputs; on CPUs it is computed in fp32."""
    monkeypatch.setattr(
        attention, "attention", lambda q, k, v, attend=F.scaled_dot_product_attention, **o: attend(q, k, v, **o)
    )


# With rotary positions autocast on the CPU computes norms in bfloat16, unlike on a GPU.
@pytest.mark.parametrize(
    ("model", "dtype"),
    [(MLP, torch.bfloat16), (MLP | DIFFUSION, torch.bfloat16), (SWIGLU, torch.float32), (MLP, torch.float32)],
)
@pytest.mark.parametrize("num_masks", [1, 2])
@pytest.mark.usefixtures("attention_of_gpus")
def test_saved_activations(model, dtype, num_masks):
    case, saved = Case(model), {}
    case.contexts, case.targets, case.tokens = (x[:num_masks] for x in (case.contexts, case.targets, case.tokens))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage  # kept alive, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case.loss(dtype=dtype)
    for parameter in case.jepa.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    measured = sum(storage.nbytes() for storage in saved.values())
    expected = costs.encoder_saved(case.jepa, dtype.itemsize, False, case.tokens)
    expected += costs.predictor_saved(case.jepa, dtype.itemsize, False, case.tokens)
    cast = costs.cast_weights(case.jepa) * dtype.itemsize if dtype == torch.bfloat16 else 0
    assert measured - cast == pytest.approx(CLIPS * expected, rel=0.01)


class PeakMemory(TorchDispatchMode):
    """`peak` is the maximum of the bytes of live tensors created within the context."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in inputs and storage not in self.seen:
                self.seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return outputs

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


@pytest.mark.slow
@pytest.mark.usefixtures("attention_of_gpus")
@each_checkpointing
@pytest.mark.parametrize("clips", [3, 24], ids=["mostly gradients", "mostly activations"])
@pytest.mark.parametrize(
    ("model", "dtype"), [(MLP, torch.bfloat16), (MLP | DIFFUSION, torch.float32), (SWIGLU, torch.float32)]
)
def test_peak_memory_of_a_step(model, dtype, clips, checkpointing, monkeypatch):
    # The normalized clips are listed by themselves in `costs.memory`.
    monkeypatch.setattr(vjepa, "to_float", lambda clips, mean, std: clips)
    case = Case(model, checkpointing, clips)
    jepa, optimizer = case.jepa, adamw([case.jepa.encoder, case.jepa.predictor], lr=1e-3, weight_decay=0.1)

    def step():
        case.loss(dtype=dtype).backward()
        optimizer.step()
        optimizer.zero_grad()
        jepa.on_update(0)

    step()  # creates the moments of AdamW
    with PeakMemory() as measured:
        step()
    strategy = costs.Strategy(False, checkpointing, 1, dtype.itemsize)
    expected = sum(costs.transient_memory(jepa, strategy, clips, 1, case.tokens))
    # Temporary buffers of single layers, which the formula ignores, matter most in a small model.
    assert measured.peak == pytest.approx(expected, rel=0.1 if clips > 3 else 0.25)


@each_model
def test_communication_of_ddp(model):
    processes.run(compare_communication_of_ddp, model, 1)


def compare_communication_of_ddp(model, world):
    case, sent = Case(model), []

    def count(_state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent.append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    wrapped = DistributedDataParallel(case.jepa)
    wrapped.register_comm_hook(None, count)
    case.loss(wrapped).backward()
    expected = costs.traffic(case.jepa, costs.Strategy(False, False, 2, 4), parts=1)
    assert sum(sent) == expected.all_reduce


class CollectiveBytes(TorchDispatchMode):
    """Bytes of the full tensors in all-gathers, reduce-scatters and all-reduces."""

    def __init__(self):
        super().__init__()
        self.all_gather = self.reduce_scatter = self.all_reduce = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.c10d._allgather_base_.default:
            self.all_gather += args[0].nbytes
        if function is torch.ops.c10d._reduce_scatter_base_.default:
            self.reduce_scatter += args[1].nbytes
        if function is torch.ops.c10d.allreduce_.default:
            self.all_reduce += sum(tensor.nbytes for tensor in args[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "sharding",
    [{}, {"reshard_after_forward": True}, {"shard_size": 2}],
    ids=["kept weights", "resharded weights", "two copies"],
)
@each_checkpointing
@each_model
def test_communication_of_fsdp(model, checkpointing, sharding):
    # In a process of its own: DTensor keeps meshes of the fake group in its cache.
    processes.run(compare_communication_of_fsdp, (model, checkpointing, sharding), 1)


def compare_communication_of_fsdp(arguments, world):
    model, checkpointing, sharding = arguments
    case, parts = Case(model, checkpointing), 2
    expected = costs.traffic(case.jepa, costs.Strategy(True, checkpointing, 4, 2, **sharding), parts)
    config = DistributedConfig(kind="fsdp", **sharding)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    parallelize(case.jepa, list(case.jepa.parts().values()), config, World(0, 4), torch.bfloat16)
    with CollectiveBytes() as measured:
        for _ in range(parts):
            case.loss(dtype=torch.bfloat16).backward()
    assert measured.all_gather == pytest.approx(expected.all_gather, rel=0.02)
    assert measured.reduce_scatter == pytest.approx(expected.reduce_scatter, rel=0.02)
    assert measured.all_reduce == pytest.approx(expected.all_reduce, rel=0.02)


def table(capsys, *arguments: str) -> dict[str, list[str]]:
    """Return the printed cells of each row by its first cell; columns are separated by two spaces."""
    plan.main(["--fname", str(ROOT / "configs/pretrain/vitt16.yaml"), *arguments])
    lines = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    return {name: cells for name, *cells in lines}


def test_times_follow_from_the_rates(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    rates = ("--nodes", "2", "--gpus-per-node", "4", "--tflops", "1", "data.batch_size=8", "optimization.ipe=100")
    cells = table(capsys, *rates)
    forward, backward, recomputed = (float(cell) for cell in cells["total FLOPs"])
    seconds = [float(cell) / 1e3 for cell in cells["compute, ms"]]
    assert seconds == pytest.approx([forward + backward, forward + backward + recomputed] * 2, rel=0.01)
    assert float(cells["clips/s"][0]) == pytest.approx(64 / seconds[0], rel=0.02)
    # With a very slow network the step takes the time of communication; a quarter of it leaves the node.
    slow = table(capsys, *rates, "--bandwidth", "1e-3")
    gigabytes = [float(cell) for cell in slow["of which to other nodes"]]
    communication = [float(cell) / 1e3 for cell in slow["communication, ms"]]
    assert communication == pytest.approx([g / 1e-3 for g in gigabytes], rel=0.05)
    trained = sum(float(cells[part][0]) * 1e6 for part in ("encoder", "predictor"))
    assert gigabytes[0] == pytest.approx(2 * 7 / 8 * 4 * trained / 4 / 1e9, rel=0.05)


def test_copies_of_the_model_in_nodes_reduce_only_shards_between_them(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ("--nodes", "2", "--gpus-per-node", "4", "distributed.kind=fsdp")
    ddp, _, together, _ = table(capsys, *arguments)["of which to other nodes"]
    cells = table(capsys, *arguments, "distributed.shard_size=4")
    _, _, apart, _ = cells["of which to other nodes"]
    trained = sum(float(cells[part][0]) * 1e6 for part in ("encoder", "predictor"))
    # Each GPU all-reduces a quarter of the gradients with the one GPU of the other node that has the same shard.
    assert float(apart) == pytest.approx(2 * 1 / 2 * 4 * trained / 4 / 1e9, rel=0.01)
    assert float(ddp) == pytest.approx(2 * 7 / 8 * 4 * trained / 4 / 1e9, rel=0.01)
    gathered = sum(float(cells[name][2]) for name in ("all_gather", "reduce_scatter"))
    assert float(together) == pytest.approx(7 / 8 * gathered / 4, rel=0.01)
    # Of a model that is sharded over a node, a GPU has as much as of one that is sharded over four GPUs.
    alone = table(capsys, "--gpus-per-node", "4", "distributed.kind=fsdp")
    for name in ("weights", "AdamW moments", "gathered weights"):
        assert cells[name] == alone[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "expected a positive integer"),
        (["--tflops", "fast"], "expected a positive number"),
        (["--tflops", "2000"], "set --peak-tflops as well"),
        (["distributed.kind=fsdp", "distributed.shard_size=3"], "3 does not divide the 8 GPUs"),
        (["model.pred_depht=2"], "Did you mean 'pred_depth'"),
    ],
)
def test_invalid_arguments(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as error:
        table(capsys, *arguments)
    assert message in str(error.value) + capsys.readouterr().err


def test_the_slowest_process_sets_the_time(capsys, monkeypatch):
    """With masks for each process by itself, some have more tokens than others; the time is that of the slowest."""
    monkeypatch.chdir(ROOT)
    arguments = ("--nodes", "2", "--gpus-per-node", "4", "--tflops", "1", "data.batch_size=8", "optimization.ipe=100")
    together = table(capsys, *arguments)
    apart = table(capsys, *arguments, "data.mask_batch_size=8")
    assert float(together["slowest GPU over the mean"][0]) == 1
    options = plan.load(plan.PRETRAINING, "configs/pretrain/vitt16.yaml", ["data.batch_size=8"]).options
    options = options.model_copy(update={"data": options.data.model_copy(update={"mask_batch_size": 8})})
    with torch.device("meta"):
        jepa = build_objective(options)
    ratios = []
    for groups in plan.draw_tokens(options, 64):
        assert len(groups) == 8
        totals = [sum(costs.step_flops(jepa, 8, draw).values(), costs.Flops()) for draw in groups]
        operations = [total.forward + total.backward for total in totals]
        ratios.append(max(operations) * len(operations) / sum(operations))
    expected = sum(ratios) / len(ratios)
    assert float(apart["slowest GPU over the mean"][0]) == pytest.approx(expected, abs=1e-3)
    forward, backward, _ = (float(cell) for cell in apart["total FLOPs"])
    assert float(apart["compute, ms"][0]) / 1e3 == pytest.approx((forward + backward) * expected, rel=0.01)


def test_reserved_memory_is_above_the_total(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = table(capsys)
    total, default, expandable = (
        float(cells[name][0])
        for name in ("total memory", "reserved, default allocator", "reserved, expandable_segments")
    )
    assert total < expandable < default
