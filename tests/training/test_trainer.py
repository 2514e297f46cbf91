"""The Trainer with an objective that it has never seen: a linear map of the mean color with a moving average."""

import copy
import json
import math
import signal

import pytest
import torch
from torch import nn

from tests.processes import run as run_on_processes
from tubelet.config import ConfigError, UserError
from tubelet.data import BadFile, Batch
from tubelet.data.bad_files import BadFiles, NoReplacement
from tubelet.runtime import checkpoint
from tubelet.runtime.distributed import World
from tubelet.training.callbacks import BadFileCheck, Callback, RunStopped
from tubelet.training.objective import Objective, StepRng, ema_update
from tubelet.training.options import LoggingConfig, MetaConfig, TrainingOptions
from tubelet.training.schedules import OptimizationConfig, Schedule
from tubelet.training.trainer import Trainer

STEPS, BATCH = 8, 12


class MeanColor(Objective):
    """Regress the label from the mean color; `average` is the EMA of `model`."""

    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.scale = scale

    def forward(self, batch, rng):
        noise = torch.tensor([seed % 1000 for seed in rng.clip_seeds(batch, "noise")]) / 1e4
        predicted = self.model(batch.clips.float().mean((2, 3, 4)) / 255)[:, 0] + noise
        return {"loss": self.scale * (predicted - batch.labels).square().mean()}

    def on_update(self, step):
        ema_update(self.average, self.model, 0.5)
        return {"momentum": 0.5}


def make_options(folder, logging=None, meta=None, **optimization):
    rates = {"lr": 0.1, "start_lr": 0.01, "final_lr": 0.0, "warmup": 2, "weight_decay": 0.1}
    return TrainingOptions(
        app="test",
        folder=str(folder),
        optimization=OptimizationConfig(**rates | optimization),
        meta=MetaConfig(**{"dtype": "float32"} | (meta or {})),
        logging=LoggingConfig(**{"log_every": 2} | (logging or {})),
    )


def batches(first=0, rank=0, world_size=1, last=STEPS):
    size = BATCH // world_size
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        clips = torch.randint(256, (BATCH, 3, 1, 2, 2), generator=generator, dtype=torch.uint8)
        labels = torch.arange(BATCH)
        rows = slice(rank * size, (rank + 1) * size)
        index = labels[rows]
        yield Batch({"clip": clips[rows]}, {"label": index}, index, ("",) * size, index, step)


def make_trainer(options, world=None, scale=1.0, objective=None):
    schedule = Schedule(options.optimization, STEPS)
    return Trainer(objective or MeanColor(scale), options, schedule, world or World(), global_batch=BATCH)


def train(options, world=None, callbacks=(), scale=1.0, objective=None):
    world = world or World()
    trainer = make_trainer(options, world, scale, objective)
    trainer.resume()
    trainer.fit(batches(trainer.step, world.rank, world.world_size), callbacks)
    return trainer


def final_weights(folder):
    return checkpoint.read_weights(checkpoint.newest(folder / "checkpoints"))


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_loss_update_and_average_are_those_of_a_plain_loop(tmp_path):
    train(make_options(tmp_path))
    objective = MeanColor()
    model, average = objective.model, objective.average
    optimizer = torch.optim.AdamW(
        [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
    )
    schedule = Schedule(make_options(tmp_path).optimization, STEPS)
    losses = []
    for step, batch in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step)
        loss = objective(batch, StepRng(0, step, 0))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for a, p in zip(average.parameters(), model.parameters(), strict=True):
            a.data = 0.5 * a.data + 0.5 * p.data
        losses.append(float(loss.detach()))
    assert [line["loss"] for line in log(tmp_path)] == pytest.approx(losses, rel=1e-5)
    for name, weight in final_weights(tmp_path)["average"].items():
        torch.testing.assert_close(weight, average.state_dict()[name])


def test_schedule_is_one_position_ahead_of_the_step():
    options = OptimizationConfig(lr=1.0, start_lr=0.0, final_lr=0.0, warmup=4, weight_decay=0.1, final_weight_decay=0.3)
    schedule = Schedule(options, last_step=8)
    assert [schedule.lr(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.lr(7) == pytest.approx(0.0)
    assert schedule.weight_decay(7) == pytest.approx(0.3)


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_accumulation_changes_nothing(tmp_path, parts):
    train(make_options(tmp_path / "one"))
    train(make_options(tmp_path / "parts", accumulation_steps=parts))
    losses = [[line["loss"] for line in log(tmp_path / name)] for name in ("one", "parts")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(("processes", "kind"), [(2, "ddp"), (3, "ddp"), (2, "fsdp")])
def test_several_processes_change_nothing(tmp_path, processes, kind):
    train(make_options(tmp_path / "one"))
    options = make_options(tmp_path / "several").model_dump() | {"distributed": {"kind": kind}}
    run_on_processes(train, TrainingOptions.model_validate(options), processes)
    losses = [[line["loss"] for line in log(tmp_path / name)] for name in ("one", "several")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer, batch, metrics):
        if trainer.step == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_resumed_run_is_bit_for_bit_the_straight_one(tmp_path):
    train(make_options(tmp_path / "straight"))
    with pytest.raises(SystemExit) as stop:
        train(make_options(tmp_path / "resumed"), callbacks=[StopAt(3)])
    assert stop.value.code == 128 + signal.SIGTERM
    assert checkpoint.read_metadata(checkpoint.newest(tmp_path / "resumed" / "checkpoints"))["step"] == 3
    train(make_options(tmp_path / "resumed"))
    weights = [final_weights(tmp_path / name) for name in ("straight", "resumed")]
    for part, tensors in weights[0].items():
        assert all(torch.equal(tensor, weights[1][part][name]) for name, tensor in tensors.items())
    assert [line["loss"] for line in log(tmp_path / "straight")] == [line["loss"] for line in log(tmp_path / "resumed")]


def test_checkpoints_of_milestones_are_kept_as_they_were(tmp_path):
    every = {"checkpoint_every_steps": 2, "keep_checkpoints": 2}
    train(make_options(tmp_path, logging={**every, "milestones": [2, 3]}))
    kept = checkpoint.find(tmp_path / "checkpoints")
    assert [checkpoint.step_of(path) for path in kept] == [2, 3, 6, 8]
    with pytest.raises(SystemExit):
        train(make_options(tmp_path / "stopped"), callbacks=[StopAt(3)])
    there, here = (checkpoint.read_weights(p) for p in (tmp_path / "stopped/checkpoints/step-00000003", kept[1]))
    assert all(torch.equal(weight, there["model"][name]) for name, weight in here["model"].items())


def test_nonfinite_updates_are_skipped_and_stop_the_run(tmp_path):
    options = make_options(tmp_path, logging={"max_nonfinite": 4})
    with pytest.raises(RunStopped, match="all updates since step 1 were skipped"):
        train(options, scale=float("inf"))
    weights = final_weights(tmp_path)["model"]
    assert all(torch.equal(tensor, MeanColor().model.state_dict()[name]) for name, tensor in weights.items())


def test_a_draw_that_no_video_can_replace_ends_the_run_with_a_checkpoint_and_the_list(tmp_path):
    def three_batches():
        yield from batches(last=3)
        raise NoReplacement("data.max_bad_fraction is exceeded:", (BadFile("a.mp4", "no video"),))

    trainer = make_trainer(make_options(tmp_path))
    with pytest.raises(NoReplacement, match=r"data.max_bad_fraction is exceeded:\n  a.mp4\tno video"):
        trainer.fit(three_batches(), [BadFileCheck(BadFiles(tmp_path / "bad_files.txt", 1.0))])
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path / "checkpoints")] == [3]
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "bad_files.txt").read_text() == "a.mp4\tno video\n"


def test_folder_with_a_run_is_refused_where_it_may_not_be_continued(tmp_path):
    train(make_options(tmp_path))
    with pytest.raises(ConfigError, match=r"meta.load_checkpoint=false, choose another folder"):
        make_trainer(make_options(tmp_path, meta={"load_checkpoint": False})).resume()


def forward_returning(terms):
    class Returns(MeanColor):
        def forward(self, batch, rng):
            return terms(super().forward(batch, rng)["loss"])

    return Returns()


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (lambda loss: loss, "forward returned Tensor; it has to be a dict of scalar tensors with the key 'loss'"),
        (lambda loss: {"los": loss}, "forward returned a dict with los; it has to be"),
        (lambda loss: {"loss": loss[None]}, r"returned a tensor of shape \(1,\) for 'loss'; it has to be a scalar"),
        (lambda loss: {"loss": 1.0}, "returned float for 'loss'; it has to be a scalar tensor"),
        (lambda loss: {"loss": loss, "extra": 1.0}, "returned float for 'extra'; it has to be a scalar tensor"),
        (lambda loss: {"loss": loss.detach()}, "depends on no trained parameter"),
        (lambda loss: {"loss": loss, "lr": loss.detach()}, "returned the key 'lr', which the log uses itself"),
    ],
)
def test_wrong_results_of_forward_are_explained(tmp_path, terms, message):
    options = make_options(tmp_path)
    trainer = Trainer(
        forward_returning(terms), options, Schedule(options.optimization, STEPS), World(), global_batch=BATCH
    )
    with pytest.raises(UserError, match=message):
        trainer.train_step(next(batches()))


class Unused(MeanColor):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)


def refuses_unused(options, world):
    trainer = Trainer(Unused(), options, Schedule(options.optimization, STEPS), world, global_batch=BATCH)
    with pytest.raises(UserError, match=r"does not use unused.weight, unused.bias\. With several processes"):
        trainer.train_step(next(batches(0, world.rank, world.world_size)))


def test_parameters_that_the_loss_does_not_use_are_named_with_several_processes(tmp_path):
    run_on_processes(refuses_unused, make_options(tmp_path), 2)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_parameters_and_buffers_outside_of_the_parts_are_refused(tmp_path, kind):
    objective = MeanColor()
    if kind == "parameter":
        objective.temperature = nn.Parameter(torch.ones(()))
    else:
        objective.register_buffer("temperature", torch.ones(()))
    options = make_options(tmp_path)
    with pytest.raises(UserError, match=r"MeanColor.parts\(\) lacks temperature"):
        Trainer(objective, options, Schedule(options.optimization, STEPS), World(), global_batch=BATCH)


def test_encoders_outside_of_the_parts_are_refused(tmp_path):
    class Renamed(MeanColor):
        def encoders(self):
            return {"encoder": self.model}

    options = make_options(tmp_path)
    with pytest.raises(UserError, match=r"Renamed.encoders\(\) has encoder, which its parts\(\) .* they are model"):
        Trainer(Renamed(), options, Schedule(options.optimization, STEPS), World(), global_batch=BATCH)


class DivergesAt(MeanColor):
    """The loss, or with `gradients` only its gradients, are NaN in the steps from `first` to `last`, from 1."""

    def __init__(self, first, last=STEPS, gradients=False):
        super().__init__()
        self.first, self.last, self.gradients = first, last, gradients

    def forward(self, batch, rng):
        loss = super().forward(batch, rng)["loss"]
        if not self.first <= rng.step + 1 <= self.last:
            return {"loss": loss}
        if self.gradients:
            weight = self.model.weight
            return {"loss": loss + (weight - weight.detach()).sum().abs().sqrt()}  # the root of 0 has no slope
        return {"loss": loss * math.nan}


def test_a_run_that_ends_with_a_loss_of_nan_is_an_error_also_when_started_again(tmp_path):
    for _ in range(2):
        with pytest.raises(RunStopped, match=r"since step 2 were skipped.*Lower optimization\.lr"):
            train(make_options(tmp_path), objective=DivergesAt(2))


def test_a_run_without_a_finite_gradient_is_an_error(tmp_path):
    with pytest.raises(RunStopped, match="since step 4 were skipped"):
        train(make_options(tmp_path), objective=DivergesAt(4, gradients=True))


def test_skipped_updates_at_the_end_are_a_warning_and_earlier_ones_are_not(tmp_path, caplog):
    train(make_options(tmp_path / "early"), objective=DivergesAt(2, 5))
    assert "skipped" not in caplog.text
    train(make_options(tmp_path / "late"), objective=DivergesAt(7, gradients=True))
    assert "all updates since step 7 were skipped" in caplog.text
