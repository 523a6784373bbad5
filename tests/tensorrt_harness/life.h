// The whole life of a plugin, as TensorRT leads it.
#ifndef VSSM_TESTS_TENSORRT_HARNESS_LIFE_H_
#define VSSM_TESTS_TENSORRT_HARNESS_LIFE_H_

#include <functional>
#include <vector>

#include "tests/tensorrt_harness/case.h"
#include "tests/tensorrt_harness/memory.h"
#include "tests/tensorrt_harness/stand_in.h"

namespace vssm::harness {

struct Life {
  Device* device = nullptr;
  bool graph = false;
  bool can_run = true;  // false: no device here, so that enqueue must say so and return an error
  bool marks = false;   // the launchers are those of launch_stub.cpp
  std::function<void(const Case&, int32_t tactic)> done = {};  // after each run
};

/// Builds, configures, serialises, reads back, attaches and runs a case with every tactic; the
/// outputs are left in the case. Steps that go wrong are reported by `expect`.
void live(const Library& library, const Life& life, Case* given);

/// Creates a plugin; null where it is refused.
PluginPointer create(const Library& library, const Case& given, trt::TensorRTPhase phase);

/// What stands for an axis whose size changes from call to call, by its name in the table; 0 where
/// it does not.
int64_t id_of(std::string_view axis);

/// Descriptions of a case's tensors, inputs first: with the batch and the sequence unknown, up to
/// twice the case's; and as they are at run time.
std::vector<trt::DynamicPluginTensorDesc> profile_of(const Case& given);
std::vector<trt::PluginTensorDesc> descriptions_of(const Case& given);

/// Element types of the inputs.
std::vector<trt::DataType> input_types_of(const Case& given);

/// Sizes of the inputs, as constants or with the batch and the sequence unknown.
std::vector<trt::DimsExprs> expressions_of(const Case& given, bool dynamic, Builder* builder);

/// Every combination of types and formats that a plugin takes, by asking place after place as
/// TensorRT does.
std::vector<std::vector<trt::DataType>> accepted_types(trt::IPluginV3OneBuild& build,
                                                       const Case& given);

}  // namespace vssm::harness

#endif  // VSSM_TESTS_TENSORRT_HARNESS_LIFE_H_
