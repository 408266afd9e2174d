// Block-diagonal matrices that multiply a module's input before the base's weights do (OFT, arXiv
// 2306.07280). Rows are rotated once, by all threads together, into the scratch, from where each thread takes
// them for its own panels of weights. layers/linear/low_rank.py holds the same in torch.

#pragma once

#include <vector>

#include "side_path.h"
#include "small_products.h"

namespace {

inline const float* block_of(const Entry& entry, int64_t block) {
  return reinterpret_cast<const float*>(entry.rotation) + block * entry.rotation_step;
}

// Blocks [from, to) of `rows` rows: out = x R.
template <typename X>
void rotate_blocks(const Entry& entry, int64_t from, int64_t to, const X* x, int64_t rows, int64_t stride,
                   float* out, int64_t out_stride) {
  const int64_t size = entry.rotation_size;
  for (int64_t block = from; block < to; block++)
    small_product(rows, x + block * size, stride, size, block_of(entry, block), 0, size, 0, size, 1.0f, false,
                  out + block * size, out_stride);
}

inline void scale_row(const float* scale, int64_t in, float* row) {
  for (int64_t i = 0; i < in; i++) row[i] *= scale[i];
}

// One row as it is behind segments [0, last], of which the last rotates it.
template <typename X>
void rotate_in_order(const Entry* table, const Segment* segments, int64_t last, int64_t row, const X* x,
                     int64_t in, float* out) {
  static thread_local std::vector<float> turned;
  turned.resize(in);
  for (int64_t i = 0; i < in; i++) out[i] = to_float(x[i]);
  for (int64_t s = 0; s <= last; s++) {
    if (row < segments[s].first || row >= segments[s].last) continue;
    const Entry& entry = table[segments[s].slot];
    if (entry.in_scale) scale_row(reinterpret_cast<const float*>(entry.in_scale), in, out);
    if (!entry.rotation) continue;
    rotate_blocks(entry, 0, in / entry.rotation_size, out, 1, in, turned.data(), in);
    std::memcpy(out, turned.data(), in * sizeof(float));
  }
}

// Whether some row is in more than one segment: those of a row's second adapters begin again at the first
// rows.
inline bool overlap(const Segment* segments, int64_t num_segments) {
  for (int64_t s = 1; s < num_segments; s++)
    if (segments[s].first < segments[s - 1].last) return true;
  return false;
}

// This thread's share of the rows that are rotated, to where `rotated_row` finds them.
template <typename X>
void rotate_share(const X* x, int64_t in, const Segment* segments, int64_t num_segments,
                  const Module* modules, int64_t num_modules, float* h, int64_t h_stride, int64_t max_rank,
                  int thread, int threads) {
  constexpr int64_t kRows = 8;
  const bool several = overlap(segments, num_segments);
  int64_t piece = 0;
  for (int64_t s = 0; s < num_segments; s++) {
    for (int64_t m = 0; m < num_modules; m++) {
      const Module& module = modules[m];
      const Entry& entry = module.table[segments[s].slot];
      if (!entry.rotation || module.weights.storage == kNothing) continue;
      float* to = h + m * max_rank + segments[s].offset + rotated_at(entry, in, module.width);
      if (several || entry.in_scale) {
        for (int64_t row = segments[s].first; row < segments[s].last; row++)
          if (piece++ % threads == thread)
            rotate_in_order(module.table, segments, s, row, x + row * in, in, to + row * h_stride);
        continue;
      }
      for (int64_t row = segments[s].first; row < segments[s].last; row += kRows) {
        const int64_t rows = std::min<int64_t>(kRows, segments[s].last - row);
        for (int64_t block = 0; block < in / entry.rotation_size; block++)
          if (piece++ % threads == thread)
            rotate_blocks(entry, block, block + 1, x + row * in, rows, in, to + row * h_stride, h_stride);
      }
    }
  }
}

// wide [in, kPanel], a panel of weights, as it is with the rotation in it: R wide.
inline void rotate_panel(const Entry& entry, int64_t in, float* wide) {
  if (!entry.rotation) return;
  const int64_t size = entry.rotation_size;
  std::vector<float> turned(size * kPanel);
  for (int64_t block = 0; block < in / size; block++) {
    float* at = wide + block * size * kPanel;
    small_product(size, block_of(entry, block), size, size, at, 0, kPanel, 0, kPanel, 1.0f, false,
                  turned.data(), kPanel);
    std::memcpy(at, turned.data(), size * kPanel * sizeof(float));
  }
}

}  // namespace
