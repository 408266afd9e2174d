// Rows times one panel of int8 weights: weights by column and rows by row are whole numbers of at most 127
// times a scale, and their products are summed exactly (LLM.int8() without outliers, arXiv 2208.07339).
// Panels hold [in / 2, kPanel, 2].

#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <cmath>
#include <vector>

#include "panels.h"

namespace {

typedef int8_t bytes __attribute__((vector_size(kLanes * 2)));
typedef int16_t shorts __attribute__((vector_size(kLanes * 2 * 2)));
typedef int16_t half_shorts __attribute__((vector_size(kLanes * 2)));

// Neighbours' products, summed: out[i] = a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1].
inline ivec multiply_pairs(shorts a, shorts b) {
#if defined(__AVX512BW__)
  return ivec(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
  return ivec(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#elif defined(__SSE2__) && !defined(__AVX__)
  return ivec(_mm_madd_epi16(__m128i(a), __m128i(b)));
#else
  ivec out;
  for (int i = 0; i < kLanes; i++) out[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return out;
#endif
}

inline shorts load_pairs(const int8_t* p) {
  bytes b;
  std::memcpy(&b, p, sizeof(b));
  // Compilers take the conversion apart where one instruction does it.
#if defined(__AVX512BW__)
  return shorts(_mm512_cvtepi8_epi16(__m256i(b)));
#elif defined(__AVX2__)
  return shorts(_mm256_cvtepi8_epi16(__m128i(b)));
#else
  return __builtin_convertvector(b, shorts);
#endif
}

inline shorts splat_pair(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof(pair));
  return shorts(pair + ivec{});
}

// A block of rows as whole numbers.
struct Int8Rows {
  std::vector<int16_t> values;  // [rows, inputs]
  std::vector<float> scale;     // [rows]
};

template <typename T>
void quantize(const T* x, int64_t rows, int64_t in, Int8Rows& out, int64_t stride) {
  const int64_t inputs = (in + 1) / 2 * 2;
  out.values.resize(rows * inputs);
  out.scale.resize(rows);
  const vec shift = 12582912.0f + vec{};  // 1.5 * 2^23: adding it rounds to a whole number
  for (int64_t r = 0; r < rows; r++) {
    const T* row = x + r * stride;
    vec tops = {};
    int64_t i = 0;
    for (; i + kLanes <= in; i += kLanes) {
      const vec v = load(row + i);
      const vec size = v < 0 ? -v : v;
      tops = (size > tops) | (size != size) ? size : tops;
    }
    float top = 0;
    for (int k = 0; k < kLanes; k++) top = tops[k] > top || tops[k] != tops[k] ? tops[k] : top;
    for (; i < in; i++) {
      const float size = std::fabs(to_float(row[i]));
      top = size > top || size != size ? size : top;
    }
    // NaN and infinity go through the scale: what they make of the row stays visible.
    out.scale[r] = top / 127.0f;
    const float inverse = top > 0 && top - top == 0 ? 127.0f / top : 0.0f;
    int16_t* to = out.values.data() + r * inputs;
    i = 0;
    for (; i + kLanes <= in; i += kLanes) {
      const vec whole = (load(row + i) * inverse + shift) - shift;
      const half_shorts h = __builtin_convertvector(__builtin_convertvector(whole, ivec), half_shorts);
      std::memcpy(to + i, &h, sizeof(h));
    }
    for (; i < in; i++) to[i] = int16_t(std::nearbyint(to_float(row[i]) * inverse));
    if (in < inputs) to[in] = 0;
  }
}

// acc[ROWS, kPanel] = values[ROWS, inputs] times one panel, in float32 by the columns' and the rows' scales.
template <int ROWS>
void multiply_tile_int8(const int16_t* x, const float* row_scale, const int8_t* w, const float* column_scale,
                        int64_t inputs, float* out, Ahead ahead) {
  ivec acc[ROWS][kVecs] = {};
  for (int64_t i = 0; i < inputs; i += 2, w += 2 * kPanel) {
    ahead.step();
    shorts weights[kVecs];
    for (int v = 0; v < kVecs; v++) weights[v] = load_pairs(w + v * 2 * kLanes);
    for (int r = 0; r < ROWS; r++) {
      const shorts pair = splat_pair(x + r * inputs + i);
      for (int v = 0; v < kVecs; v++) acc[r][v] += multiply_pairs(pair, weights[v]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < kVecs; v++)
      store(out + r * kPanel + v * kLanes, __builtin_convertvector(acc[r][v], vec) * splat(row_scale[r]) *
                                               load(column_scale + v * kLanes));
}

template <int ROWS = kTileRows>
void multiply_int8(int64_t rows, const int16_t* x, const float* row_scale, const int8_t* w,
                   const float* column_scale, int64_t inputs, float* out, Ahead ahead) {
  if (rows == ROWS) {
    multiply_tile_int8<ROWS>(x, row_scale, w, column_scale, inputs, out, ahead);
  } else if constexpr (ROWS > 1) {
    multiply_int8<ROWS - 1>(rows, x, row_scale, w, column_scale, inputs, out, ahead);
  }
}

inline void multiply_panel_int8(const Int8Rows& x, int64_t rows, int64_t inputs, const int8_t* w,
                            const float* column_scale, float* acc) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, panel = inputs * kPanel;  // bytes
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t from = rows * t / tiles, to = rows * (t + 1) / tiles;
    multiply_int8(to - from, x.values.data() + from * inputs, x.scale.data() + from, w, column_scale, inputs,
                  acc + from * kPanel, Ahead::of_tile(w + panel, panel, t, tiles, inputs / 2));
  }
}

}  // namespace
