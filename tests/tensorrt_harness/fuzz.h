// Random fields and damaged serialisations, for a build with sanitizers.
#ifndef VSSM_TESTS_TENSORRT_HARNESS_FUZZ_H_
#define VSSM_TESTS_TENSORRT_HARNESS_FUZZ_H_

#include <cstdint>

#include "tests/tensorrt_harness/stand_in.h"

namespace vssm::harness {

struct FuzzCount {
  int64_t tried = 0, accepted = 0, refused = 0;
};

/// `count` collections, half of them through a serialisation that is cut or has bits flipped. What
/// is accepted must obey every rule, and then lives a little with random shapes.
FuzzCount fuzz(const Library& library, int64_t count, uint64_t seed);

}  // namespace vssm::harness

#endif  // VSSM_TESTS_TENSORRT_HARNESS_FUZZ_H_
