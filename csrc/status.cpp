#include "status.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <stdexcept>
#include <string>

namespace farskip {
namespace {

// The few driver calls that map host memory, looked up at run time: neither building nor importing needs CUDA.
struct Driver {
  using Result = int;
  Result (*context_get_current)(void**);
  Result (*host_register)(void*, std::size_t, unsigned);
  Result (*host_unregister)(void*);
  Result (*host_get_device_pointer)(unsigned long long*, void*, unsigned);
  Result (*get_error_string)(Result, const char**);

  // One for the process; throws std::runtime_error where there is no driver.
  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  void check(Result result, const char* call) const {
    if (result == 0) return;
    const char* text = nullptr;
    get_error_string(result, &text);
    throw std::runtime_error(std::string(call) + " failed: " + (text != nullptr ? text : std::to_string(result)) + ".");
  }

 private:
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) {
      throw std::runtime_error("There is no CUDA driver (libcuda.so.1) to map the status block for; install it first.");
    }
    find(library, "cuCtxGetCurrent", context_get_current);
    find(library, "cuMemHostRegister_v2", host_register);
    find(library, "cuMemHostUnregister", host_unregister);
    find(library, "cuMemHostGetDevicePointer_v2", host_get_device_pointer);
    find(library, "cuGetErrorString", get_error_string);
  }

  template <typename Function>
  static void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) throw std::runtime_error(std::string("The CUDA driver has no ") + name + ".");
  }
};

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
