"""Sizes that have to go together."""


def head_width(dim: int, num_heads: int) -> int:
    """`dim / num_heads`; raises ValueError when it is no whole number."""
    if num_heads < 1 or dim % num_heads:
        divisors = [n for n in range(1, min(dim, 64) + 1) if dim % n == 0]
        raise ValueError(f"{num_heads} heads do not divide the width {dim}; take one of {divisors}")
    return dim // num_heads


def token_grid(num_frames: int, height: int, width: int, tubelet_size: int, patch_size: int) -> tuple[int, int, int]:
    """Tokens along time, rows and columns of a clip; raises ValueError where patches or tubelets do not fill it."""
    if min(height, width) < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"{height}x{width} pixels cannot be cut into patches of {patch_size}; crop to a multiple of the patch size"
        )
    if num_frames < 1 or num_frames % tubelet_size:
        raise ValueError(
            f"{num_frames} frames cannot be cut into tubelets of {tubelet_size}; "
            "take a multiple of the tubelet size (an image can be repeated)"
        )
    return num_frames // tubelet_size, height // patch_size, width // patch_size
