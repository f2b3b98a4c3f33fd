/* What the sources share: see each for what it does. */
#pragma once

#include <stdint.h>

void ponderttt_product(const float *x, long x_stride, long rows, const uint8_t *codes, long in,
                       long out, long group, long bits, const float *bias, float *panels, float *y,
                       long threads);
void ponderttt_add_rms_norm(const float *x, long x_stride, const float *delta, long delta_stride,
                            long rows, long width, const float *weight, float eps, float *sum,
                            float *normed);
void ponderttt_silu_gate(const float *gate, long gate_stride, const float *up, long up_stride,
                         long rows, long width, float *y, long threads);
void ponderttt_rotate(float *x, long x_stride, long rows, long turning, const float *cos,
                      const float *sin);
void ponderttt_attend(const float *q, long q_stride, const float *new_keys, long k_stride,
                      const float *new_values, long v_stride, float *const *keys,
                      float *const *values, const long *head_strides, const long *first,
                      const long *last, long sequences, long kv_heads, long group, float scale,
                      float *out, long threads);
