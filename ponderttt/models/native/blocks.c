/* Whole transformer blocks of a decode step, so that no time goes between the kernels. */
#include <string.h>

#include "kernels.h"

enum { SIZE = 64 };

/* A matrix in codes: as the arguments of ponderttt_product. */
typedef struct {
    const uint8_t *codes;
    const float *bias;
    long in, out, group, bits;
} Coded;

typedef struct {
    const float *attention_norm, *mlp_norm;
    float attention_eps, mlp_eps;
    Coded qkv, output, up, down;
} Block;

/* Where the step's sequences have their keys and values; `keys` and `values` point to block 0. */
typedef struct {
    float *const *keys, *const *values;
    const long *layer_strides, *head_strides, *first, *last;
} Places;

static void multiply(const Coded *w, const float *x, long rows, float *panels, float *y,
                     long threads) {
    ponderttt_product(x, w->in, rows, w->codes, w->in, w->out, w->group, w->bits, w->bias, panels,
                      y, threads);
}

/* Blocks first … last - 1 over x [rows, hidden], one row of each sequence, in place.
 *
 * cos, sin [rows, 64], as of ponderttt_rotate. Room: normed and delta [rows, hidden], joined
 * [rows, heads + 2 * kv_heads, 64], attended [rows, heads, 64], wide [rows, 2 * inner], gated
 * [rows, inner], panels [rows, the widest input]. */
void ponderttt_blocks(const Block *blocks, long first, long last, const Places *places, float *x,
                      long rows, long heads, long kv_heads, const float *cos, const float *sin,
                      float scale, float *normed, float *delta, float *joined, float *attended,
                      float *wide, float *gated, float *panels, long threads) {
    const long hidden = blocks[first].qkv.in, inner = blocks[first].down.in;
    const long stride = (heads + 2 * kv_heads) * SIZE;
    float *keys[rows], *values[rows];
    memset(delta, 0, rows * hidden * sizeof(float));
    for (long layer = first; layer < last; layer++) {
        const Block *b = blocks + layer;
        ponderttt_add_rms_norm(x, hidden, delta, hidden, rows, hidden, b->attention_norm,
                               b->attention_eps, x, normed, threads);
        multiply(&b->qkv, normed, rows, panels, joined, threads);
        ponderttt_rotate(joined, stride, rows, heads + kv_heads, cos, sin, threads);
        for (long s = 0; s < rows; s++) {
            keys[s] = places->keys[s] + layer * places->layer_strides[s];
            values[s] = places->values[s] + layer * places->layer_strides[s];
        }
        const float *k = joined + heads * SIZE, *v = k + kv_heads * SIZE;
        ponderttt_attend(joined, stride, k, stride, v, stride, keys, values, places->head_strides,
                         places->first, places->last, rows, kv_heads, heads / kv_heads, scale,
                         attended, threads);
        multiply(&b->output, attended, rows, panels, delta, threads);
        ponderttt_add_rms_norm(x, hidden, delta, hidden, rows, hidden, b->mlp_norm, b->mlp_eps, x,
                               normed, threads);
        multiply(&b->up, normed, rows, panels, wide, threads);
        ponderttt_silu_gate(wide, 2 * inner, wide + inner, 2 * inner, rows, inner, gated, threads);
        multiply(&b->down, gated, rows, panels, delta, threads);
    }
    for (long i = 0; i < rows * hidden; i++)
        x[i] += delta[i];
}
