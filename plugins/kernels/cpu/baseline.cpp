// Vectors of four floats (GCC and Clang vector extensions): SSE2 on any x86-64, NEON on aarch64,
// plain code elsewhere.
#include "plugins/kernels/cpu/conv_impl.h"
#include "plugins/kernels/cpu/pieces.h"
#include "plugins/kernels/cpu/scan_backward_impl.h"
#include "plugins/kernels/cpu/scan_impl.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace vssm {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Uint4 __attribute__((vector_size(16)));  // where a sum of bits may wrap around

struct Baseline {
  using Vec = Float4;
  static constexpr int kLanes = 4;
  static constexpr int kVectorsAtOnce = 4;  // a Vim-T layer on Zen 5: 1.44 ms, with 1: 1.51
  static constexpr int kStateVectors = 0;
  static constexpr float kCells = 1.0F;
  static constexpr bool kMasked = false;

  /// The channels of a unit that exist.
  struct Part {
    int64_t width;
    explicit VSSM_INLINE Part(int64_t rest) : width(rest < kChannels ? rest : kChannels) {}
  };

  static VSSM_INLINE Vec load(const float* p) {
    Vec x;
    __builtin_memcpy(&x, p, sizeof(x));
    return x;
  }
  static VSSM_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof(x)); }
  static VSSM_INLINE Vec set1(float x) { return Vec{x, x, x, x}; }
  static VSSM_INLINE Vec opaque(float x) { return set1(x); }
  // Fused where the processor can: this file alone is compiled with -ffp-contract=fast.
  static VSSM_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static VSSM_INLINE Vec fms(Vec a, Vec b, Vec c) { return a * b - c; }
  static VSSM_INLINE Vec choose(Int4 mask, Vec a, Vec b) {
    return (Vec)((mask & (Int4)a) | (~mask & (Int4)b));
  }
  // Both keep a NaN in the second operand.
#if defined(__SSE2__)
  static VSSM_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm_max_ps((__m128)a, (__m128)b); }
  static VSSM_INLINE Vec min(Vec a, Vec b) { return (Vec)_mm_min_ps((__m128)a, (__m128)b); }
  static VSSM_INLINE bool all(Int4 mask) { return _mm_movemask_ps((__m128)mask) == 15; }
  /// Of two spans the one that is further from what fits_decay takes times a negative number: as
  /// integers without a sign the bits of floats count up from 0 over inf and NaN to the negative.
  /// SSE2 compares bytes: the result may be up to four times further than either.
  static VSSM_INLINE Vec max_bits(Vec a, Vec b) {
    return (Vec)_mm_max_epu8((__m128i)a, (__m128i)b);
  }
#else
  // NEON's own maximum of floats returns a NaN of either operand, so it takes two instructions.
  static VSSM_INLINE Vec max(Vec a, Vec b) { return choose(a > b, a, b); }
  static VSSM_INLINE Vec min(Vec a, Vec b) { return choose(a < b, a, b); }
#if defined(__aarch64__)
  static VSSM_INLINE Vec max_bits(Vec a, Vec b) {
    return (Vec)vmaxq_u32((uint32x4_t)a, (uint32x4_t)b);
  }
  static VSSM_INLINE bool all(Int4 mask) { return vminvq_u32((uint32x4_t)mask) != 0; }
#else
  static VSSM_INLINE Vec max_bits(Vec a, Vec b) { return choose((Uint4)a > (Uint4)b, a, b); }
  static VSSM_INLINE bool all(Int4 mask) { return (mask[0] & mask[1] & mask[2] & mask[3]) != 0; }
#endif
#endif
  static VSSM_INLINE Vec negative_abs(Vec x) { return (Vec)((Int4)x | (Int4)set1(-0.0F)); }
  static VSSM_INLINE bool any_below(Vec x, float limit) { return !all(~(x < set1(limit))); }
  /// Where x is below the limit `a`, elsewhere `b`.
  static VSSM_INLINE Vec below(Vec x, float limit, Vec a, Vec b) {
    return choose(x < set1(limit), a, b);
  }

  /// p 2^n, where t = n + 1.5 * 2^23.
  static VSSM_INLINE Vec add_exponent(Vec p, Vec t) { return (Vec)((Uint4)p + ((Uint4)t << 23)); }

  static VSSM_INLINE float from_bits(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof(x));
    return x;
  }
  static VSSM_INLINE uint32_t to_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof(bits));
    return bits;
  }

#if defined(__aarch64__)
  static VSSM_INLINE Vec load_float16(const uint16_t* p) {
    return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
  }
  static VSSM_INLINE Vec load_bfloat16(const uint16_t* p) {
    return (Vec)vshll_n_u16(vld1_u16(p), 16);
  }
  static VSSM_INLINE void store_float16(uint16_t* p, Vec x) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
  }
  static VSSM_INLINE void store_bfloat16(uint16_t* p, Vec x) {
    const Uint4 bits = (Uint4)x;
    const Uint4 rounded = bits + 0x7FFFU + ((bits >> 16) & 1U);
    const Vec safe = choose(x == x, (Vec)rounded, (Vec)(bits | (1U << 22)));
    vst1_u16(p, vshrn_n_u32((uint32x4_t)safe, 16));
  }
#else
  static VSSM_INLINE float half_to_float(uint32_t half) {
    const uint32_t sign = (half & 0x8000U) << 16;
    const uint32_t exponent = (half >> 10) & 31U;
    const uint32_t mantissa = half & 0x3FFU;
    if (exponent == 0) {  // zero or denormal: the mantissa counts 2^-24
      return from_bits(sign | to_bits(static_cast<float>(mantissa) * 5.9604644775390625e-8F));
    }
    const uint32_t biased = exponent == 31 ? 255U : exponent + 112U;
    return from_bits(sign | (biased << 23) | (mantissa << 13));
  }

  /// Round to nearest, ties to even.
  static VSSM_INLINE uint16_t float_to_half(float x) {
    const uint32_t bits = to_bits(x);
    const uint32_t sign = (bits >> 16) & 0x8000U;
    const uint32_t magnitude = bits & 0x7FFFFFFFU;
    uint32_t half;
    if (magnitude > 0x7F800000U) {
      half = 0x7E00U;
    } else if (magnitude >= 0x477FF000U) {  // 65520 and more
      half = 0x7C00U;
    } else if (magnitude < 0x38800000U) {  // below 2^-14: adding 1/2 puts the last bit at 2^-24
      half = to_bits(from_bits(magnitude) + 0.5F) - 0x3F000000U;
    } else {
      half = (magnitude - 0x38000000U + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
    }
    return static_cast<uint16_t>(sign | half);
  }

  static VSSM_INLINE Vec load_float16(const uint16_t* p) {
    return Vec{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
  }
  static VSSM_INLINE Vec load_bfloat16(const uint16_t* p) {
    return (Vec)(Int4{p[0], p[1], p[2], p[3]} << 16);
  }
  static VSSM_INLINE void store_float16(uint16_t* p, Vec x) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(x[i]);
  }
  static VSSM_INLINE void store_bfloat16(uint16_t* p, Vec x) {
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t bits = to_bits(x[i]);
      const bool nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
      const uint32_t rounded = nan ? bits | (1U << 22) : bits + 0x7FFFU + ((bits >> 16) & 1U);
      p[i] = static_cast<uint16_t>(rounded >> 16);
    }
  }
#endif

  /// Whether Decay::fast holds for arguments down to this lowest one: all in [-125 octaves, -0].
  /// As integers the bits of negative floats count up from those of -0; positive ones and NaN are
  /// above them all, so one comparison tells.
  static VSSM_INLINE bool fits_decay(Vec lowest_argument) {
    return all((Int4)lowest_argument <= (Int4)set1(-125.0F));
  }

  static VSSM_INLINE float first(Vec x) { return x[0]; }
  /// False for a NaN.
  static VSSM_INLINE bool all_equal(Vec a, Vec b) { return all(a == b); }

  /// False for a NaN, too.
  static VSSM_INLINE bool none_above_zero(Vec x) { return all(x <= set1(0.0F)); }

  struct Decay {
    /// 2^(span a) for an argument in [-125, 0]: the conversion to an integer cuts towards zero,
    /// which is up here. Minimax of 2^r on [-1, 0], exact at 0, 1 - p within 3.2e-7 of itself.
    VSSM_INLINE Vec fast(Vec span, Vec a) const {
      constexpr float kP[] = {1.0F,         0.693146944F,   0.240215048F,
                              0.055410333F, 0.00934706163F, 0.00100504432F};
      const Vec x = span * a;
      const Int4 n = __builtin_convertvector(x, Int4);
      const Vec r = x - __builtin_convertvector(n, Vec);
      const Vec r2 = r * r;  // in pairs: Horner's rule is a chain that fills the schedulers
      Vec p = fma(set1(kP[5]), r, set1(kP[4]));
      p = fma(p, r2, fma(set1(kP[3]), r, set1(kP[2])));
      p = fma(p, r2, fma(set1(kP[1]), r, set1(kP[0])));
      return (Vec)((Uint4)p + ((Uint4)n << 23));
    }

    /// 2^(span a octave) for any argument: 0 and inf at the ends, NaN stays NaN.
    static VSSM_INLINE Vec any(Vec span, Vec a, float octave) {
      constexpr float kP[] = {1.0F,           0.693147182F,   0.240226462F,  0.0555032864F,
                              0.00961848907F, 0.00133999309F, 0.00015345811F};
      const Vec x = min(set1(250.0F), max(set1(-250.0F), span * a * set1(octave)));
      const Vec t = x + set1(12582912.0F);  // 1.5 * 2^23: adding it rounds to an integer
      const Vec r = x - (t - set1(12582912.0F));
      Vec p = set1(kP[6]);
      for (int i = 5; i >= 0; --i) p = fma(p, r, set1(kP[i]));
      // Two factors: 2^n itself may lie outside the exponents of a float.
      const Int4 n = (Int4)t - (Int4)set1(12582912.0F);
      const Int4 half = n >> 1;
      return p * power(half) * power(n - half);
    }

    static VSSM_INLINE Vec power(Int4 n) { return (Vec)((n + 127) << 23); }
  };

  /// Denormals count as zero while it lives, where this code knows how to ask for it.
  struct FlushDenormals {
#if defined(__SSE2__)
    unsigned saved = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(saved | 0x8040U); }
    ~FlushDenormals() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
    uint64_t saved;
    FlushDenormals() {
      __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
      __asm__ volatile("msr fpcr, %0" : : "r"(saved | (uint64_t{1} << 24)));
    }
    ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved)); }
#else
    FlushDenormals() {}
#endif
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;
  };
};

}  // namespace

const CpuKernels kBaselineKernels = {
    "baseline",
    scan_part<Baseline>,
    scan_unit<Baseline>,
    backward_unit<Baseline>,
    conv_token<Baseline>,
    conv_tiles<Baseline>,
    conv_token_backward<Baseline>,
    widen<Baseline>,
    decay_values<Baseline>,
    softplus_values<Baseline>,
    decay_rounds<Baseline>,
    product_rounds<Baseline>,
    softplus_rounds<Baseline>,
};

}  // namespace vssm
