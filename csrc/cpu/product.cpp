// Products of float32 matrices by tiles of bfloat16: what is given is checked, divided into blocks and handed to
// threads.
#include "../capi_product.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

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
constexpr int64_t kColumns = 4096;  // of a block of b, which all threads share
// Of blocks of b that are packed together. With more of them threads wait for each other less often, but the rows of
// transposed matrices are read in shorter pieces.
constexpr int64_t kPackedUnits = 1 << 20;
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

// Some summands of some columns of b, packed.
struct Block {
  int64_t first_column, columns, first_summand, depth;
  float *to;      // its panels
  bool *special;  // [panels] whether a number of each is infinite or none
  int64_t steps() const { return (depth + kStep - 1) / kStep; }
  int64_t panel() const { return steps() * kStepUnits; }
  int64_t panels() const { return (columns + kTile - 1) / kTile; }

  Packing packing(const vjepa_product &call, int64_t first_panel, int64_t last_panel) const {
    const int64_t column = first_panel * kTile, count = std::min(last_panel * kTile, columns) - column;
    const float *from =
        call.b.data + (first_column + column) * call.b.column_stride + first_summand * call.b.row_stride;
    return Packing(from, call.b.column_stride, call.b.row_stride, count, depth, true, to + first_panel * panel(),
                   special + first_panel);
  }
};

// Blocks of the same columns, summand after summand; the last may be the shorter one.
void pack_blocks(const vjepa_product &call, const std::vector<Block> &blocks, int32_t threads) {
  const int64_t panels = blocks[0].panels();
  parallel_for(panels * static_cast<int64_t>(blocks.size()), 4, threads, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; p += panels - p % panels) {
      const int64_t in_block = p % panels;
      blocks[p / panels].packing(call, in_block, std::min(panels, in_block + last - p)).rest();
    }
  });
}

// Rows `first` .. `first + rows` of a, whose panels come to `to`: the summands of one block.
struct Rows {
  int64_t first, rows;
  const Block *block;
  float *to;
  bool special[kPair * kRowPairs];

  Packing packing(const vjepa_product &call) {
    const float *from = call.a.data + first * call.a.row_stride + block->first_summand * call.a.column_stride;
    return Packing(from, call.a.row_stride, call.a.column_stride, rows, block->depth, false, to, special);
  }
  int64_t product_steps() const {
    return (rows + kSums - 1) / kSums * ((block->columns + kSums - 1) / kSums) * block->steps();
  }
};

template <class T>
void multiply_rows(const vjepa_product &call, const Rows &rows, Meanwhile &meanwhile) {
  const Block &block = *rows.block;
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
      how.special =
          rows.special[p] || (tall && rows.special[p + 1]) || block.special[q] || (wide && block.special[q + 1]);
      const auto product = tall ? (wide ? product_of_panels<T, 2, 2> : product_of_panels<T, 2, 1>)
                                : (wide ? product_of_panels<T, 1, 2> : product_of_panels<T, 1, 1>);
      product(tiles, rows.to + p * panel, panel, block.to + q * panel, panel, block.steps(), how, meanwhile);
    }
  }
}

// The products of some row blocks, whichever are left, and of all blocks; rows are packed while those before them are
// multiplied, to the one and the other half of `scratch`.
template <class T>
void multiply_blocks(const vjepa_product &call, const std::vector<Block> &blocks, int64_t row_block,
                     std::atomic<int64_t> &next, float *scratch, int64_t half) {
  Meanwhile meanwhile;
  Rows both[2];
  both[0].to = scratch;
  both[1].to = scratch + half;
  int64_t first = 0;
  size_t block = blocks.size();
  const auto take = [&](Rows &rows) {
    if (block == blocks.size()) {
      first = next.fetch_add(1, std::memory_order_relaxed) * row_block;
      block = 0;
    }
    rows.first = first;
    rows.rows = std::min(row_block, call.rows - first);
    rows.block = &blocks[block++];
    return rows.rows > 0;
  };
  if (!take(both[0])) return;
  both[0].packing(call).rest();
  bool more = true;
  for (int64_t n = 0; more; n = 1 - n) {
    more = take(both[1 - n]);
    if (more) meanwhile.pack(both[1 - n].packing(call), both[n].product_steps());
    multiply_rows<T>(call, both[n], meanwhile);
    meanwhile.rest_of_packing();
  }
  meanwhile.rest_of_sums();
}

template <class T>
int32_t multiply(const vjepa_product &call, int32_t threads) try {
  const int64_t pairs = (call.rows + kSums - 1) / kSums;
  const int64_t wanted = std::max((pairs + kRowPairs - 1) / kRowPairs, std::min(pairs, kBlocksPerThread * threads));
  const int64_t row_block = (pairs + wanted - 1) / wanted * kSums, row_blocks = (call.rows + row_block - 1) / row_block;
  const int64_t depths = std::max<int64_t>(1, (call.depth + kDepth - 1) / kDepth);
  const int64_t depth = up_to((call.depth + depths - 1) / depths, kStep);
  const int64_t members = std::min<int64_t>(threads, row_blocks);
  const int64_t panels = (std::min(call.columns, kColumns) + kTile - 1) / kTile;
  const int64_t panel = depth / kStep * kStepUnits, of_b = panels * panel, of_a = row_block / kTile * panel;
  const int64_t together = std::clamp<int64_t>(kPackedUnits / std::max<int64_t>(1, of_b), 1, depths);
  std::unique_ptr<Scratch> scratch = take_scratch(static_cast<size_t>(together * of_b + 2 * members * of_a));
  const std::unique_ptr<bool[]> special(new bool[static_cast<size_t>(together * panels)]);
  float *const b = scratch->data, *const a = b + together * of_b;
  for (int64_t column = 0; column < call.columns; column += kColumns) {
    for (int64_t n = 0; n < depths; n += together) {
      std::vector<Block> blocks;
      for (int64_t k = 0; k < std::min(together, depths - n); ++k) {
        const int64_t first = std::min((n + k) * depth, call.depth);
        blocks.push_back({column, std::min(kColumns, call.columns - column), first, std::min(depth, call.depth - first),
                          b + k * of_b, special.get() + k * panels});
      }
      pack_blocks(call, blocks, threads);
      std::atomic<int64_t> next{0};
      parallel_for(members, 1, threads, [&](int64_t member, int64_t last) {
        if (member < last) multiply_blocks<T>(call, blocks, row_block, next, a + 2 * member * of_a, of_a);
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
