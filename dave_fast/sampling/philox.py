"""Counter-based random numbers: Philox4x32-10, and normal deviates that have the same bits in every backend.

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011) for Philox; Steele et al.,
"Fast splittable pseudorandom number generators" (OOPSLA 2014) for splitmix64; Box and Muller (1958).

A number is a function of (key, counter) alone; no generator of torch is read or set. `csrc/random.h` is the same
arithmetic in C++: every float32 multiplication and addition of the normal deviates is rounded separately and in the
same order, so a change must be made in both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# Polynomials fitted to the named functions, lowest power first; each float32 coefficient is exact as written.
# (ln(1 + f) - f + f²/2) / f³ on [√½ - 1, √2 - 1], to 6e-9 of ln(1 + f)
LN_TAIL = (0.33333316, -0.25000796, 0.20002283, -0.16624969, 0.1418142, -0.13125296, 0.12879199, -0.078654446)
# sin(π/2·y)/y and cos(π/2·y) in y² on [-½, ½], to 5e-9
SIN_QUARTER = (1.5707964, -0.6459635, 0.07968023, -0.004602177)
COS_QUARTER = (1.0, -1.2337005, 0.2536692, -0.020860072, 0.0009036317)
# ln 2 in two parts; the first has nine bits, so that its product with an exponent is exact
LN2_HIGH, LN2_LOW = 0.693359375, -2.1219444e-4
SQRT_HALF_BITS = 0x3F3504F3


def splitmix64(value: int) -> int:
    """Return splitmix64, a 64-bit mixing function, of an integer taken modulo 2⁶⁴."""
    mask = 0xFFFFFFFFFFFFFFFF
    z = (value + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def philox4x32(counter: Sequence[Tensor | int], key: Sequence[Tensor | int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of Philox4x32-10, as int64 tensors.

    Args:
        counter: four words, int64 tensors (values below 2³²) or ints, broadcast against each other.
        key: two words, as the counter's.
    """
    # int64 products wrap modulo 2⁶⁴, which keeps all the bits that are needed.
    c0, c1, c2, c3 = (torch.as_tensor(word) for word in counter)
    k0, k1 = (torch.as_tensor(word) for word in key)
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def uniform(words: Tensor) -> Tensor:
    """Return uniform numbers in (0, 1), float64, exactly (word + ½)·2⁻³²."""
    return (words.double() + 0.5) * 2.0**-32


def normal(keys: Tensor, samples: Tensor, n_elements: int, *, stream: int = 1) -> Tensor:
    """Return standard normal deviates of the noise: element e of a row is a function of (key, sample, e).

    Element e is number e mod 4 of block e div 4; words (0,1) and (2,3) of a block give the Box-Muller pairs r·cos θ,
    r·sin θ with r = √(-2 ln u_even), θ = 2π·u_odd.

    Args:
        keys: (R, 2) int64, on the device of the result; taken modulo 2³², as samples are.
        samples: (R,) int64, on the same device.
        n_elements: elements of a row.
        stream: word 2 of the counter.

    Returns:
        (R, n_elements) float32.
    """
    n_blocks = (n_elements + 3) // 4
    deviates = torch.empty(len(samples), 4 * n_blocks, dtype=torch.float32, device=keys.device)
    # On a CPU the temporaries of a chunk should stay in the cache; on a GPU launches should be few.
    rows = max(1, (1 << 15 if keys.device.type == "cpu" else 1 << 22) // max(n_blocks, 1))
    blocks = torch.arange(n_blocks, device=keys.device)
    keys, samples = keys & WORD, samples & WORD
    for start in range(0, len(samples), rows):
        part = slice(start, start + rows)
        words = philox4x32((blocks, samples[part, None], stream, 0), (keys[part, :1], keys[part, 1:]))
        pairs = (*box_muller(words[0], words[1]), *box_muller(words[2], words[3]))
        deviates[part] = torch.stack(pairs, dim=-1).flatten(1)
    return deviates[:, :n_elements]


def box_muller(even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
    """Return r·cos θ and r·sin θ of two tensors of words, in float32."""
    uniforms = (even.float() + 0.5) * 2.0**-32
    # PyTorch's float32 square root on CPUs is up to an ulp off; that of float64, rounded, is correct.
    radius = torch.sqrt((_ln(uniforms) * -2.0).double()).float()
    cosine, sine = _cos_sin_of_turns(odd)
    return radius * cosine, radius * sine


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


def _ln(u: Tensor) -> Tensor:
    """Return ln u for normal float32 u > 0, by u = (1 + f)·2ᵉ with 1 + f in [√½, √2)."""
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e = exponent.float()
    square = f * f
    tail = _horner(f, LN_TAIL) * f * square + e * LN2_LOW
    return (f + (tail - square * 0.5)) + e * LN2_HIGH


def _cos_sin_of_turns(words: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos θ and sin θ for θ = 2π·(word + ½)·2⁻³², reduced exactly to the nearest quarter turn."""
    quarter = (words + (1 << 29)) >> 30
    y = ((words - (quarter << 30)).float() + 0.5) * 2.0**-30
    square = y * y
    sine = _horner(square, SIN_QUARTER) * y
    cosine = _horner(square, COS_QUARTER)
    odd_quarter = (quarter & 1).bool()
    cos = torch.where(odd_quarter, sine, cosine)
    sin = torch.where(odd_quarter, cosine, sine)
    return torch.where(((quarter + 1) & 2).bool(), -cos, cos), torch.where((quarter & 2).bool(), -sin, sin)
