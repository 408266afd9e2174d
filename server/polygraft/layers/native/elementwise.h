// The small operations between a layer's products, each in one pass instead of half a dozen:
// layers/fused.py tells which of the base's modules they stand in for. Computed in float32 and rounded once.
// They take a share of the rows; `for_rows` shares them out where they are called one by one.

#pragma once

#include <omp.h>

#include <cmath>

#include "vectors.h"

namespace {

// Calls body(from, to) for shares of rows; with few elements in the caller alone, since a team costs more.
template <typename Body>
void for_rows(int64_t rows, int64_t width, int threads, Body&& body) {
  if (rows * width < 32768 || threads == 1) {
    body(int64_t(0), rows);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    body(rows * thread / team, rows * (thread + 1) / team);
  }
}

// x / sqrt(mean(x^2) + eps) * scale, over rows of `width` (Zhang and Sennrich, arXiv 1910.07467). `out` may
// be `x`.
template <typename T>
void rms_norm(const T* x, int64_t rows, int64_t width, const float* scale, float eps, T* out) {
  for (int64_t r = 0; r < rows; r++) {
    const T* row = x + r * width;
    vec squares[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= width; i += 2 * kLanes)
      for (int v = 0; v < 2; v++) {
        const vec one = load(row + i + v * kLanes);
        squares[v] += one * one;
      }
    float total = sum(squares[0] + squares[1]);
    for (; i < width; i++) total += to_float(row[i]) * to_float(row[i]);
    const float factor = 1.0f / std::sqrt(total / float(width) + eps);
    i = 0;
    for (; i + kLanes <= width; i += kLanes)
      store(out + r * width + i, load(row + i) * splat(factor) * load(scale + i));
    for (; i < width; i++) from_float(to_float(row[i]) * factor * scale[i], out + r * width + i);
  }
}

enum Activation { kSilu = 0, kGeluTanh = 1 };

// x * sigmoid(x), or x * sigmoid(2 z) = x (1 + tanh z) / 2 with gelu's z.
template <typename V>
inline V activate(V x, int activation) {
  V z = x;
  if (activation == kGeluTanh) z = 1.5957691216f * (x + 0.044715f * x * x * x);
  const V decay = exp_nonpositive(z < 0 ? z : -z);
  return x * (z < 0 ? decay : 1 + V{}) / (1 + decay);
}

// out = activation(x) * up; `out` may be `x`.
template <typename T>
void gate(const T* x, const T* up, int64_t count, int activation, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, activate(load(x + i), activation) * load(up + i));
  if (i < count) {
    float a[kLanes] = {}, b[kLanes] = {};
    for (int64_t k = i; k < count; k++) a[k - i] = to_float(x[k]), b[k - i] = to_float(up[k]);
    store(a, activate(load(a), activation) * load(b));
    for (int64_t k = i; k < count; k++) from_float(a[k - i], out + k);
  }
}

// out = x + y; `out` may be either.
template <typename T>
void add(const T* x, const T* y, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i) + load(y + i));
  for (; i < count; i++) from_float(to_float(x[i]) + to_float(y[i]), out + i);
}

// Rotary positions (Su et al., arXiv 2104.09864) with the halves of a head as pairs: x [rows, heads, dim] by
// strides, cos and sin [rows, dim], out [rows, heads, dim] contiguous; `out` may be `x`.
template <typename T>
void rotate(const T* x, int64_t row_stride, int64_t head_stride, int64_t rows, int64_t heads, int64_t dim,
            const T* cos, const T* sin, T* out) {
  const int64_t half = dim / 2;
  for (int64_t r = 0; r < rows; r++) {
    const T *c = cos + r * dim, *s = sin + r * dim;
    for (int64_t h = 0; h < heads; h++) {
      const T* in = x + r * row_stride + h * head_stride;
      T* o = out + (r * heads + h) * dim;
      int64_t d = 0;
      for (; d + kLanes <= half; d += kLanes) {
        const vec first = load(in + d), second = load(in + half + d);
        store(o + d, first * load(c + d) - second * load(s + d));
        store(o + half + d, second * load(c + half + d) + first * load(s + half + d));
      }
      for (; d < half; d++) {
        const float first = to_float(in[d]), second = to_float(in[half + d]);
        from_float(first * to_float(c[d]) - second * to_float(s[d]), o + d);
        from_float(second * to_float(c[half + d]) + first * to_float(s[half + d]), o + half + d);
      }
    }
  }
}

}  // namespace
