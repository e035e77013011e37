// The few driver calls that are used here, looked up at run time: neither building nor importing needs CUDA.
#pragma once

#include <cstddef>

namespace farskip {

struct Driver {
  using Result = int;
  Result (*context_get_current)(void**);
  Result (*host_register)(void*, std::size_t, unsigned);
  Result (*host_unregister)(void*);
  Result (*host_get_device_pointer)(unsigned long long*, void*, unsigned);
  Result (*launch_kernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters,
                          void** extra);
  Result (*get_error_string)(Result, const char**);

  // One for the process; throws std::runtime_error where there is no driver.
  static const Driver& get();

  // Throws std::runtime_error with the driver's words unless the call succeeded.
  void check(Result result, const char* call) const;

 private:
  Driver();
};

}  // namespace farskip
