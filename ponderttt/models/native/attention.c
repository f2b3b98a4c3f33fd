/* Attention of one new position of each of several sequences over its own past. */
#include <omp.h>
#include <string.h>

#include "kernels.h"
#include "lanes.h"

#define PAST 128 /* positions at a time */
#define MOST_HEADS 8
#define VECTORS 4 /* of a head */

static const vi evens = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
static const vi odds = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

/* Lane i of the result is the sum of vector i. */
INLINE vf sums(vf *v) {
    UNROLL
    for (int n = 8; n; n /= 2) {
        UNROLL
        for (int i = 0; i < n; i++)
            v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], evens) +
                   __builtin_shuffle(v[2 * i], v[2 * i + 1], odds);
    }
    return v[0];
}

INLINE float largest(vf x) {
    float found = x[0];
    for (int i = 1; i < LANES; i++)
        found = x[i] > found ? x[i] : found;
    return found;
}

/* One head group: q [heads, 64] over keys and values [length, 64] → out. */
INLINE void attend(const int heads, const float *q, const float *keys, const float *values,
                   long length, float scale, float *out) {
    const long size = VECTORS * LANES;
    vf sum[MOST_HEADS * VECTORS];
    float top[MOST_HEADS], total[MOST_HEADS], weights[MOST_HEADS][PAST];
    for (int i = 0; i < heads * VECTORS; i++)
        sum[i] = (vf){0};
    for (int h = 0; h < heads; h++)
        top[h] = -__builtin_inff(), total[h] = 0;
    for (long from = 0; from < length; from += PAST) {
        const long count = length - from < PAST ? length - from : PAST;
        for (int h = 0; h < heads; h++) {
            vf query[VECTORS], most = (vf){0} - __builtin_inff(), all = {0};
            UNROLL
            for (int d = 0; d < VECTORS; d++)
                query[d] = *(const vf *)(q + h * size + d * LANES) * scale;
            for (long j = 0; j < count; j += LANES) {
                const float *row = keys + (from + j) * size;
                vf dots[LANES], score;
                if (count - j >= LANES) {
                    UNROLL
                    for (int i = 0; i < LANES; i++) {
                        dots[i] = query[0] * *(const vf *)(row + i * size);
                        UNROLL
                        for (int d = 1; d < VECTORS; d++)
                            dots[i] += query[d] * *(const vf *)(row + i * size + d * LANES);
                    }
                    score = sums(dots);
                } else {
                    for (int i = 0; i < LANES; i++) {
                        dots[i] = (vf){0};
                        for (int d = 0; d < VECTORS && i < count - j; d++)
                            dots[i] += query[d] * *(const vf *)(row + i * size + d * LANES);
                    }
                    score = sums(dots);
                    for (int i = count - j; i < LANES; i++)
                        score[i] = -__builtin_inff();
                }
                most = choose(score > most, score, most);
                *(vf *)(weights[h] + j) = score;
            }
            const float before = top[h], now = largest(most);
            if (now > before)
                top[h] = now;
            for (long j = 0; j < count; j += LANES) {
                vf score = *(const vf *)(weights[h] + j);
                vf weight = exponential(score - top[h]);
                /* Positions beyond the last; NaN and overflow stay what they are. */
                weight = choose(score == (vf){0} - __builtin_inff(), (vf){0}, weight);
                *(vf *)(weights[h] + j) = weight;
                all += weight;
            }
            if (from && now > before) {
                const float fade = exponential((vf){0} + (before - now))[0];
                total[h] *= fade;
                for (int d = 0; d < VECTORS; d++)
                    sum[h * VECTORS + d] *= fade;
            }
            for (int i = 0; i < LANES; i++)
                total[h] += all[i];
        }
        vf part[MOST_HEADS * VECTORS]; /* in registers, where the shape is known */
        UNROLL
        for (int i = 0; i < heads * VECTORS; i++)
            part[i] = sum[i];
        for (long j = 0; j < count; j++) {
            const float *row = values + (from + j) * size;
            UNROLL
            for (int d = 0; d < VECTORS; d++) {
                const vf value = *(const vf *)(row + d * LANES);
                UNROLL
                for (int h = 0; h < heads; h++)
                    part[h * VECTORS + d] += value * weights[h][j];
            }
        }
        UNROLL
        for (int i = 0; i < heads * VECTORS; i++)
            sum[i] = part[i];
    }
    for (int h = 0; h < heads; h++)
        for (int d = 0; d < VECTORS; d++)
            *(vf *)(out + h * size + d * LANES) = sum[h * VECTORS + d] / total[h];
}

#define SHAPE(heads)                                                                               \
    static void attend_##heads(const float *q, const float *k, const float *v, long n,             \
                               float scale, float *out) {                                          \
        attend(heads, q, k, v, n, scale, out);                                                     \
    }
SHAPE(1)
SHAPE(2)
SHAPE(3)
SHAPE(4)
SHAPE(5)
SHAPE(6)
SHAPE(7)
SHAPE(8)

typedef void (*Shape)(const float *, const float *, const float *, long, float, float *);
static const Shape shapes[MOST_HEADS + 1] = {0,        attend_1, attend_2, attend_3, attend_4,
                                             attend_5, attend_6, attend_7, attend_8};

/* Store each sequence's new key and value at its last position, then attend.
 *
 * q [sequences, kv_heads * group, size], new_keys and new_values [sequences, kv_heads, size], each
 * with a stride from sequence to sequence; keys and values: of each sequence a pointer to
 * [kv_heads, capacity, 64], whose heads are head_strides[s] floats apart; the positions first[s] …
 * last[s] are seen. out [sequences, kv_heads * group, size]. */
void ponderttt_attend(const float *q, long q_stride, const float *new_keys, long k_stride,
                      const float *new_values, long v_stride, float *const *keys,
                      float *const *values, const long *head_strides, const long *first,
                      const long *last, long sequences, long kv_heads, long group, float scale,
                      float *out, long threads) {
    const long size = 4 * LANES;
    /* A group reads its keys once; but few groups leave threads idle. */
    const long parts =
        sequences * kv_heads >= 4 * threads || kv_heads * sequences % threads == 0 ? 1 : group;
    const int heads = group / parts;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (long s = 0; s < sequences; s++)
        for (long h = 0; h < kv_heads; h++) {
            const long at = h * head_strides[s] + last[s] * size;
            memcpy(keys[s] + at, new_keys + s * k_stride + h * size, size * sizeof(float));
            memcpy(values[s] + at, new_values + s * v_stride + h * size, size * sizeof(float));
        }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long task = 0; task < sequences * kv_heads * parts; task++) {
        const long part = task % parts, h = task / parts % kv_heads, s = task / parts / kv_heads;
        const long head = (h * group + part * heads) * size;
        const long at = h * head_strides[s] + first[s] * size, length = last[s] + 1 - first[s];
        const float *query = q + s * q_stride + head, *k = keys[s] + at, *v = values[s] + at;
        float *to = out + s * kv_heads * group * size + head;
        shapes[heads](query, k, v, length, scale, to);
    }
}
