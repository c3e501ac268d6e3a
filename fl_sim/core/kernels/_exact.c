/* Sums that no addition rounds; `exact_reference.py` says what they are. Chunk by chunk: the numbers that are added are made, and
   added to the first level. Where an addition rounded, which is rare, what was lost goes to the further levels. */

#define EXPECTED "float64 levels, float64 or float32 numbers, bool"
#include "_buffers.h"

enum { CHUNK = 512 }; /* numbers, 4 kB: the sums of a chunk stay in the cache until they replace the total */
#if defined(__GNUC__)
#define OWN_CALL __attribute__((noinline)) /* so that additions stay between the two looks at the processor's flag */
#else
#define OWN_CALL
#endif

/* Whether an operation has rounded since the processor's flag was cleared: as good as a comparison of every sum, and free. */
#if defined(__x86_64__) && defined(__GNUC__)
#include <xmmintrin.h>
enum { INEXACT = 0x20 };
static int has_rounded(void) { return (_mm_getcsr() & INEXACT) != 0; }
static void forget(void)
{
    if (has_rounded())
        _mm_setcsr(_mm_getcsr() & ~(unsigned)INEXACT);
}
#else
static int has_rounded(void) { return 1; }
static void forget(void) {}
#endif

/* What is added: numbers, or weight times values, and of these those that were sent, whose weight counts in `covered`. */
typedef struct {
    const double *numbers;
    const float *values;
    const uint8_t *sent;
    double *covered;
    double weight;
} Added;

FOR_EACH_CPU static void scaled(double *restrict out, const float *restrict values, double weight, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        out[i] = weight * (double)values[i];
}

FOR_EACH_CPU static void masked(double *restrict out, const float *restrict values, const uint8_t *restrict sent,
                                double weight, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        out[i] = weight * (double)sent[i] * (double)values[i];
}

FOR_EACH_CPU static void counted(double *restrict covered, const uint8_t *restrict sent, double weight, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        covered[i] += weight * (double)sent[i];
}

/* A total and what is added to it, the additions and the products in one pass. */
FOR_EACH_CPU OWN_CALL static void with_numbers(double *restrict out, const double *restrict total,
                                               const double *restrict numbers, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        out[i] = total[i] + numbers[i];
}

FOR_EACH_CPU OWN_CALL static void with_scaled(double *restrict out, const double *restrict total,
                                              const float *restrict values, double weight, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        out[i] = total[i] + weight * (double)values[i];
}

FOR_EACH_CPU OWN_CALL static void with_masked(double *restrict out, const double *restrict total,
                                              const float *restrict values, const uint8_t *restrict sent, double weight,
                                              Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        out[i] = total[i] + weight * (double)sent[i] * (double)values[i];
}

static inline uint64_t bits(double number)
{
    uint64_t same;
    memcpy(&same, &number, sizeof same);
    return same;
}

/* The error of a sum (Knuth's TwoSum), as bits; 0 for one that is not finite. Without a choice between doubles, which
   compilers do not turn into vectors. */
static inline uint64_t lost(double a, double b, double sum)
{
    const uint64_t exponent = (uint64_t)0x7FF << 52, finite = (bits(sum) & exponent) != exponent;
    const double from_b = sum - a, from_a = sum - from_b;
    return bits((a - from_a) + (b - from_b)) & (0 - finite);
}

FOR_EACH_CPU static uint64_t all_lost(uint64_t *restrict out, const double *restrict total,
                                      const double *restrict numbers, const double *restrict sums, Py_ssize_t count)
{
    uint64_t any = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        out[i] = lost(total[i], numbers[i], sums[i]);
        any |= out[i] << 1; /* of either zero nothing is left */
    }
    return any;
}

/* Add errors to a level, or only see what that would lose in its turn; 0 where it takes all. */
FOR_EACH_CPU static uint64_t passed_on(double *restrict level, uint64_t *restrict rest, uint64_t keep, Py_ssize_t count)
{
    uint64_t any = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        const double old = level[i];
        double added;
        memcpy(&added, &rest[i], sizeof added);
        const double sum = old + added;
        rest[i] = lost(old, added, sum);
        const uint64_t kept = (bits(sum) & keep) | (bits(old) & ~keep);
        memcpy(&level[i], &kept, sizeof kept);
        any |= rest[i] << 1;
    }
    return any;
}

/* Pass on what the sums of a chunk have lost; 0 where a further level is needed, and nothing was changed. */
static int keep_lost(double *const *levels, Py_ssize_t depth, const Added *what, Py_ssize_t at, const double *sums,
                     Py_ssize_t count)
{
    double made[CHUNK];
    uint64_t errors[CHUNK], rest[CHUNK];
    const double *numbers = what->numbers ? what->numbers + at : made;
    if (what->sent)
        masked(made, what->values + at, what->sent + at, what->weight, count);
    else if (!what->numbers)
        scaled(made, what->values + at, what->weight, count);
    if (!all_lost(errors, levels[0] + at, numbers, sums, count))
        return 1;
    for (int keep = 0; keep < 2; keep++) {
        uint64_t any = 1;
        memcpy(rest, errors, (size_t)count * sizeof *rest);
        for (Py_ssize_t level = 1; level < depth && any; level++)
            any = passed_on(levels[level] + at, rest, keep ? ~(uint64_t)0 : 0, count);
        if (any)
            return 0;
    }
    return 1;
}

static int add_chunk(double *const *levels, Py_ssize_t depth, const Added *what, Py_ssize_t at, Py_ssize_t count)
{
    double sums[CHUNK], *const total = levels[0] + at;
    if (what->numbers)
        with_numbers(sums, total, what->numbers + at, count);
    else if (what->sent)
        with_masked(sums, total, what->values + at, what->sent + at, what->weight, count);
    else
        with_scaled(sums, total, what->values + at, what->weight, count);
    const int rounded = has_rounded();
    if (rounded && !keep_lost(levels, depth, what, at, sums, count))
        return 0;
    memcpy(total, sums, (size_t)count * sizeof *sums);
    if (what->sent)
        counted(what->covered + at, what->sent + at, what->weight, count);
    if (rounded || what->sent)
        forget();
    return 1;
}

/* Add from `start` on; returns where a further level is needed, or the end. */
static Py_ssize_t add_all(double *const *levels, Py_ssize_t depth, const Added *what, Py_ssize_t start, Py_ssize_t end)
{
    forget();
    for (Py_ssize_t at = start; at < end; at += CHUNK)
        if (!add_chunk(levels, depth, what, at, end - at < CHUNK ? end - at : CHUNK))
            return at;
    return end;
}

/* Take the levels, of which there is one at least; -1 with an exception set. */
static int take_levels(Buffers *all, PyObject *levels)
{
    const Py_ssize_t depth = PySequence_Size(levels);
    if (depth < 0)
        return -1;
    if (depth < 1 || depth > MOST - 3) {
        PyErr_Format(PyExc_ValueError, "a sum has 1 to %d levels", MOST - 3);
        return -1;
    }
    for (Py_ssize_t level = 0; level < depth; level++) {
        PyObject *each = PySequence_GetItem(levels, level);
        if (!each)
            return -1;
        const int failed = take_equal(all, each, 'd', PyBUF_WRITABLE);
        Py_DECREF(each); /* its buffer holds it */
        if (failed)
            return -1;
    }
    return 0;
}

static PyObject *finish(Buffers *all, Py_ssize_t depth, const Added *what, Py_ssize_t start)
{
    double *levels[MOST];
    for (Py_ssize_t level = 0; level < depth; level++)
        levels[level] = all->views[level].buf;
    Py_ssize_t end = length(&all->views[0]);
    if (start < 0 || start > end)
        PyErr_SetString(PyExc_IndexError, "a start outside the numbers");
    else {
        Py_BEGIN_ALLOW_THREADS
        end = add_all(levels, depth, what, start, end);
        Py_END_ALLOW_THREADS
    }
    give_back(all);
    return PyErr_Occurred() ? NULL : PyLong_FromSsize_t(end);
}

static PyObject *failed(Buffers *all)
{
    give_back(all);
    return NULL;
}

static PyObject *add_exactly(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *levels, *numbers;
    Py_ssize_t start;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOn:add_exactly", &levels, &numbers, &start))
        return NULL;
    if (take_levels(&all, levels) < 0)
        return failed(&all);
    const int depth = all.taken;
    if (take_equal(&all, numbers, 'd', 0) < 0)
        return failed(&all);
    const Added what = {.numbers = all.views[depth].buf};
    return finish(&all, depth, &what, start);
}

static PyObject *add_scaled_exactly(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *levels, *values;
    double weight;
    Py_ssize_t start;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOdn:add_scaled_exactly", &levels, &values, &weight, &start))
        return NULL;
    if (take_levels(&all, levels) < 0)
        return failed(&all);
    const int depth = all.taken;
    if (take_equal(&all, values, 'f', 0) < 0)
        return failed(&all);
    const Added what = {.values = all.views[depth].buf, .weight = weight};
    return finish(&all, depth, &what, start);
}

static PyObject *add_sent_exactly(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *levels, *covered, *values, *sent;
    double weight;
    Py_ssize_t start;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOOOdn:add_sent_exactly", &levels, &covered, &values, &sent, &weight, &start))
        return NULL;
    if (take_levels(&all, levels) < 0)
        return failed(&all);
    const int depth = all.taken;
    if (take_equal(&all, covered, 'd', PyBUF_WRITABLE) < 0 || take_equal(&all, values, 'f', 0) < 0 ||
        take_equal(&all, sent, '?', 0) < 0)
        return failed(&all);
    const Added what = {.covered = all.views[depth].buf,
                        .values = all.views[depth + 1].buf,
                        .sent = all.views[depth + 2].buf,
                        .weight = weight};
    return finish(&all, depth, &what, start);
}

static PyMethodDef methods[] = {
    {"add_exactly", add_exactly, METH_VARARGS, NULL},
    {"add_scaled_exactly", add_scaled_exactly, METH_VARARGS, NULL},
    {"add_sent_exactly", add_sent_exactly, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_exact", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__exact(void) { return PyModule_Create(&definition); }
