#include "plugins/kernels/types.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace vssm {

int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kOther:
      break;
  }
  return 0;
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
    case DType::kOther:
      break;
  }
  return "another type";
}

void Status::append(std::string_view text) {
  const size_t count = std::min(text.size(), kCapacity - 1 - size_);
  std::memcpy(text_ + size_, text.data(), count);
  size_ += count;
  text_[size_] = '\0';
}

void Status::append(double number) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", number);
  append(std::string_view(digits));
}

void Status::append(int64_t number) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%lld", static_cast<long long>(number));
  append(std::string_view(digits));
}

}  // namespace vssm
