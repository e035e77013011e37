#include "launch.h"

#include <utility>

#include "driver.h"

namespace farskip {

Launch::Launch(std::uintptr_t function, unsigned threads, unsigned shared_bytes, std::vector<Argument> arguments)
    : function_(reinterpret_cast<void*>(function)),
      threads_(threads),
      shared_bytes_(shared_bytes),
      arguments_(std::move(arguments)) {
  Driver::get();
}

void Launch::operator()(std::uintptr_t stream, const std::array<unsigned, 3>& grid, std::vector<int64_t> values) const {
  // Triton's kernels end with one or two pointers to scratch memory, by its version, which are null where none is used.
  // The driver takes as many parameters as the function has.
  static int64_t no_scratch = 0;
  std::vector<void*> parameters;
  parameters.reserve(values.size() + 2);
  for (int64_t& value : values) parameters.push_back(&value);  // of 32 bits the driver takes the lower half
  parameters.insert(parameters.end(), 2, &no_scratch);
  const Driver& driver = Driver::get();
  driver.check(driver.launch_kernel(function_, grid[0], grid[1], grid[2], threads_, 1, 1, shared_bytes_,
                                    reinterpret_cast<void*>(stream), parameters.data(), nullptr),
               "cuLaunchKernel");
}

}  // namespace farskip
