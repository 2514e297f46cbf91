"""Whatever file is given: a result, or a message that names the format and the remedy, never another exception."""

import json
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.hub.weight_files import make, same_encoder, write_released, write_run
from tubelet import hub
from tubelet.config import UserError

LOADERS = [hub.load_encoder, hub.load_predictor, hub.load_probe, hub.read_parts]


def save(content, **options):
    return lambda path: torch.save(content, path, **options)


def text(content):
    return lambda path: path.write_bytes(content)


def cut(share):
    def write(path):
        write_released(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return write


def torchscript(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")


def tar(path):
    (path.parent / "readme.txt").write_text("hello")
    with tarfile.open(path, "w") as file:
        file.add(path.parent / "readme.txt", "readme.txt")


def npz(path):
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3))


def cut_safetensors(path):
    save_file({"patch_embed.proj.weight": torch.ones(8, 3, 2, 4, 4)}, path)
    path.write_bytes(path.read_bytes()[:-100])


X = torch.ones(2)
FILES = {
    "empty": (text(b""), "file is empty.*get it again"),
    "page": (text(b"\n<!DOCTYPE html><html><body>Sign in</body></html>"), "HTML or XML page.*download"),
    "lfs": (text(b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"), "Git LFS.*git lfs pull"),
    "json": (text(b'{"model_type": "vjepa2"}'), "JSON text, not weights; give the file"),
    "plain text": (text(b"hello, world"), "no known format"),
    "zeros": (text(bytes(5000)), "begins with zeros"),
    "gzip": (text(b"\x1f\x8b\x08 and more"), "gzip; unpack"),
    "hdf5": (text(b"\x89HDF\r\n\x1a\n and more"), "HDF5"),
    "zip": (archive, "zip archive, not a file of torch.save .it holds readme.txt.; unpack"),
    "tar": (tar, "tar archive.*unpack"),
    "npz": (npz, "npz archive"),
    "torchscript": (torchscript, "TorchScript archive.*torch.jit.load"),
    "old pickle": (save({"encoder": {"a": X}}, _use_new_zipfile_serialization=False), "before PyTorch 1.6.*convert"),
    "cut in half": (cut(0.5), "cut short or damaged.*get it again"),
    "cut at the end": (cut(0.999), "cut short or damaged.*get it again"),
    "cut at the start": (cut(0.0001), "cut short or damaged.*get it again"),
    "cut safetensors": (cut_safetensors, "safetensors file that is cut short"),
    "other safetensors": (lambda path: save_file({"a": X}, path), "holds a. Write torch.save"),
    "module": (save(torch.nn.Linear(2, 2)), "whole module.*state_dict"),
    "list": (save([{"a": X}]), "holds a list, not a dictionary.*torch.save"),
    "tensor": (save(X), "holds a Tensor"),
    "number": (save(3), "holds a int"),
    "nothing": (save(None), "holds a NoneType"),
    "no entries": (save({}), "holds nothing"),
    "None": (save({"encoder": None}), r"holds encoder \(None\)"),
    "all None": (
        save({"encoder": None, "target_encoder": None, "predictor": None, "classifier": None}),
        "None|no state",
    ),
    "entry is a list": (save({"encoder": [X], "classifiers": []}), r"encoder \(list\)|no list"),
    "entry is a tensor": (save({"target_encoder": X, "classifier": X}), r"a tensor \[2\]|no state dict"),
    "empty entry": (save({"encoder": {}, "classifier": {}}), "empty dict|missing"),
    "numbers as names": (save({0: {"a": X}, "encoder": {1: X}}), r"holds 0, encoder \(dict\)"),
    "mixed entry": (save({"encoder": {"a": X, "n": 3}}), r"encoder \(dict\)"),
    "other encoder": (save({"encoder": {"conv1.weight": X}, "predictor": {"fc.weight": X}}), "not the weights of"),
    "scalar kernel": (save({"encoder": {"patch_embed.proj.weight": X}}), "not the weights of a vision"),
    "predictor alone": (save({"predictor": {"predictor_norm.weight": X}}), "without the encoder"),
    "nested": (save({"state_dict": {"encoder.patch_embed.proj.weight": X}, "epoch": 3}), "holds state_dict, epoch"),
    "configuration is text": (save({"encoder": {"a": X}, "config": "lr"}), "config is a str"),
    "probe without layers": (save({"classifier": {"a": X}, "encoder": {"a": X}}), "missing|not the weights"),
    "probe of scalars": (save({"classifier": {"linear.weight": X}, "config": {}}), "shape|no encoder"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_hold_no_weights_are_named(tmp_path, kind):
    write, message = FILES[kind]
    path = tmp_path / "weights.pt"
    write(path)
    texts = []
    for load in LOADERS:
        with pytest.raises(UserError, match="weights.pt") as failure:
            load(path)
        texts.append(str(failure.value).replace("\n", " "))
    assert re.search(message, texts[0]), texts[0]


def test_the_configuration_of_another_program_is_named(tmp_path):
    torch.save({"encoder": {"a": X}, "config": {"lr": 3}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt: the configuration in it lacks `encoder`"):
        hub.load_encoder(tmp_path / "a.pt")


@pytest.mark.parametrize("prefix", ["_orig_mod.module.backbone.", "module._orig_mod.backbone.", "backbone.module.", ""])
def test_prefixes_of_wrappers_in_any_order(tmp_path, prefix):
    _, encoder, *_ = make(use_rope=True, rope_pairing="vjepa2")
    state = {prefix + name.replace("blocks.0.", "blocks.0._orig_mod."): x for name, x in encoder.state_dict().items()}
    torch.save({"ema_encoder": state}, tmp_path / "a.pt")
    same_encoder(hub.load_encoder(tmp_path / "a.pt", num_heads=3, use_rope=True), encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * torch.nan, "of .*a.pt: .* has numbers that are not finite"),
        (lambda x: (100 * x).to(torch.int8), "of .*a.pt: .* is of type int8, not of floating point"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(tmp_path, change, message):
    _, encoder, _, predictor = make(use_rope=True, rope_pairing="vjepa2", pred_num_heads=4)
    parts = {"encoder": encoder.state_dict(), "predictor": predictor.state_dict()}
    for name in parts:
        changed = {key: change(x) if key.endswith("norm1.weight") else x for key, x in parts[name].items()}
        torch.save({**parts, name: changed}, tmp_path / "a.pt")
        load = hub.load_encoder if name == "encoder" else hub.load_predictor
        with pytest.raises(UserError, match=message):
            load(tmp_path / "a.pt", num_heads=3, use_rope=True, pred_num_heads=4)
    with pytest.raises(UserError, match=message.removeprefix("of .*")):
        hub.read_parts(tmp_path / "a.pt", {"predictor": predictor})


def test_options_that_do_not_fit_together_are_an_error_of_the_arguments(tmp_path):
    write_run(tmp_path)
    with pytest.raises(UserError, match=r"step-00000007: out_layers \[7\]: with depth 2 the layers are 0 to 1"):
        hub.load_encoder(tmp_path, out_layers=[7])


def test_two_weights_of_one_name_are_refused(tmp_path):
    torch.save({"encoder": {"module.a": X, "a": X}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="two weights have the name a"):
        hub.load_encoder(tmp_path / "a.pt")


@pytest.mark.parametrize("form", ["flat", "model", "safetensors"])
def test_the_state_dict_of_an_encoder_alone_is_read(tmp_path, form):
    _, encoder, *_ = make(use_rope=True, rope_pairing="vjepa2")
    path = tmp_path / "encoder.pt"
    if form == "safetensors":
        save_file(encoder.state_dict(), path)
    else:
        torch.save(encoder.state_dict() if form == "flat" else {"model": encoder.state_dict(), "epoch": 3}, path)
    same_encoder(hub.load_encoder(path, num_heads=3, use_rope=True), encoder)


def test_files_of_folders_name_the_folder(tmp_path):
    write_run(tmp_path / "run", use_rope=True, rope_pairing="vjepa2")
    with pytest.raises(UserError, match="part of a checkpoint of Tubelet; give its folder, .*step-00000007"):
        hub.load_encoder(tmp_path / "run" / "checkpoints" / "step-00000007" / "weights.safetensors")
    hub.export(tmp_path / "run", tmp_path / "exported")
    with pytest.raises(UserError, match="of transformers; give its folder, with config.json"):
        hub.load_encoder(tmp_path / "exported" / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{not json", "not valid JSON"),
        ("[]", "model_type is 'list'"),
        (json.dumps({"model_type": "vjepa2", "hidden_size": "wide"}), "hidden_size"),
        (json.dumps({"model_type": "vjepa2", "num_hidden_layers": 3, "hidden_size": 96}), "does not match"),
    ],
)
def test_folders_of_transformers_that_are_damaged(tmp_path, change, message):
    write_run(tmp_path / "run", use_rope=True, rope_pairing="vjepa2")
    hub.export(tmp_path / "run", tmp_path / "exported")
    (tmp_path / "exported" / "config.json").write_text(change)
    with pytest.raises(UserError, match=message):
        hub.load_encoder(tmp_path / "exported")


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_mutated_files_load_or_are_refused(tmp_path, kind):
    """500 random changes of bytes: cut, overwritten with zeros, or replaced."""
    _, encoder, *_ = make(use_rope=True, rope_pairing="vjepa2", encoder_args={"embed_dim": 24, "depth": 1})
    path = tmp_path / "weights.pt"
    if kind == "pt":
        torch.save({"encoder": encoder.state_dict(), "epoch": 3}, path)
    else:
        save_file(encoder.state_dict(), path)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    loaded, messages = 0, []
    for number in range(250):
        data = bytearray(whole)
        # the structure is at the start and at the end
        at = int(random.integers(3000)) if number % 2 else len(data) - 1 - int(random.integers(3000))
        length = int(random.integers(1, 40))
        if number % 5 == 0:
            data = data[:at]
        elif number % 5 == 1:
            data[at : at + length] = bytes(min(length, len(data) - at))
        else:
            data[at : at + length] = random.bytes(min(length, len(data) - at))
        path.write_bytes(data)
        try:
            hub.load_encoder(path, num_heads=3, use_rope=True)
            loaded += 1
        except UserError as error:
            messages.append(str(error))
    assert loaded + len(messages) == 250
    assert all("weights.pt" in message for message in messages)
