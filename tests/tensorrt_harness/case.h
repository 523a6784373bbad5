// One node with its tensors: from a file that a test wrote, or a small one of our own.
#ifndef VSSM_TESTS_TENSORRT_HARNESS_CASE_H_
#define VSSM_TESTS_TENSORRT_HARNESS_CASE_H_

#include <map>
#include <string>
#include <vector>

#include "tests/tensorrt_harness/stand_in.h"

namespace vssm::harness {

struct Tensor {
  std::string name;
  DType dtype = DType::kOther;
  std::vector<int64_t> dims;
  std::vector<char> bytes;
  std::string file;  // outputs: where to write

  int64_t size() const;  // bytes
};

struct Case {
  const OperatorSpec* spec = nullptr;
  std::map<std::string, double> attributes;
  std::vector<Tensor> inputs, outputs;

  Fields fields() const;
};

/// Lines "op NAME", "attribute NAME VALUE", "input|output NAME TYPE RANK DIMS... FILE"; files
/// beside it.
Case read_case(const std::string& path);
/// Writes the outputs' files, each with ".<tactic>" behind its name.
void write_outputs(const Case& given, int32_t tactic);

/// Small sizes, and numbers that a kernel may be given: a dense scan, distinct positions.
Case small_case(const OperatorSpec& spec, const TypeBinding& binding, int64_t batch = 2,
                int64_t seqlen = 5);

}  // namespace vssm::harness

#endif  // VSSM_TESTS_TENSORRT_HARNESS_CASE_H_
