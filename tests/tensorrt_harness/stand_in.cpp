#include "tests/tensorrt_harness/stand_in.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace vssm::harness {
namespace {

int32_t g_version = 101600;
std::string g_log;
int g_failures = 0;

void remember(trt::Severity severity, const char* text) {
  expect(severity == trt::Severity::kERROR, "messages are errors");
  g_log += text;
  g_log += '\n';
}

struct Logger10 final : trt::Logger10 {
  void log(trt::Severity severity, const char* text) noexcept override { remember(severity, text); }
};
struct Finder10 final : trt::LoggerFinder10 {
  trt::Logger10* findLogger() override { return &logger; }
  Logger10 logger;
};
struct Logger11 final : trt::Logger11 {
  void log(trt::Severity severity, const char* text) noexcept override { remember(severity, text); }
};
struct Finder11 final : trt::LoggerFinder11 {
  trt::Logger11* findLogger() override { return &logger; }
  Logger11 logger;
};

template <typename Function>
Function entry(void* library, const char* name) {
  auto* const found = reinterpret_cast<Function>(dlsym(library, name));
  if (found == nullptr) throw std::runtime_error(std::string("no entry point ") + name);
  return found;
}

template <typename Face>
Face& face(trt::IPluginV3& plugin, trt::PluginCapabilityType type, const char* kind) {
  trt::IPluginCapability* const found = plugin.getCapabilityInterface(type);
  if (found == nullptr) throw std::runtime_error(std::string("no capability ") + kind);
  const trt::InterfaceInfo info = found->getInterfaceInfo();
  expect(std::strcmp(info.kind, kind) == 0 && info.major == 1, std::string(kind) + " is itself");
  return *static_cast<Face*>(found);
}

}  // namespace

void set_version(int32_t version) { g_version = version; }
int32_t version() { return g_version; }

std::string take_log() {
  std::string taken;
  taken.swap(g_log);
  return taken;
}

Library::Library(const std::string& path) {
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  static Finder10 finder10;
  static Finder11 finder11;
  void* const finder = g_version / 10000 == 10 ? static_cast<void*>(&finder10) : &finder11;
  entry<void (*)(void*)>(library, "setLoggerFinder")(finder);
  int32_t count = 0;
  trt::IPluginCreatorInterface* const* const list =
      entry<trt::IPluginCreatorInterface* const* (*)(int32_t&)>(library, "getCreators")(count);
  for (int32_t i = 0; i < count; ++i) {
    creators_.push_back(static_cast<IPluginCreatorV3One*>(list[i]));
  }
}

IPluginCreatorV3One& Library::creator(const std::string& name) const {
  for (IPluginCreatorV3One* const creator : creators_) {
    if (name == creator->getPluginName()) return *creator;
  }
  throw std::runtime_error("no creator of " + name);
}

Faces::Faces(trt::IPluginV3& plugin)
    : core(face<trt::IPluginV3OneCore>(plugin, trt::PluginCapabilityType::kCORE,
                                       "PLUGIN_V3ONE_CORE")),
      build(face<trt::IPluginV3OneBuild>(plugin, trt::PluginCapabilityType::kBUILD,
                                         "PLUGIN_V3ONE_BUILD")),
      runtime(face<trt::IPluginV3OneRuntime>(plugin, trt::PluginCapabilityType::kRUNTIME,
                                             "PLUGIN_V3ONE_RUNTIME")) {}

void Fields::add(const std::string& name, int32_t value) {
  add(name, trt::PluginFieldType::kINT32, 1, &value, sizeof(value));
}

void Fields::add(const std::string& name, float value) {
  add(name, trt::PluginFieldType::kFLOAT32, 1, &value, sizeof(value));
}

void Fields::add(const std::string& name, trt::PluginFieldType type, int32_t length,
                 const void* data, size_t bytes) {
  std::unique_ptr<char[]> copy(data == nullptr ? nullptr : new char[bytes]);
  if (copy != nullptr && bytes > 0) std::memcpy(copy.get(), data, bytes);
  owned_.push_back({name, std::move(copy), type, length});
}

Fields Fields::copy(const trt::PluginFieldCollection& collection) {
  Fields fields;
  for (int32_t i = 0; i < collection.nbFields; ++i) {
    const trt::PluginField& field = collection.fields[i];
    fields.add(field.name, field.type, field.length, field.data, 4);
  }
  return fields;
}

const trt::PluginFieldCollection* Fields::collection() {
  fields_.clear();
  for (const Owned& owned : owned_) {
    trt::PluginField field;
    field.name = owned.name.c_str();
    field.data = owned.data.get();
    field.type = owned.type;
    field.length = owned.length;
    fields_.push_back(field);
  }
  collection_.nbFields = static_cast<int32_t>(fields_.size());
  collection_.fields = fields_.data();
  return &collection_;
}

const OperatorSpec& spec_of(const std::string& name) {
  for (const OperatorSpec& spec : kOperators) {
    if (name == spec.name) return spec;
  }
  throw std::runtime_error("no operator " + name);
}

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++g_failures;
  std::printf("FAILED: %s\n", what.c_str());
}

int failures() { return g_failures; }

}  // namespace vssm::harness

/// As libnvinfer has it: how the plugin tells whose logger it was given.
extern "C" __attribute__((visibility("default"))) int32_t getInferLibVersion() {
  return vssm::harness::version();
}
