// Loads and stores of parts of rows of any dtype and stride.
#pragma once

#include "simd.hpp"

namespace fastokd {
namespace FASTOKD_ISA {

// As many 16-bit values as a float vector has lanes.
typedef uint16_t Short __attribute__((vector_size(FASTOKD_VECTOR_BYTES / 2)));
using Word = WordF;

FASTOKD_INLINE VecF from_bfloat16(Short v) { return bits<VecF>(__builtin_convertvector(v, Word) << 16); }

FASTOKD_INLINE Short to_bfloat16(VecF v) {
  const Word u = bits<Word>(v);
  const Word rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const Word nan = (u >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : nan, Short);
}

FASTOKD_INLINE VecF from_float16(Short v) {
  const Word u = __builtin_convertvector(v, Word);
  // Shifted into a float's fields the exponent is 112 too small; the product also normalizes float16's subnormals.
  const VecF scaled = bits<VecF>((u & 0x7fffu) << 13) * 0x1p112f;
  const Word special = (Word)(scaled >= 0x1p16f) & 0x7f800000u;
  return bits<VecF>(bits<Word>(scaled) | special | (u & 0x8000u) << 16);
}

FASTOKD_INLINE Short to_float16(VecF v) {
  const Word u = bits<Word>(v);
  const Word magnitude = u & 0x7fffffffu;
  const Word normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 lines a subnormal's bits up with the end of the significand and rounds it.
  const Word subnormal = bits<Word>(bits<VecF>(magnitude) + 0.5f) - bits<Word>(VecF{} + 0.5f);
  const Word infinite = magnitude > 0x7f800000u ? Word{} + 0x7e00u : Word{} + 0x7c00u;
  const Word half = magnitude >= (143u << 23) ? infinite : magnitude < (113u << 23) ? subnormal : normal;
  return __builtin_convertvector(half | (u & 0x80000000u) >> 16, Short);
}

template <int dtype>
struct Element;
template <>
struct Element<FASTOKD_FLOAT32> {
  using Type = float;
};
template <>
struct Element<FASTOKD_FLOAT64> {
  using Type = double;
};
template <>
struct Element<FASTOKD_BFLOAT16> {
  using Type = uint16_t;
};
template <>
struct Element<FASTOKD_FLOAT16> {
  using Type = uint16_t;
};

template <int dtype>
FASTOKD_INLINE double to_real(typename Element<dtype>::Type value) {
  if constexpr (dtype == FASTOKD_FLOAT32 || dtype == FASTOKD_FLOAT64) {
    return value;
  } else {
    Short v{};
    v[0] = value;
    return (dtype == FASTOKD_BFLOAT16 ? from_bfloat16(v) : from_float16(v))[0];
  }
}

template <int dtype>
FASTOKD_INLINE typename Element<dtype>::Type from_real(double value) {
  if constexpr (dtype == FASTOKD_FLOAT32 || dtype == FASTOKD_FLOAT64) {
    return static_cast<typename Element<dtype>::Type>(value);
  } else {
    VecF v{};
    v[0] = static_cast<float>(value);
    return (dtype == FASTOKD_BFLOAT16 ? to_bfloat16(v) : to_float16(v))[0];
  }
}

// One vector from contiguous values; other pairs of types are converted value by value.
template <int dtype, class Real>
FASTOKD_INLINE typename Lanes<Real>::Vec load_vector(const typename Element<dtype>::Type* from) {
  if constexpr (sizeof(typename Element<dtype>::Type) == sizeof(Real)) {
    return *reinterpret_cast<const typename Lanes<Real>::Loose*>(from);
  } else if constexpr (sizeof(Real) == 4 && dtype != FASTOKD_FLOAT64) {
    Short v;
    memcpy(&v, from, sizeof v);
    return dtype == FASTOKD_BFLOAT16 ? from_bfloat16(v) : from_float16(v);
  } else {
    typename Lanes<Real>::Vec v;
    for (int i = 0; i < Lanes<Real>::width; ++i) v[i] = static_cast<Real>(to_real<dtype>(from[i]));
    return v;
  }
}

template <int dtype, class Real>
FASTOKD_INLINE void store_vector(typename Element<dtype>::Type* to, typename Lanes<Real>::Vec v) {
  if constexpr (sizeof(typename Element<dtype>::Type) == sizeof(Real)) {
    *reinterpret_cast<typename Lanes<Real>::Loose*>(to) = v;
  } else if constexpr (sizeof(Real) == 4 && dtype != FASTOKD_FLOAT64) {
    const Short half = dtype == FASTOKD_BFLOAT16 ? to_bfloat16(v) : to_float16(v);
    memcpy(to, &half, sizeof half);
  } else {
    for (int i = 0; i < Lanes<Real>::width; ++i) to[i] = from_real<dtype>(v[i]);
  }
}

template <int dtype, class Real>
static void load_as(const fastokd_tensor& tensor, int64_t row, int64_t first, int64_t count, Real* to) {
  using Type = typename Element<dtype>::Type;
  const int64_t stride = tensor.column_stride;
  const Type* from = static_cast<const Type*>(tensor.data) + row * tensor.row_stride + first * stride;
  int64_t i = 0;
  if (stride == 1)
    for (; i + Lanes<Real>::width <= count; i += Lanes<Real>::width) store(to + i, load_vector<dtype, Real>(from + i));
  for (; i < count; ++i) to[i] = static_cast<Real>(to_real<dtype>(from[i * stride]));
}

// `count` values of a row starting at column `first`.
template <class Real>
static void load_row(const fastokd_tensor& tensor, int64_t row, int64_t first, int64_t count, Real* to) {
  switch (tensor.dtype) {
    case FASTOKD_FLOAT32: return load_as<FASTOKD_FLOAT32>(tensor, row, first, count, to);
    case FASTOKD_FLOAT64: return load_as<FASTOKD_FLOAT64>(tensor, row, first, count, to);
    case FASTOKD_BFLOAT16: return load_as<FASTOKD_BFLOAT16>(tensor, row, first, count, to);
    default: return load_as<FASTOKD_FLOAT16>(tensor, row, first, count, to);
  }
}

template <int dtype, class Real>
static void store_as(void* data, int64_t at, int64_t count, const Real* from) {
  typename Element<dtype>::Type* to = static_cast<typename Element<dtype>::Type*>(data) + at;
  int64_t i = 0;
  for (; i + Lanes<Real>::width <= count; i += Lanes<Real>::width) store_vector<dtype, Real>(to + i, load(from + i));
  for (; i < count; ++i) to[i] = from_real<dtype>(from[i]);
}

// `count` values to a contiguous array starting at element `at`; `from` is an aligned scratch row.
template <class Real>
static void store_row(void* data, int32_t dtype, int64_t at, int64_t count, const Real* from) {
  switch (dtype) {
    case FASTOKD_FLOAT32: return store_as<FASTOKD_FLOAT32>(data, at, count, from);
    case FASTOKD_FLOAT64: return store_as<FASTOKD_FLOAT64>(data, at, count, from);
    case FASTOKD_BFLOAT16: return store_as<FASTOKD_BFLOAT16>(data, at, count, from);
    default: return store_as<FASTOKD_FLOAT16>(data, at, count, from);
  }
}

}  // namespace FASTOKD_ISA
}  // namespace fastokd
