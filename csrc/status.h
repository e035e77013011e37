// Where a kernel reports an expired wait: a page of host memory that device code can store to.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace farskip {

// Word layout, 64-bit each. The writer fills the others and stores the code last, with release semantics where the
// memory allows it; zero says that nothing has happened.
enum StatusWord { kCode, kRank, kPeer, kPhase, kEpoch, kExpected, kSeen, kStatusWords };

using Status = std::array<int64_t, kStatusWords>;

class StatusBlock {
 public:
  StatusBlock();
  ~StatusBlock();
  StatusBlock(const StatusBlock&) = delete;
  StatusBlock& operator=(const StatusBlock&) = delete;

  // What kernels store to: the device's address once mapped, the host's before.
  std::uintptr_t address() const { return device_address_ != 0 ? device_address_ : host_address(); }
  std::uintptr_t host_address() const { return reinterpret_cast<std::uintptr_t>(words_); }

  // Makes the page visible to the GPUs of the current CUDA context. Throws std::runtime_error without a driver or a
  // context. A second call does nothing.
  void map_for_device();

  // The report, or nothing while the code is zero.
  std::optional<Status> read() const;

  // Forgets the report, so that the next one is seen. No kernel may be writing.
  void clear();

 private:
  int64_t* words_;
  std::size_t bytes_;
  std::uintptr_t device_address_ = 0;
};

}  // namespace farskip
