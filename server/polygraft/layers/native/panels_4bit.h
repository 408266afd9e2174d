// Rows times one panel of 4-bit weights: each is one of 16 values times the scale of its block of 64 inputs
// (QLoRA, arXiv 2305.14314, and bitsandbytes' fp4). A block of a panel is widened to float32 in the cache and
// multiplied as float32 weights are. Panels hold [in / 2, kPanel] bytes, the even input's value in the lower
// half.

#pragma once

#include "panels.h"

namespace {

constexpr int64_t kScaleInputs = 64;  // inputs that share a scale
static_assert(kBlockInputs % kScaleInputs == 0);

typedef uint8_t quarter_bytes __attribute__((vector_size(kLanes)));

struct Codes {  // the 16 values, where a lookup reaches them
#if defined(__AVX512F__)
  __m512 all;
  explicit Codes(const float* values) : all(_mm512_loadu_ps(values)) {}
  vec operator()(ivec index) const { return vec(_mm512_permutexvar_ps(__m512i(index), all)); }
#elif defined(__AVX2__)
  __m256 low, high;
  explicit Codes(const float* values) : low(_mm256_loadu_ps(values)), high(_mm256_loadu_ps(values + 8)) {}
  vec operator()(ivec index) const {
    const __m256i i = __m256i(index);
    return vec(_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i),
                                _mm256_castsi256_ps(_mm256_slli_epi32(i, 28))));
  }
#else
  const float* values;
  explicit Codes(const float* values) : values(values) {}
  vec operator()(ivec index) const {
    vec out;
    for (int i = 0; i < kLanes; i++) out[i] = values[index[i]];
    return out;
  }
#endif
};

inline ivec load_bytes(const uint8_t* p) {
  quarter_bytes q;
  std::memcpy(&q, p, sizeof(q));
  // Compilers take the conversion apart where one instruction does it.
#if defined(__AVX512F__)
  return ivec(_mm512_cvtepu8_epi32(__m128i(q)));
#elif defined(__AVX2__)
  int64_t bits;
  std::memcpy(&bits, &q, sizeof(bits));
  return ivec(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits)));
#else
  return __builtin_convertvector(q, ivec);
#endif
}

// wide [inputs, kPanel] = a part of a panel in float32, by its scales [inputs / 64, kPanel].
inline void widen_4bit(const uint8_t* w, const float* scale, const Codes& codes, int64_t inputs,
                       float* wide) {
  for (int64_t at = 0; at < inputs; at += kScaleInputs)
    for (int v = 0; v < kVecs; v++) {
      const vec factor = load(scale + at / kScaleInputs * kPanel + v * kLanes);
      for (int64_t k = at; k < at + kScaleInputs; k += 2) {
        const ivec both = load_bytes(w + k / 2 * kPanel + v * kLanes);
        store(wide + k * kPanel + v * kLanes, codes(both & 15) * factor);
        store(wide + (k + 1) * kPanel + v * kLanes, codes(both >> 4) * factor);
      }
    }
}

// acc[rows, kPanel] = x[rows, inputs] times one panel, whose scales are [inputs / 64, kPanel].
inline void multiply_panel_4bit(const float* x, int64_t rows, int64_t inputs, const uint8_t* w,
                                const float* scale, const float* values, float* acc, Later& later) {
  const Codes codes(values);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  alignas(64) float wide[kBlockInputs * kPanel];
  for (int64_t i = 0; i < inputs; i += kBlockInputs) {
    const int64_t count = std::min(kBlockInputs, inputs - i);
    const uint8_t* block = w + i / 2 * kPanel;
    widen_4bit(block, scale + i / kScaleInputs * kPanel, codes, count, wide);
    multiply_tiles(rows, tiles, x + i, inputs, static_cast<const float*>(wide), count, acc, i == 0,
                   block + inputs / 2 * kPanel, count / 2 * kPanel, later);
  }
}

}  // namespace
