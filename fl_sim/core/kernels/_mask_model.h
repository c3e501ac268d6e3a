/* An adaptive model of the bits of a mask, and a binary arithmetic coder; `mask_reference.py` says what they compute. */

#ifndef FL_SIM_MASK_MODEL_H
#define FL_SIM_MASK_MODEL_H
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { INPUTS = 4, SETS = 8, LOCAL = 8 * 4 * 2 * 8, MOST_SEEN = 255, HEAVIEST = 1 << 20, SPAN = 3072, STEPS = 4096 };

/* A probability of 65,536 that a bit is set, and how often it was adapted. */
typedef struct {
    uint16_t set, seen;
} Slot;

typedef struct {
    const uint16_t *squash;  /* logit -SPAN..SPAN, in 1/256, to a probability */
    const int16_t *stretch;  /* probability / 16 to its logit */
    const int64_t *shapes;   /* rows, channels and kernel elements of each tensor */
    const int64_t *ones;     /* of each tensor */
    Py_ssize_t tensors;
    int32_t rates[MOST_SEEN + 1];
    int32_t weights[SETS][INPUTS];
} Model;

typedef struct {
    uint32_t low, high, code;
    const uint8_t *end;
    uint8_t *out;        /* where a coder writes; NULL for a decoder */
    const uint8_t *in;
    int short_of;        /* ran out of bytes */
} Coder;

static void model_start(Model *model)
{
    static const int32_t first[INPUTS] = {52000, 40000, 30000, 30000};
    for (int n = 0; n <= MOST_SEEN; n++)
        model->rates[n] = 131072 / (2 * n + 3);
    for (int s = 0; s < SETS; s++)
        memcpy(model->weights[s], first, sizeof first);
}

/* Code one bit that is set with probability set / 65536; returns it. */
static inline int code_bit(Coder *coder, uint32_t set, int bit)
{
    const uint32_t middle = coder->low + (uint32_t)((uint64_t)(coder->high - coder->low) * set >> 16);
    if (!coder->out)
        bit = coder->code <= middle;
    if (bit)
        coder->high = middle;
    else
        coder->low = middle + 1;
    while (!((coder->low ^ coder->high) >> 24)) {
        if (coder->out) {
            if (coder->out == coder->end)
                coder->short_of = 1;
            else
                *coder->out++ = (uint8_t)(coder->high >> 24);
        } else {
            coder->short_of |= coder->in == coder->end;
            coder->code = coder->code << 8 | (coder->in == coder->end ? 0 : *coder->in++);
        }
        coder->low <<= 8;
        coder->high = coder->high << 8 | 255;
    }
    return bit;
}

/* Bits of one tensor; `slots` has room for rows + channels + 16 kernel + LOCAL of them. */
static int code_tensor(Model *model, Coder *coder, uint8_t *bits, Slot *slots, const int64_t *shape, int64_t ones)
{
    const int64_t rows = shape[0], channels = shape[1], kernel = shape[2], width = channels * kernel, size = rows * width;
    const uint32_t share = (uint32_t)((65536 * ones + size / 2) / size);
    const Slot first = {(uint16_t)(share < 8 ? 8 : share > 65528 ? 65528 : share), 6};
    const int32_t base = model->stretch[first.set >> 4];
    Slot *row = slots, *channel = row + rows, *place = channel + channels, *local = place + 16 * kernel;
    for (Slot *slot = slots; slot < local + LOCAL; slot++)
        *slot = first;
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *above = r ? bits - width : NULL;
        int64_t before = 0, earlier = 0;
        for (int64_t c = 0; c < channels; c++) {
            int64_t here = 0, over = 0;
            for (int64_t k = 0; above && k < kernel; k++)
                over += above[k];
            const int64_t beside = before + earlier > 7 ? 7 : before + earlier;
            for (int64_t k = 0; k < kernel; k++) {
                const int64_t found = here > 3 ? 3 : here;
                const int last = (c || k) && bits[k - 1], third = k >= 3 && bits[k - 3], up = above && above[k];
                Slot *const used[INPUTS] = {row + r, channel + c, place + (k * 4 + found) * 4 + last * 2 + third,
                                            local + ((beside * 4 + found) * 2 + up) * 8 + (over > 7 ? 7 : over)};
                int32_t *const weights = model->weights[found * 2 + up];
                int32_t inputs[INPUTS];
                int64_t sum = (int64_t)base * 65536;
                for (int i = 0; i < INPUTS; i++) {
                    inputs[i] = model->stretch[used[i]->set >> 4] - base;
                    sum += (int64_t)weights[i] * inputs[i];
                }
                sum >>= 16;
                const uint32_t set = model->squash[(sum < -SPAN ? -SPAN : sum > SPAN ? SPAN : sum) + SPAN];
                const int bit = code_bit(coder, set, bits[k]);
                if (coder->short_of)
                    return -1;
                const int64_t error = (int64_t)bit * 65536 - set;
                for (int i = 0; i < INPUTS; i++) {
                    const int64_t moved = weights[i] + (inputs[i] * error >> 14);
                    weights[i] = (int32_t)(moved < -HEAVIEST ? -HEAVIEST : moved > HEAVIEST ? HEAVIEST : moved);
                    const int32_t step = ((bit ? 65535 : 0) - used[i]->set) * model->rates[used[i]->seen] >> 16;
                    used[i]->set = (uint16_t)(used[i]->set + step);
                    used[i]->seen += used[i]->seen < MOST_SEEN;
                }
                bits[k] = (uint8_t)bit;
                here += bit;
            }
            earlier = before;
            before = here;
            bits += kernel;
            above = above ? above + kernel : NULL;
        }
    }
    return 0;
}

/* Code all tensors that are neither empty nor full; -1 where bytes run out, -2 without memory. */
static int code_mask(Model *model, Coder *coder, uint8_t *bits)
{
    model_start(model);
    for (Py_ssize_t t = 0; t < model->tensors; t++) {
        const int64_t *shape = model->shapes + 3 * t, size = shape[0] * shape[1] * shape[2];
        if (model->ones[t] > 0 && model->ones[t] < size) {
            Slot *slots = malloc((size_t)(shape[0] + shape[1] + 16 * shape[2] + LOCAL) * sizeof *slots);
            const int wrong = slots ? code_tensor(model, coder, bits, slots, shape, model->ones[t]) : -2;
            free(slots);
            if (wrong)
                return wrong;
        }
        bits += size;
    }
    return 0;
}
#endif
