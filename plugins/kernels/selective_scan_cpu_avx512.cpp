// AVX-512 (F, BW, DQ, VL): 16 channels in a vector, up to 16 states in registers.
#include <immintrin.h>

#include "plugins/kernels/cpu_pieces.h"
#include "plugins/kernels/selective_scan_cpu_impl.h"

namespace vssm {
namespace {

// 2^(n / 16 + r / 16) for r in (-1, 0] as a cubic in r, one per n mod 16; minimax fits of
// 2^(i / 16 + r / 16), i = 0, -15, ..., -1, with C0 less i / 32 (see Decay::fast).
alignas(64) const float kC0[16] = {
    1.0F,         0.990887105F, 0.982754052F, 0.975644469F, 0.969603717F, 0.964679062F,
    0.960919917F, 0.958377898F, 0.957106888F, 0.957163155F, 0.958605528F, 0.961495221F,
    0.965896487F, 0.971876144F, 0.979504108F, 0.988853276F,
};
alignas(64) const float kC1[16] = {
    0.0433216952F, 0.0226234477F, 0.0236247424F, 0.0246703662F, 0.0257622842F, 0.0269025471F,
    0.0280932914F, 0.0293367561F, 0.0306352731F, 0.0319912806F, 0.0334073231F, 0.0348860584F,
    0.0364302658F, 0.0380428396F, 0.0397268087F, 0.041485332F,
};
alignas(64) const float kC2[16] = {
    0.000938303419F, 0.000499489252F, 0.000520718051F, 0.000542886788F,
    0.000566036964F, 0.000590212119F, 0.000615457597F, 0.000641820778F,
    0.000669351139F, 0.000698100426F, 0.000728122483F, 0.000759473769F,
    0.000792213134F, 0.000826401927F, 0.000862104411F, 0.000899387582F,
};
// The cubic term of the first cell for all: exact where a decay is near 1.
constexpr float kC3 = 1.33329522e-05F;

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kVectorsAtOnce = 1;
  static constexpr int kStateVectors = 16;
  static constexpr float kCells = 16.0F;

  static constexpr bool kMasked = true;

  /// The channels of a unit that exist.
  struct Part {
    int64_t width;
    __mmask16 mask;
    explicit VSSM_INLINE Part(int64_t rest)
        : width(rest < kChannels ? rest : kChannels),
          mask(static_cast<__mmask16>((1U << width) - 1U)) {}
  };

  static VSSM_INLINE Vec load(const float* p, const Part& part) {
    return _mm512_maskz_loadu_ps(part.mask, p);
  }
  static VSSM_INLINE void store(float* p, const Part& part, Vec x) {
    _mm512_mask_storeu_ps(p, part.mask, x);
  }
  static VSSM_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static VSSM_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
  static VSSM_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
  /// The same, but the compiler does not know the value, so it keeps the register.
  static VSSM_INLINE Vec opaque(float x) {
    Vec y = set1(x);
    __asm__("" : "+v"(y));
    return y;
  }
  static VSSM_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static VSSM_INLINE Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
  // Both keep a NaN in the second operand.
  static VSSM_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static VSSM_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static VSSM_INLINE Vec negative_abs(Vec x) { return _mm512_or_ps(x, set1(-0.0F)); }

  /// p 2^n, where t = n + 1.5 * 2^23.
  static VSSM_INLINE Vec add_exponent(Vec p, Vec t) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
  }

  static VSSM_INLINE Vec load_float16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static VSSM_INLINE Vec load_bfloat16(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static VSSM_INLINE void store_float16(uint16_t* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static VSSM_INLINE void store_bfloat16(uint16_t* p, Vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(32767)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i safe = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(1 << 22));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16)));
  }

  /// Whether Decay::fast holds for arguments down to this lowest one: all in [-125 octaves, -0].
  /// As integers the bits of negative floats count up from those of -0; positive ones and NaN are
  /// above them all, so one comparison tells.
  static VSSM_INLINE bool fits_decay(Vec lowest_argument) {
    const __m512i limit = _mm512_castps_si512(set1(-125.0F * kCells));
    return _mm512_cmple_epi32_mask(_mm512_castps_si512(lowest_argument), limit) == 0xFFFF;
  }

  /// False for a NaN, too.
  static VSSM_INLINE bool none_above_zero(Vec x) {
    return _mm512_cmp_ps_mask(x, set1(0.0F), _CMP_LE_OQ) == 0xFFFF;
  }

  struct Decay {
    Vec c0 = load(kC0), c1 = load(kC1), c2 = load(kC2);

    /// 2^(span a / 16) for an argument in [-125 octaves, 0].
    /// t rounds it up to n sixteenths; the low four bits of t choose the cubic p, and adding 2^19 n
    /// to the bits of p gives 2^(n / 16 + r / 16): p lies in [1/2, 1], where bits are linear in the
    /// value, so the i / 32 taken from C0 is what those low bits of n add too much.
    /// Measured on Zen 5, which issues four of these operations a cycle but only two of them
    /// multiplications: 17.0 G/s alone and 0.226 ms for a Vim-T layer. The others: one table times
    /// a common cubic 17.9 G/s and 0.233 ms; the argument rounded by additions alone 14.3 G/s and
    /// 0.240 ms; vreduceps, a quintic and vscalefps 15.2 G/s and 12 % slower in the scan.
    /// Interleaving 2, 4 or 8 states in the source changed nothing.
    VSSM_INLINE Vec fast(Vec span, Vec a) const {
      const Vec magic = set1(12582912.0F);
      const Vec t =
          _mm512_fmadd_round_ps(span, a, magic, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
      const Vec r = _mm512_fmsub_ps(span, a, t - magic);
      const __m512i cell = _mm512_castps_si512(t);
      Vec p = fma(set1(kC3), r, _mm512_permutexvar_ps(cell, c2));
      p = fma(p, r, _mm512_permutexvar_ps(cell, c1));
      p = fma(p, r, _mm512_permutexvar_ps(cell, c0));
      return _mm512_castsi512_ps(
          _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(cell, 19)));
    }

    /// The same for any argument: 0 and inf at the ends, NaN stays NaN.
    static VSSM_INLINE Vec any(Vec span, Vec a) {
      constexpr float kP[] = {1.0F,           0.693147182F,   0.240226462F,  0.0555032864F,
                              0.00961848907F, 0.00133999309F, 0.00015345811F};
      Vec x = span * a * set1(1.0F / kCells);
      x = _mm512_min_ps(set1(1000.0F), _mm512_max_ps(set1(-1000.0F), x));
      const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const Vec r = x - n;
      Vec p = set1(kP[6]);
      for (int i = 5; i >= 0; --i) p = fma(p, r, set1(kP[i]));
      return _mm512_scalef_ps(p, n);
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

const CpuKernels kAvx512Kernels = {
    "avx512",
    scan_unit<Avx512>,
    widen<Avx512>,
    decay_values<Avx512>,
    softplus_values<Avx512>,
    decay_rounds<Avx512>,
};

}  // namespace vssm
