"""What programs require of encoders and predictors."""

from typing import Any

from torch import nn

from tubelet.grid import Grid


class Encoder(nn.Module):
    """Interface of encoders: `encoder(clips [B, C, T, H, W], masks) -> tokens`.

    The tokens are [B, N, D] in time-major order, with indices [B, K] of the tokens to keep [B, K, D], with a list of
    such masks a list of these. An encoder need not inherit from this class, only have its attributes.
    """

    accepts_masks: bool
    """Whether the encoder can drop tokens, as masked pretraining requires."""
    embed_dim: int
    """Width D of the tokens."""
    num_heads: int
    """Attention heads per block, by default also those of a predictor or probe."""
    levels: tuple[int, ...] = ()
    """Blocks whose normalized tokens `encoder(clips, masks, all_levels=True)` returns, concatenated in this order:
    [B, N, len(levels) * D] in place of [B, N, D]. The last one gives the usual tokens. Empty for an encoder without."""
    built_from: dict[str, Any]
    """Options and clip size as JSON types; set by `build_encoder`."""

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        """Return the token grid (t, h, w) of a clip.

        Raises:
            ValueError: Clips of this size cannot be cut into tokens.
        """
        raise NotImplementedError


class Predictor(nn.Module):
    """Interface of predictors: `predictor(context, target, masks_context, masks_target, mask_index) -> features`.

    The features are those at the target positions [B, Kt, D]. A predictor need not inherit from this class, only have
    its attributes; see `VisionTransformerPredictor.forward` for the arguments.
    """

    packs_masks: bool = False
    """Whether the arguments may be lists of tensors with an entry for each mask, so that one call, which returns a
    list, predicts the features of all masks; otherwise the predictor is called once for each mask."""
    use_mask_tokens: bool
    """Whether the input at a target position is a learned token; otherwise it is the noised target."""
    predictor_embed_dim: int
    """Width of the noise [B, Kt, predictor_embed_dim]; read only of a predictor with noised targets."""
    levels: int = 1
    """Number of levels of the encoder whose features are the input, concatenated."""
    predict_context: bool = False
    """Whether `predictor(…, return_context=True)` returns the pair of features at the target positions [B, Kt, D] and
    at the context positions [B, Kc, D]."""
    built_from: dict[str, Any]
    """Options and clip size as JSON types; set by `build_predictor`."""
    noise_steps: int
    """Number of time steps of the noise; read only of a predictor with noised targets."""
