// What the harness plays of TensorRT: dimension expressions, loggers of both ABIs, a loaded
// library.
#ifndef VSSM_TESTS_TENSORRT_HARNESS_STAND_IN_H_
#define VSSM_TESTS_TENSORRT_HARNESS_STAND_IN_H_

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "plugins/kernels/op_table.h"
#include "plugins/tensorrt/host_abi.h"
#include "plugins/tensorrt/trt_abi.h"

namespace vssm::harness {

using trt::IPluginCreatorV3One;

/// A size: a constant, or one that is known only later (here: the number `id`).
class Expression final : public trt::IDimensionExpr, private trt::VDimensionExpr {
 public:
  Expression(bool is_constant, int64_t value) : is_constant_(is_constant), value_(value) {
    mImpl = this;
  }
  int64_t value() const { return value_; }
  bool isConstant() const override { return is_constant_; }
  int64_t getConstantValue() const override { return is_constant_ ? value_ : INT64_MIN; }
  bool isSizeTensor() const override { return false; }

 private:
  bool is_constant_;
  int64_t value_;
};

/// Makes constants; the operators need nothing else.
class Builder final : public trt::IExprBuilder, private trt::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  const trt::IDimensionExpr* dynamic(int64_t id) { return &made_.emplace_back(false, id); }
  const trt::IDimensionExpr* fixed(int64_t value) { return &made_.emplace_back(true, value); }
  bool refuses = false;

 private:
  const trt::IDimensionExpr* constant(int64_t value) override {
    return refuses ? nullptr : fixed(value);
  }
  const trt::IDimensionExpr* operation(trt::DimensionOperation, const trt::IDimensionExpr&,
                                       const trt::IDimensionExpr&) override {
    return nullptr;
  }
  const trt::IDimensionExpr* declareSizeTensor(int32_t, const trt::IDimensionExpr&,
                                               const trt::IDimensionExpr&) override {
    return nullptr;
  }

  std::deque<Expression> made_;
};

/// The harness says that it is this TensorRT (getInferLibVersion), and logs as this one does.
void set_version(int32_t version);
int32_t version();

/// What was logged since the last call, one message a line.
std::string take_log();

/// A plugin library, loaded as TensorRT loads one.
class Library {
 public:
  /// Throws when it cannot be loaded or lacks an entry point.
  explicit Library(const std::string& path);
  const std::vector<IPluginCreatorV3One*>& creators() const { return creators_; }
  IPluginCreatorV3One& creator(const std::string& name) const;

 private:
  std::vector<IPluginCreatorV3One*> creators_;
};

using PluginPointer = std::unique_ptr<trt::IPluginV3>;

/// The three faces of a plugin.
struct Faces {
  explicit Faces(trt::IPluginV3& plugin);
  trt::IPluginV3OneCore& core;
  trt::IPluginV3OneBuild& build;
  trt::IPluginV3OneRuntime& runtime;
};

/// Fields that own what they point to, as the parser or an engine holds them.
class Fields {
 public:
  void add(const std::string& name, int32_t value);
  void add(const std::string& name, float value);
  void add(const std::string& name, trt::PluginFieldType type, int32_t length, const void* data,
           size_t bytes);
  /// A copy of a plugin's, for the next one.
  static Fields copy(const trt::PluginFieldCollection& collection);
  const trt::PluginFieldCollection* collection();

 private:
  struct Owned {
    std::string name;
    std::unique_ptr<char[]> data;  // of exactly the size it has: a sanitizer sees one byte more
    trt::PluginFieldType type;
    int32_t length;
  };
  std::vector<Owned> owned_;
  std::vector<trt::PluginField> fields_;
  trt::PluginFieldCollection collection_;
};

const OperatorSpec& spec_of(const std::string& name);

/// Counts failures and prints each.
void expect(bool holds, const std::string& what);
int failures();

}  // namespace vssm::harness

#endif  // VSSM_TESTS_TENSORRT_HARNESS_STAND_IN_H_
