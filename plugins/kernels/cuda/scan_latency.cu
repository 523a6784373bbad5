// Cuts and launches the latency scan.
#include "plugins/kernels/cuda/scan_latency.cuh"
#include "plugins/kernels/cuda/scan_launch.cuh"

namespace vssm {
namespace {

// All of these are chosen by arithmetic, not measured.
constexpr int kMaxDirections = 4;   // at once; more are taken in turn
constexpr int kMaxChunks = 16;      // each thread goes through the ends of those before its own
constexpr int kMinChunk = 8;        // steps: below, putting the chunks together takes longer
constexpr int kThreadsOfSm = 1024;  // that are asked for
constexpr int64_t kPartialBytes = 24 << 10;  // above, partial sums lie in the workspace

struct Sizes {
  int32_t lanes, states;
};
constexpr Sizes kOneState = {1, 1};
constexpr Sizes kGroup = {4, kStateGroup / 4};

constexpr int32_t most_channels(Sizes sizes) { return 32 / sizes.lanes; }

/// Whatever the number of channels of a block: the workspace may not depend on the device.
bool partials_in_shared(int64_t directions, int64_t seqlen, Sizes sizes) {
  const int64_t tokens = directions * seqlen;
  return tokens <= kPartialBytes / int64_t{sizeof(float)} / most_channels(sizes);
}

int64_t blocks_of(const ScanLaunch& scan, int32_t channels) {
  return scan.batch * ((scan.params.d_inner - 1) / channels + 1);
}

/// Fewer channels a block as long as some multiprocessor would be left without a block; two at
/// least, since a row of memory is read in pieces of that width.
int32_t choose_channels(const ScanLaunch& scan, Sizes sizes) {
  int32_t channels = most_channels(sizes);
  while (channels > 2 && (channels / 2 >= scan.params.d_inner ||
                          blocks_of(scan, channels) < scan.limits.sm_count)) {
    channels /= 2;
  }
  return channels;
}

int64_t shared_bytes(const LatencyCut& cut, int64_t partials) {
  return (latency_layout(cut).partials + partials) * int64_t{sizeof(float)};
}

/// The longest tile of `chunks` chunks that fits into `budget`; 0 steps where none does.
void fit_chunk(int32_t seqlen, int64_t budget, int64_t partials, LatencyCut* cut) {
  const auto set = [cut](int32_t chunk) {
    cut->chunk = chunk;
    cut->steps = chunk * cut->chunks;
  };
  const int32_t wanted = (seqlen - 1) / cut->chunks + 1;
  // One chunk of a very long sequence would only make a needlessly long tile.
  constexpr int32_t kLongest = 1024;
  const int32_t whole = ((wanted < kLongest ? wanted : kLongest) - 1) / kLatencySteps + 1;
  set(whole * kLatencySteps);
  while (cut->chunk > 0 && shared_bytes(*cut, partials) > budget) set(cut->chunk - kLatencySteps);
}

/// Chunks that give the card enough threads, in tiles that leave room for the blocks it gets.
LatencyCut plan(const ScanLaunch& scan, Sizes sizes, int64_t directions_of_partials) {
  const ScanParams& p = scan.params;
  LatencyCut cut = {};
  cut.lanes = sizes.lanes;
  cut.states = sizes.states;
  cut.channels = choose_channels(scan, sizes);
  cut.directions = p.directions < kMaxDirections ? p.directions : kMaxDirections;
  const int64_t blocks = blocks_of(scan, cut.channels);
  const int64_t resident = (blocks - 1) / scan.limits.sm_count + 1;  // a multiprocessor
  const int32_t per_chunk = cut.lanes * cut.channels * cut.directions;
  int64_t chunks = kThreadsOfSm / (resident < 64 ? resident : 64) / per_chunk;
  const auto limit = [&chunks](int64_t most) { chunks = chunks < most ? chunks : most; };
  limit(kMaxChunks);
  limit(kLatencyThreads / per_chunk);
  limit(p.seqlen / kMinChunk);
  cut.chunks = chunks < 1 ? 1 : static_cast<int32_t>(chunks);
  const int64_t partials = directions_of_partials * p.seqlen * cut.channels;
  const int64_t shares = resident < 4 ? resident : 4;
  const int64_t budget = scan.limits.shared_bytes / shares;
  fit_chunk(p.seqlen, budget, partials, &cut);
  while (cut.chunk == 0 && cut.chunks > 1) {
    --cut.chunks;
    fit_chunk(p.seqlen, scan.limits.shared_bytes, partials, &cut);
  }
  if (cut.chunk == 0) fit_chunk(p.seqlen, scan.limits.shared_bytes, partials, &cut);
  return cut;
}

template <typename T, int kLanes, int kStates, bool kOneDecay>
Status launch_sizes(ScanLaunch scan) {
  constexpr Sizes kSizes = {kLanes, kStates};
  ScanParams& p = scan.params;
  p.groups = (p.d_state - 1) / (kLanes * kStates) + 1;
  const bool in_shared = partials_in_shared(p.directions, p.seqlen, kSizes);
  const int64_t directions_of_partials = in_shared ? p.directions : 0;
  const LatencyCut cut = plan(scan, kSizes, directions_of_partials);
  if (cut.chunk == 0) {
    return Status::error(scan.name, ": shared memory of ", scan.limits.shared_bytes,
                         " bytes a block is too little for the latency kernel; take the other one");
  }
  p.blocks_per_image = (p.d_inner - 1) / cut.channels + 1;
  p.sums = in_shared ? nullptr : static_cast<float*>(scan.workspace);
  dim3 grid;
  const Status status = count_blocks(scan, p.blocks_per_image, &grid);
  if (!status.ok()) return status;
  const int32_t threads = cut.lanes * cut.channels * cut.directions * cut.chunks;
  const int64_t shared = shared_bytes(cut, directions_of_partials * p.seqlen * cut.channels);
  return launch(
      scan.name, selective_scan_latency<T, kLanes, kStates, kOneDecay>,
      {grid, dim3(static_cast<unsigned>((threads + 31) / 32 * 32)), static_cast<size_t>(shared)},
      scan.stream, p, cut);
}

}  // namespace

int64_t latency_workspace(const SelectiveScanShape& shape) {
  const Sizes sizes = shape.d_state == 1 ? kOneState : kGroup;
  if (partials_in_shared(shape.directions, shape.seqlen, sizes)) return 0;
  const int64_t most = most_channels(sizes);
  const int64_t channels = (shape.d_inner + most - 1) / most * most;
  return shape.batch * shape.directions * shape.seqlen * channels * int64_t{sizeof(float)};
}

Status launch_latency(const ScanLaunch& scan) {
  return with_float_type(scan.name, scan.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (scan.params.one_decay) return launch_sizes<T, kGroup.lanes, kGroup.states, true>(scan);
    return scan.params.d_state == 1
               ? launch_sizes<T, kOneState.lanes, kOneState.states, false>(scan)
               : launch_sizes<T, kGroup.lanes, kGroup.states, false>(scan);
  });
}

}  // namespace vssm
