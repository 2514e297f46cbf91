"""Videos decoded on a GPU."""

import numpy as np
import pytest

from tubelet.config import ConfigError
from tubelet.data.decoders import check_decoder, open_video
from tubelet.data.options import Decoder

pytestmark = pytest.mark.gpu


@pytest.mark.usefixtures("gpu")
def test_frames_decoded_on_a_gpu_are_those_of_the_cpu(tmp_path):
    pytest.importorskip("av")
    from tubelet.data.generated import encode

    options = Decoder(name="torchcodec", device="cuda")
    try:
        check_decoder(options)
    except ConfigError as error:
        pytest.skip(str(error))
    y, x = np.mgrid[:256, :340]
    waves = [127 + 100 * np.sin(np.stack([x / 9 + t / 3, y / 7 - t / 5, (x + y) / 11], -1)) for t in range(60)]
    path = tmp_path / "v.mp4"
    encode(np.stack(waves).astype(np.uint8), path, fps=30)
    indices = np.array([0, 3, 17, 40, 59])
    on_gpu, on_cpu = (open_video(str(path), decoder).frames_at(indices) for decoder in (options, "pyav"))
    assert on_gpu.shape == on_cpu.shape
    assert np.abs(on_gpu.astype(int) - on_cpu).mean() < 4  # the GPU converts colors in its own way
