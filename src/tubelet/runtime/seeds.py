"""Every random draw is a pure function of what it is for, so that a resumed run continues bit for bit."""

import hashlib

import torch


def seed_for(*key: int | str) -> int:
    """A 63-bit seed that depends on the whole key, e.g. `seed_for(run_seed, step, slot, "noise")`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by `seed_for(*key)`."""
    return torch.Generator(device).manual_seed(seed_for(*key))
