// The library's exports: RegisterCustomOps for ONNX Runtime, and what
// exporter/vssm/runtimes/library.py asks. Every operator of the table is registered with every
// binding of its types, because a registered name hides the fallback body: a missing type would be
// an error, not a slower run. In builds with CUDA they are registered a second time, for the CUDA
// provider; an ONNX Runtime that has none ignores those.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>

#include "plugins/kernels/cpu/dispatch.h"
#include "plugins/kernels/op_table.h"
#include "plugins/onnxruntime/custom_op.h"
#include "plugins/onnxruntime/ort_host.h"

#define VSSM_EXPORT extern "C" __attribute__((visibility("default")))

namespace vssm::ort {
namespace {

const BoundOp& bound(const CustomOp* op) { return *static_cast<const BoundOp*>(op); }

ElementType operand_type(const CustomOp* op, const OperandSpec& operand) {
  return element_type(resolve(operand.type, *bound(op).binding));
}

/// Never called: ONNX Runtime 1.17 and later use the V2 members.
void* create_kernel_v1(const CustomOp*, const Api*, const KernelInfo*) { return nullptr; }
void compute_v1(void*, KernelContext*) {}

BoundOp make_op(const OperatorSpec& spec, const TypeBinding& binding, Provider provider,
                uint32_t version) {
  const Implementation implementation = implementation_of(spec);
  BoundOp op = {};
  op.spec = &spec;
  op.binding = &binding;
  op.provider = provider;
  op.version = version;
  op.CreateKernel = create_kernel_v1;
  op.GetName = [](const CustomOp* self) { return bound(self).spec->name; };
  op.GetExecutionProviderType = [](const CustomOp* self) {
    return bound(self).provider == Provider::kCuda ? "CUDAExecutionProvider"
                                                   : "CPUExecutionProvider";
  };
  op.GetInputType = [](const CustomOp* self, size_t i) {
    return operand_type(self, bound(self).spec->inputs[i]);
  };
  op.GetInputTypeCount = [](const CustomOp* self) {
    return static_cast<size_t>(bound(self).spec->input_count);
  };
  op.GetOutputType = [](const CustomOp* self, size_t i) {
    return operand_type(self, bound(self).spec->outputs[i]);
  };
  op.GetOutputTypeCount = [](const CustomOp* self) {
    return static_cast<size_t>(bound(self).spec->output_count);
  };
  op.KernelCompute = compute_v1;
  op.KernelDestroy = implementation.destroy;
  op.GetInputCharacteristic = [](const CustomOp*, size_t) { return kRequired; };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t) { return kRequired; };
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return kDefaultMemory; };
  op.GetVariadicInputMinArity = [](const CustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const CustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
  op.CreateKernelV2 = implementation.create;
  op.KernelComputeV2 =
      provider == Provider::kCuda ? implementation.compute_cuda : implementation.compute;
  op.InferOutputShapeFn = implementation.infer;
  op.GetStartVersion = [](const CustomOp*) { return 1; };
  op.GetEndVersion = [](const CustomOp*) { return 1; };
  op.GetMayInplace = implementation.may_inplace;
  op.ReleaseMayInplace = [](int*, int*) {};  // what GetMayInplace gives is never freed
  return op;
}

constexpr bool kBuiltWithCuda =
#ifdef VSSM_CUDA
    true;
#else
    false;
#endif

/// ONNX Runtime keeps pointers to the operators: they live as long as the library.
struct Operators {
  BoundOp ops[2 * kOperators.size() * kMaxBindings];
  size_t count = 0;

  explicit Operators(bool lends) {
    const uint32_t version = lends ? kLendingApiVersion : kApiVersion;
    add(Provider::kCpu, version);
    if (kBuiltWithCuda && lends) add(Provider::kCuda, version);
  }

  void add(Provider provider, uint32_t version) {
    for (const OperatorSpec& spec : kOperators) {
      for (int b = 0; b < spec.binding_count; ++b) {
        ops[count++] = make_op(spec, spec.bindings[static_cast<size_t>(b)], provider, version);
      }
    }
  }
};

/// The slots that every error needs, tried before anything relies on them.
bool self_test(const Api& table) {
  constexpr char kText[] = "vssm self-test";
  ort::Status* status = table.CreateStatus(kInvalidArgument, kText);
  if (status == nullptr) return false;
  const bool same = table.GetErrorCode(status) == kInvalidArgument &&
                    std::strcmp(table.GetErrorMessage(status), kText) == 0;
  table.ReleaseStatus(status);
  return same;
}

/// Domains must outlive the sessions that use them, and nobody tells us when those end. One domain
/// serves them all, so nothing accumulates.
ort::Status* shared_domain(const Api& table, bool lends, OpDomain** domain) {
  static std::mutex mutex;
  static OpDomain* made = nullptr;
  static const Operators operators(lends);
  const std::lock_guard<std::mutex> lock(mutex);
  if (made == nullptr) {
    OpDomain* fresh = nullptr;
    ort::Status* status = table.CreateCustomOpDomain(kDomain, &fresh);
    for (size_t i = 0; i < operators.count && status == nullptr; ++i) {
      status = table.CustomOpDomain_Add(fresh, &operators.ops[i]);
    }
    if (status != nullptr) {
      if (fresh != nullptr) table.ReleaseCustomOpDomain(fresh);
      return status;
    }
    made = fresh;
  }
  *domain = made;
  return nullptr;
}

ort::Status* register_all(SessionOptions* options, const ApiBase* base) {
  const Api* table = base->GetApi(kApiVersion);
  if (table == nullptr) {
    // Every ONNX Runtime has the first version's table, which suffices to say so.
    const Api* first = base->GetApi(1);
    return first == nullptr ? nullptr
                            : first->CreateStatus(kFail, "vssm: needs ONNX Runtime 1.17 or newer");
  }
  if (!self_test(*table)) return table->CreateStatus(kFail, "vssm: unexpected ONNX Runtime ABI");
  set_api(table);
  vssm::Status status;
  const CpuKernels* kernels = nullptr;
  status = select_cpu_kernels(&kernels);
  if (!status.ok()) return to_ort(status);
  OpDomain* domain = nullptr;
  const bool lends = base->GetApi(kLendingApiVersion) != nullptr;
  ort::Status* failure = shared_domain(*table, lends, &domain);
  return failure != nullptr ? failure : table->AddCustomOpDomain(options, domain);
}

}  // namespace
}  // namespace vssm::ort

/// ONNX Runtime's entry point: SessionOptions.register_custom_ops_library().
VSSM_EXPORT vssm::ort::Status* RegisterCustomOps(vssm::ort::SessionOptions* options,
                                                 const vssm::ort::ApiBase* base) {
  return vssm::ort::register_all(options, base);
}

/// The text of vssm.ops.spec.describe_table(), from the C++ side.
VSSM_EXPORT const char* vssm_operator_table() {
  static const std::string text = vssm::describe_table();
  return text.c_str();
}

VSSM_EXPORT const char* vssm_version() { return VSSM_VERSION; }

/// Runs of our operators in this process: shows that a session runs kernels and not bodies.
VSSM_EXPORT uint64_t vssm_kernel_calls() {
  return vssm::ort::kernel_calls(vssm::ort::Provider::kCpu);
}

/// The same of the CUDA provider.
VSSM_EXPORT uint64_t vssm_cuda_kernel_calls() {
  return vssm::ort::kernel_calls(vssm::ort::Provider::kCuda);
}

/// The GPUs that the CUDA kernels were compiled for, as CMake names them ("80-real,90"); "" in a
/// build without them.
VSSM_EXPORT const char* vssm_cuda_architectures() { return VSSM_CUDA_ARCHITECTURES; }

/// "avx512", "avx2" or "baseline"; or "error: ..." when VSSM_CPU_ISA asks for what is not there.
VSSM_EXPORT const char* vssm_cpu_isa() {
  static thread_local char text[512];
  const vssm::CpuKernels* kernels = nullptr;
  const vssm::Status status = vssm::select_cpu_kernels(&kernels);
  if (status.ok()) return kernels->name;
  std::snprintf(text, sizeof(text), "error: %s", status.message());
  return text;
}
