/* What lies between products. Of a decode step it is so little that calls cost more than
 * arithmetic; of the many rows of a text or a write, each is gone through once. */
#include <math.h>
#include <omp.h>

#include "kernels.h"
#include "lanes.h"

/* Fewer rows are done sooner than other threads have begun. */
#define MANY 64

/* sum [rows, width] = x + delta, and normed = sum / sqrt(mean(sum^2) + eps) * weight; width a
 * multiple of 16. */
void ponderttt_add_rms_norm(const float *x, long x_stride, const float *delta, long delta_stride,
                            long rows, long width, const float *weight, float eps, float *sum,
                            float *normed, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows >= MANY)
    for (long r = 0; r < rows; r++) {
        const float *one = x + r * x_stride, *other = delta + r * delta_stride;
        float *total = sum + r * width, *result = normed + r * width;
        vf squares = {0};
        for (long k = 0; k < width; k += LANES) {
            const vf v = *(const vf *)(one + k) + *(const vf *)(other + k);
            *(vf *)(total + k) = v;
            squares += v * v;
        }
        const float factor = 1 / sqrtf(sum_lanes(squares) / width + eps);
        for (long k = 0; k < width; k += LANES)
            *(vf *)(result + k) = *(vf *)(total + k) * factor * *(const vf *)(weight + k);
    }
}

/* The gradient of x [rows, width], of which at_x is that by other ways and at_normed that of its
 * norm, as above: f (w g) - x f^3 mean(w g x), where f is the factor of a row. */
void ponderttt_rms_norm_back(const float *x, long rows, long width, const float *weight, float eps,
                             const float *at_x, long at_x_stride, const float *at_normed,
                             long at_normed_stride, float *gradient, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows >= MANY)
    for (long r = 0; r < rows; r++) {
        const float *row = x + r * width, *direct = at_x + r * at_x_stride;
        const float *at = at_normed + r * at_normed_stride;
        vf squares = {0}, products = {0};
        for (long k = 0; k < width; k += LANES) {
            const vf v = *(const vf *)(row + k);
            squares += v * v;
            products += v * *(const vf *)(at + k) * *(const vf *)(weight + k);
        }
        const float factor = 1 / sqrtf(sum_lanes(squares) / width + eps);
        const float along = factor * factor * factor * sum_lanes(products) / width;
        for (long k = 0; k < width; k += LANES)
            *(vf *)(gradient + r * width + k) =
                *(const vf *)(direct + k) +
                factor * *(const vf *)(at + k) * *(const vf *)(weight + k) -
                along * *(const vf *)(row + k);
    }
}

INLINE vf sigmoid(vf x) {
    /* exponential() takes what is not positive: from the far side of zero. */
    const vf e = exponential(choose(x > 0, -x, x));
    return choose(x > 0, (vf){0} + 1, e) / (e + 1);
}

/* y [rows, width] = silu(gate) * up, each [rows, width] with a stride of its own. */
void ponderttt_silu_gate(const float *gate, long gate_stride, const float *up, long up_stride,
                         long rows, long width, float *y, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
    for (long r = 0; r < rows; r++)
        for (long k = 0; k < width; k += LANES) {
            const vf g = *(const vf *)(gate + r * gate_stride + k);
            *(vf *)(y + r * width + k) = g * sigmoid(g) * *(const vf *)(up + r * up_stride + k);
        }
}

/* The gradients of gate and up, each [rows, width] in rows of 2 width, from that of y. */
void ponderttt_silu_gate_back(const float *gate, long gate_stride, const float *up, long up_stride,
                              const float *at_y, long at_y_stride, long rows, long width,
                              float *at_gate, float *at_up, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
    for (long r = 0; r < rows; r++)
        for (long k = 0; k < width; k += LANES) {
            const vf g = *(const vf *)(gate + r * gate_stride + k), s = sigmoid(g);
            const vf u = *(const vf *)(up + r * up_stride + k);
            const vf at = *(const vf *)(at_y + r * at_y_stride + k);
            *(vf *)(at_gate + 2 * r * width + k) = at * u * s * (1 + g * (1 - s));
            *(vf *)(at_up + 2 * r * width + k) = at * g * s;
        }
}

/* Rotate the first `turning` heads of each row in place; a head's halves turn into one another.
 * cos, sin [rows, 64]: both halves, the sine with the sign of the half that it falls on. */
void ponderttt_rotate(float *x, long x_stride, long rows, long turning, const float *cos,
                      const float *sin, long threads) {
    enum { SIZE = 64, HALF = 32 };
#pragma omp parallel for num_threads(threads) schedule(static) if (rows >= MANY)
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
