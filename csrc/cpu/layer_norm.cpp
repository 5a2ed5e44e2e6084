// Residual addition and layer norm on a CPU, and its gradient: each row is read from memory once.
#include <algorithm>
#include <vector>

#include "../include/vjepa/macros.h"
#include "lanes.h"
#include "parallel.h"
#include "rows.h"

namespace vjepa {
namespace {

VJEPA_MULTIVERSION void moments_of(const float *row, int64_t features, double eps, Moments *out) {
  float sums[kLanes] = {};
  for_lanes(features, [&](int64_t lane, int64_t j) { sums[lane] += row[j]; });
  *out = moments(row, features, sum_lanes(sums) / static_cast<float>(features), eps);
}

// The row, centred and scaled, in its place; weight and bias may be null.
VJEPA_MULTIVERSION void normalise(float *__restrict row, int64_t features, const Moments &m,
                                  const float *__restrict weight, const float *__restrict bias) {
  const float mean = m.mean, missed = m.missed, rstd = m.rstd;
  for (int64_t j = 0; j < features; ++j) row[j] = (row[j] - mean - missed) * rstd;
  if (weight) {
    for (int64_t j = 0; j < features; ++j) row[j] *= weight[j];
  }
  if (bias) {
    for (int64_t j = 0; j < features; ++j) row[j] += bias[j];
  }
}

// In: `row` what was normalised, `grad` the gradient of the result. Out: `grad` the gradient of what was normalised;
// grad h and grad are added to dweight and dbias, which may be null, as may weight.
VJEPA_MULTIVERSION void differentiate(float *__restrict row, float *__restrict grad, int64_t features, float mean,
                                      float rstd, const float *__restrict weight, float *__restrict dweight,
                                      float *__restrict dbias) {
  for (int64_t j = 0; j < features; ++j) row[j] = (row[j] - mean) * rstd;
  if (dweight) {
    for (int64_t j = 0; j < features; ++j) dweight[j] += grad[j] * row[j];
  }
  if (dbias) {
    for (int64_t j = 0; j < features; ++j) dbias[j] += grad[j];
  }
  if (weight) {
    for (int64_t j = 0; j < features; ++j) grad[j] *= weight[j];
  }
  float sums[kLanes] = {}, products[kLanes] = {};
  for_lanes(features, [&](int64_t lane, int64_t j) {
    sums[lane] += grad[j];
    products[lane] += grad[j] * row[j];
  });
  const float mean_grad = sum_lanes(sums) / static_cast<float>(features);
  const float mean_product = sum_lanes(products) / static_cast<float>(features);
  for (int64_t j = 0; j < features; ++j) grad[j] = (grad[j] - mean_grad - row[j] * mean_product) * rstd;
}

// The rows of a matrix; null if it is not there.
class Rows {
 public:
  explicit Rows(const vjepa_matrix &matrix)
      : data_(static_cast<const char *>(matrix.data)), bytes_(matrix.stride * dtype_bytes(matrix.dtype)) {}
  Rows(const void *data, int64_t dtype, int64_t features)
      : data_(static_cast<const char *>(data)), bytes_(features * dtype_bytes(dtype)) {}
  explicit operator bool() const { return data_; }
  const void *operator[](int64_t row) const { return data_ + row * bytes_; }
  void *to(int64_t row) const { return const_cast<char *>(data_ + row * bytes_); }

 private:
  const char *data_;
  int64_t bytes_;
};

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
                                        void *normed, int32_t normed_dtype, float *statistics, int32_t threads) {
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
  const LoadRow load = load_row(residual->dtype);
  parallel_for(rows, 1 + kMinimumPerThread / features, threads, [&](int64_t first, int64_t last) {
    std::vector<float> wide(static_cast<size_t>(features));
    float *values = wide.data();
    for (int64_t row = first; row < last; ++row) {
      load(from[row], features, values);
      if (other) {
        add_row(branch->dtype)(other[row], features, values);
        store_row(residual->dtype)(values, features, sums.to(row));
        if (residual->dtype != VJEPA_FLOAT32) load(sums[row], features, values);
      }
      Moments m;
      moments_of(values, features, eps, &m);
      normalise(values, features, m, weight, bias);
      store_row(normed_dtype)(values, features, out.to(row));
      statistics[2 * row] = m.mean + m.missed;
      statistics[2 * row + 1] = m.rstd;
    }
  });
  return VJEPA_OK;
}

extern "C" int32_t vjepa_layer_norm_backward_cpu(const vjepa_matrix *grad_sum, const vjepa_matrix *grad_normed,
                                                 const vjepa_matrix *added, const float *statistics,
                                                 const float *weight, int64_t rows, int64_t features, void *dresidual,
                                                 void *dbranch, int32_t branch_dtype, float *dweight, float *dbias,
                                                 int32_t threads) {
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (!is_float_dtype(branch_dtype)) return VJEPA_ERROR_DTYPE;
  if (!is_size(rows, features) || features < 1) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (!grad_sum || !grad_normed || !added) return VJEPA_ERROR_NULL_POINTER;
  for (const vjepa_matrix *matrix : {grad_sum, grad_normed, added}) {
    if (const int32_t status = check_matrix(*matrix, rows && matrix != grad_sum)) return status;
  }
  if (rows && !statistics) return VJEPA_ERROR_NULL_POINTER;
  if (dresidual && !is_aligned(dresidual, added->dtype)) return VJEPA_ERROR_ALIGNMENT;
  if (!is_aligned(dbranch, branch_dtype)) return VJEPA_ERROR_ALIGNMENT;
  if (const int32_t status = check_floats({statistics, weight, dweight, dbias})) return status;
  const Rows sums(*grad_sum), grads(*grad_normed), normalised(*added), residuals(dresidual, added->dtype, features),
      branches(dbranch, branch_dtype, features);
  const int64_t blocks = sum_blocks(rows), room = std::max<int64_t>(blocks, 1) * features;
  std::vector<float> of_weight(static_cast<size_t>(dweight ? room : 0)), of_bias(static_cast<size_t>(dbias ? room : 0));
  parallel_for(blocks, 1 + kMinimumPerThread / (VJEPA_SUM_ROWS * features), threads, [&](int64_t first, int64_t last) {
    std::vector<float> wide(static_cast<size_t>(2 * features));
    float *values = wide.data(), *grad = values + features;
    for (int64_t row = first * VJEPA_SUM_ROWS; row < std::min(last * VJEPA_SUM_ROWS, rows); ++row) {
      const int64_t block = row / VJEPA_SUM_ROWS * features;
      load_row(added->dtype)(normalised[row], features, values);
      load_row(grad_normed->dtype)(grads[row], features, grad);
      differentiate(values, grad, features, statistics[2 * row], statistics[2 * row + 1], weight,
                    dweight ? of_weight.data() + block : nullptr, dbias ? of_bias.data() + block : nullptr);
      if (sums) add_row(grad_sum->dtype)(sums[row], features, grad);
      if (residuals) store_row(added->dtype)(grad, features, residuals.to(row));
      if (branches) store_row(branch_dtype)(grad, features, branches.to(row));
    }
  });
  fold_rows(of_weight.data(), dweight ? blocks : 0, features, threads);
  fold_rows(of_bias.data(), dbias ? blocks : 0, features, threads);
  if (dweight) std::copy_n(of_weight.data(), features, dweight);
  if (dbias) std::copy_n(of_bias.data(), features, dbias);
  return VJEPA_OK;
}
