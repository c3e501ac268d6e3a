/* The innermost loops of the server; `reference.py` says what they compute. Buffers are checked here, so that no caller can
   make them read or write beyond one. No products are fused with sums: every machine gives the same bits. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* Which instructions a processor has is found out when the module is loaded, where the compiler can arrange that. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 12
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

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

enum { MOST = 4 };
typedef struct {
    Py_buffer views[MOST];
    int taken;
} Buffers;

static void give_back(Buffers *all)
{
    while (all->taken)
        PyBuffer_Release(&all->views[--all->taken]);
}

static Py_ssize_t length(const Py_buffer *view) { return view->len / view->itemsize; }

/* Take a buffer of elements of `type` (as in `struct`); -1 with an exception set. */
static int take(Buffers *all, PyObject *source, char type, int flags)
{
    Py_buffer *view = &all->views[all->taken];
    if (PyObject_GetBuffer(source, view, PyBUF_ND | PyBUF_FORMAT | flags) < 0)
        return -1;
    all->taken++;
    /* NumPy's int64 is `l` where a C long has 64 bits, and `q` elsewhere. */
    const int fits = view->format && !view->format[1] &&
                     (view->format[0] == type || (type == 'q' && view->format[0] == 'l' && sizeof(long) == 8));
    if (!fits || (uintptr_t)view->buf % (size_t)view->itemsize) {
        PyErr_SetString(PyExc_ValueError, "expected aligned arrays: float64 sums, float32 values, bool, int64 positions");
        return -1;
    }
    return 0;
}

/* The same, as long as the first buffer taken. */
static int take_equal(Buffers *all, PyObject *source, char type, int flags)
{
    if (take(all, source, type, flags) < 0)
        return -1;
    if (length(&all->views[all->taken - 1]) != length(&all->views[0])) {
        PyErr_SetString(PyExc_ValueError, "expected arrays of equal length");
        return -1;
    }
    return 0;
}

static PyObject *done(Buffers *all)
{
    give_back(all);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
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

static PyMethodDef methods[] = {
    {"add_scaled", add_scaled, METH_VARARGS, NULL},
    {"add_sent", add_sent, METH_VARARGS, NULL},
    {"add_squares", add_squares, METH_VARARGS, NULL},
    {"all_finite", all_finite, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_compiled", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__compiled(void) { return PyModule_Create(&definition); }
