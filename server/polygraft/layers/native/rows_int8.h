// Rows as whole numbers of at most 127 times a scale, for products with int8 weights.
//
// Where the processor sums products of bytes in 16 bits, rows are clipped: of numbers whose products are
// summed there, the positive ones add up to at most kMostOfSum and so do the negative ones. What is clipped
// off goes to a list and is multiplied by itself, so that products stay exact. A row's scale comes from its
// largest number and most others are small: of the default model's rows two numbers in a thousand are clipped
// for sums of four.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "dots_int8.h"

namespace {

// Inputs that are multiplied at a time; rows and weights are padded to whole ones.
constexpr int64_t kInt8Inputs = 8;
constexpr int kMostOfSum = 128;  // times 255, the largest weight, fits in 16 bits

inline int64_t int8_inputs(int64_t in) { return (in + kInt8Inputs - 1) / kInt8Inputs * kInt8Inputs; }

// How many products of a row are summed in 16 bits. The more, the faster, but the more numbers must be
// clipped.
enum SumOf : uint8_t { kFour, kTwo, kOne };

struct Clip {
  int32_t input, rest;
};

// A block of rows.
struct Int8Rows {
  std::vector<int8_t> values;    // [rows, inputs]
  std::vector<float> scale;      // [rows]
  std::vector<int32_t> start;    // [rows] what the sums start from: takes off what weights around 128 add
  std::vector<Clip> clips;       // all rows'
  std::vector<int32_t> clipped;  // [rows + 1] where a row's begin
  std::vector<SumOf> sums;       // [rows]
};

#if POLYGRAFT_CLIPS_ROWS

// Clips eight inputs in place, for sums of OF products.
template <int OF>
void clip_eight(int8_t* x, int64_t input, std::vector<Clip>& clips) {
  for (int first = 0; first < 8; first = OF == 4 && first == 2 ? 8 : first + 2)
    for (const int sign : {1, -1}) {
      const int inputs[] = {first, first + 1, first + 4, first + 5};  // the last two only of a sum of four
      int over = -kMostOfSum;
      for (int k = 0; k < OF; k++) over += std::max(0, sign * x[inputs[k]]);
      while (over > 0) {
        const int most =
            *std::max_element(inputs, inputs + OF, [&](int a, int b) { return sign * x[a] < sign * x[b]; });
        const int rest = std::min(over, sign * x[most]);
        x[most] -= int8_t(sign * rest);
        clips.push_back({int32_t(input + most), sign * rest});
        over -= rest;
      }
    }
}

// A bit for each of 32 inputs: two are set for each sum that is too large, among those of its eight inputs.
template <int OF>
uint32_t too_much(const int8_t* x) {
  const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m256i zero = _mm256_setzero_si256();
  const __m256i one = _mm256_set1_epi8(1), most = _mm256_set1_epi16(kMostOfSum);
  auto over = [&](__m256i sizes) {
    __m256i sums = _mm256_maddubs_epi16(sizes, one);
    // The other two of a sum of four are in the upper half of an eight, which then adds up nothing.
    if (OF == 4)
      sums = _mm256_add_epi16(_mm256_and_si256(sums, _mm256_set1_epi64x(0xffffffff)),
                              _mm256_srli_epi64(sums, 32));
    return _mm256_cmpgt_epi16(sums, most);
  };
  const __m256i negative = _mm256_max_epi8(_mm256_sub_epi8(zero, values), zero);
  return uint32_t(_mm256_movemask_epi8(_mm256_or_si256(over(_mm256_max_epi8(values, zero)), over(negative))));
}

// Clips row [inputs] in place, unless more than one number in `limit` must be.
template <int OF>
bool clip_row(int8_t* row, int64_t inputs, int64_t limit, std::vector<Clip>& clips) {
  const size_t before = clips.size();
  int64_t i = 0, sums = 0;
  for (; i + 32 <= inputs; i += 32) sums += __builtin_popcount(too_much<OF>(row + i)) / 2;
  if (sums * limit > inputs) return false;
  i = 0;
  for (; i + 32 <= inputs; i += 32)
    if (const uint32_t found = too_much<OF>(row + i))
      for (int64_t k = 0; k < 32; k += kInt8Inputs)
        if (found >> k & 255) clip_eight<OF>(row + i + k, i + k, clips);
  for (; i < inputs; i += kInt8Inputs) clip_eight<OF>(row + i, i, clips);
  if (int64_t(clips.size() - before) * limit <= inputs) return true;
  for (size_t c = before; c < clips.size(); c++) row[clips[c].input] += int8_t(clips[c].rest);
  clips.resize(before);
  return false;
}

inline SumOf clip_row(int8_t* row, int64_t inputs, std::vector<Clip>& clips) {
  if (clip_row<4>(row, inputs, 64, clips)) return kFour;
  return clip_row<2>(row, inputs, 16, clips) ? kTwo : kOne;
}

#endif

// The bits of a number's size: of two sizes the larger has the larger bits, and NaN's are above all.
inline ivec bits_of_sizes(const float* p) {
  ivec bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits & 0x7fffffff;
}
inline shorts bits_of_sizes(const bf16* p) {
  shorts bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits & 0x7fff;
}

// The largest size in row [in], NaN if any number is.
template <typename T>
float largest_size(const T* row, int64_t in) {
  typedef decltype(bits_of_sizes(row)) Bits;
  constexpr int kCount = sizeof(Bits) / sizeof(T), kChains = 4;  // of comparisons, which wait for each other
  Bits tops[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kCount <= in; i += kChains * kCount)
    for (int c = 0; c < kChains; c++) {
      const Bits bits = bits_of_sizes(row + i + c * kCount);
      tops[c] = bits > tops[c] ? bits : tops[c];
    }
  for (; i + kCount <= in; i += kCount) {
    const Bits bits = bits_of_sizes(row + i);
    tops[0] = bits > tops[0] ? bits : tops[0];
  }
  for (int c = 1; c < kChains; c++) tops[0] = tops[c] > tops[0] ? tops[c] : tops[0];
  T sizes[kCount];
  std::memcpy(sizes, &tops[0], sizeof(sizes));
  float top = 0;
  auto take = [&](T x) {
    const float size = std::fabs(to_float(x));
    top = size > top || size != size ? size : top;
  };
  for (int k = 0; k < kCount; k++) take(sizes[k]);
  for (; i < in; i++) take(row[i]);
  return top;
}

template <typename T>
void quantize(const T* x, int64_t rows, int64_t in, int64_t stride, Int8Rows& out) {
  const int64_t inputs = int8_inputs(in);
  out.values.resize(rows * inputs);
  out.scale.resize(rows);
  out.start.resize(rows);
  out.clipped.assign(1, 0);
  out.sums.assign(rows, kOne);
  out.clips.clear();
  const vec shift = 12582912.0f + vec{};  // 1.5 * 2^23: adding it rounds to a whole number, in the lower bits
  for (int64_t r = 0; r < rows; r++) {
    const T* row = x + r * stride;
    int8_t* to = out.values.data() + r * inputs;
    const float top = largest_size(row, in);
    // NaN and infinity go through the scale: what they make of the row stays visible.
    const bool finite = top - top == 0;
    out.scale[r] = top / 127.0f;
    const float inverse = top > 0 && finite ? 127.0f / top : 0.0f;
    ivec totals = {};
    auto whole = [&](int64_t i) {
      const ivec n = ivec(load(row + i) * inverse + shift) - ivec(shift);
      totals += n;
      return n;
    };
    int64_t i = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
    for (; i + 32 <= in; i += 32) {
      const __m256i low = _mm256_packs_epi32(__m256i(whole(i)), __m256i(whole(i + 8)));
      const __m256i high = _mm256_packs_epi32(__m256i(whole(i + 16)), __m256i(whole(i + 24)));
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing goes by halves
      const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), packed);
    }
#endif
    for (; i + kLanes <= in; i += kLanes) {
      const quarter packed = __builtin_convertvector(whole(i), quarter);
      std::memcpy(to + i, &packed, sizeof(packed));
    }
    int32_t total = 0;
    for (int k = 0; k < kLanes; k++) total += totals[k];
    for (; i < in; i++) {
      to[i] = finite ? int8_t(std::nearbyint(to_float(row[i]) * inverse)) : 0;
      total += to[i];
    }
    std::fill(to + in, to + inputs, 0);
    out.start[r] = -128 * (finite ? total : 0);
#if POLYGRAFT_CLIPS_ROWS
    if (finite) out.sums[r] = clip_row(to, inputs, out.clips);
#endif
    out.clipped.push_back(int32_t(out.clips.size()));
  }
}

}  // namespace
