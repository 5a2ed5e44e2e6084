// Rows of floats of any dtype, read and written as float32.
#pragma once

#include <cstdint>
#include <new>
#include <vector>

#include "../capi_block.h"
#include "../include/vjepa/pack.h"
#include "../include/vjepa/table_check.h"

namespace vjepa {

constexpr int64_t kMinimumPerThread = 1 << 15;  // elements; some ten microseconds

using LoadRow = void (*)(const void *from, int64_t count, float *to);
using StoreRow = void (*)(const float *from, int64_t count, void *to);

// For a vjepa_dtype that was checked: to = from, to += from, to = from rounded to nearest even.
LoadRow load_row(int64_t dtype);
LoadRow add_row(int64_t dtype);
StoreRow store_row(int64_t dtype);

inline bool is_aligned(const void *pointer, int64_t dtype) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(dtype_bytes(dtype)) == 0;
}

// Whether rows * features elements can be counted in bytes.
inline bool is_size(int64_t rows, int64_t features) {
  constexpr int64_t kMost = INT64_MAX / 8;
  return rows >= 0 && features >= 0 && (features == 0 || rows <= kMost / features);
}

inline int64_t sum_blocks(int64_t rows) { return (rows + VJEPA_SUM_ROWS - 1) / VJEPA_SUM_ROWS; }

// Room for floats whose first has the alignment of the widest registers: what crosses cache lines takes twice as long.
class Floats {
 public:
  explicit Floats(int64_t count) : room_(static_cast<size_t>(count) + kLine - 1) {}
  // False where there is no memory.
  bool try_resize(int64_t count) {
    try {
      room_.resize(static_cast<size_t>(count) + kLine - 1);
      return true;
    } catch (const std::bad_alloc &) {
      return false;
    }
  }
  float *data() {
    const uintptr_t first = reinterpret_cast<uintptr_t>(room_.data()) / sizeof(float);
    return room_.data() + (kLine - first % kLine) % kLine;
  }

 private:
  static constexpr uintptr_t kLine = 16;
  std::vector<float> room_;
};

// Adds up the rows of a matrix without gaps, which is overwritten, into its first row, VJEPA_SUM_ROWS at a time.
void fold_rows(float *matrix, int64_t rows, int64_t features, int32_t threads);

}  // namespace vjepa
