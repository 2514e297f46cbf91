"""Checks of sizes that must be compatible."""


def head_width(dim: int, num_heads: int) -> int:
    """Return the width of one attention head, `dim / num_heads`.

    Raises:
        ValueError: If `num_heads` does not divide `dim`.
    """
    if num_heads < 1 or dim % num_heads:
        divisors = [n for n in range(1, min(dim, 64) + 1) if dim % n == 0]
        raise ValueError(f"{num_heads} heads do not divide the width {dim}; choose one of {divisors}")
    return dim // num_heads
