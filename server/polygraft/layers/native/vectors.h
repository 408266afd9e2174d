// Vectors of floats of the machine's own width, and bfloat16 beside them: GCC/Clang vector extensions, so
// that one source serves AVX-512, AVX2 and what the compiler takes for granted elsewhere.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

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
  return vec(__builtin_convertvector(h, uvec) << 16);
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
  const uvec bits = uvec(v);
  const uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uvec is_nan = uvec(v != v);
  const hvec h = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), hvec);
  std::memcpy(p, &h, sizeof(h));
}

inline float sum(vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
}

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
