// AVX-512 (F, BW, DQ, VL): 16 channels in a vector, up to 16 states in registers.
#include <immintrin.h>

#include "plugins/kernels/cpu/conv_impl.h"
#include "plugins/kernels/cpu/pieces.h"
#include "plugins/kernels/cpu/scan_backward_impl.h"
#include "plugins/kernels/cpu/scan_impl.h"

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
  static VSSM_INLINE bool any_below(Vec x, float limit) {
    return _mm512_cmp_ps_mask(x, set1(limit), _CMP_LT_OQ) != 0;
  }
  /// Where x is below the limit `a`, elsewhere `b`.
  static VSSM_INLINE Vec below(Vec x, float limit, Vec a, Vec b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, set1(limit), _CMP_LT_OQ), b, a);
  }

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

  /// Of two spans the one that is further from what fits_decay takes times a negative number: as
  /// integers without a sign the bits of floats count up from 0 over inf and NaN to the negative.
  static VSSM_INLINE Vec max_bits(Vec a, Vec b) {
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }

  /// Whether Decay::fast holds for arguments down to this lowest one: all in [-125 octaves, -0].
  /// As integers the bits of negative floats count up from those of -0; positive ones and NaN are
  /// above them all, so one comparison tells.
  static VSSM_INLINE bool fits_decay(Vec lowest_argument) {
    const __m512i limit = _mm512_castps_si512(set1(-125.0F * kCells));
    return _mm512_cmple_epi32_mask(_mm512_castps_si512(lowest_argument), limit) == 0xFFFF;
  }

  static VSSM_INLINE float first(Vec x) { return _mm512_cvtss_f32(x); }
  /// False for a NaN.
  static VSSM_INLINE bool all_equal(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) == 0xFFFF;
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
    /// Interleaving 2, 4 or 8 states in the source changed nothing. A Xeon (Sapphire Rapids) has
    /// two ports for all of these operations: there one table times a common cubic, an operation
    /// less, is 12 % faster alone and 5 % in the scan; states in memory or in tiles of 4 or 8: no
    /// change.
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

    /// 2^(span a octave) for any argument: 0 and inf at the ends, NaN stays NaN.
    static VSSM_INLINE Vec any(Vec span, Vec a, float octave) {
      constexpr float kP[] = {1.0F,           0.693147182F,   0.240226462F,  0.0555032864F,
                              0.00961848907F, 0.00133999309F, 0.00015345811F};
      Vec x = span * a * set1(octave);
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

// For e^x: 2^(i / 32), less i 2^18 in its bits (see Avx512Functions::exp).
alignas(64) const float kPower[32] = {
    1.0F,        0.9953236F,  0.99088687F, 0.98669523F, 0.9827539F, 0.9790684F, 0.9756443F,
    0.97248745F, 0.96960354F, 0.9669987F,  0.9646789F,  0.9626505F, 0.9609198F, 0.95949334F,
    0.9583778F,  0.95758F,    0.95710677F, 0.9569654F,  0.9571631F, 0.9577072F, 0.9586054F,
    0.95986545F, 0.96149516F, 0.96350276F, 0.9658964F,  0.9686847F, 0.9718761F, 0.97547954F,
    0.97950405F, 0.98395884F, 0.9888533F,  0.9941971F,
};
// log1p(i w + r) as a cubic in r, w = 33 / 1024: minimax fits for |r| <= w / 2, of the relative
// error where that matters (the first five), the first one exact at 0.
alignas(64) const float kLog0[32] = {
    0.0F,        0.031718183F, 0.06246117F, 0.09228715F, 0.12124924F, 0.14939609F, 0.17677234F,
    0.20341904F, 0.2293741F,   0.2546725F,  0.27934664F, 0.30342662F, 0.32694036F, 0.34991387F,
    0.3723714F,  0.3943357F,   0.4158279F,  0.4368679F,  0.4574743F,  0.47766465F, 0.4974554F,
    0.51686203F, 0.5358993F,   0.5545808F,  0.5729197F,  0.59092844F, 0.6086185F,  0.6260011F,
    0.6430867F,  0.6598852F,   0.67640626F, 0.6926588F,
};
alignas(64) const float kLog1[32] = {
    0.99999994F, 0.9687794F,  0.9394495F, 0.91184324F, 0.8858131F,  0.8612279F,  0.83797055F,
    0.81593627F, 0.7950311F,  0.7751703F, 0.7562777F,  0.73828405F, 0.72112674F, 0.7047488F,
    0.68909824F, 0.6741277F,  0.6597938F, 0.6460568F,  0.6328801F,  0.62023014F, 0.60807604F,
    0.59638906F, 0.58514285F, 0.574313F,  0.5638766F,  0.55381286F, 0.544102F,   0.53472584F,
    0.52566737F, 0.5169107F,  0.5084409F, 0.50024426F,
};
alignas(64) const float kLog2[32] = {
    -0.49996415F, -0.4693231F,  -0.4413331F,  -0.4157739F,  -0.3923724F,  -0.3708925F,
    -0.35112932F, -0.33290476F, -0.31606314F, -0.30046797F, -0.2859992F,  -0.27255097F,
    -0.26002946F, -0.24835144F, -0.23744284F, -0.2272375F,  -0.21767624F, -0.20870599F,
    -0.20027903F, -0.19235234F, -0.1848871F,  -0.17784816F, -0.17120369F, -0.16492474F,
    -0.158985F,   -0.15336046F, -0.1480292F,  -0.14297117F, -0.13816804F, -0.13360295F,
    -0.12926042F, -0.12511787F,
};
alignas(64) const float kLog3[32] = {
    0.3273773F,   0.3040839F,   0.27681944F,  0.25299415F,  0.23188072F,  0.21295275F,  0.19616093F,
    0.18108918F,  0.16752274F,  0.15527833F,  0.14419869F,  0.13414858F,  0.12501116F,  0.11668509F,
    0.109082304F, 0.102125935F, 0.09574871F,  0.08989159F,  0.084502615F, 0.07953594F,  0.07495099F,
    0.070711784F, 0.06678634F,  0.06314615F,  0.059765782F, 0.056622446F, 0.053695735F, 0.0509673F,
    0.04842063F,  0.046040844F, 0.043814484F, 0.04220579F,
};

/// exp and softplus from tables of 32 entries: half the multiplications of the polynomials in
/// lanes.h.
struct Avx512Functions {
  using Vec = __m512;
  Vec power[2], log[4][2];
  Vec unit, magic, ln2, ln2_low, q0, q1, lowest, per_cell, cell;

  VSSM_INLINE Avx512Functions() {
    const float* const tables[] = {kLog0, kLog1, kLog2, kLog3};
    for (int half = 0; half < 2; ++half) {
      power[half] = Avx512::load(kPower + 16 * half);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) log[i][half] = Avx512::load(tables[i] + 16 * half);
    }
    unit = Avx512::opaque(46.16624F);  // 32 / ln(2)
    magic = Avx512::opaque(12582912.0F);
    ln2 = Avx512::opaque(0.021660804748535156F);  // ln(2) / 32 in two parts
    ln2_low = Avx512::opaque(4.4643961416568345e-08F);
    q0 =
        Avx512::opaque(1.0000147F);  // e^r = 1 + r (q0 + q1 r) for |r| <= ln(2) / 64, within 5.4e-8
    q1 = Avx512::opaque(0.5000049F);
    lowest = Avx512::opaque(-87.9F);  // 2^(n / 32) has an exponent of 0: a subnormal number
    per_cell = Avx512::opaque(1024.0F / 33.0F);
    cell = Avx512::opaque(33.0F / 1024.0F);
  }

  static VSSM_INLINE Vec look_up(const Vec* table, Vec index) {
    return _mm512_permutex2var_ps(table[0], _mm512_castps_si512(index), table[1]);
  }

  /// e^x for x <= 88; below -87.34 a subnormal number, which counts as 0. A NaN gives any value.
  VSSM_INLINE Vec exp(Vec x) const {
    x = _mm512_max_ps(lowest, x);
    const Vec t = _mm512_fmadd_ps(x, unit, magic);  // its low bits are n, the nearest cell
    const Vec n = t - magic;
    const Vec r = _mm512_fnmadd_ps(n, ln2_low, _mm512_fnmadd_ps(n, ln2, x));
    // 2^(n / 32): the low five bits of n choose an entry that lacks what they add to its bits.
    const Vec whole = _mm512_castsi512_ps(_mm512_add_epi32(
        _mm512_castps_si512(look_up(power, t)), _mm512_slli_epi32(_mm512_castps_si512(t), 18)));
    // Not whole + whole r (...): that product may be a denormal, which counts as zero.
    return whole * _mm512_fmadd_ps(_mm512_fmadd_ps(q1, r, q0), r, _mm512_set1_ps(1.0F));
  }

  /// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), relative error about 2e-7 for every x.
  VSSM_INLINE Vec softplus(Vec x) const {
    const Vec e = exp(Avx512::negative_abs(x));
    const Vec t = _mm512_fmadd_ps(e, per_cell, magic);
    const Vec r = _mm512_fnmadd_ps(t - magic, cell, e);
    Vec p = _mm512_fmadd_ps(look_up(log[3], t), r, look_up(log[2], t));
    p = _mm512_fmadd_ps(p, r, look_up(log[1], t));
    p = _mm512_fmadd_ps(p, r, look_up(log[0], t));
    return p + Avx512::max(_mm512_setzero_ps(), x);
  }
};

}  // namespace

template <>
struct FunctionsOf<Avx512> {
  using Type = Avx512Functions;
};

const CpuKernels kAvx512Kernels = {
    "avx512",
    scan_part<Avx512>,
    scan_unit<Avx512>,
    backward_unit<Avx512>,
    conv_token<Avx512>,
    conv_tiles<Avx512>,
    conv_token_backward<Avx512>,
    widen<Avx512>,
    decay_values<Avx512>,
    softplus_values<Avx512>,
    decay_rounds<Avx512>,
    product_rounds<Avx512>,
    softplus_rounds<Avx512>,
};

}  // namespace vssm
