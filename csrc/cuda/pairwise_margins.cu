// pairwise_margins: ‖g_i - g_j‖_q of all pairs i < j by direct differences, tiled like a matrix product, and
// <x, g_i - g_j> from the products <x, g_i>, except where they cancel.
//
// A tile is the pairs that one block forms. One thread adds the entries of a pair in the order of D, kAdditions at a
// time, in segments of kSegment entries; segments are joined in parts of kPart, then the parts. So the sum of a pair
// depends neither on the tile nor on whether a block takes a segment or a part.
#include "dispatch.cuh"
#include "launch.cuh"
#include "loads.cuh"
#include "ops.h"
#include "scaled.cuh"

namespace fastsal {
namespace {

constexpr int kThreads = 256;
constexpr int kSegment = 2048;
constexpr int kPart = 16;       // segments
constexpr int kAdditions = 32;  // to an accumulator before it is flushed to a Running sum

// <x, g_i> as hi + lo, with the digits of two float64, and the sum of the magnitudes of its terms.
struct Projection {
  double hi, lo, size;
};

FASTSAL_HD inline int64_t pairs_of(int64_t n) { return n * (n - 1) / 2; }
int64_t blocks_along(int64_t D, bool by_segment) { return ceil_div(D, by_segment ? kSegment : kSegment * kPart); }

struct Problem {
  const void* logits_ptr;  // [B, n], of the dtype of results
  Rows rows;
  Vectors x;
  Shape shape;
  void *distance_ptr, *margin_ptr;  // [B, n, n]
  void* nearest_margin_ptr;         // [B, n]
  int64_t* nearest_ptr;             // [B, n]
  void* projection_ptr;             // [B, n, n]
  int block_segments;               // how many a block of the tile kernel takes: 1 or kPart
  int64_t blocks_along_D;
  Projection* products_ptr;  // [B, n]
  double* sums_ptr;          // [B, blocks_along_D, n (n - 1) / 2]

  // Of pair i < j, what block `block` along D has summed.
  __device__ double& sum(int64_t b, int64_t block, int64_t i, int64_t j) const {
    return sums_ptr[(b * blocks_along_D + block) * pairs_of(shape.n) + i * (2 * shape.n - i - 1) / 2 + j - i - 1];
  }
};

// kSide x kSide threads, each with kEdge x kEdge pairs. Of every row kDepth entries at a time are in shared memory.
template <int edge, int side, int depth>
struct Tile {
  static constexpr int kEdge = edge, kSide = side, kDepth = depth, kRows = edge * side, kThreads = side * side;
};
using LargeTile = Tile<4, 16, 32>;
using SmallTile = Tile<2, 8, 64>;  // for few classes: ten would fill little of a large one; and for float64

int64_t tile_pairs(int dtype, int64_t n) {
  const bool is_small = dtype == kFloat64 || n <= SmallTile::kRows;
  const int64_t tiles = ceil_div(n, is_small ? SmallTile::kRows : LargeTile::kRows);
  return tiles * (tiles + 1) / 2;
}

// A tile in flight from the Jacobian to shared memory: rows first to first + kRows - 1, entries k to k + kDepth - 1.
// What lies outside the Jacobian is 0.
template <class P, class T>
struct TileInFlight {
  static constexpr int kPack = Layout<T>::kPack, kPacks = P::kDepth / kPack, kCount = P::kRows * kPacks / P::kThreads;
  Pack<T> packs[kCount];

  template <bool aligned>
  __device__ __forceinline__ void load(const Problem& p, int64_t b, int64_t first, int64_t k) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const int i = threadIdx.x + c * P::kThreads, row = i / kPacks, column = i % kPacks * kPack;
      const int64_t left = first + row < p.shape.n ? p.shape.D - k - column : 0;
      const int64_t at = left > 0 ? b * p.rows.stride_b + (first + row) * p.rows.stride_n + k + column : 0;
      packs[c] = load_pack<aligned>(static_cast<const T*>(p.rows.entries.first) + at,
                                    left < kPack ? static_cast<int>(left) : kPack);
    }
  }
  __device__ __forceinline__ void store(uint4* tile, int pitch, bool is_half) const {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const int i = threadIdx.x + c * P::kThreads;
      Real<T>* to = reinterpret_cast<Real<T>*>(tile + i / kPacks * pitch) + i % kPacks * kPack;
#pragma unroll
      for (int e = 0; e < kPack; ++e) to[e] = real(packs[c].entries[e], is_half);
    }
  }
};

// The bounds promise ptxas one block a multiprocessor: told to make room for two, it spills.
template <int q, class T, class P>
__global__ void __launch_bounds__(P::kThreads, 1) pairwise_margins_tile_kernel(const __grid_constant__ Problem p) {
  using R = Real<T>;
  constexpr int kWordEntries = Layout<R>::kPack, kWords = P::kDepth / kWordEntries;
  constexpr int kPitch = kWords + 1;  // the padding spreads rows over the banks
  __shared__ uint4 tiles[2][P::kRows * kPitch];
  begin_unwritten(tiles);
  const int64_t n = p.shape.n, blocks = p.blocks_along_D;
  int64_t tiles_in_row = ceil_div(n, P::kRows), tile_i = 0;
  const int64_t tile_pairs = tiles_in_row * (tiles_in_row + 1) / 2;
  const int64_t b = blockIdx.x / (tile_pairs * blocks), block = blockIdx.x / tile_pairs % blocks;
  int64_t pair = blockIdx.x % tile_pairs;
  for (; pair >= tiles_in_row; --tiles_in_row, ++tile_i) pair -= tiles_in_row;
  const int64_t first_i = tile_i * P::kRows, first_j = (tile_i + pair) * P::kRows;
  const int ty = threadIdx.x / P::kSide, tx = threadIdx.x % P::kSide;
  const uintptr_t address =
      reinterpret_cast<uintptr_t>(p.rows.entries.first) | (p.rows.stride_b * sizeof(T)) | (p.rows.stride_n * sizeof(T));
  const bool aligned = is_aligned(address) && p.shape.D % Layout<T>::kPack == 0;
  const bool one_side = first_i == first_j, is_half = p.rows.entries.dtype == kFloat16;

  TileInFlight<P, T> next_i, next_j;
  const auto load = [&](int64_t k) {
    if (aligned) {
      next_i.template load<true>(p, b, first_i, k);
      if (!one_side) next_j.template load<true>(p, b, first_j, k);
    } else {
      next_i.template load<false>(p, b, first_i, k);
      if (!one_side) next_j.template load<false>(p, b, first_j, k);
    }
  };
  const int64_t length = static_cast<int64_t>(kSegment) * p.block_segments, start = block * length;
  const int64_t stop = start + length < p.shape.D ? start + length : p.shape.D;
  load(start);
  for (int64_t segment = start; segment < stop; segment += kSegment) {
    Running<q, R> sums[P::kEdge][P::kEdge];
    const int64_t end = segment + kSegment < stop ? segment + kSegment : stop;
    for (int64_t k = segment; k < end; k += P::kDepth) {
      __syncthreads();  // the tiles are still in use
      next_i.store(tiles[0], kPitch, is_half);
      if (!one_side) next_j.store(tiles[1], kPitch, is_half);
      __syncthreads();
      if (k + P::kDepth < stop) load(k + P::kDepth);  // arrives while this one is summed
      const uint4* rows_i = tiles[0] + ty * kPitch;
      const uint4* rows_j = tiles[one_side ? 0 : 1] + tx * kPitch;
#pragma unroll 1
      for (int first = 0; first < kWords; first += kAdditions / kWordEntries) {
        R partials[P::kEdge][P::kEdge] = {};
#pragma unroll 4
        for (int w = first; w < first + kAdditions / kWordEntries; ++w) {
          Pack<R> a[P::kEdge], c[P::kEdge];
#pragma unroll
          for (int e = 0; e < P::kEdge; ++e) {
            a[e] = pack_of<R>(rows_i[e * P::kSide * kPitch + w]);
            c[e] = pack_of<R>(rows_j[e * P::kSide * kPitch + w]);
          }
#pragma unroll
          for (int e = 0; e < P::kEdge * P::kEdge; ++e) {
            R& sum = partials[e / P::kEdge][e % P::kEdge];
#pragma unroll
            for (int v = 0; v < kWordEntries; ++v) {
              sum = fold<q>(sum, a[e / P::kEdge].entries[v] - c[e % P::kEdge].entries[v]);
            }
          }
        }
#pragma unroll
        for (int e = 0; e < P::kEdge * P::kEdge; ++e) {
          sums[e / P::kEdge][e % P::kEdge].add(partials[e / P::kEdge][e % P::kEdge]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < P::kEdge * P::kEdge; ++e) {
      const int64_t i = first_i + ty + e / P::kEdge * P::kSide, j = first_j + tx + e % P::kEdge * P::kSide;
      if (i >= j || j >= n) continue;
      double& sum = p.sum(b, block, i, j);
      sum = join<q>(segment == start ? 0 : sum, sums[e / P::kEdge][e % P::kEdge].total());
    }
  }
}

// A block for each row: <x, g_i>. Products that underflow still have a size.
__global__ void __launch_bounds__(kThreads) pairwise_margins_project_kernel(const __grid_constant__ Problem p) {
  const int64_t b = blockIdx.x / p.shape.n;
  const Entries row = p.rows(b, blockIdx.x % p.shape.n), x = p.x(b);
  Running<kL1, double> sum;
  double size = 0;
  for (int64_t k = threadIdx.x; k < p.shape.D; k += kThreads) {
    const double g = row(k), x_k = x(k), product = g * x_k;
    sum.add(product);
    sum.lost += fma(g, x_k, -product);
    size += g == 0 || x_k == 0 ? magnitude(product) : magnitude(product) + 0x1p-1000;
  }
  // The threads' sums are joined as the entries were.
  __shared__ double sums[kThreads], losts[kThreads];
  begin_unwritten(sums);
  begin_unwritten(losts);
  sums[threadIdx.x] = sum.sum, losts[threadIdx.x] = sum.lost;
  size = join_block<kL1>(size);
  if (threadIdx.x != 0) return;
  for (int thread = 1; thread < kThreads; ++thread) {
    sum.add(sums[thread]);
    sum.lost += losts[thread];
  }
  p.products_ptr[blockIdx.x] = {sum.sum, sum.lost, size};
}

// The sum of pair i < j over all of D: the segments of a part, then the parts.
template <int q>
__device__ double join_segments(const Problem& p, int64_t b, int64_t i, int64_t j) {
  double sum = 0, of_part = 0;
  const int64_t blocks = p.blocks_along_D;
  for (int64_t block = 0; block < blocks; ++block) {
    of_part = join<q>(of_part, p.sum(b, block, i, j));
    if ((block + 1) * p.block_segments % kPart != 0 && block + 1 < blocks) continue;
    sum = join<q>(sum, of_part);
    of_part = 0;
  }
  return sum;
}

// Whether a sum made in R lost nothing that counts to overflow or underflow.
template <int q, class R>
__device__ bool pair_in_range(double sum) {
  constexpr bool is_double = sizeof(R) == sizeof(double);
  if (q != kL2) return is_double || sum <= 0x1p1000;
  return sum >= (is_double ? 0x1p-900 : 0x1p-99) && sum <= 0x1p1000;
}

// Whether <x, g_i> - <x, g_j> has the digits that are promised. A size of 0 has no products but zeros.
__device__ inline bool is_exact(double difference, double size) {
  return size == 0 || (magnitude(difference) >= 1e-10 * size && size >= 0x1p-800 && size <= 0x1p1000);
}

// A warp for each row i of an example, which makes results of the sums. A pair that left the range of the fast path, or
// whose products with x cancel, is summed again by the whole warp.
template <int q, class Out>
__global__ void __launch_bounds__(kThreads, 1) pairwise_margins_finish_kernel(const __grid_constant__ Problem p) {
  const int64_t n = p.shape.n, warp = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / kWarpSize;
  const int64_t b = warp / n, i = warp % n;
  if (b >= p.shape.B) return;
  const Out* logits = static_cast<const Out*>(p.logits_ptr) + b * n;
  const double psi = logits[i];
  const Projection zero = {}, product = p.x ? p.products_ptr[b * n + i] : zero;
  Candidate best = no_candidate();
  for (int64_t base = 0; base < n; base += kWarpSize) {
    const int64_t j = base + lane_id();
    const bool is_pair = j < n && j != i;
    const double norm = is_pair ? join_segments<q>(p, b, i < j ? i : j, i < j ? j : i) : 0;
    const Projection other = is_pair && p.x ? p.products_ptr[b * n + j] : zero;
    const double dot = (product.hi - other.hi) + (product.lo - other.lo);
    const bool safe = pair_in_range<q, Out>(norm) && is_exact(dot, product.size + other.size);
    Scaled distance = {root<q>(norm), 0}, projection = {dot, 0};
    unsigned unsafe = __ballot_sync(kAllLanes, is_pair && !safe);
    for (int lane = 0; unsafe != 0; ++lane, unsafe >>= 1) {
      if (!(unsafe & 1u)) continue;
      const Entries row_i = p.rows(b, i), row_j = p.rows(b, base + lane), x = p.x(b);
      const auto d = [=](int64_t k) { return row_i(k) - row_j(k); };
      const Scaled norm_again = scaled_norm<q, Warp>(p.shape.D, d);
      const Scaled dot_again = x.first ? scaled_dot<Warp>(p.shape.D, x, d) : Scaled{0, 0};
      if (lane_id() == lane) distance = norm_again, projection = dot_again;
    }
    if (j >= n) continue;
    const double length = j == i ? 0 : to_double(distance), difference = psi - logits[j];
    const Candidate candidate = {j == i ? INFINITY : ratio(difference, length), difference, j};
    const int64_t at = (b * n + i) * n + j;
    static_cast<Out*>(p.distance_ptr)[at] = static_cast<Out>(length);
    static_cast<Out*>(p.margin_ptr)[at] = static_cast<Out>(candidate.ratio);
    if (p.x) {
      const Scaled quotient = {projection.value / distance.value, projection.exponent - distance.exponent};
      static_cast<Out*>(p.projection_ptr)[at] = static_cast<Out>(j == i ? NAN : to_double(quotient));
    }
    if (j != i && is_nearer(candidate, best)) best = candidate;
  }
  best = nearest_of_warp(best);
  if (lane_id() == 0) {
    static_cast<Out*>(p.nearest_margin_ptr)[b * n + i] = static_cast<Out>(best.ratio);
    p.nearest_ptr[b * n + i] = best.index;
  }
}

}  // namespace

int64_t pairwise_margins_blocks(int dtype, int64_t B, int64_t n, int64_t D, bool by_segment) {
  return B * tile_pairs(dtype, n) * blocks_along(D, by_segment);
}

int64_t pairwise_margins_scratch(int64_t B, int64_t n, int64_t D, bool by_segment) {
  return B * (n * sizeof(Projection) + blocks_along(D, by_segment) * pairs_of(n) * sizeof(double));
}

void pairwise_margins(int norm, int dtype, uintptr_t logits, uintptr_t jacobian, int64_t stride_b, int64_t stride_n,
                      uintptr_t x, int64_t x_dtype, int64_t x_stride_b, int64_t B, int64_t n, int64_t D,
                      uintptr_t distance, uintptr_t margin, uintptr_t nearest_margin, uintptr_t nearest,
                      uintptr_t projection, bool by_segment, uintptr_t scratch, uintptr_t stream) {
  Projection* products = pointer<Projection>(scratch);
  const Problem p = {pointer<const void>(logits),
                     {{pointer<const void>(jacobian), dtype}, stride_b, stride_n},
                     {{pointer<const void>(x), x_dtype}, x_stride_b},
                     {B, n, D},
                     pointer<void>(distance),
                     pointer<void>(margin),
                     pointer<void>(nearest_margin),
                     pointer<int64_t>(nearest),
                     pointer<void>(projection),
                     by_segment ? 1 : kPart,
                     blocks_along(D, by_segment),
                     products,
                     reinterpret_cast<double*>(products + B * n)};
  const Stream on(stream);
  if (x) on.launch("pairwise_margins_project_kernel", pairwise_margins_project_kernel, B * n, kThreads, p);
  with_norm(norm, [&](auto q) {
    constexpr int kNorm = q.value;
    const auto launch = [&](auto tile, auto kernel) {
      on.launch("pairwise_margins_tile_kernel", kernel, pairwise_margins_blocks(dtype, B, n, D, by_segment),
                decltype(tile)::kThreads, p);
    };
    if (dtype == kFloat64) {
      launch(SmallTile(), pairwise_margins_tile_kernel<kNorm, double, SmallTile>);
    } else if (dtype == kFloat32 && n <= SmallTile::kRows) {
      launch(SmallTile(), pairwise_margins_tile_kernel<kNorm, float, SmallTile>);
    } else if (dtype == kFloat32) {
      launch(LargeTile(), pairwise_margins_tile_kernel<kNorm, float, LargeTile>);
    } else if (n <= SmallTile::kRows) {
      launch(SmallTile(), pairwise_margins_tile_kernel<kNorm, Bits16, SmallTile>);
    } else {
      launch(LargeTile(), pairwise_margins_tile_kernel<kNorm, Bits16, LargeTile>);
    }
    on.launch("pairwise_margins_finish_kernel",
              dtype == kFloat64 ? pairwise_margins_finish_kernel<kNorm, double>
                                : pairwise_margins_finish_kernel<kNorm, float>,
              ceil_div(B * n * kWarpSize, kThreads), kThreads, p);
  });
}

}  // namespace fastsal
