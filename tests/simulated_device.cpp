// A device with memory of its own, whose kernels are those of the CPU: it finds tensors that are not where the model is.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
using namespace at;

static const Device HERE(DeviceType::PrivateUse1, 0);
static const DispatchKeySet KEYS(DispatchKey::PrivateUse1);

struct SimulatedAllocator final : Allocator {
  DataPtr allocate(size_t n) override { void* p = n ? malloc(n) : nullptr; return {p, p, &free, HERE}; }
  DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, std::size_t n) const override { memcpy(to, from, n); }
};
static SimulatedAllocator allocator;
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &allocator);

struct SimulatedGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::PrivateUse1;
  DeviceType type() const override { return static_type; }
  Device exchangeDevice(Device) const override { return HERE; }
  Device getDevice() const override { return HERE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, HERE); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, HERE); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, SimulatedGuard);

struct SimulatedHooks : PrivateUse1HooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static Generator g = at::detail::getDefaultCPUGenerator();
    return g;
  }
};
static SimulatedHooks hooks;
static const bool registered = (RegisterPrivateUse1HooksInterface(&hooks), true);

static Tensor on_cpu(const Tensor& t) { // The same memory
  auto options = TensorOptions().dtype(t.scalar_type());
  auto res = t.numel() ? at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [t](void*) {}, options)
                       : at::empty_strided(t.sizes(), t.strides(), options);
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) res.unsafeGetTensorImpl()->set_wrapped_number(true);
  return res;
}
static bool is_here(const Tensor& t) { return t.defined() && t.device().type() == DeviceType::PrivateUse1; }

// ---- memory and views
static Tensor new_empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>,
                        std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, KEYS, dtype_or_default(dtype), format);
}
static Tensor new_empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                            std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, KEYS, dtype_or_default(dtype));
}
static const Tensor& grow(const Tensor& self, IntArrayRef size, std::optional<MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t need = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (need <= storage->nbytes()) return self;
  auto p = allocator.allocate(need);
  if (storage->nbytes()) memcpy(p.get(), storage->data(), storage->nbytes());
  storage->set_data_ptr_noswap(std::move(p));
  storage->set_nbytes(need);
  return self;
}
static Tensor& set_storage(Tensor& self, Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_and_dtype(source, self.dtype());
  impl->set_storage_offset(offset);
  if (stride.data()) impl->set_sizes_and_strides(size, stride);
  else impl->set_sizes_contiguous(size);
  return self;
}
static Tensor& set_whole_storage(Tensor& self, Storage source) {
  int64_t n = source.nbytes() / self.dtype().itemsize();
  return set_storage(self, source, 0, {n}, {});
}
static Tensor& set_tensor(Tensor& self, const Tensor& t) {
  return set_storage(self, t.storage(), t.storage_offset(), t.sizes(), t.strides());
}
static Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  (to.is_cpu() ? to : on_cpu(to)).copy_(self.is_cpu() ? self : on_cpu(self));
  return to;
}
static Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}
static Scalar local_scalar(const Tensor& t) { return on_cpu(t).item(); }

// ---- everything else: the kernel of the CPU, on the same memory
static void check_devices(const c10::OperatorHandle& op, const torch::jit::Stack* stack) {
  auto n = op.schema().arguments().size();
  bool here = false, cpu = false, first_is_cpu = false, first = true;
  auto look = [&](const Tensor& t) {
    if (!t.defined()) return;
    if (first) first_is_cpu = t.is_cpu();
    first = false;
    here |= is_here(t);
    cpu |= t.is_cpu() && t.dim();      // numbers may be on the CPU
  };
  for (auto& v : torch::jit::last(*stack, n)) {
    if (v.isTensor()) look(v.toTensor());
    else if (v.isTensorList()) for (const auto& t : v.toTensorVector()) look(t);
    else if (v.isOptionalTensorList()) for (const auto& t : v.toOptionalTensorList().vec()) if (t) look(*t);
  }
  auto name = op.schema().name();
  bool takes_indices = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
  bool fine = name == "aten::copy_" || (takes_indices && !first_is_cpu);      // as on a GPU
  TORCH_CHECK(!(here && cpu) || fine, "Expected all tensors to be on the same device, found two in ", name);
}
template <class F> static void replace(const IValue& v, F f) { // The tensors of an argument or a result, and its device
  auto& value = const_cast<IValue&>(v);
  if (v.isTensor()) value = f(v.toTensor());
  else if (v.isTensorList()) {
    c10::List<Tensor> ts;
    for (const auto& t : v.toTensorVector()) ts.push_back(f(t));
    value = ts;
  } else if (v.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> ts;
    for (const auto& t : v.toOptionalTensorList().vec()) ts.push_back(t ? std::optional<Tensor>(f(*t)) : t);
    value = ts;
  } else if (v.isDevice() && v.toDevice().type() == DeviceType::PrivateUse1) value = Device(DeviceType::CPU);
}
static void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_devices(op, stack);
  const auto& schema = op.schema();
  if (schema.overload_name().find("out") != std::string::npos) return native::cpu_fallback(op, stack);
  std::vector<std::pair<TensorImpl*, Tensor>> originals;
  auto there = [&](const Tensor& t) {
    if (!is_here(t)) return t;
    auto res = on_cpu(t);
    originals.emplace_back(res.unsafeGetTensorImpl(), t);
    return res;
  };
  auto back = [&](const Tensor& t) {
    if (!t.defined()) return t;
    for (auto& [impl, original] : originals) if (impl == t.unsafeGetTensorImpl()) return original;
    return t.to(HERE);
  };
  for (auto& v : torch::jit::last(*stack, schema.arguments().size())) replace(v, there);
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  for (auto& v : torch::jit::last(*stack, schema.returns().size())) replace(v, back);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &new_empty);
  m.impl("empty_strided", &new_empty_strided);
  m.impl("resize_", &grow);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("as_strided", &native::as_strided_tensorimpl);
  m.impl("view", &native::view);
  m.impl("view.dtype", &native::view_dtype);
  m.impl("_reshape_alias", &native::_reshape_alias);
  m.impl("unfold", &native::unfold);
  m.impl("alias", &native::alias);
}
