// Vectors of FASTOKD_VECTOR_BYTES with the vector extensions of GCC and Clang: one source for every instruction set.
#pragma once

#include <float.h>
#include <stdint.h>
#include <string.h>

#include "program.hpp"

#define FASTOKD_INLINE static inline __attribute__((always_inline))

namespace fastokd {
namespace FASTOKD_ISA {

template <class Real>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vec __attribute__((vector_size(FASTOKD_VECTOR_BYTES)));
  typedef float Loose __attribute__((vector_size(FASTOKD_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(FASTOKD_VECTOR_BYTES)));
  typedef uint32_t Word __attribute__((vector_size(FASTOKD_VECTOR_BYTES)));
  static constexpr int width = FASTOKD_VECTOR_BYTES / 4;
  static constexpr float max = FLT_MAX;
};
template <>
struct Lanes<double> {
  typedef double Vec __attribute__((vector_size(FASTOKD_VECTOR_BYTES)));
  typedef double Loose __attribute__((vector_size(FASTOKD_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(FASTOKD_VECTOR_BYTES)));
  typedef uint64_t Word __attribute__((vector_size(FASTOKD_VECTOR_BYTES)));
  static constexpr int width = FASTOKD_VECTOR_BYTES / 8;
  static constexpr double max = DBL_MAX;
};
using VecF = Lanes<float>::Vec;
using VecD = Lanes<double>::Vec;
using IntF = Lanes<float>::Int;
using IntD = Lanes<double>::Int;
using WordF = Lanes<float>::Word;
using WordD = Lanes<double>::Word;

template <class To, class From>
FASTOKD_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class Real>
FASTOKD_INLINE typename Lanes<Real>::Vec load(const Real* from) {
  return *reinterpret_cast<const typename Lanes<Real>::Vec*>(from);
}
template <class Real>
FASTOKD_INLINE void store(Real* to, typename Lanes<Real>::Vec value) {
  *reinterpret_cast<typename Lanes<Real>::Vec*>(to) = value;
}
template <class Vec>
FASTOKD_INLINE Vec vmax(Vec a, Vec b) {
  return a > b ? a : b;
}

FASTOKD_INLINE IntF indices(float) {
  IntF index{};
  for (int i = 0; i < Lanes<float>::width; ++i) index[i] = i;
  return index;
}
FASTOKD_INLINE IntD indices(double) {
  IntD index{};
  for (int i = 0; i < Lanes<double>::width; ++i) index[i] = i;
  return index;
}

// Horizontal sum and maximum, by halves.
template <class Real, int count>
struct Halves {
  typedef Real Vec __attribute__((vector_size(count * sizeof(Real))));
  typedef Real Half __attribute__((vector_size(count / 2 * sizeof(Real))));
  static inline __attribute__((always_inline)) Real sum(const Vec& v) {
    Half low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    const Half folded = low + high;
    return Halves<Real, count / 2>::sum(folded);
  }
  static inline __attribute__((always_inline)) Real max(const Vec& v) {
    Half low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    const Half folded = low > high ? low : high;
    return Halves<Real, count / 2>::max(folded);
  }
};
template <class Real>
struct Halves<Real, 2> {
  typedef Real Vec __attribute__((vector_size(2 * sizeof(Real))));
  static inline __attribute__((always_inline)) Real sum(const Vec& v) { return v[0] + v[1]; }
  static inline __attribute__((always_inline)) Real max(const Vec& v) { return v[0] > v[1] ? v[0] : v[1]; }
};
FASTOKD_INLINE float sum(VecF v) { return Halves<float, Lanes<float>::width>::sum(v); }
FASTOKD_INLINE double sum(VecD v) { return Halves<double, Lanes<double>::width>::sum(v); }
FASTOKD_INLINE float maximum(VecF v) { return Halves<float, Lanes<float>::width>::max(v); }
FASTOKD_INLINE double maximum(VecD v) { return Halves<double, Lanes<double>::width>::max(v); }

// exp(x) = 2^n e^r with |r| <= ln2 / 2 and a minimax polynomial for (e^r - 1 - r) / r^2. For x <= 88 (709 for double)
// the relative error is below 9e-8 for float and 1.7e-16 for double, three quarters of a unit in the last place, as
// tests/test_cpu_executor.py measures. Below -86.9 (-707) the result is 0; NaN stays NaN.
FASTOKD_INLINE VecF vexp(VecF x) {
  const float magic = 0x1.8p23f;
  const VecF low = VecF{} - 86.9f;
  const WordF kept = bits<WordF>(~(x < low));
  x = x < low ? low : x;
  const VecF shifted = x * 0x1.715476p0f + magic;
  const VecF n = shifted - magic;
  const VecF r = (x - n * 0x1.63p-1f) + n * 2.12194440054690583e-4f;
  VecF p = r * 1.38145141024943655e-3f + 8.36874463058358573e-3f;
  p = p * r + 4.16683911009190748e-2f;
  p = p * r + 1.66665204031529749e-1f;
  p = p * r + 4.99999934314275017e-1f;
  p = p * (r * r) + r + 1.0f;
  const WordF scaled = bits<WordF>(p) + (bits<WordF>(shifted) << 23);
  return bits<VecF>(scaled & kept);
}
FASTOKD_INLINE VecD vexp(VecD x) {
  const double magic = 0x1.8p52;
  const VecD low = VecD{} - 707.0;
  const WordD kept = bits<WordD>(~(x < low));
  x = x < low ? low : x;
  const VecD shifted = x * 0x1.71547652b82fep0 + magic;
  const VecD n = shifted - magic;
  const VecD r = (x - n * 0x1.62e42feep-1) - n * 1.9082149292705877e-10;
  VecD p = r * 2.49999741428830039e-8 + 2.76303050997377499e-7;
  p = p * r + 2.75575869269019103e-6;
  p = p * r + 2.48014929527271164e-5;
  p = p * r + 1.98412695056571326e-4;
  p = p * r + 1.38888889437571192e-3;
  p = p * r + 8.33333333349502099e-3;
  p = p * r + 4.16666666665297384e-2;
  p = p * r + 1.66666666666664115e-1;
  p = p * r + 5.00000000000001067e-1;
  p = p * (r * r) + r + 1.0;
  const WordD scaled = bits<WordD>(p) + (bits<WordD>(shifted) << 52);
  return bits<VecD>(scaled & kept);
}

// exp(x * scale / log2(e)) for softmax sums: `scale` is log2(e) / T. One multiplication replaces vexp's exact
// reduction. Its rounding raises the relative error to 9e-8 + 6e-8 |x scale| (float), which is no more than the error
// of rounding the exponent x / T. The result is 0 where the exponent is below -126 (-1022); NaN stays NaN.
FASTOKD_INLINE VecF vexp_scaled(VecF x, float scale) {
  const float magic = 0x1.8p23f;
  const VecF shifted = x * scale + magic;
  const VecF r = x * scale - (shifted - magic);
  VecF p = r * 1.55949140878338757e-4f + 1.34067355200974488e-3f;
  p = p * r + 9.61769189136336848e-3f;
  p = p * r + 5.55031029914769141e-2f;
  p = p * r + 2.40226527906473251e-1f;
  p = p * r + 6.9314721509769515e-1f;
  p = p * r + 1.0f;
  const VecF result = bits<VecF>(bits<WordF>(p) + (bits<WordF>(shifted) << 23));
  return shifted < magic - 125.0f ? VecF{} : result;
}
FASTOKD_INLINE VecD vexp_scaled(VecD x, double scale) {
  const double magic = 0x1.8p52;
  const VecD shifted = x * scale + magic;
  const VecD r = x * scale - (shifted - magic);
  VecD p = r * 4.07814076767063632e-10 + 7.07259082471206599e-9;
  p = p * r + 1.01806502593141456e-7;
  p = p * r + 1.32154425733389963e-6;
  p = p * r + 1.52527273710559182e-5;
  p = p * r + 1.54035304417393188e-4;
  p = p * r + 1.33335581534637089e-3;
  p = p * r + 9.618129107606903e-3;
  p = p * r + 5.55041086647902521e-2;
  p = p * r + 2.40226506959100982e-1;
  p = p * r + 6.93147180559945699e-1;
  p = p * r + 1.0;
  const VecD result = bits<VecD>(bits<WordD>(p) + (bits<WordD>(shifted) << 52));
  return shifted < magic - 1021.0 ? VecD{} : result;
}

// log(x) = k ln2 + 2 atanh(s), s = (m - 1) / (m + 1), x = m 2^k with m in [sqrt(1/2), sqrt(2)), for positive normal x.
// The same error bounds. NaN stays NaN. For 0 and subnormal numbers the result is finite and near the logarithm of the
// smallest normal number.
FASTOKD_INLINE VecF vlog(VecF x) {
  const WordF offset = bits<WordF>(x) - 0x3f3504f3u;
  const VecF k = __builtin_convertvector(bits<IntF>(offset) >> 23, VecF);
  const VecF f = bits<VecF>((offset & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
  const VecF s = f / (f + 2.0f);
  const VecF z = s * s;
  const VecF tail = z * ((z * 0.149365365946786247f + 0.199887477919745441f) * z + 0.33333388358495976f);
  // 2 s = f - s f: the leading part f has no rounding error from the division.
  const VecF y = k * 0x1.63p-1f + (f - (s * (f - (tail + tail)) + k * 2.12194440054690583e-4f));
  return x == x ? y : x;
}
FASTOKD_INLINE VecD vlog(VecD x) {
  const WordD offset = bits<WordD>(x) - 0x3fe6a09e667f3bcdull;
  const double magic = 0x1.8p52;
  const VecD k = bits<VecD>((bits<IntD>(offset) >> 52) + bits<int64_t>(magic)) - magic;
  const VecD f = bits<VecD>((offset & 0xfffffffffffffull) + 0x3fe6a09e667f3bcdull) - 1.0;
  const VecD s = f / (f + 2.0);
  const VecD z = s * s;
  VecD tail = z * 0.0739875323344205832 + 0.0765695167932627499;
  tail = tail * z + 0.0909178486801732504;
  tail = tail * z + 0.111110992380218977;
  tail = tail * z + 0.142857143716311571;
  tail = tail * z + 0.199999999997055464;
  tail = z * (tail * z + 0.333333333333336745);
  const VecD y = k * 0x1.62e42feep-1 + (f - (s * (f - (tail + tail)) - k * 1.9082149292705877e-10));
  return x == x ? y : x;
}

template <int n, class Vec>
FASTOKD_INLINE Vec power(Vec x) {
  static_assert(n >= 2 && n <= 4, "the ratios of temperatures that are worth it");
  return n == 2 ? x * x : n == 3 ? x * x * x : (x * x) * (x * x);
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls body(Count<n>) for n = 0 or 2, 3, 4.
template <class Body>
FASTOKD_INLINE void with_power(int n, Body body) {
  switch (n) {
    case 2: return body(Count<2>{});
    case 3: return body(Count<3>{});
    case 4: return body(Count<4>{});
    default: return body(Count<0>{});
  }
}

}  // namespace FASTOKD_ISA
}  // namespace fastokd
