#include "status.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <stdexcept>

#include "driver.h"

namespace farskip {
namespace {

constexpr unsigned kPortable = 1;
constexpr unsigned kDeviceMap = 2;

}  // namespace

StatusBlock::StatusBlock() : bytes_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
  // A page of its own, because the driver registers whole pages; anonymous memory starts as zeros.
  void* page = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) throw std::bad_alloc();
  words_ = static_cast<int64_t*>(page);
}

StatusBlock::~StatusBlock() {
  // Fails when the driver has shut down already, and then has nothing left to undo.
  if (device_address_ != 0) Driver::get().host_unregister(words_);
  munmap(words_, bytes_);
}

void StatusBlock::map_for_device() {
  if (device_address_ != 0) return;
  const Driver& driver = Driver::get();
  void* context = nullptr;
  driver.check(driver.context_get_current(&context), "cuCtxGetCurrent");
  if (context == nullptr) {
    throw std::runtime_error("This thread has no CUDA context to map the status block into; use the device once first.");
  }
  driver.check(driver.host_register(words_, bytes_, kPortable | kDeviceMap), "cuMemHostRegister");
  unsigned long long pointer = 0;
  const Driver::Result result = driver.host_get_device_pointer(&pointer, words_, 0);
  if (result != 0) driver.host_unregister(words_);
  driver.check(result, "cuMemHostGetDevicePointer");
  device_address_ = pointer;
}

std::optional<Status> StatusBlock::read() const {
  Status status;
  status[kCode] = __atomic_load_n(words_ + kCode, __ATOMIC_ACQUIRE);
  if (status[kCode] == 0) return std::nullopt;
  for (int word = kRank; word < kStatusWords; ++word) status[word] = __atomic_load_n(words_ + word, __ATOMIC_RELAXED);
  return status;
}

void StatusBlock::clear() {
  for (int word = kRank; word < kStatusWords; ++word) __atomic_store_n(words_ + word, 0, __ATOMIC_RELAXED);
  __atomic_store_n(words_ + kCode, 0, __ATOMIC_RELEASE);
}

}  // namespace farskip
