// Attention with products in bfloat16.
#include "attention.h"

#if defined(VJEPA_HAS_AVX512_BF16)
#define VJEPA_AVX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define VJEPA_AVX_HAS_BF16 1
#include "attention_backward.h"

namespace vjepa {

const AttentionCodes kAttentionBfloat16 = {{forward_bytes<Pairs>, forward_piece<bfloat16, Pairs>},
                                           {backward_bytes<Pairs>, backward_piece<bfloat16, Pairs>}};

}  // namespace vjepa
#endif
