// Conversions between float32 and the halves that travel, each fused with the arithmetic beside it, for halves.py,
// which calls these functions through ctypes.
//
// All arrays belong to the caller. A function runs without Python's lock, on the calling thread. Each value of a result
// comes of the same operations in the same order, whatever the vectors' width and wherever an array begins: this has to
// be compiled without reassociation and without contraction to fused multiply-adds. The same source is compiled for
// several instruction sets; halves.py loads the best one that the machine has.

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BLOCK = 512;  // values that are worked on at a time: two arrays of them stay in the first cache

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A half is the bits that travel. `narrow` rounds to nearest, ties to even.
struct BFloat16 {
  static constexpr float LARGEST = 0x1.FEp127f;

  static float widened(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

  static uint16_t narrowed(float value) {
    const uint32_t bits = bits_of(value), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7FC0 : rounded);
  }
};

struct Float16 {
  static constexpr float LARGEST = 65504.0f;

#ifdef __F16C__
  static float widened(uint16_t half) { return _cvtsh_ss(half); }
  static uint16_t narrowed(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
  static float widened(uint16_t half) {
    const uint32_t magnitude = half & 0x7FFF, sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const float normal = float_of((magnitude << 13) + (224u << 23)) * 0x1p-112f;  // inf and nan as well
    const float subnormal = float_of(bits_of(0.5f) | magnitude) - 0.5f;           // 0.5 has the steps of subnormals
    return float_of(bits_of(magnitude < 0x400 ? subnormal : normal) | sign);
  }

  static uint16_t narrowed(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
    const int32_t magnitude = static_cast<int32_t>(bits & 0x7FFFFFFF);
    const int32_t subnormal = static_cast<int32_t>(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
    const int32_t normal = (magnitude - (112 << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    int32_t half = magnitude < 113 << 23 ? subnormal : normal;
    half = magnitude < 143 << 23 ? half : 0x7C00;
    half = magnitude > 255 << 23 ? 0x7E00 : half;
    return static_cast<uint16_t>(static_cast<uint32_t>(half) | sign);
  }
#endif
};

template <typename Half>
void widen(const uint16_t* __restrict halves, float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = Half::widened(halves[i]);
}

template <typename Half>
void narrow(const float* __restrict values, uint16_t* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = Half::narrowed(values[i]);
}

#ifdef __F16C__  // which compilers do not vectorise by themselves
template <>
void widen<Float16>(const uint16_t* __restrict halves, float* __restrict out, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(eight));
  }
  for (; i < count; ++i) out[i] = Float16::widened(halves[i]);
}

template <>
void narrow<Float16>(const float* __restrict values, uint16_t* __restrict out, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), eight);
  }
  for (; i < count; ++i) out[i] = Float16::narrowed(values[i]);
}
#endif

template <typename Half>
void narrow_distance(const float* snapshot, const float* reference, uint16_t* out, int64_t numel) {
  float distance[BLOCK];
  for (int64_t start = 0; start < numel; start += BLOCK) {
    const int64_t count = std::min(BLOCK, numel - start);
    for (int64_t i = 0; i < count; ++i) {
      const float value = snapshot[start + i], known = reference[start + i];
      const float exact = value == known ? 0.0f : value - known;  // comparisons let nan through
      const float above = -Half::LARGEST > exact ? -Half::LARGEST : exact;
      const float below = Half::LARGEST < above ? Half::LARGEST : above;
      distance[i] = value == known ? below : below + (value - value);  // nan, not the largest, for infinity
    }
    narrow<Half>(distance, out + start, count);
  }
}

template <typename Half>
void mean_of_rows(const uint16_t* rows, int64_t num_rows, const double* weights, double total, uint16_t* out,
                  int64_t length) {
  float wide[BLOCK], sum[BLOCK];
  for (int64_t start = 0; start < length; start += BLOCK) {
    const int64_t count = std::min(BLOCK, length - start);
    bool first = true;
    for (int64_t row = 0; row < num_rows; ++row) {
      const float weight = static_cast<float>(weights[row]);
      if (weights[row] == 0) continue;  // it may hold anything, nan as well
      widen<Half>(rows + row * length + start, wide, count);
      if (first) {
        for (int64_t i = 0; i < count; ++i) sum[i] = weight * wide[i];
      } else {
        for (int64_t i = 0; i < count; ++i) sum[i] += weight * wide[i];
      }
      first = false;
    }
    const float divisor = static_cast<float>(total);
    for (int64_t i = 0; i < count; ++i) sum[i] /= divisor;
    narrow<Half>(sum, out + start, count);
  }
}

template <typename Half>
void add_widened(float* reference, const uint16_t* values, int64_t numel) {
  float wide[BLOCK];
  for (int64_t start = 0; start < numel; start += BLOCK) {
    const int64_t count = std::min(BLOCK, numel - start);
    widen<Half>(values + start, wide, count);
    for (int64_t i = 0; i < count; ++i) reference[start + i] += wide[i];
  }
}

}  // namespace

extern "C" {

// `bfloat16` says which halves: those, or float16.

void shadow_narrow_distance(const float* snapshot, const float* reference, uint16_t* out, int64_t numel,
                            int64_t bfloat16) {
  (bfloat16 ? narrow_distance<BFloat16> : narrow_distance<Float16>)(snapshot, reference, out, numel);
}

// `rows` is [num_rows, length]; `total` is the sum of the weights, of which one at least is not 0.
void shadow_mean_of_rows(const uint16_t* rows, int64_t num_rows, const double* weights, double total, uint16_t* out,
                         int64_t length, int64_t bfloat16) {
  (bfloat16 ? mean_of_rows<BFloat16> : mean_of_rows<Float16>)(rows, num_rows, weights, total, out, length);
}

void shadow_add_widened(float* reference, const uint16_t* values, int64_t numel, int64_t bfloat16) {
  (bfloat16 ? add_widened<BFloat16> : add_widened<Float16>)(reference, values, numel);
}

}  // extern "C"
