#include <omp.h>

#include "kernels.h"
#include "lanes.h"

/* Products with a matrix in codes.
 *
 * The matrix [out, in] lies in blocks of 16 outputs, a block in groups of `group` inputs. A group
 * has 16 scales, then (4 bits) 16 offsets, then its codes: 4 bits, two inputs in a byte, low one
 * first, 16 outputs side by side; or 8 bits, signed. weight = scale * code + offset.
 *
 * Every output of every row adds up its products in the order of the inputs, whatever the tile, so
 * a row's result does not depend on the rows beside it. */

typedef struct {
    const uint8_t *codes;
    const float *bias; /* [out] or NULL */
    long in, out, group;
} Matrix;

INLINE long group_bytes(const int bits, long group) {
    return LANES * (bits == 4 ? 8 : 4) + group * LANES * bits / 8;
}

/* Rows in a panel [in, rows], outputs of `blocks` blocks from `first` on. */
INLINE void tile(const int bits, const int rows, const int blocks, const Matrix *w, long first,
                 const float *panel, float *y, long stride) {
    vf sum[SUMS]; /* rows * blocks at most */
    const uint8_t *at[4];
    const long step = group_bytes(bits, w->group);
    UNROLL
    for (int b = 0; b < blocks; b++) {
        at[b] = w->codes + (first + b) * (w->in / w->group) * step;
        UNROLL
        for (int r = 0; r < rows; r++)
            sum[r * blocks + b] = (vf){0};
    }
    for (long g = 0; g < w->in; g += w->group) {
        vf scale[4], offset[4];
        UNROLL
        for (int b = 0; b < blocks; b++) {
            scale[b] = *(const vf *)at[b];
            if (bits == 4)
                offset[b] = *(const vf *)(at[b] + 4 * LANES);
        }
        const long head = LANES * (bits == 4 ? 8 : 4);
        for (long k = 0; k < w->group; k += 2) {
            const float *x = panel + (g + k) * rows;
            vf even[4], odd[4];
            UNROLL
            for (int b = 0; b < blocks; b++) {
                const uint8_t *codes = at[b] + head + k * LANES * bits / 8;
                if (bits == 4) {
                    vi both = widen_unsigned(codes);
                    even[b] = __builtin_convertvector(both & 15, vf) * scale[b] + offset[b];
                    odd[b] = __builtin_convertvector(both >> 4, vf) * scale[b] + offset[b];
                } else {
                    vi low = widen_signed(codes);
                    vi high = widen_signed(codes + LANES);
                    even[b] = __builtin_convertvector(low, vf) * scale[b];
                    odd[b] = __builtin_convertvector(high, vf) * scale[b];
                }
            }
            UNROLL
            for (int i = 0; i < rows * blocks; i++)
                sum[i] += even[i % blocks] * x[i / blocks];
            UNROLL
            for (int i = 0; i < rows * blocks; i++)
                sum[i] += odd[i % blocks] * x[rows + i / blocks];
        }
        UNROLL
        for (int b = 0; b < blocks; b++)
            at[b] += step;
    }
    UNROLL
    for (int b = 0; b < blocks; b++) {
        const long column = (first + b) * LANES;
        UNROLL
        for (int r = 0; r < rows; r++) {
            vf found = sum[r * blocks + b];
            if (w->bias)
                found += *(const vf *)(w->bias + column);
            *(vf *)(y + r * stride + column) = found;
        }
    }
}

/* All blocks of a range for one panel: as many blocks at a time as there are registers for. */
#define RANGE(bits, rows, most)                                                                    \
    static void range_##bits##_##rows(const Matrix *w, long first, long last, const float *panel,  \
                                      float *y, long stride) {                                     \
        long b = first;                                                                            \
        for (; b + most <= last; b += most)                                                        \
            tile(bits, rows, most, w, b, panel, y, stride);                                        \
        for (; b < last; b++)                                                                      \
            tile(bits, rows, 1, w, b, panel, y, stride);                                           \
    }

RANGE(4, 4, SUMS / 4)
RANGE(4, 2, SUMS / 4)
RANGE(4, 1, SUMS / 4)
RANGE(8, 4, SUMS / 4)
RANGE(8, 2, SUMS / 4)
RANGE(8, 1, SUMS / 4)
#if SUMS == 16
RANGE(4, 16, 1)
RANGE(4, 8, 2)
RANGE(8, 16, 1)
RANGE(8, 8, 2)
#endif

typedef void (*Range)(const Matrix *, long, long, const float *, float *, long);
/* By the bits, and the logarithm of the rows. */
static const Range ranges[2][5] = {
    {range_4_1, range_4_2, range_4_4,
#if SUMS == 16
     range_4_8, range_4_16
#endif
    },
    {range_8_1, range_8_2, range_8_4,
#if SUMS == 16
     range_8_8, range_8_16
#endif
    },
};
#define LARGEST (SUMS == 16 ? 4 : 2)

/* y [rows, out] = x [rows, in] times the matrix, plus bias [out] or NULL. `panels` has room for x.
 */
void ponderttt_product(const float *x, long x_stride, long rows, const uint8_t *codes, long in,
                       long out, long group, long bits, const float *bias, float *panels, float *y,
                       long threads) {
    const Matrix w = {codes, bias, in, out, group};
    const long blocks = out / LANES;
#pragma omp parallel num_threads(threads)
    {
        const long me = omp_get_thread_num(), all = omp_get_num_threads();
        /* Each panel's rows beside one another, input by input. */
#pragma omp for schedule(static)
        for (long k0 = 0; k0 < in; k0 += 32) {
            const long k1 = k0 + 32 < in ? k0 + 32 : in;
            for (long r = 0, size = 1 << LARGEST; r < rows; r += size) {
                while (size > rows - r)
                    size /= 2;
                float *panel = panels + r * in;
                for (long k = k0; k < k1; k++)
                    for (long i = 0; i < size; i++)
                        panel[k * size + i] = x[(r + i) * x_stride + k];
            }
        }
        /* A block's codes stay in the nearest cache while all panels pass. */
        const long first = blocks * me / all, last = blocks * (me + 1) / all;
        for (long b = first; b < last; b += 4) {
            const long end = b + 4 < last ? b + 4 : last;
            for (long r = 0, size = 1 << LARGEST, log = LARGEST; r < rows; r += size) {
                while (size > rows - r)
                    size /= 2, log--;
                ranges[bits == 8][log](&w, b, end, panels + r * in, y + r * out, out);
            }
        }
    }
}
