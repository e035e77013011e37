// Launches of a compiled kernel that look at nothing but its arguments' values.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace farskip {

// How an argument reaches the kernel; kLeftOut is one that the compiler has put into the code.
enum class Argument { kPointer, kInt32, kInt64, kLeftOut };

class Launch {
 public:
  // function: CUfunction. threads: of a block. shared_bytes: dynamic shared memory of a block, which the function must
  // have been allowed. arguments: in order. Throws std::runtime_error where there is no driver.
  Launch(std::uintptr_t function, unsigned threads, unsigned shared_bytes, std::vector<Argument> arguments);

  const std::vector<Argument>& arguments() const { return arguments_; }

  // values: of the arguments that are not left out, in order. stream: CUstream. Throws std::runtime_error with the
  // driver's words.
  void operator()(std::uintptr_t stream, const std::array<unsigned, 3>& grid, std::vector<int64_t> values) const;

 private:
  void* function_;
  unsigned threads_;
  unsigned shared_bytes_;
  std::vector<Argument> arguments_;
};

}  // namespace farskip
