// Preloaded, so that these symbols come before those of libtorch_cpu: CUDA is the accelerator, and its hooks are those
// that device.cpp has set.
#include <c10/core/DeviceType.h>
#include <dlfcn.h>
#include <optional>

#define EXPORTED __attribute__((visibility("default")))

extern "C" {
EXPORTED void* exo_fake_cuda_hooks = nullptr;
}

namespace at {

struct CUDAHooksInterface;

namespace accelerator {
EXPORTED std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }
}  // namespace accelerator

namespace detail {
EXPORTED const CUDAHooksInterface& getCUDAHooks() {
  if (exo_fake_cuda_hooks) return *static_cast<CUDAHooksInterface*>(exo_fake_cuda_hooks);
  using Function = const CUDAHooksInterface& (*)();
  static Function real = reinterpret_cast<Function>(
      dlsym(dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD), "_ZN2at6detail12getCUDAHooksEv"));
  return real();
}
}  // namespace detail

}  // namespace at
