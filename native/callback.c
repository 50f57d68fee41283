/* Our Python code that CPython runs in the middle of somebody else's: finalizers, hooks of os.fork() and of the exit.
 *
 * Facts -> what follows from them.
 * - An exception that was set for a thread (raise.c) is raised where the next function of Python begins. From
 *   such a callback it goes no further: CPython prints "Exception ignored in", and drops it. The value that it
 *   was about stays assigned for good, and what the callback was for is not done.
 * - It comes before the callback's first line: no `try` in there sees it. So C puts it off before, and sets it again
 *   afterwards, and is what CPython calls: a function of cffi's (no Python begins there), or a slot of the type.
 * - PyThreadState_SetAsyncExc() goes by the number of a thread, and before Python 3.12 a thread that is just being
 *   started has that of the one that starts it: the exception would be raised in the new one.
 * - Ctrl-C comes by the same way; a fork has it wait until the hooks have ended. */
#ifndef UVM_NO_PYTHON
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "failure.h"

/* All under the GIL. */
bool uvm_raise_in(struct _ts *ts, void *exc)
{
	PyThreadState *at = PyInterpreterState_ThreadHead(PyInterpreterState_Main());

	if (PyThreadState_SetAsyncExc(ts->thread_id, exc) < 1)
		return false;
	for (; at && ts->async_exc != exc; at = PyThreadState_Next(at)) {
		if (at->thread_id == ts->thread_id && at->async_exc == exc) {
			at->async_exc = ts->async_exc;
			ts->async_exc = exc;
		}
	}
	return ts->async_exc == exc;
}

/* What was set for the calling thread: NULL, or a reference for put_back(). */
static PyObject *put_off(void)
{
	PyThreadState *ts = PyThreadState_Get();
	PyObject *exc = ts->async_exc;

	ts->async_exc = NULL;
	return exc;
}

static void put_back(PyObject *exc)
{
	PyThreadState *ts = PyThreadState_Get();

	if (exc && !ts->async_exc)
		uvm_raise_in(ts, exc);
	Py_XDECREF(exc);
}

/* --- hooks ---------------------------------------------------------------------------------------- */
static _Thread_local PyObject *off;
static _Thread_local unsigned nr_begun; /* a hook may fork */

void uvm_callback_begin(void)
{
	PyGILState_STATE gil = PyGILState_Ensure();

	if (nr_begun++ == 0)
		off = put_off();
	PyGILState_Release(gil);
}

void uvm_callback_end(void)
{
	PyGILState_STATE gil = PyGILState_Ensure();

	if (nr_begun && --nr_begun == 0) {
		put_back(off);
		off = NULL;
	}
	PyGILState_Release(gil);
}

/* --- fork ----------------------------------------------------------------------------------------- */
static _Thread_local struct {
	sigset_t mask;
	unsigned depth;
} forking;

/* Without a wait in Python, which Ctrl-C would end: the fork would go on without the lock. */
static bool acquire(PyObject *lock)
{
	for (;;) {
		PyObject *got = PyObject_CallMethod(lock, "acquire", "O", Py_False);
		bool yes = got == Py_True;

		Py_XDECREF(got);
		if (yes || !got) {
			if (!got)
				PyErr_WriteUnraisable(lock);
			return yes;
		}
		Py_BEGIN_ALLOW_THREADS;
		usleep(500);
		Py_END_ALLOW_THREADS;
	}
}

void uvm_fork_begin(uintptr_t py_lock)
{
	sigset_t one;

	uvm_callback_begin();
	PyGILState_STATE gil = PyGILState_Ensure();
	if (!acquire((PyObject *)py_lock))
		Py_FatalError("uffd_vm: the lock of close() cannot be taken, and fork() needs it");
	if (forking.depth++ == 0) {
		sigemptyset(&one);
		sigaddset(&one, SIGINT);
		pthread_sigmask(SIG_BLOCK, &one, &forking.mask);
	}
	PyGILState_Release(gil);
	uvm_raise_is_put_off = off != NULL;
}

/* In the parent, and in the child, whose only thread is the one that holds the lock. */
void uvm_fork_end(uintptr_t py_lock)
{
	PyGILState_STATE gil = PyGILState_Ensure();
	PyObject *done = PyObject_CallMethod((PyObject *)py_lock, "release", NULL);

	if (!done)
		PyErr_WriteUnraisable((PyObject *)py_lock);
	Py_XDECREF(done);
	if (forking.depth && --forking.depth == 0)
		pthread_sigmask(SIG_SETMASK, &forking.mask, NULL);
	uvm_raise_is_put_off = false;
	PyGILState_Release(gil);
	uvm_callback_end();
}

/* --- finalizers ------------------------------------------------------------------------------------ */
static destructor finalize_in_python; /* one for all classes with a __del__: it looks that up */

static void finalize(PyObject *self)
{
	PyObject *exc = put_off();

	finalize_in_python(self);
	put_back(exc);
}

void uvm_callback_is_finalizer(uintptr_t py_type)
{
	PyGILState_STATE gil = PyGILState_Ensure();
	PyTypeObject *type = (PyTypeObject *)py_type;

	if (type->tp_finalize != finalize) {
		finalize_in_python = type->tp_finalize;
		type->tp_finalize = finalize;
	}
	PyGILState_Release(gil);
}
#endif
