"""Videos into batches of uint8 clips.

A `SampleStream` gives the draws of each step, a data set turns a `Draw` into a `Sample`, and a loader stacks samples
and adds masks: a `Batch`. Each is a pure function of the seed and its arguments. So a resumed run has nothing to
replay, and the number of workers changes nothing.

Adding a format: a data set of another layout is a module with a class `Dataset`, found by the module's name in the
configuration. The programs construct and use it like this:

    dataset = Dataset(data, transform, seed=seed, on_error="replace" | "raise" | "exclude")
    len(dataset)          number of samples
    dataset[draw]         a `Sample`, a pure function of `seed`, `draw.epoch` and `draw.index`
    dataset.paths         path (or another unique name) of each sample
    dataset.labels        class of each sample, -1 where it has none
    dataset.classes       names of the classes, or an empty list
    dataset.sizes         number of samples of each entry of `data.datasets`, in the order of the samples
    dataset.cumulative_durations
                          with `data.weight_by_duration`, for each entry: seconds of each sample and all before it
    dataset.unreadable    index -> reason, to which the loader adds samples that crashed or blocked a worker

Draws that need random numbers take them from `runtime.seeds.numpy_generator`, never from a global generator. A sample
that cannot be used raises `VideoError` or follows `on_error`. Most formats subclass `video_dataset.Dataset`, which does
all of this, and override one of its methods:

    find_samples(entry)       which samples an entry of `data.datasets` has        (image_dataset, kth, moving_mnist)
    open(path)                opens the `Video` of a sample, e.g. from an archive  (kth)
    read_views(path, rng)     reads clips in another way                           (image_dataset, moving_mnist)
    targets(index)            further targets: vectors, text, dense arrays

Example: captions in text files next to the videos, as text targets of `batch.targets["caption"]`:

    class Dataset(video_dataset.Dataset):
        def targets(self, index):
            caption = Path(self.paths[index]).with_suffix(".txt").read_text()
            return {**super().targets(index), "caption": caption}
"""

from tubelet.data.normalize import to_float
from tubelet.data.options import NORMALIZATION, AugConfig, DataConfig, DataFormat, Decoder, MaxBadFraction, ViewOptions
from tubelet.data.streams import evenly_spaced
from tubelet.data.types import BadFile, Batch, Draw, Sample, VideoError

__all__ = [
    "NORMALIZATION",
    "AugConfig",
    "BadFile",
    "Batch",
    "DataConfig",
    "DataFormat",
    "Decoder",
    "Draw",
    "MaxBadFraction",
    "Sample",
    "VideoError",
    "ViewOptions",
    "evenly_spaced",
    "to_float",
]
