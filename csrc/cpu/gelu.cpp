// GELU and its gradient on a CPU, tile by tile of a row: from float32 in the first-level cache to float32 in it.
#include "../include/vjepa/gelu.h"

#include <algorithm>
#include <cstring>

#include "../include/vjepa/macros.h"
#include "parallel.h"
#include "rows.h"

namespace vjepa {
namespace {

constexpr int64_t kTile = 512;  // elements; three tiles of float32 beside what is read and written
constexpr int64_t kWhole = 32;  // a multiple of every register's lanes

// Elements that are computed for `count`: so many that no loop has a rest, which might round otherwise than the rest of
// the loop, and results would depend on where a tile ends.
constexpr int64_t whole(int64_t count) { return (count + kWhole - 1) / kWhole * kWhole; }

// float32 rounded as by from_float<T>, which then only narrows it.
template <class T>
VJEPA_HOST_DEVICE float rounded(float value) {
  return to_float(from_float<T>(value));
}
template <>
VJEPA_HOST_DEVICE float rounded<bfloat16>(float value) {
  // Without a look at NaN: one that comes from a bfloat16 has no low bits that could carry beyond its payload.
  const uint32_t bits = bits_from_float(value);
  return float_from_bits((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

template <class T>
VJEPA_HOST_DEVICE T narrowed(float value) {
  return from_float<T>(value);
}
template <>
VJEPA_HOST_DEVICE bfloat16 narrowed<bfloat16>(float value) {
  return bfloat16{static_cast<uint16_t>(bits_from_float(value) >> 16)};
}

// Each loop has arrays that cannot overlap, so that it vectorises without a check, and arithmetic on elements of one
// size, so that it does so in the widest registers.
template <class T>
VJEPA_HOST_DEVICE void gelu_range(const void *hidden, void *active, int64_t begin, int64_t end) {
  const T *from = static_cast<const T *>(hidden);
  T *to = static_cast<T *>(active);
  alignas(64) float values[kTile] = {};
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t count = std::min(kTile, end - first);
    for (int64_t j = 0; j < count; ++j) values[j] = to_float(from[first + j]);
    for (int64_t j = 0; j < whole(count); ++j) values[j] = rounded<T>(GeluOf<T>::value(values[j]));
    for (int64_t j = 0; j < count; ++j) to[first + j] = narrowed<T>(values[j]);
  }
}

// One row; `active` and `sums` may be null.
template <class T>
VJEPA_HOST_DEVICE void gelu_row(const void *grad, const void *hidden, int64_t features, void *dhidden, void *active,
                                float *sums) {
  alignas(64) float values[kTile] = {}, slopes[kTile] = {};
  for (int64_t first = 0; first < features; first += kTile) {
    const int64_t count = std::min(kTile, features - first);
    const T *from = static_cast<const T *>(hidden) + first, *above = static_cast<const T *>(grad) + first;
    for (int64_t j = 0; j < count; ++j) values[j] = to_float(from[j]);
    for (int64_t j = 0; j < count; ++j) slopes[j] = to_float(above[j]);
    for (int64_t j = 0; j < whole(count); ++j) {
      const Gelu both = GeluOf<T>::both(values[j]);
      values[j] = rounded<T>(both.value);
      slopes[j] = rounded<T>(both.slope * slopes[j]);
    }
    if (active) {
      T *to = static_cast<T *>(active) + first;
      for (int64_t j = 0; j < count; ++j) to[j] = narrowed<T>(values[j]);
    }
    if (sums) {
      for (int64_t j = 0; j < count; ++j) sums[first + j] += slopes[j];
    }
    T *to = static_cast<T *>(dhidden) + first;
    for (int64_t j = 0; j < count; ++j) to[j] = narrowed<T>(slopes[j]);
  }
}

// Macros, because a compiler clones functions, not templates.
#define VJEPA_GELU_CLONES(name, T)                                                                           \
  VJEPA_MULTIVERSION_LEVELS void gelu_##name(const void *hidden, void *active, int64_t begin, int64_t end) { \
    gelu_range<T>(hidden, active, begin, end);                                                               \
  }                                                                                                          \
  VJEPA_MULTIVERSION_LEVELS void gelu_row_##name(const void *grad, const void *hidden, int64_t features,     \
                                                 void *dhidden, void *active, float *sums) {                 \
    gelu_row<T>(grad, hidden, features, dhidden, active, sums);                                              \
  }
VJEPA_GELU_CLONES(f32, float)
VJEPA_GELU_CLONES(bf16, bfloat16)
VJEPA_GELU_CLONES(f16, float16)
#undef VJEPA_GELU_CLONES

using Range = void (*)(const void *, void *, int64_t, int64_t);
using Row = void (*)(const void *, const void *, int64_t, void *, void *, float *);
// In the order of vjepa_dtype.
constexpr Range kRanges[3] = {gelu_f32, gelu_bf16, gelu_f16};
constexpr Row kRows[3] = {gelu_row_f32, gelu_row_bf16, gelu_row_f16};

}  // namespace
}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_gelu_cpu(const void *hidden, int64_t count, int32_t dtype, void *active, void *kept,
                                  int32_t threads) {
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (!is_float_dtype(dtype)) return VJEPA_ERROR_DTYPE;
  if (!is_size(count, 1)) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (count && (!hidden || !active)) return VJEPA_ERROR_NULL_POINTER;
  for (const void *pointer : {hidden, static_cast<const void *>(active), static_cast<const void *>(kept)}) {
    if (!is_aligned(pointer, dtype)) return VJEPA_ERROR_ALIGNMENT;
  }
  const int64_t bytes = dtype_bytes(dtype);
  parallel_for(count, kMinimumPerThread, threads, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t last = std::min(first + kTile, end);
      if (kept) {
        std::memcpy(static_cast<char *>(kept) + first * bytes, static_cast<const char *>(hidden) + first * bytes,
                    static_cast<size_t>((last - first) * bytes));
      }
      kRanges[dtype](hidden, active, first, last);
    }
  });
  return VJEPA_OK;
}

extern "C" int32_t vjepa_gelu_backward_cpu(const void *grad, const void *hidden, int64_t hidden_stride, int64_t rows,
                                           int64_t features, int32_t dtype, void *dhidden, void *active, float *sums,
                                           int32_t threads) {
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (!is_float_dtype(dtype)) return VJEPA_ERROR_DTYPE;
  if (!is_size(rows, features)) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (rows == 0 || features == 0) return VJEPA_OK;
  if (!grad || !hidden || !dhidden) return VJEPA_ERROR_NULL_POINTER;
  for (const void *pointer : {grad, hidden, static_cast<const void *>(dhidden), static_cast<const void *>(active)}) {
    if (!is_aligned(pointer, dtype)) return VJEPA_ERROR_ALIGNMENT;
  }
  if (!is_aligned(sums, VJEPA_FLOAT32)) return VJEPA_ERROR_ALIGNMENT;
  const int64_t bytes = dtype_bytes(dtype), blocks = sum_blocks(rows), width = features * bytes;
  const auto row_of = [&](void *matrix, int64_t row) {
    return matrix ? static_cast<char *>(matrix) + row * width : nullptr;
  };
  parallel_for(blocks, 1 + kMinimumPerThread / (VJEPA_SUM_ROWS * features), threads, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      float *sum = sums ? sums + block * features : nullptr;
      if (sum) std::fill(sum, sum + features, 0.0f);
      for (int64_t row = block * VJEPA_SUM_ROWS; row < std::min((block + 1) * VJEPA_SUM_ROWS, rows); ++row) {
        kRows[dtype](static_cast<const char *>(grad) + row * width,
                     static_cast<const char *>(hidden) + row * hidden_stride * bytes, features, row_of(dhidden, row),
                     row_of(active, row), sum);
      }
    }
  });
  return VJEPA_OK;
}
