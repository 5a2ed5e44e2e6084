// Matrix products whose sums stay in registers. Included once for each instruction set, which VJEPA_AVX names.
//
// Products are of units of four bytes: one float32 (Single), or a pair of bfloat16 (Pairs). An operand a has rows of
// units that follow each other along the sum, an operand b has rows of columns, one for each unit of the sum:
//
//     out[r][c] = sum_u a[r][u] . b[u][c]
//
// Units are kept in arrays of float whatever they are. A float32 may also be three bfloat16 that add up to it
// (Triples): then an operand has three planes of pairs, in each row one beside the other.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)  // GCC's own intrinsics begin with what is undefined, and it warns of it
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "attention.h"

#define VJEPA_AVX_INLINE VJEPA_AVX inline __attribute__((always_inline))

namespace vjepa {
namespace {

constexpr int64_t kLine = 16;   // columns of a register
constexpr int64_t kPanel = 64;  // columns of a panel: with 6 rows, 24 of 32 registers hold sums
constexpr int64_t kRows = 6;    // rows of most products
constexpr int64_t kTall = 8;    // rows where they are the features of a head, multiples of 8: 3 registers wide

// How operands are padded with zeros, and in which blocks the passes work, unless a kind of product says otherwise.
struct Blocks {
  static constexpr bool kAside = false;              // it multiplies while other instructions go on
  static constexpr int64_t kPlanes = 1;              // of an operand
  static constexpr int64_t kAlong = 1;               // units of a sum are a multiple of that
  static constexpr int64_t kAcross = kRows;          // rows of an operand a are
  static constexpr int64_t kTogether = 24;           // queries whose scores are there at the same time, forward
  static constexpr int64_t kKeys = 512;              // and keys of these: 24 rows of scores are 48 KiB
  static constexpr int64_t kStride = kKeys + kLine;  // of rows of scores: powers of two would share a set of a cache
  static constexpr int64_t kGroup = kRows;           // keys whose weights are made together in the backward pass
  static constexpr int64_t kBackQueries = 192;       // of a block there: a multiple of what products are wide
  static constexpr int64_t kBackKeys = 96;           // of a block there: a multiple of kGroup
};

inline int64_t up_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

constexpr double kLog2E = 1.4426950408889634;

// For exponentials: x, but not so small that the difference of two is no number, and NaN where x is.
VJEPA_AVX_INLINE __m512 not_below(__m512 x) {
  return _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // of a NaN and a number it returns the second
}

VJEPA_AVX_INLINE __m512 nearest(__m512 x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

struct Single : Blocks {
  static constexpr int64_t kElements = 1;  // of a unit
  static constexpr int64_t kChain = 32;    // units that are summed one after the other
  static constexpr double kExponent = 1;   // exponents are scores, times that, times the scale
  VJEPA_AVX_INLINE static __m512 dot(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }

  // e^x; the polynomial's error is 3e-9.
  VJEPA_AVX_INLINE static __m512 exp(__m512 x) {
    x = not_below(x);
    const __m512 whole = nearest(_mm512_mul_ps(x, _mm512_set1_ps(static_cast<float>(kLog2E))));
    const __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693147181f), x);
    __m512 power = _mm512_set1_ps(1.38146131e-3f);
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(8.36870983e-3f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(4.16683874e-2f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.66665207e-1f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(4.99999935e-1f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.0f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(power, whole);
  }

  // Elements 32 j .. 32 j + 31 of a row of units, of which each plane is `plane` after the one before.
  VJEPA_AVX_INLINE static void store(float *row, int64_t, int64_t j, __m512 low, __m512 high) {
    _mm512_storeu_ps(row + 32 * j, low);
    _mm512_storeu_ps(row + 32 * j + 16, high);
  }
};

#if defined(VJEPA_AVX_HAS_BF16)
struct Pairs : Blocks {
  static constexpr int64_t kElements = 2;
  static constexpr int64_t kChain = INT64_MAX;
  static constexpr double kExponent = kLog2E;
  VJEPA_AVX_INLINE static __m512 dot(__m512 sum, __m512 a, __m512 b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }

  // 2^x; the polynomial's error is 3e-6, while a bfloat16 rounds by 2e-3. Of minus infinity it is 0, of NaN NaN.
  VJEPA_AVX_INLINE static __m512 exp(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 power = _mm512_set1_ps(1.34261978e-2f);
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(5.22442176e-2f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(2.41278687e-1f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(6.93045133e-1f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(power, x);  // it takes what is below x
  }

  VJEPA_AVX_INLINE static void store(float *row, int64_t, int64_t j, __m512 low, __m512 high) {
    _mm512_storeu_si512(row + 16 * j, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
};
#endif

#if defined(VJEPA_AVX_HAS_BF16)
// The bfloat16 nearest to each element, as a float32. A NaN whose bits run over is one in what is left.
VJEPA_AVX_INLINE __m512 top(__m512 x) {
  const __m512i half = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  return _mm512_castsi512_ps(_mm512_and_si512(half, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
// Elements of `low` and of `high` that are bfloat16, side by side.
VJEPA_AVX_INLINE __m512i side_by_side(__m512 low, __m512 high, __m512i order) {
  return _mm512_permutex2var_epi16(_mm512_castps_si512(low), order, _mm512_castps_si512(high));
}
VJEPA_AVX_INLINE __m512i upper_halves() {
  alignas(64) static constexpr uint16_t order[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_load_si512(order);
}
// The first, second or third of three bfloat16 that add up to each element.
VJEPA_AVX_INLINE __m512 part(__m512 x, int64_t plane) {
  const __m512 first = top(x);
  if (plane == 0) return first;
  const __m512 rest = _mm512_sub_ps(x, first), second = top(rest);
  return plane == 1 ? second : _mm512_sub_ps(rest, second);
}

// float32 as three bfloat16. Of the nine products of the parts of two numbers the three smallest are left out, which
// together are below 2^-24 of the whole.
struct Triples : Blocks {
  static constexpr int64_t kElements = 2;
  static constexpr int64_t kPlanes = 3;
  static constexpr double kExponent = kLog2E;

  // 2^x; the polynomial's error is 2e-9. Of minus infinity it is 0, of NaN NaN.
  VJEPA_AVX_INLINE static __m512 exp(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 power = _mm512_set1_ps(2.1612915e-4f);
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.24678464e-3f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(9.67545157e-3f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(5.54852806e-2f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(2.40229306e-1f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(6.93147044e-1f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(power, x);  // it takes what is below x
  }
  VJEPA_AVX_INLINE static void store(float *row, int64_t plane, int64_t j, __m512 low, __m512 high) {
    const __m512i order = upper_halves();
    const __m512 first = top(low), first2 = top(high);
    const __m512 rest = _mm512_sub_ps(low, first), rest2 = _mm512_sub_ps(high, first2);
    const __m512 second = top(rest), second2 = top(rest2);
    _mm512_storeu_si512(row + 16 * j, side_by_side(first, first2, order));
    _mm512_storeu_si512(row + plane + 16 * j, side_by_side(second, second2, order));
    _mm512_storeu_si512(row + 2 * plane + 16 * j,
                        side_by_side(_mm512_sub_ps(rest, second), _mm512_sub_ps(rest2, second2), order));
  }
};
#endif

// An operand of a product: where it begins, units from row to row, and from plane to plane.
struct Operand {
  const float *data;
  int64_t stride;
  int64_t plane;
};

enum class Start { zero, add, rescale };  // out is overwritten, added to, or multiplied by a factor for each row first

// Sums of more than kChain units are sums of shorter ones: so much less is lost to rounding.
template <class M, int R, int C, Start S>
VJEPA_AVX void tile(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t units, float *out,
                    int64_t out_stride, const float *factors) {
  for (int64_t u = 0; u < units;) {
    const bool first = u == 0;
    const int64_t end = units - u > M::kChain ? u + M::kChain : units;
    __m512 sums[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
    }
    for (; u < end; ++u) {
      __m512 columns[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) columns[c] = _mm512_loadu_ps(b + u * b_stride + kLine * c);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512 row = _mm512_set1_ps(a[r * a_stride + u]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sums[r][c] = M::dot(sums[r][c], row, columns[c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        float *to = out + r * out_stride + kLine * c;
        if (!first || S == Start::add) {
          sums[r][c] = _mm512_add_ps(_mm512_loadu_ps(to), sums[r][c]);
        } else if (S == Start::rescale) {
          sums[r][c] = _mm512_fmadd_ps(_mm512_loadu_ps(to), _mm512_set1_ps(factors[r]), sums[r][c]);
        }
        _mm512_storeu_ps(to, sums[r][c]);
      }
    }
  }
}

// The product of R rows and `lines` registers of columns, R = 6: 1 to 4, R = 8: 1 to 3.
template <class M, int R, Start S>
VJEPA_AVX void tile_of(int64_t lines, const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t units,
                       float *out, int64_t out_stride, const float *factors = nullptr) {
  if (lines == 1) return tile<M, R, 1, S>(a, a_stride, b, b_stride, units, out, out_stride, factors);
  if (lines == 2) return tile<M, R, 2, S>(a, a_stride, b, b_stride, units, out, out_stride, factors);
  if (lines == 3) return tile<M, R, 3, S>(a, a_stride, b, b_stride, units, out, out_stride, factors);
  if constexpr (R <= kRows) tile<M, R, 4, S>(a, a_stride, b, b_stride, units, out, out_stride, factors);
}

// The same for any number of registers of columns, as even parts as possible.
template <class M, int R, Start S>
VJEPA_AVX void tiles_of(int64_t lines, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                        int64_t units, float *out, int64_t out_stride, const float *factors = nullptr) {
  constexpr int64_t most = R <= kRows ? 4 : 3;
  for (int64_t done = 0; done < lines;) {
    const int64_t parts = (lines - done + most - 1) / most, some = (lines - done + parts - 1) / parts;
    tile_of<M, R, S>(some, a, a_stride, b + kLine * done, b_stride, units, out + kLine * done, out_stride, factors);
    done += some;
  }
}

// Work of other instructions that is done bit by bit, by step(), while tiles multiply: this is none.
struct Nothing {
  void step() {}
};

// The same for a number of rows, which go through in groups of Rows.
template <Start S, int Rows = kRows, class M, class Meanwhile>
VJEPA_AVX void multiply(M &, int64_t rows, int64_t lines, const Operand &a, const Operand &b, int64_t units, float *out,
                        int64_t out_stride, const float *factors, Meanwhile &) {
  for (int64_t r = 0; r < rows; r += Rows) {
    tiles_of<M, Rows, S>(lines, a.data + r * a.stride, a.stride, b.data, b.stride, units, out + r * out_stride,
                         out_stride, factors ? factors + r : nullptr);
  }
}
template <Start S, int Rows = kRows, class M>
VJEPA_AVX void multiply(M &matrix, int64_t rows, int64_t lines, const Operand &a, const Operand &b, int64_t units,
                        float *out, int64_t out_stride, const float *factors = nullptr) {
  Nothing nothing;
  multiply<S, Rows>(matrix, rows, lines, a, b, units, out, out_stride, factors, nothing);
}

}  // namespace
}  // namespace vjepa
