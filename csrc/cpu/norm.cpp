// Residual addition and layer norm on a CPU, one pass over the rows in each direction.
#include <cstring>
#include <vector>

#include "../capi_tokens.h"
#include "lanes.h"
#include "parallel.h"

namespace vjepa {
namespace {

constexpr int64_t kMinimumPerThread = 1 << 15;  // elements; some ten microseconds
constexpr int64_t kBlock = 32;                  // rows whose sums are begun anew, so that sums do not depend on threads

struct Nothing {};

struct Forward {
  const float *residual;
  int64_t residual_stride;
  const void *branch;
  int64_t branch_stride;
  const float *weight;
  const float *bias;
  double eps;
  int64_t features;
  float *added;
  void *normed;
  float *statistics;
};

struct Backward {
  const float *grad_sum;
  int64_t grad_sum_stride;
  const void *grad_normed;
  int64_t grad_normed_stride;
  const float *added;
  int64_t added_stride;
  const float *statistics;
  const float *weight;
  int64_t rows;
  int64_t features;
  float *grad_residual;
  void *grad_branch;
  float *of_weight;  // [blocks, features], or null
  float *of_bias;
};

// Reads row i, adds, and returns the first of its float32 values.
template <class B>
VJEPA_HOST_DEVICE const float *add_rows(const Forward &f, int64_t i, float *sums) {
  const float *residual = f.residual + i * f.residual_stride;
  const B *branch = static_cast<const B *>(f.branch) + i * f.branch_stride;
  float *added = f.added + i * f.features;
  for_lanes(f.features, [&](int64_t lane, int64_t j) {
    added[j] = residual[j] + to_float(branch[j]);
    sums[lane] += added[j];
  });
  return added;
}

template <>
VJEPA_HOST_DEVICE const float *add_rows<Nothing>(const Forward &f, int64_t i, float *sums) {
  const float *residual = f.residual + i * f.residual_stride;
  for_lanes(f.features, [&](int64_t lane, int64_t j) { sums[lane] += residual[j]; });
  return residual;
}

template <class B, class T>
VJEPA_HOST_DEVICE void forward_rows(const Forward &f, int64_t first, int64_t last) {
  const float count = static_cast<float>(f.features);
  for (int64_t i = first; i < last; ++i) {
    float sums[kLanes] = {};
    const float *x = add_rows<B>(f, i, sums);
    const Moments m = moments(x, f.features, sum_lanes(sums) / count, f.eps);
    const float mean = m.mean, missed = m.missed, rstd = m.rstd;
    T *normed = static_cast<T *>(f.normed) + i * f.features;
    if (f.weight && f.bias) {
      for (int64_t j = 0; j < f.features; ++j) {
        normed[j] = from_float<T>((x[j] - mean - missed) * rstd * f.weight[j] + f.bias[j]);
      }
    } else {
      for (int64_t j = 0; j < f.features; ++j) {
        const float own = (x[j] - mean - missed) * rstd;
        normed[j] = from_float<T>((f.weight ? own * f.weight[j] : own) + (f.bias ? f.bias[j] : 0.0f));
      }
    }
    f.statistics[2 * i] = mean + missed;
    f.statistics[2 * i + 1] = rstd;
  }
}

template <class B>
VJEPA_HOST_DEVICE void store(void *out, int64_t at, int64_t features, const float *values) {
  B *to = static_cast<B *>(out) + at;
  for (int64_t j = 0; j < features; ++j) to[j] = from_float<B>(values[j]);
}

template <>
VJEPA_HOST_DEVICE void store<Nothing>(void *, int64_t, int64_t, const float *) {}

// Blocks first .. last - 1 of kBlock rows.
template <class B, class T>
VJEPA_HOST_DEVICE void backward_blocks(const Backward &b, int64_t first, int64_t last, float *wide) {
  const int64_t features = b.features;
  const float count = static_cast<float>(features);
  float *normed = wide, *slopes = wide + features;
  for (int64_t i = first * kBlock; i < std::min(last * kBlock, b.rows); ++i) {
    const float *added = b.added + i * b.added_stride;
    const T *grad = static_cast<const T *>(b.grad_normed) + i * b.grad_normed_stride;
    const float mean = b.statistics[2 * i], rstd = b.statistics[2 * i + 1];
    float along[kLanes] = {}, sums[kLanes] = {};
    for_lanes(features, [&](int64_t lane, int64_t j) {
      normed[j] = (added[j] - mean) * rstd;
      slopes[j] = to_float(grad[j]) * (b.weight ? b.weight[j] : 1.0f);
      sums[lane] += slopes[j];
      along[lane] += slopes[j] * normed[j];
    });
    if (b.of_weight) {
      float *of_weight = b.of_weight + i / kBlock * features;
      for (int64_t j = 0; j < features; ++j) of_weight[j] += to_float(grad[j]) * normed[j];
    }
    if (b.of_bias) {
      float *of_bias = b.of_bias + i / kBlock * features;
      for (int64_t j = 0; j < features; ++j) of_bias[j] += to_float(grad[j]);
    }
    if (!b.grad_residual && !b.grad_branch) continue;
    const float share = sum_lanes(sums) / count, part = sum_lanes(along) / count;
    for (int64_t j = 0; j < features; ++j) slopes[j] = (slopes[j] - share - normed[j] * part) * rstd;
    if (b.grad_sum) {
      const float *grad_sum = b.grad_sum + i * b.grad_sum_stride;
      for (int64_t j = 0; j < features; ++j) slopes[j] += grad_sum[j];
    }
    if (b.grad_residual) std::memcpy(b.grad_residual + i * features, slopes, features * sizeof(float));
    if (b.grad_branch) store<B>(b.grad_branch, i * features, features, slopes);
  }
}

VJEPA_MULTIVERSION void add_to(const float *from, int64_t count, float *to) {
  for (int64_t j = 0; j < count; ++j) to[j] += from[j];
}

// Macros, because a compiler clones functions, not templates.
#define VJEPA_NORM_CLONES(name, B, T)                                                                 \
  VJEPA_MULTIVERSION void forward_##name(const Forward &f, int64_t first, int64_t last) {             \
    forward_rows<B, T>(f, first, last);                                                               \
  }                                                                                                   \
  VJEPA_MULTIVERSION void backward_##name(const Backward &b, int64_t first, int64_t last, float *w) { \
    backward_blocks<B, T>(b, first, last, w);                                                         \
  }
VJEPA_NORM_CLONES(none_f32, Nothing, float)
VJEPA_NORM_CLONES(none_bf16, Nothing, bfloat16)
VJEPA_NORM_CLONES(f32_f32, float, float)
VJEPA_NORM_CLONES(f32_bf16, float, bfloat16)
VJEPA_NORM_CLONES(bf16_f32, bfloat16, float)
VJEPA_NORM_CLONES(bf16_bf16, bfloat16, bfloat16)
#undef VJEPA_NORM_CLONES

// [branch dtype + 1][normed dtype]
constexpr void (*kForwards[3][2])(const Forward &, int64_t, int64_t) = {
    {forward_none_f32, forward_none_bf16}, {forward_f32_f32, forward_f32_bf16}, {forward_bf16_f32, forward_bf16_bf16}};
constexpr void (*kBackwards[3][2])(const Backward &, int64_t, int64_t, float *) = {
    {backward_none_f32, backward_none_bf16},
    {backward_f32_f32, backward_f32_bf16},
    {backward_bf16_f32, backward_bf16_bf16}};

int32_t check(int32_t branch_dtype, int32_t normed_dtype, int64_t rows, int64_t features, int32_t threads) {
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (rows < 0 || features < 1) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (branch_dtype < VJEPA_NONE || branch_dtype > VJEPA_BFLOAT16) return VJEPA_ERROR_DTYPE;
  return normed_dtype < VJEPA_FLOAT32 || normed_dtype > VJEPA_BFLOAT16 ? VJEPA_ERROR_DTYPE : VJEPA_OK;
}

}  // namespace
}  // namespace vjepa

using namespace vjepa;

extern "C" int32_t vjepa_add_layer_norm_cpu(const float *residual, int64_t residual_stride, const void *branch,
                                            int64_t branch_stride, int32_t branch_dtype, const float *weight,
                                            const float *bias, double eps, int64_t rows, int64_t features, float *added,
                                            void *normed, int32_t normed_dtype, float *statistics, int32_t threads) {
  if (const int32_t status = check(branch_dtype, normed_dtype, rows, features, threads)) return status;
  const Forward f{residual, residual_stride, branch, branch_stride, weight,    bias,
                  eps,      features,        added,  normed,        statistics};
  const auto forward = kForwards[branch_dtype + 1][normed_dtype];
  parallel_for(rows, 1 + kMinimumPerThread / features, threads,
               [&](int64_t first, int64_t last) { forward(f, first, last); });
  return VJEPA_OK;
}

extern "C" int32_t vjepa_add_layer_norm_backward_cpu(const float *grad_sum, int64_t grad_sum_stride,
                                                     const void *grad_normed, int64_t grad_normed_stride,
                                                     int32_t normed_dtype, const float *added, int64_t added_stride,
                                                     const float *statistics, const float *weight, int64_t rows,
                                                     int64_t features, float *grad_residual, void *grad_branch,
                                                     int32_t branch_dtype, float *grad_weight, float *grad_bias,
                                                     int32_t threads) {
  if (const int32_t status = check(branch_dtype, normed_dtype, rows, features, threads)) return status;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  std::vector<float> of_weight(static_cast<size_t>(grad_weight ? blocks * features : 0), 0.0f);
  std::vector<float> of_bias(static_cast<size_t>(grad_bias ? blocks * features : 0), 0.0f);
  const Backward b{grad_sum,
                   grad_sum_stride,
                   grad_normed,
                   grad_normed_stride,
                   added,
                   added_stride,
                   statistics,
                   weight,
                   rows,
                   features,
                   grad_residual,
                   grad_branch,
                   grad_weight ? of_weight.data() : nullptr,
                   grad_bias ? of_bias.data() : nullptr};
  const auto backward = kBackwards[branch_dtype + 1][normed_dtype];
  parallel_for(blocks, 1 + kMinimumPerThread / (features * kBlock), threads, [&](int64_t first, int64_t last) {
    std::vector<float> wide(static_cast<size_t>(2 * features));
    backward(b, first, last, wide.data());
  });
  for (auto [from, to] : {std::pair{&of_weight, grad_weight}, std::pair{&of_bias, grad_bias}}) {
    if (!to) continue;
    std::memset(to, 0, features * sizeof(float));
    for (int64_t block = 0; block < blocks; ++block) add_to(from->data() + block * features, features, to);
  }
  return VJEPA_OK;
}
