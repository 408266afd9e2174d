// Products with the base's weights and the adapters' side paths in one operator: the modules that read the
// same input (q, k and v; gate and up) are computed together, and a row's side path is added to the sum
// before it is rounded. layers/linear.py packs the weights.
//
// A sum runs over the inputs in the same order whatever the number of rows, so a row's result doesn't
// depend on its neighbours, to the bit.

#pragma once

#include <omp.h>

#include <vector>

#include "side_path.h"

namespace {

constexpr int kMaxModules = 4;
// Rows whose sums fit in the registers beside one panel of weights.
constexpr int kTileRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 3;
constexpr int64_t kBlockRows = 192;    // most rows that are taken through all panels at a time
constexpr int64_t kBlockInputs = 576;  // inputs in a block of a panel: in float32 it stays in the L1/L2 cache

struct Module {
  const Entry* table;  // the adapters' weights by slot
  const float* bias;   // in whole panels, or null
  int64_t width;       // output features
};

struct Group {  // modules that read the same input; layers/linear.py fills it
  const void* weight;  // the modules' panels one after another; null: the outputs hold the base's product
  int64_t in;
  int64_t modules;
  Module module[kMaxModules];
};

// How weights lie in a panel, by the type that they are kept in.
template <typename T>
struct Panel;

template <>
struct Panel<float> {  // [in, kPanel]
  static int64_t inputs(int64_t in) { return in; }
  static const float* at(const void* weight, int64_t panel, int64_t in) {
    return static_cast<const float*>(weight) + panel * in * kPanel;
  }
};

template <>
struct Panel<bf16> {  // [in / 2, kPanel] of two inputs' weights each, the first in the lower half
  static int64_t inputs(int64_t in) { return (in + 1) / 2 * 2; }
  static const uint32_t* at(const void* weight, int64_t panel, int64_t in) {
    return static_cast<const uint32_t*>(weight) + panel * (inputs(in) / 2) * kPanel;
  }
};

// acc[ROWS, kPanel] (+)= x[ROWS, inputs] w[inputs, kPanel]
template <int ROWS>
void multiply_tile(const float* x, int64_t x_stride, const float* w, int64_t inputs, float* out, bool first) {
  vec acc[ROWS][kVecs];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < kVecs; v++) acc[r][v] = first ? vec{} : load(out + r * kPanel + v * kLanes);
  for (int64_t i = 0; i < inputs; i++) {
    vec weights[kVecs];
    for (int v = 0; v < kVecs; v++) weights[v] = load(w + i * kPanel + v * kLanes);
    for (int r = 0; r < ROWS; r++) {
      const vec one = splat(x[r * x_stride + i]);
      for (int v = 0; v < kVecs; v++) acc[r][v] += one * weights[v];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < kVecs; v++) store(out + r * kPanel + v * kLanes, acc[r][v]);
}

inline vec lower(const uint32_t* w) { return vec(load(w) << 16); }
inline vec upper(const uint32_t* w) { return vec(load(w) & 0xffff0000u); }

template <int ROWS>
void multiply_tile(const float* x, int64_t x_stride, const uint32_t* w, int64_t inputs, float* out, bool first) {
  vec acc[ROWS][kVecs];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < kVecs; v++) acc[r][v] = first ? vec{} : load(out + r * kPanel + v * kLanes);
  for (int64_t i = 0; i < inputs; i += 2, w += kPanel) {
    vec weights[kVecs];
    for (int v = 0; v < kVecs; v++) weights[v] = lower(w + v * kLanes);
    for (int r = 0; r < ROWS; r++) {
      const vec one = splat(x[r * x_stride + i]);
      for (int v = 0; v < kVecs; v++) acc[r][v] += one * weights[v];
    }
    for (int v = 0; v < kVecs; v++) weights[v] = upper(w + v * kLanes);
    for (int r = 0; r < ROWS; r++) {
      const vec one = splat(x[r * x_stride + i + 1]);
      for (int v = 0; v < kVecs; v++) acc[r][v] += one * weights[v];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < kVecs; v++) store(out + r * kPanel + v * kLanes, acc[r][v]);
}

template <typename W, int ROWS = kTileRows>
void multiply(int64_t rows, const float* x, int64_t x_stride, const W* w, int64_t inputs, float* out,
              bool first) {
  if (rows == ROWS) {
    multiply_tile<ROWS>(x, x_stride, w, inputs, out, first);
  } else if constexpr (ROWS > 1) {
    multiply<W, ROWS - 1>(rows, x, x_stride, w, inputs, out, first);
  }
}

// A block of rows in tiles of as equal a height as can be.
template <typename W>
void multiply_tiles(int64_t rows, int64_t tiles, const float* x, int64_t x_stride, const W* w, int64_t inputs,
                    float* out, bool first) {
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t from = rows * t / tiles, to = rows * (t + 1) / tiles;
    multiply(to - from, x + from * x_stride, x_stride, w, inputs, out + from * kPanel, first);
  }
}

// acc[rows, kPanel] = x[rows, inputs] times one panel.
inline void multiply_panel(const float* x, int64_t rows, int64_t inputs, const float* w, float* acc) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < inputs; i += kBlockInputs) {
    const int64_t count = std::min(kBlockInputs, inputs - i);
    multiply_tiles(rows, tiles, x + i, inputs, w + i * kPanel, count, acc, i == 0);
  }
}

inline void multiply_panel(const float* x, int64_t rows, int64_t inputs, const uint32_t* w, float* acc) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < inputs; i += kBlockInputs) {
    const int64_t count = std::min(kBlockInputs, inputs - i);
    const uint32_t* block = w + i / 2 * kPanel;
    if (tiles < 3) {
      multiply_tiles(rows, tiles, x + i, inputs, block, count, acc, i == 0);
      continue;
    }
    // With many rows, widening the weights once costs less than in every tile again.
    alignas(64) float wide[kBlockInputs * kPanel];
    for (int64_t p = 0; p < count / 2; p++)
      for (int v = 0; v < kVecs; v++) {
        store(wide + 2 * p * kPanel + v * kLanes, lower(block + p * kPanel + v * kLanes));
        store(wide + (2 * p + 1) * kPanel + v * kLanes, upper(block + p * kPanel + v * kLanes));
      }
    multiply_tiles(rows, tiles, x + i, inputs, static_cast<const float*>(wide), count, acc, i == 0);
  }
}

// Rows in float32, in place where they are so already.
inline const float* widen(const float* x, int64_t, int64_t, std::vector<float>&) { return x; }
inline const float* widen(const bf16* x, int64_t rows, int64_t in, std::vector<float>& buffer) {
  const int64_t inputs = Panel<bf16>::inputs(in);
  buffer.resize(rows * inputs);
  for (int64_t r = 0; r < rows; r++) {
    float* to = buffer.data() + r * inputs;
    int64_t i = 0;
    for (; i + kLanes <= in; i += kLanes) store(to + i, load(x + r * in + i));
    for (; i < in; i++) to[i] = to_float(x[r * in + i]);
    if (in < inputs) to[in] = 0.0f;
  }
  return buffer.data();
}

template <typename T>
void load_panel(const T* out, int64_t rows, int64_t width, int64_t columns, float* acc) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < kPanel; c++) acc[r * kPanel + c] = c < columns ? to_float(out[r * width + c]) : 0;
}

template <typename T>
void store_panel(const float* acc, const float* bias, int64_t rows, int64_t width, int64_t columns, T* out) {
  vec add[kVecs] = {};
  if (bias)
    for (int v = 0; v < kVecs; v++) add[v] = load(bias + v * kLanes);
  for (int64_t r = 0; r < rows; r++) {
    float last[kPanel];
    for (int v = 0; v < kVecs; v++) {
      const vec sums = load(acc + r * kPanel + v * kLanes) + add[v];
      if (columns == kPanel)
        store(out + r * width + v * kLanes, sums);
      else
        store(last + v * kLanes, sums);
    }
    if (columns < kPanel)
      for (int64_t c = 0; c < columns; c++) from_float(last[c], out + r * width + c);
  }
}

template <typename T>
void linear(const Group& group, const T* x, int64_t rows, T* const* outs, const Segment* segments,
            int64_t num_segments, float* h, int64_t max_rank, int threads) {
  const int64_t in = group.in, inputs = Panel<T>::inputs(in), h_stride = kMaxModules * max_rank;
  struct Work {  // one panel
    int64_t module, panel;
  };
  static thread_local std::vector<Work> work_of_caller;
  std::vector<Work>& work = work_of_caller;
  work.clear();
  const Entry* tables[kMaxModules];
  for (int64_t m = 0; m < group.modules; m++) {
    tables[m] = group.module[m].table;
    for (int64_t p = 0; p * kPanel < group.module[m].width; p++) work.push_back({m, p});
  }
  const Work* all = work.data();
  const int64_t panels = int64_t(work.size());
  // As many rows as keep the block's inputs in the L2 cache.
  const int64_t fitting = std::clamp<int64_t>(65536 / inputs, 4 * kTileRows, kBlockRows);
  const int64_t blocks = (rows + fitting - 1) / fitting;
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    if (num_segments > 0) {
      shrink_share(x, in, segments, num_segments, tables, group.modules, h, h_stride, max_rank, thread, team);
#pragma omp barrier
    }
    // Each thread takes its own panels, so that weights are read once; with more threads than panels can
    // feed, they share out the rows as well.
    int64_t across = 1;
    while (team % (2 * across) == 0 && blocks >= 2 * across && panels * across < 8 * team) across *= 2;
    const int64_t share = thread / across, shares = team / across;
    const int64_t from = panels * share / shares, to = panels * (share + 1) / shares;
    static thread_local std::vector<float> widened;
    alignas(64) float acc[kBlockRows * kPanel];
    for (int64_t b = thread % across; b < blocks; b += across) {
      const int64_t row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
      const float* wide = group.weight ? widen(x + row * in, count, in, widened) : nullptr;
      for (int64_t p = from; p < to; p++) {
        const Module& module = group.module[all[p].module];
        const int64_t column = all[p].panel * kPanel;
        const int64_t columns = std::min<int64_t>(kPanel, module.width - column);
        T* out = outs[all[p].module] + row * module.width + column;
        if (group.weight)
          multiply_panel(wide, count, inputs, Panel<T>::at(group.weight, p, in), acc);
        else
          load_panel(out, count, module.width, columns, acc);
        if (num_segments > 0)
          expand_panel(acc, row, count, segments, num_segments, module.table, all[p].panel,
                       h + all[p].module * max_rank, h_stride);
        store_panel(acc, module.bias ? module.bias + column : nullptr, count, module.width, columns, out);
      }
    }
  }
}

}  // namespace
