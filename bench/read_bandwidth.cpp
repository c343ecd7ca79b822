// The yardstick of the CPU kernels: the fastest pure read of n floats. Compiled by the bench script with the system
// compiler (-O3 -march=native -fopenmp -shared -fPIC).
//
// Four streams at a time and prefetch into the second level cache was the fastest of 25 variants measured (1 to 8
// streams, rows of 784 to 37632 floats, 256 to 32768 floats ahead, first and second level cache), 1.4 times one stream.
#include <stdint.h>

typedef float Vec __attribute__((vector_size(64)));

extern "C" double read_sum(const float* data, int64_t n, int threads) {
  constexpr int kStreams = 4, kUnroll = 2, kLanes = 16;
  constexpr int64_t kStream = 16384;  // floats of a stream
  constexpr int64_t kAhead = 256;     // floats to prefetch ahead
  constexpr int64_t kBlock = kStreams * kStream;
  double total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
  for (int64_t block = 0; block < n / kBlock; ++block) {
    Vec sum[kStreams * kUnroll] = {};  // enough that no addition waits for the one before
    const float* start = data + block * kBlock;
    for (int64_t k = 0; k < kStream; k += kLanes * kUnroll) {
      for (int u = 0; u < kUnroll; ++u) {
        for (int s = 0; s < kStreams; ++s) {
          const float* p = start + s * kStream + k + u * kLanes;
          Vec v;
          __builtin_prefetch(p + kAhead, 0, 2);
          __builtin_memcpy(&v, p, sizeof v);
          sum[u * kStreams + s] += v;
        }
      }
    }
    for (const Vec& v : sum) {
      for (int l = 0; l < kLanes; ++l) total += v[l];
    }
  }
  for (int64_t k = n / kBlock * kBlock; k < n; ++k) total += data[k];
  return total;
}
