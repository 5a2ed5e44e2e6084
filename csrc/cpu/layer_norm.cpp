// Residual addition and layer norm on a CPU, and its gradient: each row is read from memory once.
#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <new>
#include <type_traits>

#include "../include/vjepa/dtype.h"
#include "../include/vjepa/macros.h"
#include "lanes.h"
#include "parallel.h"
#include "rows.h"

namespace vjepa {
namespace {

// R, B, X, G, O: the dtypes of residual, branch, what is normalised, the gradient of the result and the result.

// The sum, rounded to R, to `values`, and to `added` unless that would be the same.
template <class R, class B>
VJEPA_HOST_DEVICE void add_branch(const void *residual, const void *branch, int64_t features, void *added,
                                  float *__restrict values) {
  const R *first = static_cast<const R *>(residual);
  const B *second = static_cast<const B *>(branch);
  if constexpr (std::is_same_v<R, float>) {
    for (int64_t j = 0; j < features; ++j) values[j] = first[j] + to_float(second[j]);
  } else {
    R *__restrict sums = static_cast<R *>(added);
    for (int64_t j = 0; j < features; ++j) {
      sums[j] = from_float<R>(to_float(first[j]) + to_float(second[j]));
      values[j] = to_float(sums[j]);
    }
  }
}

VJEPA_MULTIVERSION_LEVELS void moments_of(const float *row, int64_t features, double eps, Moments *out) {
  float sums[kLanes] = {};
  for_lanes(features, [&](int64_t lane, int64_t j) { sums[lane] += row[j]; });
  *out = moments(row, features, sum_lanes(sums) / static_cast<float>(features), eps);
}

template <class O>
VJEPA_HOST_DEVICE void normalise(const float *__restrict row, int64_t features, const Moments &m,
                                 const float *__restrict weight, const float *__restrict bias, void *normed) {
  const float mean = m.mean, missed = m.missed, rstd = m.rstd;
  O *__restrict out = static_cast<O *>(normed);
  for (int64_t j = 0; j < features; ++j) {
    out[j] = from_float<O>((row[j] - mean - missed) * rstd * weight[j] + bias[j]);
  }
}

// A row of the backward pass.
struct Gradient {
  const void *normed;  // of the result
  const void *sum;     // in the dtype of what was normalised; may be null
  const void *added;   // what was normalised
  const float *weight;
  float mean;
  float rstd;
};

// Adds grad h to dweight and grad to dbias, and writes the gradient of what was normalised to `out`.
template <class G, class X>
VJEPA_HOST_DEVICE void differentiate(const Gradient &of, int64_t features, float *__restrict dweight,
                                     float *__restrict dbias, float *__restrict out) {
  const G *grad = static_cast<const G *>(of.normed);
  const X *row = static_cast<const X *>(of.added), *sum = static_cast<const X *>(of.sum);
  const float *weight = of.weight;
  const float mean = of.mean, rstd = of.rstd;
  for (int64_t j = 0; j < features; ++j) {
    dweight[j] += to_float(grad[j]) * ((to_float(row[j]) - mean) * rstd);
    dbias[j] += to_float(grad[j]);
  }
  float sums[kLanes] = {}, products[kLanes] = {};
  for_lanes(features, [&](int64_t lane, int64_t j) {
    const float slope = to_float(grad[j]) * weight[j];
    sums[lane] += slope;
    products[lane] += slope * ((to_float(row[j]) - mean) * rstd);
  });
  const float mean_grad = sum_lanes(sums) / static_cast<float>(features);
  const float mean_product = sum_lanes(products) / static_cast<float>(features);
  const auto slope = [&](int64_t j) {
    return (to_float(grad[j]) * weight[j] - mean_grad - (to_float(row[j]) - mean) * rstd * mean_product) * rstd;
  };
  if (sum) {
    for (int64_t j = 0; j < features; ++j) out[j] = slope(j) + to_float(sum[j]);
  } else {
    for (int64_t j = 0; j < features; ++j) out[j] = slope(j);
  }
}

// Macros, because a compiler clones functions, not templates.
#define VJEPA_PAIR_CLONES(name, A, B)                                                                                \
  VJEPA_MULTIVERSION_LEVELS void add_##name(const void *residual, const void *branch, int64_t features, void *added, \
                                            float *values) {                                                         \
    add_branch<A, B>(residual, branch, features, added, values);                                                     \
  }                                                                                                                  \
  VJEPA_MULTIVERSION_LEVELS void differentiate_##name(const Gradient &of, int64_t features, float *dweight,          \
                                                      float *dbias, float *out) {                                    \
    differentiate<A, B>(of, features, dweight, dbias, out);                                                          \
  }
VJEPA_PAIR_CLONES(f32_f32, float, float)
VJEPA_PAIR_CLONES(f32_bf16, float, bfloat16)
VJEPA_PAIR_CLONES(f32_f16, float, float16)
VJEPA_PAIR_CLONES(bf16_f32, bfloat16, float)
VJEPA_PAIR_CLONES(bf16_bf16, bfloat16, bfloat16)
VJEPA_PAIR_CLONES(bf16_f16, bfloat16, float16)
VJEPA_PAIR_CLONES(f16_f32, float16, float)
VJEPA_PAIR_CLONES(f16_bf16, float16, bfloat16)
VJEPA_PAIR_CLONES(f16_f16, float16, float16)
#undef VJEPA_PAIR_CLONES

#define VJEPA_NORM_CLONES(name, O)                                                                        \
  VJEPA_MULTIVERSION_LEVELS void normalise_##name(const float *row, int64_t features, const Moments &m,   \
                                                  const float *weight, const float *bias, void *normed) { \
    normalise<O>(row, features, m, weight, bias, normed);                                                 \
  }
VJEPA_NORM_CLONES(f32, float)
VJEPA_NORM_CLONES(bf16, bfloat16)
VJEPA_NORM_CLONES(f16, float16)
#undef VJEPA_NORM_CLONES

using Add = void (*)(const void *, const void *, int64_t, void *, float *);
using Differentiate = void (*)(const Gradient &, int64_t, float *, float *, float *);
using Normalise = void (*)(const float *, int64_t, const Moments &, const float *, const float *, void *);
// In the order of vjepa_dtype: [residual][branch], [gradient][what was normalised], [result]
constexpr Add kAdds[3][3] = {{add_f32_f32, add_f32_bf16, add_f32_f16},
                             {add_bf16_f32, add_bf16_bf16, add_bf16_f16},
                             {add_f16_f32, add_f16_bf16, add_f16_f16}};
constexpr Differentiate kDifferentiates[3][3] = {
    {differentiate_f32_f32, differentiate_f32_bf16, differentiate_f32_f16},
    {differentiate_bf16_f32, differentiate_bf16_bf16, differentiate_bf16_f16},
    {differentiate_f16_f32, differentiate_f16_bf16, differentiate_f16_f16}};
constexpr Normalise kNormalises[3] = {normalise_f32, normalise_bf16, normalise_f16};

// The rows of a matrix; null if it is not there.
class Rows {
 public:
  explicit Rows(const vjepa_matrix &matrix)
      : data_(static_cast<const char *>(matrix.data)),
        element_(dtype_bytes(matrix.dtype)),
        bytes_(matrix.stride * element_) {}
  Rows(const void *data, int64_t dtype, int64_t features)
      : data_(static_cast<const char *>(data)), element_(dtype_bytes(dtype)), bytes_(features * element_) {}
  explicit operator bool() const { return data_; }
  int64_t bytes_of(int64_t features) const { return features * element_; }
  const void *operator[](int64_t row) const { return data_ + row * bytes_; }
  void *to(int64_t row) const { return const_cast<char *>(data_ + row * bytes_); }

 private:
  const char *data_;
  int64_t element_;
  int64_t bytes_;  // from row to row
};

constexpr int64_t kAhead = 2;  // rows

// Asks for a row of `features` elements that is read or written soon: the work on a row is too long for a processor to
// look beyond it.
template <bool written>
void prefetch(const Rows &matrix, int64_t row, int64_t features) {
  if (!matrix) return;
  const char *begin = static_cast<const char *>(matrix[row]), *end = begin + matrix.bytes_of(features);
  for (; begin < end; begin += 64) __builtin_prefetch(begin, written, 2);
}

int32_t check_matrix(const vjepa_matrix &matrix, bool required) {
  if (!matrix.data) return required ? VJEPA_ERROR_NULL_POINTER : VJEPA_OK;
  if (!is_float_dtype(matrix.dtype)) return VJEPA_ERROR_DTYPE;
  return is_aligned(matrix.data, matrix.dtype) ? VJEPA_OK : VJEPA_ERROR_ALIGNMENT;
}

int32_t check_floats(std::initializer_list<const float *> vectors) {
  for (const float *vector : vectors) {
    if (!is_aligned(vector, VJEPA_FLOAT32)) return VJEPA_ERROR_ALIGNMENT;
  }
  return VJEPA_OK;
}

}  // namespace
}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_layer_norm_cpu(const vjepa_matrix *residual, const vjepa_matrix *branch, const float *weight,
                                        const float *bias, int64_t rows, int64_t features, double eps, void *added,
                                        void *normed, int32_t normed_dtype, float *statistics, int32_t threads) try {
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (!is_float_dtype(normed_dtype)) return VJEPA_ERROR_DTYPE;
  if (!is_size(rows, features) || features < 1) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (!residual || !branch) return VJEPA_ERROR_NULL_POINTER;
  if (rows == 0) return VJEPA_OK;
  for (const vjepa_matrix *matrix : {residual, branch}) {
    if (const int32_t status = check_matrix(*matrix, matrix == residual)) return status;
  }
  if (!normed || !statistics || !added != !branch->data) return VJEPA_ERROR_NULL_POINTER;
  if (!is_aligned(added, residual->dtype) || !is_aligned(normed, normed_dtype)) return VJEPA_ERROR_ALIGNMENT;
  if (const int32_t status = check_floats({weight, bias, statistics})) return status;
  const Rows from(*residual), other(*branch), sums(added, residual->dtype, features),
      out(normed, normed_dtype, features);
  const bool in_place = residual->dtype == VJEPA_FLOAT32;  // the row is its own float32
  Floats ones(weight ? 0 : features), zeros(bias ? 0 : features);
  if (!weight) weight = std::fill_n(ones.data(), features, 1.0f) - features;
  if (!bias) bias = zeros.data();
  std::atomic<bool> failed{false};
  parallel_for(rows, 1 + kMinimumPerThread / features, threads, [&](int64_t first, int64_t last) {
    Floats wide(0);
    if (!wide.try_resize(in_place ? 0 : features)) failed = true;
    if (failed) return;
    for (int64_t row = first; row < last; ++row) {
      if (row + kAhead < last) {
        for (const Rows *read : {&from, &other}) prefetch<false>(*read, row + kAhead, features);
        for (const Rows *written : {&sums, &out}) prefetch<true>(*written, row + kAhead, features);
      }
      const float *values = wide.data();
      if (other) {
        float *to = in_place ? static_cast<float *>(sums.to(row)) : wide.data();
        kAdds[residual->dtype][branch->dtype](from[row], other[row], features, sums.to(row), to);
        values = to;
      } else if (in_place) {
        values = static_cast<const float *>(from[row]);
      } else {
        load_row(residual->dtype)(from[row], features, wide.data());
      }
      Moments m;
      moments_of(values, features, eps, &m);
      kNormalises[normed_dtype](values, features, m, weight, bias, out.to(row));
      statistics[2 * row] = m.mean + m.missed;
      statistics[2 * row + 1] = m.rstd;
    }
  });
  return failed ? VJEPA_ERROR_MEMORY : VJEPA_OK;
} catch (const std::bad_alloc &) {
  return VJEPA_ERROR_MEMORY;
}

extern "C" int32_t vjepa_layer_norm_backward_cpu(const vjepa_matrix *grad_sum, const vjepa_matrix *grad_normed,
                                                 const vjepa_matrix *added, const float *statistics,
                                                 const float *weight, int64_t rows, int64_t features, void *dresidual,
                                                 void *dbranch, int32_t branch_dtype, float *dweight, float *dbias,
                                                 int32_t threads) try {
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (!is_float_dtype(branch_dtype)) return VJEPA_ERROR_DTYPE;
  if (!is_size(rows, features) || features < 1) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (!grad_sum || !grad_normed || !added) return VJEPA_ERROR_NULL_POINTER;
  for (const vjepa_matrix *matrix : {grad_sum, grad_normed, added}) {
    if (const int32_t status = check_matrix(*matrix, rows && matrix != grad_sum)) return status;
  }
  if (grad_sum->data && grad_sum->dtype != added->dtype) return VJEPA_ERROR_DTYPE;
  if (rows && !statistics) return VJEPA_ERROR_NULL_POINTER;
  if (dresidual && !is_aligned(dresidual, added->dtype)) return VJEPA_ERROR_ALIGNMENT;
  if (!is_aligned(dbranch, branch_dtype)) return VJEPA_ERROR_ALIGNMENT;
  if (const int32_t status = check_floats({statistics, weight, dweight, dbias})) return status;
  const Rows sums(*grad_sum), grads(*grad_normed), normalised(*added), residuals(dresidual, added->dtype, features),
      branches(dbranch, branch_dtype, features);
  const int64_t blocks = sum_blocks(rows), room = std::max<int64_t>(blocks, 1) * features;
  Floats ones(weight ? 0 : features), of_weight(room), of_bias(room);
  if (!weight) weight = std::fill_n(ones.data(), features, 1.0f) - features;
  float *dweights = of_weight.data(), *dbiases = of_bias.data();
  std::atomic<bool> failed{false};
  parallel_for(blocks, 1 + kMinimumPerThread / (VJEPA_SUM_ROWS * features), threads, [&](int64_t first, int64_t last) {
    Floats wide(0);
    if (!wide.try_resize(features)) failed = true;
    if (failed) return;
    for (int64_t row = first * VJEPA_SUM_ROWS; row < std::min(last * VJEPA_SUM_ROWS, rows); ++row) {
      const int64_t block = row / VJEPA_SUM_ROWS * features;
      if (row + kAhead < rows) {
        for (const Rows *read : {&sums, &grads, &normalised}) prefetch<false>(*read, row + kAhead, features);
        for (const Rows *written : {&residuals, &branches}) prefetch<true>(*written, row + kAhead, features);
      }
      const bool in_place = residuals && added->dtype == VJEPA_FLOAT32;
      float *to = in_place ? static_cast<float *>(residuals.to(row)) : wide.data();
      const Gradient of{grads[row], sums ? sums[row] : nullptr, normalised[row],
                        weight,     statistics[2 * row],        statistics[2 * row + 1]};
      kDifferentiates[grad_normed->dtype][added->dtype](of, features, dweights + block, dbiases + block, to);
      if (residuals && !in_place) store_row(added->dtype)(to, features, residuals.to(row));
      if (branches) store_row(branch_dtype)(to, features, branches.to(row));
    }
  });
  if (dweight) {
    fold_rows(dweights, blocks, features, threads);
    std::copy_n(dweights, features, dweight);
  }
  if (dbias) {
    fold_rows(dbiases, blocks, features, threads);
    std::copy_n(dbiases, features, dbias);
  }
  return failed ? VJEPA_ERROR_MEMORY : VJEPA_OK;
} catch (const std::bad_alloc &) {
  return VJEPA_ERROR_MEMORY;
}
