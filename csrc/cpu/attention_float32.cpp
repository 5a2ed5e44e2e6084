// Attention with products in float32, of tensors in float32 or bfloat16.
#include "attention.h"

#if defined(VJEPA_HAS_AVX512)
#define VJEPA_AVX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#include "attention_backward.h"

namespace vjepa {

const AttentionCodes kAttentionFloat32 = {{forward_bytes<Single>, forward_piece<float, Single>},
                                          {backward_bytes<Single>, backward_piece<float, Single>}};
const AttentionCodes kAttentionWidened = {{forward_bytes<Single>, forward_piece<bfloat16, Single>},
                                          {backward_bytes<Single>, backward_piece<bfloat16, Single>}};

}  // namespace vjepa
#endif
