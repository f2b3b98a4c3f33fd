/* 16 floats at a time, in GNU C: the compiler makes of a vector what the machine has. */
#pragma once

#include <stdint.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

/* Vectors of sums that fit the registers, beside what else is in them. */
#ifdef __AVX512F__
#define SUMS 16
#else
#define SUMS 4
#endif

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint8_t vb __attribute__((vector_size(LANES), aligned(1)));
typedef int8_t vc __attribute__((vector_size(LANES), aligned(1)));

/* 16 bytes as 16 integers; compilers make a poor job of it. */
INLINE vi widen_unsigned(const uint8_t *at) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at));
#elif defined(__AVX2__)
    union {
        __m256i half[2];
        vi whole;
    } found;
    found.half[0] = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at));
    found.half[1] = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(at + 8)));
    return found.whole;
#else
    return __builtin_convertvector(*(const vb *)at, vi);
#endif
}

INLINE vi widen_signed(const uint8_t *at) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at));
#elif defined(__AVX2__)
    union {
        __m256i half[2];
        vi whole;
    } found;
    found.half[0] = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at));
    found.half[1] = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(at + 8)));
    return found.whole;
#else
    return __builtin_convertvector(*(const vc *)at, vi);
#endif
}

/* Lane by lane: yes where the mask is set, else no. */
INLINE vf choose(vi which, vf yes, vf no) { return (vf)((which & (vi)yes) | (~which & (vi)no)); }

/* exp(x) for x <= 0 or NaN, to about two units in the last place (Cephes' expf). */
INLINE vf exponential(vf x) {
    const vf least = (vf){0} - 87.0f;
    const vf given = x;
    x = choose(x > least, x, least);
    const vf magic = (vf){0} + 12582912.0f; /* rounds to an integer */
    vf n = x * 1.44269504f + magic;
    vi power = (vi)n - (vi)magic;
    n -= magic;
    vf r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return choose(given == given, (vf)((vi)p + (power << 23)), given);
}

INLINE float sum_lanes(vf x) {
    float found = 0;
    for (int i = 0; i < LANES; i++)
        found += x[i];
    return found;
}
