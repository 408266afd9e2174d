// Products of bytes, summed in whole numbers: weights as unsigned bytes, rows as signed ones, four
// neighbouring inputs of a column in each lane.

#pragma once

#include "vectors.h"

// AVX2 and AVX-512 without VNNI multiply bytes twice as fast as 16-bit numbers, but sum the products in 16
// bits.
#if (defined(__AVX2__) || defined(__AVX512BW__)) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
#define POLYGRAFT_CLIPS_ROWS 1
#else
#define POLYGRAFT_CLIPS_ROWS 0
#endif

namespace {

typedef int8_t quarter __attribute__((vector_size(kLanes)));
typedef int8_t bytes __attribute__((vector_size(kLanes * 4)));
typedef int16_t shorts __attribute__((vector_size(kLanes * 4)));
typedef uint16_t unsigned_shorts __attribute__((vector_size(kLanes * 4)));

inline bytes load_fours(const uint8_t* p) {
  bytes b;
  std::memcpy(&b, p, sizeof(b));
  return b;
}

// The same four inputs of a row for all columns.
inline bytes splat_fours(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof(four));
  return bytes(four + ivec{});
}

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

// acc + w times x over four inputs: one instruction where the processor has it (VNNI), else even and odd
// inputs as 16-bit numbers.
inline ivec multiply_fours(ivec acc, bytes w, bytes x) {
#if defined(__AVX512VNNI__)
  return ivec(_mm512_dpbusd_epi32(__m512i(acc), __m512i(w), __m512i(x)));
#elif defined(__AVXVNNI__)
  return ivec(_mm256_dpbusd_avx_epi32(__m256i(acc), __m256i(w), __m256i(x)));
#else
  const shorts even = shorts(unsigned_shorts(w) & 255), odd = shorts(unsigned_shorts(w) >> 8);
  return acc + multiply_pairs(even, (shorts(x) << 8) >> 8) + multiply_pairs(odd, shorts(x) >> 8);
#endif
}

// acc + w times x over eight inputs, four of them in w0 and x0; of any rows.
struct AnyRows {
  static ivec eight(ivec acc, bytes w0, bytes x0, bytes w1, bytes x1) {
    return multiply_fours(multiply_fours(acc, w0, x0), w1, x1);
  }
};

#if POLYGRAFT_CLIPS_ROWS

// out[i] = w[2 i] x[2 i] + w[2 i + 1] x[2 i + 1] in 16 bits.
inline shorts sums_of_two(bytes w, bytes x) {
#if defined(__AVX512BW__)
  return shorts(_mm512_maddubs_epi16(__m512i(w), __m512i(x)));
#else
  return shorts(_mm256_maddubs_epi16(__m256i(w), __m256i(x)));
#endif
}

// The same of rows that rows_int8.h has clipped, so that sums of two or of four products fit in 16 bits.
struct SumsOfTwo {
  static ivec eight(ivec acc, bytes w0, bytes x0, bytes w1, bytes x1) {
    const shorts one = 1 + shorts{};
    return acc + multiply_pairs(sums_of_two(w0, x0), one) + multiply_pairs(sums_of_two(w1, x1), one);
  }
};
struct SumsOfFour {
  static ivec eight(ivec acc, bytes w0, bytes x0, bytes w1, bytes x1) {
    return acc + multiply_pairs(sums_of_two(w0, x0) + sums_of_two(w1, x1), 1 + shorts{});
  }
};

#endif

}  // namespace
