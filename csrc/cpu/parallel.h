// Work shared out between threads. Which thread computes a unit never shows in a result.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastsal {

// How many threads are worth waking for `units` units of work that read `elements` elements in all.
inline int useful_threads(int threads, int64_t units, int64_t elements) {
#ifdef _OPENMP
  constexpr int64_t kSerialElements = 1 << 18;  // below this waking threads costs more than they save
  if (elements < kSerialElements || units < 2 || threads < 2) return 1;
  return units < threads ? static_cast<int>(units) : threads;
#else
  (void)threads, (void)units, (void)elements;
  return 1;
#endif
}

// Scratch of `count` values for each thread. Two threads never write to one cache line, nor to two neighbours, which
// processors fetch together: with short rows that took 1.05 to 1.1 of the time of two threads.
template <class T>
class PerThread {
 public:
  PerThread(int threads, int64_t count)
      : stride_(count + kApart / static_cast<int64_t>(sizeof(T)) + 1),
        values_(static_cast<size_t>(threads * stride_)) {}

  T* of(int thread) { return values_.data() + thread * stride_; }

 private:
  static constexpr int64_t kApart = 128;  // bytes
  int64_t stride_;
  std::vector<T> values_;
};

// body(unit, thread) for every unit, handed out `grain` at a time. The body must not throw, so its scratch is
// allocated before.
template <class Body>
void parallel_for(int threads, int64_t units, int64_t grain, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, grain)
    for (int64_t unit = 0; unit < units; ++unit) body(unit, omp_get_thread_num());
    return;
  }
#endif
  (void)threads, (void)grain;
  for (int64_t unit = 0; unit < units; ++unit) body(unit, 0);
}

}  // namespace fastsal
