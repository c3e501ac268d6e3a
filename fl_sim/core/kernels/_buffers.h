/* Buffers that a caller lends, checked, so that no caller can make a loop read or write beyond one. */

#ifndef FL_SIM_BUFFERS_H
#define FL_SIM_BUFFERS_H
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

enum { MOST = 32 }; /* buffers of a call */
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
        PyErr_Format(PyExc_ValueError, "expected aligned arrays: %s", EXPECTED);
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

static inline PyObject *done(Buffers *all)
{
    give_back(all);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}
#endif
