#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace farskip {
namespace {

template <typename Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(std::string("The CUDA driver has no ") + name + ".");
}

}  // namespace

const Driver& Driver::get() {
  static const Driver driver;
  return driver;
}

void Driver::check(Result result, const char* call) const {
  if (result == 0) return;
  const char* text = nullptr;
  get_error_string(result, &text);
  throw std::runtime_error(std::string(call) + " failed: " + (text != nullptr ? text : std::to_string(result)) + ".");
}

Driver::Driver() {
  void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (library == nullptr) {
    throw std::runtime_error("There is no CUDA driver (libcuda.so.1); install it first.");
  }
  find(library, "cuCtxGetCurrent", context_get_current);
  find(library, "cuMemHostRegister_v2", host_register);
  find(library, "cuMemHostUnregister", host_unregister);
  find(library, "cuMemHostGetDevicePointer_v2", host_get_device_pointer);
  find(library, "cuLaunchKernel", launch_kernel);
  find(library, "cuGetErrorString", get_error_string);
}

}  // namespace farskip
