/* A page whose content could not be had: who is told, and how, without anybody ever seeing invented data.
 *
 *   service    uvm_failure_record(), uvm_poison_page(): waiters run into SIGBUS, syscalls get EFAULT
 *   toucher    SIGBUS handler: covers the page with a private placeholder of all-ones bytes, so that
 *              the C call can end, and sets an exception for its own Python thread
 *   Python     the exception is made, asks uvm_failure_take(): the page is missing (and registered) again
 *   uvm-janitor  lifts poison after UVM_POISON_TTL_NS, placeholders that nobody took
 *   uvm-raiser   the only thread here that takes the GIL: sets exceptions for threads that let go of it
 *
 * Facts -> what follows from them.
 * - Poison is for those who wait now; a page that stays poisoned would fail after its cause is gone. So
 *   it is lifted soon, and a waiter that had not run yet simply faults again.
 * - mremap() over a page replaces it in one step for all threads: no thread sees a hole. With EVENT_REMAP a
 *   moved mapping stays registered, and the caller waits until the event is read: so a placeholder is
 *   taken away with no lock held that the fault thread could want. UFFDIO_POISON refuses a page that is
 *   there (EEXIST), so poison before cover also proves that no content is thrown away.
 * - The SIGBUS handler is entered by a touch of lazy memory, and nothing here (nor in any file of this
 *   library, nor in CPython) touches lazy memory with a lock held: so it may take them.
 * - One address space shows a page to all of its threads, and CPython hands the GIL on before it raises: the
 *   next thread would read the placeholder and be told nothing. So a placeholder is PROT_NONE, and the
 *   thread that was told has each instruction sent elsewhere (step.c); whoever else touches it gets SIGSEGV,
 *   and is told as well. What step.c refuses (a gather) it is opened for: the trap flag, then SIGTRAP
 *   closes it. XXX Another CPU may read in that microsecond. Not so where Python has no other thread:
 *   it stays open. A step costs some us; after MAX_STEPS it stays open, and the region is
 *   sticky-failed, because another thread may then have read it. XXX So from the start on machines
 *   without a trap flag for user code (aarch64). Threads that waited for the same page have GRACE_NS to run
 *   into its poison themselves.
 *
 * Lock order: space.mutex > failures.mutex > ptl. */
#ifndef UVM_NO_PYTHON
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#endif

#include "failure.h"

#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

enum {
	MAX_PLACEHOLDERS = 4096, /* each may split a mapping in three; the oldest makes room */
	/* threads with a failure that they have not taken yet; the oldest makes room */
	MAX_TOLD = 512,
	MAX_OWNERS = 6,
	MAX_POISONED = 4096,
	MAX_RAISES = 64,
	MAX_LOOKS = 64, /* power of two */
	LOOKS_IN_VAIN = 2000,
	WAIT_NS = 50000,
	MAX_OPEN = 16,       /* pages that one instruction may touch (a gather) */
	MAX_STEPS = 1 << 16, /* instructions of one thread until a placeholder stays open */
};

#define UVM_POISON_TTL_NS 50000000ull
#define GRACE_NS 1000000l
#define PLACEHOLDER_TTL_NS 250000000ull /* of a thread that no exception can reach */
#define TAKEN_AFTER_NS 2000000000ull    /* then look whether an exception was swallowed */
#define LOOKS_GAP_NS 1000000000ull
#define RAISE_TIMEOUT_S 60
#define INTERRUPT_TTL_NS 1000000000ull

#if defined(__x86_64__)
#define HAVE_STEP 1
#define TRAP_FLAG 0x100
#else
#define HAVE_STEP 0
#endif

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

/* --- state -------------------------------------------------------------------------------------- */
enum placeholder_state { PH_FREE, PH_COVERED, PH_REMOVING };

struct placeholder {
	int64_t region;
	uint64_t index;
	uint64_t t_ns;
	uint64_t removal; /* PH_REMOVING: which one, of all removals */
	uint64_t address;
	uint32_t serial;  /* a slot is used again */
	uint16_t nr_open; /* threads that run an instruction on it, which step.c refused */
	bool left_open;
	uint32_t nr_pages;
	uint8_t state, nr_owners;
	bool wanted;                 /* a thread sleeps on one of its pages: take it away soon */
	bool unknown;                /* no exception says when it may go: PLACEHOLDER_TTL_NS */
	uint16_t owners[MAX_OWNERS]; /* slots of told[] */
};

/* UNKNOWN: to Python; the region is sticky-failed instead. */
enum told_state { TOLD_FREE, TOLD_SET, TOLD_SWALLOWED, TOLD_UNKNOWN };

struct told {
	uint32_t tid;
	int state;
	unsigned long ident; /* Python's number of the thread */
	struct uvm_failure failure;
	uint64_t t_ns;
	bool alone;   /* Python has no other thread */
	uint64_t run; /* pages that the next placeholder covers */
	uint32_t steps, nr_open;
	bool stepping; /* in step_over() */
	struct uvm_shift shift;
	/* Trap flags set, in this context and in those that a handler interrupted. */
	uint32_t nr_traps;
	struct {
		uint32_t serial;
		uint16_t ph;
	} open[MAX_OPEN]; /* for the one instruction */
};

struct poisoned {
	int64_t region;
	uint64_t index;
	uint64_t t_ns;
};

static struct {
	pthread_mutex_t mutex;
	struct placeholder ph[MAX_PLACEHOLDERS];
	uint32_t nr_ph; /* high-water mark */
	uint32_t nr_removing, serial;
	uint64_t removals; /* begun so far */
	struct told told[MAX_TOLD];
	struct poisoned poisoned[MAX_POISONED]; /* a ring, oldest first */
	uint64_t poison_head, poison_tail;
	/* Why: the newest overwrites the oldest, whose page is not poisoned any more by then. */
	struct uvm_failure records[MAX_POISONED];
	uint64_t nr_records;
} failures = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static _Atomic int nr_placeholders;

/* One native thread: signals blocked, sleeps on `kick`. */
struct helper {
	pthread_t thread;
	bool running; /* under helpers_mutex */
	_Atomic uint32_t
		run; /* counts starts and stops: a thread ends when it is not its own any more */
	_Atomic uint32_t kick;
};
static struct helper janitor, raiser;
static pthread_mutex_t helpers_mutex = PTHREAD_MUTEX_INITIALIZER;

static void helper_kick(struct helper *h)
{
	atomic_fetch_add(&h->kick, 1);
	sys_futex_wake(&h->kick, 1);
}

static void helper_sleep(struct helper *h, uint32_t seen, uint64_t ns)
{
	struct timespec t = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
	sys_futex_wait(&h->kick, seen, &t);
}

static void lock(void)
{
	pthread_mutex_lock(&failures.mutex);
}

static void unlock(void)
{
	pthread_mutex_unlock(&failures.mutex);
}

static void janitor_ensure(void);

/* --- records ------------------------------------------------------------------------------------ */
static struct uvm_failure *record_find(int64_t region, uint64_t index) /* locked */
{
	uint64_t n = failures.nr_records;

	for (uint64_t back = 0; back < MAX_POISONED && back < n; back++) {
		struct uvm_failure *f = &failures.records[(n - 1 - back) % MAX_POISONED];
		if (f->index == index && f->region == region)
			return f;
	}
	return NULL;
}

static void interrupt_used(void);

void uvm_failure_record(struct uvm_region *r, uint64_t index, int kind, int err)
{
	lock();
	struct uvm_failure *known = record_find(uvm_region_handle(r), index);
	/* A late message of a page that is poisoned already says no reason: the first one stays, if it is one. */
	bool poisoned =
		kind == UVM_FAILURE_NONE || atomic_load(&r->ptes[index]) == UVM_PTE_POISONED;
	if (!known || (kind != UVM_FAILURE_NONE && known->kind == UVM_FAILURE_INTERRUPT) ||
	    !poisoned) {
		failures.records[failures.nr_records++ % MAX_POISONED] = (struct uvm_failure){
			.region = uvm_region_handle(r),
			.index = index,
			.kind = kind == UVM_FAILURE_NONE ? UVM_FAILURE_SOURCE : kind,
			.err = kind == UVM_FAILURE_NONE ? EIO : err,
		};
	}
	unlock();
	if (kind == UVM_FAILURE_INTERRUPT)
		interrupt_used();
}

int uvm_region_failed(int64_t handle, struct uvm_failure *out, int clear)
{
	struct uvm_region *r = uvm_region_by_handle(handle);

	if (!r)
		return -ESTALE;
	lock();
	int failed = r->sticky.region != 0;
	if (out)
		*out = r->sticky;
	if (clear)
		memset(&r->sticky, 0, sizeof r->sticky);
	unlock();
	uvm_region_put(r);
	return failed;
}

/* --- poison ------------------------------------------------------------------------------------- */
static struct placeholder *ph_find(int64_t region, uint64_t index) /* locked */
{
	for (uint32_t i = 0; i < failures.nr_ph; i++) {
		struct placeholder *ph = &failures.ph[i];
		if (ph->state != PH_FREE && ph->region == region && index >= ph->index &&
		    index - ph->index < ph->nr_pages)
			return ph;
	}
	return NULL;
}

/* The page is missing again. Locked; false: not now (the region is just being closed). */
static bool poison_lift(int64_t region, uint64_t index)
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
	} else if (!ph_find(region, index)) {
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
	if (failures.poison_head - failures.poison_tail == MAX_POISONED) {
		struct poisoned *oldest = &failures.poisoned[failures.poison_tail++ % MAX_POISONED];
		poison_lift(oldest->region, oldest->index);
	}
	failures.poisoned[failures.poison_head++ % MAX_POISONED] =
		(struct poisoned){region, index, t_ns};
}

/* Poison of what is there says EEXIST: a page, or a write-protect marker, which is taken away. */
static struct uvm_done poison_ioctl(struct uvm_region *r, uint64_t index, uint64_t mode)
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

	lock();
	struct placeholder *ph = ph_find(uvm_region_handle(r), index);
	if (ph) {
		/* A thread sleeps here all the same: it found the page missing before it was poisoned, and
		 * the kernel takes a poisoned page for a missing one once more before it lets the thread
		 * sleep. It may hold the GIL, which the taker of this placeholder needs: wake it, into the
		 * SIGSEGV of a closed placeholder. An open one it must not see: the janitor takes that away
		 * first, and wakes then. */
		if (ph->state == PH_COVERED && (ph->left_open || ph->nr_open))
			ph->wanted = true;
		else
			(void)sys_uffd_wake(uvm_service_uffd(r->service), address, UVM_PAGE);
	} else {
		uvm_ptl_lock(address);
		d = poison_ioctl(r, index, 0);
		if (!d.err) {
			uvm_set_pte(r, index, UVM_PTE_POISONED);
			poison_note(uvm_region_handle(r), index, sys_now_ns());
		} else { /* it is there, or poisoned already: look again */
			(void)sys_uffd_wake(uvm_service_uffd(r->service), address, UVM_PAGE);
		}
		uvm_ptl_unlock(address);
	}
	unlock();
	janitor_ensure();
	helper_kick(&janitor);
	return d;
}

/* It says so before it does: a little later than our own. */
void uvm_failure_note_poison(struct uvm_region *r, uint64_t index)
{
	lock();
	poison_note(uvm_region_handle(r), index, sys_now_ns() + 2 * UVM_POISON_TTL_NS);
	unlock();
	janitor_ensure();
	helper_kick(&janitor);
}

/* --- placeholders ------------------------------------------------------------------------------- */
int uvm_failure_nr_placeholders(void)
{
	return atomic_load(&nr_placeholders);
}

static struct placeholder *ph_alloc(void) /* locked */
{
	for (uint32_t i = 0; i < MAX_PLACEHOLDERS; i++) {
		if (failures.ph[i].state != PH_FREE)
			continue;
		if (i >= failures.nr_ph)
			failures.nr_ph = i + 1;
		memset(&failures.ph[i], 0, sizeof failures.ph[i]);
		failures.ph[i].serial = ++failures.serial;
		return &failures.ph[i];
	}
	return NULL;
}

static void ph_free(struct placeholder *ph) /* locked */
{
	if (ph->state == PH_FREE)
		return;
	ph->state = PH_FREE;
	atomic_fetch_sub(&nr_placeholders, 1);
	while (failures.nr_ph && failures.ph[failures.nr_ph - 1].state == PH_FREE)
		failures.nr_ph--;
}

static bool is_shared(const struct uvm_region *r)
{
	return r->backing == UVM_BACKING_SHARED_FILE;
}

/* How many pages from index on, which is poisoned, can be poisoned and covered at once: `want` at most,
 * nothing that is there or being fetched, and within the 2 MiB of the page-table lock that is held.
 * Sleepers are not woken: they would read the placeholder. */
static uint64_t run_poison(struct uvm_region *r, uint64_t index, uint64_t want)
{
	uint64_t address = uvm_region_addr(r, index);
	uint64_t in_pmd = UVM_PMD_PAGES - (address >> UVM_PAGE_SHIFT) % UVM_PMD_PAGES;
	uint64_t n = 1, end = r->nr_pages - index;

	end = end < in_pmd ? end : in_pmd;
	end = end < want ? end : want;
	/* Another process publishes its commits under no lock of ours: one page, whose state it knows. */
	if (r->service == UVM_SERVICE_PYTHON)
		return 1;
	while (n < end) {
		unsigned flags = 0;
		if (atomic_load(&r->ptes[index + n]) != UVM_PTE_NONE ||
		    uvm_walk(r, index + n, UVM_KIND_MISSING, &flags) != UVM_PTE_NONE ||
		    flags & UVM_FLAG_CACHED)
			break;
		n++;
	}
	if (n == 1)
		return 1;
	struct uvm_done d = sys_uffd_poison(uvm_service_uffd(r->service), address + UVM_PAGE,
					    (n - 1) << UVM_PAGE_SHIFT, 1 /* DONTWAKE */);
	if (d.err)
		n = d.done > 0 ? 1 + ((uint64_t)d.done >> UVM_PAGE_SHIFT) : 1;
	uvm_set_ptes(r, index + 1, n - 1, UVM_PTE_POISONED);
	return n;
}

/* Covers poisoned pages, in one step for all threads. */
static int cover(struct uvm_region *r, uint64_t index, uint64_t nr_pages)
{
	uint64_t len = nr_pages << UVM_PAGE_SHIFT, temp;
	int rc = sys_mmap(0, len, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0, &temp);
	if (rc < 0)
		return rc;
	memset((void *)(uintptr_t)temp, 0xff, len);
	rc = sys_madvise(temp, len, MADV_DONTFORK); /* as the region around it; see fork.c */
	if (rc == 0)
		rc = uvm_mprotect(temp, len, PROT_NONE);
	if (rc == 0)
		rc = sys_mremap_over(temp, len, uvm_region_addr(r, index));
	if (rc < 0)
		sys_munmap(temp, len);
	return rc;
}

/* The region's own pages, empty, at `address` (0: anywhere). Mapped as mm/mapping.py maps a region: where a
 * flag differs the kernel does not join them with their neighbours, and each failure would split it for good. */
static int pages_map(struct uvm_region *r, uint64_t index, uint64_t nr_pages, uint64_t address,
		     int prot, uint64_t *ret)
{
	uint64_t len = nr_pages << UVM_PAGE_SHIFT;
	int flags = (is_shared(r) ? MAP_SHARED : MAP_PRIVATE | MAP_NORESERVE) |
		    (r->cache ? 0 : MAP_ANONYMOUS) | (address ? MAP_FIXED : 0);
	int rc = sys_mmap(address, len, prot, flags, r->cache ? r->cache->data_fd : -1,
			  r->cache ? (int64_t)((r->pgoff + index) << UVM_PAGE_SHIFT) : 0, ret);
	if (rc < 0)
		return rc;
	(void)sys_madvise(*ret, len, MADV_NOHUGEPAGE);
	rc = sys_madvise(*ret, len, MADV_DONTFORK);
	return rc;
}

static int pages_make(struct uvm_region *r, uint64_t index, uint64_t nr_pages, uint64_t *ret)
{
	uint64_t len = nr_pages << UVM_PAGE_SHIFT;
	/* Accessible only when it is registered: after mlockall(MCL_FUTURE) mmap() would fill it, with zeros. */
	int rc = pages_map(r, index, nr_pages, 0, PROT_NONE, ret);

	if (rc == 0)
		rc = sys_uffd_register(uvm_service_uffd(r->service), *ret, len, r->register_mode,
				       NULL);
	if (rc == 0)
		rc = uvm_mprotect(*ret, len, r->prot);
	if (rc < 0 && *ret)
		sys_munmap(*ret, len);
	return rc;
}

/* Takes a placeholder (PH_REMOVING) away, with no lock held: the move waits until the service has read
 * an event. On failure it stays, nobody's, for the janitor to try again. */
static void ph_remove(struct placeholder *ph)
{
	struct uvm_region *r = uvm_region_by_handle(ph->region);
	uint64_t len = (uint64_t)ph->nr_pages << UVM_PAGE_SHIFT, temp;
	int rc = -EAGAIN;
	/* Then its memfd's number may be another file's. */
	bool lost = r && (!uvm_service_check(r->service) || atomic_load(&r->lost));

	if (r && !lost && atomic_load(&r->state) == UVM_REGION_LIVE) {
		uint64_t address = uvm_region_addr(r, ph->index);
		rc = pages_make(r, ph->index, ph->nr_pages, &temp);
		if (rc == 0) {
			rc = sys_mremap_over(temp, len, address);
			if (rc < 0)
				sys_munmap(temp, len);
		}
		if (rc == 0) {
			uvm_ptl_lock(address); /* a placeholder lies in one PMD */
			for (uint64_t i = 0; i < ph->nr_pages; i++)
				if (atomic_load(&r->ptes[ph->index + i]) == UVM_PTE_POISONED)
					uvm_set_pte(r, ph->index + i, UVM_PTE_NONE);
			uvm_ptl_unlock(address);
			(void)sys_uffd_wake(uvm_service_uffd(r->service), address, len);
		}
	}
	lock();
	if (ph->state == PH_REMOVING) {
		if (rc == 0 || !r || lost) {
			ph_free(ph);
		} else {
			ph->state = PH_COVERED;
			ph->unknown = true;
			ph->t_ns = sys_now_ns();
			ph->serial =
				++failures.serial; /* now the youngest: others are tried first */
		}
	}
	failures.nr_removing--;
	unlock();
	if (r)
		uvm_region_put(r);
}

static void ph_begin_remove(struct placeholder *ph) /* locked */
{
	ph->state = PH_REMOVING;
	ph->nr_owners = 0;
	ph->removal = ++failures.removals;
	failures.nr_removing++;
}

/* Removals that other threads have begun: until they end, a touch would read the placeholder. */
static void ph_wait_removed(void)
{
	uint64_t begun = 0;
	bool busy = true;

	while (busy) {
		busy = false;
		lock();
		begun = begun ? begun : failures.removals;
		for (uint32_t i = 0; i < failures.nr_ph; i++)
			busy |= failures.ph[i].state == PH_REMOVING &&
				failures.ph[i].removal <= begun;
		unlock();
		if (busy)
			usleep(20);
	}
}

/* Removes, one at a time, every placeholder that `due` selects. */
static void ph_sweep(bool (*due)(const struct placeholder *ph, uint64_t arg), uint64_t arg)
{
	for (uint32_t i = 0;; i++) {
		lock();
		while (i < failures.nr_ph &&
		       !(failures.ph[i].state == PH_COVERED && due(&failures.ph[i], arg)))
			i++;
		if (i >= failures.nr_ph) {
			unlock();
			return;
		}
		ph_begin_remove(&failures.ph[i]);
		unlock();
		ph_remove(&failures.ph[i]);
	}
}

static bool due_unowned(const struct placeholder *ph, uint64_t arg)
{
	(void)arg;
	return ph->nr_owners == 0 && !ph->unknown;
}

static bool due_now(const struct placeholder *ph, uint64_t now)
{
	return ph->wanted || (ph->unknown && now - ph->t_ns >= PLACEHOLDER_TTL_NS);
}

static bool due_all(const struct placeholder *ph, uint64_t arg)
{
	(void)ph, (void)arg;
	return true;
}

/* Lifts poison or placeholder of one page, whoever's: the caller is about to try again. */
void uvm_failure_lift(struct uvm_region *r, uint64_t index)
{
	int64_t region = uvm_region_handle(r);

	lock();
	struct placeholder *ph = ph_find(region, index);
	if (!ph)
		poison_lift(region, index);
	bool ours = ph && ph->state == PH_COVERED;
	if (ours)
		ph_begin_remove(ph);
	unlock();
	if (ours)
		ph_remove(ph);
	else if (ph)
		ph_wait_removed(); /* somebody is at it */
}

/* --- the thread that is told -------------------------------------------------------------------- */
static struct told *told_find(uint32_t tid) /* locked */
{
	for (int i = 0; i < MAX_TOLD; i++)
		if (failures.told[i].state != TOLD_FREE && failures.told[i].tid == tid)
			return &failures.told[i];
	return NULL;
}

static void
told_disown(struct told *t) /* locked: its placeholders are nobody's, or somebody else's */
{
	uint16_t slot = (uint16_t)(t - failures.told);

	for (uint32_t i = 0; i < failures.nr_ph; i++) {
		struct placeholder *ph = &failures.ph[i];
		for (int k = 0; ph->state == PH_COVERED && k < ph->nr_owners; k++)
			if (ph->owners[k] == slot)
				ph->owners[k--] = ph->owners[--ph->nr_owners];
	}
}

static bool told_in_step(const struct told *t)
{
	return t->stepping || t->nr_open || t->nr_traps;
}

/* The slot of this thread; what an earlier failure of it left behind is let go of. When all are in use the
 * oldest goes: its thread's exception will say less. NULL: each is in the middle of an instruction. */
static struct told *told_get(uint32_t tid, const struct uvm_failure *f) /* locked */
{
	struct told *t = told_find(tid), *oldest = NULL;

	if (t && (t->state != TOLD_SWALLOWED || told_in_step(t)))
		return t;
	for (int i = 0; !t && i < MAX_TOLD; i++) {
		struct told *at = &failures.told[i];
		if (at->state == TOLD_FREE)
			t = at;
		else if (!told_in_step(at) && (!oldest || at->t_ns < oldest->t_ns))
			oldest = at;
	}
	if (!t && (t = oldest))
		told_disown(t);
	if (t)
		*t = (struct told){.tid = tid,
				   .state = TOLD_SET,
				   .failure = *f,
				   .run = 1,
				   .t_ns = sys_now_ns()};
	return t;
}

static bool told_already(uint32_t tid)
{
	lock();
	struct told *t = told_find(tid);
	bool yes = t && t->state != TOLD_SWALLOWED;
	unlock();
	return yes;
}

int uvm_failure_take(struct uvm_failure *out)
{
	lock();
	struct told *t = told_find(sys_gettid());
	if (t && t->state == TOLD_UNKNOWN)
		t = NULL;
	if (t) {
		*out = t->failure;
		told_disown(t);
		t->state = TOLD_FREE;
	}
	unlock();
	if (!t)
		return 0;
	ph_sweep(due_unowned, 0);
	ph_wait_removed();
	return 1;
}

/* --- Python ------------------------------------------------------------------------------------- */
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
static _Atomic int raiser_up;

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

	lock();
	for (int i = 0; i < MAX_TOLD; i++) {
		struct told *t = &failures.told[i];
		if (t->state != TOLD_SET || !t->ident || now - t->t_ns < TAKEN_AFTER_NS)
			continue;
		if (is_consumed(t->ident)) {
			told_disown(t);
			t->state = TOLD_SWALLOWED; /* its details wait for who may still ask */
			found = true;
		} else {
			t->t_ns = now;
		}
	}
	unlock();
	if (found)
		ph_sweep(due_unowned, 0);
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
	lock();
	for (int i = 0; i < MAX_TOLD; i++)
		*look |= failures.told[i].state == TOLD_SET && failures.told[i].ident &&
			 now - failures.told[i].t_ns >= TAKEN_AFTER_NS;
	unlock();
	return asked || *look;
}

static void *raiser_main(void *arg)
{
	struct helper *h = &raiser;
	uint32_t run = (uint32_t)(uintptr_t)arg;

	while (atomic_load(&h->run) == run) {
		uint32_t seen = atomic_load(&h->kick);
		bool look;
		if (!raiser_has_work(&look) || atomic_load(&h->run) != run) {
			helper_sleep(h, seen,
				     atomic_load(&nr_placeholders) ? TAKEN_AFTER_NS / 2
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

	while (!q && sys_now_ns() < until && atomic_load(&raiser_up)) {
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
	helper_kick(&raiser);
	while (atomic_load(&q->state) == RAISE_ASKED && sys_now_ns() < until &&
	       atomic_load(&raiser_up)) {
		struct timespec slice = {0, 100000000};
		sys_futex_wait(&q->state, RAISE_ASKED, &slice);
	}
	uint32_t asked = RAISE_ASKED;
	if (atomic_compare_exchange_strong(&q->state, &asked,
					   atomic_load(&raiser_up) ? RAISE_LEFT : RAISE_FREE))
		return false;
	bool done = atomic_load(&q->state) == RAISE_DONE;
	*alone = q->alone;
	atomic_store(&q->state, RAISE_FREE);
	return done;
}

/* Sets an exception for the calling thread. False: Python does not know it, or is shutting down. */
static bool raise_here(int kind, unsigned long *ident, bool *alone)
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
	return atomic_load(&raiser_up) && raise_by_helper(ts->thread_id, py_class, alone);
}

#else

static bool raise_here(int kind, unsigned long *ident, bool *alone)
{
	(void)kind, (void)ident, (void)alone;
	return false;
}

#endif

/* --- Ctrl-C ------------------------------------------------------------------------------------- */
/* The main thread waits in a fault; Python's own handler would only set a flag that nobody looks at. So
 * ours notes the signal and holds it back; the fault thread fails the page with the kind INTERRUPT,
 * and the exception set then is a KeyboardInterrupt (whose making calls a handler of the user's, if
 * there is one). A signal that no fault takes up is given to the handler before us. */
enum interrupt { INT_NONE, INT_NOTED, INT_USED, INT_IN_SYSCALL };

static _Atomic int interrupt_state, interrupt_pass;
static _Atomic uint64_t interrupt_t;
static struct sigaction sigint_before;
static bool sigint_watched;
static unsigned sigint_watchers; /* a bit a service */
static pthread_mutex_t sigint_mutex = PTHREAD_MUTEX_INITIALIZER;

/* As the kernel would call it: a handler that asked for SA_NODEFER may raise its signal again (faulthandler
 * does, to end the process) and counts on it being delivered before it returns. */
static void call_action(const struct sigaction *sa, int sig, siginfo_t *info, void *context)
{
	sigset_t one, before;
	bool open = sa->sa_flags & SA_NODEFER;

	sigemptyset(&one);
	sigaddset(&one, sig);
	if (open)
		pthread_sigmask(SIG_UNBLOCK, &one, &before);
	if (sa->sa_flags & SA_SIGINFO)
		sa->sa_sigaction(sig, info, context);
	else if (sa->sa_handler != SIG_IGN && sa->sa_handler != SIG_DFL)
		sa->sa_handler(sig);
	if (open)
		pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void sigint_handler(int sig, siginfo_t *info, void *context)
{
	int saved = errno;
	bool pass = atomic_exchange(&interrupt_pass, 0) || sys_gettid() != (uint32_t)getpid();

	if (!pass && atomic_load(&interrupt_state) == INT_IN_SYSCALL) {
		atomic_store(&interrupt_state, INT_NONE);
		pass = true;
	}
	if (pass) {
		call_action(&sigint_before, sig, info, context);
	} else {
		int none = INT_NONE;
		atomic_store(&interrupt_t, sys_now_ns());
		atomic_compare_exchange_strong(&interrupt_state, &none, INT_NOTED);
		helper_kick(&janitor);
	}
	errno = saved;
}

/* Gives a signal that was held back to the handler that it was meant for. */
static void interrupt_hand_on(int from)
{
	if (atomic_compare_exchange_strong(&interrupt_state, &from, INT_NONE)) {
		atomic_store(&interrupt_pass, 1);
		sys_tgkill((uint32_t)getpid(), SIGINT);
	}
}

/* The exception has been made, and calls the user's handler by raising the signal again. */
void uvm_interrupt_pass(void)
{
	atomic_store(&interrupt_pass, 1);
}

/* The kernel holds that signal, and delivers it when the system call has ended. */
static void interrupt_forget_syscall(void)
{
	int held = INT_IN_SYSCALL;
	atomic_compare_exchange_strong(&interrupt_state, &held, INT_NONE);
}

/* By service: one that has nobody waiting any more does not look away for the others. */
void uvm_interrupt_watch(int service, bool on)
{
	unsigned who = 1u << service;
	struct sigaction now;

	if (on == !!(__atomic_load_n(&sigint_watchers, __ATOMIC_RELAXED) & who))
		return;
	pthread_mutex_lock(&sigint_mutex);
	unsigned left = on ? sigint_watchers | who : sigint_watchers & ~who;
	__atomic_store_n(&sigint_watchers, left, __ATOMIC_RELAXED);
	if (on && !sigint_watched && sigaction(SIGINT, NULL, &now) == 0 &&
	    (now.sa_flags & SA_SIGINFO ||
	     (now.sa_handler != SIG_DFL && now.sa_handler != SIG_IGN))) {
		struct sigaction ours = {.sa_sigaction = sigint_handler, .sa_mask = now.sa_mask};
		ours.sa_flags = (now.sa_flags & ~SA_RESETHAND) | SA_SIGINFO;
		sigint_before = now;
		atomic_store(&interrupt_pass, 0);
		__atomic_store_n(&sigint_watched, sigaction(SIGINT, &ours, NULL) == 0,
				 __ATOMIC_RELAXED);
	} else if (!left && sigint_watched) {
		if (sigaction(SIGINT, NULL, &now) == 0 && now.sa_flags & SA_SIGINFO &&
		    now.sa_sigaction == sigint_handler)
			sigaction(SIGINT, &sigint_before, NULL);
		__atomic_store_n(&sigint_watched, false, __ATOMIC_RELAXED);
		interrupt_hand_on(INT_NOTED);
		interrupt_forget_syscall();
	}
	pthread_mutex_unlock(&sigint_mutex);
	if (on)
		janitor_ensure(); /* it hands on what no fault takes up */
}

static void interrupt_used(void)
{
	int noted = INT_NOTED;
	atomic_compare_exchange_strong(&interrupt_state, &noted, INT_USED);
}

/* A thread that waits inside a system call runs no handler: the signal stays pending in the kernel. */
static bool sigint_in_kernel(void)
{
	char text[4096];
	int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
	if (fd >= 0)
		close(fd);
	text[n > 0 ? n : 0] = 0;
	bool pending = false;
	static const char *const words[] = {"\nSigPnd:", "\nShdPnd:"};
	for (int i = 0; i < 2; i++) {
		const char *at = strstr(text, words[i]);
		if (at)
			pending |= strtoull(at + 8, NULL, 16) >> (SIGINT - 1) & 1;
	}
	return pending;
}

/* Seen there twice, some time apart: it does not just arrive. */
static bool sigint_stuck(void)
{
	static _Atomic uint64_t looked;
	static _Atomic int seen;
	uint64_t now = sys_now_ns(), last = atomic_load(&looked);

	if (now - last < 20000000u || !atomic_compare_exchange_strong(&looked, &last, now))
		return false;
	if (!sigint_in_kernel()) {
		atomic_store(&seen, 0);
		return false;
	}
	return atomic_fetch_add(&seen, 1) >= 1;
}

/* Also for a thread that has been told of a failure and is still in its C call: what it reads is
 * worth nothing, so it does not wait for the next page. */
bool uvm_interrupt_pending(uint32_t tid)
{
	if (told_already(tid))
		return true;
	if (tid != (uint32_t)getpid())
		return false;
	int held = atomic_load(&interrupt_state);
	if (held == INT_IN_SYSCALL && !sigint_in_kernel()) {
		interrupt_forget_syscall(); /* delivered since */
		return false;
	}
	if (held != INT_NONE)
		return true;
	if (!__atomic_load_n(&sigint_watched, __ATOMIC_RELAXED) || !sigint_stuck())
		return false;
	int none = INT_NONE;
	atomic_store(&interrupt_t, sys_now_ns());
	atomic_compare_exchange_strong(&interrupt_state, &none, INT_IN_SYSCALL);
	return true;
}

/* --- SIGBUS ------------------------------------------------------------------------------------- */
struct chained {
	int sig;
	void (*handler)(int sig, siginfo_t *info, void *context);
	struct sigaction before[2];
	_Atomic int slot;
	_Atomic uint32_t chaining; /* tid that is inside the handler before ours */
};

static void sigbus_handler(int sig, siginfo_t *info, void *context);
static void sigsegv_handler(int sig, siginfo_t *info, void *context);
static void sigtrap_handler(int sig, siginfo_t *info, void *context);
static struct chained chains[] = {
	{.sig = SIGBUS, .handler = sigbus_handler},
	{.sig = SIGSEGV, .handler = sigsegv_handler},
	{.sig = SIGTRAP, .handler = sigtrap_handler},
};
enum { NR_CHAINS = HAVE_STEP ? 3 : 2 };
static _Atomic int sigbus_installed; /* 0: pass everything on */

static void die_line(const struct uvm_region *r, uint64_t index, const char *why, int err)
{
	char line[256];
	int n = snprintf(
		line, sizeof line,
		"uffd_vm: page %llu of the region at %#llx could not be had, and %s (errno %d): "
		"SIGBUS\n",
		(unsigned long long)index, (unsigned long long)r->start, why, err);
	if (n > 0 && write(2, line, (size_t)n < sizeof line ? (size_t)n : sizeof line - 1) < 0)
		return;
}

static void default_action(int sig, const siginfo_t *info)
{
	struct sigaction sa = {.sa_handler = SIG_DFL};

	sigaction(sig, &sa, NULL);
	if (info->si_code <= 0) /* sent by somebody: it does not come back by itself */
		sys_tgkill(sys_gettid(), sig);
}

static void chain(struct chained *c, siginfo_t *info, void *context)
{
	const struct sigaction *before = &c->before[atomic_load(&c->slot)];
	uint32_t tid = sys_gettid(), nobody = 0;

	if (before->sa_flags & SA_SIGINFO ||
	    (before->sa_handler != SIG_DFL && before->sa_handler != SIG_IGN)) {
		/* A handler that was installed over ours and gives back to us: end of the chain. */
		if (atomic_load(&c->chaining) == tid) {
			default_action(c->sig, info);
			return;
		}
		bool first = atomic_compare_exchange_strong(&c->chaining, &nobody, tid);
		call_action(before, c->sig, info, context);
		if (first)
			atomic_store(&c->chaining, 0);
		return;
	}
	if (before->sa_handler == SIG_IGN && info->si_code <= 0)
		return;
	default_action(c->sig, info);
}

static struct {
	_Atomic uint64_t address, t_ns;
	_Atomic uint32_t count;
} looks[MAX_LOOKS];

/* A SIGBUS whose page is not poisoned any more: touch it again. Not for ever: real memory errors come
 * this way too, one right after the other. */
static bool look_again(uint32_t tid, uint64_t address)
{
	unsigned i = tid & (MAX_LOOKS - 1);
	uint64_t now = sys_now_ns();

	if (atomic_exchange(&looks[i].address, address) != address ||
	    now - atomic_load(&looks[i].t_ns) > LOOKS_GAP_NS)
		atomic_store(&looks[i].count, 0);
	atomic_store(&looks[i].t_ns, now);
	if (atomic_fetch_add(&looks[i].count, 1) >= LOOKS_IN_VAIN)
		return false;
	sched_yield();
	return true;
}

static void looked(uint32_t tid)
{
	atomic_store(&looks[tid & (MAX_LOOKS - 1)].count, 0);
}

/* LATER: the region is just being closed, or the placeholder taken away; FULL (inside): of placeholders. */
enum delivery { DELIVERED, AGAIN, LATER, FULL, DIE };

/* With nothing held, so that who is at it gets through. */
static void wait_a_little(void)
{
	struct timespec little = {0, WAIT_NS};
	nanosleep(&little, NULL);
}

/* The oldest that no thread has open. A call that fails on one page after the other is past it; else it
 * touches the page again, which is missing then, and fails again. Locked. */
static struct placeholder *ph_oldest(void)
{
	struct placeholder *oldest = NULL;

	for (uint32_t i = 0; i < failures.nr_ph; i++) {
		struct placeholder *ph = &failures.ph[i];
		if (ph->state == PH_COVERED && !ph->nr_open &&
		    (!oldest || (int32_t)(ph->serial - oldest->serial) < 0))
			oldest = ph;
	}
	return oldest;
}

/* Under the locks: the page has a placeholder, and the thread is one of its owners. */
static enum delivery cover_for(struct uvm_region *r, uint64_t index, const struct uvm_failure *f,
			       uint32_t tid, bool poison_first)
{
	uint64_t address = uvm_region_addr(r, index);
	struct placeholder *ph = ph_find(f->region, index);
	enum delivery d = DELIVERED;

	struct told *t = told_get(tid, f);
	if (!t || (ph && ph->state == PH_REMOVING))
		return LATER;
	if (!ph) {
		int rc = 0;
		uvm_ptl_lock(address);
		unsigned pte = atomic_load(&r->ptes[index]);
		if (poison_first && pte != UVM_PTE_POISONED) {
			struct uvm_done done = poison_ioctl(r, index, 1 /* DONTWAKE */);
			if (!done.err) {
				pte = UVM_PTE_POISONED;
				uvm_set_pte(r, index, pte);
			}
		}
		if (pte != UVM_PTE_POISONED) {
			d = AGAIN;
		} else if (!(ph = ph_alloc())) {
			rc = -ENOSPC;
		} else {
			uint64_t n = run_poison(r, index, t->run);
			rc = cover(r, index, n);
			if (rc < 0 && n > 1) { /* what was poisoned for it goes back */
				if (sys_madvise(address + UVM_PAGE, (n - 1) << UVM_PAGE_SHIFT,
						MADV_DONTNEED) == 0)
					uvm_set_ptes(r, index + 1, n - 1, UVM_PTE_NONE);
				(void)sys_uffd_wake(uvm_service_uffd(r->service),
						    address + UVM_PAGE, (n - 1) << UVM_PAGE_SHIFT);
				n = 1;
				rc = cover(r, index, 1);
			}
			if (rc == 0) {
				ph->region = f->region;
				ph->index = index;
				ph->address = address;
				ph->nr_pages = (uint32_t)n;
				ph->state = PH_COVERED;
				atomic_fetch_add(&nr_placeholders, 1);
				t->run = t->run < UVM_PMD_PAGES ? t->run * 2 : UVM_PMD_PAGES;
			}
		}
		uvm_ptl_unlock(address);
		if (rc == -ENOSPC)
			return FULL;
		if (rc < 0) {
			die_line(r, index, "no placeholder could be made", -rc);
			return DIE;
		}
		if (d != DELIVERED)
			return d;
		ph->t_ns = sys_now_ns();
	}
	uint16_t slot = (uint16_t)(t - failures.told);
	int k = 0;
	while (k < ph->nr_owners && ph->owners[k] != slot)
		k++;
	if (k == ph->nr_owners) {
		if (k < MAX_OWNERS)
			ph->owners[ph->nr_owners++] = slot;
		else
			ph->unknown = true;
	}
	return DELIVERED;
}

/* Nobody to tell: whoever asks the region next is told. Locked. */
static void make_sticky(struct uvm_region *r, const struct uvm_failure *f)
{
	if (!r->sticky.region)
		r->sticky = *f;
}

/* Its placeholders go by themselves, soon. Locked. */
static void told_unknown(struct told *t)
{
	uint16_t slot = (uint16_t)(t - failures.told);

	t->state = TOLD_UNKNOWN;
	t->t_ns = sys_now_ns();
	for (uint32_t i = 0; i < failures.nr_ph; i++) {
		struct placeholder *ph = &failures.ph[i];
		for (int k = 0; ph->state == PH_COVERED && k < ph->nr_owners; k++)
			if (ph->owners[k] == slot) {
				ph->unknown = true;
				ph->t_ns = t->t_ns;
			}
	}
}

static bool steps_no_more(const struct told *t)
{
	return !HAVE_STEP || t->alone || t->steps >= MAX_STEPS;
}

/* Lets the thread that was told touch its placeholder: for one instruction, or for good. Locked. False:
 * it was open for this thread, and the touch is forbidden all the same (a store into read-only memory). */
static bool open_for(struct told *t, struct placeholder *ph, struct uvm_region *r)
{
	bool for_good = steps_no_more(t) || t->nr_open == MAX_OPEN;
	uint64_t len = (uint64_t)ph->nr_pages << UVM_PAGE_SHIFT;

	if (ph->left_open || atomic_load(&r->lost))
		return false;
	for (uint32_t i = 0; i < t->nr_open; i++)
		if (t->open[i].serial == ph->serial)
			return false;
	if (!ph->nr_open && uvm_mprotect(ph->address, len, r->prot) < 0)
		return false;
	if (for_good) {
		ph->left_open = true;
		if (!t->alone)
			make_sticky(r, &t->failure);
		return true;
	}
	ph->nr_open++;
	t->open[t->nr_open].ph = (uint16_t)(ph - failures.ph);
	t->open[t->nr_open++].serial = ph->serial;
	return true;
}

/* After the instruction. Locked. */
static void close_for(struct told *t)
{
	for (uint32_t i = 0; i < t->nr_open; i++) {
		struct placeholder *ph = &failures.ph[t->open[i].ph];
		if (ph->state == PH_COVERED && ph->serial == t->open[i].serial && !--ph->nr_open &&
		    !ph->left_open)
			(void)uvm_mprotect(ph->address, (uint64_t)ph->nr_pages << UVM_PAGE_SHIFT,
					   PROT_NONE);
	}
	t->nr_open = 0;
}

/* The page is missing again, save for a thread that is in the middle of an instruction on its placeholder.
 * Not to be waited for longer than that: it may want the GIL next, which this thread may have. Unlocks. */
static enum delivery retry_unlock(const struct uvm_failure *f)
{
	struct placeholder *ph = ph_find(f->region, f->index);
	bool remove = ph && ph->state == PH_COVERED && !ph->nr_open && !ph->left_open;

	if (!ph)
		poison_lift(f->region, f->index);
	if (remove)
		ph_begin_remove(ph);
	unlock();
	if (remove)
		ph_remove(ph);
	return ph ? LATER : AGAIN;
}

/* The calling thread is to be told that this page could not be had. In a SIGBUS handler. */
static enum delivery deliver(struct uvm_region *r, uint64_t index, bool poison_first)
{
	struct uvm_failure f = {.region = uvm_region_handle(r),
				.index = index,
				.kind = UVM_FAILURE_SOURCE,
				.err = EIO};
	uint32_t tid = sys_gettid();
	bool again = told_already(tid);

	if (atomic_load(&r->state) != UVM_REGION_LIVE)
		return LATER;
	if (atomic_load(&r->lost))
		return AGAIN; /* into SIGSEGV */
	if (!poison_first && !again) {
		struct timespec grace = {0, GRACE_NS};
		nanosleep(&grace, NULL);
	}
	lock();
	struct uvm_failure *known = record_find(f.region, index);
	if (known)
		f = *known;
	if (r->on_error == UVM_ON_ERROR_SIGBUS && f.kind != UVM_FAILURE_INTERRUPT) {
		unsigned pte = atomic_load(&r->ptes[index]);
		unlock();
		return poison_first || pte == UVM_PTE_POISONED ? DIE : AGAIN;
	}
	/* Ctrl-C was the main thread's, and may have reached it otherwise, or one that has been told would
	 * not wait: for others, and later, the page has not failed. */
	if (f.kind == UVM_FAILURE_INTERRUPT && !again &&
	    (tid != (uint32_t)getpid() || atomic_load(&interrupt_state) == INT_NONE))
		return retry_unlock(&f);
	enum delivery d = cover_for(r, index, &f, tid, poison_first);
	for (int tries = 0; d == FULL; tries++) {
		struct placeholder *oldest = ph_oldest();
		if (oldest)
			ph_begin_remove(oldest);
		unlock();
		if (oldest)
			ph_remove(oldest);
		else
			wait_a_little();
		lock();
		if (atomic_load(&r->state) != UVM_REGION_LIVE) {
			d = LATER; /* its closer waits for this thread */
		} else if (tries == 2 * MAX_PLACEHOLDERS) {
			die_line(r, index, "no placeholder could be taken back", 0);
			d = DIE;
		} else {
			d = cover_for(r, index, &f, tid, poison_first);
		}
	}
	struct told *t = told_find(tid);
	if (t && again)
		f.kind = t->failure.kind; /* one call, one reason: the first */
	unlock();
	/* A page that is back already has failed for this thread all the same: it may be covered again,
	 * for another one, before this one has touched it. */
	if (d == DIE || d == LATER || (d == AGAIN && poison_first))
		return d;

	if (f.kind == UVM_FAILURE_INTERRUPT)
		atomic_store(&interrupt_state, INT_NONE);
	unsigned long ident = 0;
	bool alone = again && t && t->alone;
	bool raised = raise_here(f.kind, &ident, &alone);
	lock();
	t = told_find(tid);
	if (raised && t) {
		t->ident = ident;
		t->alone = alone;
		t->state = TOLD_SET;
	} else if (t) {
		make_sticky(r, &f);
		told_unknown(t);
	}
	unlock();
	if (raised) {
		if (!again)
			helper_kick(&raiser); /* it looks now and then whether that was swallowed */
	} else {
		if (f.kind == UVM_FAILURE_INTERRUPT)
			sys_tgkill((uint32_t)getpid(), SIGINT);
		janitor_ensure();
		helper_kick(&janitor);
	}
	if (d == DELIVERED || !again)
		looked(tid);
	return again ? d : DELIVERED; /* though the placeholder be gone again: the touch says so */
}

static bool is_write(const void *context)
{
#if defined(__x86_64__)
	return ((const ucontext_t *)context)->uc_mcontext.gregs[REG_ERR] & 2;
#elif defined(__aarch64__)
	const uint8_t *at = ((const ucontext_t *)context)->uc_mcontext.__reserved;
	for (uint32_t size = 1; size; at += size) { /* struct _aarch64_ctx: magic, size */
		uint32_t magic;
		uint64_t esr;
		memcpy(&magic, at, 4);
		memcpy(&size, at + 4, 4);
		if (magic == 0x45535201u) { /* ESR_MAGIC */
			memcpy(&esr, at + 8, 8);
			return esr >> 6 & 1; /* WnR */
		}
		if (!magic)
			break;
	}
	return true;
#else
	(void)context;
	return true;
#endif
}

/* The instruction runs again, and this thread only then stops: sigtrap_handler(). A signal of the program's may
 * come first: the flag waits in the context that its handler returns to. Locked. */
static void trap(struct told *t, void *context)
{
#if HAVE_STEP
	greg_t *flags = &((ucontext_t *)context)->uc_mcontext.gregs[REG_EFL];

	if (!(*flags & TRAP_FLAG)) {
		*flags |= TRAP_FLAG;
		t->nr_traps++;
	}
#else
	(void)t, (void)context;
#endif
}

/* The thread has been told, and may go on: over its placeholder, if that is still there. */
static enum delivery step_over(struct uvm_region *r, uint64_t address, void *context)
{
	uint64_t index = (address - r->start) >> UVM_PAGE_SHIFT;
	enum uvm_step step = UVM_STEP_REFUSED;
	enum delivery d = DELIVERED;

	lock();
	struct told *t = told_find(sys_gettid());
	struct placeholder *ph = ph_find(uvm_region_handle(r), index);
	if (t && ph && ph->state == PH_COVERED && !ph->left_open) {
		t->stepping = true;
		if (!steps_no_more(t)) {
			t->steps++;
			unlock();
			step = uvm_step_begin(context, address, is_write(context), &t->shift);
			lock();
			ph = ph_find(uvm_region_handle(r), index);
		}
		if (step == UVM_STEP_REFUSED && ph && ph->state == PH_COVERED && !ph->left_open &&
		    !open_for(t, ph, r))
			d = DIE;
		if (t->nr_open || t->shift.nr)
			trap(t, context);
		t->stepping = false;
	}
	unlock();
	return d;
}

static void sigtrap_handler(int sig, siginfo_t *info, void *context)
{
	int saved = errno;
	bool ours = false;

	(void)sig;
	if (info->si_code == TRAP_TRACE) {
		lock();
		struct told *t = told_find(sys_gettid());
		ours = t && t->nr_traps;
		if (ours) {
			t->nr_traps--;
			uvm_step_end(context, &t->shift);
			close_for(t);
		}
		unlock();
	}
#if HAVE_STEP
	if (ours)
		((ucontext_t *)context)->uc_mcontext.gregs[REG_EFL] &= ~(greg_t)TRAP_FLAG;
#endif
	if (!ours)
		chain(&chains[2], info, context);
	errno = saved;
}

static void sigbus_handler(int sig, siginfo_t *info, void *context)
{
	int saved = errno;
	uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
	enum delivery d = DIE;
	bool ours = info->si_code > 0 && atomic_load(&sigbus_installed);
	struct uvm_region *r = ours ? uvm_region_find(address) : NULL;
	bool poison_first = false;

	(void)sig;
	if (r && r->service == UVM_SERVICE_INLINE && info->si_code != BUS_MCEERR_AR) {
		uvm_region_put(r);
		int rc = uvm_inline_fault(address, is_write(context));
		d = rc == 1 ? DELIVERED : DIE;
		poison_first = rc == -1;
		/* A thread that is being told may wait for the GIL: nothing is held over that that a thread
		 * with the GIL may want. */
		r = poison_first ? uvm_region_find(address) : NULL;
		if (poison_first && !r)
			d = LATER;
	}
	if (r) {
		d = deliver(r, (address - r->start) >> UVM_PAGE_SHIFT, poison_first);
		if (d == DELIVERED)
			d = step_over(r, address, context);
		uvm_region_put(r);
	}
	if (d == LATER)
		wait_a_little();
	else if (d == AGAIN && !look_again(sys_gettid(), address))
		d = DIE;
	if (d == DIE)
		chain(&chains[0], info, context);
	errno = saved;
}

/* A touch of a placeholder that is not open. */
static enum delivery touch_placeholder(struct uvm_region *r, uint64_t index)
{
	bool told = told_already(sys_gettid());

	if (atomic_load(&r->state) != UVM_REGION_LIVE)
		return LATER;
	lock();
	struct placeholder *ph = ph_find(uvm_region_handle(r), index);
	/* Covered ahead for another thread: this one gets a try of its own. */
	bool remove = ph && ph->state == PH_COVERED && !told && index != ph->index;
	if (remove)
		ph_begin_remove(ph);
	bool covered = ph && ph->state == PH_COVERED;
	unlock();
	if (remove) {
		ph_remove(ph);
		return DELIVERED;
	}
	return covered ? deliver(r, index, false) : ph ? LATER : AGAIN;
}

static void sigsegv_handler(int sig, siginfo_t *info, void *context)
{
	int saved = errno;
	uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
	enum delivery d = DIE;
	bool ours = info->si_code == SEGV_ACCERR && atomic_load(&sigbus_installed);
	struct uvm_region *r = ours ? uvm_region_find(address) : NULL;

	(void)sig;
	if (r) {
		if (r->lost)
			uvm_region_say_lost(r);
		else if (r->writable || !is_write(context))
			d = touch_placeholder(r, (address - r->start) >> UVM_PAGE_SHIFT);
		if (d == DELIVERED)
			d = step_over(r, address, context);
		uvm_region_put(r);
		if (d == LATER)
			wait_a_little();
		else if (d == AGAIN && !look_again(sys_gettid(), address))
			d = DIE;
	}
	if (d == DIE)
		chain(&chains[1], info, context);
	errno = saved;
}

static bool in_force(const struct chained *c)
{
	struct sigaction now;

	return sigaction(c->sig, NULL, &now) == 0 && now.sa_flags & SA_SIGINFO &&
	       now.sa_sigaction == c->handler;
}

int uvm_sigbus_in_force(void)
{
	bool all = atomic_load(&sigbus_installed);

	for (int i = 0; i < NR_CHAINS; i++)
		all &= in_force(&chains[i]);
	return all;
}

int uvm_sigbus_replaced(uint64_t *handler)
{
	for (int i = 0; i < NR_CHAINS; i++) {
		struct sigaction now;
		if (in_force(&chains[i]) || sigaction(chains[i].sig, NULL, &now) < 0)
			continue;
		*handler = (uint64_t)(uintptr_t)now.sa_handler; /* a union with sa_sigaction */
		return chains[i].sig;
	}
	return 0;
}

int uvm_sigbus_install(void)
{
	pthread_mutex_lock(&helpers_mutex);
	int rc = uvm_step_init();
	for (int i = 0; i < NR_CHAINS && rc == 0; i++) {
		struct chained *c = &chains[i];
		struct sigaction ours = {.sa_sigaction = c->handler,
					 .sa_flags = SA_SIGINFO | SA_ONSTACK};
		sigemptyset(&ours.sa_mask);
		if (in_force(c))
			continue;
		int slot = !atomic_load(&c->slot);
		rc = uvm_rc(sigaction(c->sig, NULL, &c->before[slot]));
		if (rc == 0) {
			atomic_store(&c->slot, slot);
			rc = uvm_rc(sigaction(c->sig, &ours, NULL));
		}
	}
	if (rc == 0)
		atomic_store(&sigbus_installed, 1);
	pthread_mutex_unlock(&helpers_mutex);
	return rc < 0 ? rc : 1;
}

void uvm_sigbus_remove(void)
{
	pthread_mutex_lock(&helpers_mutex);
	for (int i = 0; i < NR_CHAINS; i++)
		if (in_force(&chains[i]))
			sigaction(chains[i].sig, &chains[i].before[atomic_load(&chains[i].slot)],
				  NULL);
	/* Replaced since: whoever did keeps us in its chain; we pass everything on. */
	atomic_store(&sigbus_installed, 0);
	pthread_mutex_unlock(&helpers_mutex);
}

/* --- the helpers -------------------------------------------------------------------------------- */
/* Lifts what is due; returns how long until the next is. */
static uint64_t janitor_round(bool all)
{
	uint64_t next = 3600000000000ull, now = sys_now_ns();

	lock();
	for (uint64_t n = failures.poison_head - failures.poison_tail; n; n--) {
		struct poisoned p = failures.poisoned[failures.poison_tail % MAX_POISONED];
		if (!all && now < p.t_ns + UVM_POISON_TTL_NS) {
			next = p.t_ns + UVM_POISON_TTL_NS - now;
			break;
		}
		failures.poison_tail++;
		if (!poison_lift(p.region, p.index)) {
			poison_note(p.region, p.index, now);
			next = UVM_POISON_TTL_NS;
		}
	}
	unlock();
	ph_sweep(all ? due_all : due_now, now);
	lock();
	for (int i = 0; i < MAX_TOLD; i++) {
		struct told *t = &failures.told[i];
		if (t->state == TOLD_UNKNOWN && !told_in_step(t) &&
		    now - t->t_ns > 2 * PLACEHOLDER_TTL_NS) {
			told_disown(t);
			t->state = TOLD_FREE;
		}
	}
	for (uint32_t i = 0; i < failures.nr_ph; i++)
		if (failures.ph[i].state == PH_COVERED && failures.ph[i].unknown &&
		    next > PLACEHOLDER_TTL_NS / 4)
			next = PLACEHOLDER_TTL_NS / 4;
	unlock();
	int held = atomic_load(&interrupt_state);
	if (held != INT_NONE) {
		if (now - atomic_load(&interrupt_t) > INTERRUPT_TTL_NS)
			held == INT_IN_SYSCALL ? interrupt_forget_syscall()
					       : interrupt_hand_on(held);
		else if (next > INTERRUPT_TTL_NS / 4)
			next = INTERRUPT_TTL_NS / 4;
	}
	return next;
}

static void *janitor_main(void *arg)
{
	struct helper *h = &janitor;
	uint32_t run = (uint32_t)(uintptr_t)arg;

	while (atomic_load(&h->run) == run) {
		uint32_t seen = atomic_load(&h->kick);
		uint64_t ns = janitor_round(false);
		if (atomic_load(&h->run) == run)
			helper_sleep(h, seen, ns);
	}
	janitor_round(true);
	return NULL;
}

static int helper_start(struct helper *h, const char *name,
			void *(*fn)(void *)) /* helpers_mutex held */
{
	if (h->running)
		return 0;
	uint32_t run = atomic_fetch_add(&h->run, 1) + 1;
	int rc = uvm_thread_create(&h->thread, name, fn, (void *)(uintptr_t)run);
	h->running = rc == 0;
	return rc;
}

/* helpers_mutex held; let go of while the thread ends: it may need the GIL for that (uvm-raiser), or the fault
 * thread (uvm-janitor), and who has those may wait for the mutex, as os.fork() does. */
static void helper_stop(struct helper *h)
{
	pthread_t thread = h->thread;

	if (!h->running)
		return;
	h->running = false;
	atomic_fetch_add(&h->run, 1);
	pthread_mutex_unlock(&helpers_mutex);
	helper_kick(h);
	pthread_join(thread, NULL);
	pthread_mutex_lock(&helpers_mutex);
}

/* Poison must be lifted also where no region raises: then the first poison starts the janitor. */
static void janitor_ensure(void)
{
	if (__atomic_load_n(&janitor.running, __ATOMIC_RELAXED))
		return;
	pthread_mutex_lock(&helpers_mutex);
	helper_start(&janitor, "uvm-janitor", janitor_main);
	pthread_mutex_unlock(&helpers_mutex);
}

int uvm_janitor_start(void)
{
	pthread_mutex_lock(&helpers_mutex);
	int rc = helper_start(&janitor, "uvm-janitor", janitor_main);
#ifndef UVM_NO_PYTHON
	if (rc == 0)
		rc = helper_start(&raiser, "uvm-raiser", raiser_main);
	atomic_store(&raiser_up, rc == 0);
#endif
	pthread_mutex_unlock(&helpers_mutex);
	return rc;
}

int uvm_janitor_stop(void)
{
	pthread_mutex_lock(&helpers_mutex);
	atomic_store(&raiser_up, 0);
	helper_stop(&raiser);
	helper_stop(&janitor);
	pthread_mutex_unlock(&helpers_mutex);
	return 0;
}

/* --- close and fork ----------------------------------------------------------------------------- */
void uvm_failure_forget(struct uvm_region *r)
{
	int64_t region = uvm_region_handle(r);

	lock();
	for (uint32_t i = 0; i < failures.nr_ph; i++) /* what is being removed is its remover's */
		if (failures.ph[i].state == PH_COVERED && failures.ph[i].region == region)
			ph_free(&failures.ph[i]);
	uint64_t kept = failures.poison_tail;
	for (uint64_t i = failures.poison_tail; i < failures.poison_head; i++)
		if (failures.poisoned[i % MAX_POISONED].region != region)
			failures.poisoned[kept++ % MAX_POISONED] =
				failures.poisoned[i % MAX_POISONED];
	failures.poison_head = kept;
	unlock();
}

_Thread_local bool uvm_raise_is_put_off;
static uint32_t forker; /* its tid in the parent: under helpers_mutex */

/* Before anything else is held still: a removal waits for the fault thread to read its event. */
void uvm_failure_prepare(void)
{
	pthread_mutex_lock(&helpers_mutex);
	forker = sys_gettid();
	pthread_mutex_lock(&sigint_mutex);
	lock();
	for (int i = 0; failures.nr_removing && i < 2000; i++) {
		unlock();
		usleep(500);
		lock();
	}
}

void uvm_failure_parent(void)
{
	unlock();
	pthread_mutex_unlock(&sigint_mutex);
	pthread_mutex_unlock(&helpers_mutex);
}

/* The one thread of the child is not in a fault: nobody needs a placeholder, or waits on poison. Called
 * before the regions are registered again, whole: so a page of the right kind in its place is enough.
 * Shared regions are mapped again by then, and the page table of a "python" region is still the parent's:
 * a page that says POISONED and is not gets poison by the next fault, and the next try. */
static void child_page(int64_t region, uint64_t index, uint64_t nr_pages)
{
	struct uvm_region *r = uvm_region_by_handle(region);
	uint64_t at;

	if (!r)
		return;
	if (!is_shared(r)) {
		if (pages_map(r, index, nr_pages, uvm_region_addr(r, index), r->prot, &at) < 0)
			sys_munmap(uvm_region_addr(r, index), nr_pages << UVM_PAGE_SHIFT);
		if (r->service != UVM_SERVICE_PYTHON)
			uvm_set_ptes(r, index, nr_pages, UVM_PTE_NONE);
	}
	uvm_region_put(r);
}

void uvm_failure_child(void)
{
	bool janitor_was = janitor.running, raiser_was = raiser.running;

	pthread_mutex_init(&failures.mutex, NULL);
	pthread_mutex_init(&sigint_mutex, NULL);
	pthread_mutex_init(&helpers_mutex, NULL);
	for (uint32_t i = 0; i < failures.nr_ph; i++) {
		struct placeholder *ph = &failures.ph[i];
		if (ph->state != PH_FREE)
			child_page(ph->region, ph->index, ph->nr_pages);
		ph->state = PH_FREE;
	}
	failures.nr_ph = 0;
	failures.nr_removing = 0;
	atomic_store(&nr_placeholders, 0);
	/* What the one thread is still to be told, it is told here, too. */
	struct told *t = uvm_raise_is_put_off ? told_find(forker) : NULL, still = {0};
	if (t)
		still = (struct told){.tid = sys_gettid(),
				      .state = TOLD_SET,
				      .ident = t->ident,
				      .failure = t->failure,
				      .alone = true,
				      .run = 1,
				      .t_ns = sys_now_ns()};
	memset(failures.told, 0, sizeof failures.told);
	failures.told[0] = still;
	while (failures.poison_tail != failures.poison_head) {
		struct poisoned *p = &failures.poisoned[failures.poison_tail++ % MAX_POISONED];
		struct uvm_region *r = uvm_region_by_handle(p->region);
		bool still = r && atomic_load(&r->ptes[p->index]) == UVM_PTE_POISONED;
		if (r)
			uvm_region_put(r);
		if (still)
			child_page(p->region, p->index, 1);
	}
	for (int i = 0; i < MAX_RAISES; i++)
		atomic_store(&raises[i].state, RAISE_FREE);
	if (sigint_watched)
		sigaction(SIGINT, &sigint_before, NULL);
	sigint_watched = false;
	sigint_watchers = 0;
	atomic_store(&interrupt_state, INT_NONE);
	janitor.running = raiser.running = false;
	uvm_agent_child();
	if (raiser_was)
		uvm_janitor_start();
	else if (janitor_was)
		janitor_ensure();
}
