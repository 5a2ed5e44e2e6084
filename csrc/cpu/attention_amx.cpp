// Attention with products by the tiles of AMX, and by tiles in software.
#include "amx.h"
#include "attention.h"

#if defined(VJEPA_HAS_AVX512_BF16)
#define VJEPA_AVX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define VJEPA_AVX_HAS_BF16 1
#include "attention_amx.h"
#include "attention_backward.h"

namespace vjepa {
namespace {

template <class T, class M>
constexpr AttentionCodes codes() {
  return {{forward_bytes<M>, forward_piece<T, M>}, {backward_bytes<M>, backward_piece<T, M>}};
}

}  // namespace

#if defined(VJEPA_HAS_AMX)
const AttentionCodes kAttentionTiles = codes<bfloat16, Tiled<Tiles, Pairs>>();
const AttentionCodes kAttentionTripleTiles = codes<float, Tiled<Tiles, Triples>>();
#endif
const AttentionCodes kAttentionTilesInSoftware = codes<bfloat16, Tiled<TilesInSoftware, Pairs>>();
const AttentionCodes kAttentionTripleTilesInSoftware = codes<float, Tiled<TilesInSoftware, Triples>>();

}  // namespace vjepa
#endif
