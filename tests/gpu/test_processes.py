"""Several processes, or the process group of one, on a single GPU."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from benchmarks import noise
from tubelet.runtime.distributed import World, free_address

pytestmark = pytest.mark.gpu


def test_ddp_with_nccl_on_one_gpu(gpu, run):
    """NCCL's all-reduce of one process changes nothing."""
    if not dist.is_nccl_available():
        pytest.skip("torch is built without NCCL")
    single = run("vjepa", gpu, "meta.dtype=float32")
    batch = single.batches[0]
    wrapped_run = run("vjepa", gpu, "meta.dtype=float32", folder="wrapped")
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=free_address(), rank=0, world_size=1)
    try:
        wrapped_run.trainer.model = DistributedDataParallel(wrapped_run.trainer.objective, gradient_as_bucket_view=True)
        losses = [float(r.trainer.forward_backward(batch, len(batch))["loss"]) for r in (single, wrapped_run)]
        torch.cuda.synchronize()
    finally:
        dist.destroy_process_group()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    pairs = zip(single.trainer.objective.parameters(), wrapped_run.trainer.objective.parameters(), strict=True)
    for p, q in pairs:
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6)


def test_two_processes_with_gloo_on_one_gpu(device, run, tmp_path):
    """Two processes with half of the clips each take the steps of one process; NCCL refuses to share a GPU."""
    options = run("vjepa", device, "meta.dtype=float32", "objective.std_coeff=0", "objective.cov_coeff=0").options
    whole = [float(loss) for loss in _losses(options, World(0, 1, device))]
    data = options.data.model_copy(update={"batch_size": options.data.batch_size // 2})
    half = copy.copy(options).model_copy(update={"data": data, "folder": str(tmp_path / "two")})
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(_be_rank, (half, str(device), free_address(), results), nprocs=2)
    together = torch.tensor([results[0], results[1]]).mean(0).tolist()
    assert together == pytest.approx(whole, rel=1e-3)


def _be_rank(rank, options, device, address, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        results[rank] = _losses(options, World(rank, 2, torch.device(device)))
    finally:
        dist.destroy_process_group()


def _losses(options, world):
    trainer = noise.make_trainer(options, world)
    return [float(trainer.train_step(batch)["loss"]) for batch in noise.batches(options, world, 3)]
