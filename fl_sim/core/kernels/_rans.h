/* rANS with static tables; `coding_reference.py` says what it computes. The vector form takes 16 lanes at once and writes and
   reads the same bytes. */

#ifndef FL_SIM_RANS_H
#define FL_SIM_RANS_H
#include "_buffers.h"

enum { SYMBOLS = 256, CONTEXTS = 64, LANES = 256, LOWEST = 1 << 16, MOST_PRECISE = 12, FEW = 8 };

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 12
#define VECTORS 16
#define WITH_VECTORS __attribute__((target("avx512f,avx512bw,avx512vl")))
#include <immintrin.h>
static int has_vectors(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

#ifdef __GNUC__
#define ALWAYS __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 8")
#else
#define ALWAYS
#define UNROLLED
#endif

/* Little-endian numbers at any address; the loops are for machines of the other order. */
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
static inline void store(uint8_t *to, uint64_t value, size_t size) { memcpy(to, &value, size); }
static inline uint64_t fetch(const uint8_t *from, size_t size)
{
    uint64_t value = 0;
    memcpy(&value, from, size);
    return value;
}
#else
static inline void store(uint8_t *to, uint64_t value, size_t size)
{
    for (size_t i = 0; i < size; i++)
        to[i] = (uint8_t)(value >> 8 * i);
}
static inline uint64_t fetch(const uint8_t *from, size_t size)
{
    uint64_t value = 0;
    for (size_t i = 0; i < size; i++)
        value |= (uint64_t)from[i] << 8 * i;
    return value;
}
#endif

/* Symbols with one context each, and the tables of the contexts. */
typedef struct {
    const uint8_t *contexts;
    Py_ssize_t count;
    int bits, lanes;
} Plan;

/* ---- encoding ---- */

/* Whether each table that is used sums to 1 << bits. */
static int whole_tables(const uint16_t *tables, Py_ssize_t contexts, int bits)
{
    for (Py_ssize_t c = 0; c < contexts; c++) {
        uint32_t sum = 0;
        for (int s = 0; s < SYMBOLS; s++)
            sum += tables[c * SYMBOLS + s];
        if (sum && sum != 1u << bits)
            return 0;
    }
    return 1;
}

/* Slots of each context's symbols, and above them the first of them. */
static void shares_of(const uint16_t *tables, Py_ssize_t contexts, uint32_t *shares)
{
    for (Py_ssize_t c = 0; c < contexts; c++) {
        uint32_t sum = 0;
        for (int s = 0; s < SYMBOLS; s++) {
            const uint32_t slots = tables[c * SYMBOLS + s];
            shares[c * SYMBOLS + s] = slots | sum << 16;
            sum += slots;
        }
    }
}

/* Put symbols i - 1, i - 2, .. stop before `at`; where the code starts, or NULL where a symbol has no slots. */
static uint8_t *put_each(const Plan *plan, const uint8_t *restrict symbols, const uint32_t *restrict shares,
                         uint32_t *restrict states, Py_ssize_t i, Py_ssize_t stop, uint8_t *restrict at)
{
    const int bits = plan->bits, lanes = plan->lanes;
    while (i-- > stop) {
        const uint32_t share = shares[(size_t)plan->contexts[i] * SYMBOLS + symbols[i]], slots = share & 0xFFFF;
        uint32_t state = states[i & (lanes - 1)];
        if (!slots)
            return NULL;
        const int full = state >> (32 - bits) >= slots; /* at random: a branch would be mispredicted */
        store(at - 2, state, 2);
        at -= 2 * full;
        state >>= 16 * full;
        const uint32_t times = state / slots;
        states[i & (lanes - 1)] = (times << bits) + (state - times * slots) + (share >> 16);
    }
    return at;
}

#ifdef VECTORS
/* The same for whole groups of 16 symbols: i and stop are multiples of 16, bits at least 10. */
WITH_VECTORS static uint8_t *put_groups(const Plan *plan, const uint8_t *restrict symbols, const uint32_t *restrict shares,
                                        uint32_t *restrict states, Py_ssize_t i, Py_ssize_t stop, uint8_t *restrict at)
{
    const __m128i bits = _mm_cvtsi32_si128(plan->bits), rest = _mm_cvtsi32_si128(32 - plan->bits);
    const __m512i low = _mm512_set1_epi32(0xFFFF), one = _mm512_set1_epi32(1);
    const __m256i upwards = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __mmask16 missing = 0;
    while (i > stop) {
        i -= VECTORS;
        uint32_t *const held = states + (i & (plan->lanes - 1));
        const __m512i symbol = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(symbols + i)));
        const __m512i context = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(plan->contexts + i)));
        const __m512i entry = _mm512_or_si512(_mm512_slli_epi32(context, 8), symbol);
        const __m512i share = _mm512_i32gather_epi32(entry, shares, 4);
        const __m512i slots = _mm512_and_si512(share, low), start = _mm512_srli_epi32(share, 16);
        missing |= _mm512_testn_epi32_mask(slots, slots);
        __m512i state = _mm512_loadu_si512(held);
        const __mmask16 full = _mm512_cmpge_epu32_mask(_mm512_srl_epi32(state, rest), slots);
        /* Sixteen words that end at `at`; those before the first full one are written over later. A store under a mask is slow. */
        const int words = __builtin_popcount(full);
        const __m256i some = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(full, state));
        const __m256i from = _mm256_add_epi16(_mm256_set1_epi16((short)words), upwards);
        _mm256_storeu_si256((__m256i *)(at - 2 * VECTORS), _mm256_permutexvar_epi16(from, some));
        at -= 2 * words;
        state = _mm512_mask_srli_epi32(state, full, state, 16);
        /* A quotient of floats that is below 2**22 is at most 1 from that of integers. */
        __m512i times = _mm512_cvttps_epi32(_mm512_div_ps(_mm512_cvtepu32_ps(state), _mm512_cvtepi32_ps(slots)));
        __m512i left = _mm512_sub_epi32(state, _mm512_mullo_epi32(times, slots));
        const __mmask16 over = _mm512_cmplt_epi32_mask(left, _mm512_setzero_si512());
        times = _mm512_mask_sub_epi32(times, over, times, one);
        left = _mm512_mask_add_epi32(left, over, left, slots);
        const __mmask16 under = _mm512_cmpge_epi32_mask(left, slots);
        times = _mm512_mask_add_epi32(times, under, times, one);
        left = _mm512_mask_sub_epi32(left, under, left, slots);
        _mm512_storeu_si512(held, _mm512_add_epi32(_mm512_add_epi32(_mm512_sll_epi32(times, bits), left), start));
    }
    return missing ? NULL : at;
}

/* What eight lanes need of each symbol, in 64 bits: the inverse of its slots without its first one (32), its slots (13), the first
   of them (12), and a shift: x / slots == (x * inverse / 2**32 + x) >> shift for all x below 2**32. */
static void inverses_of(const uint32_t *shares, Py_ssize_t entries, uint64_t *inverses)
{
    for (Py_ssize_t e = 0; e < entries; e++) {
        const uint64_t slots = shares[e] & 0xFFFF, first = shares[e] >> 16 & 0xFFF;
        int shift = 0;
        while (1u << shift < slots)
            shift++;
        const uint64_t inverse = slots ? ((1ull << (32 + shift)) + slots - 1) / slots : 0;
        inverses[e] = (inverse & 0xFFFFFFFF) | slots << 32 | first << 45 | (uint64_t)shift << 57;
    }
}

/* (state / slots << bits) + state % slots + start, with the slots of the other symbols. */
WITH_VECTORS static inline __m512i eight_more(__m512i state, __m512i inverse, __m512i start, __m512i others)
{
    const __m512i share = _mm512_add_epi64(_mm512_srli_epi64(_mm512_mul_epu32(state, inverse), 32), state);
    const __m512i times = _mm512_srlv_epi64(share, _mm512_srli_epi64(inverse, 57));
    return _mm512_add_epi64(_mm512_add_epi64(state, start), _mm512_mul_epu32(times, others));
}

/* The same as `put_groups` for eight lanes, which stay in a register: i and stop are multiples of 8. The next state is made with
   and without the word that may be put, so that no product waits for that. */
WITH_VECTORS static uint8_t *put_eights(const Plan *plan, const uint8_t *restrict symbols, const uint64_t *restrict inverses,
                                        uint32_t *restrict states, Py_ssize_t i, Py_ssize_t stop, uint8_t *restrict at)
{
    const __m128i rest = _mm_cvtsi32_si128(32 - plan->bits);
    const __m512i most = _mm512_set1_epi64(1 << plan->bits), low = _mm512_set1_epi64(0x1FFF), lower = _mm512_set1_epi64(0xFFF);
    /* 16 bytes from 2 n on move the first n words to the end. */
    static const uint8_t shifts[32] = {128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128,
                                       0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    __m512i state = _mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i *)states));
    __mmask8 missing = 0;
    while (i > stop) {
        i -= FEW;
        const __m256i symbol = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(symbols + i)));
        const __m256i context = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(plan->contexts + i)));
        const __m512i inverse = _mm512_i32gather_epi64(_mm256_or_si256(_mm256_slli_epi32(context, 8), symbol), inverses, 8);
        const __m512i slots = _mm512_and_si512(_mm512_srli_epi64(inverse, 32), low);
        const __m512i start = _mm512_and_si512(_mm512_srli_epi64(inverse, 45), lower);
        missing |= _mm512_testn_epi64_mask(slots, slots);
        const __mmask8 full = _mm512_cmpge_epu64_mask(state, _mm512_sll_epi64(slots, rest));
        /* Eight words that end at `at`; those before the first full one are written over later. */
        const int words = __builtin_popcount(full);
        const __m128i some = _mm512_cvtepi64_epi16(_mm512_maskz_compress_epi64(full, state));
        _mm_storeu_si128((__m128i *)(at - 16), _mm_shuffle_epi8(some, _mm_loadu_si128((const __m128i *)(shifts + 2 * words))));
        at -= 2 * words;
        const __m512i others = _mm512_sub_epi64(most, slots), cut = _mm512_srli_epi64(state, 16);
        state = _mm512_mask_mov_epi64(eight_more(state, inverse, start, others), full, eight_more(cut, inverse, start, others));
    }
    _mm256_storeu_si256((__m256i *)states, _mm512_cvtepi64_epi32(state));
    return missing ? NULL : at;
}
#endif

/* Writes from the end of `out` backwards; where the code starts, or -1 where a symbol has no slots. `inverses` has room for as
   many as there are shares. */
static Py_ssize_t put(const Plan *plan, const uint8_t *symbols, const uint32_t *shares, Py_ssize_t entries, uint64_t *inverses,
                      const uint16_t *ends, uint8_t *out, Py_ssize_t room)
{
    _Alignas(64) uint32_t states[LANES];
    uint8_t *at = out + room;
    Py_ssize_t left = plan->count;
    for (int j = 0; j < plan->lanes; j++)
        states[j] = LOWEST | (uint32_t)ends[j];
#ifdef VECTORS
    if (plan->lanes >= VECTORS && plan->bits >= 10 && has_vectors()) {
        const Py_ssize_t whole = left / VECTORS * VECTORS;
        at = put_each(plan, symbols, shares, states, left, whole, at);
        at = at ? put_groups(plan, symbols, shares, states, whole, 0, at) : at;
        left = 0;
    } else if (plan->lanes == FEW && has_vectors()) {
        const Py_ssize_t whole = left / FEW * FEW;
        inverses_of(shares, entries, inverses);
        at = put_each(plan, symbols, shares, states, left, whole, at);
        at = at ? put_eights(plan, symbols, inverses, states, whole, 0, at) : at;
        left = 0;
    }
#else
    (void)entries, (void)inverses;
#endif
    at = at ? put_each(plan, symbols, shares, states, left, 0, at) : at;
    if (!at)
        return -1;
    for (int j = plan->lanes; j-- > 0;) {
        at -= 4;
        store(at, states[j], 4);
    }
    return at - out;
}

/* ---- decoding ---- */

/* For each slot of each context (slots of its symbol - 1) << 20 | (place among them) << 8 | symbol. The context that has none
   of them leaves them as they are, and is marked. */
static void owners_of(const uint16_t *tables, Py_ssize_t contexts, int bits, uint32_t *owners, uint8_t *missing)
{
    for (Py_ssize_t c = 0; c < contexts; c++) {
        uint32_t *to = owners + ((size_t)c << bits);
        const uint32_t *const first = to;
        for (uint32_t s = 0; s < SYMBOLS; s++) {
            const uint32_t slots = tables[c * SYMBOLS + s];
            for (uint32_t place = 0; place < slots; place++)
                *to++ = (slots - 1) << 20 | place << 8 | s;
        }
        missing[c] = to == first;
    }
}

/* Take one symbol from a lane and, where the state is low, the word at `at`; no branch, because that is at random. */
static inline ALWAYS uint32_t get_one(const uint32_t *restrict owners, int bits, uint32_t *state, uint32_t word, uint8_t *symbol)
{
    const uint32_t x = *state, owner = owners[x & ((1u << bits) - 1)];
    const uint32_t next = ((owner >> 20) + 1) * (x >> bits) + (owner >> 8 & 0xFFF), low = next < LOWEST;
    *state = low ? next << 16 | word : next;
    *symbol = (uint8_t)owner;
    return low;
}

/* Read from symbol `i` on, each word only where there is one; where the words end, or NULL where they do too early. */
static const uint8_t *get_each(const Plan *plan, const uint32_t *restrict owners, uint32_t *restrict states, Py_ssize_t i,
                               const uint8_t *restrict at, const uint8_t *end, uint8_t *restrict symbols)
{
    while (i < plan->count) {
        /* As many symbols as there are words take no more than these. */
        const Py_ssize_t words = (end - at) / 2, safe = words && words < plan->count - i ? i + words : plan->count;
        for (; i < safe; i++) {
            const uint32_t low = get_one(owners + ((size_t)plan->contexts[i] << plan->bits), plan->bits,
                                         states + (i & (plan->lanes - 1)), words ? (uint32_t)fetch(at, 2) : 0, symbols + i);
            if (!words && low)
                return NULL;
            at += 2 * low;
        }
    }
    return at;
}

/* Rounds of `lanes` symbols, a constant, while there are as many words: the states stay in registers. How many symbols. */
static inline ALWAYS Py_ssize_t get_rounds(const Plan *plan, const uint32_t *restrict owners, uint32_t *restrict states,
                                           const uint8_t *restrict *from, const uint8_t *end, uint8_t *restrict symbols,
                                           const int lanes)
{
    const uint8_t *restrict at = *from, *const contexts = plan->contexts;
    const int bits = plan->bits;
    uint32_t held[FEW];
    Py_ssize_t i = 0;
    for (int j = 0; j < lanes; j++)
        held[j] = states[j];
    for (; plan->count - i >= lanes && end - at >= 2 * lanes; i += lanes)
        UNROLLED
        for (int j = 0; j < lanes; j++)
            at += 2 * get_one(owners + ((size_t)contexts[i + j] << bits), bits, held + j, (uint32_t)fetch(at, 2), symbols + i + j);
    for (int j = 0; j < lanes; j++)
        states[j] = held[j];
    *from = at;
    return i;
}

FOR_EACH_CPU static Py_ssize_t get_most(const Plan *plan, const uint32_t *restrict owners, uint32_t *restrict states,
                           const uint8_t *restrict *from, const uint8_t *end, uint8_t *restrict symbols)
{
    switch (plan->lanes) {
    case 1: return get_rounds(plan, owners, states, from, end, symbols, 1);
    case 2: return get_rounds(plan, owners, states, from, end, symbols, 2);
    case 4: return get_rounds(plan, owners, states, from, end, symbols, 4);
    case FEW: return get_rounds(plan, owners, states, from, end, symbols, FEW);
    default: return 0;
    }
}

#ifdef VECTORS
/* Whole groups of 16 symbols while there are 16 words; how many symbols that were. */
WITH_VECTORS static Py_ssize_t get_groups(const Plan *plan, const uint32_t *restrict owners, uint32_t *restrict states,
                                          const uint8_t *restrict *from, const uint8_t *end, uint8_t *restrict symbols)
{
    const uint8_t *at = *from;
    const __m128i bits = _mm_cvtsi32_si128(plan->bits);
    const __m512i below = _mm512_set1_epi32((1 << plan->bits) - 1), one = _mm512_set1_epi32(1);
    const __m512i lowest = _mm512_set1_epi32(LOWEST), places = _mm512_set1_epi32(0xFFF);
    Py_ssize_t i = 0;
    for (; plan->count - i >= VECTORS && end - at >= 2 * VECTORS; i += VECTORS) {
        uint32_t *const held = states + (i & (plan->lanes - 1));
        __m512i state = _mm512_loadu_si512(held);
        const __m512i context = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(plan->contexts + i)));
        const __m512i slot = _mm512_or_si512(_mm512_sll_epi32(context, bits), _mm512_and_si512(state, below));
        const __m512i owner = _mm512_i32gather_epi32(slot, owners, 4);
        const __m512i slots = _mm512_add_epi32(_mm512_srli_epi32(owner, 20), one);
        const __m512i place = _mm512_and_si512(_mm512_srli_epi32(owner, 8), places);
        state = _mm512_add_epi32(_mm512_mullo_epi32(slots, _mm512_srl_epi32(state, bits)), place);
        const __mmask16 low = _mm512_cmplt_epu32_mask(state, lowest);
        const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
        state = _mm512_mask_or_epi32(state, low, _mm512_slli_epi32(state, 16), _mm512_maskz_expand_epi32(low, words));
        at += 2 * __builtin_popcount(low);
        _mm512_storeu_si512(held, state);
        _mm_storeu_si128((__m128i *)(symbols + i), _mm512_cvtepi32_epi8(owner));
    }
    *from = at;
    return i;
}
#endif

/* Fill symbols and ends; 0 where the code is exactly that of `count` symbols, else -1. */
static int got(const Plan *plan, const uint8_t *data, Py_ssize_t size, const uint32_t *owners, uint16_t *ends,
               uint8_t *symbols)
{
    _Alignas(64) uint32_t states[LANES];
    const uint8_t *at = data + 4 * plan->lanes, *const end = data + size;
    Py_ssize_t done = 0;
    if (size < 4 * plan->lanes || size % 2)
        return -1;
    for (int j = 0; j < plan->lanes; j++) {
        states[j] = (uint32_t)fetch(data + 4 * j, 4);
        if (states[j] < LOWEST)
            return -1;
    }
#ifdef VECTORS
    if (plan->lanes >= VECTORS && has_vectors())
        done = get_groups(plan, owners, states, &at, end, symbols);
#endif
    if (!done)
        done = get_most(plan, owners, states, &at, end, symbols);
    at = get_each(plan, owners, states, done, at, end, symbols);
    if (at != end)
        return -1;
    for (int j = 0; j < plan->lanes; j++) {
        ends[j] = (uint16_t)states[j];
        if (states[j] >> 16 != 1)
            return -1;
    }
    return 0;
}

/* ---- histograms ---- */

/* Four tables in turn: a symbol that repeats does not wait for its own last count. `tables` has room for 4 * kinds * 256. */
static void count_each(const uint8_t *symbols, const uint8_t *contexts, Py_ssize_t size, Py_ssize_t kinds, uint32_t *tables,
                       int64_t *counts)
{
    const size_t entries = (size_t)kinds * SYMBOLS;
    while (size) {
        const Py_ssize_t part = size < 1 << 30 ? size : 1 << 30, whole = part / 4 * 4;
        memset(tables, 0, 4 * entries * sizeof *tables);
        for (Py_ssize_t i = 0; i < whole; i += 4)
            for (int j = 0; j < 4; j++)
                tables[j * entries + (size_t)contexts[i + j] * SYMBOLS + symbols[i + j]]++;
        for (Py_ssize_t i = whole; i < part; i++)
            tables[(size_t)contexts[i] * SYMBOLS + symbols[i]]++;
        for (size_t e = 0; e < entries; e++)
            counts[e] += (int64_t)tables[e] + tables[entries + e] + tables[2 * entries + e] + tables[3 * entries + e];
        symbols += part;
        contexts += part;
        size -= part;
    }
}
#endif
