"""Compile the runtime for the installed torch, once for each version of either."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import torch

from tubelet.config import UserError
from tubelet.runtime.files import cache_folder, replacing

SOURCE = Path(__file__).with_name("runtime.cpp")
LIBRARY = "libcuda.so.1"  # torch needs this name; the runtime and cuBLAS are found in it because it is preloaded
NVML = "libnvidia-ml.so.1"
# Libraries of torch that call the runtime, and those that call the driver.
TORCH_LIBRARIES = ("c10_cuda", "torch_cuda", "torch_cuda_linalg", "torch_python", "caffe2_nvrtc")
PREFIXES = ("cuda", "__cuda", "cublas", "cu")
# Real libraries, which are installed with torch and work without a GPU.
REAL = ("cusolver", "cusparse", "cufft", "curand", "cudnn", "cupti", "cutensor", "cufile")


class CannotBuild(UserError):
    """The runtime cannot be built here."""


def build() -> Path:
    """Return the folder of the compiled library.

    Raises:
        CannotBuild: No compiler, no CUDA build of torch, no headers, or an error of the compiler.
    """
    if torch.version.cuda is None:
        raise CannotBuild(f"torch {torch.__version__} is built without CUDA")
    if missing := [tool for tool in ("g++", "nm") if shutil.which(tool) is None]:
        raise CannotBuild(f"{' and '.join(missing)} not found: install g++ and binutils")
    key = hashlib.sha256(SOURCE.read_bytes() + Path(__file__).read_bytes() + torch.__version__.encode()).hexdigest()
    folder = cache_folder() / "pretended_gpu" / key[:16]
    if not (folder / LIBRARY).exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / NVML).is_symlink():
            (folder / NVML).symlink_to(LIBRARY)
        _compile(folder)
    return folder


def _compile(folder: Path) -> None:
    includes = [f"-I{path}" for path in _header_folders()]
    stubs, runtime = folder / "stubs.cpp", folder / "runtime.o"
    options = ["-O1", "-fPIC", "-std=c++17", "-w"]
    _run("g++", *options, *includes, "-c", str(SOURCE), "-o", str(runtime))
    lines = ['extern "C" void pretended_gpu_called(const char*);']
    for name in sorted(_needed() - _symbols(runtime, "--defined-only")):
        lines.append(f'extern "C" int {name}() {{ return pretended_gpu_called("{name}"), 0; }}')
    stubs.write_text("\n".join(lines) + "\n")
    with replacing(folder / LIBRARY) as temporary:
        linking = ["-shared", f"-Wl,-soname,{LIBRARY}", "-ldl", "-lpthread"]
        _run("g++", *options, str(runtime), str(stubs), "-o", str(temporary), *linking)


def _needed() -> set[str]:
    """Return the functions of CUDA and cuBLAS that torch calls."""
    folder = Path(torch.__file__).parent / "lib"
    libraries = [folder / f"lib{name}.so" for name in TORCH_LIBRARIES]
    names = set().union(*(_symbols(library, "-D", "--undefined-only") for library in libraries if library.exists()))
    return {name for name in names if name.startswith(PREFIXES) and not name.startswith(REAL) and name.isidentifier()}


def _symbols(path: Path, *options: str) -> set[str]:
    lines = _run("nm", *options, str(path)).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line.strip()}


def _header_folders() -> list[Path]:
    """Return folders with CUDA's headers: those of the packages that torch installs, and those of a toolkit."""
    packages = Path(torch.__file__).parents[1]
    candidates = [*packages.glob("nvidia/cu*/include"), packages / "triton/backends/nvidia/include"]
    candidates += sorted(Path("/usr/local").glob("cuda*/include"))
    found = [path for path in candidates if (path / "cuda_runtime_api.h").exists()]
    if not any((path / "crt/host_defines.h").exists() for path in found):
        raise CannotBuild("CUDA's headers (cuda_runtime_api.h) are in none of " + ", ".join(map(str, candidates)))
    return found


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotBuild(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout
