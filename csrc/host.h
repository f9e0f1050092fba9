// Helpers of the host drivers. They use no templates of the standard library: object files share instantiations, and the
// linker could keep one that was compiled for an instruction set that this machine lacks.
#pragma once

#include <cstdlib>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

namespace dave::DAVE_ISA {

// Memory for n values, aligned for vectors, freed at the end of the scope.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// A T for each thread, constructed before the threads start: an exception that leaves a parallel region, such as
// std::bad_alloc, would end the process.
template <typename T>
class PerThread {
 public:
  // delegates, so that the destructor runs where one of several constructions throws
  template <typename... Args>
  PerThread(int threads, const Args&... args) : PerThread(Room{threads}) {
    for (; made_ < threads; ++made_) new (items_ + made_) T(args...);
  }
  ~PerThread() {
    while (made_) items_[--made_].~T();
  }
  PerThread(const PerThread&) = delete;
  PerThread& operator=(const PerThread&) = delete;

  // The calling thread's item, in a parallel region of at most `threads` threads.
  T& mine() const {
#ifdef _OPENMP
    return items_[omp_get_thread_num()];
#else
    return items_[0];
#endif
  }

  // Calls f(the thread's item, task) for every task; each thread takes a run of neighbouring ones.
  template <typename F>
  void run(int64_t tasks, const F& f) const {
#pragma omp parallel num_threads(made_)
    {
      T& item = mine();
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tasks; ++task) f(item, task);
    }
  }
  // The same for tasks of unequal length: a thread that has finished its run takes tasks of the others'.
  template <typename F>
  void run_unequal(int64_t tasks, const F& f) const {
    Scratch<int64_t> next(made_);
    const auto start = [&](int64_t run) { return run * tasks / made_; };
    for (int run = 0; run < made_; ++run) next[run] = start(run);
#pragma omp parallel num_threads(made_)
    {
      T& item = mine();
#ifdef _OPENMP
      const int me = omp_get_thread_num();
#else
      const int me = 0;
#endif
      for (int i = 0; i < made_; ++i) {
        const int run = (me + i) % made_;
        for (;;) {
          int64_t task;
#pragma omp atomic capture
          task = next[run]++;
          if (task >= start(run + 1)) break;
          f(item, task);
        }
      }
    }
  }

 private:
  struct Room {
    int threads;
  };
  explicit PerThread(Room room) : items_(room.threads) {}

  Scratch<T> items_;
  int made_ = 0;
};

template <typename From, typename To>
void copy_row(const From* from, To* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) put(to[i], widen(from[i]));
}

// Load and store n values at element `offset`.
template <typename T>
void load_row(Values from, int64_t offset, T* to, int64_t n) {
  with_type(from.dtype, [&](auto zero) { copy_row(static_cast<const decltype(zero)*>(from.data) + offset, to, n); });
}

template <typename T>
void store_row(const T* from, Output to, int64_t offset, int64_t n) {
  with_type(to.dtype, [&](auto zero) { copy_row(from, static_cast<decltype(zero)*>(to.data) + offset, n); });
}

// The offset in tokens (R, n, C·p_h·p_w) of the p_w elements of patch column 0 of image row (r, c, y), and the distance
// from one patch column to the next.
struct TokenRow {
  int64_t first, step;

  TokenRow(const Images& images, Patch patch, int64_t r, int64_t c, int64_t y) {
    const int64_t patches_y = images.height / patch.height, patches_x = images.width / patch.width;
    step = images.channels * patch.height * patch.width;
    const int64_t token = (r * patches_y + y / patch.height) * patches_x;
    first = token * step + (c * patch.height + y % patch.height) * patch.width;
  }
};

}  // namespace dave::DAVE_ISA
