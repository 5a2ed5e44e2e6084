// Products of float32 matrices by tiles of bfloat16: what is given is checked, divided into blocks and handed to
// threads.
#include "../capi_product.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define VJEPA_HAS_AVX512 1
#include "product_tile.h"
#endif

namespace vjepa {
namespace {

constexpr int64_t kMostElements = INT64_MAX >> 24;  // of sizes, also with the parts of their tiles

#if defined(VJEPA_HAS_AVX512)
// Summands of a block: what is packed of both operands stays in a core's second cache; sums wait in memory meanwhile.
constexpr int64_t kDepth = 384;
constexpr int64_t kColumns = 4096;       // of a block of b, which all threads share
constexpr int64_t kRowPairs = 4;         // most pairs of panels of a that a thread packs together
constexpr int64_t kBlocksPerThread = 2;  // of rows, where there are enough

int32_t detect() {
  // These ask the system, too, whether it keeps the registers.
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return 0;
  }
  return amx_allowed() ? VJEPA_TILES | VJEPA_TILES_IN_SOFTWARE : VJEPA_TILES_IN_SOFTWARE;
}

constexpr std::align_val_t kAligned{4096};
struct Scratch {
  explicit Scratch(size_t units) : units(units), data(new (kAligned) float[units]) {}
  ~Scratch() { ::operator delete[](data, kAligned); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  size_t units;
  float *data;
};

// The last product's memory: the system would have to hand it out anew, page by page, in a tenth of a product's time.
std::atomic<Scratch *> spare{nullptr};

std::unique_ptr<Scratch> take_scratch(size_t units) {
  std::unique_ptr<Scratch> found(spare.exchange(nullptr));
  if (found && found->units >= units) return found;
  found.reset();
  return std::make_unique<Scratch>(units);
}

void keep_scratch(std::unique_ptr<Scratch> scratch) {
  const std::unique_ptr<Scratch> before(spare.exchange(scratch.release()));
}

// A block of b that is packed: some summands of some columns.
struct Block {
  int64_t first_column, columns, first_summand, depth;
  int64_t steps() const { return (depth + kStep - 1) / kStep; }
  int64_t panel() const { return steps() * kStepUnits; }
  int64_t panels() const { return (columns + kTile - 1) / kTile; }
};

void pack_columns(const vjepa_product &call, const Block &block, float *to, bool *special, int32_t threads) {
  parallel_for(block.panels(), 4, threads, [&](int64_t first, int64_t last) {
    const int64_t column = first * kTile, count = std::min(last * kTile, block.columns) - column;
    const float *from =
        call.b.data + (block.first_column + column) * call.b.column_stride + block.first_summand * call.b.row_stride;
    Packing(from, call.b.column_stride, call.b.row_stride, count, block.depth, true, to + first * block.panel(),
            special + first)
        .rest();
  });
}

// Rows `first` .. `first + rows` of a, whose panels come to `to`.
struct Rows {
  int64_t first, rows;
  float *to;
  bool special[kPair * kRowPairs];

  Packing packing(const vjepa_product &call, const Block &block) {
    const float *from = call.a.data + first * call.a.row_stride + block.first_summand * call.a.column_stride;
    return Packing(from, call.a.row_stride, call.a.column_stride, rows, block.depth, false, to, special);
  }
};

template <class T>
void multiply_rows(const vjepa_product &call, const Block &block, const Rows &rows, const float *b,
                   const bool *b_special, Meanwhile &meanwhile) {
  const int64_t panels = (rows.rows + kTile - 1) / kTile, columns = block.panels(), panel = block.panel();
  T tiles;
  for (int64_t q = 0; q < columns; q += kPair) {
    const bool wide = q + 1 < columns;
    for (int64_t p = 0; p < panels; p += kPair) {
      const bool tall = p + 1 < panels;
      const int64_t column = block.first_column + q * kTile;
      Finish how = {};
      how.out = call.out + (rows.first + p * kTile) * call.out_stride + column;
      how.out_stride = call.out_stride;
      how.rows = rows.rows - p * kTile;
      how.columns = block.columns - q * kTile;
      how.bias = call.bias && block.first_summand == 0 ? call.bias + column : nullptr;
      how.add = call.accumulate || block.first_summand > 0;
      how.special = rows.special[p] || (tall && rows.special[p + 1]) || b_special[q] || (wide && b_special[q + 1]);
      const auto product = tall ? (wide ? product_of_panels<T, 2, 2> : product_of_panels<T, 2, 1>)
                                : (wide ? product_of_panels<T, 1, 2> : product_of_panels<T, 1, 1>);
      product(tiles, rows.to + p * panel, panel, b + q * panel, panel, block.steps(), how, meanwhile);
    }
  }
}

template <class T>
int32_t multiply(const vjepa_product &call, int32_t threads) try {
  const int64_t pairs = (call.rows + kSums - 1) / kSums;
  const int64_t wanted = std::max((pairs + kRowPairs - 1) / kRowPairs, std::min(pairs, kBlocksPerThread * threads));
  const int64_t rows = (pairs + wanted - 1) / wanted * kSums, row_blocks = (call.rows + rows - 1) / rows;
  const int64_t depths = std::max<int64_t>(1, (call.depth + kDepth - 1) / kDepth);
  const int64_t depth = up_to((call.depth + depths - 1) / depths, kStep);
  const int64_t members = std::min<int64_t>(threads, row_blocks);
  const int64_t of_b = up_to(std::min(call.columns, kColumns), kTile) * depth / kStep * kStepUnits / kTile;
  const int64_t of_a = rows * depth / kStep * kStepUnits / kTile;
  std::unique_ptr<Scratch> scratch = take_scratch(static_cast<size_t>(of_b + 2 * members * of_a));
  float *const b = scratch->data, *const a = b + of_b;
  bool special[kColumns / kTile];
  for (int64_t column = 0; column < call.columns; column += kColumns) {
    for (int64_t n = 0; n < depths; ++n) {
      const int64_t first_summand = n * depth;
      const Block block = {column, std::min(kColumns, call.columns - column), first_summand,
                           std::clamp<int64_t>(call.depth - first_summand, 0, depth)};
      pack_columns(call, block, b, special, threads);
      std::atomic<int64_t> next{0};
      parallel_for(members, 1, threads, [&](int64_t member, int64_t last) {
        if (member >= last) return;
        Meanwhile meanwhile;
        Rows both[2];
        const auto take = [&](Rows &it) {
          it.first = next.fetch_add(1, std::memory_order_relaxed) * rows;
          it.rows = std::min(rows, call.rows - it.first);
          return it.rows > 0;
        };
        for (int64_t n = 0; n < 2; ++n) both[n].to = a + (2 * member + n) * of_a;
        if (!take(both[0])) return;
        both[0].packing(call, block).rest();
        for (int64_t n = 0;; n = 1 - n) {
          const bool more = take(both[1 - n]);
          const int64_t products = (both[n].rows + kSums - 1) / kSums * ((block.columns + kSums - 1) / kSums);
          if (more) meanwhile.pack(both[1 - n].packing(call, block), products * block.steps());
          multiply_rows<T>(call, block, both[n], b, special, meanwhile);
          meanwhile.rest_of_packing();
          if (!more) break;
        }
        meanwhile.rest_of_sums();
      });
    }
  }
  keep_scratch(std::move(scratch));
  return VJEPA_OK;
} catch (const std::bad_alloc &) {
  return VJEPA_ERROR_MEMORY;
}
#else
int32_t detect() { return 0; }
#endif

int32_t instructions() {
  static const int32_t found = detect();
  return found;
}

int32_t check_operand(const vjepa_operand &operand, int64_t rows, int64_t columns) {
  if (!rows || !columns) return VJEPA_OK;
  if (!operand.data) return VJEPA_ERROR_NULL_POINTER;
  if (reinterpret_cast<uintptr_t>(operand.data) % sizeof(float)) return VJEPA_ERROR_ALIGNMENT;
  const bool side_by_side = operand.row_stride == 1 || operand.column_stride == 1 || rows == 1 || columns == 1;
  return side_by_side ? VJEPA_OK : VJEPA_ERROR_STRIDES;
}

int32_t check(const vjepa_product &call, int32_t threads) {
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (call.instructions != VJEPA_TILES && call.instructions != VJEPA_TILES_IN_SOFTWARE) {
    return VJEPA_ERROR_INSTRUCTIONS;
  }
  if (!(call.instructions & instructions())) return VJEPA_ERROR_INSTRUCTIONS;
  for (const int64_t size : {call.rows, call.columns, call.depth}) {
    if (size < 0 || size > kMostElements) return VJEPA_ERROR_NEGATIVE_SIZE;
  }
  if (const int32_t status = check_operand(call.a, call.rows, call.depth)) return status;
  if (const int32_t status = check_operand(call.b, call.depth, call.columns)) return status;
  if (!call.rows || !call.columns) return VJEPA_OK;
  if (!call.out) return VJEPA_ERROR_NULL_POINTER;
  if (call.rows > 1 && call.out_stride < call.columns) return VJEPA_ERROR_STRIDES;
  const auto misaligned = [](const float *data) { return reinterpret_cast<uintptr_t>(data) % sizeof(float) != 0; };
  return misaligned(call.out) || misaligned(call.bias) ? VJEPA_ERROR_ALIGNMENT : VJEPA_OK;
}

}  // namespace
}  // namespace vjepa

extern "C" int32_t vjepa_product_instructions(void) { return vjepa::instructions(); }

extern "C" int32_t vjepa_product_cpu(const vjepa_product *product, int32_t threads) {
  if (!product) return VJEPA_ERROR_NULL_POINTER;
  if (const int32_t status = vjepa::check(*product, threads)) return status;
  if (!product->rows || !product->columns) return VJEPA_OK;
#if defined(VJEPA_HAS_AVX512)
  if (product->instructions == VJEPA_TILES_IN_SOFTWARE)
    return vjepa::multiply<vjepa::TilesInSoftware>(*product, threads);
#if defined(VJEPA_HAS_AMX)
  return vjepa::multiply<vjepa::Tiles>(*product, threads);
#endif
#endif
  return VJEPA_ERROR_INSTRUCTIONS;
}
