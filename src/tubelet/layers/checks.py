"""Sizes that have to go together."""


def head_width(dim: int, num_heads: int) -> int:
    """`dim / num_heads`; raises ValueError when it is no whole number."""
    if num_heads < 1 or dim % num_heads:
        divisors = [n for n in range(1, min(dim, 64) + 1) if dim % n == 0]
        raise ValueError(f"{num_heads} heads do not divide the width {dim}; take one of {divisors}")
    return dim // num_heads
