// Gather and scatter of the rows of ragged sets on a CPU, and their adjoints: each row of a result is written once.
#include <cstring>
#include <vector>

#include "../capi_tokens.h"
#include "../include/vjepa/dtype.h"
#include "../include/vjepa/macros.h"
#include "parallel.h"
#include "sets.h"

namespace vjepa {
namespace {

constexpr int64_t kMinimumPerThread = 1 << 17;  // bytes of rows; some ten microseconds
constexpr int64_t kBlock = 64;                  // rows whose sum is begun anew, so that sums do not depend on threads

int64_t size_of(int32_t dtype) {
  return dtype == VJEPA_FLOAT32 ? 4 : dtype == VJEPA_BFLOAT16 || dtype == VJEPA_FLOAT16 ? 2 : 0;
}

int64_t rows_per_thread(int64_t bytes) { return 1 + kMinimumPerThread / std::max<int64_t>(1, bytes); }

// Of each row of the table the first token that names it, and of each token the next one that names the same row; -1:
// none.
struct Named {
  std::vector<int32_t> first;
  std::vector<int32_t> next;
  std::vector<int32_t> last;

  explicit Named(const vjepa_sets &sets)
      : first(static_cast<size_t>(sets.batch * sets.length), -1),
        next(static_cast<size_t>(sets.total), -1),
        last(static_cast<size_t>(sets.batch * sets.length), -1) {
    for_tokens(sets, 0, sets.total, [&](int64_t i, int64_t clip, int64_t token) {
      const int64_t row = clip * sets.length + token;
      if (last[row] < 0) {
        first[row] = static_cast<int32_t>(i);
      } else {
        next[last[row]] = static_cast<int32_t>(i);
      }
      last[row] = static_cast<int32_t>(i);
    });
  }
};

// dst = the sum of the rows that the chain from `token` names, in float32, in their order.
template <class T>
VJEPA_HOST_DEVICE void sum_chain(const T *values, int64_t stride, int64_t features, const int32_t *next, int32_t token,
                                 float *wide, T *dst) {
  for (int64_t j = 0; j < features; ++j) wide[j] = to_float(values[token * stride + j]);
  for (token = next[token]; token >= 0; token = next[token]) {
    for (int64_t j = 0; j < features; ++j) wide[j] += to_float(values[token * stride + j]);
  }
  for (int64_t j = 0; j < features; ++j) dst[j] = from_float<T>(wide[j]);
}

template <class T>
VJEPA_HOST_DEVICE void add_row(const T *row, int64_t features, float *sum) {
  for (int64_t j = 0; j < features; ++j) sum[j] += to_float(row[j]);
}

// Macros, because a compiler clones functions, not templates.
#define VJEPA_TOKEN_CLONES(name, T)                                                                                   \
  VJEPA_MULTIVERSION void sum_chain_##name(const void *values, int64_t stride, int64_t features, const int32_t *next, \
                                           int32_t token, float *wide, void *dst) {                                   \
    sum_chain<T>(static_cast<const T *>(values), stride, features, next, token, wide, static_cast<T *>(dst));         \
  }                                                                                                                   \
  VJEPA_MULTIVERSION void add_row_##name(const void *row, int64_t features, float *sum) {                             \
    add_row<T>(static_cast<const T *>(row), features, sum);                                                           \
  }
VJEPA_TOKEN_CLONES(f32, float)
VJEPA_TOKEN_CLONES(bf16, bfloat16)
VJEPA_TOKEN_CLONES(f16, float16)
#undef VJEPA_TOKEN_CLONES

using SumChain = void (*)(const void *, int64_t, int64_t, const int32_t *, int32_t, float *, void *);
using AddRow = void (*)(const void *, int64_t, float *);
constexpr SumChain kSumChains[3] = {sum_chain_f32, sum_chain_bf16, sum_chain_f16};
constexpr AddRow kAddRows[3] = {add_row_f32, add_row_bf16, add_row_f16};

const char *row_of(const vjepa_rows &rows, int64_t size, int64_t clip, int64_t token) {
  return static_cast<const char *>(rows.data) + (clip * rows.clip_stride + token * rows.token_stride) * size;
}

int32_t check(const vjepa_sets *sets, int32_t dtype, int64_t features, int32_t threads) {
  if (!sets) return VJEPA_ERROR_NULL_POINTER;
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (!size_of(dtype)) return VJEPA_ERROR_DTYPE;
  if (features < 0 || sets->total > INT32_MAX) return VJEPA_ERROR_NEGATIVE_SIZE;
  return check_sets(*sets);
}

}  // namespace
}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_gather_cpu(const vjepa_sets *sets, const vjepa_rows *table, int64_t features, void *out,
                                    int32_t threads) {
  if (const int32_t status = check(sets, table->dtype, features, threads)) return status;
  const int64_t size = size_of(table->dtype), bytes = features * size;
  parallel_for(sets->total, rows_per_thread(bytes), threads, [&](int64_t first, int64_t last) {
    for_tokens(*sets, first, last, [&](int64_t i, int64_t clip, int64_t token) {
      std::memcpy(static_cast<char *>(out) + i * bytes, row_of(*table, size, clip, token), bytes);
    });
  });
  return VJEPA_OK;
}

extern "C" int32_t vjepa_sum_named_cpu(const vjepa_sets *sets, const void *values, int64_t stride, int32_t dtype,
                                       int64_t features, void *out, int32_t threads) {
  if (const int32_t status = check(sets, dtype, features, threads)) return status;
  const int64_t size = size_of(dtype), bytes = features * size;
  const Named named(*sets);
  parallel_for(sets->batch * sets->length, rows_per_thread(bytes), threads, [&](int64_t first, int64_t last) {
    std::vector<float> wide(static_cast<size_t>(features));
    for (int64_t row = first; row < last; ++row) {
      char *dst = static_cast<char *>(out) + row * bytes;
      const int32_t token = named.first[row];
      if (token < 0) {
        std::memset(dst, 0, bytes);
      } else if (named.next[token] < 0) {
        std::memcpy(dst, static_cast<const char *>(values) + token * stride * size, bytes);
      } else {
        kSumChains[dtype](values, stride, features, named.next.data(), token, wide.data(), dst);
      }
    }
  });
  return VJEPA_OK;
}

extern "C" int32_t vjepa_scatter_cpu(const vjepa_sets *sets, const void *values, int64_t stride, const void *fill,
                                     int32_t dtype, int64_t features, void *out, int32_t threads) {
  if (const int32_t status = check(sets, dtype, features, threads)) return status;
  const int64_t size = size_of(dtype), bytes = features * size;
  const Named named(*sets);
  parallel_for(sets->batch * sets->length, rows_per_thread(bytes), threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int32_t token = named.last[row];
      const void *from = token < 0 ? fill : static_cast<const char *>(values) + token * stride * size;
      std::memcpy(static_cast<char *>(out) + row * bytes, from, bytes);
    }
  });
  return VJEPA_OK;
}

extern "C" int32_t vjepa_scatter_backward_cpu(const vjepa_sets *sets, const vjepa_rows *grad, int64_t features,
                                              void *grad_values, float *grad_fill, int32_t threads) {
  if (const int32_t status = check(sets, grad->dtype, features, threads)) return status;
  const int64_t size = size_of(grad->dtype), bytes = features * size, rows = sets->batch * sets->length;
  const Named named(*sets);
  parallel_for(sets->total, rows_per_thread(bytes), threads, [&](int64_t first, int64_t last) {
    for_tokens(*sets, first, last, [&](int64_t i, int64_t clip, int64_t token) {
      char *dst = static_cast<char *>(grad_values) + i * bytes;
      if (named.last[clip * sets->length + token] == i) {
        std::memcpy(dst, row_of(*grad, size, clip, token), bytes);
      } else {
        std::memset(dst, 0, bytes);
      }
    });
  });
  if (!grad_fill) return VJEPA_OK;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  std::vector<float> sums(static_cast<size_t>(blocks * features), 0.0f);
  parallel_for(blocks, 1 + rows_per_thread(bytes) / kBlock, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first * kBlock; row < std::min(last * kBlock, rows); ++row) {
      if (named.last[row] >= 0) continue;
      const char *from = row_of(*grad, size, row / sets->length, row % sets->length);
      kAddRows[grad->dtype](from, features, sums.data() + row / kBlock * features);
    }
  });
  std::memset(grad_fill, 0, features * sizeof(float));
  for (int64_t block = 0; block < blocks; ++block) add_row_f32(sums.data() + block * features, features, grad_fill);
  return VJEPA_OK;
}
