// The Python module nanoinfer._C. Importing it registers the kernels: each op's file does so for itself when the
// library is loaded (schemas are defined in nanoinfer/ops.py). The module's own functions say what was built and
// chosen.

#include <Python.h>

#include <stdexcept>

#include "cpu/kernels.h"

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(nanoinfer::kernels().isa); }

PyObject* cpu_isas(PyObject*, PyObject*) {
    PyObject* names = PyList_New(0);
    const nanoinfer::Kernels* tables[nanoinfer::kMaxTables];
    const int count = nanoinfer::supported_kernels(tables);
    for (int i = 0; i < count; ++i) {
        PyObject* name = PyUnicode_FromString(tables[i]->isa);
        PyList_Append(names, name);
        Py_DECREF(name);
    }
    return names;
}

PyMethodDef functions[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "Instruction set of the CPU kernels in use."},
    {"cpu_isas", cpu_isas, METH_NOARGS, "Instruction sets that were built and that this machine has, worst first."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "Compiled kernels of nanoinfer.", -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
    try {
        nanoinfer::kernels();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
        return nullptr;
    }
    return PyModule_Create(&module);
}
