import importlib
import shutil
import sys

import pytest

from tests.docs.pages import ROOT, write_files
from tubelet.data.generated import Settings, write_dataset


def _forget():
    for module in [name for name in sys.modules if name.split(".")[0] == "ideas" or "effective_rank" in name]:
        del sys.modules[module]
    importlib.invalidate_caches()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the configurations and with the files of the pages' examples, as the working directory."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "configs", folder / "configs")
    write_files(folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    _forget()
    yield folder
    _forget()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Generated clips: the folder `pretrain` and labelled lists."""
    folder = tmp_path_factory.mktemp("clips")
    write_dataset(folder, Settings(clips=4, train=16, test=8, frames=8, size=32), processes=1)
    return folder
