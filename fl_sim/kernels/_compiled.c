/* The innermost loops of the server; `reference.py` says what they compute. Buffers are checked here, so that no caller can
   make them read or write beyond one. No products are fused with sums: every machine gives the same bits. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>

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

FOR_EACH_CPU static int none_special(const uint32_t *restrict bits, Py_ssize_t count)
{
    uint32_t found = 0;
    for (Py_ssize_t i = 0; i < count; i++)
        found |= (bits[i] & 0x7F800000u) == 0x7F800000u;
    return !found;
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

/* Take a buffer of elements of `type` (as in `struct`), as many as in the first one taken; -1 with an exception set. */
static int take(Buffers *all, PyObject *source, char type, int flags)
{
    static const char *const problem = "expected contiguous, aligned arrays of equal length: float64 sums, float32 values, bool";
    Py_buffer *view = &all->views[all->taken];
    if (PyObject_GetBuffer(source, view, PyBUF_ND | PyBUF_FORMAT | flags) < 0)
        return -1;
    all->taken++;
    if (!view->format || view->format[0] != type || view->format[1] || (uintptr_t)view->buf % (size_t)view->itemsize ||
        view->len / view->itemsize != all->views[0].len / all->views[0].itemsize) {
        PyErr_SetString(PyExc_ValueError, problem);
        return -1;
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
    if (take(&all, total, 'd', PyBUF_WRITABLE) < 0 || take(&all, values, 'f', 0) < 0) {
        give_back(&all);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    scaled(all.views[0].buf, all.views[1].buf, weight, all.views[0].len / all.views[0].itemsize);
    Py_END_ALLOW_THREADS
    give_back(&all);
    Py_RETURN_NONE;
}

static PyObject *add_sent(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *total, *covered, *values, *alive;
    double weight;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOOOd:add_sent", &total, &covered, &values, &alive, &weight))
        return NULL;
    if (take(&all, total, 'd', PyBUF_WRITABLE) < 0 || take(&all, covered, 'd', PyBUF_WRITABLE) < 0 ||
        take(&all, values, 'f', 0) < 0 || take(&all, alive, '?', 0) < 0) {
        give_back(&all);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    masked(all.views[0].buf, all.views[1].buf, all.views[2].buf, all.views[3].buf, weight,
           all.views[0].len / all.views[0].itemsize);
    Py_END_ALLOW_THREADS
    give_back(&all);
    Py_RETURN_NONE;
}

static PyObject *all_finite(PyObject *Py_UNUSED(module), PyObject *values)
{
    Buffers all = {.taken = 0};
    int answer;
    if (take(&all, values, 'f', 0) < 0) {
        give_back(&all);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    answer = none_special(all.views[0].buf, all.views[0].len / all.views[0].itemsize);
    Py_END_ALLOW_THREADS
    give_back(&all);
    return PyBool_FromLong(answer);
}

static PyMethodDef methods[] = {
    {"add_scaled", add_scaled, METH_VARARGS, NULL},
    {"add_sent", add_sent, METH_VARARGS, NULL},
    {"all_finite", all_finite, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_compiled", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__compiled(void) { return PyModule_Create(&definition); }
