"""Counter-based random numbers: every value is a hash of where it belongs, so none is stored or waits for another.

A *stream* is one purpose of random numbers ("when sessions end"), a *key* is one user's place in a stream, and
a *counter* numbers the draws under a key. The hash is SplitMix64 (Steele, Lea, Flood 2014): its state after n
steps from a seed s is s + n·GOLDEN, so the n-th draw needs no draw before it.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
F32 = npt.NDArray[np.float32]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)


def mix(z: U64) -> U64:
    """SplitMix64's output function, in place: a bijection of uint64 whose outputs look random."""
    shifted = z >> _S30
    z ^= shifted
    z *= _MIX_1
    np.right_shift(z, _S27, out=shifted)
    z ^= shifted
    z *= _MIX_2
    np.right_shift(z, _S31, out=shifted)
    z ^= shifted
    return z


def stream(seed: int, name: str) -> np.uint64:
    """The 64-bit start of a named stream; different names or seeds give unrelated streams."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def keys(start: np.uint64, ids: npt.NDArray[np.int64]) -> U64:
    """One key per id (user, item, …) in a stream."""
    return mix(ids.astype(np.uint64) * GOLDEN + start)


def draws(key: U64, counter: U64) -> U64:
    """The draw number `counter` under each key; shapes broadcast."""
    return mix(key + (counter + np.uint64(1)) * GOLDEN)


def parts16(bits: U64) -> npt.NDArray[np.uint16]:
    """Four independent 16-bit numbers per draw: shape `(n, 4)`."""
    return bits.view(np.uint16).reshape(-1, 4)


def parts32(bits: U64) -> npt.NDArray[np.uint32]:
    """Two independent 32-bit numbers per draw: shape `(n, 2)`."""
    return bits.view(np.uint32).reshape(-1, 2)


def uniform(bits32: npt.NDArray[np.uint32]) -> F32:
    """Uniform numbers of [0, 1) from 32-bit numbers (24 bits are kept: what float32 can hold)."""
    return (bits32 >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def normal(bits: U64) -> F32:
    """Standard normal numbers by Box and Muller, one per draw."""
    halves = parts32(bits)
    radius = np.sqrt(-2 * np.log1p(-uniform(halves[:, 0])))
    return (radius * np.cos(np.float32(2 * np.pi) * uniform(halves[:, 1]))).reshape(bits.shape)


def threshold16(probability: float) -> np.uint32:
    """The bound t for which a 16-bit number is below t with the given probability (in steps of 2^-16)."""
    return np.uint32(round(probability * 65536))
