// The grid that runs a CUDA kernel's body: the blocks of a device, or block by block and thread by thread on a host, so
// that tests and sanitizers on a CPU cover the indices, tails and networks that run on a GPU.
//
// A kernel is a struct of its arguments with `threads` a block, `resident` blocks that a multiprocessor must
// have registers for, `shared_bytes`, `name`, blocks(), and a body
//     template <class Block> DAVE_DEVICE void operator()(Block& block) const
// in phases: block.each(f) runs f(thread) for all threads, block.sync() ends a phase. Data that outlives a phase is in
// shared memory. block.pairs(f) runs f(pair, lanes) for every two neighbouring threads, which exchange values by `Lanes`.
#pragma once

#include "kernels.h"

#ifdef __CUDACC__
#define DAVE_DEVICE __device__ __forceinline__
#else
#define DAVE_DEVICE inline
#endif

namespace dave::DAVE_ISA {

// n / divisor for n < 2³¹, by a multiplication. Source: Granlund and Montgomery, "Division by invariant integers using
// multiplication" (PLDI 1994).
struct Divider {
  uint32_t divisor, multiplier, shift;

  explicit Divider(int64_t by) : divisor(static_cast<uint32_t>(by)), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }
  DAVE_HD uint32_t quotient(uint32_t n) const {
    return (static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> 32) + n) >> shift;
  }
  // The quotient; n becomes the remainder.
  DAVE_HD uint32_t split(uint32_t& n) const {
    const uint32_t q = quotient(n);
    n -= q * divisor;
    return q;
  }
};

// The number of blocks for which the 65,536 registers of a multiprocessor suffice.
constexpr int blocks_with(int threads, int registers) { return 65536 / (threads * registers); }

constexpr int64_t blocks_of(int64_t n, int64_t a_block) { return (n + a_block - 1) / a_block; }

// `count` values, aligned for a single access of up to 16 bytes.
template <typename T, int count>
struct alignas(sizeof(T) * count < 16 ? sizeof(T) * count : 16) Pack {
  T values[count];
};

template <typename From, typename T, int count>
DAVE_DEVICE void store_pack(const T* from, void* to, int64_t offset) {
  Pack<From, count> pack;
  DAVE_UNROLL
  for (int i = 0; i < count; ++i) put(pack.values[i], from[i]);
  *reinterpret_cast<Pack<From, count>*>(static_cast<From*>(to) + offset) = pack;
}

// Stores `count` values at element `offset`, a multiple of count.
template <int count, typename T>
DAVE_DEVICE void store_run(const T* from, Output to, int64_t offset) {
  switch (to.dtype) {
    case Dtype::float32: return store_pack<float, T, count>(from, to.data, offset);
    case Dtype::float64: return store_pack<double, T, count>(from, to.data, offset);
    case Dtype::bfloat16: return store_pack<bfloat16, T, count>(from, to.data, offset);
    case Dtype::float16: return store_pack<float16, T, count>(from, to.data, offset);
  }
}

#ifdef __CUDACC__

// `n` values of each of two neighbouring threads, lane 0 and lane 1.
template <typename T, int n>
struct Lanes {
  T mine[n];

  static DAVE_DEVICE int lane() { return threadIdx.x & 1; }
  static DAVE_DEVICE T partners(T value) { return __shfl_xor_sync(0xFFFFFFFFu, value, 1); }

  // f(lane, its values)
  template <class F>
  DAVE_DEVICE void each(const F& f) {
    f(lane(), mine);
  }
  // values[i] = f(values[i], the partner's values[i])
  template <class F>
  DAVE_DEVICE void exchange(const F& f) {
    DAVE_UNROLL
    for (int i = 0; i < n; ++i) mine[i] = f(mine[i], partners(mine[i]));
  }
  // lane 0's values[i], in both lanes
  DAVE_DEVICE T of_first_lane(int i) const {
    const T theirs = partners(mine[i]);
    return lane() == 0 ? mine[i] : theirs;
  }
  // The largest of min(lane 0's values[i], lane 1's values[n - 1 - i]), in both lanes.
  DAVE_DEVICE T largest_of_mirrored_minima() const {
    T largest = 0;
    DAVE_UNROLL
    for (int i = 0; i < n / 2; ++i) largest = larger_of(smaller_of(mine[i], partners(mine[n - 1 - i])), largest);
    return larger_of(largest, partners(largest));
  }
};

struct DeviceBlock {
  unsigned char* memory;

  DAVE_DEVICE int64_t index() const { return blockIdx.x; }
  template <typename T>
  DAVE_DEVICE T* shared() const {
    return reinterpret_cast<T*>(memory);
  }
  template <class F>
  DAVE_DEVICE void each(const F& f) const {
    f(static_cast<int>(threadIdx.x));
  }
  template <class L, class F>
  DAVE_DEVICE void pairs(const F& f) const {
    L lanes;
    f(static_cast<int>(threadIdx.x >> 1), lanes);
  }
  DAVE_DEVICE void sync() const { __syncthreads(); }
};

DAVE_DEVICE void atomic_max(uint32_t* at, uint32_t value) { atomicMax(at, value); }
DAVE_DEVICE void atomic_max(uint64_t* at, uint64_t value) {
  atomicMax(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}

#else

template <typename T, int n>
struct Lanes {
  T both[2][n];

  template <class F>
  void each(const F& f) {
    for (int lane = 0; lane < 2; ++lane) f(lane, both[lane]);
  }
  template <class F>
  void exchange(const F& f) {
    for (int i = 0; i < n; ++i) {
      const T a = both[0][i], b = both[1][i];
      both[0][i] = f(a, b), both[1][i] = f(b, a);
    }
  }
  T of_first_lane(int i) const { return both[0][i]; }
  T largest_of_mirrored_minima() const {
    T largest = 0;
    for (int lane = 0; lane < 2; ++lane)
      for (int i = 0; i < n / 2; ++i)
        largest = larger_of(smaller_of(both[lane][i], both[1 - lane][n - 1 - i]), largest);
    return largest;
  }
};

struct HostBlock {
  int64_t number;
  int threads;
  unsigned char* memory;

  int64_t index() const { return number; }
  template <typename T>
  T* shared() const {
    return reinterpret_cast<T*>(memory);
  }
  template <class F>
  void each(const F& f) const {
    for (int thread = 0; thread < threads; ++thread) f(thread);
  }
  template <class L, class F>
  void pairs(const F& f) const {
    for (int pair = 0; pair < threads / 2; ++pair) {
      L lanes;
      f(pair, lanes);
    }
  }
  void sync() const {}
};

inline void atomic_max(uint32_t* at, uint32_t value) { *at = value > *at ? value : *at; }
inline void atomic_max(uint64_t* at, uint64_t value) { *at = value > *at ? value : *at; }

#endif

}  // namespace dave::DAVE_ISA
