// Conversions and sums of rows, one clone for each instruction set; column sums.
#include "rows.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "../include/vjepa/dtype.h"
#include "../include/vjepa/macros.h"
#include "parallel.h"

namespace vjepa {
namespace {

// Macros, because a compiler clones functions, not templates.
#define VJEPA_ROW_CLONES(name, T)                                                                      \
  VJEPA_MULTIVERSION_LEVELS void load_##name(const void *from, int64_t count, float *__restrict to) {  \
    const T *values = static_cast<const T *>(from);                                                    \
    for (int64_t j = 0; j < count; ++j) to[j] = to_float(values[j]);                                   \
  }                                                                                                    \
  VJEPA_MULTIVERSION_LEVELS void add_##name(const void *from, int64_t count, float *__restrict to) {   \
    const T *values = static_cast<const T *>(from);                                                    \
    for (int64_t j = 0; j < count; ++j) to[j] += to_float(values[j]);                                  \
  }                                                                                                    \
  VJEPA_MULTIVERSION_LEVELS void store_##name(const float *__restrict from, int64_t count, void *to) { \
    T *values = static_cast<T *>(to);                                                                  \
    for (int64_t j = 0; j < count; ++j) values[j] = from_float<T>(from[j]);                            \
  }
VJEPA_ROW_CLONES(f32, float)
VJEPA_ROW_CLONES(bf16, bfloat16)
VJEPA_ROW_CLONES(f16, float16)
#undef VJEPA_ROW_CLONES

// In the order of vjepa_dtype.
constexpr LoadRow kLoads[3] = {load_f32, load_bf16, load_f16};
constexpr LoadRow kAdds[3] = {add_f32, add_bf16, add_f16};
constexpr StoreRow kStores[3] = {store_f32, store_bf16, store_f16};

}  // namespace

LoadRow load_row(int64_t dtype) { return kLoads[dtype]; }
LoadRow add_row(int64_t dtype) { return kAdds[dtype]; }
StoreRow store_row(int64_t dtype) { return kStores[dtype]; }

void fold_rows(float *matrix, int64_t rows, int64_t features, int32_t threads) {
  constexpr int64_t kColumns = 1024;  // whose sums stay in the first-level cache
  const int64_t tiles = (features + kColumns - 1) / kColumns;
  for (; rows > 1; rows = sum_blocks(rows)) {
    parallel_for(tiles, 1 + kMinimumPerThread / (rows * kColumns), threads, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kColumns, count = std::min(end * kColumns, features) - first;
      for (int64_t block = 0; block < sum_blocks(rows); ++block) {
        float *sum = matrix + block * VJEPA_SUM_ROWS * features + first;
        for (int64_t row = 1; row < std::min<int64_t>(VJEPA_SUM_ROWS, rows - block * VJEPA_SUM_ROWS); ++row) {
          add_f32(sum + row * features, count, sum);
        }
        if (block) std::memcpy(matrix + block * features + first, sum, static_cast<size_t>(count) * sizeof(float));
      }
    });
  }
}

}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_column_sums_cpu(const void *matrix, int64_t stride, int64_t rows, int64_t features,
                                         int32_t dtype, float *sums, int32_t threads) try {
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (!is_float_dtype(dtype)) return VJEPA_ERROR_DTYPE;
  if (!is_size(rows, features)) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (features == 0) return VJEPA_OK;
  if (!sums || (rows && !matrix)) return VJEPA_ERROR_NULL_POINTER;
  if (!is_aligned(matrix, dtype) || !is_aligned(sums, VJEPA_FLOAT32)) return VJEPA_ERROR_ALIGNMENT;
  const int64_t blocks = sum_blocks(rows), bytes = dtype_bytes(dtype);
  Floats partial(std::max<int64_t>(blocks, 1) * features);
  parallel_for(blocks, 1 + kMinimumPerThread / (VJEPA_SUM_ROWS * features), threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first * VJEPA_SUM_ROWS; row < std::min(last * VJEPA_SUM_ROWS, rows); ++row) {
      add_row(dtype)(static_cast<const char *>(matrix) + row * stride * bytes, features,
                     partial.data() + row / VJEPA_SUM_ROWS * features);
    }
  });
  fold_rows(partial.data(), blocks, features, threads);
  std::memcpy(sums, partial.data(), static_cast<size_t>(features) * sizeof(float));
  return VJEPA_OK;
} catch (const std::bad_alloc &) {
  return VJEPA_ERROR_MEMORY;
}
