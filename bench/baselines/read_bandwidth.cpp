// What the CPU kernels are measured against, compiled by the suite with the system's compiler (-O3 -march=native).
//
// read_sum: the fastest pure read of n floats.
// Four streams at a time and prefetch into the second level cache was the fastest of 25 variants measured (1 to 8
// streams, rows of 784 to 37632 floats, 256 to 32768 floats ahead, first and second level cache), 1.4 times one stream.
#include <stdint.h>

typedef float Vec __attribute__((vector_size(64)));
constexpr int kLanes = 16;

extern "C" double read_sum(const float* data, int64_t n) {
  constexpr int kStreams = 4, kUnroll = 2;
  constexpr int64_t kStream = 16384;  // floats of a stream
  constexpr int64_t kAhead = 256;     // floats to prefetch ahead
  constexpr int64_t kBlock = kStreams * kStream;
  double total = 0;
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

// read_in_tiles: the same bytes example after example, with next to no arithmetic. The rows are read ten at a time,
// each against the anchor (the first of them here), the ten after them prefetched; then two rows and x. A row is taken
// as floats, 64 bytes or more; the sum is that of |anchor - row|^2 and <row_0 + row_1, x>.
extern "C" double read_in_tiles(const char* jacobian, int64_t B, int64_t n, int64_t row_bytes, int64_t example_bytes,
                                const char* x) {
  constexpr int kRows = 10, kLine = 64;
  constexpr int64_t kLongRow = 16384, kAlong = 512;  // a long row is prefetched along itself
  const int64_t last = row_bytes - kLine, ahead = row_bytes > kLongRow ? kAlong : kRows * row_bytes;
  auto load = [](const char* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  };
  Vec sum[kRows] = {};
  for (int64_t b = 0; b < B; ++b) {
    const char* anchor = jacobian + b * example_bytes;
    for (int64_t first = 0; first < n; first += kRows) {
      const char* rows = anchor + (first < n - kRows ? first : n - kRows) * row_bytes;
      for (int64_t k = 0; k < row_bytes; k += kLine) {
        const char* p = rows + (k < last ? k : last);
        const Vec a = load(anchor + (k < last ? k : last));
        for (int r = 0; r < kRows; ++r) {
          __builtin_prefetch(p + r * row_bytes + ahead, 0, 2);
          const Vec d = a - load(p + r * row_bytes);
          sum[r] += d * d;
        }
      }
    }
    for (int64_t k = 0; k < row_bytes; k += kLine) {
      const int64_t at = k < last ? k : last;
      const char* own = x + b * row_bytes + at;
      __builtin_prefetch(own + row_bytes, 0, 2);
      sum[0] += (load(anchor + at) + load(anchor + row_bytes + at)) * load(own);
    }
  }
  double total = 0;
  for (const Vec& v : sum) {
    for (int l = 0; l < kLanes; ++l) total += v[l];
  }
  return total;
}
