// Products with the base's weights and the adapters' side paths in one operator: the modules that read the
// same input (q, k and v; gate and up) are computed together, and a row's side path is added to the sum
// before it is rounded. layers/linear/linear.py packs the weights.
//
// A sum runs over the inputs in the same order whatever the number of rows, so a row's result doesn't
// depend on its neighbours, to the bit.

#pragma once

#include <omp.h>

#include <vector>

#include "panels_4bit.h"
#include "panels_int8.h"
#include "rotation.h"

namespace {

constexpr int kMaxModules = 4;
constexpr int64_t kBlockRows = 192;  // most rows that are taken through all panels at a time

inline int64_t panels_of(const Module& module) { return (module.width + kPanel - 1) / kPanel; }

struct Group {  // modules that read the same input; layers/linear/linear.py fills it
  int64_t in_features;
  int64_t modules;
  Module module[kMaxModules];
};

template <typename O>
void load_panel(const O* out, int64_t rows, int64_t width, int64_t columns, float* acc) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < kPanel; c++) acc[r * kPanel + c] = c < columns ? to_float(out[r * width + c]) : 0;
}

template <typename O>
void store_panel(const float* acc, const float* bias, int64_t rows, int64_t width, int64_t columns, O* out) {
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

// A block of rows, in the forms in which panels of weights are multiplied by them.
template <typename T>
struct BlockOfRows {
  int64_t in;
  const typename Panel<T>::Row* plain;  // [count, in], padded as weights in T are; or null
  const float* wide;                    // likewise
  const Int8Rows& quantized;
  int64_t count;

  // acc [count, kPanel] = the product with panel `p` of a module, or what is in `out` where there is none.
  template <typename O>
  void multiply(const Weights& by, int64_t p, const O* out, int64_t width, int64_t columns, float* acc,
                Later& later) const {
    if (by.storage == kRowsType) {
      multiply_panel(plain, count, Panel<T>::inputs(in), Panel<T>::at(by.weight, p, in), acc, later);
    } else if (by.storage == kInt8) {
      multiply_panel_int8(quantized, count, in, by.weight, by.scale, p, acc, later);
    } else if (by.storage == k4Bit) {  // whole blocks of inputs, so never an odd number
      multiply_panel_4bit(wide, count, in, static_cast<const uint8_t*>(by.weight) + p * in / 2 * kPanel,
                          by.scale + p * in / kScaleInputs * kPanel, by.values, acc, later);
    } else {
      load_panel(out, count, width, columns, acc);
    }
  }
};

// Rows [row, row + count) in float32 as a module of the group multiplies them, scaled and rotated as their
// adapters say; null where none of them changes its input.
template <typename T>
const float* transform_inputs(const Group& group, int64_t member, const T* x, int64_t row, int64_t count,
                              const Segment* segments, int64_t num_segments, const float* h, int64_t h_stride,
                              int64_t max_rank, std::vector<float>& buffer) {
  const Module& module = group.module[member];
  if (module.weights.storage == kNothing) return nullptr;
  const int64_t in = group.in_features, inputs = Panel<T>::inputs(in);
  bool any = false;
  for (int64_t s = 0; s < num_segments; s++) {
    const int64_t first = std::max<int64_t>(segments[s].first, row);
    const int64_t last = std::min<int64_t>(segments[s].last, row + count);
    const Entry& entry = module.table[segments[s].slot];
    if (first >= last || !(entry.in_scale || entry.rotation)) continue;
    if (!any) {
      const float* wide = widen(x + row * in, count, in, buffer);
      if (wide != buffer.data()) buffer.assign(wide, wide + count * inputs);
      any = true;
    }
    const float* turned = h + member * max_rank + segments[s].offset + rotated_at(entry, in, module.width);
    for (int64_t r = first; r < last; r++) {
      float* to = buffer.data() + (r - row) * inputs;
      if (entry.rotation)
        std::memcpy(to, turned + r * h_stride, in * sizeof(float));
      else
        scale_row(reinterpret_cast<const float*>(entry.in_scale), in, to);
    }
  }
  return any ? buffer.data() : nullptr;
}

// The calling thread's share of the group's products; every thread of the team calls it, and needs a barrier
// before it reads another's outputs, which are rounded to O. `following` are the modules whose side paths are
// computed next, or null.
template <typename T, typename O>
void linear_share(const Group& group, const T* x, int64_t rows, O* const* outs, const Segment* segments,
                  int64_t num_segments, float* h, int64_t max_rank, const Group* following = nullptr,
                  int64_t num_following = 0) {
  const int thread = omp_get_thread_num(), team = omp_get_num_threads();
  const int64_t in = group.in_features, h_stride = kMaxModules * max_rank;
  // As many rows as keep the block's inputs in the L2 cache.
  const int64_t fitting = std::clamp<int64_t>(65536 / in, 4 * kTileRows, kBlockRows);
  const int64_t blocks = (rows + fitting - 1) / fitting;
  int64_t panels = 0;
  bool plain = false, widens = false, quantizes = false;
  for (int64_t m = 0; m < group.modules; m++) {
    const int64_t storage = group.module[m].weights.storage;
    panels += panels_of(group.module[m]);
    quantizes |= storage == kInt8;
    plain |= storage == kRowsType;
    widens |= storage == k4Bit;
  }
  if (following) fetch_entries(segments, num_following, following->module, following->modules);
  if (num_segments > 0) {
    shrink_share(x, in, segments, num_segments, group.module, group.modules, h, h_stride, max_rank, thread,
                 team);
    kron_share(x, in, segments, num_segments, group.module, group.modules, h, h_stride, max_rank, thread,
               team);
    rotate_share(x, in, segments, num_segments, group.module, group.modules, h, h_stride, max_rank, thread,
                 team);
#pragma omp barrier
  }
  static thread_local Later later;
  later.clear();
  if (following)
    note_pieces(following->in_features, segments, num_following, following->module, following->modules,
                thread, team, later);
  // Each thread takes its own panels, so that weights are read once; with more threads than panels can
  // feed, they share out the rows as well.
  int64_t across = 1;
  while (team % (2 * across) == 0 && blocks >= 2 * across && panels * across < 8 * team) across *= 2;
  const int64_t share = thread / across, shares = team / across;
  const int64_t from = panels * share / shares, to = panels * (share + 1) / shares;
  static thread_local std::vector<typename Panel<T>::Row> plain_rows, plain_own;
  static thread_local std::vector<float> widened, transformed;
  static thread_local Int8Rows quantized, quantized_own;
  alignas(64) float acc[kBlockRows * kPanel];
  for (int64_t b = thread % across; b < blocks; b += across) {
    const int64_t row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
    if (quantizes) quantize(x + row * in, count, in, in, quantized);
    const float* wide = widens ? widen(x + row * in, count, in, widened) : nullptr;
    const auto* whole = plain ? as_rows<T>(x + row * in, count, in, plain_rows) : nullptr;
    int64_t first = 0;  // panel of the module among all
    for (int64_t m = 0; m < group.modules; m++) {
      const Module& module = group.module[m];
      const int64_t last = first + panels_of(module);
      if (std::max(from, first) >= std::min(to, last)) {
        first = last;
        continue;
      }
      const float* own = num_segments > 0 ? transform_inputs(group, m, x, row, count, segments, num_segments,
                                                             h, h_stride, max_rank, transformed)
                                          : nullptr;
      if (own && module.weights.storage == kInt8)
        quantize(own, count, in, Panel<T>::inputs(in), quantized_own);
      const auto* own_rows = own && module.weights.storage == kRowsType
                                 ? as_rows<T>(own, count, Panel<T>::inputs(in), plain_own)
                                 : whole;
      const BlockOfRows<T> from_rows{in, own_rows, own ? own : wide, own ? quantized_own : quantized, count};
      if (num_segments > 0)
        for (int64_t p = std::max(from, first) - first, end = p + kPanelsAhead; p < end; p++)
          fetch_panel(row, count, segments, num_segments, module, p);
      for (int64_t p = std::max(from, first); p < std::min(to, last); p++) {
        const int64_t panel = p - first, column = panel * kPanel;
        const int64_t columns = std::min<int64_t>(kPanel, module.width - column);
        O* out = outs[m] + row * module.width + column;
        from_rows.multiply(module.weights, panel, out, module.width, columns, acc, later);
        if (num_segments > 0)
          expand_panel(acc, row, count, segments, num_segments, module, in, panel, h + m * max_rank,
                       h_stride);
        const float* bias = module.weights.bias;
        store_panel(acc, bias ? bias + column : nullptr, count, module.width, columns, out);
      }
      first = last;
    }
  }
}

template <typename T, typename O>
void linear(const Group& group, const T* x, int64_t rows, O* const* outs, const Segment* segments,
            int64_t num_segments, float* h, int64_t max_rank, int threads) {
#pragma omp parallel num_threads(threads)
  linear_share(group, x, rows, outs, segments, num_segments, h, max_rank);
}

}  // namespace
