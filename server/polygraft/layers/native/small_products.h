// Products with matrices of a few dozen rows and columns: what Kronecker products and rotations are made of.

#pragma once

#include "vectors.h"

namespace {

inline float widened(const float* p, int64_t at) { return p[at]; }
inline float widened(const bf16* p, int64_t at) { return to_float(p[at]); }

// For each of LINES lines: out[c - from] (+)= factor * sum over k of left[k] right[k, c], for c in [from,
// to).
template <int LINES, typename L, typename R>
inline void small_product_lines(const L* left, int64_t left_stride, int64_t inner, const R* right,
                                int64_t right_stride, int64_t width, int64_t from, int64_t to, float factor,
                                bool adds, float* out, int64_t out_stride) {
  if (width < kLanes) {
    for (int l = 0; l < LINES; l++)
      for (int64_t c = from; c < to; c++) {
        float total = 0;
        for (int64_t k = 0; k < inner; k++)
          total += widened(left, l * left_stride + k) * widened(right, l * right_stride + k * width + c);
        float* at = out + l * out_stride + c - from;
        *at = factor * total + (adds ? *at : 0.0f);
      }
    return;
  }
  for (int64_t c = from; c < to; c += kLanes) {
    // The last vector begins earlier rather than end behind the matrix; of what it repeats nothing is kept.
    const int64_t start = std::min(c, width - kLanes);
    const int64_t count = std::min<int64_t>(kLanes, to - c);
    vec sums[LINES] = {};
    for (int64_t k = 0; k < inner; k++)
      for (int l = 0; l < LINES; l++)
        sums[l] +=
            splat(widened(left, l * left_stride + k)) * load(right + l * right_stride + k * width + start);
    for (int l = 0; l < LINES; l++) {
      float* at = out + l * out_stride + c - from;
      if (start == c && count == kLanes) {
        store(at, adds ? load(at) + splat(factor) * sums[l] : splat(factor) * sums[l]);
        continue;
      }
      float lanes[kLanes];
      store(lanes, splat(factor) * sums[l]);
      for (int64_t i = 0; i < count; i++) at[i] = lanes[c - start + i] + (adds ? at[i] : 0.0f);
    }
  }
}

// out [lines, to - from] (+)= factor * left [lines, inner] right [inner, width], its columns [from, to). A
// stride of 0 is for what all lines share; each line's sums run in one order, whatever the number of lines.
template <typename L, typename R>
void small_product(int64_t lines, const L* left, int64_t left_stride, int64_t inner, const R* right,
                   int64_t right_stride, int64_t width, int64_t from, int64_t to, float factor, bool adds,
                   float* out, int64_t out_stride) {
  int64_t l = 0;
  for (; l + 4 <= lines; l += 4)
    small_product_lines<4>(left + l * left_stride, left_stride, inner, right + l * right_stride, right_stride,
                           width, from, to, factor, adds, out + l * out_stride, out_stride);
  for (; l < lines; l++)
    small_product_lines<1>(left + l * left_stride, left_stride, inner, right + l * right_stride, right_stride,
                           width, from, to, factor, adds, out + l * out_stride, out_stride);
}

}  // namespace
