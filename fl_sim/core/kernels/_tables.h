/* Tables of slots for rANS: made of counts, written and read; `table_reference.py` says what they are. */

#ifndef FL_SIM_TABLES_H
#define FL_SIM_TABLES_H
#include "_rans.h"

enum { FEWEST_BITS = 8, RARE = 512 };
/* Why tables are refused; `table_reference.REFUSED` has the words. */
enum { CUT_OFF = -1, NO_SUCH_SYMBOL = -2, NOT_PADDED = -3, OTHER_SUM = -4 };

static int length_of(uint64_t number) { return number ? 64 - __builtin_clzll(number) : 0; }

/* Whether counts can be scaled without an overflow. */
static int countable(const int64_t *counts, Py_ssize_t entries)
{
    int64_t sum = 0;
    for (Py_ssize_t e = 0; e < entries; e++) {
        if (counts[e] < 0 || counts[e] > (1ll << 40) - sum)
            return 0;
        sum += counts[e];
    }
    return 1;
}

static int64_t sum_of(const int64_t *counts)
{
    int64_t sum = 0;
    for (int s = 0; s < SYMBOLS; s++)
        sum += counts[s];
    return sum;
}

static int precision_of(const int64_t *counts, Py_ssize_t contexts, int fewest, int most)
{
    int64_t size = 0, weight = 0;
    for (Py_ssize_t c = 0; c < contexts; c++) {
        const int64_t *row = counts + c * SYMBOLS, sum = sum_of(row);
        size += sum;
        for (int s = 0; s < SYMBOLS; s++)
            weight += row[s] ? 1 + 8 * (row[s] * RARE < sum) : 0;
    }
    const int best = (length_of((uint64_t)size * (uint64_t)weight) - 1) / 2, enough = best > fewest ? best : fewest;
    return enough < most ? enough : most;
}

/* The symbols whose slots are furthest from their counts, first those that come first, get `step` more; `missing` of them. */
static void mend(const int64_t *counts, int64_t sum, int64_t wanted, int step, int missing, int32_t *slots)
{
    int64_t keys[SYMBOLS];
    uint8_t found[SYMBOLS];
    int count = 0;
    for (int s = 0; s < SYMBOLS; s++) {
        if (slots[s] <= (step < 0))
            continue;
        const int64_t key = -step * (counts[s] * wanted - slots[s] * sum);
        if (count == missing && keys[count - 1] <= key)
            continue;
        int at = count < missing ? count++ : count - 1;
        for (; at && keys[at - 1] > key; at--) {
            keys[at] = keys[at - 1];
            found[at] = found[at - 1];
        }
        keys[at] = key;
        found[at] = (uint8_t)s;
    }
    while (count)
        slots[found[--count]] += step;
}

static void slots_of(const int64_t *counts, int bits, uint16_t *table)
{
    const int64_t sum = sum_of(counts), wanted = 1ll << bits;
    int32_t slots[SYMBOLS], missing = sum ? (int32_t)wanted : 0;
    for (int s = 0; s < SYMBOLS; s++) {
        const int64_t share = counts[s] ? (2 * counts[s] * wanted + sum) / (2 * sum) : 0;
        slots[s] = (int32_t)(counts[s] && !share ? 1 : share);
        missing -= slots[s];
    }
    while (missing) {
        const int step = missing > 0 ? 1 : -1, apart = step * missing;
        mend(counts, sum, wanted, step, apart < SYMBOLS ? apart : SYMBOLS, slots);
        for (int s = missing = 0; s < SYMBOLS; s++)
            missing += slots[s];
        missing = (int32_t)wanted - missing;
    }
    for (int s = 0; s < SYMBOLS; s++)
        table[s] = (uint16_t)slots[s];
}

/* Bits one after the other, least significant first, up to a byte. */
typedef struct {
    uint64_t held;
    int filled;
} Bits;

static uint8_t *put_bits(Bits *bits, uint32_t value, int width, uint8_t *at)
{
    bits->held |= (uint64_t)value << bits->filled;
    for (bits->filled += width; bits->filled >= 8; bits->filled -= 8, bits->held >>= 8)
        *at++ = (uint8_t)bits->held;
    return at;
}

static uint8_t *put_rest(Bits *bits, uint8_t *at)
{
    if (bits->filled)
        *at++ = (uint8_t)bits->held;
    *bits = (Bits){0, 0};
    return at;
}

static int below(int length) { return length ? length - 1 : 0; }

/* Returns where the tables end, at most `table_room` bytes on. */
static uint8_t *put_tables(const uint16_t *tables, Py_ssize_t contexts, int precision, uint8_t *at)
{
    uint8_t *const ends = at + 1;
    Bits bits = {0, 0};
    *at = (uint8_t)precision;
    at = ends + 2 * contexts;
    for (Py_ssize_t c = 0; c < contexts; c++) {
        const uint16_t *table = tables + c * SYMBOLS;
        int first = 0, last = SYMBOLS - 1;
        while (first < SYMBOLS && !table[first])
            first++;
        while (last >= first && !table[last])
            last--;
        const int none = first == SYMBOLS;
        ends[2 * c] = (uint8_t)(none ? 1 : first);
        ends[2 * c + 1] = (uint8_t)(none ? 0 : last);
    }
    for (int rest = 0; rest < 2; rest++, at = put_rest(&bits, at))
        for (Py_ssize_t c = 0; c < contexts; c++)
            for (int s = ends[2 * c]; s <= ends[2 * c + 1]; s++) {
                const uint32_t slots = tables[c * SYMBOLS + s];
                const int length = length_of(slots), width = below(length);
                at = rest ? put_bits(&bits, slots & ((1u << width) - 1), width, at) : put_bits(&bits, (uint32_t)length, 4, at);
            }
    return at;
}

static Py_ssize_t table_room(Py_ssize_t contexts) { return 3 + 2 * contexts + 2 * contexts * SYMBOLS; }

/* Reads from bit `from` on what lies in `data` for certain. */
static uint32_t get_bits(const uint8_t *data, int64_t from, int width)
{
    uint32_t value = 0;
    for (int filled = 0; filled < width;) {
        const int skipped = (int)((from + filled) & 7);
        value |= (uint32_t)(data[(from + filled) >> 3] >> skipped) << filled;
        filled += 8 - skipped;
    }
    return value & ((1u << width) - 1);
}

/* Whether so many bits and the zeros after them lie before `size`. */
static int padded(const uint8_t *data, Py_ssize_t size, int64_t bits)
{
    return (bits + 7) / 8 <= size && (bits % 8 == 0 || data[bits / 8] >> (bits % 8) == 0);
}

/* Fill tables; the bytes that they took, or why they are refused. */
static Py_ssize_t get_tables(const uint8_t *data, Py_ssize_t size, Py_ssize_t contexts, int most, int alphabet,
                             uint16_t *tables)
{
    if (size < 1 + 2 * contexts || data[0] < FEWEST_BITS || data[0] > most)
        return CUT_OFF;
    const uint8_t *const ends = data + 1;
    const int64_t start = 8 * (1 + 2 * (int64_t)contexts);
    int64_t listed = 0, at = 0;
    for (Py_ssize_t c = 0; c < contexts; c++) {
        if (ends[2 * c + 1] >= alphabet)
            return NO_SUCH_SYMBOL;
        listed += ends[2 * c] <= ends[2 * c + 1] ? ends[2 * c + 1] - ends[2 * c] + 1 : 0;
    }
    if (!padded(data, size, start + 4 * listed))
        return NOT_PADDED;
    const int64_t second = start + (4 * listed + 7) / 8 * 8;
    for (int64_t i = 0; i < listed; i++)
        at += below((int)get_bits(data, start + 4 * i, 4));
    if (!padded(data, size, second + at))
        return NOT_PADDED;
    int64_t from = second, length_at = start;
    memset(tables, 0, (size_t)contexts * SYMBOLS * sizeof *tables);
    for (Py_ssize_t c = 0; c < contexts; c++) {
        uint32_t sum = 0, largest = 0;
        for (int s = ends[2 * c]; s <= ends[2 * c + 1]; s++, length_at += 4) {
            const int length = (int)get_bits(data, length_at, 4), width = below(length);
            const uint32_t slots = length ? get_bits(data, from, width) | 1u << width : 0;
            tables[c * SYMBOLS + s] = (uint16_t)slots;
            sum += slots;
            largest = slots > largest ? slots : largest;
            from += width;
        }
        if ((sum && sum != 1u << data[0]) || largest > 1u << MOST_PRECISE)
            return OTHER_SUM;
    }
    return (Py_ssize_t)((from + 7) / 8);
}
#endif
