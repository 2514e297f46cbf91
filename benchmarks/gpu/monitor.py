"""The price of the feature statistics that a pretraining computes at intervals."""

from app.vjepa import train
from benchmarks import noise
from benchmarks.gpu import steps
from benchmarks.gpu.session import Session


def feature_monitor(session: Session, fname: str) -> None:
    """Measure the statistics of the features, also as a share of the training time between two of them."""
    options, batches, _ = steps.prepare(session, fname)
    if session.tiny:
        options = options.model_copy(update={"logging": options.logging.model_copy(update={"monitor_clips": 4})})
    every, clips = options.logging.monitor_every, options.logging.monitor_clips

    def measure() -> dict[str, object]:
        with session.device:
            trainer = noise.make_trainer(options, session.world)
        monitor = train.feature_monitor(options, session.world)
        monitor.make_dataset = lambda: noise.NoiseClips(options, clips)
        encoder = next(iter(trainer.objective.encoders().values()))
        first = session.milliseconds(lambda: monitor.measure(encoder))  # reads the clips
        duration = session.median_milliseconds(lambda: monitor.measure(encoder), calls=1 if session.tiny else 3)
        trainer.train_step(batches[0])
        step = session.median_milliseconds(lambda: trainer.train_step(batches[0]), calls=1 if session.tiny else 5)
        share = duration / (duration + every * step)
        return {
            "milliseconds": duration,
            "first_milliseconds": first,
            "note": f"{share:.1%} of the time with {every} steps of {step:.0f} ms in between",
            "details": {"share_of_time": share, "step_ms": step},
            **session.memory(),
        }

    session.attempt(f"feature statistics of {clips} clips", measure)
