// Lets a processor without AVX-512 run what the operators do on one that has it, VNNI and BF16 included: vectors of 64
// bytes are taken apart by the compiler, and the few instructions that the sources name are written out here, after
// Intel's Intrinsics Guide.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#if defined(POLYGRAFT_VNNI)
#define __AVX512VNNI__ 1
#endif
#if defined(POLYGRAFT_BF16)
#define __AVX512BF16__ 1
#endif

namespace in_software {

typedef int8_t signed_bytes __attribute__((vector_size(64)));
typedef uint8_t unsigned_bytes __attribute__((vector_size(64)));
typedef int16_t words __attribute__((vector_size(64)));
typedef int32_t doubles __attribute__((vector_size(64)));
typedef float floats __attribute__((vector_size(64)));

inline __m512i dpbusd(__m512i sum, __m512i a, __m512i b) {
  doubles out = doubles(sum);
  for (int i = 0; i < 64; i++) out[i / 4] += unsigned_bytes(a)[i] * signed_bytes(b)[i];
  return __m512i(out);
}

inline __m512i maddubs(__m512i a, __m512i b) {
  words out;
  for (int i = 0; i < 32; i++) {
    const int sum = unsigned_bytes(a)[2 * i] * signed_bytes(b)[2 * i] +
                    unsigned_bytes(a)[2 * i + 1] * signed_bytes(b)[2 * i + 1];
    out[i] = int16_t(sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum);
  }
  return __m512i(out);
}

inline __m512i madd(__m512i a, __m512i b) {
  doubles out;
  for (int i = 0; i < 16; i++)
    out[i] = words(a)[2 * i] * words(b)[2 * i] + words(a)[2 * i + 1] * words(b)[2 * i + 1];
  return __m512i(out);
}

inline __m512 loadu(const void* p) {
  floats out;
  std::memcpy(&out, p, sizeof(out));
  return __m512(out);
}

inline __m512 permute(__m512i index, __m512 values) {
  floats out;
  for (int i = 0; i < 16; i++) out[i] = floats(values)[doubles(index)[i] & 15];
  return __m512(out);
}

inline __m512i widen(__m128i bytes) {
  typedef uint8_t sixteen __attribute__((vector_size(16)));
  doubles out;
  for (int i = 0; i < 16; i++) out[i] = sixteen(bytes)[i];
  return __m512i(out);
}

inline __m512i widen_words(__m256i words) {
  typedef uint16_t sixteen __attribute__((vector_size(32)));
  doubles out;
  for (int i = 0; i < 16; i++) out[i] = sixteen(words)[i];
  return __m512i(out);
}

inline float of_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float f;
  std::memcpy(&f, &wide, sizeof(f));
  return f;
}

inline __m512 dpbf16(__m512 sum, __m512bh a, __m512bh b) {
  typedef uint16_t thirty_two __attribute__((vector_size(64)));
  floats out = floats(sum);
  for (int i = 0; i < 16; i++)
    for (int k = 2 * i + 1; k >= 2 * i; k--) out[i] += of_bfloat16(thirty_two(a)[k]) * of_bfloat16(thirty_two(b)[k]);
  return __m512(out);
}

inline __m256bh narrow(__m512 wide) {
  typedef uint16_t sixteen __attribute__((vector_size(32)));
  sixteen out;
  for (int i = 0; i < 16; i++) {
    const float f = floats(wide)[i];
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof(bits));
    out[i] = f != f ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  return __m256bh(out);
}

}  // namespace in_software

#define _mm512_dpbusd_epi32 in_software::dpbusd
#define _mm512_maddubs_epi16 in_software::maddubs
#define _mm512_madd_epi16 in_software::madd
#define _mm512_loadu_ps in_software::loadu
#define _mm512_permutexvar_ps in_software::permute
#define _mm512_cvtepu8_epi32 in_software::widen
#define _mm512_cvtepu16_epi32 in_software::widen_words
#define _mm512_dpbf16_ps in_software::dpbf16
#define _mm512_cvtneps_pbh in_software::narrow
