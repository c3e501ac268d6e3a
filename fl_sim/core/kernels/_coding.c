/* The innermost loops of the codecs; `coding_reference.py` and `mask_reference.py` say what they compute. All arithmetic is on
   integers. */

#define EXPECTED "bytes as uint8, tables as uint16 or int16, bits of floats as uint32, counts and shapes as int64"
#include "_buffers.h"
#include "_mask_model.h"

enum { SYMBOLS = 256, CONTEXTS = 64, LANES = 256, LOWEST = 1 << 16 };

static PyObject *answer(Buffers *all, Py_ssize_t number)
{
    give_back(all);
    return PyErr_Occurred() ? NULL : PyLong_FromSsize_t(number);
}

FOR_EACH_CPU static int outside(const uint8_t *values, Py_ssize_t count, int limit)
{
    uint8_t largest = 0;
    for (Py_ssize_t i = 0; i < count; i++)
        largest = values[i] > largest ? values[i] : largest;
    return count && largest >= limit;
}

/* ---- rANS with static tables ---- */

/* Where each symbol's slots start, within its table; -1 with an exception set where a used table does not sum to 1 << bits. */
static int cumulate(const uint16_t *tables, uint16_t *starts, Py_ssize_t contexts, int bits)
{
    for (Py_ssize_t c = 0; c < contexts; c++) {
        uint32_t sum = 0;
        for (int s = 0; s < SYMBOLS; s++) {
            starts[c * SYMBOLS + s] = (uint16_t)sum;
            sum += tables[c * SYMBOLS + s];
        }
        if (sum && sum != 1u << bits) {
            PyErr_SetString(PyExc_ValueError, "a table does not sum to its precision");
            return -1;
        }
    }
    return 0;
}

/* Number of the table and of the lanes, checked; the number of contexts or -1 with an exception set. */
static Py_ssize_t checked(const Py_buffer *tables, const Py_buffer *contexts, int bits, int lanes)
{
    const Py_ssize_t count = length(tables) / SYMBOLS;
    if (length(tables) % SYMBOLS || count < 1 || count > CONTEXTS || bits < 8 || bits > 14 || lanes < 1 || lanes > LANES ||
        (lanes & (lanes - 1))) {
        PyErr_SetString(PyExc_ValueError, "1 to 64 tables of 256, 8 to 14 bits, a power of two of at most 256 lanes");
        return -1;
    }
    if (outside(contexts->buf, length(contexts), (int)count)) {
        PyErr_SetString(PyExc_ValueError, "a context without a table");
        return -1;
    }
    return count;
}

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

/* Writes from the end of `out` backwards; where the code starts, or -1 where a symbol has no slots. */
static Py_ssize_t put(const uint8_t *restrict symbols, const uint8_t *restrict contexts, Py_ssize_t count,
                      const uint16_t *restrict tables, const uint16_t *restrict starts, int bits, int lanes,
                      uint8_t *restrict out, Py_ssize_t room)
{
    uint32_t states[LANES];
    uint8_t *at = out + room;
    for (int j = 0; j < lanes; j++)
        states[j] = LOWEST;
    for (Py_ssize_t i = count; i-- > 0;) {
        const size_t entry = (size_t)contexts[i] * SYMBOLS + symbols[i];
        const uint32_t slots = tables[entry];
        uint32_t state = states[i & (lanes - 1)];
        if (!slots)
            return -1;
        const int full = state >= (uint64_t)slots << (32 - bits); /* at random: a branch would be mispredicted */
        store(at - 2, state, 2);
        at -= 2 * full;
        state >>= 16 * full;
        states[i & (lanes - 1)] = (state / slots << bits) + state % slots + starts[entry];
    }
    for (int j = lanes; j-- > 0;) {
        at -= 4;
        store(at, states[j], 4);
    }
    return at - out;
}

static PyObject *rans_encode(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *symbols, *contexts, *tables, *out;
    int bits, lanes;
    Buffers all = {.taken = 0};
    Py_ssize_t start = 0;
    if (!PyArg_ParseTuple(args, "OOOiiO:rans_encode", &symbols, &contexts, &tables, &bits, &lanes, &out))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, symbols, 'B', 0) < 0 || take_equal(&all, contexts, 'B', 0) < 0 || take(&all, tables, 'H', 0) < 0 ||
        take(&all, out, 'B', PyBUF_WRITABLE) < 0)
        return done(&all);
    const Py_ssize_t count = length(&views[0]), kinds = checked(&views[2], &views[1], bits, lanes);
    if (kinds < 0)
        return done(&all);
    if (length(&views[3]) < 2 * count + 4 * lanes) {
        PyErr_SetString(PyExc_ValueError, "too little room");
        return done(&all);
    }
    uint16_t *starts = PyMem_Malloc((size_t)kinds * SYMBOLS * sizeof *starts);
    if (!starts)
        PyErr_NoMemory();
    else if (cumulate(views[2].buf, starts, kinds, bits) == 0) {
        Py_BEGIN_ALLOW_THREADS
        start = put(views[0].buf, views[1].buf, count, views[2].buf, starts, bits, lanes, views[3].buf, length(&views[3]));
        Py_END_ALLOW_THREADS
        if (start < 0)
            PyErr_SetString(PyExc_ValueError, "a symbol that its table does not have");
    }
    PyMem_Free(starts);
    return answer(&all, start);
}

/* 0 where the code is exactly that of `count` symbols, else -1. */
static int got(const uint8_t *restrict data, Py_ssize_t size, const uint8_t *restrict contexts, Py_ssize_t count,
               const uint16_t *restrict tables, const uint16_t *restrict starts, const uint8_t *restrict slots, int bits,
               int lanes, uint8_t *restrict symbols)
{
    uint32_t states[LANES];
    const uint8_t *at = data + 4 * lanes, *end = data + size;
    if (size < 4 * lanes || size % 2)
        return -1;
    for (int j = 0; j < lanes; j++) {
        states[j] = (uint32_t)fetch(data + 4 * j, 4);
        if (states[j] < LOWEST)
            return -1;
    }
    const uint32_t below = (1u << bits) - 1;
    for (Py_ssize_t i = 0; i < count;) {
        /* As many symbols as there are words take no more than these. */
        const Py_ssize_t words = (end - at) / 2, safe = words && words < count - i ? i + words : count;
        for (; i < safe; i++) {
            uint32_t state = states[i & (lanes - 1)];
            const uint32_t slot = state & below;
            const size_t table = contexts[i];
            const uint8_t symbol = slots[table << bits | slot];
            const size_t entry = table * SYMBOLS + symbol;
            state = (uint32_t)tables[entry] * (state >> bits) + slot - starts[entry];
            const uint32_t low = state < LOWEST;
            if (!words && low)
                return -1;
            const uint32_t word = words ? (uint32_t)fetch(at, 2) : 0;
            state = state << 16 * low | (word & (0u - low)); /* at random: a branch would be mispredicted */
            at += 2 * low;
            states[i & (lanes - 1)] = state;
            symbols[i] = symbol;
        }
    }
    for (int j = 0; j < lanes; j++)
        if (states[j] != LOWEST)
            return -1;
    return at == end ? 0 : -1;
}

static PyObject *rans_decode(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *data, *contexts, *tables, *symbols;
    int bits, lanes, wrong = -1;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOOiiO:rans_decode", &data, &contexts, &tables, &bits, &lanes, &symbols))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, symbols, 'B', PyBUF_WRITABLE) < 0 || take_equal(&all, contexts, 'B', 0) < 0 ||
        take(&all, tables, 'H', 0) < 0 || take(&all, data, 'B', 0) < 0)
        return done(&all);
    const Py_ssize_t count = length(&views[0]), kinds = checked(&views[2], &views[1], bits, lanes);
    if (kinds < 0)
        return done(&all);
    const uint16_t *table = views[2].buf;
    uint16_t *starts = PyMem_Malloc((size_t)kinds * SYMBOLS * sizeof *starts);
    uint8_t *slots = PyMem_Malloc((size_t)kinds << bits);
    uint8_t missing[CONTEXTS] = {0};
    if (!starts || !slots)
        PyErr_NoMemory();
    else if (cumulate(table, starts, kinds, bits) == 0) {
        for (Py_ssize_t c = 0; c < kinds; c++) {
            uint8_t *to = slots + ((size_t)c << bits);
            const uint8_t *first = to;
            for (int s = 0; s < SYMBOLS; s++, to += table[c * SYMBOLS + s - 1])
                memset(to, s, table[c * SYMBOLS + s]);
            missing[c] = to == first;
        }
        Py_BEGIN_ALLOW_THREADS
        const uint8_t *context = views[1].buf;
        int empty = 0;
        for (Py_ssize_t i = 0; i < count; i++)
            empty |= missing[context[i]];
        if (!empty)
            wrong = got(views[3].buf, length(&views[3]), context, count, table, starts, slots, bits, lanes, views[0].buf);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(starts);
    PyMem_Free(slots);
    return answer(&all, wrong == 0);
}

static PyObject *count_symbols(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *symbols, *contexts, *counts;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOO:count_symbols", &symbols, &contexts, &counts))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, symbols, 'B', 0) < 0 || take_equal(&all, contexts, 'B', 0) < 0 ||
        take(&all, counts, 'q', PyBUF_WRITABLE) < 0)
        return done(&all);
    const uint8_t *symbol = views[0].buf, *context = views[1].buf;
    int64_t *count = views[2].buf;
    const Py_ssize_t size = length(&views[0]), kinds = length(&views[2]) / SYMBOLS;
    if (length(&views[2]) % SYMBOLS || outside(context, size, kinds < SYMBOLS ? (int)kinds : SYMBOLS))
        PyErr_SetString(PyExc_ValueError, "256 counts for each context");
    else {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < size; i++)
            count[(size_t)context[i] * SYMBOLS + symbol[i]]++;
        Py_END_ALLOW_THREADS
    }
    return done(&all);
}

/* ---- bits of several widths, one after the other, least significant first ---- */

static void pack(const uint32_t *restrict values, const uint8_t *restrict widths, Py_ssize_t count, uint8_t *restrict out,
                 Py_ssize_t size)
{
    uint64_t held = 0;
    int filled = 0;
    uint8_t *at = out, *const end = out + size;
    for (Py_ssize_t i = 0; i < count; i++) {
        held |= ((uint64_t)values[i] & ((1ull << widths[i]) - 1)) << filled;
        filled += widths[i];
        if (end - at >= 8)
            store(at, held, 8);
        else
            store(at, held, (size_t)filled / 8);
        at += filled / 8;
        held >>= filled / 8 * 8;
        filled %= 8;
    }
    if (filled)
        *at = (uint8_t)held;
}

FOR_EACH_CPU static int64_t total(const uint8_t *widths, Py_ssize_t count)
{
    int64_t sum = 0;
    for (Py_ssize_t i = 0; i < count; i++)
        sum += widths[i];
    return sum;
}

static PyObject *pack_bits(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *values, *widths, *out;
    Buffers all = {.taken = 0};
    Py_ssize_t size = 0;
    if (!PyArg_ParseTuple(args, "OOO:pack_bits", &values, &widths, &out))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, values, 'I', 0) < 0 || take_equal(&all, widths, 'B', 0) < 0 || take(&all, out, 'B', PyBUF_WRITABLE) < 0)
        return done(&all);
    const Py_ssize_t count = length(&views[0]);
    const int fits = !outside(views[1].buf, count, 33);
    size = fits ? (Py_ssize_t)((total(views[1].buf, count) + 7) / 8) : 0;
    if (!fits || length(&views[2]) < size)
        PyErr_SetString(PyExc_ValueError, "widths of at most 32, and room for their sum");
    else {
        Py_BEGIN_ALLOW_THREADS
        pack(views[0].buf, views[1].buf, count, views[2].buf, size);
        Py_END_ALLOW_THREADS
    }
    return answer(&all, size);
}

/* Reads `count` values from bit `from` on. */
static void unpack(const uint8_t *restrict data, Py_ssize_t size, int64_t from, const uint8_t *restrict widths,
                   Py_ssize_t count, uint32_t *restrict out)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        const Py_ssize_t at = (Py_ssize_t)(from >> 3);
        const uint64_t held = at + 8 <= size ? fetch(data + at, 8) : at < size ? fetch(data + at, (size_t)(size - at)) : 0;
        out[i] = (uint32_t)(held >> (from & 7) & ((1ull << widths[i]) - 1));
        from += widths[i];
    }
}

static PyObject *unpack_bits(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *data, *widths, *out;
    long long from;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OLOO:unpack_bits", &data, &from, &widths, &out))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, out, 'I', PyBUF_WRITABLE) < 0 || take_equal(&all, widths, 'B', 0) < 0 || take(&all, data, 'B', 0) < 0)
        return done(&all);
    const Py_ssize_t count = length(&views[0]), size = length(&views[2]);
    if (from < 0 || outside(views[1].buf, count, 33) || from > 8ll * size - total(views[1].buf, count))
        PyErr_SetString(PyExc_ValueError, "widths of at most 32, and data for their sum");
    else {
        Py_BEGIN_ALLOW_THREADS
        unpack(views[2].buf, size, from, views[1].buf, count, views[0].buf);
        Py_END_ALLOW_THREADS
    }
    return done(&all);
}

/* ---- floats as ordered integers ---- */

/* Floats' bits of `width` in the order of their values: those of negative numbers upside down, below those of positive. */
static inline uint32_t ordered(uint32_t bits, uint32_t sign) { return bits & sign ? (sign << 1) - 1 - bits : bits | sign; }
static inline uint32_t floats(uint32_t key, uint32_t sign) { return key & sign ? key ^ sign : (sign << 1) - 1 - key; }

FOR_EACH_CPU static void split(const uint32_t *restrict values, const uint32_t *restrict base, Py_ssize_t count, int width,
                               int mantissa, uint8_t *restrict lengths, uint8_t *restrict exponents,
                               uint32_t *restrict extra)
{
    const uint32_t sign = 1u << (width - 1), all = (sign << 1) - 1, exponent = (sign - 1) >> mantissa;
    for (Py_ssize_t i = 0; i < count; i++) {
        const uint32_t apart = (ordered(values[i] & all, sign) - ordered(base[i] & all, sign)) & all;
        const uint32_t down = apart & sign, size = down ? (all - apart + 1) & all : apart;
        const int bits = size ? 32 - __builtin_clz(size) : 0;
        /* What is below the leading one, and above it the sign. */
        const uint32_t top = size ? 1u << (bits - 1) : 0;
        lengths[i] = (uint8_t)bits;
        exponents[i] = (uint8_t)(base[i] >> mantissa & exponent);
        extra[i] = size ? (size - top) | (down ? top : 0) : 0;
    }
}

FOR_EACH_CPU static void join(uint32_t *restrict extra, const uint32_t *restrict base, const uint8_t *restrict lengths,
                              Py_ssize_t count, int width)
{
    const uint32_t sign = 1u << (width - 1), all = (sign << 1) - 1;
    for (Py_ssize_t i = 0; i < count; i++) {
        const uint32_t top = lengths[i] ? 1u << (lengths[i] - 1) : 0;
        const uint32_t size = (extra[i] & (top - (top != 0))) | top;
        const uint32_t apart = extra[i] & top ? 0u - size : size;
        extra[i] = floats((ordered(base[i] & all, sign) + apart) & all, sign);
    }
}

static int known_width(int width, int mantissa)
{
    if ((width == 32 || width == 16) && mantissa > 0 && mantissa < width - 1 && width - 1 - mantissa <= 8)
        return 0;
    PyErr_SetString(PyExc_ValueError, "floats of 16 or 32 bits, with exponents of at most 8");
    return -1;
}

static PyObject *float_split(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *values, *base, *lengths, *exponents, *extra;
    int width, mantissa;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOiiOOO:float_split", &values, &base, &width, &mantissa, &lengths, &exponents, &extra))
        return NULL;
    const Py_buffer *views = all.views;
    if (known_width(width, mantissa) == 0 && take(&all, values, 'I', 0) == 0 && take_equal(&all, base, 'I', 0) == 0 &&
        take_equal(&all, lengths, 'B', PyBUF_WRITABLE) == 0 && take_equal(&all, exponents, 'B', PyBUF_WRITABLE) == 0 &&
        take_equal(&all, extra, 'I', PyBUF_WRITABLE) == 0) {
        Py_BEGIN_ALLOW_THREADS
        split(views[0].buf, views[1].buf, length(&views[0]), width, mantissa, views[2].buf, views[3].buf, views[4].buf);
        Py_END_ALLOW_THREADS
    }
    return done(&all);
}

static PyObject *float_join(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *extra, *base, *lengths;
    int width;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOOi:float_join", &extra, &base, &lengths, &width))
        return NULL;
    const Py_buffer *views = all.views;
    if (known_width(width, width - 9) == 0 && take(&all, extra, 'I', PyBUF_WRITABLE) == 0 &&
        take_equal(&all, base, 'I', 0) == 0 && take_equal(&all, lengths, 'B', 0) == 0) {
        if (outside(views[2].buf, length(&views[0]), width + 1))
            PyErr_SetString(PyExc_ValueError, "a difference longer than its floats");
        else {
            Py_BEGIN_ALLOW_THREADS
            join(views[0].buf, views[1].buf, views[2].buf, length(&views[0]), width);
            Py_END_ALLOW_THREADS
        }
    }
    return done(&all);
}

/* ---- masks ---- */

/* Take bits, shapes, ones and tables; -1 with an exception set where they do not fit each other. */
static int take_mask(Buffers *all, Model *model, PyObject *const *given, int flags)
{
    if (take(all, given[0], 'B', flags) < 0 || take(all, given[1], 'q', 0) < 0 || take(all, given[2], 'q', 0) < 0 ||
        take(all, given[3], 'H', 0) < 0 || take(all, given[4], 'h', 0) < 0)
        return -1;
    const Py_buffer *views = all->views;
    *model = (Model){.shapes = views[1].buf, .ones = views[2].buf, .squash = views[3].buf, .stretch = views[4].buf,
                     .tensors = length(&views[2])};
    int64_t left = length(&views[0]);
    int fits = length(&views[1]) == 3 * model->tensors;
    for (Py_ssize_t t = 0; fits && t < model->tensors; t++) {
        const int64_t *shape = model->shapes + 3 * t;
        fits = shape[0] >= 0 && shape[1] >= 0 && shape[2] >= 0;
        int64_t size = fits ? shape[0] : 0;
        for (int i = 1; fits && i < 3; i++) {
            fits = !size || shape[i] <= left / size;
            size = fits ? size * shape[i] : 0;
        }
        fits = fits && size <= left && model->ones[t] >= 0 && model->ones[t] <= size;
        left -= size;
    }
    if (!fits || left) {
        PyErr_SetString(PyExc_ValueError, "three numbers and a count for each tensor, and as many bits as they say");
        return -1;
    }
    if (length(&views[3]) != 2 * SPAN + 1 || length(&views[4]) != STEPS) {
        PyErr_SetString(PyExc_ValueError, "tables of another length");
        return -1;
    }
    return 0;
}

static PyObject *mask_encode(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *given[5], *out;
    Model model;
    Buffers all = {.taken = 0};
    Py_ssize_t size = -1;
    if (!PyArg_ParseTuple(args, "OOOOOO:mask_encode", given, given + 1, given + 2, given + 3, given + 4, &out))
        return NULL;
    if (take_mask(&all, &model, given, 0) < 0 || take(&all, out, 'B', PyBUF_WRITABLE) < 0)
        return done(&all);
    /* The coder writes each bit back as it was. */
    uint8_t *bits = PyMem_Malloc((size_t)length(&all.views[0]) + 1), *to = all.views[5].buf;
    if (!bits)
        PyErr_NoMemory();
    else {
        int wrong;
        Coder coder = {.low = 0, .high = UINT32_MAX, .out = to, .end = to + length(&all.views[5])};
        Py_BEGIN_ALLOW_THREADS
        memcpy(bits, all.views[0].buf, (size_t)length(&all.views[0]));
        wrong = code_mask(&model, &coder, bits);
        Py_END_ALLOW_THREADS
        if (wrong == -2)
            PyErr_NoMemory();
        else if (!wrong && coder.end - coder.out >= 4) {
            for (int i = 0; i < 4; i++)
                *coder.out++ = (uint8_t)(coder.low >> (24 - 8 * i));
            size = coder.out - to;
        }
    }
    PyMem_Free(bits);
    return answer(&all, size);
}

static PyObject *mask_decode(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *data, *given[5];
    Model model;
    Buffers all = {.taken = 0};
    int fine = 0;
    if (!PyArg_ParseTuple(args, "OOOOOO:mask_decode", &data, given + 1, given + 2, given + 3, given + 4, given))
        return NULL;
    if (take_mask(&all, &model, given, PyBUF_WRITABLE) < 0 || take(&all, data, 'B', 0) < 0)
        return done(&all);
    const uint8_t *from = all.views[5].buf;
    const Py_ssize_t size = length(&all.views[5]);
    if (size >= 4) {
        int wrong;
        Coder coder = {.low = 0, .high = UINT32_MAX, .in = from + 4, .end = from + size};
        for (int i = 0; i < 4; i++)
            coder.code = coder.code << 8 | from[i];
        Py_BEGIN_ALLOW_THREADS
        memset(all.views[0].buf, 0, (size_t)length(&all.views[0]));
        wrong = code_mask(&model, &coder, all.views[0].buf);
        Py_END_ALLOW_THREADS
        if (wrong == -2)
            PyErr_NoMemory();
        fine = !wrong && coder.in == coder.end && coder.low == coder.code;
    }
    return answer(&all, fine);
}

static PyMethodDef methods[] = {
    {"count_symbols", count_symbols, METH_VARARGS, NULL},
    {"float_join", float_join, METH_VARARGS, NULL},
    {"float_split", float_split, METH_VARARGS, NULL},
    {"mask_decode", mask_decode, METH_VARARGS, NULL},
    {"mask_encode", mask_encode, METH_VARARGS, NULL},
    {"pack_bits", pack_bits, METH_VARARGS, NULL},
    {"rans_decode", rans_decode, METH_VARARGS, NULL},
    {"rans_encode", rans_encode, METH_VARARGS, NULL},
    {"unpack_bits", unpack_bits, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_coding", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__coding(void) { return PyModule_Create(&definition); }
