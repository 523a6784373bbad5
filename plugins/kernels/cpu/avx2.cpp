// AVX2, FMA and F16C: 8 channels in a vector; the states stay in the first-level cache.
#include <immintrin.h>

#include "plugins/kernels/cpu/conv_impl.h"
#include "plugins/kernels/cpu/pieces.h"
#include "plugins/kernels/cpu/scan_backward_impl.h"
#include "plugins/kernels/cpu/scan_impl.h"

namespace vssm {
namespace {

// 2^(n / 8 + r / 8) for r in (-1, 0] as a cubic in r, one per n mod 8; minimax fits of
// 2^(i / 8 + r / 8), i = 0, -7, ..., -1, with C0 less i / 16 (see Decay::fast).
alignas(32) const float kC0[8] = {
    1.0F,         0.982753873F, 0.969603539F, 0.960919738F,
    0.957106769F, 0.958605409F, 0.965896428F, 0.979504049F,
};
alignas(32) const float kC1[8] = {
    0.0866433233F, 0.0472423397F, 0.0515181385F, 0.0561809279F,
    0.0612657331F, 0.0668107569F, 0.0728576481F, 0.0794518292F,
};
alignas(32) const float kC2[8] = {
    0.00375225581F, 0.00204508426F, 0.00223018019F, 0.00243202876F,
    0.00265214616F, 0.00289218593F, 0.00315395114F, 0.00343940803F,
};
alignas(32) const float kC3[8] = {
    0.000104956773F, 5.66109811e-05F, 6.17347105e-05F, 6.73221803e-05F,
    7.34153582e-05F, 8.00600174e-05F, 8.73060708e-05F, 9.52079426e-05F,
};

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kVectorsAtOnce = 2;  // a Vim-T layer on Zen 5: 0.450 ms, with 1: 0.466
  static constexpr int kStateVectors = 0;
  static constexpr float kCells = 8.0F;
  static constexpr bool kMasked = false;

  /// The channels of a unit that exist.
  struct Part {
    int64_t width;
    explicit VSSM_INLINE Part(int64_t rest) : width(rest < kChannels ? rest : kChannels) {}
  };

  static VSSM_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static VSSM_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
  static VSSM_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
  /// The same, but the compiler does not know the value, so it keeps the register.
  static VSSM_INLINE Vec opaque(float x) {
    Vec y = set1(x);
    __asm__("" : "+x"(y));
    return y;
  }
  static VSSM_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static VSSM_INLINE Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
  // Both keep a NaN in the second operand.
  static VSSM_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static VSSM_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static VSSM_INLINE Vec negative_abs(Vec x) { return _mm256_or_ps(x, set1(-0.0F)); }
  static VSSM_INLINE bool any_below(Vec x, float limit) {
    return _mm256_movemask_ps(_mm256_cmp_ps(x, set1(limit), _CMP_LT_OQ)) != 0;
  }
  /// Where x is below the limit `a`, elsewhere `b`.
  static VSSM_INLINE Vec below(Vec x, float limit, Vec a, Vec b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, set1(limit), _CMP_LT_OQ));
  }

  /// p 2^n, where t = n + 1.5 * 2^23.
  static VSSM_INLINE Vec add_exponent(Vec p, Vec t) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
  }

  static VSSM_INLINE Vec load_float16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static VSSM_INLINE Vec load_bfloat16(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static VSSM_INLINE void store_float16(uint16_t* p, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static VSSM_INLINE void store_bfloat16(uint16_t* p, Vec x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(32767)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(1 << 22));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i safe = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(safe, safe), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  /// Of two spans the one that is further from what fits_decay takes times a negative number: as
  /// integers without a sign the bits of floats count up from 0 over inf and NaN to the negative.
  static VSSM_INLINE Vec max_bits(Vec a, Vec b) {
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }

  /// Whether Decay::fast holds for arguments down to this lowest one: all in [-125 octaves, -0].
  /// As integers the bits of negative floats count up from those of -0; positive ones and NaN are
  /// above them all, so one comparison tells.
  static VSSM_INLINE bool fits_decay(Vec lowest_argument) {
    const __m256i limit = _mm256_castps_si256(set1(-125.0F * kCells));
    const __m256i above = _mm256_cmpgt_epi32(_mm256_castps_si256(lowest_argument), limit);
    return _mm256_testz_si256(above, above) != 0;
  }

  static VSSM_INLINE float first(Vec x) { return _mm256_cvtss_f32(x); }
  /// False for a NaN.
  static VSSM_INLINE bool all_equal(Vec a, Vec b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)) == 0xFF;
  }

  /// False for a NaN, too.
  static VSSM_INLINE bool none_above_zero(Vec x) {
    return _mm256_movemask_ps(_mm256_cmp_ps(x, set1(0.0F), _CMP_LE_OQ)) == 0xFF;
  }

  struct Decay {
    Vec c0 = load(kC0), c1 = load(kC1), c2 = load(kC2), c3 = load(kC3);

    /// 2^(span a / 8) for an argument in [-125 octaves, 0], as in the AVX-512 file: the conversion
    /// to an integer cuts towards zero, which is up here, and its low three bits choose the cubic.
    VSSM_INLINE Vec fast(Vec span, Vec a) const {
      const Vec x = _mm256_mul_ps(span, a);
      const __m256i cell = _mm256_cvttps_epi32(x);
      const Vec r = _mm256_sub_ps(x, _mm256_cvtepi32_ps(cell));
      Vec p = fma(_mm256_permutevar8x32_ps(c3, cell), r, _mm256_permutevar8x32_ps(c2, cell));
      p = fma(p, r, _mm256_permutevar8x32_ps(c1, cell));
      p = fma(p, r, _mm256_permutevar8x32_ps(c0, cell));
      return _mm256_castsi256_ps(
          _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(cell, 20)));
    }

    /// 2^(span a octave) for any argument: 0 and inf at the ends, NaN stays NaN.
    static VSSM_INLINE Vec any(Vec span, Vec a, float octave) {
      constexpr float kP[] = {1.0F,           0.693147182F,   0.240226462F,  0.0555032864F,
                              0.00961848907F, 0.00133999309F, 0.00015345811F};
      Vec x = span * a * set1(octave);
      x = _mm256_min_ps(set1(250.0F), _mm256_max_ps(set1(-250.0F), x));
      const Vec n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const Vec r = x - n;
      Vec p = set1(kP[6]);
      for (int i = 5; i >= 0; --i) p = fma(p, r, set1(kP[i]));
      // Two factors: 2^n itself may lie outside the exponents of a float.
      const __m256i whole = _mm256_cvtps_epi32(n);
      const __m256i half = _mm256_srai_epi32(whole, 1);
      return p * power(half) * power(_mm256_sub_epi32(whole, half));
    }

    static VSSM_INLINE Vec power(__m256i n) {
      return _mm256_castsi256_ps(
          _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    }
  };

  /// FTZ and DAZ while it lives.
  struct FlushDenormals {
    unsigned saved = _mm_getcsr();
    VSSM_INLINE FlushDenormals() { _mm_setcsr(saved | 0x8040U); }
    VSSM_INLINE ~FlushDenormals() { _mm_setcsr(saved); }
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;
  };
};

}  // namespace

const CpuKernels kAvx2Kernels = {
    "avx2",
    scan_part<Avx2>,
    scan_unit<Avx2>,
    backward_unit<Avx2>,
    conv_token<Avx2>,
    conv_tiles<Avx2>,
    conv_token_backward<Avx2>,
    widen<Avx2>,
    decay_values<Avx2>,
    softplus_values<Avx2>,
    decay_rounds<Avx2>,
    product_rounds<Avx2>,
    softplus_rounds<Avx2>,
};

}  // namespace vssm
