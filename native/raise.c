/* An exception for the thread that touched a page that could not be had.
 *
 * Facts -> what follows from them.
 * - The toucher may hold the GIL, and then sets its exception itself. If it has let go of it, it does not take it in a
 *   signal handler: it asks uvm-raiser, the only thread here that does, and waits RAISE_TIMEOUT_S at most.
 * - An exception may be swallowed, and then nobody takes its placeholders: uvm-raiser looks for that now and then. */
#ifndef UVM_NO_PYTHON
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#endif

#include "failure.h"

enum { MAX_RAISES = 64 };

#define TAKEN_AFTER_NS 2000000000ull /* then look whether an exception was swallowed */
#define RAISE_TIMEOUT_S 60

static _Atomic uintptr_t classes[UVM_FAILURE_NR];

void uvm_failure_set_class(int kind, uintptr_t py_class)
{
	if (kind > UVM_FAILURE_NONE && kind < UVM_FAILURE_NR)
		atomic_store(&classes[kind], py_class);
}

enum raise_state { RAISE_FREE, RAISE_FILLING, RAISE_ASKED, RAISE_DONE, RAISE_FAILED, RAISE_LEFT };

/* A thread without the GIL asks uvm-raiser for an exception, and waits for it. */
struct raise {
	_Atomic uint32_t state;
	unsigned long ident;
	uintptr_t py_class;
	bool alone; /* out */
};
static struct raise raises[MAX_RAISES];
_Atomic int uvm_raiser_up;

#ifndef UVM_NO_PYTHON

#if PY_VERSION_HEX < 0x030d0000
#define Py_IsFinalizing _Py_IsFinalizing
#define PyThreadState_GetUnchecked _PyThreadState_UncheckedGet
#endif

static bool is_ours(const PyObject *exc)
{
	for (int kind = 0; exc && kind < UVM_FAILURE_NR; kind++)
		if (atomic_load(&classes[kind]) == (uintptr_t)exc)
			return true;
	return false;
}

/* Under the GIL. The oldest: a thread that is just being started may have the number of the one that starts it. */
static PyThreadState *thread_of(unsigned long ident)
{
	PyThreadState *ts = PyInterpreterState_ThreadHead(PyInterpreterState_Main()), *found = NULL;

	for (; ts; ts = PyThreadState_Next(ts))
		if (ts->thread_id == ident)
			found = ts;
	return found;
}

/* Under the GIL: has the exception of this thread been raised since (and nobody made it an object)? */
static bool is_consumed(unsigned long ident)
{
	PyThreadState *ts = thread_of(ident);
	return !ts || !is_ours(ts->async_exc); /* NULL: the thread has ended */
}

/* Under the GIL: is there no Python thread but this one (and ours)? */
static bool is_alone(int ours)
{
	PyThreadState *ts = PyInterpreterState_ThreadHead(PyInterpreterState_Main());

	for (; ts; ts = PyThreadState_Next(ts))
		ours--;
	return ours >= -1;
}

static void raiser_serve(struct raise *q)
{
	uint32_t asked = RAISE_ASKED;

	/* Set and answer under the GIL: who gave up waiting in between gets no exception. */
	PyThreadState *ts = thread_of(q->ident);
	bool set = ts && uvm_raise_in(ts, (PyObject *)q->py_class);
	q->alone = is_alone(1);
	if (atomic_compare_exchange_strong(&q->state, &asked, set ? RAISE_DONE : RAISE_FAILED)) {
		sys_futex_wake(&q->state, 1);
	} else {
		if (set)
			Py_CLEAR(ts->async_exc);
		atomic_store(&q->state, RAISE_FREE);
	}
}

static void raiser_look_for_swallowed(void)
{
	bool found = false;
	uint64_t now = sys_now_ns();

	uvm_failures_lock();
	for (int i = 0; i < UVM_MAX_TOLD; i++) {
		struct uvm_told *t = &uvm_failures.told[i];
		if (t->state != UVM_TOLD_SET || !t->ident || now - t->t_ns < TAKEN_AFTER_NS)
			continue;
		if (is_consumed(t->ident)) {
			uvm_told_disown(t);
			t->state = UVM_TOLD_SWALLOWED; /* its details wait for who may still ask */
			found = true;
		} else {
			t->t_ns = now;
		}
	}
	uvm_failures_unlock();
	if (found)
		uvm_ph_sweep_unowned();
}

static bool raiser_has_work(bool *look)
{
	bool asked = false;
	uint64_t now = sys_now_ns();

	*look = false;
	for (int i = 0; i < MAX_RAISES; i++) {
		uint32_t state = atomic_load(&raises[i].state);
		asked |= state == RAISE_ASKED || state == RAISE_LEFT;
	}
	uvm_failures_lock();
	for (int i = 0; i < UVM_MAX_TOLD; i++)
		*look |= uvm_failures.told[i].state == UVM_TOLD_SET && uvm_failures.told[i].ident &&
			 now - uvm_failures.told[i].t_ns >= TAKEN_AFTER_NS;
	uvm_failures_unlock();
	return asked || *look;
}

void *uvm_raiser_main(void *arg)
{
	struct uvm_helper *h = &uvm_raiser;
	uint32_t run = (uint32_t)(uintptr_t)arg;

	while (atomic_load(&h->run) == run) {
		uint32_t seen = atomic_load(&h->kick);
		bool look;
		if (!raiser_has_work(&look) || atomic_load(&h->run) != run) {
			uvm_helper_sleep(h, seen,
					 uvm_failure_nr_placeholders() ? TAKEN_AFTER_NS / 2
								       : 3600000000000ull);
			continue;
		}
		if (Py_IsFinalizing())
			break;
		PyGILState_STATE gil = PyGILState_Ensure();
		for (int i = 0; i < MAX_RAISES; i++) {
			uint32_t left = RAISE_LEFT;
			if (atomic_load(&raises[i].state) == RAISE_ASKED)
				raiser_serve(&raises[i]);
			else
				atomic_compare_exchange_strong(&raises[i].state, &left, RAISE_FREE);
		}
		if (look)
			raiser_look_for_swallowed();
		PyGILState_Release(gil);
	}
	return NULL;
}

static bool raise_by_helper(unsigned long ident, uintptr_t py_class, bool *alone)
{
	struct raise *q = NULL;
	uint64_t until = sys_now_ns() + RAISE_TIMEOUT_S * 1000000000ull;

	while (!q && sys_now_ns() < until && atomic_load(&uvm_raiser_up)) {
		for (int i = 0; !q && i < MAX_RAISES; i++) {
			uint32_t unused = RAISE_FREE;
			if (atomic_compare_exchange_strong(&raises[i].state, &unused,
							   RAISE_FILLING))
				q = &raises[i];
		}
		if (!q)
			usleep(1000);
	}
	if (!q)
		return false;
	q->ident = ident;
	q->py_class = py_class;
	atomic_store(&q->state, RAISE_ASKED);
	uvm_helper_kick(&uvm_raiser);
	while (atomic_load(&q->state) == RAISE_ASKED && sys_now_ns() < until &&
	       atomic_load(&uvm_raiser_up)) {
		struct timespec slice = {0, 100000000};
		sys_futex_wait(&q->state, RAISE_ASKED, &slice);
	}
	uint32_t asked = RAISE_ASKED;
	if (atomic_compare_exchange_strong(&q->state, &asked,
					   atomic_load(&uvm_raiser_up) ? RAISE_LEFT : RAISE_FREE))
		return false;
	bool done = atomic_load(&q->state) == RAISE_DONE;
	*alone = q->alone;
	atomic_store(&q->state, RAISE_FREE);
	return done;
}

/* Sets an exception for the calling thread. False: Python does not know it, or is shutting down. */
bool uvm_raise_here(int kind, unsigned long *ident, bool *alone)
{
	uintptr_t py_class = atomic_load(&classes[kind]);

	if (!py_class || !Py_IsInitialized() || Py_IsFinalizing())
		return false;
	PyThreadState *ts = PyGILState_GetThisThreadState();
	if (!ts)
		return false;
	*ident = ts->thread_id;
	/* Set already, for an earlier page of this same call: only this thread takes it out. */
	if (is_ours(ts->async_exc))
		return true;
	if (ts == PyThreadState_GetUnchecked()) {
		*alone = is_alone(0);
		return uvm_raise_in(ts, (PyObject *)py_class);
	}
	return atomic_load(&uvm_raiser_up) && raise_by_helper(ts->thread_id, py_class, alone);
}

#else

bool uvm_raise_here(int kind, unsigned long *ident, bool *alone)
{
	(void)kind, (void)ident, (void)alone;
	return false;
}

#endif

void uvm_raise_child(void)
{
	for (int i = 0; i < MAX_RAISES; i++)
		atomic_store(&raises[i].state, RAISE_FREE);
}
