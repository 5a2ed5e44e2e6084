// What an optimizer step's groups must satisfy before anything is touched. Host only.
#pragma once

#include <cstdint>

#include "../../capi.h"
#include "adamw.h"
#include "table_check.h"

namespace vjepa {

// Written so that NaN is out of range.
inline bool adamw_in_range(const vjepa_adamw_group &group) {
  const auto beta_in_range = [](double beta) { return beta >= 0.0 && beta < 1.0; };
  return group.lr >= 0.0 && beta_in_range(group.beta1) && beta_in_range(group.beta2) && group.eps >= 0.0 &&
         group.weight_decay >= 0.0 && group.step >= 0;
}

inline int32_t adamw_check_groups(const vjepa_adamw_group *groups, int64_t num_groups,
                                  const vjepa_adamw_scalars &scalars, double momentum) {
  if (num_groups < 0) return VJEPA_ERROR_NEGATIVE_SIZE;
  if (num_groups > 0 && !groups) return VJEPA_ERROR_NULL_POINTER;
  for (int64_t k = 0; k < num_groups; ++k) {
    if (!adamw_in_range(groups[k])) return VJEPA_ERROR_GROUP;
  }
  return scalars.momentum ? VJEPA_OK : check_momentum(momentum);
}

}  // namespace vjepa
