// Whether AMX is there, and the system's leave to use it.
#include "amx.h"

#if defined(VJEPA_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vjepa {
namespace {

#if defined(VJEPA_HAS_AMX)
constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of arch_prctl
constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;

bool detect() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBfloat16) || !(d & kTiles)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;  // it fails where the system does not keep tiles
}
#else
bool detect() { return false; }
#endif

}  // namespace

bool amx_allowed() {
  static const bool found = detect();
  return found;
}

}  // namespace vjepa
