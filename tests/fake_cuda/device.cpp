// A Python module whose import gives a torch without CUDA a CUDA device that does nothing: the device guard and the
// hooks that indexing and autograd ask of tensors on "cuda".
#include <ATen/detail/CUDAHooksInterface.h>
#include <Python.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::DeviceType::CUDA, 0));
  }
};

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
};

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

extern "C" void* exo_fake_cuda_hooks;

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "exo_fake_cuda_device", nullptr, -1, nullptr};

PyMODINIT_FUNC PyInit_exo_fake_cuda_device() {
  exo_fake_cuda_hooks = static_cast<at::CUDAHooksInterface*>(new Hooks(at::CUDAHooksArgs()));
  return PyModule_Create(&module);
}
