// A Python module whose import gives the CUDA device of tests/fake_cuda/device.cpp memory, which is the host's, and
// operators, which are the CPU's: a tensor on "cuda" then holds numbers, and everything that asks for its device is told
// CUDA. An operator of CUDA tensors runs on CPU tensors over the same memory. As on a GPU, it is an error to give it a
// CPU tensor besides, unless that is a single number, an index or one side of a copy.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <Python.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

const c10::Device kCuda(c10::DeviceType::CUDA, 0);
const c10::Device kHost(c10::DeviceType::CPU);

// The same bytes on another device; keeps the original alive.
c10::Storage same_bytes(const c10::Storage& storage, c10::Device device) {
  auto* original = new c10::Storage(storage);
  c10::DataPtr data(storage.mutable_data(), original, [](void* held) { delete static_cast<c10::Storage*>(held); }, device);
  return c10::Storage(c10::Storage::use_byte_size_t{}, storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
}

at::Tensor like(const at::Tensor& tensor, c10::Storage storage, c10::DispatchKey key) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return result;
}

// The tensors of one call, on both devices.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : name_(op.schema().name()) {}

  c10::IValue to_host(const c10::IValue& value) {
    if (value.isTensor()) return to_host(value.toTensor());
    if (value.isStorage()) return value.toStorage().device() == kCuda ? c10::IValue(to_host(value.toStorage())) : value;
    if (value.isDevice()) return value.toDevice().is_cuda() ? c10::IValue(kHost) : value;
    if (!value.isList()) return value;
    auto result = c10::impl::GenericList(value.toList().elementType());
    for (const c10::IValue& each : value.toListRef()) result.push_back(to_host(each));
    return result;
  }

  c10::IValue to_cuda(const c10::IValue& value, bool copied_to_host) {
    if (value.isTensor()) return value.toTensor().defined() ? to_cuda(value.toTensor(), copied_to_host) : value;
    if (!value.isList()) return value;
    auto result = c10::impl::GenericList(value.toList().elementType());
    for (const c10::IValue& each : value.toListRef()) result.push_back(to_cuda(each, copied_to_host));
    return result;
  }

  // Gives the originals what an operator changed beside numbers: their memory or sizes (`out=`), or their storage (set_).
  void follow_changes() {
    for (auto& [original, host] : pairs_) {
      const auto* own = storages_.at(original.storage().unsafeGetStorageImpl()).second.unsafeGetStorageImpl();
      if (host.storage().unsafeGetStorageImpl() != own) {
        for (auto& [bytes, both] : storages_)
          if (host.storage().is_alias_of(both.second)) original.unsafeGetTensorImpl()->set_storage_keep_dtype(both.first);
      } else if (host.storage().data() != original.storage().data()) {
        auto fresh = same_bytes(host.storage(), kCuda);
        original.storage().set_data_ptr_noswap(std::move(fresh.mutable_data_ptr()));
        original.storage().set_nbytes(host.storage().nbytes());
      }
      if (host.sizes() != original.sizes() || host.strides() != original.strides() ||
          host.storage_offset() != original.storage_offset()) {
        original.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
      }
    }
  }

  void check_devices() const {
    static const std::vector<std::string> mixed{"aten::copy_", "aten::_copy_from", "aten::index", "aten::_index_put_impl_"};
    TORCH_CHECK(
        pairs_.empty() || !on_host_ || std::find(mixed.begin(), mixed.end(), name_) != mixed.end(),
        "Expected all tensors to be on the same device, but ", name_, " got some on cuda:0 and some on cpu");
  }

 private:
  at::Tensor to_host(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      on_host_ = on_host_ || tensor.dim() > 0;
      return tensor;
    }
    for (auto& [original, host] : pairs_)
      if (original.is_same(tensor)) return host;
    auto host = like(tensor, to_host(tensor.storage()), c10::DispatchKey::CPU);
    pairs_.emplace_back(tensor, host);
    return host;
  }

  c10::Storage to_host(const c10::Storage& storage) {
    auto* bytes = storage.unsafeGetStorageImpl();
    auto found = storages_.find(bytes);
    if (found == storages_.end())
      found = storages_.emplace(bytes, std::make_pair(storage, same_bytes(storage, kHost))).first;
    return found->second.second;
  }

  at::Tensor to_cuda(const at::Tensor& host, bool copied_to_host) {
    for (auto& [original, alias] : pairs_) {
      if (alias.is_same(host)) return original;
      if (alias.storage().is_alias_of(host.storage())) return like(host, original.storage(), c10::DispatchKey::CUDA);
    }
    if (copied_to_host) return host;
    return like(host, same_bytes(host.storage(), kCuda), c10::DispatchKey::CUDA);
  }

  std::string name_;
  bool on_host_ = false;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;
  std::unordered_map<c10::StorageImpl*, std::pair<c10::Storage, c10::Storage>> storages_;  // on CUDA and on the host
};

void on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Call call(op);
  const auto arguments = op.schema().arguments().size();
  const auto begin = stack->size() - arguments;
  for (auto index = begin; index < stack->size(); ++index) (*stack)[index] = call.to_host((*stack)[index]);
  call.check_devices();
  {
    c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    op.callBoxed(stack);
  }
  call.follow_changes();
  // What copy_ returns is what it was given, on the host or not.
  const bool to_anywhere = op.schema().name() == "aten::copy_";
  for (auto index = begin; index < stack->size(); ++index) (*stack)[index] = call.to_cuda((*stack)[index], to_anywhere);
}

// Operators that have a kernel for any device, or one for CUDA that is not built here, before the fallback is asked.
const std::vector<std::pair<const char*, const char*>> kNamed{
    {"aten::copy_", ""},
    {"c10d::allreduce_", ""},
    {"c10d::broadcast_", ""},
    {"c10d::allgather_", ""},
    {"c10d::_allgather_base_", ""},
    {"c10d::allgather_into_tensor_coalesced_", ""},
    {"c10d::reduce_", ""},
    {"c10d::gather_", ""},
    {"c10d::scatter_", ""},
    {"c10d::reduce_scatter_", ""},
    {"c10d::_reduce_scatter_base_", ""},
    {"c10d::reduce_scatter_tensor_coalesced_", ""},
    {"c10d::alltoall_", ""},
    {"c10d::alltoall_base_", ""},
    {"c10d::send", ""},
    {"c10d::recv_", ""},
    {"c10d::barrier", ""},
};

std::vector<c10::RegistrationHandleRAII> registered;

// The kernels of c10d are replaced on purpose.
struct Silent : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

void install() {
  Silent silent;
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  auto& dispatcher = c10::Dispatcher::singleton();
  const auto kernel = [] { return c10::KernelFunction::makeFromBoxedFunction<&on_host>(); };
  registered.push_back(dispatcher.registerFallback(c10::DispatchKey::CUDA, kernel(), "exo_emulated_cuda"));
  for (const auto& [name, overload] : kNamed)
    registered.push_back(dispatcher.registerImpl(
        {name, overload}, c10::DispatchKey::CUDA, kernel(), std::nullopt, nullptr, "exo_emulated_cuda"));
}

}  // namespace

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "exo_emulated_cuda_memory", nullptr, -1, nullptr};

PyMODINIT_FUNC PyInit_exo_emulated_cuda_memory() {
  install();
  return PyModule_Create(&module);
}
