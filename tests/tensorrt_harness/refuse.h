// Failure paths: everything that a plugin must refuse.
#ifndef VSSM_TESTS_TENSORRT_HARNESS_REFUSE_H_
#define VSSM_TESTS_TENSORRT_HARNESS_REFUSE_H_

#include "tests/tensorrt_harness/stand_in.h"

namespace vssm::harness {

void refuse(const Library& library);

}  // namespace vssm::harness

#endif  // VSSM_TESTS_TENSORRT_HARNESS_REFUSE_H_
