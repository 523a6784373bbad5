// Calls the operators with random arguments through the C ABI and compares with float64:
//
//   vssm_fuzz SEED CALLS [SECONDS]
//
// Sizes, shared axes, types, attributes, threads, values (NaN, infinities and subnormal numbers
// among them) and breaches of the contract are drawn from the seed and the number of the call, so
// that the call that a failure names can be repeated by itself: vssm_fuzz SEED --only CALL. Every
// tensor is a heap block of its own size, for a sanitizer, with guards behind it for a build
// without one. With SECONDS it ends after them, if CALLS have not been made by then.
//
// With VSSM_COVERAGE libFuzzer makes the calls: its bytes are the choices that are drawn first.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "plugins/c/vssm.h"
#include "plugins/c/vssm_training.h"

namespace {

constexpr size_t kGuard = 64;
constexpr unsigned char kPoison = 0xFF;  // NaN in every float type

int64_t current_call = 0;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "fuzz: call %lld: %s\n", static_cast<long long>(current_call), what.c_str());
#ifdef VSSM_COVERAGE
  std::abort();  // so that libFuzzer keeps the bytes
#else
  std::exit(1);
#endif
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  /// Small choices are the bytes, in turn, as long as there are any.
  Random(const uint8_t* choices, size_t count) : state_(1), choices_(choices), left_(count) {}
  uint64_t next() {  // splitmix64
    uint64_t z = (state_ += 0x9E3779B97F4A7C15U);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t count) {
    if (left_ > 0 && count <= 256) {
      --left_;
      return *choices_++ % count;
    }
    return static_cast<int64_t>(next() % static_cast<uint64_t>(count));
  }
  /// A generator for many values, which no byte decides one by one.
  Random many() { return Random(next()); }
  bool one_in(int64_t count) { return below(count) == 0; }
  float uniform(float low, float high) {
    return low + (high - low) * static_cast<float>(next() >> 40) * 0x1p-24F;
  }
  template <size_t kCount>
  int64_t of(const int64_t (&choices)[kCount]) {
    return choices[below(kCount)];
  }

 private:
  uint64_t state_;
  const uint8_t* choices_ = nullptr;
  size_t left_ = 0;
};

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

double half_to_double(uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const double mantissa = half & 0x3FF;
  double x = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
  if (exponent == 31) x = mantissa == 0 ? HUGE_VAL : std::nan("");
  return (half & 0x8000) != 0 ? -x : x;
}

/// A tensor in memory of its own, between guards of which the rear one ends the block.
struct Tensor {
  Tensor(int32_t dtype, std::vector<int64_t> dims) : dtype(dtype), dims(std::move(dims)) {
    bytes = static_cast<size_t>(count()) * width();
    memory.reset(new unsigned char[kGuard + bytes + kGuard]);
    std::memset(memory.get(), kPoison, kGuard + bytes + kGuard);
  }

  size_t width() const { return dtype == VSSM_FLOAT16 || dtype == VSSM_BFLOAT16 ? 2 : 4; }
  int64_t count() const {
    int64_t product = 1;
    for (const int64_t dim : dims) product *= dim;
    return product;
  }
  unsigned char* data() const { return memory.get() + kGuard; }

  vssm_tensor describe() const {
    vssm_tensor tensor = {data(), dtype, static_cast<int32_t>(dims.size()), {}};
    std::copy(dims.begin(), dims.end(), tensor.dims);
    return tensor;
  }

  double at(int64_t i) const {
    if (dtype == VSSM_FLOAT16) return half_to_double(reinterpret_cast<uint16_t*>(data())[i]);
    if (dtype == VSSM_BFLOAT16) {
      return from_bits(uint32_t{reinterpret_cast<uint16_t*>(data())[i]} << 16);
    }
    return reinterpret_cast<float*>(data())[i];
  }

  /// Half types take the upper bits of a float that is exact in them.
  void set(int64_t i, float x) {
    if (dtype == VSSM_FLOAT32) {
      reinterpret_cast<float*>(data())[i] = x;
    } else if (dtype == VSSM_BFLOAT16) {
      reinterpret_cast<uint16_t*>(data())[i] = static_cast<uint16_t>(to_bits(x) >> 16);
    } else {
      const uint32_t bits = to_bits(x), exponent = (bits >> 23) & 255U;
      const uint32_t half = exponent < 113   ? 0
                            : exponent > 142 ? 0x7C00U
                                             : ((exponent - 112) << 10) | ((bits >> 13) & 0x3FFU);
      const uint32_t nan = std::isnan(x) ? 0x7E00U : half;
      reinterpret_cast<uint16_t*>(data())[i] =
          static_cast<uint16_t>(((bits >> 16) & 0x8000U) | nan);
    }
  }

  void copy(int64_t from, int64_t to) {
    std::memcpy(data() + static_cast<size_t>(to) * width(),
                data() + static_cast<size_t>(from) * width(), width());
  }

  int32_t* ints() const { return reinterpret_cast<int32_t*>(data()); }

  bool poisoned(size_t first, size_t size) const {
    const unsigned char* from = memory.get() + first;
    return std::all_of(from, from + size, [](unsigned char byte) { return byte == kPoison; });
  }
  void check(const char* name) const {
    if (poisoned(0, kGuard) && poisoned(kGuard + bytes, kGuard)) return;
    fail(std::string(name) + " was written outside its memory");
  }
  bool untouched() const { return poisoned(0, bytes + 2 * kGuard); }

  int32_t dtype;
  std::vector<int64_t> dims;
  size_t bytes;
  std::unique_ptr<unsigned char[]> memory;
};

void fill(Random& random, Tensor& tensor, float low, float high, bool special) {
  constexpr float kSpecial[] = {NAN, INFINITY, -INFINITY, -0.0F, 1e-42F, 3e38F, -3e38F, -90.0F};
  Random values = random.many();
  for (int64_t i = 0; i < tensor.count(); ++i) {
    const bool odd = special && values.one_in(8);
    tensor.set(i, odd ? kSpecial[values.below(8)] : values.uniform(low, high));
  }
}

/// A scan with all that was drawn for it.
struct Scan {
  enum Kind { kPlain, kGated, kConstant };
  static constexpr const char* kNames[] = {"SelectiveScan", "GatedSelectiveScan",
                                           "SelectiveScanConstantGap"};
  Kind kind;
  int64_t batch, seqlen, K, d_inner, d_state, decays;
  int32_t dtype;
  bool special;
  vssm_scan_attributes attributes;
  std::vector<Tensor> inputs;

  explicit Scan(Random& random, int32_t type)
      : kind(static_cast<Kind>(random.below(3))),
        batch(random.below(4)),
        seqlen(random.of({1, 2, 3, 7, 15, 16, 17, 33, 65})),
        K(1 + random.below(5)),
        d_inner(random.of({1, 2, 5, 15, 16, 17, 31, 33, 48, 70})),
        d_state(random.of({1, 1, 2, 3, 8, 16, 16, 17, 64})),
        decays(random.one_in(4) ? 1 : d_state),
        dtype(type),
        special(random.one_in(6)) {
    attributes = {random.below(4) != 0, random.below(2), random.one_in(2) ? 1.0F : 0.5F, 0,
                  static_cast<int16_t>(1 + random.below(2))};
    const bool together = random.one_in(4);
    if (together) attributes.params_by_step = 1;
    const auto axis = [&](bool shared) { return shared || random.one_in(3) ? int64_t{1} : K; };
    const int64_t Kd = axis(together), Ka = axis(together);
    add(random, dtype, shape_of(axis(false), d_inner), -1, 1);
    add(random, dtype, shape_of(Kd, d_inner), -3, attributes.delta_softplus ? 3 : -2);
    add(random, VSSM_FLOAT32, {Ka, d_inner, decays}, -8, -0.01F);
    add(random, dtype, shape_of(axis(false), d_state), -1, 1);
    add(random, dtype, shape_of(axis(together), d_state), -1, 1);
    add(random, VSSM_FLOAT32, {axis(false), d_inner}, -1, 1);
    add(random, VSSM_FLOAT32, {Kd, d_inner}, 3, 4);
    tables(random);
    if (kind == kGated) add(random, dtype, {batch, seqlen, d_inner}, -4, 4);
    if (kind == kConstant) add(random, VSSM_FLOAT32, {Kd, d_inner}, 0.01F, 1);
    if (decays == 1 && random.one_in(2)) make_head();
  }

  /// The shape of an operand with directions and tokens, in the order that the attribute says.
  std::vector<int64_t> shape_of(int64_t directions, int64_t width) const {
    if (attributes.direction_axis == 1) return {batch, directions, seqlen, width};
    return {batch, seqlen, directions, width};
  }

  /// One step size and one A for all channels.
  void make_head() {
    for (const size_t input : {1, 2, 6, 9}) {
      if (input >= inputs.size() || (input == 9 && kind != kConstant)) continue;
      Tensor& tensor = inputs[input];
      for (int64_t i = 0; i < tensor.count(); ++i) tensor.copy(i / d_inner * d_inner, i);
    }
  }

  void add(Random& random, int32_t type, std::vector<int64_t> dims, float low, float high) {
    inputs.emplace_back(type, std::move(dims));
    fill(random, inputs.back(), low, high, special);
  }

  void tables(Random& random) {
    inputs.emplace_back(VSSM_INT32, std::vector<int64_t>{random.one_in(2) ? 1 : batch, K, seqlen});
    inputs.emplace_back(VSSM_INT32, std::vector<int64_t>{random.one_in(2) ? 1 : batch, K, seqlen});
    int32_t *order = inputs[7].ints(), *gap = inputs[8].ints();
    Random values = random.many();
    for (int64_t row = 0; row < inputs[7].dims[0] * K; ++row) {
      for (int64_t t = 0; t < seqlen; ++t) {
        const int64_t other = values.below(t + 1);
        order[row * seqlen + t] = order[row * seqlen + other];
        order[row * seqlen + other] = static_cast<int32_t>(t);
      }
    }
    for (int64_t i = 0; i < inputs[8].count(); ++i) {
      gap[i] = static_cast<int32_t>(i % seqlen == 0 ? values.below(5) : 1 + values.below(4));
    }
  }

  std::vector<vssm_tensor> described() const {
    std::vector<vssm_tensor> all;
    for (const Tensor& input : inputs) all.push_back(input.describe());
    return all;
  }

  double value(int input, int64_t row, int64_t k, int64_t column) const {
    const auto& dims = inputs[input].dims;
    if (dims.size() == 4 && attributes.direction_axis == 1) {
      const int64_t image = row / seqlen, direction = dims[1] == 1 ? 0 : k;
      return inputs[input].at(((image * dims[1] + direction) * seqlen + row % seqlen) * dims[3] +
                              column);
    }
    const int64_t axis = dims[dims.size() - 2], width = dims.back();
    return inputs[input].at((row * axis + (axis == 1 ? 0 : k)) * width + column);
  }

  /// One channel of one image in float64: y, and the sums of magnitudes in `terms`.
  void expect(int64_t image, int64_t c, std::vector<double>* y, std::vector<double>* terms) const;
};

void Scan::expect(int64_t image, int64_t c, std::vector<double>* y,
                  std::vector<double>* terms) const {
  y->assign(static_cast<size_t>(seqlen), 0.0);
  terms->assign(static_cast<size_t>(seqlen), 0.0);
  const Tensor& A = inputs[2];
  for (int64_t k = 0; k < K; ++k) {
    std::vector<double> h(static_cast<size_t>(d_state), 0.0), size(h);
    const int64_t row = k * seqlen;
    const int32_t* order = inputs[7].ints() + (inputs[7].dims[0] > 1 ? image * K * seqlen : 0);
    const int32_t* gap = inputs[8].ints() + (inputs[8].dims[0] > 1 ? image * K * seqlen : 0);
    for (int64_t t = 0; t < seqlen; ++t) {
      const int64_t q = order[row + t], s = attributes.params_by_step != 0 ? t : q;
      const int64_t token = image * seqlen + q, owner = image * seqlen + s;
      const double u = value(0, token, k, c);
      double dt = value(1, owner, k, c) + value(6, 0, k, c);
      if (attributes.delta_softplus != 0)
        dt = std::fmax(dt, 0) + std::log1p(std::exp(-std::fabs(dt)));
      const double places = t == 0 ? 1 : gap[row + t];
      const double span = kind == kConstant ? dt + (places - 1) * value(9, 0, k, c) : places * dt;
      const double skip = value(5, 0, k, c) * u;
      double sum = skip, more = std::fabs(skip);
      for (int64_t n = 0; n < d_state; ++n) {
        const int64_t ka = A.dims[0] == 1 ? 0 : k;
        const double argument = span * A.at((ka * d_inner + c) * decays + (decays == 1 ? 0 : n));
        const double decay = std::exp(argument), b = value(3, owner, k, n),
                     d = value(4, owner, k, n);
        auto& state = h[static_cast<size_t>(n)];
        auto& bound = size[static_cast<size_t>(n)];
        state = decay * state + dt * u * b;
        bound = decay * bound * (1 + std::fabs(argument) / 2) + std::fabs(dt * u * b);
        sum += d * state;
        more += std::fabs(d) * bound;
      }
      (*y)[static_cast<size_t>(q)] += attributes.scale * sum;
      (*terms)[static_cast<size_t>(q)] += attributes.scale * more;
    }
  }
  if (kind != kGated) return;
  for (int64_t q = 0; q < seqlen; ++q) {
    const double z = inputs[9].at((image * seqlen + q) * d_inner + c);
    const double gate = z / (1 + std::exp(-z));
    (*y)[static_cast<size_t>(q)] *= gate;
    (*terms)[static_cast<size_t>(q)] *= std::fabs(gate);
  }
}

/// One image and channel of a result, against float64.
void compare(Random& random, const Scan& scan, const Tensor& y) {
  if (scan.special || scan.batch == 0) return;
  const int64_t image = random.below(scan.batch), c = random.below(scan.d_inner);
  const double tolerance = scan.dtype == VSSM_FLOAT32   ? 2e-6
                           : scan.dtype == VSSM_FLOAT16 ? 6e-4
                                                        : 4.5e-3;
  std::vector<double> want, terms;
  scan.expect(image, c, &want, &terms);
  for (int64_t q = 0; q < scan.seqlen; ++q) {
    const double got = y.at((image * scan.seqlen + q) * scan.d_inner + c);
    const double expected = want[static_cast<size_t>(q)];
    const double allowed = tolerance * terms[static_cast<size_t>(q)] + 1e-7;
    if (std::fabs(got - expected) <= allowed) continue;
    fail("y=" + std::to_string(got) + " is not " + std::to_string(expected) + " within " +
         std::to_string(allowed));
  }
}

/// Breaks one rule of the contract, in values or in a description.
bool breach(Random& random, Scan& scan, std::vector<vssm_tensor>* given) {
  if (!random.one_in(8)) return false;
  vssm_tensor& tensor =
      (*given)[static_cast<size_t>(random.below(static_cast<int64_t>(given->size())))];
  switch (random.below(8)) {
    case 0:
      tensor.rank += random.one_in(2) ? 1 : -1;
      return true;
    case 1:
      tensor.dtype = static_cast<int32_t>(random.of({4, -1, 99}));
      return true;
    case 2:
      // Not by one: an A of one decay and two states would only have another form.
      tensor.dims[tensor.rank - 1] += scan.d_state + 1;
      return true;
    case 3:
      tensor.dims[random.below(tensor.rank)] = -1;
      return true;
    case 4:
      if (scan.inputs[7].count() == 0) return false;
      scan.inputs[7].ints()[random.below(scan.inputs[7].count())] =
          static_cast<int32_t>(random.of({-1, scan.seqlen, INT32_MIN, INT32_MAX}));
      return true;
    case 5:
      if (scan.seqlen < 2 || scan.inputs[8].count() == 0) return false;
      scan.inputs[8].ints()[1] = static_cast<int32_t>(random.of({0, -1, INT32_MIN}));
      return true;
    case 6:
      scan.attributes.direction_axis = static_cast<int16_t>(random.of({-1, 3}));
      return true;
    default:
      scan.attributes.delta_softplus = 2;
      return true;
  }
}

/// The gradients of two runs, on one thread and on several.
void check_equal(const std::vector<std::vector<Tensor>>& results) {
  for (size_t i = 0; i < results[0].size(); ++i) {
    results[0][i].check("a gradient");
    results[1][i].check("a gradient");
    const bool same =
        std::memcmp(results[0][i].data(), results[1][i].data(), results[0][i].bytes) == 0;
    if (!same) fail("a gradient depends on the number of threads");
  }
}

void run_backward(Random& random, const Scan& scan, const std::vector<vssm_tensor>& given) {
  Tensor dy(VSSM_FLOAT32, {scan.batch, scan.seqlen, scan.d_inner});
  fill(random, dy, -1, 1, scan.special);
  std::vector<std::vector<Tensor>> results(2);
  for (int round = 0; round < 2; ++round) {
    std::vector<vssm_tensor> gradients;
    for (size_t i = 0; i < scan.inputs.size(); ++i) {
      if (i == 7 || i == 8) continue;
      results[round].emplace_back(VSSM_FLOAT32, scan.inputs[i].dims);
      gradients.push_back(results[round].back().describe());
    }
    char error[512] = "";
    const vssm_tensor upstream = dy.describe();
    const auto threads = static_cast<int32_t>(round == 0 ? 1 : 2 + random.below(3));
    if (vssm_selective_scan_backward(Scan::kNames[scan.kind], given.data(),
                                     static_cast<int32_t>(given.size()), &upstream,
                                     gradients.data(), static_cast<int32_t>(gradients.size()),
                                     &scan.attributes, threads, error, sizeof(error)) != 0) {
      fail(error);
    }
  }
  check_equal(results);
}

void call_scan(Random& random) {
  const bool backward = random.one_in(6);
  Scan scan(random, backward ? VSSM_FLOAT32 : static_cast<int32_t>(random.below(3)));
  std::vector<vssm_tensor> given = scan.described();
  if (backward) return run_backward(random, scan, given);
  const bool broken = breach(random, scan, &given);
  const Tensor y(scan.dtype, {scan.batch, scan.seqlen, scan.d_inner});
  const vssm_tensor result = y.describe();
  const auto threads = static_cast<int32_t>(1 + random.below(4));
  const auto count = static_cast<int32_t>(given.size());
  const char* name = Scan::kNames[scan.kind];
  char error[512] = "";
  const int failed =
      threads == 1
          ? vssm_selective_scan(name, given.data(), count, &result, &scan.attributes, nullptr,
                                error, sizeof(error))
          : vssm_selective_scan_on_threads(name, given.data(), count, &result, &scan.attributes,
                                           threads, error, sizeof(error));
  y.check("y");
  if (broken != (failed != 0)) fail(broken ? "a breach of the contract was taken" : error);
  if (failed != 0 && !y.untouched()) fail("a refused call wrote");
  if (failed != 0 && error[0] == '\0') fail("a refusal says nothing");
  if (failed == 0) compare(random, scan, y);
}

/// Keeps what a stable sort by (protected, number, NaN) puts first.
std::vector<int64_t> expect_kept(const Tensor& score, int64_t image, int64_t protect,
                                 int64_t num_keep) {
  const int64_t seqlen = score.dims[1];
  std::vector<int64_t> slots(static_cast<size_t>(seqlen));
  for (int64_t i = 0; i < seqlen; ++i) slots[static_cast<size_t>(i)] = i;
  const auto rank = [&](int64_t i) {
    const double x = score.at(image * seqlen + i);
    return i == protect ? 0 : std::isnan(x) ? 2 : 1;
  };
  std::stable_sort(slots.begin(), slots.end(), [&](int64_t a, int64_t b) {
    if (rank(a) != rank(b)) return rank(a) < rank(b);
    return rank(a) == 1 && score.at(image * seqlen + a) > score.at(image * seqlen + b);
  });
  slots.resize(static_cast<size_t>(num_keep));
  std::sort(slots.begin(), slots.end());
  return slots;
}

void call_gather(Random& random) {
  const int64_t batch = random.below(4), seqlen = random.of({1, 2, 7, 16, 33, 196, 257});
  const int64_t num_keep = 1 + random.below(seqlen), count = 1 + random.below(2);
  std::vector<Tensor> inputs, outputs;
  inputs.emplace_back(VSSM_FLOAT32, std::vector<int64_t>{batch, seqlen});
  fill(random, inputs[0], -2, 2, true);
  inputs.emplace_back(VSSM_INT32, std::vector<int64_t>{1, seqlen});
  for (int64_t i = 0; i < seqlen; ++i) inputs[1].ints()[i] = static_cast<int32_t>(3 * i);
  outputs.emplace_back(VSSM_INT32, std::vector<int64_t>{batch, num_keep});
  const auto first = static_cast<int32_t>(random.below(3));
  for (int64_t i = 0; i < count; ++i) {
    const int32_t type = i > 0 && random.one_in(2) ? int32_t{VSSM_FLOAT32} : first;
    const int64_t width = 1 + random.below(70);
    inputs.emplace_back(type, std::vector<int64_t>{batch, seqlen, width});
    fill(random, inputs.back(), -1, 1, false);
    outputs.emplace_back(type, std::vector<int64_t>{batch, num_keep, width});
  }
  std::vector<vssm_tensor> given, results;
  for (const Tensor& tensor : inputs) given.push_back(tensor.describe());
  for (const Tensor& tensor : outputs) results.push_back(tensor.describe());
  const int64_t protect = random.one_in(2) ? -1 : random.below(seqlen);
  const bool broken = random.one_in(8);
  const vssm_gather_attributes attributes = {broken ? random.of({0, -1, seqlen + 1}) : num_keep,
                                             protect < 0 ? -1 : 3 * protect};
  char error[512] = "";
  const int failed = vssm_token_gather(count == 2 ? "TokenGather" : "TokenGather1", given.data(),
                                       static_cast<int32_t>(given.size()), results.data(),
                                       static_cast<int32_t>(results.size()), &attributes, nullptr,
                                       error, sizeof(error));
  for (const Tensor& output : outputs) output.check("an output of a gather");
  if (broken != (failed != 0)) fail(broken ? "a breach of the contract was taken" : error);
  for (int64_t image = 0; image < batch && failed == 0; ++image) {
    const std::vector<int64_t> kept = expect_kept(inputs[0], image, protect, num_keep);
    for (int64_t j = 0; j < num_keep; ++j) {
      const int64_t slot = kept[static_cast<size_t>(j)];
      if (outputs[0].ints()[image * num_keep + j] != 3 * slot) fail("another token was kept");
      for (size_t i = 2; i < inputs.size(); ++i) {
        const auto row = static_cast<size_t>(inputs[i].dims[2]) * inputs[i].width();
        const auto from = static_cast<size_t>(image * seqlen + slot) * row;
        const auto to = static_cast<size_t>(image * num_keep + j) * row;
        if (std::memcmp(inputs[i].data() + from, outputs[i - 1].data() + to, row) != 0) {
          fail("a kept row is another one");
        }
      }
    }
  }
}

/// A scatter against rows put one by one; y is base's own memory in some.
void call_scatter(Random& random) {
  const int64_t batch = random.below(4), full = random.of({1, 2, 7, 16, 33, 196, 257});
  const int64_t seqlen = 1 + random.below(full), width = 1 + random.below(70);
  const auto dtype = static_cast<int32_t>(random.below(3));
  std::vector<Tensor> inputs;
  inputs.emplace_back(dtype, std::vector<int64_t>{batch, full, width});
  inputs.emplace_back(dtype, std::vector<int64_t>{batch, seqlen, width});
  for (Tensor& tensor : inputs) fill(random, tensor, -1, 1, true);
  inputs.emplace_back(VSSM_INT32, std::vector<int64_t>{random.one_in(2) ? 1 : batch, seqlen});
  int32_t* position = inputs[2].ints();
  Random values = random.many();
  const bool ascending = random.one_in(2);
  for (int64_t image = 0; image < inputs[2].dims[0]; ++image) {
    std::vector<int32_t> places(static_cast<size_t>(full));
    for (int64_t i = 0; i < full; ++i) {
      const auto other = static_cast<size_t>(values.below(i + 1));
      places[static_cast<size_t>(i)] = places[other];
      places[other] = static_cast<int32_t>(i);
    }
    if (ascending) std::sort(places.begin(), places.begin() + seqlen);
    std::copy_n(places.begin(), seqlen, position + image * seqlen);
  }
  std::vector<vssm_tensor> given;
  for (const Tensor& tensor : inputs) given.push_back(tensor.describe());
  const bool broken = inputs[2].count() > 0 && random.one_in(8);
  if (broken && seqlen > 1 && random.one_in(2)) {
    position[1] = position[0];
  } else if (broken) {
    position[0] = static_cast<int32_t>(random.of({-1, full, INT32_MIN, INT32_MAX}));
  }
  const Tensor fresh(dtype, {batch, full, width});
  const bool in_place = !broken && random.one_in(3);
  const std::vector<unsigned char> base(inputs[0].data(), inputs[0].data() + inputs[0].bytes);
  const Tensor& y = in_place ? inputs[0] : fresh;
  const vssm_tensor result = y.describe();
  char error[512] = "";
  const int failed =
      vssm_token_scatter("TokenScatter", given.data(), 3, &result, nullptr, error, sizeof(error));
  y.check("y of a scatter");
  // With no image there is no position to look at.
  const bool refused = broken && batch > 0;
  if (refused != (failed != 0)) fail(refused ? "a breach of the contract was taken" : error);
  if (failed != 0 && !y.untouched()) fail("a refused scatter wrote");
  if (failed != 0) return;
  const size_t row = static_cast<size_t>(width) * inputs[0].width();
  std::vector<unsigned char> want = base;
  for (int64_t i = 0; i < batch * seqlen; ++i) {
    const int64_t image = i / seqlen, place = position[i % inputs[2].count()];
    std::memcpy(want.data() + static_cast<size_t>(image * full + place) * row,
                inputs[1].data() + static_cast<size_t>(i) * row, row);
  }
  if (!std::equal(want.begin(), want.end(), y.data())) fail("y of a scatter is another");
}

/// Gradients of a convolution whose inputs keep the contract, on one thread and on several.
void run_conv_backward(Random& random, const char* op, const std::vector<Tensor>& inputs,
                       const std::vector<vssm_tensor>& given,
                       const vssm_conv_attributes& attributes) {
  const std::vector<int64_t>&x = inputs[0].dims, &weight = inputs[1].dims;
  Tensor dy(VSSM_FLOAT32,
            attributes.group > 0 ? x : std::vector<int64_t>{x[0], weight[0], x[1], x[2]});
  fill(random, dy, -1, 1, false);
  std::vector<std::vector<Tensor>> results(2);
  for (int round = 0; round < 2; ++round) {
    std::vector<vssm_tensor> gradients;
    for (size_t i = 0; i < 3; ++i) {
      results[round].emplace_back(VSSM_FLOAT32, inputs[i].dims);
      gradients.push_back(results[round].back().describe());
    }
    char error[512] = "";
    const vssm_tensor upstream = dy.describe();
    const auto threads = static_cast<int32_t>(round == 0 ? 1 : 2 + random.below(3));
    if (vssm_token_conv_backward(op, given.data(), 4, &upstream, gradients.data(), 3, &attributes,
                                 threads, error, sizeof(error)) != 0) {
      fail(error);
    }
  }
  check_equal(results);
}

/// A convolution against a sum over all pairs of tokens, in float64.
void call_conv(Random& random) {
  const int64_t batch = random.below(4), seqlen = random.of({1, 2, 7, 16, 17, 33});
  const int64_t d_inner = random.of({1, 5, 16, 17, 33, 130}), K = 1 + random.below(2);
  const int64_t width = random.of({1, 2, 3, 4, 4, 5, 9, 32});
  const auto dtype = static_cast<int32_t>(random.below(3));
  const bool special = random.one_in(6);
  std::vector<Tensor> inputs;
  inputs.emplace_back(dtype, std::vector<int64_t>{batch, seqlen, d_inner});
  inputs.emplace_back(VSSM_FLOAT32, std::vector<int64_t>{K, d_inner, width});
  inputs.emplace_back(VSSM_FLOAT32, std::vector<int64_t>{K, d_inner});
  for (Tensor& tensor : inputs) fill(random, tensor, -1, 1, special);
  inputs.emplace_back(VSSM_INT32, std::vector<int64_t>{random.one_in(2) ? 1 : batch, seqlen});
  int32_t* position = inputs[3].ints();
  Random steps = random.many();
  for (int64_t i = 0; i < inputs[3].count(); ++i) {
    const auto step = static_cast<int32_t>(steps.one_in(3) ? 1 + steps.below(40) : 1);
    position[i] = i % seqlen == 0 ? -3 : position[i - 1] + step;
  }
  vssm_conv_attributes attributes = {random.below(2), random.below(2), 0, 0, 0};
  std::vector<vssm_tensor> given;
  for (const Tensor& tensor : inputs) given.push_back(tensor.describe());
  if (dtype == VSSM_FLOAT32 && random.one_in(3)) {
    return run_conv_backward(random, "TokenConv", inputs, given, attributes);
  }
  const bool broken = random.one_in(8);
  if (broken && seqlen > 1 && inputs[3].count() > 0 && random.one_in(2)) {
    attributes.by_position = 1;
    position[1] = static_cast<int32_t>(random.of({-3, INT32_MIN}));
  } else if (broken) {
    given[static_cast<size_t>(random.below(4))].rank -= 1;
  }
  const Tensor y(dtype, {batch, K, seqlen, d_inner});
  const vssm_tensor result = y.describe();
  char error[512] = "";
  const auto threads = static_cast<int32_t>(1 + random.below(4));
  const int failed = vssm_token_conv_on_threads("TokenConv", given.data(), 4, &result, &attributes,
                                                threads, error, sizeof(error));
  y.check("y of a convolution");
  if (broken != (failed != 0)) fail(broken ? "a breach of the contract was taken" : error);
  if (failed != 0 && !y.untouched()) fail("a refused convolution wrote");
  if (failed != 0 || special || batch == 0) return;
  const int64_t image = random.below(batch), c = random.below(d_inner), k = random.below(K);
  const int32_t* row = position + (inputs[3].dims[0] > 1 ? image * seqlen : 0);
  for (int64_t t = 0; t < seqlen; ++t) {
    double sum = inputs[2].at(k * d_inner + c), terms = std::fabs(sum);
    for (int64_t s = 0; s < seqlen; ++s) {
      const int64_t ahead = attributes.by_position != 0 ? int64_t{row[s]} - row[t] : s - t;
      const int64_t away = k == 0 ? -ahead : ahead;
      if (away < 0 || away >= width) continue;
      const double term = inputs[1].at((k * d_inner + c) * width + width - 1 - away) *
                          inputs[0].at((image * seqlen + s) * d_inner + c);
      sum += term;
      terms += std::fabs(term);
    }
    if (attributes.activation != 0) sum /= 1 + std::exp(-sum);
    const double tolerance = dtype == VSSM_FLOAT32 ? 2e-6 : dtype == VSSM_FLOAT16 ? 6e-4 : 4.5e-3;
    const double got = y.at(((image * K + k) * seqlen + t) * d_inner + c);
    if (std::fabs(got - sum) <= tolerance * terms + 1e-7) continue;
    fail("y of a convolution is " + std::to_string(got) + ", not " + std::to_string(sum));
  }
}

/// The place of a token on a grid, from its row of positions; its index where there is none.
int64_t place_of(const int32_t* row, int64_t token) { return row == nullptr ? token : row[token]; }

/// A convolution over a grid against a sum over all pairs of its tokens, in float64.
void call_grid(Random& random) {
  const int64_t batch = random.below(4), height = random.of({1, 2, 5, 9});
  const int64_t width = random.of({1, 3, 4, 7, 14}), places = height * width;
  const int64_t d_inner = random.of({1, 5, 16, 17, 33, 130}), side = random.of({1, 3, 3, 5, 7, 7});
  const auto dtype = static_cast<int32_t>(random.below(3));
  const bool special = random.one_in(6), whole = random.one_in(3);
  const int64_t seqlen = whole ? places : 1 + random.below(places);
  std::vector<Tensor> inputs;
  inputs.emplace_back(dtype, std::vector<int64_t>{batch, seqlen, d_inner});
  inputs.emplace_back(VSSM_FLOAT32, std::vector<int64_t>{d_inner, side, side});
  inputs.emplace_back(VSSM_FLOAT32, std::vector<int64_t>{d_inner});
  for (Tensor& tensor : inputs) fill(random, tensor, -1, 1, special);
  inputs.emplace_back(VSSM_INT32, std::vector<int64_t>{random.one_in(2) ? 1 : batch, seqlen});
  int32_t* position = inputs[3].ints();
  Random steps = random.many();
  for (int64_t i = 0; i < inputs[3].count(); ++i) {
    const int64_t t = i % seqlen, first = t == 0 ? 0 : position[i - 1] + 1;
    const int64_t spare = places - seqlen - (first - t);  // places that may still be left empty
    position[i] = static_cast<int32_t>(first + (steps.one_in(2) ? steps.below(spare + 1) : 0));
  }
  vssm_conv_attributes attributes = {whole ? random.below(2) : 1, random.below(2), height, width,
                                     d_inner};
  std::vector<vssm_tensor> given;
  for (const Tensor& tensor : inputs) given.push_back(tensor.describe());
  if (dtype == VSSM_FLOAT32 && random.one_in(3)) {
    return run_conv_backward(random, "TokenConv2D", inputs, given, attributes);
  }
  const bool broken = random.one_in(8);
  if (broken && attributes.by_position != 0 && inputs[3].count() > 0 && random.one_in(2)) {
    position[0] = static_cast<int32_t>(random.of({-1, places, INT32_MIN, INT32_MAX}));
  } else if (broken && random.one_in(2)) {
    int64_t* const values[] = {&attributes.grid_height, &attributes.grid_width, &attributes.group};
    *values[random.below(3)] = random.of({0, -1, INT64_MIN, INT64_MAX});
  } else if (broken) {
    given[static_cast<size_t>(random.below(4))].rank -= 1;
  }
  const Tensor y(dtype, {batch, seqlen, d_inner});
  const vssm_tensor result = y.describe();
  char error[512] = "";
  const auto threads = static_cast<int32_t>(1 + random.below(4));
  const int failed = vssm_token_conv_on_threads("TokenConv2D", given.data(), 4, &result,
                                                &attributes, threads, error, sizeof(error));
  y.check("y of a convolution over a grid");
  if (broken != (failed != 0)) fail(broken ? "a breach of the contract was taken" : error);
  if (failed != 0 && !y.untouched()) fail("a refused convolution wrote");
  if (failed != 0 || special || batch == 0) return;
  const int64_t image = random.below(batch), c = random.below(d_inner);
  const int32_t* row = position + (inputs[3].dims[0] > 1 ? image * seqlen : 0);
  if (attributes.by_position == 0) row = nullptr;
  for (int64_t t = 0; t < seqlen; ++t) {
    double sum = inputs[2].at(c), terms = std::fabs(sum);
    for (int64_t s = 0; s < seqlen; ++s) {
      const int64_t own = place_of(row, t), other = place_of(row, s);
      const int64_t down = other / width - own / width + side / 2;
      const int64_t right = other % width - own % width + side / 2;
      if (std::min(down, right) < 0 || std::max(down, right) >= side) continue;
      const double term = inputs[1].at((c * side + down) * side + right) *
                          inputs[0].at((image * seqlen + s) * d_inner + c);
      sum += term;
      terms += std::fabs(term);
    }
    if (attributes.activation != 0) sum /= 1 + std::exp(-sum);
    const double tolerance = dtype == VSSM_FLOAT32 ? 2e-6 : dtype == VSSM_FLOAT16 ? 6e-4 : 4.5e-3;
    const double got = y.at((image * seqlen + t) * d_inner + c);
    if (std::fabs(got - sum) <= tolerance * terms + 1e-7) continue;
    fail("y of a convolution over a grid is " + std::to_string(got) + ", not " +
         std::to_string(sum));
  }
}

/// Instruction sets that this processor and this build have; VSSM_CPU_ISA's alone where it is set.
std::vector<std::string> instruction_sets() {
  if (const char* wanted = std::getenv("VSSM_CPU_ISA")) return {wanted};
  std::vector<std::string> found;
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    setenv("VSSM_CPU_ISA", isa, 1);
    Random random(0);
    const Scan scan(random, VSSM_FLOAT32);
    const Tensor y(VSSM_FLOAT32, {scan.batch, scan.seqlen, scan.d_inner});
    const std::vector<vssm_tensor> given = scan.described();
    const vssm_tensor result = y.describe();
    const int failed = vssm_selective_scan(Scan::kNames[scan.kind], given.data(),
                                           static_cast<int32_t>(given.size()), &result,
                                           &scan.attributes, nullptr, nullptr, 0);
    if (failed == 0) found.emplace_back(isa);
  }
  return found;
}

const std::vector<std::string>& known_instruction_sets() {
  static const std::vector<std::string> isas = instruction_sets();
  return isas;
}

void call_any(Random& random) {
  const auto& isas = known_instruction_sets();
  const int64_t isa = random.below(static_cast<int64_t>(isas.size()));
  setenv("VSSM_CPU_ISA", isas[static_cast<size_t>(isa)].c_str(), 1);
  if (random.one_in(6)) return call_gather(random);
  if (random.one_in(8)) return call_scatter(random);
  if (random.one_in(6)) return call_conv(random);
  random.one_in(6) ? call_grid(random) : call_scan(random);
}

}  // namespace

#ifdef VSSM_COVERAGE

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Random random(data, size);
  call_any(random);
  return 0;
}

#else

int main(int count, char** arguments) {
  using Clock = std::chrono::steady_clock;
  if (count < 3 || count > 4) fail("usage: vssm_fuzz SEED CALLS [SECONDS] | SEED --only CALL");
  const uint64_t seed = std::strtoull(arguments[1], nullptr, 10);
  const bool only = std::strcmp(arguments[2], "--only") == 0;
  const int64_t first = only ? std::atoll(arguments[count - 1]) : 0;
  const int64_t last = only ? first + 1 : std::atoll(arguments[2]);
  const double seconds = count == 4 && !only ? std::atof(arguments[3]) : HUGE_VAL;
  const auto start = Clock::now();
  const auto spent = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  int64_t call = first;
  for (; call < last && spent() < seconds; ++call) {
    current_call = call;
    Random random(seed * 0x9E3779B97F4A7C15U + static_cast<uint64_t>(call));
    call_any(random);
  }
  std::printf("fuzz: %lld calls on", static_cast<long long>(call - first));
  for (const std::string& isa : known_instruction_sets()) std::printf(" %s", isa.c_str());
  std::printf(", seed %llu\n", static_cast<unsigned long long>(seed));
}

#endif
