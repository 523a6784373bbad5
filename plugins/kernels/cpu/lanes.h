// Vectors over the channels of a unit, as a template over an instruction set `Isa`.
//
// The file of each instruction set (avx2.cpp, ...) defines an `Isa` in its anonymous namespace, so
// that every instantiation has internal linkage: code compiled for AVX can not be merged by the
// linker into code that runs without it. For the same reason nothing from std:: is used here.
#ifndef VSSM_PLUGINS_KERNELS_CPU_LANES_H_
#define VSSM_PLUGINS_KERNELS_CPU_LANES_H_

#include <cstddef>
#include <cstdint>

#include "plugins/kernels/cpu/kernels.h"

#define VSSM_INLINE inline __attribute__((always_inline))
#define VSSM_NOINLINE __attribute__((noinline))

namespace vssm {

template <DType kType>
struct ElementOf {
  using Type = uint16_t;  // float16 and bfloat16, as bits
};
template <>
struct ElementOf<DType::kFloat32> {
  using Type = float;
};

template <class Isa>
struct Lanes {
  using Vec = typename Isa::Vec;
  static constexpr int kVectors = static_cast<int>(kChannels) / Isa::kLanes;

  /// One value for each channel of the unit.
  struct Row {
    Vec v[kVectors];
  };

  static VSSM_INLINE Row splat(float x) {
    Row row;
    for (int v = 0; v < kVectors; ++v) row.v[v] = Isa::set1(x);
    return row;
  }

  static VSSM_INLINE Row load(const float* source) {
    Row row;
    for (int v = 0; v < kVectors; ++v) row.v[v] = Isa::load(source + v * Isa::kLanes);
    return row;
  }

  static VSSM_INLINE void store(float* target, const Row& row) {
    for (int v = 0; v < kVectors; ++v) Isa::store(target + v * Isa::kLanes, row.v[v]);
  }

  template <DType kType>
  static VSSM_INLINE Row load_all(const void* source) {
    if constexpr (kType == DType::kFloat32) {
      return load(static_cast<const float*>(source));
    } else {
      const auto* half = static_cast<const uint16_t*>(source);
      Row row;
      for (int v = 0; v < kVectors; ++v) {
        row.v[v] = kType == DType::kFloat16 ? Isa::load_float16(half + v * Isa::kLanes)
                                            : Isa::load_bfloat16(half + v * Isa::kLanes);
      }
      return row;
    }
  }

  template <DType kType>
  static VSSM_INLINE void store_all(void* target, const Row& row) {
    if constexpr (kType == DType::kFloat32) {
      store(static_cast<float*>(target), row);
    } else {
      auto* half = static_cast<uint16_t*>(target);
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (kType == DType::kFloat16) {
          Isa::store_float16(half + v * Isa::kLanes, row.v[v]);
        } else {
          Isa::store_bfloat16(half + v * Isa::kLanes, row.v[v]);
        }
      }
    }
  }

  /// The first `part.width` elements at `source`; channels past them read as zero.
  template <DType kType>
  static VSSM_INLINE Row load_part(const void* source, const typename Isa::Part& part) {
    if constexpr (Isa::kMasked && kType == DType::kFloat32) {
      return {{Isa::load(static_cast<const float*>(source), part)}};
    } else {
      constexpr size_t kSize = kType == DType::kFloat32 ? 4 : 2;
      if (__builtin_expect(part.width == kChannels, 1)) return load_all<kType>(source);
      alignas(64) char padded[kChannels * kSize] = {};
      for (size_t i = 0; i < static_cast<size_t>(part.width) * kSize; ++i) {
        padded[i] = static_cast<const char*>(source)[i];
      }
      return load_all<kType>(padded);
    }
  }

  template <DType kType>
  static VSSM_INLINE void store_part(void* target, const typename Isa::Part& part, const Row& row) {
    if constexpr (Isa::kMasked && kType == DType::kFloat32) {
      Isa::store(static_cast<float*>(target), part, row.v[0]);
    } else {
      constexpr size_t kSize = kType == DType::kFloat32 ? 4 : 2;
      if (__builtin_expect(part.width == kChannels, 1)) return store_all<kType>(target, row);
      alignas(64) char padded[kChannels * kSize];
      store_all<kType>(padded, row);
      for (size_t i = 0; i < static_cast<size_t>(part.width) * kSize; ++i) {
        static_cast<char*>(target)[i] = padded[i];
      }
    }
  }

  /// Functions of a vector, with their constants in registers as far as there are any: left to
  /// itself the compiler reads each one anew at every use, and that fills the load units.
  struct Functions {
    Vec exp_c[6], log_c[9], log2e, minus_ln2, minus_ln2_low, magic, lowest;

    VSSM_INLINE Functions() {
      // Minimax of e^r on [-ln(2) / 2, ln(2) / 2], exact at 0, relative error 1.1e-7.
      constexpr float kExp[] = {1.0F,         1.0F,          0.499992311F,
                                0.166671142F, 0.0418901145F, 0.00831252523F};
      // Minimax of log1p(e) / e on [0, 1], exact at 0, relative error 3.4e-8.
      constexpr float kLog[] = {1.0F,          -0.499996483F,  0.33321324F,
                                -0.248571634F, 0.191536531F,   -0.137537986F,
                                0.0792044997F, -0.0300657693F, 0.0053648185F};
#pragma GCC unroll 16
      for (int i = 0; i < 6; ++i) exp_c[i] = Isa::opaque(kExp[i]);
#pragma GCC unroll 16
      for (int i = 0; i < 9; ++i) log_c[i] = Isa::opaque(kLog[i]);
      log2e = Isa::opaque(1.44269502F);
      minus_ln2 = Isa::opaque(-0.693145752F);  // 15 bits: its product with n is exact
      minus_ln2_low = Isa::opaque(-1.42860677e-6F);
      magic = Isa::opaque(12582912.0F);  // 1.5 * 2^23: adding it rounds to an integer
      // Its n is -127 and its r positive: an exponent of 0 and no sign, so a subnormal number.
      lowest = Isa::opaque(-87.9F);
    }

    /// e^x for x <= 88; below -87.34 a subnormal number, which counts as 0. Relative error about
    /// 2e-7 everywhere: ln(2) is taken in two parts. A NaN gives any value: callers combine it with
    /// x.
    VSSM_INLINE Vec exp(Vec x) const {
      x = Isa::max(lowest, x);
      const Vec t = Isa::fma(x, log2e, magic);
      const Vec n = t - magic;
      const Vec r = Isa::fma(n, minus_ln2_low, Isa::fma(n, minus_ln2, x));
      const Vec low = Isa::fma(exp_c[1], r, exp_c[0]);
      return Isa::add_exponent(Isa::fma(cubic(r, r * r, exp_c + 2), r * r, low), t);
    }

    /// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), relative error about 2e-7 for every x.
    VSSM_INLINE Vec softplus(Vec x) const {
      const Vec e = exp(Isa::negative_abs(x));
      const Vec e2 = e * e;
      const Vec e4 = e2 * e2;
      const Vec high = Isa::fma(log_c[8], e4, cubic(e, e2, log_c + 4));
      const Vec p = Isa::fma(high, e4, cubic(e, e2, log_c));
      return Isa::fma(p, e, Isa::max(Isa::set1(0.0F), x));
    }

    /// p[0] + p[1] x + p[2] x^2 + p[3] x^3; in pairs, which halves the chain of Horner's rule.
    static VSSM_INLINE Vec cubic(Vec x, Vec x2, const Vec* p) {
      return Isa::fma(Isa::fma(p[3], x, p[2]), x2, Isa::fma(p[1], x, p[0]));
    }
  };
};

/// An instruction set with a better way specialises this.
template <class Isa>
struct FunctionsOf {
  using Type = typename Lanes<Isa>::Functions;
};

/// sigmoid(x) and what comes of it, over the whole range of x. Below kFar sigmoid(x) = e^x is close
/// to or below the smallest normal float while x e^x is not, down to -91.9: there e^(x / 2) is
/// multiplied in twice. NaN stays NaN, and -inf gives -inf * 0, NaN, in silu and its slope.
template <class Isa>
struct Sigmoid {
  using Vec = typename Isa::Vec;
  using Functions = typename FunctionsOf<Isa>::Type;
  static constexpr float kFar = -87.0F;

  static VSSM_INLINE Vec value(const Functions& functions, Vec x) {
    const Vec e = functions.exp(Isa::negative_abs(x)), one = Isa::set1(1.0F);
    return Isa::below(x, 0.0F, e, one) / (one + e);
  }

  /// x sigmoid(x)
  static VSSM_INLINE Vec silu(const Functions& functions, Vec x) {
    const Vec near = x / (Isa::set1(1.0F) + functions.exp(Isa::set1(0.0F) - x));
    if (__builtin_expect(!Isa::any_below(x, kFar), 1)) return near;
    const Vec root = functions.exp(x * Isa::set1(0.5F));
    return Isa::below(x, kFar, x * root * root, near);
  }

  /// The derivative of silu: sigmoid(x) (1 + x (1 - sigmoid(x)))
  static VSSM_INLINE Vec slope(const Functions& functions, Vec x) {
    const Vec one = Isa::set1(1.0F);
    const Vec near = value(functions, x) * Isa::fma(x, value(functions, Isa::set1(0.0F) - x), one);
    if (__builtin_expect(!Isa::any_below(x, kFar), 1)) return near;
    const Vec root = functions.exp(x * Isa::set1(0.5F));
    return Isa::below(x, kFar, (one + x) * root * root, near);
  }
};

/// float16 or bfloat16 to float32, exact.
template <class Isa>
void widen(const void* source, DType dtype, float* target, int64_t count) {
  const auto* half = static_cast<const uint16_t*>(source);
  using L = Lanes<Isa>;
  for (int64_t i = 0; i < count; i += kChannels) {
    const typename Isa::Part part(count - i);
    const auto row = dtype == DType::kFloat16
                         ? L::template load_part<DType::kFloat16>(half + i, part)
                         : L::template load_part<DType::kBFloat16>(half + i, part);
    L::template store_part<DType::kFloat32>(target + i, part, row);
  }
}

}  // namespace vssm

#endif  // VSSM_PLUGINS_KERNELS_CPU_LANES_H_
