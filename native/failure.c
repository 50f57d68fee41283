/* A page whose content could not be had: who is told, and how, without anybody ever seeing invented data.
 *
 *   service       uvm_failure_record(), uvm_poison_page(): waiters run into SIGBUS, syscalls get EFAULT
 *   toucher       SIGBUS handler (signals.c, told.c): covers the page with a private placeholder of all-ones
 *                 bytes (placeholder.c), so that the C call can end, and sets an exception for its own Python
 *                 thread (raise.c; Ctrl-C: interrupt.c)
 *   Python        the exception is made, asks uvm_failure_take(): the page is missing (and registered) again
 *   uvm-janitor   lifts poison after UVM_POISON_TTL_NS, placeholders that nobody took
 *   uvm-raiser    the only thread here that takes the GIL: sets exceptions for threads that let go of it
 *
 * Here: records, poison, the janitor, close and fork.
 *
 * Facts -> what follows from them.
 * - Poison is for those who wait now; a page that stays poisoned would fail after its cause is gone. So
 *   it is lifted soon, and a waiter that had not run yet simply faults again.
 *
 * Lock order: space.mutex > failures.mutex > ptl. */
#include "failure.h"

#define UVM_POISON_TTL_NS 50000000ull

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

/* --- state -------------------------------------------------------------------------------------- */
struct uvm_failures uvm_failures = {.mutex = PTHREAD_MUTEX_INITIALIZER};

_Atomic int uvm_nr_placeholders;

struct uvm_helper uvm_janitor, uvm_raiser;
pthread_mutex_t uvm_helpers_mutex = PTHREAD_MUTEX_INITIALIZER;

void uvm_helper_kick(struct uvm_helper *h)
{
	atomic_fetch_add(&h->kick, 1);
	sys_futex_wake(&h->kick, 1);
}

void uvm_helper_sleep(struct uvm_helper *h, uint32_t seen, uint64_t ns)
{
	struct timespec t = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
	sys_futex_wait(&h->kick, seen, &t);
}

void uvm_failures_lock(void)
{
	pthread_mutex_lock(&uvm_failures.mutex);
}

void uvm_failures_unlock(void)
{
	pthread_mutex_unlock(&uvm_failures.mutex);
}

/* --- records ------------------------------------------------------------------------------------ */
struct uvm_failure *uvm_record_find(int64_t region, uint64_t index) /* locked */
{
	uint64_t n = uvm_failures.nr_records;

	for (uint64_t back = 0; back < UVM_MAX_POISONED && back < n; back++) {
		struct uvm_failure *f = &uvm_failures.records[(n - 1 - back) % UVM_MAX_POISONED];
		if (f->index == index && f->region == region)
			return f;
	}
	return NULL;
}

void uvm_failure_record(struct uvm_region *r, uint64_t index, int kind, int err)
{
	uvm_failures_lock();
	struct uvm_failure *known = uvm_record_find(uvm_region_handle(r), index);
	/* A late message of a page that is poisoned already says no reason: the first one stays, if it is one. */
	bool poisoned =
		kind == UVM_FAILURE_NONE || atomic_load(&r->ptes[index]) == UVM_PTE_POISONED;
	if (!known || (kind != UVM_FAILURE_NONE && known->kind == UVM_FAILURE_INTERRUPT) ||
	    !poisoned) {
		uvm_failures.records[uvm_failures.nr_records++ % UVM_MAX_POISONED] =
			(struct uvm_failure){
				.region = uvm_region_handle(r),
				.index = index,
				.kind = kind == UVM_FAILURE_NONE ? UVM_FAILURE_SOURCE : kind,
				.err = kind == UVM_FAILURE_NONE ? EIO : err,
		};
	}
	uvm_failures_unlock();
	if (kind == UVM_FAILURE_INTERRUPT)
		uvm_interrupt_used();
}

int uvm_region_failed(int64_t handle, struct uvm_failure *out, int clear)
{
	struct uvm_region *r = uvm_region_by_handle(handle);

	if (!r)
		return -ESTALE;
	uvm_failures_lock();
	int failed = r->sticky.region != 0;
	if (out)
		*out = r->sticky;
	if (clear)
		memset(&r->sticky, 0, sizeof r->sticky);
	uvm_failures_unlock();
	uvm_region_put(r);
	return failed;
}

/* --- poison ------------------------------------------------------------------------------------- */
/* The page is missing again. Locked; false: not now (the region is just being closed). */
bool uvm_poison_lift(int64_t region, uint64_t index)
{
	bool done = true;
	struct uvm_region *r = uvm_region_by_handle(region);

	if (!r)
		return true;
	uint64_t address = uvm_region_addr(r, index);
	if (atomic_load(&r->lost)) {
		; /* inaccessible, and stays so */
	} else if (atomic_load(&r->state) != UVM_REGION_LIVE) {
		done = false; /* its memory may be gone, and the address another's */
	} else if (!uvm_ph_find(region, index)) {
		uvm_ptl_lock(address);
		if (atomic_load(&r->ptes[index]) == UVM_PTE_POISONED) {
			int rc = sys_madvise(address, UVM_PAGE, MADV_DONTNEED);
			if (rc == -EINVAL) /* mlock()ed */
				rc = sys_madvise(address, UVM_PAGE, MADV_DONTNEED_LOCKED);
			if (rc == 0)
				uvm_set_pte(r, index, UVM_PTE_NONE);
			done = rc == 0;
		}
		uvm_ptl_unlock(address);
	}
	uvm_region_put(r);
	return done;
}

static void poison_note(int64_t region, uint64_t index, uint64_t t_ns) /* locked */
{
	if (uvm_failures.poison_head - uvm_failures.poison_tail == UVM_MAX_POISONED) {
		struct uvm_poisoned *oldest =
			&uvm_failures.poisoned[uvm_failures.poison_tail++ % UVM_MAX_POISONED];
		uvm_poison_lift(oldest->region, oldest->index);
	}
	uvm_failures.poisoned[uvm_failures.poison_head++ % UVM_MAX_POISONED] =
		(struct uvm_poisoned){region, index, t_ns};
}

/* Poison of what is there says EEXIST: a page, or a write-protect marker, which is taken away. */
struct uvm_done uvm_poison_ioctl(struct uvm_region *r, uint64_t index, uint64_t mode)
{
	int uffd = uvm_service_uffd(r->service);
	uint64_t address = uvm_region_addr(r, index);
	struct uvm_done d = sys_uffd_poison(uffd, address, UVM_PAGE, mode);

	if (d.err == EEXIST && r->register_mode & UFFDIO_REGISTER_MODE_WP &&
	    uvm_kernel_truth(r, index) == UVM_TRUTH_MARKER &&
	    sys_uffd_writeprotect(uffd, address, UVM_PAGE, UFFDIO_WRITEPROTECT_MODE_DONTWAKE) >= 0)
		d = sys_uffd_poison(uffd, address, UVM_PAGE, mode);
	return d;
}

struct uvm_done uvm_poison_page(struct uvm_region *r, uint64_t index)
{
	uint64_t address = uvm_region_addr(r, index);
	struct uvm_done d = {EEXIST, UVM_DONE_UNTOUCHED};

	uvm_failures_lock();
	struct uvm_placeholder *ph = uvm_ph_find(uvm_region_handle(r), index);
	if (ph) {
		/* A thread sleeps here all the same: it found the page missing before it was poisoned, and
		 * the kernel takes a poisoned page for a missing one once more before it lets the thread
		 * sleep. It may hold the GIL, which the taker of this placeholder needs: wake it, into the
		 * SIGSEGV of a closed placeholder. An open one it must not see: the janitor takes that away
		 * first, and wakes then. */
		if (ph->state == UVM_PH_COVERED && (ph->left_open || ph->nr_open))
			ph->wanted = true;
		else
			(void)sys_uffd_wake(uvm_service_uffd(r->service), address, UVM_PAGE);
	} else {
		uvm_ptl_lock(address);
		d = uvm_poison_ioctl(r, index, 0);
		if (!d.err) {
			uvm_set_pte(r, index, UVM_PTE_POISONED);
			poison_note(uvm_region_handle(r), index, sys_now_ns());
		} else { /* it is there, or poisoned already: look again */
			(void)sys_uffd_wake(uvm_service_uffd(r->service), address, UVM_PAGE);
		}
		uvm_ptl_unlock(address);
	}
	uvm_failures_unlock();
	uvm_janitor_ensure();
	uvm_helper_kick(&uvm_janitor);
	return d;
}

/* It says so before it does: a little later than our own. */
void uvm_failure_note_poison(struct uvm_region *r, uint64_t index)
{
	uvm_failures_lock();
	poison_note(uvm_region_handle(r), index, sys_now_ns() + 2 * UVM_POISON_TTL_NS);
	uvm_failures_unlock();
	uvm_janitor_ensure();
	uvm_helper_kick(&uvm_janitor);
}

/* Lifts poison or placeholder of one page, whoever's: the caller is about to try again. */
void uvm_failure_lift(struct uvm_region *r, uint64_t index)
{
	int64_t region = uvm_region_handle(r);

	uvm_failures_lock();
	struct uvm_placeholder *ph = uvm_ph_find(region, index);
	if (!ph)
		uvm_poison_lift(region, index);
	bool ours = ph && ph->state == UVM_PH_COVERED;
	if (ours)
		uvm_ph_begin_remove(ph);
	uvm_failures_unlock();
	if (ours)
		uvm_ph_remove(ph);
	else if (ph)
		uvm_ph_wait_removed(); /* somebody is at it */
}

/* --- the helpers -------------------------------------------------------------------------------- */
/* Lifts what is due; returns how long until the next is. */
static uint64_t janitor_round(bool all)
{
	uint64_t next = 3600000000000ull, now = sys_now_ns();

	uvm_failures_lock();
	for (uint64_t n = uvm_failures.poison_head - uvm_failures.poison_tail; n; n--) {
		struct uvm_poisoned p =
			uvm_failures.poisoned[uvm_failures.poison_tail % UVM_MAX_POISONED];
		if (!all && now < p.t_ns + UVM_POISON_TTL_NS) {
			next = p.t_ns + UVM_POISON_TTL_NS - now;
			break;
		}
		uvm_failures.poison_tail++;
		if (!uvm_poison_lift(p.region, p.index)) {
			poison_note(p.region, p.index, now);
			next = UVM_POISON_TTL_NS;
		}
	}
	uvm_failures_unlock();
	uvm_ph_sweep_due(all, now);
	uvm_failures_lock();
	for (int i = 0; i < UVM_MAX_TOLD; i++) {
		struct uvm_told *t = &uvm_failures.told[i];
		if (t->state == UVM_TOLD_UNKNOWN && !uvm_told_in_step(t) &&
		    now - t->t_ns > 2 * UVM_PLACEHOLDER_TTL_NS) {
			uvm_told_disown(t);
			t->state = UVM_TOLD_FREE;
		}
	}
	for (uint32_t i = 0; i < uvm_failures.nr_ph; i++)
		if (uvm_failures.ph[i].state == UVM_PH_COVERED && uvm_failures.ph[i].unknown &&
		    next > UVM_PLACEHOLDER_TTL_NS / 4)
			next = UVM_PLACEHOLDER_TTL_NS / 4;
	uvm_failures_unlock();
	return uvm_interrupt_round(now, next);
}

static void *janitor_main(void *arg)
{
	struct uvm_helper *h = &uvm_janitor;
	uint32_t run = (uint32_t)(uintptr_t)arg;

	while (atomic_load(&h->run) == run) {
		uint32_t seen = atomic_load(&h->kick);
		uint64_t ns = janitor_round(false);
		if (atomic_load(&h->run) == run)
			uvm_helper_sleep(h, seen, ns);
	}
	janitor_round(true);
	return NULL;
}

static int helper_start(struct uvm_helper *h, const char *name,
			void *(*fn)(void *)) /* uvm_helpers_mutex held */
{
	if (h->running)
		return 0;
	uint32_t run = atomic_fetch_add(&h->run, 1) + 1;
	int rc = uvm_thread_create(&h->thread, name, fn, (void *)(uintptr_t)run);
	h->running = rc == 0;
	return rc;
}

/* uvm_helpers_mutex held; let go of while the thread ends: it may need the GIL for that (uvm-raiser), or the fault
 * thread (uvm-janitor), and who has those may wait for the mutex, as os.fork() does. */
static void helper_stop(struct uvm_helper *h)
{
	pthread_t thread = h->thread;

	if (!h->running)
		return;
	h->running = false;
	atomic_fetch_add(&h->run, 1);
	pthread_mutex_unlock(&uvm_helpers_mutex);
	uvm_helper_kick(h);
	pthread_join(thread, NULL);
	pthread_mutex_lock(&uvm_helpers_mutex);
}

/* Poison must be lifted also where no region raises: then the first poison starts the janitor. */
void uvm_janitor_ensure(void)
{
	if (__atomic_load_n(&uvm_janitor.running, __ATOMIC_RELAXED))
		return;
	pthread_mutex_lock(&uvm_helpers_mutex);
	helper_start(&uvm_janitor, "uvm-janitor", janitor_main);
	pthread_mutex_unlock(&uvm_helpers_mutex);
}

int uvm_janitor_start(void)
{
	pthread_mutex_lock(&uvm_helpers_mutex);
	int rc = helper_start(&uvm_janitor, "uvm-janitor", janitor_main);
#ifndef UVM_NO_PYTHON
	if (rc == 0)
		rc = helper_start(&uvm_raiser, "uvm-raiser", uvm_raiser_main);
	atomic_store(&uvm_raiser_up, rc == 0);
#endif
	pthread_mutex_unlock(&uvm_helpers_mutex);
	return rc;
}

int uvm_janitor_stop(void)
{
	pthread_mutex_lock(&uvm_helpers_mutex);
	atomic_store(&uvm_raiser_up, 0);
	helper_stop(&uvm_raiser);
	helper_stop(&uvm_janitor);
	pthread_mutex_unlock(&uvm_helpers_mutex);
	return 0;
}

/* --- close and fork ----------------------------------------------------------------------------- */
void uvm_failure_forget(struct uvm_region *r)
{
	int64_t region = uvm_region_handle(r);

	uvm_failures_lock();
	for (uint32_t i = 0; i < uvm_failures.nr_ph;
	     i++) /* what is being removed is its remover's */
		if (uvm_failures.ph[i].state == UVM_PH_COVERED &&
		    uvm_failures.ph[i].region == region)
			uvm_ph_free(&uvm_failures.ph[i]);
	uint64_t kept = uvm_failures.poison_tail;
	for (uint64_t i = uvm_failures.poison_tail; i < uvm_failures.poison_head; i++)
		if (uvm_failures.poisoned[i % UVM_MAX_POISONED].region != region)
			uvm_failures.poisoned[kept++ % UVM_MAX_POISONED] =
				uvm_failures.poisoned[i % UVM_MAX_POISONED];
	uvm_failures.poison_head = kept;
	uvm_failures_unlock();
}

_Thread_local bool uvm_raise_is_put_off;
static uint32_t forker; /* its tid in the parent: under uvm_helpers_mutex */

/* Before anything else is held still: a removal waits for the fault thread to read its event. */
void uvm_failure_prepare(void)
{
	pthread_mutex_lock(&uvm_helpers_mutex);
	forker = sys_gettid();
	uvm_interrupt_prepare();
	uvm_failures_lock();
	for (int i = 0; uvm_failures.nr_removing && i < 2000; i++) {
		uvm_failures_unlock();
		usleep(500);
		uvm_failures_lock();
	}
}

void uvm_failure_parent(void)
{
	uvm_failures_unlock();
	uvm_interrupt_parent();
	pthread_mutex_unlock(&uvm_helpers_mutex);
}

void uvm_failure_child(void)
{
	bool janitor_was = uvm_janitor.running, raiser_was = uvm_raiser.running;

	pthread_mutex_init(&uvm_failures.mutex, NULL);
	pthread_mutex_init(&uvm_helpers_mutex, NULL);
	for (uint32_t i = 0; i < uvm_failures.nr_ph; i++) {
		struct uvm_placeholder *ph = &uvm_failures.ph[i];
		if (ph->state != UVM_PH_FREE)
			uvm_ph_child_page(ph->region, ph->index, ph->nr_pages);
		ph->state = UVM_PH_FREE;
		ph->shadow = ph->nr_steps = 0; /* not inherited */
	}
	uvm_failures.nr_ph = 0;
	uvm_failures.nr_removing = 0;
	atomic_store(&uvm_nr_placeholders, 0);
	/* What the one thread is still to be told, it is told here, too. */
	struct uvm_told *t = uvm_raise_is_put_off ? uvm_told_find(forker) : NULL, still = {0};
	if (t)
		still = (struct uvm_told){.tid = sys_gettid(),
					  .state = UVM_TOLD_SET,
					  .ident = t->ident,
					  .failure = t->failure,
					  .alone = true,
					  .run = 1,
					  .t_ns = sys_now_ns()};
	memset(uvm_failures.told, 0, sizeof uvm_failures.told);
	uvm_failures.told[0] = still;
	while (uvm_failures.poison_tail != uvm_failures.poison_head) {
		struct uvm_poisoned *p =
			&uvm_failures.poisoned[uvm_failures.poison_tail++ % UVM_MAX_POISONED];
		struct uvm_region *r = uvm_region_by_handle(p->region);
		bool still = r && atomic_load(&r->ptes[p->index]) == UVM_PTE_POISONED;
		if (r)
			uvm_region_put(r);
		if (still)
			uvm_ph_child_page(p->region, p->index, 1);
	}
	uvm_raise_child();
	uvm_interrupt_child();
	uvm_janitor.running = uvm_raiser.running = false;
	uvm_agent_child();
	if (raiser_was)
		uvm_janitor_start();
	else if (janitor_was)
		uvm_janitor_ensure();
}
