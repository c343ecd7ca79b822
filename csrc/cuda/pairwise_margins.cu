// pairwise_margins: ‖g_i - g_j‖_q and <x, g_i - g_j> of all pairs i < j by direct differences, tiled like a matrix
// product.
//
// A tile is the pairs that one block forms. One thread adds the entries of a pair in the order of D, kAdditions at a
// time, in segments of kSegment entries. So the sum of a pair depends neither on the tile nor on whether one block
// takes all segments or every segment has a block of its own.
#include "dispatch.cuh"
#include "launch.cuh"
#include "loads.cuh"
#include "ops.h"
#include "scaled.cuh"

namespace fastsal {
namespace {

constexpr int kThreads = 256;
constexpr int kSegment = 2048;
constexpr int kAdditions = 32;  // to an accumulator before it is flushed to a Running sum
constexpr int kDot = 3;         // a fourth kind of fold beside kMax, kL1 and kL2: <x, d>

template <class T>
struct Problem {
  using Out = Real<T>;
  const Out* logits_ptr;  // [B, n]
  const T* jacobian_ptr;
  int64_t stride_b, stride_n;
  Entries x_entries;  // [B, D], or null
  int64_t x_stride_b;
  Shape shape;
  Out *distance_ptr, *margin_ptr;  // [B, n, n]
  Out* nearest_margin_ptr;         // [B, n]
  int64_t* nearest_ptr;            // [B, n]
  Out* projection_ptr;             // [B, n, n]
  bool split;
  double* norm_ptr;  // split: [B, segments, n, n] of sums; else [B, n, n] of Running
  double* dot_ptr;   // likewise

  __host__ __device__ int64_t segments() const { return ceil_div(shape.D, kSegment); }
  __device__ const T* row(int64_t b, int64_t j) const { return jacobian_ptr + b * stride_b + j * stride_n; }
  __device__ bool with_x() const { return x_entries.first; }
  __device__ Entries x(int64_t b) const { return x_entries.from(b * x_stride_b); }
};

// kSide x kSide threads, each with kEdge x kEdge pairs. Of every row kDepth entries at a time are in shared memory.
template <int edge, int side, int depth>
struct Tile {
  static constexpr int kEdge = edge, kSide = side, kDepth = depth, kRows = edge * side, kThreads = side * side;
};
using LargeTile = Tile<4, 16, 32>;
using SmallTile = Tile<2, 8, 64>;  // for few classes: ten would fill little of a large one

__host__ __device__ inline int64_t tile_rows(int64_t n) {
  return n <= SmallTile::kRows ? SmallTile::kRows : LargeTile::kRows;
}
__host__ __device__ inline int64_t tile_pairs(int64_t n) {
  const int64_t tiles = ceil_div(n, tile_rows(n));
  return tiles * (tiles + 1) / 2;
}

// 16 bytes of a row in shared memory.
template <class R>
struct Word {
  static constexpr int kEntries = kPackBytes / sizeof(R);
  R entries[kEntries];
};
template <class R>
__device__ __forceinline__ Word<R> word_of(const uint4& words) {
  Word<R> word;
  memcpy(&word, &words, sizeof(word));
  return word;
}

// A tile on its way from the Jacobian to shared memory: rows first to first + kRows - 1, entries k to k + kDepth - 1.
// What lies outside the Jacobian is 0.
template <class P, class T>
struct TileInFlight {
  static constexpr int kPack = Layout<T>::kPack, kPacks = P::kDepth / kPack, kCount = P::kRows * kPacks / P::kThreads;
  Pack<T> packs[kCount];

  template <bool aligned>
  __device__ __forceinline__ void load(const Problem<T>& p, int64_t b, int64_t first, int64_t k) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const int i = threadIdx.x + c * P::kThreads, row = i / kPacks, column = i % kPacks * kPack;
      const int64_t left = first + row < p.shape.n ? p.shape.D - k - column : 0;
      const T* from = left > 0 ? p.row(b, first + row) + k + column : p.jacobian_ptr;
      packs[c] = load_pack<aligned>(from, left < kPack ? static_cast<int>(left) : kPack);
    }
  }
  __device__ __forceinline__ void store(uint4* tile, int pitch) const {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const int i = threadIdx.x + c * P::kThreads;
      Real<T>* to = reinterpret_cast<Real<T>*>(tile + i / kPacks * pitch) + i % kPacks * kPack;
#pragma unroll
      for (int e = 0; e < kPack; ++e) to[e] = real(packs[c].entries[e]);
    }
  }
};

// The bounds promise ptxas one block a multiprocessor: told to make room for two, it spills.
template <int kind, class T, class P>
__global__ void __launch_bounds__(P::kThreads, 1) pairwise_margins_tile_kernel(const __grid_constant__ Problem<T> p) {
  using R = Real<T>;
  constexpr int kWordEntries = Word<R>::kEntries, kWords = P::kDepth / kWordEntries;
  constexpr int kPitch = kWords + 1;  // the padding spreads rows over the banks
  __shared__ uint4 tiles[2][P::kRows * kPitch];
  __shared__ uint4 x_tile[kWords];
  const int64_t n = p.shape.n, pairs = tile_pairs(n), parts = p.split ? p.segments() : 1;
  const int64_t b = blockIdx.x / (pairs * parts), part = blockIdx.x / pairs % parts;
  int64_t pair = blockIdx.x % pairs, tile_i = 0, tiles_in_row = ceil_div(n, P::kRows);
  for (; pair >= tiles_in_row; --tiles_in_row, ++tile_i) pair -= tiles_in_row;
  const int64_t first_i = tile_i * P::kRows, first_j = (tile_i + pair) * P::kRows;
  const int ty = threadIdx.x / P::kSide, tx = threadIdx.x % P::kSide;
  const uintptr_t address =
      reinterpret_cast<uintptr_t>(p.jacobian_ptr) | (p.stride_b * sizeof(T)) | (p.stride_n * sizeof(T));
  const bool aligned = address % kPackBytes == 0 && p.shape.D % Layout<T>::kPack == 0;

  const bool one_side = first_i == first_j;
  TileInFlight<P, T> next_i, next_j;
  R next_x = 0;
  const auto load = [&](int64_t k) {
    if (aligned) {
      next_i.template load<true>(p, b, first_i, k);
      if (!one_side) next_j.template load<true>(p, b, first_j, k);
    } else {
      next_i.template load<false>(p, b, first_i, k);
      if (!one_side) next_j.template load<false>(p, b, first_j, k);
    }
    if constexpr (kind == kDot) {
      const int c = threadIdx.x;
      next_x = c < P::kDepth && k + c < p.shape.D ? static_cast<R>(p.x(b)(k + c)) : 0;
    }
  };

  const int64_t stop = p.split && (part + 1) * kSegment < p.shape.D ? (part + 1) * kSegment : p.shape.D;
  load(part * kSegment);
  for (int64_t segment = part; segment * kSegment < stop; ++segment) {
    Running<kind, R> sums[P::kEdge][P::kEdge];
    const int64_t end = (segment + 1) * kSegment < stop ? (segment + 1) * kSegment : stop;
    for (int64_t k = segment * kSegment; k < end; k += P::kDepth) {
      __syncthreads();  // the tiles are still in use
      next_i.store(tiles[0], kPitch);
      if (!one_side) next_j.store(tiles[1], kPitch);
      if (kind == kDot && threadIdx.x < P::kDepth) reinterpret_cast<R*>(x_tile)[threadIdx.x] = next_x;
      __syncthreads();
      if (k + P::kDepth < stop) load(k + P::kDepth);  // arrives while this one is summed
      const uint4* rows_i = tiles[0] + ty * kPitch;
      const uint4* rows_j = tiles[one_side ? 0 : 1] + tx * kPitch;
#pragma unroll 1
      for (int start = 0; start < kWords; start += kAdditions / kWordEntries) {
        R partials[P::kEdge][P::kEdge] = {};
#pragma unroll 4
        for (int w = start; w < start + kAdditions / kWordEntries; ++w) {
          Word<R> a[P::kEdge], c[P::kEdge], x{};
#pragma unroll
          for (int e = 0; e < P::kEdge; ++e) {
            a[e] = word_of<R>(rows_i[e * P::kSide * kPitch + w]);
            c[e] = word_of<R>(rows_j[e * P::kSide * kPitch + w]);
          }
          if constexpr (kind == kDot) x = word_of<R>(x_tile[w]);
#pragma unroll
          for (int e = 0; e < P::kEdge * P::kEdge; ++e) {
            R& sum = partials[e / P::kEdge][e % P::kEdge];
#pragma unroll
            for (int v = 0; v < kWordEntries; ++v) {
              const R d = a[e / P::kEdge].entries[v] - c[e % P::kEdge].entries[v];
              if constexpr (kind == kDot) {
                sum = multiply_add(x.entries[v], d, sum);
              } else {
                sum = fold<kind>(sum, d);
              }
            }
          }
        }
#pragma unroll
        for (int e = 0; e < P::kEdge * P::kEdge; ++e) {
          sums[e / P::kEdge][e % P::kEdge].add(partials[e / P::kEdge][e % P::kEdge]);
        }
      }
    }
    double* out_ptr = kind == kDot ? p.dot_ptr : p.norm_ptr;
#pragma unroll
    for (int e = 0; e < P::kEdge * P::kEdge; ++e) {
      const int64_t i = first_i + ty + e / P::kEdge * P::kSide, j = first_j + tx + e % P::kEdge * P::kSide;
      if (i >= j || j >= n) continue;
      const double total = sums[e / P::kEdge][e % P::kEdge].total();
      if (p.split) {
        out_ptr[((b * parts + part) * n + i) * n + j] = total;
      } else {
        auto& running = reinterpret_cast<Running<kind, double>*>(out_ptr)[(b * n + i) * n + j];
        Running<kind, double> next = segment == 0 ? Running<kind, double>() : running;
        next.add(total);
        running = next;
      }
    }
  }
}

// The sum of pair i < j over all segments.
template <int kind, class T>
__device__ double join_segments(const Problem<T>& p, const double* sums_ptr, int64_t b, int64_t i, int64_t j) {
  const int64_t n = p.shape.n, count = p.segments();
  if (!p.split) return reinterpret_cast<const Running<kind, double>*>(sums_ptr)[(b * n + i) * n + j].total();
  Running<kind, double> sum;
  for (int64_t s = 0; s < count; ++s) sum.add(sums_ptr[((b * count + s) * n + i) * n + j]);
  return sum.total();
}

// Whether a sum made in Real<T> lost nothing that counts to overflow or underflow.
template <int kind, class T>
__device__ bool pair_in_range(double sum) {
  constexpr bool is_double = sizeof(T) == sizeof(double);
  if (kind == kMax || kind == kL1) return is_double || sum <= 0x1p1000;
  return magnitude(sum) >= (is_double ? 0x1p-900 : 0x1p-99) && magnitude(sum) <= 0x1p1000;
}

// A warp for each row i of an example, which makes results of the sums. A pair that left the range of the fast path is
// summed again by the whole warp.
template <int q, class T>
__global__ void __launch_bounds__(kThreads, 1) pairwise_margins_finish_kernel(const __grid_constant__ Problem<T> p) {
  const int64_t n = p.shape.n, warp = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / kWarpSize;
  const int64_t b = warp / n, i = warp % n;
  if (b >= p.shape.B) return;
  const double psi = p.logits_ptr[b * n + i];
  int x_is_zero = -1;  // unknown; found out where a product is 0, so that a blank x need not be summed again
  Candidate best = {INFINITY, INFINITY, INT64_MAX};
  for (int64_t base = 0; base < n; base += kWarpSize) {
    const int64_t j = base + lane_id(), low = i < j ? i : j, high = i < j ? j : i;
    const bool is_pair = j < n && j != i;
    double norm = is_pair ? join_segments<q>(p, p.norm_ptr, b, low, high) : 0;
    double dot = is_pair && p.with_x() ? join_segments<kDot>(p, p.dot_ptr, b, low, high) : 0;
    if (x_is_zero < 0 && __ballot_sync(kAllLanes, is_pair && p.with_x() && dot == 0) != 0) {
      double size = 0;
      for (int64_t k = lane_id(); k < p.shape.D; k += kWarpSize) size = fold<kMax>(size, p.x(b)(k));
      x_is_zero = join_lanes<kMax>(size) == 0;
    }
    const bool safe = pair_in_range<q, T>(norm) && (!p.with_x() || x_is_zero == 1 || pair_in_range<kDot, T>(dot));
    Scaled distance = {root<q>(norm), 0}, projection = {i < j ? dot : -dot, 0};
    unsigned unsafe = __ballot_sync(kAllLanes, is_pair && !safe);
    for (int lane = 0; unsafe != 0; ++lane, unsafe >>= 1) {
      if (!(unsafe & 1u)) continue;
      const T *row_i = p.row(b, i), *row_j = p.row(b, base + lane);
      const auto d = [=](int64_t k) {
        return static_cast<double>(real(row_i[k])) - static_cast<double>(real(row_j[k]));
      };
      const Scaled norm_again = scaled_norm<q, Warp>(p.shape.D, d);
      const Scaled dot_again = p.with_x() ? scaled_dot<Warp>(p.shape.D, p.x(b), d) : Scaled{0, 0};
      if (lane_id() == lane) distance = norm_again, projection = dot_again;
    }
    if (j >= n) continue;
    const double length = j == i ? 0 : to_double(distance), difference = psi - p.logits_ptr[b * n + j];
    const Candidate candidate = {j == i ? INFINITY : ratio(difference, length), difference, j};
    const int64_t at = (b * n + i) * n + j;
    store(&p.distance_ptr[at], length);
    store(&p.margin_ptr[at], candidate.ratio);
    if (p.with_x()) {
      const Scaled quotient = {projection.value / distance.value, projection.exponent - distance.exponent};
      store(&p.projection_ptr[at], j == i ? NAN : to_double(quotient));
    }
    if (j != i && is_nearer(candidate, best)) best = candidate;
  }
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const Candidate other = exchange(best, distance);
    if (is_nearer(other, best)) best = other;
  }
  if (lane_id() == 0) {
    store(&p.nearest_margin_ptr[b * n + i], best.ratio);
    p.nearest_ptr[b * n + i] = best.index;
  }
}

template <int kind, class T>
void launch_tiles(const Problem<T>& p, const Stream& on) {
  const int64_t blocks = pairwise_margins_blocks(p.shape, p.split);
  if (tile_rows(p.shape.n) == SmallTile::kRows) {
    on.launch("pairwise_margins_tile_kernel", pairwise_margins_tile_kernel<kind, T, SmallTile>, blocks,
              SmallTile::kThreads, p);
  } else {
    on.launch("pairwise_margins_tile_kernel", pairwise_margins_tile_kernel<kind, T, LargeTile>, blocks,
              LargeTile::kThreads, p);
  }
}

int64_t sums_count(Shape shape, bool split) {  // of double
  return shape.B * shape.n * shape.n * (split ? ceil_div(shape.D, kSegment) : 2);
}

}  // namespace

int64_t pairwise_margins_blocks(Shape shape, bool split) {
  return shape.B * tile_pairs(shape.n) * (split ? ceil_div(shape.D, kSegment) : 1);
}

int64_t pairwise_margins_scratch(Shape shape, bool with_x, bool split) {
  return sums_count(shape, split) * static_cast<int64_t>(sizeof(double)) * (with_x ? 2 : 1);
}

void pairwise_margins(int norm, int dtype, uintptr_t logits, RowsArgument jacobian, InputArgument x, Shape shape,
                      uintptr_t distance, uintptr_t margin, uintptr_t nearest_margin, uintptr_t nearest,
                      uintptr_t projection, bool split, uintptr_t scratch, uintptr_t stream) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Problem<T> p = {pointer<const Real<T>>(logits),
                          pointer<const T>(jacobian.data),
                          jacobian.stride_b,
                          jacobian.stride_n,
                          {pointer<const void>(x.data), x.dtype},
                          x.stride_b,
                          shape,
                          pointer<Real<T>>(distance),
                          pointer<Real<T>>(margin),
                          pointer<Real<T>>(nearest_margin),
                          pointer<int64_t>(nearest),
                          pointer<Real<T>>(projection),
                          split,
                          pointer<double>(scratch),
                          pointer<double>(scratch) + sums_count(shape, split)};
    const Stream on(stream);
    if (x.data) launch_tiles<kDot>(p, on);
    with_norm(norm, [&](auto q) {
      launch_tiles<q.value>(p, on);
      on.launch("pairwise_margins_finish_kernel", pairwise_margins_finish_kernel<q.value, T>,
                ceil_div(shape.B * shape.n * kWarpSize, kThreads), kThreads, p);
    });
  });
}

}  // namespace fastsal
