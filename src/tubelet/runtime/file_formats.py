"""What kind of file a file of weights is, by its first bytes, for messages: the format and what to do."""

import zipfile
from pathlib import Path

SAVE = "torch.save({'encoder': encoder.state_dict()}, …)"
SAVE_PROBE = "torch.save({'classifier': probe.state_dict()}, …)"
_STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"\x89HDF", f"an HDF5 file, as Keras writes; load it with its library and write the state dict with {SAVE}"),
    (b"GGUF", f"a GGUF file; load it with its library and write the state dict with {SAVE}"),
    (b"\x1f\x8b", "compressed by gzip; unpack it with `gunzip` or `tar -xzf`"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard; unpack it with `unzstd`"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"\x93NUMPY", f"a NumPy array; load it with numpy and write the state dict with {SAVE}"),
)


def is_safetensors(path: Path) -> bool:
    """Whether the file starts like one of safetensors: the length of the header, then the header, which is JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000


def unreadable(path: Path) -> str:
    """Return why a file cannot be read as a file of weights: its format, and the remedy."""
    if not path.is_file():
        return "no such file"
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "the file is empty, as after an interrupted copy or a full disk; get it again"
    for magic, reason in _STARTS:
        if start.startswith(magic):
            return reason
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "an HTML or XML page, not weights: the server answered with a page, such as a login or an error. Open the "
            "address in a browser, and download the file itself"
        )
    if text.startswith((b"{", b"[")):
        return "JSON text, not weights; give the file of the weights beside it, or the folder of both"
    if start[257:262] == b"ustar":
        return "a tar archive, not a file of torch.save; unpack it with `tar -xf`, and give the file in it"
    if start.startswith(b"PK"):
        return _about_zip(path)
    if is_safetensors(path):
        return "a safetensors file that is cut short or damaged; get it again"
    if start.startswith(b"\x80"):
        return (
            "a pickle, in the format of torch.save before PyTorch 1.6, or not of torch. Where its origin is trusted, "
            "convert it: torch.save(torch.load(path, weights_only=True), new_path)"
        )
    if not start.strip(b"\0"):
        return "the file begins with zeros, as after an interrupted download; get it again"
    return f"no known format of weights (it begins with {start[:12]!r}); it takes files of torch.save and safetensors"


def _about_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, EOFError):
        return "the file is cut short or damaged: its list of contents, at the end, is missing; get it again"
    inside = [name.partition("/")[2] for name in names]
    if "constants.pkl" in inside:
        return (
            "a TorchScript archive, which holds code. Where its origin is trusted, write its weights: "
            "torch.save({'encoder': torch.jit.load(path).state_dict()}, new_path)"
        )
    if "data.pkl" in inside:
        return (
            "a file of torch.save with other Python objects than tensors, such as a whole module, which would run "
            f"code, or damaged. In the program that wrote it, write the weights alone: {SAVE}"
        )
    if names and all(name.endswith(".npy") for name in names):
        return f"an .npz archive of NumPy; load it with numpy and write the state dict with {SAVE}"
    return f"a zip archive, not a file of torch.save (it holds {', '.join(names[:3]) or 'nothing'}); unpack it"
