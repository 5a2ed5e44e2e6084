// Brings the rows of a head into the orders in which attention_tile.h multiplies, padded with zeros.
//
// Nothing beyond the `width` features of a row is read: it may belong to another head, or to nobody.
#pragma once

#include "../include/vjepa/dtype.h"
#include "attention_tile.h"

namespace vjepa {
namespace {

// Where the rows of a head of T lie.
template <class T>
struct Rows {
  const T *first;
  int64_t stride;
  int64_t count;
  int64_t width;
};

VJEPA_AVX_INLINE __mmask16 mask_of(int64_t rest) {
  return rest >= 16 ? 0xffff : rest <= 0 ? 0 : static_cast<__mmask16>((1u << rest) - 1);
}

// Up to 16 elements, `rest` of them there, as float32.
VJEPA_AVX_INLINE __m512 load_line(const float *from, int64_t rest) {
  return _mm512_maskz_loadu_ps(mask_of(rest), from);
}
VJEPA_AVX_INLINE __m512i load_halves(const bfloat16 *from, int64_t rest) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask_of(rest), from));
}
VJEPA_AVX_INLINE __m512 load_line(const bfloat16 *from, int64_t rest) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(load_halves(from, rest), 16));
}

VJEPA_AVX_INLINE void store_line(float *to, __m512 values, int64_t rest) {
  _mm512_mask_storeu_ps(to, mask_of(rest), values);
}
// As from_float<bfloat16> rounds.
VJEPA_AVX_INLINE void store_line(bfloat16 *to, __m512 values, int64_t rest) {
  const __m512i bits = _mm512_castps_si512(values), top = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 no_number = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, no_number, top, _mm512_set1_epi32(0x40));
  _mm256_mask_storeu_epi16(to, mask_of(rest), _mm512_cvtepi32_epi16(kept));
}

// 16 units of a plane of a row along its features; of `rest` elements.
template <class M>
VJEPA_AVX_INLINE __m512 load_units(const float *from, int64_t rest, int64_t plane) {
#if defined(VJEPA_AVX_HAS_BF16)
  if constexpr (M::kPlanes > 1) {
    const __m512 low = load_line(from, rest), high = load_line(from + kLine, rest - kLine);
    return _mm512_castsi512_ps(side_by_side(part(low, plane), part(high, plane), upper_halves()));
  }
#endif
  (void)plane;
  return load_line(from, rest);
}

template <class M>
VJEPA_AVX_INLINE __m512 load_units(const bfloat16 *from, int64_t rest, int64_t) {
  if constexpr (M::kElements == 1) return load_line(from, rest);
  const __mmask32 mask = rest >= 32 ? 0xffffffffu : rest <= 0 ? 0u : (1u << rest) - 1;
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, from));
}

// Rows r and r + 1 of a plane as pairs, 16 columns of them; a row that is not `there` is 0.
template <class M>
VJEPA_AVX_INLINE __m512 pair_rows(const bfloat16 *from, int64_t stride, int64_t rest, int there, int64_t) {
  __m512i units = _mm512_setzero_si512();
  if (there > 0) units = load_halves(from, rest);
  if (there > 1) units = _mm512_or_si512(units, _mm512_slli_epi32(load_halves(from + stride, rest), 16));
  return _mm512_castsi512_ps(units);
}
#if defined(VJEPA_AVX_HAS_BF16)
template <class M>
VJEPA_AVX_INLINE __m512 pair_rows(const float *from, int64_t stride, int64_t rest, int there, int64_t plane) {
  const __m512 zero = _mm512_setzero_ps();
  const __m512 first = there > 0 ? load_line(from, rest) : zero,
               second = there > 1 ? load_line(from + stride, rest) : zero;
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(part(first, plane)), 16);
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(part(second, plane))));
}
#endif

// Rows r and, if units are pairs, r + 1: 16 columns of units of a plane along the rows.
template <class M, class T>
VJEPA_AVX_INLINE __m512 load_across(const Rows<T> &rows, int64_t r, int64_t column, int64_t plane) {
  const int64_t rest = rows.width - column;
  const T *from = rows.first + r * rows.stride + column;
  if constexpr (M::kElements == 1) {
    (void)plane;
    return r < rows.count ? load_line(from, rest) : _mm512_setzero_ps();
  } else {
    return pair_rows<M>(from, rows.stride, rest, r + 1 < rows.count ? 2 : r < rows.count ? 1 : 0, plane);
  }
}

VJEPA_AVX_INLINE void transpose(__m512 (&rows)[16]) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_castps_si512(rows[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 g + k] has column 4 q + k of rows 4 g .. 4 g + 3 in its quarter q.
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m512i even = _mm512_shuffle_i32x4(a[k], a[4 + k], 0x88), odd = _mm512_shuffle_i32x4(a[k], a[4 + k], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0xdd);
    rows[k] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(even, even2, 0x88));
    rows[4 + k] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(odd, odd2, 0x88));
    rows[8 + k] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(even, even2, 0xdd));
    rows[12 + k] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(odd, odd2, 0xdd));
  }
}

// An operand a: `padded` rows of `units` units along the features.
template <class M, class T>
VJEPA_AVX void pack_rows(const Rows<T> &rows, int64_t padded, int64_t units, float *to) {
  for (int64_t r = 0; r < padded; ++r) {
    for (int64_t plane = 0; plane < M::kPlanes; ++plane, to += units) {
      for (int64_t u = 0; u < units; u += kLine) {
        const int64_t column = u * M::kElements;
        const T *from = rows.first + r * rows.stride + column;
        const __m512 line = r < rows.count ? load_units<M>(from, rows.width - column, plane) : _mm512_setzero_ps();
        _mm512_mask_storeu_ps(to + u, mask_of(units - u), line);
      }
    }
  }
}

// An operand b, a column for each of `padded` rows and units along the features: panels of rows of kPanel; of the last
// one the registers that have a row.
template <class M, class T>
VJEPA_AVX void pack_panels(const Rows<T> &rows, int64_t padded, int64_t units, float *to) {
  constexpr int64_t stride = kPanel * M::kPlanes;
  for (int64_t first = 0; first < padded; first += kLine) {
    float *panel = to + first / kPanel * units * stride + first % kPanel;
    for (int64_t plane = 0; plane < M::kPlanes; ++plane, panel += kPanel) {
      for (int64_t u = 0; u < units; u += kLine) {
        const int64_t column = u * M::kElements;
        __m512 lines[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const T *from = rows.first + (first + i) * rows.stride + column;
          lines[i] = first + i < rows.count ? load_units<M>(from, rows.width - column, plane) : _mm512_setzero_ps();
        }
        transpose(lines);
        float *out = panel + u * stride;
        if (units - u >= kLine) {
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) _mm512_storeu_ps(out + i * stride, lines[i]);
        } else {
          for (int i = 0; i < 16; ++i) {
            if (u + i < units) _mm512_storeu_ps(out + i * stride, lines[i]);
          }
        }
      }
    }
  }
}

// An operand b, a column for each feature and units along `padded` rows: rows of `columns`.
template <class M, class T>
VJEPA_AVX void pack_across(const Rows<T> &rows, int64_t padded, int64_t columns, float *to) {
  for (int64_t r = 0; r < padded; r += M::kElements) {
    for (int64_t plane = 0; plane < M::kPlanes; ++plane, to += columns) {
      for (int64_t column = 0; column < columns; column += kLine) {
        _mm512_storeu_ps(to + column, load_across<M>(rows, r, column, plane));
      }
    }
  }
}

// An operand a: a row for each feature, `columns` of them, and `count` units along the rows, a multiple of 16.
template <class M, class T>
VJEPA_AVX void pack_features(const Rows<T> &rows, int64_t columns, int64_t count, float *to) {
  for (int64_t plane = 0; plane < M::kPlanes; ++plane, to += count) {
    for (int64_t u = 0; u < count; u += kLine) {
      for (int64_t column = 0; column < columns; column += kLine) {
        __m512 lines[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) lines[i] = load_across<M>(rows, (u + i) * M::kElements, column, plane);
        transpose(lines);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + (column + i) * count * M::kPlanes + u, lines[i]);
      }
    }
  }
}

// Rows of float32, multiplied, as the rows of a contiguous result.
template <class T>
VJEPA_AVX void write_rows(const float *from, int64_t from_stride, int64_t count, int64_t width, float factor, T *to,
                          int64_t to_stride) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t column = 0; column < width; column += kLine) {
      const __m512 line = _mm512_loadu_ps(from + r * from_stride + column);
      store_line(to + r * to_stride + column, _mm512_mul_ps(line, _mm512_set1_ps(factor)), width - column);
    }
  }
}

// The same of columns, whose number is below `stride` or equal, a multiple of 16; `from` has up_to(width, 16) rows.
template <class T>
VJEPA_AVX void write_columns(const float *from, int64_t stride, int64_t count, int64_t width, float factor, T *to,
                             int64_t to_stride) {
  for (int64_t first = 0; first < count; first += kLine) {
    for (int64_t column = 0; column < width; column += kLine) {
      __m512 lines[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        lines[i] = _mm512_mul_ps(_mm512_loadu_ps(from + (column + i) * stride + first), _mm512_set1_ps(factor));
      }
      transpose(lines);
      for (int i = 0; i < 16 && first + i < count; ++i) {
        store_line(to + (first + i) * to_stride + column, lines[i], width - column);
      }
    }
  }
}

// Units of `count` elements along a sum.
template <class M>
int64_t units_of(int64_t count) {
  return up_to((count + M::kElements - 1) / M::kElements, M::kAlong);
}
// And as many elements.
template <class M>
int64_t padded_of(int64_t count) {
  return units_of<M>(count) * M::kElements;
}

// Hands out pieces of a block of memory, or, without one, counts what they need.
class Carver {
 public:
  explicit Carver(void *block) : block_(static_cast<char *>(block)) {}
  float *take(int64_t floats) {
    float *piece = block_ ? reinterpret_cast<float *>(block_ + used_) : nullptr;
    used_ += static_cast<size_t>(up_to(floats, kLine)) * sizeof(float);
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char *block_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace vjepa
