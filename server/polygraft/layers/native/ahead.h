#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kCacheLine = 64;

// What is read after the present product, run by run.
class Later {
 public:
  void clear() {
    runs_.clear();
    at_ = 0;
  }
  void add(const void* from, int64_t bytes) { runs_.push_back({static_cast<const char*>(from), bytes}); }

  // The beginning of what is left, as much of a run as so many fetches reach; null if nothing is left.
  const char* take(int64_t fetches) {
    if (at_ == runs_.size()) return nullptr;
    Run& run = runs_[at_];
    const char* from = run.from;
    const int64_t taken = std::min(run.bytes, fetches * kCacheLine);
    run.from += taken;
    run.bytes -= taken;
    at_ += run.bytes == 0;
    return from;
  }

 private:
  struct Run {
    const char* from;
    int64_t bytes;
  };
  std::vector<Run> runs_;
  size_t at_ = 0;
};

// What is read next, fetched from memory while something else is computed. The processor's own prefetching
// follows what is read: a panel of weights is read once from memory and then by every tile of rows from the
// cache, and blocks of the paged cache and adapters' weights lie anywhere. Without this, memory and products
// would take turns.
struct Ahead {
  const char* from;   // may lie behind the last panel: nothing is read there
  int64_t pace;       // bytes in each step of a tile's loop, at most two cache lines
  const char* later;  // read after what comes next
  int64_t later_pace;

  Ahead(const void* next, int64_t pace)
      : from(static_cast<const char*>(next)), pace(pace), later(from), later_pace(0) {}

  // The part of `bytes` from `next` on that a tile fetches in `steps`.
  static Ahead of_tile(const void* next, int64_t bytes, int64_t tile, int64_t tiles, int64_t steps) {
    return {static_cast<const char*>(next) + bytes * tile / tiles,
            (bytes + tiles * steps - 1) / (tiles * steps)};
  }
  // And of what is read later.
  static Ahead of_tile(const void* next, int64_t bytes, int64_t tile, int64_t tiles, int64_t steps,
                       Later& later) {
    Ahead ahead = of_tile(next, bytes, tile, tiles, steps);
    if (const char* run = later.take(steps)) {
      ahead.later = run;
      ahead.later_pace = kCacheLine;
    }
    return ahead;
  }
  void step() {
    __builtin_prefetch(from, 0, 2);
    __builtin_prefetch(from + kCacheLine, 0, 2);
    __builtin_prefetch(later, 0, 2);
    from += pace;
    later += later_pace;
  }
};

}  // namespace
