// Vectors of floats of the machine's own width, and bfloat16 beside them: GCC/Clang vector extensions, so
// that one source serves AVX-512, AVX2 and what the compiler takes for granted elsewhere.

#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

// Whether the processor multiplies pairs of bfloat16 and adds the products to a sum in float32 (AVX512-BF16).
#if defined(__AVX512BF16__)
#define POLYGRAFT_DOTS_OF_BF16 1
#else
#define POLYGRAFT_DOTS_OF_BF16 0
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVecs = 2;
constexpr int kPanel = kVecs * kLanes;  // columns that are computed together
typedef float vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t uvec __attribute__((vector_size(kLanes * 4)));
typedef int32_t ivec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t hvec __attribute__((vector_size(kLanes * 2)));

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void from_float(float f, float* out) { *out = f; }
inline void from_float(float f, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  // Round to nearest even, as torch does; NaN stays NaN.
  if (f != f) {
    out->bits = 0x7fc0;
  } else {
    out->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline uvec load(const uint32_t* p) {
  uvec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline vec load(const bf16* p) {
  hvec h;
  std::memcpy(&h, p, sizeof(h));
#if defined(__AVX512F__)
  return vec(uvec(_mm512_cvtepu16_epi32(__m256i(h))) << 16);  // which compilers take apart in halves
#else
  return vec(__builtin_convertvector(h, uvec) << 16);
#endif
}

// Listed out: `vec{} + x` adds a zero first, which the compiler may not drop because of -0.
inline vec splat(float x) {
#if defined(__AVX512F__)
  return vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif defined(__AVX__)
  return vec{x, x, x, x, x, x, x, x};
#else
  return vec{x, x, x, x};
#endif
}

inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(bf16* p, vec v) {
#if POLYGRAFT_DOTS_OF_BF16
  const __m256bh narrow =
      _mm512_cvtneps_pbh(__m512(v));  // the same, but for numbers too small for a product of them
  std::memcpy(p, &narrow, sizeof(narrow));
#else
  const uvec bits = uvec(v);
  const uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uvec is_nan = uvec(v != v);
  const hvec h = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), hvec);
  std::memcpy(p, &h, sizeof(h));
#endif
}

#if POLYGRAFT_DOTS_OF_BF16

inline uvec load_pairs(const bf16* p) {
  uvec pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  return pairs;
}

// The same two inputs of a row for all columns.
inline uvec splat_pair(const bf16* p) {
  uint32_t pair;
  std::memcpy(&pair, p, sizeof(pair));
  return pair + uvec{};
}

// sum[i] + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1]
inline vec add_products_of_pairs(vec sum, uvec a, uvec b) {
  return vec(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
}

#endif

typedef float four __attribute__((vector_size(16)));
typedef float eight __attribute__((vector_size(32)));
typedef float sixteen __attribute__((vector_size(64)));

template <typename Half, typename Whole>
inline Half add_halves(const Whole& v) {
  Half low, high;
  std::memcpy(&low, &v, sizeof(Half));
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(Half), sizeof(Half));
  return low + high;
}

// By halves: one lane after another would take as many times an addition's whole latency.
inline float sum(four v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float sum(eight v) { return sum(add_halves<four>(v)); }
inline float sum(sixteen v) { return sum(add_halves<eight>(v)); }

// e^x for x <= 0, within 2 ulp. Range reduction and polynomial after Cephes' expf.
inline vec exp_nonpositive(vec x) {
  x = x < -87.0f ? -87.0f + vec{} : x;
  const vec shift = 12582912.0f + vec{};  // 1.5 * 2^23: adding it rounds to a whole number
  const vec n = (x * 1.44269504f + shift) - shift;
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = 1.9875691500e-4f + vec{};
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * vec((__builtin_convertvector(n, ivec) + 127) << 23);
}

}  // namespace
