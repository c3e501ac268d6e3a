/* The loops of exact changes; `change_reference.py` says what they compute. */

#define EXPECTED "bits as uint32, keys as uint16, bytes as uint8, sizes as int64"
#include "_buffers.h"
#include "_change.h"

static int known_bins(int lowest, int shift)
{
    if (shift >= 0 && shift <= 4 && lowest >= 0 && lowest <= (FINITE >> shift) - BINS - FIRST)
        return 0;
    PyErr_SetString(PyExc_ValueError, "bins of 0 to 4 bits below the octave, of finite changes");
    return -1;
}

static PyObject *answer(Buffers *all, int fine)
{
    give_back(all);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(fine);
}

static PyObject *change_keys(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *values, *base, *keys;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOO:change_keys", &values, &base, &keys))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, values, 'I', 0) == 0 && take_equal(&all, base, 'I', 0) == 0 && take_equal(&all, keys, 'H', PyBUF_WRITABLE) == 0) {
        Py_BEGIN_ALLOW_THREADS
        find_keys(views[0].buf, views[1].buf, length(&views[0]), views[2].buf);
        Py_END_ALLOW_THREADS
    }
    return done(&all);
}

static PyObject *change_cut(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *values, *base, *keys, *symbols, *signs, *widths, *extra;
    int lowest, shift;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOOiiOOOO:change_cut", &values, &base, &keys, &lowest, &shift, &symbols, &signs, &widths, &extra))
        return NULL;
    const Py_buffer *views = all.views;
    if (known_bins(lowest, shift) == 0 && take(&all, values, 'I', 0) == 0 && take_equal(&all, base, 'I', 0) == 0 &&
        take_equal(&all, keys, 'H', 0) == 0 && take_equal(&all, symbols, 'B', PyBUF_WRITABLE) == 0 &&
        take_equal(&all, signs, 'B', PyBUF_WRITABLE) == 0 && take_equal(&all, widths, 'B', PyBUF_WRITABLE) == 0 &&
        take_equal(&all, extra, 'I', PyBUF_WRITABLE) == 0) {
        Py_BEGIN_ALLOW_THREADS
        cut(views[0].buf, views[1].buf, views[2].buf, length(&views[0]), lowest, shift, views[3].buf, views[4].buf,
            views[5].buf, views[6].buf);
        Py_END_ALLOW_THREADS
    }
    return done(&all);
}

static PyObject *change_bins(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *base, *symbols, *signs, *firsts, *spans, *widths;
    int lowest, shift, fine = 0;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOOiiOOO:change_bins", &base, &symbols, &signs, &lowest, &shift, &firsts, &spans, &widths))
        return NULL;
    const Py_buffer *views = all.views;
    if (known_bins(lowest, shift) == 0 && take(&all, base, 'I', 0) == 0 && take_equal(&all, symbols, 'B', 0) == 0 &&
        take_equal(&all, signs, 'B', 0) == 0 && take_equal(&all, firsts, 'I', PyBUF_WRITABLE) == 0 &&
        take_equal(&all, spans, 'I', PyBUF_WRITABLE) == 0 && take_equal(&all, widths, 'B', PyBUF_WRITABLE) == 0) {
        Py_BEGIN_ALLOW_THREADS
        fine = find_bins(views[0].buf, views[1].buf, views[2].buf, length(&views[0]), lowest, shift, views[3].buf,
                         views[4].buf, views[5].buf);
        Py_END_ALLOW_THREADS
    }
    return answer(&all, fine);
}

static PyObject *change_join(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *extra, *firsts, *spans, *symbols, *signs;
    int fine = 0;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOOOO:change_join", &extra, &firsts, &spans, &symbols, &signs))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, extra, 'I', PyBUF_WRITABLE) == 0 && take_equal(&all, firsts, 'I', 0) == 0 &&
        take_equal(&all, spans, 'I', 0) == 0 && take_equal(&all, symbols, 'B', 0) == 0 && take_equal(&all, signs, 'B', 0) == 0) {
        Py_BEGIN_ALLOW_THREADS
        fine = join(views[0].buf, views[1].buf, views[2].buf, views[3].buf, views[4].buf, length(&views[0]));
        Py_END_ALLOW_THREADS
    }
    return answer(&all, fine);
}

static PyObject *change_contexts(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *base, *sizes, *scales, *ranks, *contexts;
    Buffers all = {.taken = 0};
    if (!PyArg_ParseTuple(args, "OOOOO:change_contexts", &base, &sizes, &scales, &ranks, &contexts))
        return NULL;
    const Py_buffer *views = all.views;
    if (take(&all, base, 'I', 0) < 0 || take_equal(&all, contexts, 'B', PyBUF_WRITABLE) < 0 || take(&all, sizes, 'q', 0) < 0 ||
        take(&all, scales, 'B', 0) < 0 || take(&all, ranks, 'B', 0) < 0)
        return done(&all);
    const Py_ssize_t tensors = length(&views[2]);
    const int64_t *size = views[2].buf;
    int64_t left = length(&views[0]);
    int fits = length(&views[3]) == tensors && length(&views[4]) == tensors;
    for (Py_ssize_t t = 0; fits && t < tensors; left -= size[t++])
        fits = size[t] >= 0 && size[t] <= left;
    if (!fits || left)
        PyErr_SetString(PyExc_ValueError, "a scale and a rank for each tensor, and as many changes as they have");
    else {
        Py_BEGIN_ALLOW_THREADS
        const uint32_t *bits = views[0].buf;
        uint8_t *to = views[1].buf;
        for (Py_ssize_t t = 0; t < tensors; bits += size[t], to += size[t], t++)
            find_contexts(bits, (Py_ssize_t)size[t], ((const uint8_t *)views[3].buf)[t], ((const uint8_t *)views[4].buf)[t], to);
        Py_END_ALLOW_THREADS
    }
    return done(&all);
}

static PyMethodDef methods[] = {
    {"change_bins", change_bins, METH_VARARGS, NULL},
    {"change_contexts", change_contexts, METH_VARARGS, NULL},
    {"change_cut", change_cut, METH_VARARGS, NULL},
    {"change_join", change_join, METH_VARARGS, NULL},
    {"change_keys", change_keys, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_change", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__change(void) { return PyModule_Create(&definition); }
