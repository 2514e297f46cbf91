"""Write small files of weights in the formats that users have, and compare what is loaded from them."""

from pathlib import Path

import torch

from tubelet.config.translation import to_canonical
from tubelet.grid import ClipShape
from tubelet.models import build_encoder, build_predictor
from tubelet.runtime import checkpoint
from tubelet.runtime.checkpoint import CheckpointState

DATA = {"crop_size": 32, "num_frames": 4, "patch_size": 8, "tubelet_size": 2}
SIZES = {"img_size": 32, "num_frames": 4, "patch_size": 8}
ROPE = {"use_rope": True, "rope_pairing": "vjepa2"}


def make(**section):
    """A small encoder, its moving average and predictor, with their section `model`."""
    section = {"model_name": "vit_tiny", "pred_depth": 2, "pred_embed_dim": 48, **section}
    section["encoder_args"] = {"depth": 2, **section.get("encoder_args", {})}
    options, clip = to_canonical({"model": section}, "vjepa"), ClipShape(**DATA)
    encoder, target = build_encoder(options["encoder"], clip), build_encoder(options["encoder"], clip)
    predictor = build_predictor(options["objective"]["predictor"], target, clip, num_mask_tokens=2)
    return options, encoder.eval(), target.eval(), predictor.eval()


def write_run(folder: Path, **section):
    """A run folder as training leaves it."""
    options, encoder, target, predictor = make(**section)
    config = {**options, "data": {**DATA, "batch_size": 2}, "folder": str(folder)}
    parts = {"encoder": encoder, "target_encoder": target, "predictor": predictor}
    state = CheckpointState({name: part.state_dict() for name, part in parts.items()}, {}, {"config": config})
    checkpoint.save(folder / "checkpoints", 7, state, keep=2)
    return encoder, target, predictor


def write_released(path: Path, positions: bool = True, **section):
    """A file as V-JEPA and V-JEPA 2 release theirs: wrapped names, fixed positions inside."""
    _, encoder, target, predictor = make(**section)

    def wrapped(module, name):
        state = dict(module.state_dict())
        if positions:
            state[name] = module.positions.pos_embed
        return {f"module.backbone.{key}": tensor for key, tensor in state.items()}

    content = {
        "encoder": wrapped(encoder, "pos_embed"),
        "target_encoder": wrapped(target, "pos_embed"),
        "predictor": wrapped(predictor, "predictor_pos_embed"),
        "opt": {"state": {}, "param_groups": []},
        "scaler": None,
        "epoch": 300,
        "loss": 0.5,
    }
    torch.save(content, path)
    return encoder, target, predictor


def clips():
    return torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def same_encoder(loaded, expected):
    torch.testing.assert_close(loaded.eval()(clips()), expected(clips()), atol=0, rtol=0)


def same_predictor(loaded, expected):
    context, target = torch.arange(10).repeat(2, 1), torch.arange(12, 30).repeat(2, 1)
    noise = {} if expected.use_mask_tokens else {"noise": torch.ones(2, 18, 48), "timestep": torch.tensor([3, 500])}
    features, targets = torch.randn(2, 10, 192), torch.randn(2, 18, 192)
    found, wanted = (model.eval()(features, targets, context, target, 1, **noise) for model in (loaded, expected))
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)
