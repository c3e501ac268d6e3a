/* An adaptive model of the bits of a mask, and a binary arithmetic coder; `mask_reference.py` says what they compute. */

#ifndef FL_SIM_MASK_MODEL_H
#define FL_SIM_MASK_MODEL_H
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { INPUTS = 4, SETS = 80, MOST_SEEN = 255, HEAVIEST = 1 << 20, SPAN = 3072, STEPS = 4096, NEW = 6, LEVELS = 16, FIRST_WEIGHT = 20000,
       FIRST_RATIO = 512, LEARN = 13 };
enum { JOINT = LEVELS * LEVELS, NEAR = 256, PATTERN = 512, BESIDE = 256 };

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
    /* Shared by all tensors, relative to the logits `live_base` and `bit_base` of the tensor at hand. */
    Slot joint[JOINT], near[NEAR], pattern[PATTERN], beside[BESIDE];
    int32_t live_base, bit_base;
    int64_t ratio; /* 256 times the set bits of a kernel over its odds of having any, of the tensors so far */
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
    for (int n = 0; n <= MOST_SEEN; n++)
        model->rates[n] = 131072 / (2 * n + 3);
    for (int s = 0; s < SETS; s++)
        for (int i = 0; i < INPUTS; i++)
            model->weights[s][i] = FIRST_WEIGHT;
    Slot *const tables[] = {model->joint, model->near, model->pattern, model->beside};
    const int sizes[] = {JOINT, NEAR, PATTERN, BESIDE};
    for (int t = 0; t < 4; t++)
        for (int i = 0; i < sizes[t]; i++)
            tables[t][i] = (Slot){32768, NEW};
    model->live_base = model->bit_base = 0;
    model->ratio = FIRST_RATIO;
}

static inline int32_t within(int64_t logit) { return (int32_t)(logit < -SPAN ? -SPAN : logit > SPAN ? SPAN : logit); }

/* Move probabilities that were learnt around one base to another. */
static void carry(const Model *model, Slot *slots, int count, int32_t by)
{
    for (int i = 0; i < count; i++)
        slots[i].set = model->squash[within(model->stretch[slots[i].set >> 4] + by) + SPAN];
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

/* How far the logit of a probability is from the base. */
static inline int32_t apart(const Model *model, const Slot *slot, int32_t base) { return model->stretch[slot->set >> 4] - base; }

/* Code one bit, given four probabilities of it, and adapt them and the weights of their mix. The first two are given as
   `inputs` too. */
static inline int mixed_bit(const Model *model, Coder *coder, Slot *const *used, int32_t *inputs, int32_t *weights, int32_t base,
                            int bit)
{
    int64_t sum = (int64_t)base * 65536;
    for (int i = 2; i < INPUTS; i++)
        inputs[i] = apart(model, used[i], base);
    for (int i = 0; i < INPUTS; i++)
        sum += (int64_t)weights[i] * inputs[i];
    const uint32_t set = model->squash[within(sum >> 16) + SPAN];
    bit = code_bit(coder, set, bit);
    const int32_t error = bit * 65536 - (int32_t)set, sure = -bit & 65535;
    for (int i = 0; i < INPUTS; i++) {
        const int32_t moved = weights[i] + (inputs[i] * error >> LEARN);
        weights[i] = moved < -HEAVIEST ? -HEAVIEST : moved > HEAVIEST ? HEAVIEST : moved;
        used[i]->set = (uint16_t)(used[i]->set + ((sure - used[i]->set) * model->rates[used[i]->seen] >> 16));
        used[i]->seen += used[i]->seen < MOST_SEEN;
    }
    return bit;
}

/* Such a distance in steps of half a logit. */
static inline int level(int32_t distance)
{
    const int32_t steps = (distance >> 7) + LEVELS / 2;
    return steps < 0 ? 0 : steps >= LEVELS ? LEVELS - 1 : steps;
}

static inline int most(int number, int limit) { return number < limit ? number : limit; }

/* Bits of a kernel of which at least one is set; how many are. */
static int code_kernel(Model *model, Coder *coder, uint8_t *bits, int kernel, const uint8_t *above, const uint8_t *left,
                       Slot *row, Slot *channel, int neighbours)
{
    int found = 0, last = 0;
    for (int k = 0; k < kernel; k++) {
        if (!found && k == kernel - 1) {
            bits[k] = 1;
            return 1;
        }
        const int some = most(found, 3), beside = (above && above[k]) * 2 + (left && left[k]);
        Slot *const used[INPUTS] = {row + (found > 0), channel + (found > 0), model->pattern + (1 << most(k, 8) | last),
                                    model->beside + (beside * 16 + neighbours) * 4 + some};
        int32_t inputs[INPUTS] = {apart(model, used[0], model->bit_base), apart(model, used[1], model->bit_base)};
        const int bit = mixed_bit(model, coder, used, inputs, model->weights[16 + some * 16 + most(k, 15)], model->bit_base, bits[k]);
        bits[k] = (uint8_t)bit;
        found += bit;
        last = (last | bit << most(k, 8)) & 0xFF; /* of kernels of more than 8 elements the first 8 */
    }
    return found;
}

/* Code the bits of one tensor, which are 0 where nothing was decoded yet; how many kernels are live. `slots` has room for
   `stride` of each row and channel, `counts` for each channel and one more, all 0. */
static int64_t code_tensor(Model *model, Coder *coder, uint8_t *bits, Slot *slots, int stride, uint8_t *counts,
                           const int64_t *shape, int64_t left)
{
    const int64_t rows = shape[0], channels = shape[1], kernel = shape[2];
    const int32_t base = model->live_base;
    Slot *const first_channel = slots + stride * rows, *row = slots;
    int64_t live = 0;
    for (int64_t r = 0; r < rows; r++, row += stride) {
        Slot *channel = first_channel;
        /* Set bits, at most 3, of the kernels to the left and of those above. `counts` holds those of this row up to here. */
        int beside = 0, before = 0, over = counts[0];
        for (int64_t c = 0; c < channels; c++, channel += stride, bits += kernel) {
            const int ahead = counts[c + 1], near = (beside * 4 + over) * 16 + before * 4 + ahead;
            int32_t inputs[INPUTS] = {apart(model, row, base), apart(model, channel, base)};
            Slot *const joint = model->joint + level(inputs[0]) * LEVELS + level(inputs[1]);
            Slot *const used[INPUTS] = {row, channel, joint, model->near + near};
            int found = 0;
            for (int64_t k = 0; k < kernel; k++)
                found |= bits[k];
            found = mixed_bit(model, coder, used, inputs, model->weights[beside * 4 + over], base, found);
            live += found;
            if (found && kernel > 1)
                found = code_kernel(model, coder, bits, (int)kernel, r ? bits - channels * kernel : NULL,
                                    c ? bits - kernel : NULL, row + 1, channel + 1, over * 4 + beside);
            else
                bits[0] = (uint8_t)found;
            before = beside;
            beside = most(found, 3);
            over = ahead;
            counts[c] = (uint8_t)beside;
            left -= found;
            if (!left || coder->short_of)
                return live;
        }
    }
    return live;
}

static int32_t logit(const Model *model, int64_t set) { return model->stretch[(set < 8 ? 8 : set > 65528 ? 65528 : set) >> 4]; }

/* Turn the model to a tensor: what share of its kernels is probably live, and what share of a live kernel's bits is set. */
static void turn(Model *model, int64_t kernels, int64_t kernel, int64_t ones)
{
    const int64_t live = kernel > 1 ? 16777216 * ones / (256 * ones + model->ratio * kernels) : 65536 * ones / kernels;
    const int32_t live_base = logit(model, live);
    const int32_t bit_base = kernel > 1 ? logit(model, 65536 * ones / (1 + live * kernels / 65536) / kernel) : model->bit_base;
    carry(model, model->joint, JOINT, live_base - model->live_base);
    carry(model, model->near, NEAR, live_base - model->live_base);
    carry(model, model->pattern, PATTERN, bit_base - model->bit_base);
    carry(model, model->beside, BESIDE, bit_base - model->bit_base);
    model->live_base = live_base;
    model->bit_base = bit_base;
}

/* Code all tensors that are neither empty nor full; -1 where bytes run out, -2 without memory. */
static int code_mask(Model *model, Coder *coder, uint8_t *bits)
{
    model_start(model);
    for (Py_ssize_t t = 0; t < model->tensors; t++) {
        const int64_t *shape = model->shapes + 3 * t, ones = model->ones[t], kernels = shape[0] * shape[1];
        if (ones > 0 && ones < kernels * shape[2]) {
            const int stride = shape[2] > 1 ? 3 : 1;
            const size_t lines = (size_t)stride * (size_t)(shape[0] + shape[1]);
            Slot *slots = malloc(lines * sizeof *slots);
            uint8_t *counts = calloc((size_t)shape[1] + 1, 1);
            int64_t live = 0;
            if (slots && counts) {
                turn(model, kernels, shape[2], ones);
                for (size_t i = 0; i < lines; i++) {
                    const int32_t base = i % (size_t)stride ? model->bit_base : model->live_base;
                    slots[i] = (Slot){model->squash[base + SPAN], NEW};
                }
                live = code_tensor(model, coder, bits, slots, stride, counts, shape, ones);
            }
            const int wrong = !slots || !counts ? -2 : coder->short_of ? -1 : 0;
            free(slots);
            free(counts);
            if (wrong)
                return wrong;
            if (stride > 1)
                model->ratio = (model->ratio + 256 * ones * (kernels - live) / (kernels * (live ? live : 1)) + 1) / 2;
        }
        bits += kernels * shape[2];
    }
    return 0;
}
#endif
