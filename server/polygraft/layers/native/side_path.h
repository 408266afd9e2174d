// Low-rank side paths by segments: a segment is a run of rows that use one adapter, and adds
// weight scaling (x A^T) B^T to their outputs (Punica's segments, arXiv 2310.18547, with S-LoRA's unpadded
// ranks, arXiv 2311.03285), after it has scaled what was in them. Rows of several adapters are in several
// segments, which act in their order. layers/linear/low_rank.py holds the same in torch.

#pragma once

#include <vector>

#include "kron.h"
#include "panels.h"

namespace {

enum Flags { kAInPanels = 1, kScalesSum = 2 };

struct Entry {   // one slot of a module's table; layers/linear/low_rank.py fills it
  int64_t a;     // address of A: rows [rank, in], or panels of weights with `rank` columns
  int64_t b;     // address of B in panels [panels, rank, kPanel], padded with zeros
  int64_t bias;  // address of the bias in float32, padded to whole panels, or 0
  int64_t rank;
  int64_t dtype;          // of A and B: 0 float32, 1 bfloat16
  int64_t in_scale;       // address of a factor in float32 for each input of the base's product, or 0
  int64_t out_scale;      // likewise for each of its outputs, padded to whole panels, or 0
  int64_t w1, w2;         // addresses of a Kronecker product's halves, as `Kron` has them, or 0
  int64_t o2, i2;         // and the second one's outputs and inputs
  int64_t rotation;       // address of the blocks [blocks, size, size] that turn the base's input, or 0
  int64_t rotation_size;  // inputs in a block
  int64_t rotation_step;  // from one block to the next, 0 if all are the same
  int64_t flags;          // of kAInPanels and kScalesSum
  double scaling;         // of B A

  bool a_in_panels() const { return flags & kAInPanels; }
  // Whether out_scale multiplies the sum of the base's product and B A (DoRA), not the base's product alone.
  bool scales_sum() const { return flags & kScalesSum; }
  // B often has 16 bits, so the scaling is multiplied into x A^T in float32; times B it would be rounded.
  float factor(float weight) const { return weight * float(scaling); }
};

inline Kron kron_of(const Entry& entry, int64_t in, int64_t width) {
  if (!entry.w1) return Kron{};
  const auto *w1 = reinterpret_cast<const float*>(entry.w1), *w2 = reinterpret_cast<const float*>(entry.w2);
  return {w1, w2, width / entry.o2, in / entry.i2, entry.o2, entry.i2};
}

// Where what is between the two halves of a Kronecker product, and a rotated input, lie in a row of the
// scratch behind x A^T: in numbers from the segment's offset.
inline int64_t between_at(const Entry& entry) { return entry.rank; }
inline int64_t rotated_at(const Entry& entry, int64_t in, int64_t width) {
  return between_at(entry) + kron_of(entry, in, width).between();
}

enum Storage { kNothing = 0, kRowsType = 1, kInt8 = 2, k4Bit = 3 };

struct Weights {        // what a module multiplies by: the base's own, or a merged copy
  const void* weight;   // in panels
  const float* scale;   // of int8 weights by column, of 4-bit ones by block of inputs and column
  const float* values;  // the 16 that 4 bits stand for
  const float* bias;    // in whole panels, or null
  int64_t storage;      // kNothing: the outputs hold the base's product already
};

struct Module {
  const Entry* table;  // the adapters' weights by slot
  int64_t width;       // output features
  Weights weights;
};

struct Segment {              // layers/step.py has the same
  int32_t first, last, slot;  // rows [first, last)
  float weight;               // of what the adapter adds
  int32_t offset;  // of its product with A in a row of the scratch: segments that share rows differ in it
};

// The sums of a tile's products over inputs [0, done), those behind them added one by one, times the weight.
template <int ROWS, int RANKS, typename X, typename W>
inline void finish_tile(const vec (&acc)[ROWS][RANKS], const X* x, int64_t done, int64_t in, const W* a,
                        int ranks, float weight, float* h, int64_t h_stride) {
  for (int r = 0; r < ROWS; r++) {
    float totals[RANKS];
    for (int j = 0; j < RANKS; j++) totals[j] = sum(acc[r][j]);
    for (int j = 0; j < ranks; j++) {
      for (int64_t k = done; k < in; k++) totals[j] += to_float(x[r * in + k]) * to_float(a[j * in + k]);
      h[r * h_stride + j] = weight * totals[j];
    }
  }
}

// Dot products of ROWS rows of x with up to RANKS rows of A, times the weight.
template <int ROWS, int RANKS, typename X, typename W>
inline void shrink_tile(const X* x, int64_t in, const W* a, int ranks, float weight, float* h,
                        int64_t h_stride) {
  vec acc[ROWS][RANKS] = {};
  int64_t i = 0;
  for (; i + kLanes <= in; i += kLanes) {
    vec w[RANKS];
    for (int j = 0; j < RANKS; j++) w[j] = load(a + (j < ranks ? j : 0) * in + i);
    for (int r = 0; r < ROWS; r++) {
      const vec v = load(x + r * in + i);
      for (int j = 0; j < RANKS; j++) acc[r][j] += v * w[j];
    }
  }
  finish_tile(acc, x, i, in, a, ranks, weight, h, h_stride);
}

#if POLYGRAFT_DOTS_OF_BF16

// The same of pairs of inputs.
template <int ROWS, int RANKS>
inline void shrink_tile(const bf16* x, int64_t in, const bf16* a, int ranks, float weight, float* h,
                        int64_t h_stride) {
  vec acc[ROWS][RANKS] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= in; i += 2 * kLanes) {
    uvec w[RANKS];
    for (int j = 0; j < RANKS; j++) w[j] = load_pairs(a + (j < ranks ? j : 0) * in + i);
    for (int r = 0; r < ROWS; r++) {
      const uvec pairs = load_pairs(x + r * in + i);
      for (int j = 0; j < RANKS; j++) acc[r][j] = add_products_of_pairs(acc[r][j], pairs, w[j]);
    }
  }
  finish_tile(acc, x, i, in, a, ranks, weight, h, h_stride);
}

#endif

// Rows of A that are multiplied at a time.
constexpr int kRanks = kLanes == 16 ? 8 : 4;

// Up to kRanks ranks, in tiles of as many sums as the registers hold.
template <typename X, typename W>
void shrink(const X* x, int64_t rows, int64_t in, const W* a, int ranks, float weight, float* h,
            int64_t h_stride) {
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2)
    shrink_tile<2, kRanks>(x + r * in, in, a, ranks, weight, h + r * h_stride, h_stride);
  for (; r < rows; r++) shrink_tile<1, kRanks>(x + r * in, in, a, ranks, weight, h + r * h_stride, h_stride);
}

// out[ROWS, kPanel] += h[ROWS, rank] b[rank, kPanel]
template <int ROWS, typename W>
inline void expand_tile(float* out, const W* b, const float* h, int64_t rank, int64_t h_stride) {
  vec acc[ROWS][kVecs];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < kVecs; v++) acc[r][v] = load(out + r * kPanel + v * kLanes);
  for (int64_t j = 0; j < rank; j++) {
    vec w[kVecs];
    for (int v = 0; v < kVecs; v++) w[v] = load(b + j * kPanel + v * kLanes);
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < kVecs; v++) acc[r][v] += splat(h[r * h_stride + j]) * w[v];
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < kVecs; v++) store(out + r * kPanel + v * kLanes, acc[r][v]);
}

template <typename W>
void expand(float* out, int64_t rows, const W* b, const float* h, int64_t rank, int64_t h_stride) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) expand_tile<4>(out + r * kPanel, b, h + r * h_stride, rank, h_stride);
  for (; r + 2 <= rows; r += 2) expand_tile<2>(out + r * kPanel, b, h + r * h_stride, rank, h_stride);
  for (; r < rows; r++) expand_tile<1>(out + r * kPanel, b, h + r * h_stride, rank, h_stride);
}

// The same for all columns of one panel of A: a panel's worth of ranks is multiplied as the base's weights
// are.
template <typename X>
void shrink_panel(const X* x, int64_t rows, int64_t in, const Entry& entry, int64_t panel, float weight,
                  float* h, int64_t h_stride) {
  // An even number of inputs: nothing is padded.
  static thread_local std::vector<float> widened, sums;
  Later nothing;
  const void* a = reinterpret_cast<const void*>(entry.a);
  sums.resize(rows * kPanel);
  if (entry.dtype == 0)
    multiply_panel(widen(x, rows, in, widened), rows, in, Panel<float>::at(a, panel, in), sums.data(),
                   nothing);
  else if constexpr (std::is_same_v<X, bf16> && POLYGRAFT_DOTS_OF_BF16)
    multiply_panel(x, rows, in, Panel<bf16>::at(a, panel, in), sums.data(), nothing);
  else
    multiply_panel(widen(x, rows, in, widened), rows, in, Panel<bf16>::at(a, panel, in), sums.data(),
                   nothing);
  for (int64_t r = 0; r < rows; r++)
    for (int v = 0; v < kVecs; v++)
      store(h + r * h_stride + v * kLanes, load(sums.data() + r * kPanel + v * kLanes) * splat(weight));
}

constexpr int64_t kPanelsAhead = 2;

// Fetch a panel of B into the cache: each adapter's is a short run, too short for the processor's own
// prefetching.
inline void fetch_panel(const Entry& entry, int64_t panel) {
  const int64_t bytes = entry.rank * kPanel * (entry.dtype == 0 ? sizeof(float) : sizeof(bf16));
  const char* from = reinterpret_cast<const char*>(entry.b) + panel * bytes;  // may lie behind the last one
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
}

// The same of all adapters that rows [row, row + rows) have.
inline void fetch_panel(int64_t row, int64_t rows, const Segment* segments, int64_t num_segments,
                        const Module& module, int64_t panel) {
  for (int64_t s = 0; s < num_segments; s++)
    if (segments[s].first < row + rows && segments[s].last > row)
      fetch_panel(module.table[segments[s].slot], panel);
}

// Rows [rows, kPanel] of one panel of outputs times the adapter's scale of them.
inline void scale_outputs(const Entry& entry, int64_t panel, int64_t rows, float* out) {
  const float* scale = reinterpret_cast<const float*>(entry.out_scale) + panel * kPanel;
  for (int64_t r = 0; r < rows; r++)
    for (int v = 0; v < kVecs; v++)
      store(out + r * kPanel + v * kLanes, load(out + r * kPanel + v * kLanes) * load(scale + v * kLanes));
}

// Add the side paths of rows [row, row + rows) to one panel of their outputs, out [rows, kPanel].
inline void expand_panel(float* out, int64_t row, int64_t rows, const Segment* segments, int64_t num_segments,
                         const Module& module, int64_t in, int64_t panel, const float* h, int64_t h_stride) {
  for (int64_t s = 0; s < num_segments; s++) {
    const int64_t first = std::max<int64_t>(segments[s].first, row);
    const int64_t last = std::min<int64_t>(segments[s].last, row + rows);
    if (first >= last) continue;
    const Entry& entry = module.table[segments[s].slot];
    float* to = out + (first - row) * kPanel;
    if (entry.out_scale && !entry.scales_sum()) scale_outputs(entry, panel, last - first, to);
    if (entry.rank > 0) {
      const float* from = h + first * h_stride + segments[s].offset;
      const int64_t at = panel * entry.rank * kPanel;
      fetch_panel(entry, panel + kPanelsAhead);
      if (entry.dtype == 0)
        expand(to, last - first, reinterpret_cast<const float*>(entry.b) + at, from, entry.rank, h_stride);
      else
        expand(to, last - first, reinterpret_cast<const bf16*>(entry.b) + at, from, entry.rank, h_stride);
    }
    if (entry.out_scale && entry.scales_sum()) scale_outputs(entry, panel, last - first, to);
    if (entry.w1) {
      const float* from = h + first * h_stride + segments[s].offset + between_at(entry);
      const int64_t column = panel * kPanel, columns = std::min<int64_t>(kPanel, module.width - column);
      kron_second(kron_of(entry, in, module.width), from, h_stride, last - first, column, columns, to,
                  kPanel);
    }
    if (entry.bias) {
      const float* bias = reinterpret_cast<const float*>(entry.bias) + panel * kPanel;
      const vec weight = splat(segments[s].weight);
      for (int64_t r = 0; r < last - first; r++)
        for (int v = 0; v < kVecs; v++)
          store(to + r * kPanel + v * kLanes,
                load(to + r * kPanel + v * kLanes) + weight * load(bias + v * kLanes));
    }
  }
}

// This thread's share of what is between a Kronecker product's halves, for the segments' rows.
template <typename X>
void kron_share(const X* x, int64_t in, const Segment* segments, int64_t num_segments, const Module* modules,
                int64_t num_modules, float* h, int64_t h_stride, int64_t max_rank, int thread, int threads) {
  constexpr int64_t kLines = 8;
  int64_t piece = 0;
  for (int64_t s = 0; s < num_segments; s++)
    for (int64_t m = 0; m < num_modules; m++) {
      const Entry& entry = modules[m].table[segments[s].slot];
      if (!entry.w1) continue;
      const Kron kron = kron_of(entry, in, modules[m].width);
      float* between = h + m * max_rank + segments[s].offset + between_at(entry);
      for (int64_t row = segments[s].first; row < segments[s].last; row++)
        for (int64_t line = 0; line < kron.lines(); line += kLines)
          if (piece++ % threads == thread)
            kron_first(kron, x + row * in, line, std::min(line + kLines, kron.lines()), segments[s].weight,
                       between + row * h_stride);
    }
}

// Calls visit(segment, m, row, rows, rank, ranks) for this thread's pieces of the products with A: small
// enough that one long segment and many short ones both fill all threads.
template <typename Visit>
void for_pieces(const Segment* segments, int64_t num_segments, const Module* modules, int64_t num_modules,
                int thread, int threads, Visit&& visit) {
  constexpr int64_t kRows = 64;
  int64_t piece = 0;
  for (int64_t s = 0; s < num_segments; s++)
    for (int64_t m = 0; m < num_modules; m++) {
      const Entry& entry = modules[m].table[segments[s].slot];
      const int64_t step = entry.a_in_panels() ? kPanel : kRanks;
      for (int64_t row = segments[s].first; row < segments[s].last; row += kRows)
        for (int64_t rank = 0; rank < entry.rank; rank += step)
          if (piece++ % threads == thread)
            visit(segments[s], m, row, std::min<int64_t>(kRows, segments[s].last - row), rank,
                  std::min<int64_t>(step, entry.rank - rank));
    }
}

// This thread's share of h[row, module * max_rank + offset + j] = weight scaling x[row] . A[j], for the
// segments' rows.
template <typename X>
void shrink_share(const X* x, int64_t in, const Segment* segments, int64_t num_segments,
                  const Module* modules, int64_t num_modules, float* h, int64_t h_stride, int64_t max_rank,
                  int thread, int threads) {
  auto multiply = [&](const Segment& segment, int64_t m, int64_t row, int64_t rows, int64_t rank,
                      int64_t ranks) {
    const Entry& entry = modules[m].table[segment.slot];
    float* to = h + row * h_stride + m * max_rank + segment.offset + rank;
    const float factor = entry.factor(segment.weight);
    if (entry.a_in_panels())
      shrink_panel(x + row * in, rows, in, entry, rank / kPanel, factor, to, h_stride);
    else if (entry.dtype == 0)
      shrink(x + row * in, rows, in, reinterpret_cast<const float*>(entry.a) + rank * in, int(ranks), factor,
             to, h_stride);
    else
      shrink(x + row * in, rows, in, reinterpret_cast<const bf16*>(entry.a) + rank * in, int(ranks), factor,
             to, h_stride);
  };
  for_pieces(segments, num_segments, modules, num_modules, thread, threads, multiply);
}

// Fetch what the modules' tables say of the segments' adapters: a line here and there, in hundreds of tables.
inline void fetch_entries(const Segment* segments, int64_t num_segments, const Module* modules,
                          int64_t num_modules) {
  for (int64_t m = 0; m < num_modules; m++)
    for (int64_t s = 0; s < num_segments; s++) {
      const char* entry = reinterpret_cast<const char*>(modules[m].table + segments[s].slot);
      __builtin_prefetch(entry, 0, 3);
      __builtin_prefetch(entry + sizeof(Entry) - 1, 0, 3);
    }
}

// What this thread will read of A in `shrink_share`.
inline void note_pieces(int64_t in, const Segment* segments, int64_t num_segments, const Module* modules,
                        int64_t num_modules, int thread, int threads, Later& later) {
  auto note = [&](const Segment& segment, int64_t m, int64_t row, int64_t, int64_t rank, int64_t ranks) {
    const Entry& entry = modules[m].table[segment.slot];
    const int64_t size = entry.dtype == 0 ? sizeof(float) : sizeof(bf16);  // in rows or in panels: in one run
    if (row == segment.first)
      later.add(reinterpret_cast<const char*>(entry.a) + rank * in * size, ranks * in * size);
  };
  for_pieces(segments, num_segments, modules, num_modules, thread, threads, note);
}

}  // namespace
