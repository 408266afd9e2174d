// Side paths that are Kronecker products (LoKr, arXiv 2309.14859): kron(W1, W2) x, as two small products and
// without ever being multiplied out. With x seen as X [i1, i2] and the output as [o1, o2] it is W1 X W2^T, of
// which the half that leaves less between the two products comes first: at most sqrt(inputs * outputs)
// numbers. layers/linear/low_rank.py holds the same in torch.

#pragma once

#include "small_products.h"

namespace {

struct Kron {
  const float* w1;  // [o1, i1], scaling folded in
  const float* w2;  // [i2, o2], W2 transposed
  int64_t o1, i1, o2, i2;

  bool by_w2_first() const { return i1 * o2 <= o1 * i2; }
  int64_t between() const { return w1 ? std::min(i1 * o2, o1 * i2) : 0; }  // numbers for each row
  int64_t lines() const { return by_w2_first() ? i1 : o1; }                // of what is between
};

// Lines [from, to) of what is between the products for one row: X W2^T, or W1 X; times the weight.
template <typename X>
void kron_first(const Kron& kron, const X* x, int64_t from, int64_t to, float weight, float* between) {
  const int64_t i1 = kron.i1, o2 = kron.o2, i2 = kron.i2;
  const float *w1 = kron.w1, *w2 = kron.w2;
  if (kron.by_w2_first())
    small_product(to - from, x + from * i2, i2, i2, w2, 0, o2, 0, o2, weight, false, between + from * o2, o2);
  else
    small_product(to - from, w1 + from * i1, i1, i1, x, 0, i2, 0, i2, weight, false, between + from * i2, i2);
}

// Calls run(p, from, to, done) for the parts of columns [column, column + columns) that lie in one line p of
// the output as [o1, o2]: its entries [from, to), `done` columns being before them.
template <typename Run>
void for_lines(int64_t o2, int64_t column, int64_t columns, Run&& run) {
  for (int64_t done = 0; done < columns;) {
    const int64_t from = (column + done) % o2, to = std::min(o2, from + columns - done);
    run((column + done) / o2, from, to, done);
    done += to - from;
  }
}

// Adds to columns [column, column + columns) of the rows' outputs, out [rows, out_stride].
inline void kron_second(const Kron& kron, const float* between, int64_t stride, int64_t rows, int64_t column,
                        int64_t columns, float* out, int64_t out_stride) {
  const int64_t i1 = kron.i1, o2 = kron.o2, i2 = kron.i2;
  const float *w1 = kron.w1, *w2 = kron.w2;
  const bool w2_first = kron.by_w2_first();
  for_lines(o2, column, columns, [&](int64_t p, int64_t from, int64_t to, int64_t done) {
    if (w2_first)
      small_product(rows, w1 + p * i1, 0, i1, between, stride, o2, from, to, 1.0f, true, out + done,
                    out_stride);
    else
      small_product(rows, between + p * i2, stride, i2, w2, 0, o2, from, to, 1.0f, true, out + done,
                    out_stride);
  });
}

// wide [inputs, width] += columns [column, column + columns) of the product's transpose.
inline void kron_fold(const Kron& kron, int64_t column, int64_t columns, float* wide, int64_t width) {
  if (!kron.w1) return;
  const int64_t i1 = kron.i1, o2 = kron.o2, i2 = kron.i2;
  const float *w1 = kron.w1, *w2 = kron.w2;
  for_lines(o2, column, columns, [&](int64_t p, int64_t from, int64_t to, int64_t done) {
    for (int64_t i = 0; i < i1 * i2; i++) {
      const float one = w1[p * i1 + i / i2];
      const float* line = w2 + i % i2 * o2;
      for (int64_t q = from; q < to; q++) wide[i * width + done + q - from] += one * line[q];
    }
  });
}

}  // namespace
