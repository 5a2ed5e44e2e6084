// The gradients of attention of one head of one sequence.
//
//     P^T = exp(scale k q^T - lse)    dS^T = P^T (v dO^T - delta), delta = rowsum(dO out)
//     dv = P^T dO    dk = scale dS^T q    dq^T = scale k^T dS^T
//
// Keys and values are packed once for a piece. A block of queries is packed for its turn and goes through blocks of
// keys: weights P^T and dS^T of the block, then their three products. dk and dv are summed over the blocks of queries,
// dq over those of keys, in float32.
#pragma once

#include <algorithm>

#include "attention_forward.h"

namespace vjepa {
namespace {

constexpr float kNoQuery = 1e30f;  // log-sum-exp of a column without a query: its weights are 0

template <class M>
struct BackwardScratch {
  static constexpr int64_t kKeyUnits = M::kBackKeys / M::kElements;
  static constexpr int64_t kPlane = M::kBackQueries / M::kElements;  // units of a plane of weights
  static constexpr int64_t kStride = kPlane * M::kPlanes + kLine;    // of their rows, see Blocks::kStride
  static constexpr int64_t kAcrossStride = M::kElements == 1 ? kStride : M::kBackQueries * M::kPlanes + kLine;
  static constexpr int64_t kQueryStride = M::kBackQueries + kLine;  // of rows of grad_q
  // Rows of one plane have these shapes, of several they lie side by side.
  float *keys, *values, *key_features;         // [keys][units] twice, blocks [features][kKeyUnits]
  float *grad_k, *grad_v;                      // [keys][columns]
  float *query_panels, *grad_panels;           // panels [units][64] of a block of queries
  float *query_across, *grad_across;           // [query units][columns]
  float *weights, *grad_scores, *across_keys;  // [kBackKeys][kStride] twice, [key units][kAcrossStride]
  float *grad_q;                               // [features][kQueryStride]
  float *scores, *products, *lse, *delta;      // [1 or 2][kGroup][kPanel] twice, [kBackQueries] twice
  size_t bytes;
  BackwardScratch(void *block, int64_t head_dim, int64_t num_keys) {
    const int64_t units = units_of<M>(head_dim), columns = up_to(head_dim, kLine);
    Carver carver(block);
    const int64_t rows = up_to(num_keys, M::kGroup), planes = M::kPlanes;
    keys = carver.take(rows * units * planes);
    values = carver.take(rows * units * planes);
    key_features = carver.take(up_to(num_keys, M::kBackKeys) / M::kElements * columns * planes);
    grad_k = carver.take(rows * columns);
    grad_v = carver.take(rows * columns);
    query_panels = carver.take(M::kBackQueries * units * planes);
    grad_panels = carver.take(M::kBackQueries * units * planes);
    query_across = carver.take(kPlane * columns * planes);
    grad_across = carver.take(kPlane * columns * planes);
    weights = carver.take(M::kBackKeys * kStride);
    grad_scores = carver.take(M::kBackKeys * kStride);
    across_keys = M::kElements == 1 ? grad_scores : carver.take(M::kBackKeys / M::kElements * kAcrossStride);
    grad_q = carver.take(columns * kQueryStride);
    scores = carver.take((1 + M::kAside) * M::kGroup * kPanel);
    products = carver.take((1 + M::kAside) * M::kGroup * kPanel);
    lse = carver.take(M::kBackQueries);
    delta = carver.take(M::kBackQueries);
    bytes = carver.used();
  }
};

// P^T and dS^T of kGroup keys, of which `keys` are there, and up to a panel of queries; row by row, so that they can be
// made while tiles multiply for the next ones.
template <class M>
struct Weights {
  const BackwardScratch<M> *scratch;
  const float *scores, *products;
  int64_t first_key, keys, first_query, lines;
  float factor;
  int64_t row = M::kGroup;  // the next one
  int64_t each = 1;         // rows of a step

  VJEPA_AVX_INLINE void step() {
    for (const int64_t end = row + each; row < end && row < M::kGroup; ++row) make_row();
  }
  VJEPA_AVX void rest() {
    for (; row < M::kGroup; ++row) make_row();
  }

 private:
  VJEPA_AVX_INLINE void make_row() {
    constexpr int64_t plane = BackwardScratch<M>::kPlane;
    const __m512 times = _mm512_set1_ps(factor);
    const int64_t at = (first_key + row) * BackwardScratch<M>::kStride + first_query / M::kElements;
    for (int64_t chunk = 0; 2 * chunk < lines; ++chunk) {
      __m512 p[2], ds[2];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t column = 32 * chunk + 16 * half;
        const __m512 score = _mm512_loadu_ps(scores + row * kPanel + column);
        const __m512 product = _mm512_loadu_ps(products + row * kPanel + column);
        const __m512 exponent = _mm512_fmsub_ps(score, times, _mm512_loadu_ps(scratch->lse + first_query + column));
        p[half] = M::exp(_mm512_min_ps(_mm512_setzero_ps(), exponent));
        ds[half] =
            _mm512_mul_ps(p[half], _mm512_sub_ps(product, _mm512_loadu_ps(scratch->delta + first_query + column)));
        if (row >= keys) p[half] = ds[half] = _mm512_setzero_ps();
      }
      M::store(scratch->weights + at, plane, chunk, p[0], p[1]);
      M::store(scratch->grad_scores + at, plane, chunk, ds[0], ds[1]);
    }
  }
};

// Pairs of dS along the queries become pairs along the keys, two rows of a plane at a time, as for Weights.
template <class M>
struct Pairing {
  const BackwardScratch<M> *scratch;
  int64_t rows, queries;  // of keys and queries, which are a multiple of what pairs are
  int64_t next = 0;       // pair of rows, counting planes

  void step() {
    if (M::kElements == 2 && 2 * next < rows * M::kPlanes) make_pair();
  }
  void rest() {
    while (M::kElements == 2 && 2 * next < rows * M::kPlanes) make_pair();
  }

 private:
  VJEPA_AVX void make_pair() {
#if defined(VJEPA_AVX_HAS_BF16)
    using Scratch = BackwardScratch<M>;
    alignas(64) static constexpr uint16_t order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const int64_t pair = next / M::kPlanes, plane = next % M::kPlanes;
    ++next;
    const float *even = scratch->grad_scores + 2 * pair * Scratch::kStride + plane * Scratch::kPlane;
    const float *odd = even + Scratch::kStride;
    float *out = scratch->across_keys + pair * Scratch::kAcrossStride + plane * M::kBackQueries;
    for (int64_t query = 0; query < queries; query += 32) {
      const __m512i a = _mm512_loadu_si512(even + query / 2), b = _mm512_loadu_si512(odd + query / 2);
      _mm512_storeu_si512(out + query, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(out + query + 16, _mm512_permutex2var_epi16(a, high, b));
    }
#endif
  }
};

// lse and delta of a block of queries, the former in powers of two.
template <class T, class M>
VJEPA_AVX void read_sums(const BackwardScratch<M> &scratch, const Rows<T> &out, const Rows<T> &grad, const float *lse) {
  for (int64_t r = 0; r < M::kBackQueries; ++r) {
    scratch.lse[r] = r < out.count ? static_cast<float>(lse[r] * M::kExponent) : kNoQuery;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t column = 0; r < out.count && column < out.width; column += kLine) {
      sum = _mm512_fmadd_ps(load_line(out.first + r * out.stride + column, out.width - column),
                            load_line(grad.first + r * grad.stride + column, grad.width - column), sum);
    }
    scratch.delta[r] = _mm512_reduce_add_ps(sum);
  }
}

// The three products of a block of weights. The first block of queries writes dk and dv, the first of keys writes dq.
template <Start OfKeys, Start OfQueries, class M>
VJEPA_AVX void add_products(M &matrix, const BackwardScratch<M> &scratch, int64_t first_key, int64_t keys,
                            int64_t queries, int64_t head_dim) {
  Pairing<M> pairing = {&scratch, up_to(keys, M::kGroup), up_to(queries, kLine)};
  using Scratch = BackwardScratch<M>;
  const int64_t columns = up_to(head_dim, kLine), lines = columns / kLine, rows = up_to(keys, M::kAcross);
  const int64_t query_units = units_of<M>(queries), at = first_key * columns;
  const auto across = [&](const float *from) { return Operand{from, columns * M::kPlanes, columns}; };
  const auto rows_of_weights = [&](const float *from) { return Operand{from, Scratch::kStride, Scratch::kPlane}; };
  const Operand features = {scratch.key_features + first_key / M::kElements * columns * M::kPlanes,
                            Scratch::kKeyUnits * M::kPlanes, Scratch::kKeyUnits};
  const Operand grad_scores = {scratch.across_keys, Scratch::kAcrossStride, M::kBackQueries};
  multiply<OfKeys>(matrix, rows, lines, rows_of_weights(scratch.weights), across(scratch.grad_across), query_units,
                   scratch.grad_v + at, columns, nullptr, pairing);
  pairing.rest();
  multiply<OfKeys>(matrix, rows, lines, rows_of_weights(scratch.grad_scores), across(scratch.query_across), query_units,
                   scratch.grad_k + at, columns);
  multiply<OfQueries, kTall>(matrix, up_to(head_dim, up_to(kTall, M::kAlong)), up_to(queries, kLine) / kLine, features,
                             grad_scores, units_of<M>(keys), scratch.grad_q, Scratch::kQueryStride);
}

template <class T, class M>
VJEPA_AVX void backward_piece(const AttentionCall &call, const AttentionPiece &piece, void *block) {
  const int64_t width = call.about.head_dim, row = call.about.heads * width, keys = piece.keys;
  const int64_t units = units_of<M>(width), columns = up_to(width, kLine);
  const float scale = static_cast<float>(call.about.scale);
  const float factor = static_cast<float>(call.about.scale * M::kExponent);
  const BackwardScratch<M> scratch(block, width, keys);
  M matrix;
  Weights<M> weights = {};
  weights.row = M::kGroup;
  int64_t turn = 0;
  // Tiles multiply in that many steps for a panel, of two tiles at a time, and its two products.
  const int64_t steps = 2 * (kPanel / (2 * kLine)) * (M::kPlanes == 1 ? 1 : 6) * (units + kLine - 1) / kLine;
  const int64_t rows_of_a_step = (M::kGroup + steps - 1) / steps;
  const auto rows_of = [&](const vjepa_heads &from, int64_t first, int64_t count) {
    const T *data = static_cast<const T *>(from.data) + first * from.token_stride + piece.head * from.head_stride;
    return Rows<T>{data, from.token_stride, count, width};
  };
  const auto rows_at = [&](const float *from, int64_t row) {
    return Operand{from + row * units * M::kPlanes, units * M::kPlanes, units};
  };
  const auto panel_at = [&](const float *from, int64_t query) {
    return Operand{from + query * units * M::kPlanes, kPanel * M::kPlanes, kPanel};
  };
  const auto written = [&](int which, int64_t first) {
    return static_cast<T *>(call.written[which]) + first * row + piece.head * width;
  };
  pack_rows<M>(rows_of(call.k, piece.first_key, keys), up_to(keys, M::kGroup), units, scratch.keys);
  pack_rows<M>(rows_of(call.v, piece.first_key, keys), up_to(keys, M::kGroup), units, scratch.values);
  for (int64_t key = 0; key < keys; key += M::kBackKeys) {
    pack_features<M>(rows_of(call.k, piece.first_key + key, std::min(M::kBackKeys, keys - key)), columns,
                     BackwardScratch<M>::kKeyUnits, scratch.key_features + key / M::kElements * columns * M::kPlanes);
  }
  if (piece.queries == 0) {  // nobody sees these keys
    std::fill_n(scratch.grad_k, keys * columns, 0.0f);
    std::fill_n(scratch.grad_v, keys * columns, 0.0f);
  }
  for (int64_t begin = 0; begin < piece.queries; begin += M::kBackQueries) {
    const int64_t queries = std::min(M::kBackQueries, piece.queries - begin), first = piece.first_query + begin;
    const int64_t padded = padded_of<M>(queries);
    const Rows<T> q = rows_of(call.q, first, queries), grad = rows_of(call.grad, first, queries);
    pack_panels<M>(q, padded, units, scratch.query_panels);
    pack_panels<M>(grad, padded, units, scratch.grad_panels);
    pack_across<M>(q, padded, columns, scratch.query_across);
    pack_across<M>(grad, padded, columns, scratch.grad_across);
    read_sums(scratch, rows_of(call.out, first, queries), grad, call.lse + piece.head * call.about.tokens + first);
    for (int64_t key = 0; key < keys; key += M::kBackKeys) {
      const int64_t some = std::min(M::kBackKeys, keys - key);
      for (int64_t panel = 0; panel < padded; panel += kPanel) {
        const int64_t lines = up_to(std::min(kPanel, padded - panel), kLine) / kLine;
        for (int64_t r = 0; r < some; r += M::kGroup) {
          float *const scores = scratch.scores + turn * M::kGroup * kPanel;
          float *const products = scratch.products + turn * M::kGroup * kPanel;
          if (M::kAside) turn = 1 - turn;
          multiply<Start::zero>(matrix, M::kGroup, lines, rows_at(scratch.keys, key + r),
                                panel_at(scratch.query_panels, panel), units, scores, kPanel, nullptr, weights);
          multiply<Start::zero>(matrix, M::kGroup, lines, rows_at(scratch.values, key + r),
                                panel_at(scratch.grad_panels, panel), units, products, kPanel, nullptr, weights);
          weights.rest();
          weights = {&scratch, scores, products, r, some - r, panel, lines, factor, 0, rows_of_a_step};
          if (!M::kAside) weights.rest();
        }
      }
      weights.rest();
      if (begin == 0 && key == 0) {
        add_products<Start::zero, Start::zero>(matrix, scratch, key, some, queries, width);
      } else if (begin == 0) {
        add_products<Start::zero, Start::add>(matrix, scratch, key, some, queries, width);
      } else if (key == 0) {
        add_products<Start::add, Start::zero>(matrix, scratch, key, some, queries, width);
      } else {
        add_products<Start::add, Start::add>(matrix, scratch, key, some, queries, width);
      }
    }
    write_columns(scratch.grad_q, BackwardScratch<M>::kQueryStride, queries, width, scale, written(0, first), row);
  }
  write_rows(scratch.grad_k, columns, keys, width, scale, written(1, piece.first_key), row);
  write_rows(scratch.grad_v, columns, keys, width, 1.0f, written(2, piece.first_key), row);
}

template <class M>
size_t backward_bytes(int64_t head_dim, int64_t keys) {
  return BackwardScratch<M>(nullptr, head_dim, keys).bytes;
}

}  // namespace
}  // namespace vjepa
