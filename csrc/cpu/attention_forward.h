// out = softmax(scale q k^T) v of one head, and its log-sum-exp.
//
// Keys and values are packed once for a piece. A block of queries then goes through blocks of keys: scores of some
// rows, their exponentials in place, product with the values; what was summed before is rescaled when a row's maximum
// grows.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_pack.h"

namespace vjepa {
namespace {

constexpr int64_t kQueries = kAttentionQueries;
// Below every score, and finite, so that differences are numbers.
constexpr float kLowest = std::numeric_limits<float>::lowest();

template <class M>
struct ForwardScratch {
  static constexpr int64_t kPlane = M::kKeys / M::kElements;  // units of a plane of weights
  static constexpr int64_t kWeightStride = M::kPlanes == 1 ? M::kStride : kPlane * M::kPlanes + kLine;
  // Rows of one plane have this shape, of several they lie side by side.
  float *keys, *values;            // panels [units][64], and [units][columns]
  float *queries, *scores, *sums;  // [kQueries][units], [kTogether][M::kStride], [kQueries][columns]
  float *weights;                  // [kTogether][kWeightStride], in the place of the scores if there is one plane
  float *top, *total, *factors;    // [kQueries]: maximum and sum of a row up to now, and what rescales it
  size_t bytes;
  ForwardScratch(void *block, int64_t head_dim, int64_t num_keys) {
    const int64_t units = units_of<M>(head_dim), columns = up_to(head_dim, kLine);
    Carver carver(block);
    keys = carver.take(up_to(num_keys, kPanel) * units * M::kPlanes);
    values = carver.take(units_of<M>(num_keys) * columns * M::kPlanes);
    queries = carver.take(kQueries * units * M::kPlanes);
    scores = carver.take(M::kTogether * M::kStride);
    weights = M::kPlanes == 1 ? scores : carver.take(M::kTogether * kWeightStride);
    sums = carver.take(kQueries * columns);
    top = carver.take(kQueries);
    total = carver.take(kQueries);
    factors = carver.take(kQueries);
    bytes = carver.used();
  }
};

// exp(factor (score - highest)): the difference first, which is exact near 0, so that the highest weight is 1 however
// large scores are.
template <class M>
VJEPA_AVX_INLINE __m512 weight(__m512 score, __m512 highest, __m512 factor) {
  return M::exp(_mm512_mul_ps(_mm512_sub_ps(score, highest), factor));
}

// The weights exp(scale (score - top)) of `count` scores, as units for the next product, also in place. `first`:
// nothing was summed before.
template <class M>
VJEPA_AVX void exponentials(const float *row, int64_t count, bool first, float factor, float *weights, int64_t plane,
                            float *top, float *total, float *rescale) {
  __m512 high = _mm512_set1_ps(kLowest), high2 = high, high3 = high, high4 = high;  // apart: none waits for another
  int64_t j = 0;
  for (; j + 4 * kLine <= count; j += 4 * kLine) {
    high = _mm512_max_ps(high, _mm512_loadu_ps(row + j));
    high2 = _mm512_max_ps(high2, _mm512_loadu_ps(row + j + kLine));
    high3 = _mm512_max_ps(high3, _mm512_loadu_ps(row + j + 2 * kLine));
    high4 = _mm512_max_ps(high4, _mm512_loadu_ps(row + j + 3 * kLine));
  }
  high = _mm512_max_ps(_mm512_max_ps(high, high2), _mm512_max_ps(high3, high4));
  for (; j < count; j += kLine) {
    high = _mm512_mask_max_ps(high, mask_of(count - j), high, _mm512_loadu_ps(row + j));
  }
  const float highest = std::max(*top, _mm512_reduce_max_ps(high));
  const __m512 times = _mm512_set1_ps(factor), minus = _mm512_set1_ps(highest);
  __m512 sum = _mm512_setzero_ps(), sum2 = _mm512_setzero_ps();
  int64_t chunk = 0;
  for (; 32 * (chunk + 1) <= count; ++chunk) {
    const __m512 a = weight<M>(_mm512_loadu_ps(row + 32 * chunk), minus, times);
    const __m512 b = weight<M>(_mm512_loadu_ps(row + 32 * chunk + 16), minus, times);
    sum = _mm512_add_ps(sum, a);
    sum2 = _mm512_add_ps(sum2, b);
    M::store(weights, plane, chunk, a, b);
  }
  if (const int64_t rest = count - 32 * chunk) {
    const __m512 x = _mm512_maskz_loadu_ps(mask_of(rest), row + 32 * chunk);
    const __m512 y = _mm512_maskz_loadu_ps(mask_of(rest - 16), row + 32 * chunk + 16);
    const __m512 a = _mm512_maskz_mov_ps(mask_of(rest), weight<M>(x, minus, times));
    const __m512 b = _mm512_maskz_mov_ps(mask_of(rest - 16), weight<M>(y, minus, times));
    sum = _mm512_add_ps(sum, a);
    sum2 = _mm512_add_ps(sum2, b);
    M::store(weights, plane, chunk, a, b);
  }
  *rescale = first ? 0.0f : _mm512_cvtss_f32(weight<M>(_mm512_set1_ps(*top), minus, times));
  *total = (first ? 0.0f : *total * *rescale) + _mm512_reduce_add_ps(_mm512_add_ps(sum, sum2));
  *top = highest;
}

template <class T, class M>
VJEPA_AVX void forward_piece(const AttentionCall &call, const AttentionPiece &piece, void *block) {
  const int64_t width = call.about.head_dim, heads = call.about.heads;
  const int64_t units = units_of<M>(width), columns = up_to(width, kLine);
  const float factor = static_cast<float>(call.about.scale * M::kExponent);
  const ForwardScratch<M> scratch(block, width, piece.keys);
  M matrix;
  const auto rows_of = [&](const vjepa_heads &from, int64_t first, int64_t count) {
    const T *data = static_cast<const T *>(from.data) + first * from.token_stride + piece.head * from.head_stride;
    return Rows<T>{data, from.token_stride, count, width};
  };
  pack_panels<M>(rows_of(call.k, piece.first_key, piece.keys), piece.keys, units, scratch.keys);
  pack_across<M>(rows_of(call.v, piece.first_key, piece.keys), padded_of<M>(piece.keys), columns, scratch.values);
  T *out = static_cast<T *>(call.written[0]) + piece.head * width;
  float *lse = call.written_lse + piece.head * call.about.tokens;
  for (int64_t begin = piece.first_query; begin < piece.first_query + piece.queries; begin += kQueries) {
    const int64_t queries = std::min(kQueries, piece.first_query + piece.queries - begin);
    pack_rows<M>(rows_of(call.q, begin, queries), up_to(queries, M::kAcross), units, scratch.queries);
    std::fill_n(scratch.top, kQueries, kLowest);
    for (int64_t key = 0; key < piece.keys; key += M::kKeys) {
      const int64_t keys = std::min(M::kKeys, piece.keys - key);
      const Operand values = {scratch.values + key / M::kElements * columns * M::kPlanes, columns * M::kPlanes,
                              columns};
      const Operand weights = {scratch.weights, ForwardScratch<M>::kWeightStride, ForwardScratch<M>::kPlane};
      const int64_t key_units = units_of<M>(keys);
      for (int64_t first = 0; first < queries; first += M::kTogether) {
        const int64_t some = std::min(M::kTogether, queries - first), rows = up_to(some, M::kAcross);
        for (int64_t panel = 0; panel < keys; panel += kPanel) {
          const int64_t lines = up_to(std::min(kPanel, keys - panel), kLine) / kLine;
          const Operand q = {scratch.queries + first * units * M::kPlanes, units * M::kPlanes, units};
          const Operand k = {scratch.keys + (key + panel) * units * M::kPlanes, kPanel * M::kPlanes, kPanel};
          multiply<Start::zero>(matrix, rows, lines, q, k, units, scratch.scores + panel, M::kStride);
        }
        for (int64_t r = 0; r < some; ++r) {
          exponentials<M>(scratch.scores + r * M::kStride, keys, key == 0, factor, scratch.weights + r * weights.stride,
                          weights.plane, scratch.top + first + r, scratch.total + first + r,
                          scratch.factors + first + r);
        }
        float *sums = scratch.sums + first * columns;
        if (key == 0) {
          multiply<Start::zero>(matrix, rows, columns / kLine, weights, values, key_units, sums, columns);
        } else {
          multiply<Start::rescale>(matrix, rows, columns / kLine, weights, values, key_units, sums, columns,
                                   scratch.factors + first);
        }
      }
    }
    for (int64_t r = 0; r < queries; ++r) {
      const int64_t token = begin + r;
      write_rows(scratch.sums + r * columns, columns, 1, width, 1.0f / scratch.total[r], out + token * heads * width,
                 heads * width);
      lse[token] =
          static_cast<float>(scratch.top[r] * call.about.scale + std::log(static_cast<double>(scratch.total[r])));
    }
  }
}

template <class M>
size_t forward_bytes(int64_t head_dim, int64_t keys) {
  return ForwardScratch<M>(nullptr, head_dim, keys).bytes;
}

}  // namespace
}  // namespace vjepa
