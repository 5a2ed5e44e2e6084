// The entry points of attention on a CPU: what they are given is checked, divided into pieces and handed out to
// threads.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "amx.h"
#include "parallel.h"

#if defined(VJEPA_HAS_AVX512)
#include <cpuid.h>
#endif

namespace vjepa {
namespace {

constexpr int64_t kMostElements = INT64_MAX >> 8;  // of sizes: no product with the bytes of an element overflows
constexpr int64_t kPiecesForEach = 3;              // thread, where heads are divided to occupy all

int32_t detect() {
#if defined(VJEPA_HAS_AVX512)
  // These ask the system, too, whether it keeps the registers.
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return 0;
  }
#if defined(VJEPA_HAS_AVX512_BF16)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1)) {
    return VJEPA_AVX512 | VJEPA_AVX512_BF16 | (amx_allowed() ? VJEPA_AMX_BF16 : 0);
  }
#endif
  return VJEPA_AVX512;
#else
  return 0;
#endif
}

int32_t instructions() {
  static const int32_t found = detect();
  return found;
}

int32_t check_sizes(const vjepa_attention &about, int32_t threads) {
  if (threads < 1) return VJEPA_ERROR_THREADS;
  if (about.dtype != VJEPA_FLOAT32 && about.dtype != VJEPA_BFLOAT16) return VJEPA_ERROR_DTYPE;
  const int32_t software = instructions() & VJEPA_AVX512_BF16 ? VJEPA_AMX_IN_SOFTWARE : 0;
  if (about.instructions & ~(instructions() | software)) return VJEPA_ERROR_INSTRUCTIONS;
  if (!(about.instructions & VJEPA_AVX512)) return VJEPA_ERROR_INSTRUCTIONS;
  if (!(about.scale > 0) || !std::isfinite(about.scale)) return VJEPA_ERROR_SCALE;
  if (about.sequences < 0 || about.tokens < 0 || about.kv_tokens < 0 || about.heads < 0) {
    return VJEPA_ERROR_NEGATIVE_SIZE;
  }
  if (about.head_dim < 1 || about.head_dim > VJEPA_ATTENTION_HEAD_DIM) return VJEPA_ERROR_NEGATIVE_SIZE;
  const int64_t most = kMostElements / VJEPA_ATTENTION_HEAD_DIM / std::max<int64_t>(1, about.heads);
  if (about.tokens > most || about.kv_tokens > most) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (about.sequences && (!about.lengths || !about.kv_lengths)) return VJEPA_ERROR_NULL_POINTER;
  int64_t tokens = 0, kv_tokens = 0;
  for (int64_t s = 0; s < about.sequences; ++s) {
    const int64_t n = about.lengths[s], m = about.kv_lengths[s];
    if (n < 0 || m < 0 || n > about.tokens - tokens || m > about.kv_tokens - kv_tokens || (n && !m)) {
      return VJEPA_ERROR_INDEX;
    }
    tokens += n;
    kv_tokens += m;
  }
  return tokens == about.tokens && kv_tokens == about.kv_tokens ? VJEPA_OK : VJEPA_ERROR_INDEX;
}

int32_t check_pointer(const void *data, int64_t elements, uintptr_t alignment) {
  if (elements && !data) return VJEPA_ERROR_NULL_POINTER;
  return elements && reinterpret_cast<uintptr_t>(data) % alignment ? VJEPA_ERROR_ALIGNMENT : VJEPA_OK;
}

int32_t check_tensors(const AttentionCall &call, bool backward) {
  const vjepa_attention &about = call.about;
  const int64_t queries = about.tokens * about.heads, keys = about.kv_tokens * about.heads;
  const uintptr_t size = about.dtype == VJEPA_FLOAT32 ? 4 : 2;
  const struct {
    const void *data;
    int64_t elements;
    uintptr_t alignment;
  } all[] = {{call.q.data, queries, size},
             {call.k.data, keys, size},
             {call.v.data, keys, size},
             {call.written[0], queries, size},
             {call.out.data, backward ? queries : 0, size},
             {call.grad.data, backward ? queries : 0, size},
             {call.written[1], backward ? keys : 0, size},
             {call.written[2], backward ? keys : 0, size},
             {backward ? call.lse : call.written_lse, queries, 4}};
  for (const auto &one : all) {
    if (const int32_t status = check_pointer(one.data, one.elements, one.alignment)) return status;
  }
  return VJEPA_OK;
}

const AttentionCodes *codes_of(const vjepa_attention &about) {
#if defined(VJEPA_HAS_AVX512)
  const bool wide = about.dtype == VJEPA_FLOAT32;
#if defined(VJEPA_HAS_AMX) && defined(VJEPA_HAS_AVX512_BF16)
  if (about.instructions & VJEPA_AMX_BF16) return wide ? &kAttentionTripleTiles : &kAttentionTiles;
#endif
#if defined(VJEPA_HAS_AVX512_BF16)
  if (about.instructions & VJEPA_AMX_IN_SOFTWARE) {
    return wide ? &kAttentionTripleTilesInSoftware : &kAttentionTilesInSoftware;
  }
  if (!wide && about.instructions & VJEPA_AVX512_BF16) return &kAttentionBfloat16;
#endif
  return wide ? &kAttentionFloat32 : &kAttentionWidened;
#else
  (void)about;
  return nullptr;
#endif
}

// All pieces, the ones with the most work first, so that no thread is left with a long one in the end. The queries of a
// head may be divided where that gives more threads something to do; no result depends on it.
std::vector<AttentionPiece> pieces_of(const vjepa_attention &about, bool divide, int32_t threads) {
  const int64_t wanted = divide ? kPiecesForEach * threads : 1, heads = std::max<int64_t>(1, about.heads);
  const int64_t parts = std::max<int64_t>(1, wanted / std::max<int64_t>(1, about.sequences * heads));
  std::vector<AttentionPiece> pieces;
  for (int64_t s = 0, query = 0, key = 0; s < about.sequences;
       query += about.lengths[s], key += about.kv_lengths[s++]) {
    const int64_t queries = about.lengths[s], blocks = (queries + kAttentionQueries - 1) / kAttentionQueries;
    const int64_t step = divide ? (blocks + parts - 1) / parts * kAttentionQueries : queries;
    for (int64_t head = 0; head < about.heads; ++head) {
      int64_t first = 0;
      do {  // also without queries: gradients of keys that nobody sees are zero
        const int64_t some = std::min(step, queries - first);
        if (some || !divide) pieces.push_back({head, query + first, some, key, about.kv_lengths[s]});
        first += some;
      } while (first < queries);
    }
  }
  const auto work = [](const AttentionPiece &piece) { return piece.queries * piece.keys; };
  std::stable_sort(pieces.begin(), pieces.end(),
                   [&](const AttentionPiece &a, const AttentionPiece &b) { return work(a) > work(b); });
  return pieces;
}

constexpr std::align_val_t kAligned{64};
struct Release {
  void operator()(char *block) const { ::operator delete[](block, kAligned); }
};

int32_t run_pieces(const AttentionCall &call, const AttentionCode &code, bool divide, int32_t threads) try {
  const std::vector<AttentionPiece> pieces = pieces_of(call.about, divide, threads);
  int64_t keys = 0;
  for (const AttentionPiece &piece : pieces) keys = std::max(keys, piece.keys);
  const int64_t members = std::min<int64_t>(threads, static_cast<int64_t>(pieces.size()));
  const size_t bytes = (code.scratch_bytes(call.about.head_dim, keys) + 63) / 64 * 64;
  const std::unique_ptr<char[], Release> scratch(new (kAligned) char[bytes * static_cast<size_t>(members)]);
  std::atomic<size_t> next{0};
  parallel_for(members, 1, threads, [&](int64_t member, int64_t last) {
    for (size_t piece; member < last && (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces.size();) {
      code.run(call, pieces[piece], scratch.get() + bytes * static_cast<size_t>(member));
    }
  });
  return VJEPA_OK;
} catch (const std::bad_alloc &) {
  return VJEPA_ERROR_MEMORY;
}

}  // namespace
}  // namespace vjepa

using vjepa::AttentionCall;

extern "C" int32_t vjepa_attention_instructions(void) { return vjepa::instructions(); }

extern "C" int32_t vjepa_attention_cpu(const vjepa_attention *attention, const vjepa_heads *given, void *out,
                                       float *lse, int32_t threads) {
  if (!attention || !given) return VJEPA_ERROR_NULL_POINTER;
  const AttentionCall call = {*attention, given[0], given[1], given[2], {}, {}, nullptr, {out, nullptr, nullptr}, lse};
  if (const int32_t status = vjepa::check_sizes(*attention, threads)) return status;
  if (const int32_t status = vjepa::check_tensors(call, false)) return status;
  return vjepa::run_pieces(call, vjepa::codes_of(*attention)->forward, true, threads);
}

extern "C" int32_t vjepa_attention_backward_cpu(const vjepa_attention *attention, const vjepa_heads *given,
                                                const float *lse, void *grad_q, void *grad_k, void *grad_v,
                                                int32_t threads) {
  if (!attention || !given) return VJEPA_ERROR_NULL_POINTER;
  const AttentionCall call = {
      *attention, given[0], given[1], given[2], given[3], given[4], lse, {grad_q, grad_k, grad_v}, nullptr};
  if (const int32_t status = vjepa::check_sizes(*attention, threads)) return status;
  if (const int32_t status = vjepa::check_tensors(call, true)) return status;
  return vjepa::run_pieces(call, vjepa::codes_of(*attention)->backward, false, threads);
}
