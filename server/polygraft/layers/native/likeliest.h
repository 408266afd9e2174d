// The token that greedy sampling takes; engine/sampling/sampler.py holds the same in torch.

#pragma once

#include <cmath>

#include "vectors.h"

namespace {

// The first of the largest in row [width]; -1 if that isn't a finite number, as where any is NaN.
template <typename T>
int64_t likeliest(const T* row, int64_t width) {
  constexpr int kChains = 4;  // of comparisons, which wait for each other
  vec tops[kChains];
  for (vec& top : tops) top = splat(-INFINITY);
  auto larger = [](vec a, vec b) { return (b > a) | (b != b) ? b : a; };
  int64_t i = 0;
  for (; i + kChains * kLanes <= width; i += kChains * kLanes)
    for (int c = 0; c < kChains; c++) tops[c] = larger(tops[c], load(row + i + c * kLanes));
  for (int c = 1; c < kChains; c++) tops[0] = larger(tops[0], tops[c]);
  float top = -INFINITY;
  auto take = [&](float x) { top = x > top || x != x ? x : top; };
  for (int k = 0; k < kLanes; k++) take(tops[0][k]);
  for (; i < width; i++) take(to_float(row[i]));
  if (top - top != 0) return -1;
  const vec wanted = splat(top);
  for (i = 0; i + kLanes <= width; i += kLanes) {
    const ivec equal = load(row + i) == wanted;
    int any = 0;
    for (int k = 0; k < kLanes; k++) any |= equal[k];
    if (any) break;
  }
  while (to_float(row[i]) != top) i++;
  return i;
}

}  // namespace
