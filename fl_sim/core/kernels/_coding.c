/* The innermost loops of the codecs; `coding_reference.py` and `mask_reference.py` say what they compute. All arithmetic is on
   integers. */

#define EXPECTED "bytes as uint8, tables as uint16 or int16, values as float32, bits as uint32, counts and shapes as int64"
#include "_buffers.h"
#include "_mask_model.h"
#include "_rans.h"
#include "_round.h"
#include "_tables.h"

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

/* ---- symbols ---- */

/* The number of contexts, where tables, contexts and lanes fit each other, or -1 with an exception set. */
static Py_ssize_t checked(const Py_buffer *tables, const Py_buffer *contexts, int bits, Py_ssize_t lanes)
{
    const Py_ssize_t count = length(tables) / SYMBOLS;
    if (length(tables) % SYMBOLS || count < 1 || count > CONTEXTS || bits < 8 || bits > MOST_PRECISE || lanes < 1 || lanes > LANES ||
        (lanes & (lanes - 1))) {
        PyErr_SetString(PyExc_ValueError, "1 to 64 tables of 256, 8 to 12 bits, a power of two of at most 256 lanes");
        return -1;
    }
    if (outside(contexts->buf, length(contexts), (int)count)) {
        PyErr_SetString(PyExc_ValueError, "a context without a table");
        return -1;
    }
    if (!whole_tables(tables->buf, count, bits)) {
        PyErr_SetString(PyExc_ValueError, "a table does not sum to its precision");
        return -1;
    }
    return count;
}

static PyObject *rans_encode(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *symbols, *contexts, *tables, *ends, *out;
    int bits;
    Buffers all = {.taken = 0};
    Py_ssize_t start = 0;
    if (!PyArg_ParseTuple(args, "OOOiOO:rans_encode", &symbols, &contexts, &tables, &bits, &ends, &out))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, symbols, 'B', 0) < 0 || take_equal(&all, contexts, 'B', 0) < 0 || take(&all, tables, 'H', 0) < 0 ||
        take(&all, ends, 'H', 0) < 0 || take(&all, out, 'B', PyBUF_WRITABLE) < 0)
        return done(&all);
    const Py_ssize_t lanes = length(&views[3]), kinds = checked(&views[2], &views[1], bits, lanes);
    const Plan plan = {views[1].buf, length(&views[0]), bits, (int)lanes};
    if (kinds < 0)
        return done(&all);
    if (length(&views[4]) < 2 * plan.count + 4 * lanes) {
        PyErr_SetString(PyExc_ValueError, "too little room");
        return done(&all);
    }
    uint64_t *inverses = PyMem_Malloc((size_t)kinds * SYMBOLS * (sizeof *inverses + sizeof(uint32_t)));
    if (!inverses)
        PyErr_NoMemory();
    else {
        Py_BEGIN_ALLOW_THREADS
        uint32_t *const shares = (uint32_t *)(inverses + kinds * SYMBOLS);
        shares_of(views[2].buf, kinds, shares);
        start = put(&plan, views[0].buf, shares, kinds * SYMBOLS, inverses, views[3].buf, views[4].buf, length(&views[4]));
        Py_END_ALLOW_THREADS
        if (start < 0)
            PyErr_SetString(PyExc_ValueError, "a symbol that its table does not have");
    }
    PyMem_Free(inverses);
    return answer(&all, start);
}

/* Whether each symbol's context has a table. */
static int all_have(const Plan *plan, Py_ssize_t kinds, const uint8_t *missing)
{
    int empty = 0;
    for (Py_ssize_t c = 0; c < kinds; c++)
        empty |= missing[c];
    if (!empty)
        return 1;
    empty = 0;
    for (Py_ssize_t i = 0; i < plan->count; i++)
        empty |= missing[plan->contexts[i]];
    return !empty;
}

static PyObject *rans_decode(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *data, *contexts, *tables, *ends, *symbols;
    int bits, wrong = -1;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOOiOO:rans_decode", &data, &contexts, &tables, &bits, &ends, &symbols))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, symbols, 'B', PyBUF_WRITABLE) < 0 || take_equal(&all, contexts, 'B', 0) < 0 ||
        take(&all, tables, 'H', 0) < 0 || take(&all, ends, 'H', PyBUF_WRITABLE) < 0 || take(&all, data, 'B', 0) < 0)
        return done(&all);
    const Py_ssize_t lanes = length(&views[3]), kinds = checked(&views[2], &views[1], bits, lanes);
    const Plan plan = {views[1].buf, length(&views[0]), bits, (int)lanes};
    if (kinds < 0)
        return done(&all);
    uint32_t *owners = PyMem_Malloc(((size_t)kinds << bits) * sizeof *owners);
    uint8_t missing[CONTEXTS] = {0};
    if (!owners)
        PyErr_NoMemory();
    else {
        Py_BEGIN_ALLOW_THREADS
        owners_of(views[2].buf, kinds, bits, owners, missing);
        if (all_have(&plan, kinds, missing))
            wrong = got(&plan, views[4].buf, length(&views[4]), owners, views[3].buf, views[0].buf);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(owners);
    return answer(&all, wrong == 0);
}

static PyObject *table_make(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *counts, *tables;
    int fewest, most, precision = 0;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OiiO:table_make", &counts, &fewest, &most, &tables))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, counts, 'q', 0) < 0 || take_equal(&all, tables, 'H', PyBUF_WRITABLE) < 0)
        return done(&all);
    const Py_ssize_t contexts = length(&views[0]) / SYMBOLS;
    if (length(&views[0]) % SYMBOLS || fewest < FEWEST_BITS || most < FEWEST_BITS || most > MOST_PRECISE ||
        !countable(views[0].buf, length(&views[0])))
        PyErr_SetString(PyExc_ValueError, "256 counts for each table, 8 to 12 bits");
    else {
        const int64_t *count = views[0].buf;
        precision = precision_of(count, contexts, fewest, most);
        for (Py_ssize_t c = 0; c < contexts; c++)
            slots_of(count + c * SYMBOLS, precision, (uint16_t *)views[1].buf + c * SYMBOLS);
    }
    return answer(&all, precision);
}

static PyObject *table_write(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *tables, *out;
    int precision;
    Py_ssize_t size = 0;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OiO:table_write", &tables, &precision, &out))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, tables, 'H', 0) < 0 || take(&all, out, 'B', PyBUF_WRITABLE) < 0)
        return done(&all);
    const Py_ssize_t contexts = length(&views[0]) / SYMBOLS;
    if (length(&views[0]) % SYMBOLS || precision < FEWEST_BITS || precision > MOST_PRECISE ||
        !whole_tables(views[0].buf, contexts, precision) || length(&views[1]) < table_room(contexts))
        PyErr_SetString(PyExc_ValueError, "tables of 256 that sum to their precision, and room for them");
    else
        size = put_tables(views[0].buf, contexts, precision, views[1].buf) - (uint8_t *)views[1].buf;
    return answer(&all, size);
}

static PyObject *table_read(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *data, *tables;
    int most, alphabet;
    Py_ssize_t size = 0;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OiiO:table_read", &data, &most, &alphabet, &tables))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, data, 'B', 0) < 0 || take(&all, tables, 'H', PyBUF_WRITABLE) < 0)
        return done(&all);
    if (length(&views[1]) % SYMBOLS || most > MOST_PRECISE || alphabet > SYMBOLS)
        PyErr_SetString(PyExc_ValueError, "tables of 256, at most 12 bits and 256 symbols");
    else
        size = get_tables(views[0].buf, length(&views[0]), length(&views[1]) / SYMBOLS, most, alphabet, views[1].buf);
    return answer(&all, size);
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
    const Py_ssize_t size = length(&views[0]), kinds = length(&views[2]) / SYMBOLS;
    if (length(&views[2]) % SYMBOLS || kinds > SYMBOLS || outside(views[1].buf, size, (int)kinds))
        PyErr_SetString(PyExc_ValueError, "256 counts for each context");
    else {
        uint32_t *tables = PyMem_Malloc(4 * ((size_t)kinds * SYMBOLS + 1) * sizeof *tables);
        if (!tables)
            PyErr_NoMemory();
        else {
            Py_BEGIN_ALLOW_THREADS
            count_each(views[0].buf, views[1].buf, size, kinds, tables, views[2].buf);
            Py_END_ALLOW_THREADS
        }
        PyMem_Free(tables);
    }
    return done(&all);
}

/* ---- integers by blocks ---- */

/* A number for each block as the second buffer taken, and the blocks' sizes, which sum to the length of the first. */
static int take_blocks(Buffers *all, PyObject *numbers, char type, int flags, PyObject *sizes)
{
    if (take(all, numbers, type, flags) < 0 || take(all, sizes, 'q', 0) < 0)
        return -1;
    const Py_buffer *size = &all->views[all->taken - 1];
    const int64_t *block = size->buf;
    Py_ssize_t left = length(&all->views[0]);
    int fits = length(size) == length(&all->views[all->taken - 2]);
    for (Py_ssize_t b = 0; fits && b < length(size); b++) {
        fits = block[b] >= 0 && block[b] <= left;
        left -= fits ? (Py_ssize_t)block[b] : 0;
    }
    if (fits && !left)
        return 0;
    PyErr_SetString(PyExc_ValueError, "a number for each block, and as many elements as the blocks have");
    return -1;
}

static PyObject *round_blocks(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *values, *noise, *units, *sizes, *symbols;
    int top;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOOOiO:round_blocks", &values, &noise, &units, &sizes, &top, &symbols))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, values, 'f', 0) < 0 || take_equal(&all, noise, 'I', 0) < 0 ||
        take_equal(&all, symbols, 'B', PyBUF_WRITABLE) < 0 || take_blocks(&all, units, 'f', 0, sizes) < 0)
        return done(&all);
    if (top < 1 || top > 127)
        PyErr_SetString(PyExc_ValueError, "integers of at most 127");
    else {
        Py_BEGIN_ALLOW_THREADS
        const float *value = views[0].buf, *unit = views[3].buf;
        const uint32_t *drawn = views[1].buf;
        uint8_t *symbol = views[2].buf;
        const int64_t *size = views[4].buf;
        for (Py_ssize_t b = 0; b < length(&views[3]); value += size[b], drawn += size[b], symbol += size[b], b++)
            round_block(value, drawn, (Py_ssize_t)size[b], unit[b], (float)top, symbol);
        Py_END_ALLOW_THREADS
    }
    return done(&all);
}

static PyObject *scale_blocks(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *symbols, *units, *sizes, *values;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOOO:scale_blocks", &symbols, &units, &sizes, &values))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, symbols, 'B', 0) == 0 && take_equal(&all, values, 'f', PyBUF_WRITABLE) == 0 &&
        take_blocks(&all, units, 'f', 0, sizes) == 0) {
        Py_BEGIN_ALLOW_THREADS
        const uint8_t *symbol = views[0].buf;
        float *value = views[1].buf;
        const float *unit = views[2].buf;
        const int64_t *size = views[3].buf;
        for (Py_ssize_t b = 0; b < length(&views[2]); symbol += size[b], value += size[b], b++)
            scale_block(symbol, (Py_ssize_t)size[b], unit[b], value);
        Py_END_ALLOW_THREADS
    }
    return done(&all);
}

static PyObject *block_sums(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *symbols, *sizes, *sums;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOO:block_sums", &symbols, &sizes, &sums))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, symbols, 'B', 0) == 0 && take_blocks(&all, sums, 'q', PyBUF_WRITABLE, sizes) == 0) {
        Py_BEGIN_ALLOW_THREADS
        const uint8_t *symbol = views[0].buf;
        int64_t *sum = views[1].buf;
        const int64_t *size = views[2].buf;
        for (Py_ssize_t b = 0; b < length(&views[1]); symbol += size[b], b++)
            sum[b] = total(symbol, (Py_ssize_t)size[b]);
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
    {"block_sums", block_sums, METH_VARARGS, NULL},
    {"count_symbols", count_symbols, METH_VARARGS, NULL},
    {"float_join", float_join, METH_VARARGS, NULL},
    {"float_split", float_split, METH_VARARGS, NULL},
    {"mask_decode", mask_decode, METH_VARARGS, NULL},
    {"mask_encode", mask_encode, METH_VARARGS, NULL},
    {"pack_bits", pack_bits, METH_VARARGS, NULL},
    {"rans_decode", rans_decode, METH_VARARGS, NULL},
    {"rans_encode", rans_encode, METH_VARARGS, NULL},
    {"round_blocks", round_blocks, METH_VARARGS, NULL},
    {"scale_blocks", scale_blocks, METH_VARARGS, NULL},
    {"table_make", table_make, METH_VARARGS, NULL},
    {"table_read", table_read, METH_VARARGS, NULL},
    {"table_write", table_write, METH_VARARGS, NULL},
    {"unpack_bits", unpack_bits, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_coding", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__coding(void) { return PyModule_Create(&definition); }
