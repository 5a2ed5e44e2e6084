// What the entry points of attention hand to the code of an instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../capi_attention.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define VJEPA_HAS_AVX512 1
#if defined(__clang__) || __GNUC__ >= 10
#define VJEPA_HAS_AVX512_BF16 1
#endif
#endif

namespace vjepa {

struct AttentionCall {
  vjepa_attention about;
  vjepa_heads q, k, v, out, grad;  // the last two in the backward pass
  const float *lse;
  void *written[3];  // out, or the gradients of q, k and v
  float *written_lse;
};

// Queries of one head of one sequence, and all keys of that sequence; the smallest part of a call.
struct AttentionPiece {
  int64_t head;
  int64_t first_query, queries;
  int64_t first_key, keys;
};

// One direction in the code of one instruction set. `scratch` has the bytes that scratch_bytes tells for the piece with
// the most keys, aligned to a cache line, and need not be cleared.
struct AttentionCode {
  size_t (*scratch_bytes)(int64_t head_dim, int64_t keys);
  void (*run)(const AttentionCall &call, const AttentionPiece &piece, void *scratch);
};

struct AttentionCodes {
  AttentionCode forward, backward;
};

extern const AttentionCodes kAttentionFloat32;      // float32 tensors, float32 products
extern const AttentionCodes kAttentionWidened;      // bfloat16 tensors, float32 products
extern const AttentionCodes kAttentionBfloat16;     // bfloat16 tensors, bfloat16 products
extern const AttentionCodes kAttentionTiles;        // the same by the tiles of AMX
extern const AttentionCodes kAttentionTripleTiles;  // float32 tensors and as exact products, by tiles
extern const AttentionCodes kAttentionTilesInSoftware;
extern const AttentionCodes kAttentionTripleTilesInSoftware;
constexpr int64_t kAttentionQueries = 96;  // queries that go through all keys together in the forward pass

}  // namespace vjepa
