// Failure paths: everything that a plugin must refuse.
#ifndef VSSM_TESTS_TENSORRT_REFUSE_H_
#define VSSM_TESTS_TENSORRT_REFUSE_H_

#include "tests/tensorrt/stand_in.h"

namespace vssm::harness {

void refuse(const Library& library);

}  // namespace vssm::harness

#endif  // VSSM_TESTS_TENSORRT_REFUSE_H_
