// Routing layout on the CPU: how many entries each expert gets, and in which order they are worked on.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace farskip {

// experts: [entries] expert id of each flat (token, k) entry, -1 where the entry is not routed.
// counts: [num_experts] out, entries of each expert.
// order: [entries] out, indices of the routed entries sorted by expert, in their own order within one; entries beyond
//   the returned number are left as they are.
// Returns the number of routed entries. Throws std::invalid_argument for an id outside -1 .. num_experts - 1.
template <typename Id>
int64_t routing_layout(const Id* experts, int64_t entries, int64_t num_experts, int64_t* counts, int64_t* order) {
  for (int64_t expert = 0; expert < num_experts; ++expert) counts[expert] = 0;
  for (int64_t entry = 0; entry < entries; ++entry) {
    const int64_t expert = experts[entry];
    if (expert < -1 || expert >= num_experts) {
      throw std::invalid_argument("Entry " + std::to_string(entry) + " has expert id " + std::to_string(expert) +
                                  "; ids must be from 0 to " + std::to_string(num_experts - 1) +
                                  ", or -1 for not routed.");
    }
    if (expert >= 0) ++counts[expert];
  }
  // A counting sort. While it runs, counts[e] is where the next entry of e goes, so that no scratch memory is needed;
  // afterwards it is where e ends, and differences of ends are the counts again.
  int64_t begin = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int64_t count = counts[expert];
    counts[expert] = begin;
    begin += count;
  }
  for (int64_t entry = 0; entry < entries; ++entry) {
    if (experts[entry] >= 0) order[counts[experts[entry]]++] = entry;
  }
  for (int64_t expert = num_experts - 1; expert > 0; --expert) counts[expert] -= counts[expert - 1];
  return begin;
}

}  // namespace farskip
