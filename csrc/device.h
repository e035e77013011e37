// The part that needs nvcc.
#pragma once

#include <cstdint>

namespace farskip {

// Launches `blocks` thread blocks of one warp on a CUDA stream that stay resident for `microseconds`; with `exclusive`
// each asks for as much shared memory as a block can have, so that it has a multiprocessor almost to itself.
// Throws std::runtime_error with CUDA's words if the launch fails.
void hold(std::uintptr_t stream, int64_t blocks, int64_t microseconds, bool exclusive);

}  // namespace farskip
