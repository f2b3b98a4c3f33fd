/* From float weights back to the codes that they were decoded from. */
#include <math.h>
#include <omp.h>

#include "lanes.h"

#define MOST_GROUP 32

/* What decoding in float32 may have rounded, as a share of a group's largest weight: 2^-22. */
#define ROUNDING 2.384185791015625e-07f

/* Codes of one group at a given scale: whether all weights are met, exactly or to rounding. */
static int try_scale(const float *v, long group, int bits, float scale, float offset, float slack,
                     int32_t *codes) {
    const float least = bits == 4 ? 0 : -127, most = bits == 4 ? 15 : 127;
    for (long k = 0; k < group; k++) {
        const float code = scale == 0 ? 0 : rintf((v[k] - offset) / scale);
        /* A scale that rounding has halved, near the end of half precision, asks for more. */
        if (!(code >= least && code <= most))
            return 0;
        codes[k] = (int32_t)code;
        if (!(fabsf(scale * code + offset - v[k]) <= slack))
            return 0;
    }
    return 1;
}

/* Rounded to half precision; gcc has a type for that from version 12 on. */
static float to_half(float x) {
#ifdef __F16C__
    return _cvtsh_ss(_cvtss_sh(x, 0));
#else
    return (float)(_Float16)x;
#endif
}

/* The scale is the range over a whole number of steps; half precision keeps most formats' exactly.
 */
static int fit(const float *v, long group, int bits, float *scale, float *offset, int32_t *codes) {
    float low = v[0], high = v[0];
    for (long k = 1; k < group; k++) {
        low = v[k] < low ? v[k] : low;
        high = v[k] > high ? v[k] : high;
    }
    const float most = -low > high ? -low : high;
    if (!(most < INFINITY))
        return 0;
    const float range = bits == 4 ? high - low : most;
    *offset = bits == 4 ? low : 0;
    /* 4 bits: Q4_1, Q4_K. 8 bits: Q5_0 and Q8_0, then what is left of Q6_K. */
    static const int likely[] = {16, 127};
    const int first = bits == 4 ? 0 : -2;
    for (int i = first; i < (bits == 4 ? 15 : 32); i++) {
        const float steps = i < 0 ? likely[i + 2] : (bits == 4 ? 15 : 32) - i;
        const float found = range / steps, rounded = to_half(found);
        *scale = rounded;
        if (try_scale(v, group, bits, rounded, *offset, 0, codes))
            return 1;
        *scale = found;
        if (try_scale(v, group, bits, found, *offset, most * ROUNDING, codes))
            return 1;
    }
    return 0;
}

/* Weights [out, in] as codes in the layout of products.c. Returns 1, or 0 where some group doesn't
 * fit. */
long ponderttt_encode(const float *weights, long out, long in, long group, long bits,
                      uint8_t *codes, long threads) {
    const long head = LANES * (bits == 4 ? 8 : 4), step = head + group * LANES * bits / 8;
    long failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long b = 0; b < out / LANES; b++)
        for (long g = 0; g < in / group; g++) {
            long gone;
#pragma omp atomic read
            gone = failed;
            if (gone)
                continue;
            uint8_t *to = codes + (b * (in / group) + g) * step;
            float *scales = (float *)to, *offsets = scales + LANES;
            for (long lane = 0; lane < LANES; lane++) {
                int32_t found[MOST_GROUP];
                float scale, offset;
                const float *v = weights + (b * LANES + lane) * in + g * group;
                if (!fit(v, group, bits, &scale, &offset, found)) {
#pragma omp atomic write
                    failed = 1;
                    break;
                }
                scales[lane] = scale;
                if (bits == 4)
                    offsets[lane] = offset;
                for (long k = 0; k < group; k++) {
                    if (bits == 8)
                        to[head + k * LANES + lane] = (uint8_t)(int8_t)found[k];
                    else if (k % 2)
                        to[head + k / 2 * LANES + lane] |= (uint8_t)(found[k] << 4);
                    else
                        to[head + k / 2 * LANES + lane] = (uint8_t)found[k];
                }
            }
        }
    return !failed;
}
