#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "device.h"

namespace farskip {
namespace {

__device__ unsigned long long nanoseconds() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

__global__ void hold_kernel(unsigned long long duration) {
  const unsigned long long start = nanoseconds();
  while (nanoseconds() - start < duration) __nanosleep(200);
}

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorString(error) + ".");
}

int most_shared_memory() {
  int device = 0;
  int bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  check(cudaFuncSetAttribute(hold_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  return bytes;
}

}  // namespace

void hold(std::uintptr_t stream, int64_t blocks, int64_t microseconds, bool exclusive) {
  const int shared_memory = exclusive ? most_shared_memory() : 0;
  hold_kernel<<<static_cast<unsigned>(blocks), 32, shared_memory, reinterpret_cast<cudaStream_t>(stream)>>>(
      static_cast<unsigned long long>(microseconds) * 1000);
  check(cudaGetLastError(), "Launching the hold kernel");
}

}  // namespace farskip
