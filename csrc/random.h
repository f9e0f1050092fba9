// Philox4x32-10 and the normal deviates of the noise, bit for bit those of dave_fast/sampling/philox.py.
//
//   words(block, sample, stream)  = Philox(counter = (block, sample, stream, 0), key)
//   u = (word + ½)·2⁻³²      r = √(-2 ln u_even)      θ = 2π·u_odd      deviates r·cos θ, r·sin θ
//
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The order of the operations and the
// coefficients are those of the Python file, and must be changed in both.
#pragma once

#include "numerics.h"

namespace dave::DAVE_ISA {

constexpr uint32_t noise_stream = 1;

// Replaces the counter's four words with the result.
DAVE_HD void philox4x32(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
#ifndef __CUDACC__
#pragma GCC unroll 10
#else
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// ln u for u > 0 that is not subnormal, by u = (1 + f)·2ᵉ with 1 + f in [√½, √2).
DAVE_HD float ln(float u) {
  constexpr float tail_of[] = {0.33333316f, -0.25000796f, 0.20002283f, -0.16624969f,
                               0.1418142f,  -0.13125296f, 0.12879199f, -0.078654446f};
  const int32_t exponent = static_cast<int32_t>(bits_of(u) - 0x3F3504F3u) >> 23;
  const float f = sub(number_of(bits_of(u) - (static_cast<uint32_t>(exponent) << 23)), 1.0f);
  const float e = static_cast<float>(exponent);
  const float square = mul(f, f);
  const float tail = add(mul(mul(horner(f, tail_of, 8), f), square), mul(e, -2.1219444e-4f));
  return add(add(f, sub(tail, mul(square, 0.5f))), mul(e, 0.693359375f));
}

// cos θ and sin θ for θ = 2π·(word + ½)·2⁻³², reduced exactly to the nearest quarter turn.
DAVE_HD void cos_sin_of_turns(uint32_t word, float& cosine, float& sine) {
  constexpr float sin_quarter[] = {1.5707964f, -0.6459635f, 0.07968023f, -0.004602177f};
  constexpr float cos_quarter[] = {1.0f, -1.2337005f, 0.2536692f, -0.020860072f, 0.0009036317f};
  const uint32_t quarter = (word + (1u << 29)) >> 30;
  const float rest = static_cast<float>(static_cast<int32_t>(word - (quarter << 30)));
  const float y = mul(add(rest, 0.5f), 0x1p-30f);
  const float square = mul(y, y);
  const uint32_t s = bits_of(mul(horner(square, sin_quarter, 4), y));
  const uint32_t c = bits_of(horner(square, cos_quarter, 5));
  const uint32_t swap = 0u - (quarter & 1u);
  // the sign bit: cosine is negative in the quarters 1 and 2, sine in 2 and 3
  cosine = number_of(((c & ~swap) | (s & swap)) ^ (((quarter + 1u) & 2u) << 30));
  sine = number_of(((s & ~swap) | (c & swap)) ^ ((quarter & 2u) << 30));
}

DAVE_HD void box_muller(uint32_t even, uint32_t odd, float& first, float& second) {
  const float u = mul(add(static_cast<float>(even), 0.5f), 0x1p-32f);
  const float radius = root(mul(ln(u), -2.0f));
  float cosine, sine;
  cos_sin_of_turns(odd, cosine, sine);
  first = mul(radius, cosine);
  second = mul(radius, sine);
}

// The four deviates of one block: elements 4·block … 4·block + 3 of a row.
DAVE_HD void normal_block(uint32_t block, uint32_t sample, uint32_t key_low, uint32_t key_high, float& first,
                          float& second, float& third, float& fourth) {
  uint32_t w0 = block, w1 = sample, w2 = noise_stream, w3 = 0;
  philox4x32(w0, w1, w2, w3, key_low, key_high);
  box_muller(w0, w1, first, second);
  box_muller(w2, w3, third, fourth);
}

}  // namespace dave::DAVE_ISA
