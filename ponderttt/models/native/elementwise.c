/* What lies between a step's products: small enough that calls cost more than arithmetic. */
#include <math.h>
#include <omp.h>

#include "kernels.h"
#include "lanes.h"

/* sum [rows, width] = x + delta, and normed = sum / sqrt(mean(sum^2) + eps) * weight; width a
 * multiple of 16. */
void ponderttt_add_rms_norm(const float *x, long x_stride, const float *delta, long delta_stride,
                            long rows, long width, const float *weight, float eps, float *sum,
                            float *normed) {
    for (long r = 0; r < rows; r++, x += x_stride, delta += delta_stride) {
        vf squares = {0};
        for (long k = 0; k < width; k += LANES) {
            const vf v = *(const vf *)(x + k) + *(const vf *)(delta + k);
            *(vf *)(sum + k) = v;
            squares += v * v;
        }
        const float factor = 1 / sqrtf(sum_lanes(squares) / width + eps);
        for (long k = 0; k < width; k += LANES)
            *(vf *)(normed + k) = *(vf *)(sum + k) * factor * *(const vf *)(weight + k);
        sum += width;
        normed += width;
    }
}

/* y [rows, width] = silu(gate) * up, each [rows, width] with a stride of its own. */
void ponderttt_silu_gate(const float *gate, long gate_stride, const float *up, long up_stride,
                         long rows, long width, float *y, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
    for (long r = 0; r < rows; r++)
        for (long k = 0; k < width; k += LANES) {
            const vf g = *(const vf *)(gate + r * gate_stride + k);
            /* exponential() takes what is not positive: the sigmoid from its far side. */
            const vf e = exponential(choose(g > 0, -g, g));
            const vf sigmoid = choose(g > 0, (vf){0} + 1, e) / (e + 1);
            *(vf *)(y + r * width + k) = g * sigmoid * *(const vf *)(up + r * up_stride + k);
        }
}

/* Rotate the first `turning` heads of each row in place; a head's halves turn into one another.
 * cos, sin [rows, 64]: both halves, the sine with the sign of the half that it falls on. */
void ponderttt_rotate(float *x, long x_stride, long rows, long turning, const float *cos,
                      const float *sin) {
    enum { SIZE = 64, HALF = 32 };
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < turning; h++) {
            float *head = x + r * x_stride + h * SIZE;
            const float *c = cos + r * SIZE, *s = sin + r * SIZE;
            for (long k = 0; k < HALF; k += LANES) {
                const vf low = *(const vf *)(head + k), high = *(const vf *)(head + HALF + k);
                *(vf *)(head + k) = low * *(const vf *)(c + k) + high * *(const vf *)(s + k);
                *(vf *)(head + HALF + k) =
                    high * *(const vf *)(c + HALF + k) + low * *(const vf *)(s + HALF + k);
            }
        }
}
