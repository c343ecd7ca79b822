// pairwise_margins: ‖g_i - g_j‖_q of all pairs i < j by direct differences, tiled like a matrix product, and
// <x, g_i - g_j> from the products <x, g_i>, except where they cancel.
//
// A tile is the pairs that one block forms. D is cut into at most 64 segments, and these make at most 4 parts, by D
// alone. One thread adds the entries of a pair in a segment in the order of D, kDepth at a time; the segments of a part
// are joined in their order, and so are the parts. So the sum of a pair depends neither on the tile nor on whether a
// block takes a segment or, where that makes blocks enough, a part.
#include "launch.cuh"
#include "ops.h"
#include "scaled.cuh"

namespace fastsal {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kSegments = 64, kParts = 4, kSegmentStep = 1024;  // a segment is a multiple of this
constexpr int64_t kEnoughBlocks = 8 * 132;                          // eight for each multiprocessor of an H200
// kSide x kSide threads form a tile, each kEdge x kEdge pairs. Of every row kDepth entries at a time are in shared
// memory, one for each lane; so many an accumulator adds before it is flushed to a Running sum.
constexpr int kEdge = 4, kSide = 8, kRows = kEdge * kSide, kDepth = kWarpSize;
constexpr int kTileThreads = kSide * kSide, kTileWarps = kTileThreads / kWarpSize;

// <x, g_i> as hi + lo, with the digits of two float64, and the sum of the magnitudes of its terms.
struct Projection {
  double hi, lo, size;
};

int64_t tile_pairs(int64_t n) { return ceil_div(n, kRows) * (ceil_div(n, kRows) + 1) / 2; }

// How D is cut, and shared out between blocks.
struct Cut {
  int64_t segment;  // entries
  int64_t run;      // segments of a block: one, or those of a part
  int64_t runs, runs_of_part;

  explicit Cut(const Inputs& in) {
    segment = ceil_div(in.D, kSegments * kSegmentStep) * kSegmentStep;
    const int64_t segments = ceil_div(in.D, segment), part = ceil_div(segments, kParts);
    run = in.B * tile_pairs(in.n) * ceil_div(segments, part) < kEnoughBlocks ? 1 : part;
    runs = ceil_div(segments, run), runs_of_part = part / run;
  }
};

FASTSAL_HD inline int64_t pairs_of(int64_t n) { return n * (n - 1) / 2; }

struct Problem {
  Inputs in;
  Cut cut;
  Projection* products_ptr;         // [B, n]
  double* sums_ptr;                 // [B, runs, n (n - 1) / 2]
  const void* logits_ptr;           // [B, n], of the dtype of results
  void *distance_ptr, *margin_ptr;  // [B, n, n]
  void* nearest_margin_ptr;         // [B, n]
  int64_t* nearest_ptr;             // [B, n]
  void* projection_ptr;             // [B, n, n]

  // Of pairs i < j over a run, at j.
  __device__ double* row(int64_t b, int64_t run, int64_t i) const {
    return sums_ptr + (b * cut.runs + run) * pairs_of(in.n) + i * (2 * in.n - i - 1) / 2 - i - 1;
  }
};

// 16 bytes of a row in shared memory.
template <class R>
struct alignas(16) Word {
  static constexpr int kEntries = 16 / sizeof(R);
  R entries[kEntries];
};

template <int q, class T>
__global__ void __launch_bounds__(kTileThreads) pairwise_margins_tile_kernel(const __grid_constant__ Problem p) {
  using R = Real<T>;
  constexpr int kWords = kDepth / Word<R>::kEntries;
  __shared__ Word<R> tiles[2][kRows][kWords + 1];  // the padding spreads rows over the banks
  begin_unwritten(tiles);
  const int64_t n = p.in.n, D = p.in.D;
  int64_t tiles_in_row = ceil_div(n, kRows), tile_i = 0;
  const int64_t tile_pairs = tiles_in_row * (tiles_in_row + 1) / 2;
  const int64_t b = blockIdx.x / (tile_pairs * p.cut.runs), run = blockIdx.x / tile_pairs % p.cut.runs;
  int64_t pair = blockIdx.x % tile_pairs;
  for (; pair >= tiles_in_row; --tiles_in_row, ++tile_i) pair -= tiles_in_row;
  const int64_t first_i = tile_i * kRows, first_j = (tile_i + pair) * kRows;
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
  const T* rows = static_cast<const T*>(p.in.row(b, 0).first);

  const int64_t first = run * p.cut.run * p.cut.segment, last = first + p.cut.run * p.cut.segment;
#pragma unroll 1
  for (int64_t start = first; start < D && start < last; start += p.cut.segment) {
    Running<q, R> sums[kEdge][kEdge];
    const int64_t stop = start + p.cut.segment < D ? start + p.cut.segment : D;
    for (int64_t k = start; k < stop; k += kDepth) {
      __syncthreads();  // the tiles are still in use
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int64_t first = side == 0 ? first_i : first_j;
        const int count = k + lane_id() >= stop ? 0 : n - first < kRows ? static_cast<int>(n - first) : kRows;
        const T* from = rows + (first + warp_id()) * p.in.stride_n + k + lane_id();
#pragma unroll
        for (int row = 0; row < kRows; row += kTileWarps, from += kTileWarps * p.in.stride_n) {
          // What lies outside the Jacobian is 0.
          reinterpret_cast<R*>(tiles[side][row + warp_id()])[lane_id()] = row + warp_id() < count ? real(*from) : 0;
        }
      }
      __syncthreads();
      R partials[kEdge][kEdge] = {};
#pragma unroll 4
      for (int w = 0; w < kWords; ++w) {
        Word<R> a[kEdge], c[kEdge];
#pragma unroll
        for (int e = 0; e < kEdge; ++e) a[e] = tiles[0][ty + e * kSide][w], c[e] = tiles[1][tx + e * kSide][w];
#pragma unroll
        for (int e = 0; e < kEdge * kEdge; ++e) {
          R& sum = partials[e / kEdge][e % kEdge];
#pragma unroll
          for (int v = 0; v < Word<R>::kEntries; ++v) {
            sum = fold<q>(sum, a[e / kEdge].entries[v] - c[e % kEdge].entries[v]);
          }
        }
      }
#pragma unroll
      for (int e = 0; e < kEdge * kEdge; ++e) sums[e / kEdge][e % kEdge].add(partials[e / kEdge][e % kEdge]);
    }
    int y = ty, x = tx;
    asm volatile("" : "+r"(y), "+r"(x));  // or the addresses are made before the loop, and take registers in it
#pragma unroll
    for (int e = 0; e < kEdge * kEdge; ++e) {
      const int64_t i = first_i + y + e / kEdge * kSide, j = first_j + x + e % kEdge * kSide;
      if (i >= j || j >= n) continue;
      double& sum = p.row(b, run, i)[j];
      sum = join<q>(start == first ? 0 : sum, sums[e / kEdge][e % kEdge].total());
    }
  }
}

// A block for each row: <x, g_i>. Products that underflow still have a size.
__global__ void __launch_bounds__(kThreads) pairwise_margins_project_kernel(const __grid_constant__ Problem p) {
  const int64_t b = blockIdx.x / p.in.n;
  const Entries row = p.in.row(b, blockIdx.x % p.in.n), x = p.in.x_of(b);
  Running<kL1, double> sum;
  double size = 0;
  for (int64_t k = threadIdx.x; k < p.in.D; k += kThreads) {
    const double g = row(k), x_k = x(k), product = g * x_k;
    sum.add(product);
    sum.lost += fma(g, x_k, -product);
    size += g == 0 || x_k == 0 ? fabs(product) : fabs(product) + 0x1p-1000;
  }
  // The threads' sums are joined as the entries were.
  __shared__ double sums[kThreads], losts[kThreads];
  begin_unwritten(sums);
  begin_unwritten(losts);
  sums[threadIdx.x] = sum.sum, losts[threadIdx.x] = sum.lost;
  size = join_threads<kL1>(size);
  if (threadIdx.x != 0) return;
  for (int thread = 1; thread < kThreads; ++thread) {
    sum.add(sums[thread]);
    sum.lost += losts[thread];
  }
  p.products_ptr[blockIdx.x] = {sum.sum, sum.lost, size};
}

// Whether a sum made in the dtype of results lost nothing that counts to overflow or underflow.
template <int q, class Out>
__device__ bool pair_in_range(double sum) {
  constexpr bool is_double = sizeof(Out) == sizeof(double);
  if (q != kL2) return is_double || sum <= 0x1p1000;
  return sum >= (is_double ? 0x1p-900 : 0x1p-99) && sum <= 0x1p1000;
}

// Whether <x, g_i> - <x, g_j> has the digits that are promised. A size of 0 has no products but zeros.
__device__ inline bool is_exact(double difference, double size) {
  return size == 0 || (fabs(difference) >= 1e-10 * size && size >= 0x1p-800 && size <= 0x1p1000);
}

// A block for each row i of an example, which makes results of the sums. A pair that left the range of the fast path,
// or whose products with x cancel, is summed again by the whole block.
template <int q, class Out>
__global__ void __launch_bounds__(kThreads, 1) pairwise_margins_finish_kernel(const __grid_constant__ Problem p) {
  __shared__ bool unsafe[kThreads];
  begin_unwritten(unsafe);
  const int64_t n = p.in.n, b = blockIdx.x / n, i = blockIdx.x % n;
  const Out* logits = static_cast<const Out*>(p.logits_ptr) + b * n;
  const Entries row_i = p.in.row(b, i), x = p.in.x_of(b);
  const bool with_x = p.in.x.first;
  const double psi = logits[i];
  const Projection zero = {}, product = with_x ? p.products_ptr[b * n + i] : zero;
  Candidate best = no_candidate();
  for (int64_t base = 0; base < n; base += kThreads) {
    const int64_t j = base + threadIdx.x;
    const bool is_pair = j < n && j != i;
    double norm = 0;
    for (int64_t run = 0; is_pair && run < p.cut.runs;) {
      double of_part = 0;
      for (const int64_t end = run + p.cut.runs_of_part; run < end && run < p.cut.runs; ++run) {
        of_part = join<q>(of_part, p.row(b, run, i < j ? i : j)[i < j ? j : i]);
      }
      norm = join<q>(norm, of_part);
    }
    const Projection other = is_pair && with_x ? p.products_ptr[b * n + j] : zero;
    const double dot = (product.hi - other.hi) + (product.lo - other.lo);
    Scaled distance = {root<q>(norm), 0}, projection = {dot, 0};
    unsafe[threadIdx.x] = is_pair && !(pair_in_range<q, Out>(norm) && is_exact(dot, product.size + other.size));
    __syncthreads();
    for (int thread = 0; thread < kThreads && base + thread < n; ++thread) {
      if (!unsafe[thread]) continue;
      const Entries row_j = p.in.row(b, base + thread);
      const auto d = [=](int64_t k) { return row_i(k) - row_j(k); };
      const Scaled norm_again = scaled_norm<q>(p.in.D, d);
      const Scaled dot_again = with_x ? scaled_dot(p.in.D, x, d) : Scaled{0, 0};
      if (static_cast<int>(threadIdx.x) == thread) distance = norm_again, projection = dot_again;
    }
    __syncthreads();  // `unsafe` may be used again
    if (j >= n) continue;
    const double length = j == i ? 0 : to_double(distance), difference = psi - logits[j];
    const Candidate candidate = {j == i ? INFINITY : ratio(difference, length), difference, j};
    const int64_t at = (b * n + i) * n + j;
    static_cast<Out*>(p.distance_ptr)[at] = static_cast<Out>(length);
    static_cast<Out*>(p.margin_ptr)[at] = static_cast<Out>(candidate.ratio);
    if (with_x) {
      const Scaled quotient = {projection.value / distance.value, projection.exponent - distance.exponent};
      static_cast<Out*>(p.projection_ptr)[at] = static_cast<Out>(j == i ? NAN : to_double(quotient));
    }
    if (j != i && is_nearer(candidate, best)) best = candidate;
  }
  best = nearest_of_threads(best, kThreads);
  if (threadIdx.x == 0) {
    static_cast<Out*>(p.nearest_margin_ptr)[b * n + i] = static_cast<Out>(best.ratio);
    p.nearest_ptr[b * n + i] = best.index;
  }
}

}  // namespace

int64_t pairwise_margins_scratch(const Inputs& in) {
  return in.B * (in.n * sizeof(Projection) + Cut(in).runs * pairs_of(in.n) * sizeof(double));
}

void pairwise_margins(const Inputs& in, uintptr_t scratch, uintptr_t logits, uintptr_t distance, uintptr_t margin,
                      uintptr_t nearest_margin, uintptr_t nearest, uintptr_t projection, uintptr_t stream) {
  Projection* products = pointer<Projection>(scratch);
  const Problem p = {in,
                     Cut(in),
                     products,
                     reinterpret_cast<double*>(products + in.B * in.n),
                     pointer<const void>(logits),
                     pointer<void>(distance),
                     pointer<void>(margin),
                     pointer<void>(nearest_margin),
                     pointer<int64_t>(nearest),
                     pointer<void>(projection)};
  if (in.x.first) {
    launch(stream, "pairwise_margins_project_kernel", pairwise_margins_project_kernel, in.B * in.n, kThreads, p);
  }
  with_norm(in.norm, [&](auto q) {
    with_type(in.jacobian.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      launch(stream, "pairwise_margins_tile_kernel", pairwise_margins_tile_kernel<q.value, T>,
             in.B * p.cut.runs * tile_pairs(in.n), kTileThreads, p);
      launch(stream, "pairwise_margins_finish_kernel", pairwise_margins_finish_kernel<q.value, Real<T>>, in.B * in.n,
             kThreads, p);
    });
  });
}

}  // namespace fastsal
