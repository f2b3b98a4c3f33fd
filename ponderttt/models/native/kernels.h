/* What the sources share: see each for what it does. */
#pragma once

#include <stdint.h>

void ponderttt_product(const float *x, long x_stride, long rows, const uint8_t *codes, long in,
                       long out, long group, long bits, const float *bias, float *panels, float *y,
                       long threads);
void ponderttt_add_rms_norm(const float *x, long x_stride, const float *delta, long delta_stride,
                            long rows, long width, const float *weight, float eps, float *sum,
                            float *normed, long threads);
void ponderttt_rms_norm_back(const float *x, long rows, long width, const float *weight, float eps,
                             const float *at_x, long at_x_stride, const float *at_normed,
                             long at_normed_stride, float *gradient, long threads);
void ponderttt_silu_gate(const float *gate, long gate_stride, const float *up, long up_stride,
                         long rows, long width, float *y, long threads);
void ponderttt_silu_gate_back(const float *gate, long gate_stride, const float *up, long up_stride,
                              const float *at_y, long at_y_stride, long rows, long width,
                              float *at_gate, float *at_up, long threads);
void ponderttt_rotate(float *x, long x_stride, long rows, long turning, const float *cos,
                      const float *sin, long threads);
void ponderttt_attend(const float *q, long q_stride, const float *new_keys, long k_stride,
                      const float *new_values, long v_stride, float *const *keys,
                      float *const *values, const long *head_strides, const long *first,
                      const long *last, long sequences, long kv_heads, long group, float scale,
                      float *out, long threads);
