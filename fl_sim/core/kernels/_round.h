/* Integers by stochastic rounding, block by block; `rounding_reference.py` says what they are. */

#ifndef FL_SIM_ROUND_H
#define FL_SIM_ROUND_H
#include "_buffers.h"

/* Values over `unit` plus a share of 1 that `noise` draws, rounded down, cut at -top and top; 0, -1, 1, -2, .. as 0, 1, 2, 3, .. */
FOR_EACH_CPU static void round_block(const float *restrict values, const uint32_t *restrict noise, Py_ssize_t count, float unit,
                                     float top, uint8_t *restrict symbols)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        float scaled = values[i] / unit + (float)(noise[i] >> 8) * (1.0f / 16777216.0f);
        scaled = scaled < -top ? -top : scaled;
        scaled = scaled > top ? top : scaled;
        int32_t whole = (int32_t)scaled;
        whole -= (float)whole > scaled;
        symbols[i] = (uint8_t)((uint32_t)whole << 1 ^ (uint32_t)(whole >> 31));
    }
}

FOR_EACH_CPU static void scale_block(const uint8_t *restrict symbols, Py_ssize_t count, float unit, float *restrict values)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        const int32_t symbol = symbols[i]; /* no branch: signs are at random */
        values[i] = (float)(symbol >> 1 ^ -(symbol & 1)) * unit;
    }
}

FOR_EACH_CPU static int64_t total(const uint8_t *restrict numbers, Py_ssize_t count)
{
    int64_t sum = 0;
    for (Py_ssize_t i = 0; i < count; i++)
        sum += numbers[i];
    return sum;
}
#endif
