// Vectors of floats as wide as the instruction set that this file is compiled for.
//
// Compiler vectors wherever the compiler makes good code of them, intrinsics only for conversions. Everything is in an
// unnamed namespace: the same names are compiled for several instruction sets, and the linker must never merge them.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
constexpr int registers = 32;
#elif defined(__AVX2__)
constexpr int lanes = 8;
constexpr int registers = 16;
#elif defined(__aarch64__)
constexpr int lanes = 4;
constexpr int registers = 32;
#else
constexpr int lanes = 4;
constexpr int registers = 16;
#endif
constexpr int groups = lanes / 4;  // lanes come in groups of 128 bits
constexpr int vector_bytes = lanes * 4;

typedef float Floats __attribute__((vector_size(vector_bytes)));
typedef int32_t Ints __attribute__((vector_size(vector_bytes)));
typedef int8_t Bytes __attribute__((vector_size(vector_bytes)));
typedef float LooseQuad __attribute__((vector_size(16), aligned(4), may_alias));
typedef float LooseFloats __attribute__((vector_size(vector_bytes), aligned(4), may_alias));
typedef int8_t LooseBytes __attribute__((vector_size(vector_bytes), aligned(1), may_alias));
typedef int32_t LooseInt __attribute__((aligned(1), may_alias));

inline Floats load(const float* p) { return *reinterpret_cast<const LooseFloats*>(p); }
inline void store(float* p, Floats v) { *reinterpret_cast<LooseFloats*>(p) = v; }
inline Bytes load_bytes(const int8_t* p) { return *reinterpret_cast<const LooseBytes*>(p); }
inline void store_bytes(int8_t* p, Bytes v) { *reinterpret_cast<LooseBytes*>(p) = v; }
inline Floats broadcast(float x) { return x - Floats{}; }
inline Bytes broadcast_bytes(const int8_t* p) {  // four bytes again and again
  return reinterpret_cast<Bytes>(*reinterpret_cast<const LooseInt*>(p) - Ints{});
}
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline Floats load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
  // Exponent and mantissa move to their place in a float; the product repairs the exponent's bias, of subnormal numbers
  // too.
  Ints bits;
  for (int i = 0; i < lanes; ++i) bits[i] = p[i];
  const Ints magnitude = (bits & 0x7fff) << 13;
  Floats value = reinterpret_cast<Floats>(magnitude) * 0x1p112f;
  const Ints special = (bits & 0x7c00) == 0x7c00;
  value = reinterpret_cast<Floats>((special & (magnitude | 0x7f800000)) | (~special & reinterpret_cast<Ints>(value)));
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(value) | (bits & 0x8000) << 16);
#endif
}

inline Floats load_int8(const int8_t* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
  typedef int8_t Bytes __attribute__((vector_size(lanes)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Floats);
#endif
}

inline void store_half(uint16_t* p, Floats v) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#elif defined(__AVX2__)
  const __m128i half = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
#elif defined(__aarch64__)
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v)));
#else
  // Adding a float whose last bit is the half's last bit rounds to nearest even (after F. Giesen's
  // float_to_half_fast3).
  for (int i = 0; i < lanes; ++i) {
    uint32_t bits;
    const float x = v[i];
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = (bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    uint32_t half;
    if (bits >= 0x47800000) {  // 65536 and more: infinity, or not a number
      half = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
    } else if (bits < 0x38800000) {  // smaller than the smallest normal half
      float magnitude;
      std::memcpy(&magnitude, &bits, 4);
      magnitude += 0.5f;
      std::memcpy(&half, &magnitude, 4);
      half -= 0x3f000000;
    } else {
      half = (bits + 0xc8000fff + ((bits >> 13) & 1)) >> 13;
    }
    p[i] = static_cast<uint16_t>(half | sign);
  }
#endif
}

// 2^x; relative error below 1e-7 (Cephes' exp2f), 0 below -126. x <= 127.
inline Floats exp2(Floats x) {
  const Ints keep = x >= -126.0f;
  x = larger(x, broadcast(-126.0f));
  const Floats magic = broadcast(0x1.8p23f);  // adding it leaves the nearest integer in the last bits
  const Floats shifted = x + magic;
  const Floats f = x - (shifted - magic);
  Floats y = broadcast(1.535336188319500e-4f);
  y = y * f + 1.339887440266574e-3f;
  y = y * f + 9.618437357674640e-3f;
  y = y * f + 5.550332471162809e-2f;
  y = y * f + 2.402264791363012e-1f;
  y = y * f + 6.931472028550421e-1f;
  y = y * f + 1.0f;
  const Ints exponent = reinterpret_cast<Ints>(shifted) << 23;
  return reinterpret_cast<Floats>((reinterpret_cast<Ints>(y) + exponent) & keep);
}

// Lane i of the result is lane index(i) of a and b, one after the other.
template <typename Vector, typename Index, int... i>
inline Vector pick(Vector a, Vector b, Index, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, Index{}(i)...);
}
#define CRAYON_PICK(count, a, b, expression) \
  pick(a, b, [](int i) constexpr { return expression; }, std::make_integer_sequence<int, count>())

// Lane i of v[j] and lane j of v[i] change places.
inline void transpose(Floats (&v)[lanes]) {
  for (int r = 0; r < lanes; r += 4) {  // squares of four by four
    const Floats low01 = CRAYON_PICK(lanes, v[r], v[r + 1], i / 4 * 4 + i % 4 / 2 + i % 2 * lanes);
    const Floats high01 = CRAYON_PICK(lanes, v[r], v[r + 1], i / 4 * 4 + i % 4 / 2 + i % 2 * lanes + 2);
    const Floats low23 = CRAYON_PICK(lanes, v[r + 2], v[r + 3], i / 4 * 4 + i % 4 / 2 + i % 2 * lanes);
    const Floats high23 = CRAYON_PICK(lanes, v[r + 2], v[r + 3], i / 4 * 4 + i % 4 / 2 + i % 2 * lanes + 2);
    v[r] = CRAYON_PICK(lanes, low01, low23, i / 4 * 4 + i % 2 + i % 4 / 2 * lanes);
    v[r + 1] = CRAYON_PICK(lanes, low01, low23, i / 4 * 4 + i % 2 + i % 4 / 2 * lanes + 2);
    v[r + 2] = CRAYON_PICK(lanes, high01, high23, i / 4 * 4 + i % 2 + i % 4 / 2 * lanes);
    v[r + 3] = CRAYON_PICK(lanes, high01, high23, i / 4 * 4 + i % 2 + i % 4 / 2 * lanes + 2);
  }
  if constexpr (groups == 2) {
    for (int r = 0; r < 4; ++r) {
      const Floats low = CRAYON_PICK(lanes, v[r], v[r + 4], i % 4 + i / 4 * lanes);
      v[r + 4] = CRAYON_PICK(lanes, v[r], v[r + 4], i % 4 + i / 4 * lanes + 4);
      v[r] = low;
    }
  } else if constexpr (groups == 4) {
    for (int r = 0; r < 4; ++r) {
      const Floats low01 = CRAYON_PICK(lanes, v[r], v[r + 4], i % 8 + i / 8 * lanes);
      const Floats high01 = CRAYON_PICK(lanes, v[r], v[r + 4], i % 8 + i / 8 * lanes + 8);
      const Floats low23 = CRAYON_PICK(lanes, v[r + 8], v[r + 12], i % 8 + i / 8 * lanes);
      const Floats high23 = CRAYON_PICK(lanes, v[r + 8], v[r + 12], i % 8 + i / 8 * lanes + 8);
      v[r] = CRAYON_PICK(lanes, low01, low23, i % 4 + i / 4 * 8);
      v[r + 4] = CRAYON_PICK(lanes, low01, low23, i % 4 + i / 4 * 8 + 4);
      v[r + 8] = CRAYON_PICK(lanes, high01, high23, i % 4 + i / 4 * 8);
      v[r + 12] = CRAYON_PICK(lanes, high01, high23, i % 4 + i / 4 * 8 + 4);
    }
  }
}

// Lane 4 g + i of the result: the four lanes of group g of v[i], folded by an operation on vectors.
template <typename Operation>
inline Floats fold_four(const Floats (&v)[4], Operation operation) {
  const auto fold = [&](Floats a, Floats b) {
    const Floats low = CRAYON_PICK(lanes, a, b, i / 4 * 4 + i % 4 / 2 + i % 2 * lanes);
    const Floats high = CRAYON_PICK(lanes, a, b, i / 4 * 4 + i % 4 / 2 + i % 2 * lanes + 2);
    return operation(low, high);
  };
  const Floats a = fold(v[0], v[1]), b = fold(v[2], v[3]);
  const Floats low = CRAYON_PICK(lanes, a, b, i / 4 * 4 + i % 2 + i % 4 / 2 * lanes);
  const Floats high = CRAYON_PICK(lanes, a, b, i / 4 * 4 + i % 2 + i % 4 / 2 * lanes + 2);
  return operation(low, high);
}

// Group g of the result: the groups of v[g], folded.
template <typename Operation>
inline Floats fold_groups(Floats (&v)[groups], Operation operation) {
  for (int n = groups; n > 1; n /= 2) {
    for (int g = 0; g < n / 2; ++g) {
      const Floats even = CRAYON_PICK(lanes, v[2 * g], v[2 * g + 1], i / 4 * 8 + i % 4);
      const Floats odd = CRAYON_PICK(lanes, v[2 * g], v[2 * g + 1], i / 4 * 8 + i % 4 + 4);
      v[g] = operation(even, odd);
    }
  }
  return v[0];
}

// Lane i of the result: the lanes of v[i], folded.
template <typename Operation>
inline Floats fold_each(const Floats* v, Operation operation) {
  Floats folded[groups];
  for (int g = 0; g < groups; ++g) {
    folded[g] = fold_four({v[4 * g], v[4 * g + 1], v[4 * g + 2], v[4 * g + 3]}, operation);
  }
  return fold_groups(folded, operation);
}
constexpr auto plus = [](Floats a, Floats b) { return a + b; };
inline Floats sum_each(const Floats* v) { return fold_each(v, plus); }
inline Floats largest_each(const Floats* v) {
  return fold_each(v, [](Floats a, Floats b) { return larger(a, b); });
}

// The largest and the sum of a vector's lanes.
template <typename Operation>
inline float fold(Floats v, Operation operation) {
  if constexpr (lanes >= 16) v = operation(v, CRAYON_PICK(lanes, v, v, (i + 8) % lanes));
  if constexpr (lanes >= 8) v = operation(v, CRAYON_PICK(lanes, v, v, (i + 4) % lanes));
  v = operation(v, CRAYON_PICK(lanes, v, v, (i + 2) % lanes));
  v = operation(v, CRAYON_PICK(lanes, v, v, (i + 1) % lanes));
  return v[0];
}
inline float largest_of(Floats v) {
  return fold(v, [](Floats a, Floats b) { return larger(a, b); });
}
inline float sum(Floats v) { return fold(v, plus); }

// Instructions that add four products of bytes to each lane.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
#define CRAYON_DOT 1

#if defined(__ARM_FEATURE_DOTPROD)
constexpr int unsigned_offset = 0;
#else
constexpr int unsigned_offset = 128;
#endif

// The bytes as `dot` wants its first operand to be: plus `unsigned_offset`.
inline Bytes as_first(Bytes v) { return v ^ static_cast<int8_t>(unsigned_offset); }

// x86 takes the bytes of `first` as unsigned, aarch64 as signed: 0..127 mean the same to both.
inline Ints dot(Ints sums, Bytes first, Bytes second) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sums, first, second);
#elif defined(__AVX512VNNI__) && defined(__AVX512F__)
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(first),
                                                    reinterpret_cast<__m512i>(second)));
#else
  return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sums), reinterpret_cast<__m256i>(first), reinterpret_cast<__m256i>(second)));
#endif
}

// Bytes of four rows: those of one column become one lane. Lane 4 g + i of v[j] is then column 16 g + 4 j + i.
inline void interleave(Bytes (&v)[4]) {
  const Bytes low01 = CRAYON_PICK(vector_bytes, v[0], v[1], i / 16 * 16 + i % 16 / 2 + i % 2 * vector_bytes);
  const Bytes high01 = CRAYON_PICK(vector_bytes, v[0], v[1], i / 16 * 16 + i % 16 / 2 + i % 2 * vector_bytes + 8);
  const Bytes low23 = CRAYON_PICK(vector_bytes, v[2], v[3], i / 16 * 16 + i % 16 / 2 + i % 2 * vector_bytes);
  const Bytes high23 = CRAYON_PICK(vector_bytes, v[2], v[3], i / 16 * 16 + i % 16 / 2 + i % 2 * vector_bytes + 8);
#define CRAYON_PAIRS(a, b, from) \
  CRAYON_PICK(vector_bytes, a, b, i / 16 * 16 + i % 16 / 4 * 2 + i % 2 + i % 4 / 2 * vector_bytes + from)
  v[0] = CRAYON_PAIRS(low01, low23, 0);
  v[1] = CRAYON_PAIRS(low01, low23, 8);
  v[2] = CRAYON_PAIRS(high01, high23, 0);
  v[3] = CRAYON_PAIRS(high01, high23, 8);
#undef CRAYON_PAIRS
}

// Whole numbers 0..2^22 of floats, to nearest.
inline Ints to_ints(Floats v) {
  const Floats magic = broadcast(0x1.8p23f);
  return reinterpret_cast<Ints>(v + magic) - reinterpret_cast<Ints>(magic);
}

typedef int8_t NarrowBytes __attribute__((vector_size(lanes)));
inline void store_narrow(int8_t* p, Ints v) {
  const NarrowBytes bytes = __builtin_convertvector(v, NarrowBytes);
  std::memcpy(p, &bytes, sizeof bytes);
}
#endif

}  // namespace
