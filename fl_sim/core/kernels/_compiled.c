/* The innermost loops of the server, and seeds; `reference.py` says what they compute. No products are fused with sums: every machine
   gives the same bits. */

#define EXPECTED "float64 sums, float32 values, bool, int64 positions, uint32 bits"
#include "_buffers.h"

FOR_EACH_CPU static void scaled(double *restrict total, const float *restrict values, double weight, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        total[i] += weight * (double)values[i];
}

FOR_EACH_CPU static void masked(double *restrict total, double *restrict covered, const float *restrict values,
                                const uint8_t *restrict alive, double weight, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        const double share = weight * (double)alive[i];
        total[i] += share * (double)values[i];
        covered[i] += share;
    }
}

FOR_EACH_CPU static void change(float *restrict out, const float *restrict values, const float *restrict base,
                                const float *restrict current, float weight, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        out[i] = (values[i] - base[i]) * weight + current[i];
}

FOR_EACH_CPU static int none_special(const float *restrict values, Py_ssize_t count)
{
    uint32_t found = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        found |= (bits & 0x7F800000u) == 0x7F800000u;
    }
    return !found;
}

/* -1 where a position is none of `values`; then nothing was added. */
static int squares(double *restrict total, const float *restrict values, Py_ssize_t size, const int64_t *restrict positions,
                   double weight, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        if ((uint64_t)positions[i] >= (uint64_t)size)
            return -1;
    for (Py_ssize_t i = 0; i < count; i++) {
        const double value = values[positions[i]];
        total[i] += weight * (value * value);
    }
    return 0;
}

static PyObject *add_scaled(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *total, *values;
    double weight;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOd:add_scaled", &total, &values, &weight))
        return NULL;
    if (take(&all, total, 'd', PyBUF_WRITABLE) == 0 && take_equal(&all, values, 'f', 0) == 0) {
        Py_BEGIN_ALLOW_THREADS
        scaled(all.views[0].buf, all.views[1].buf, weight, length(&all.views[0]));
        Py_END_ALLOW_THREADS
    }
    return done(&all);
}

static PyObject *add_sent(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *total, *covered, *values, *alive;
    double weight;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOOOd:add_sent", &total, &covered, &values, &alive, &weight))
        return NULL;
    if (take(&all, total, 'd', PyBUF_WRITABLE) == 0 && take_equal(&all, covered, 'd', PyBUF_WRITABLE) == 0 &&
        take_equal(&all, values, 'f', 0) == 0 && take_equal(&all, alive, '?', 0) == 0) {
        Py_BEGIN_ALLOW_THREADS
        masked(all.views[0].buf, all.views[1].buf, all.views[2].buf, all.views[3].buf, weight, length(&all.views[0]));
        Py_END_ALLOW_THREADS
    }
    return done(&all);
}

static PyObject *moved(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *out, *values, *base, *current;
    double weight;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOOOd:moved", &out, &values, &base, &current, &weight))
        return NULL;
    if (take(&all, out, 'f', PyBUF_WRITABLE) == 0 && take_equal(&all, values, 'f', 0) == 0 &&
        take_equal(&all, base, 'f', 0) == 0 && take_equal(&all, current, 'f', 0) == 0) {
        Py_BEGIN_ALLOW_THREADS
        change(all.views[0].buf, all.views[1].buf, all.views[2].buf, all.views[3].buf, (float)weight,
               length(&all.views[0]));
        Py_END_ALLOW_THREADS
    }
    return done(&all);
}

static PyObject *add_squares(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *total, *values, *positions;
    double weight;
    int wrong = 0;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOOd:add_squares", &total, &values, &positions, &weight))
        return NULL;
    if (take(&all, total, 'd', PyBUF_WRITABLE) == 0 && take(&all, values, 'f', 0) == 0 &&
        take_equal(&all, positions, 'q', 0) == 0) {
        Py_BEGIN_ALLOW_THREADS
        wrong = squares(all.views[0].buf, all.views[1].buf, length(&all.views[1]), all.views[2].buf, weight,
                        length(&all.views[0]));
        Py_END_ALLOW_THREADS
        if (wrong)
            PyErr_SetString(PyExc_IndexError, "a position outside the values");
    }
    return done(&all);
}

static PyObject *all_finite(PyObject *Py_UNUSED(module), PyObject *values)
{
    Buffers all = {.taken = 0};
    int answer = 0;
    if (take(&all, values, 'f', 0) == 0) {
        Py_BEGIN_ALLOW_THREADS
        answer = none_special(all.views[0].buf, length(&all.views[0]));
        Py_END_ALLOW_THREADS
    }
    give_back(&all);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(answer);
}

/* NumPy's `SeedSequence` (M. O'Neill's seed_seq_fe128) of a key of 32-bit words, and the first 64 bits of its state. */
enum { POOL = 4 };

static uint32_t hashed(uint32_t value, uint32_t *constant)
{
    value ^= *constant;
    *constant *= 0x931E8875u;
    value *= *constant;
    return value ^ value >> 16;
}

static void stir(uint32_t *into, uint32_t word, uint32_t *constant)
{
    const uint32_t mixed = 0xCA01F9DDu * *into - 0x4973F715u * hashed(word, constant);
    *into = mixed ^ mixed >> 16;
}

/* The next 64 bits of the state. `at` counts the pool's words. */
static uint64_t state_of(const uint32_t pool[POOL], uint32_t *constant, int *at)
{
    uint32_t state[2];
    for (int i = 0; i < 2; i++, *at = (*at + 1) % POOL) {
        uint32_t value = pool[*at] ^ *constant;
        *constant *= 0x58F38DEDu;
        value *= *constant;
        state[i] = value ^ value >> 16;
    }
    return (uint64_t)state[1] << 32 | state[0];
}

#define STATE 0x8B51F9DDu

static void mixed(uint32_t pool[POOL], uint32_t *constant)
{
    for (int from = 0; from < POOL; from++)
        for (int to = 0; to < POOL; to++)
            if (from != to)
                stir(&pool[to], pool[from], constant);
}

/* A word of a key; -1 with an exception set where it is no whole number from 0 to 2^32 - 1. */
static int word_of(PyObject *number, uint32_t *word)
{
    PyObject *whole = PyNumber_Index(number);
    const unsigned long value = whole ? PyLong_AsUnsignedLong(whole) : 0;
    Py_XDECREF(whole);
    if (!PyErr_Occurred() && value > UINT32_MAX)
        PyErr_SetString(PyExc_OverflowError, "a word of a key has 32 bits");
    *word = (uint32_t)value;
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *seed(PyObject *Py_UNUSED(module), PyObject *const *key, Py_ssize_t count)
{
    uint32_t pool[POOL], constant = 0x43B0D7E5u, word;
    for (int i = 0; i < POOL; i++) {
        word = 0;
        if (i < count && word_of(key[i], &word) < 0)
            return NULL;
        pool[i] = hashed(word, &constant);
    }
    mixed(pool, &constant);
    for (Py_ssize_t i = POOL; i < count; i++) {
        if (word_of(key[i], &word) < 0)
            return NULL;
        for (int to = 0; to < POOL; to++)
            stir(&pool[to], word, &constant);
    }
    uint32_t begin = STATE;
    int at = 0;
    return PyLong_FromUnsignedLongLong(state_of(pool, &begin, &at));
}

/* NumPy's `PCG64` (M. O'Neill's PCG XSL RR 128/64): numbers of 128 bits as their upper and lower half. */
typedef struct {
    uint64_t high, low;
} Wide;

static Wide product(uint64_t a, uint64_t b)
{
#ifdef __SIZEOF_INT128__
    const unsigned __int128 whole = (unsigned __int128)a * b;
    return (Wide){(uint64_t)(whole >> 64), (uint64_t)whole};
#else
    const uint64_t a0 = (uint32_t)a, a1 = a >> 32, b0 = (uint32_t)b, b1 = b >> 32;
    const uint64_t cross = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + (uint32_t)cross;
    return (Wide){a1 * b1 + (cross >> 32) + (other >> 32), a * b};
#endif
}

static Wide sum(Wide a, Wide b)
{
    const uint64_t low = a.low + b.low;
    return (Wide){a.high + b.high + (low < a.low), low};
}

static Wide stepped(Wide state, Wide increment)
{
    const Wide times = {0x2360ED051FC65DA4u, 0x4385DF649FCCF645u};
    Wide next = product(state.low, times.low);
    next.high += state.high * times.low + state.low * times.high;
    return sum(next, increment);
}

static void bits_of(uint64_t number, uint32_t *restrict out, Py_ssize_t count)
{
    uint32_t pool[POOL], constant = 0x43B0D7E5u, begin = STATE;
    uint64_t drawn[4];
    int at = 0;
    for (int i = 0; i < POOL; i++, number >>= 32)
        pool[i] = hashed((uint32_t)number, &constant);
    mixed(pool, &constant);
    for (int i = 0; i < 4; i++)
        drawn[i] = state_of(pool, &begin, &at);
    const Wide increment = {drawn[2] << 1 | drawn[3] >> 63, drawn[3] << 1 | 1};
    Wide state = stepped(sum(increment, (Wide){drawn[0], drawn[1]}), increment);
    for (Py_ssize_t i = 0; i < count; i += 2) {
        state = stepped(state, increment);
        const uint64_t folded = state.high ^ state.low;
        const int turned = (int)(state.high >> 58);
        const uint64_t word = folded >> turned | folded << (-turned & 63);
        out[i] = (uint32_t)word;
        if (i + 1 < count)
            out[i + 1] = (uint32_t)(word >> 32);
    }
}

static PyObject *random_bits(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *number, *out;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OO:random_bits", &number, &out))
        return NULL;
    const unsigned long long start = PyLong_AsUnsignedLongLong(number);
    if (!PyErr_Occurred() && take(&all, out, 'I', PyBUF_WRITABLE) == 0)
        bits_of(start, all.views[0].buf, length(&all.views[0]));
    return done(&all);
}

static PyMethodDef methods[] = {
    {"add_scaled", add_scaled, METH_VARARGS, NULL},
    {"add_sent", add_sent, METH_VARARGS, NULL},
    {"add_squares", add_squares, METH_VARARGS, NULL},
    {"all_finite", all_finite, METH_O, NULL},
    {"moved", moved, METH_VARARGS, NULL},
    {"random_bits", random_bits, METH_VARARGS, NULL},
    {"seed", (PyCFunction)(void (*)(void))seed, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_compiled", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__compiled(void) { return PyModule_Create(&definition); }
