/* Floats as changes of the floats that a receiver holds; `change_reference.py` says what the loops compute. */

#ifndef FL_SIM_CHANGE_H
#define FL_SIM_CHANGE_H
#include "_buffers.h"

enum { SAME = 0, BELOW = 1, FIRST = 2, WHOLE = 255, BINS = WHOLE - FIRST, KEY_SHIFT = 48, FINITE = 0x7FF0, OTHER_ZERO = 0x7FFF,
       MANTISSA = 23, COARSE = 12, FAR = 8 };
#define SIGN 0x80000000u

static inline double real(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t in_order(uint32_t bits) { return bits & SIGN ? ~bits : bits | SIGN; }
static inline uint32_t from_order(uint32_t number) { return number & SIGN ? number ^ SIGN : ~number; }

/* The first float that is not below x, by its number in the order of floats. Between the smallest normal numbers there is
   one border only, so that processors which flush subnormal numbers to zero agree with those that do not. */
static inline uint32_t not_below(double x)
{
    const float near = (float)x;
    uint32_t bits;
    memcpy(&bits, &near, 4);
    const uint32_t number = in_order(bits) + ((double)near < x), tiny = x > 0 ? 0x80800000u : 0x7F800000u;
    return x < 0x1p-126 && x > -0x1p-126 ? tiny : number;
}

/* Where the bin of a symbol starts: changes of (lowest + symbol - FIRST) in units of the key. */
static inline double border(uint32_t symbol, int32_t lowest, int shift)
{
    const uint64_t bits = symbol < FIRST ? 0 : (uint64_t)(uint32_t)(lowest + (int32_t)symbol - FIRST) << (KEY_SHIFT + shift);
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

/* The held float as the loops see it: mirrored where the change is negative, subnormal numbers as zero. */
static inline double held(uint32_t base, uint32_t mirror)
{
    return real((base & 0x7F800000u ? base : base & SIGN) ^ mirror);
}

static inline int bits_of(uint32_t number) { return number ? 32 - __builtin_clz(number) : 0; }

FOR_EACH_CPU static void find_keys(const uint32_t *restrict values, const uint32_t *restrict base, Py_ssize_t count,
                                   uint16_t *restrict keys)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        const double change = real(values[i]) - real(base[i]);
        uint64_t bits;
        memcpy(&bits, &change, 8);
        const uint32_t key = (uint32_t)(bits >> KEY_SHIFT) & 0x7FFF, other = key ? key : OTHER_ZERO;
        keys[i] = (uint16_t)(values[i] == base[i] ? 0 : other);
    }
}

FOR_EACH_CPU static void cut(const uint32_t *restrict values, const uint32_t *restrict base, const uint16_t *restrict keys,
                             Py_ssize_t count, int32_t lowest, int shift, uint8_t *restrict symbols, uint8_t *restrict signs,
                             uint8_t *restrict widths, uint32_t *restrict extra)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        const int32_t bin = (keys[i] >> shift) - lowest;
        const uint32_t symbol = !keys[i] ? SAME : bin < 0 ? BELOW : bin >= BINS ? WHOLE : (uint32_t)bin + FIRST;
        const uint32_t mirror = real(values[i]) < real(base[i]) ? SIGN : 0;
        const double from = held(base[i], mirror);
        const uint32_t first = not_below(from + border(symbol, lowest, shift));
        const uint32_t span = not_below(from + border(symbol + 1, lowest, shift)) - first;
        const uint32_t place = in_order(values[i] ^ mirror) - first;
        const uint32_t sent = symbol == SAME ? SAME : symbol == WHOLE || place >= span ? WHOLE : symbol;
        symbols[i] = (uint8_t)sent;
        signs[i] = (uint8_t)(sent == SAME || sent == WHOLE ? 0 : mirror >> 31);
        widths[i] = (uint8_t)(sent == SAME ? 0 : sent == WHOLE ? 32 : bits_of(span - 1));
        extra[i] = sent == SAME ? 0 : sent == WHOLE ? values[i] : place;
    }
}

/* Returns whether each bin has a float. */
FOR_EACH_CPU static int find_bins(const uint32_t *restrict base, const uint8_t *restrict symbols, const uint8_t *restrict signs,
                                  Py_ssize_t count, int32_t lowest, int shift, uint32_t *restrict firsts,
                                  uint32_t *restrict spans, uint8_t *restrict widths)
{
    uint32_t empty = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        const uint32_t symbol = symbols[i];
        const double from = held(base[i], (uint32_t)signs[i] << 31);
        const uint32_t first = not_below(from + border(symbol, lowest, shift));
        const uint32_t span = not_below(from + border(symbol + 1, lowest, shift)) - first;
        const int alone = symbol == SAME || symbol == WHOLE;
        empty |= !alone && !span;
        firsts[i] = symbol == SAME ? base[i] : first;
        spans[i] = span;
        widths[i] = (uint8_t)(symbol == SAME ? 0 : symbol == WHOLE ? 32 : bits_of(span - 1));
    }
    return !empty;
}

/* Returns whether each place is in its bin. */
FOR_EACH_CPU static int join(uint32_t *restrict extra, const uint32_t *restrict firsts, const uint32_t *restrict spans,
                             const uint8_t *restrict symbols, const uint8_t *restrict signs, Py_ssize_t count)
{
    uint32_t outside = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        const int alone = symbols[i] == SAME || symbols[i] == WHOLE;
        outside |= !alone && extra[i] >= spans[i];
        const uint32_t moved = from_order(firsts[i] + extra[i]) ^ (uint32_t)signs[i] << 31;
        extra[i] = symbols[i] == SAME ? firsts[i] : symbols[i] == WHOLE ? extra[i] : moved;
    }
    return !outside;
}
/* The context of each change of one tensor: `rank`, or the distance where a unit in the last place of the base is large. */
FOR_EACH_CPU static void find_contexts(const uint32_t *restrict base, Py_ssize_t count, int32_t scale, int32_t rank,
                                       uint8_t *restrict contexts)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        const int32_t distance = scale + MANTISSA - (int32_t)(base[i] >> MANTISSA & 255), near = distance + COARSE - FAR;
        contexts[i] = (uint8_t)(distance >= FAR ? rank : near > 0 ? near : 0);
    }
}
#endif
