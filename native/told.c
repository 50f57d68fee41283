/* The thread that touched a page that could not be had: what it is told, and how it gets on.
 *
 * Facts -> what follows from them.
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
 *   into its poison themselves. */
#include "failure.h"

#include <stdio.h>
#include <ucontext.h>

enum {
	MAX_LOOKS = 64, /* power of two */
	LOOKS_IN_VAIN = 2000,
	WAIT_NS = 50000,
	MAX_STEPS = 1 << 16, /* instructions of one thread until a placeholder stays open */
};

#define GRACE_NS 1000000l
#define LOOKS_GAP_NS 1000000000ull
#define TRAP_FLAG 0x100

/* --- who is told ------------------------------------------------------------------------------- */
struct uvm_told *uvm_told_find(uint32_t tid) /* locked */
{
	for (int i = 0; i < UVM_MAX_TOLD; i++)
		if (uvm_failures.told[i].state != UVM_TOLD_FREE && uvm_failures.told[i].tid == tid)
			return &uvm_failures.told[i];
	return NULL;
}

/* Locked: its placeholders are nobody's, or somebody else's. */
void uvm_told_disown(struct uvm_told *t)
{
	uint16_t slot = (uint16_t)(t - uvm_failures.told);

	for (uint32_t i = 0; i < uvm_failures.nr_ph; i++) {
		struct uvm_placeholder *ph = &uvm_failures.ph[i];
		for (int k = 0; ph->state == UVM_PH_COVERED && k < ph->nr_owners; k++)
			if (ph->owners[k] == slot)
				ph->owners[k--] = ph->owners[--ph->nr_owners];
	}
}

bool uvm_told_in_step(const struct uvm_told *t)
{
	return t->stepping || t->nr_open || t->nr_traps;
}

/* The slot of this thread; what an earlier failure of it left behind is let go of. When all are in use the
 * oldest goes: its thread's exception will say less. NULL: each is in the middle of an instruction. */
static struct uvm_told *told_get(uint32_t tid, const struct uvm_failure *f) /* locked */
{
	struct uvm_told *t = uvm_told_find(tid), *oldest = NULL;

	if (t && (t->state != UVM_TOLD_SWALLOWED || uvm_told_in_step(t)))
		return t;
	for (int i = 0; !t && i < UVM_MAX_TOLD; i++) {
		struct uvm_told *at = &uvm_failures.told[i];
		if (at->state == UVM_TOLD_FREE)
			t = at;
		else if (!uvm_told_in_step(at) && (!oldest || at->t_ns < oldest->t_ns))
			oldest = at;
	}
	if (!t && (t = oldest))
		uvm_told_disown(t);
	if (t)
		*t = (struct uvm_told){.tid = tid,
				       .state = UVM_TOLD_SET,
				       .failure = *f,
				       .run = 1,
				       .t_ns = sys_now_ns()};
	return t;
}

bool uvm_told_already(uint32_t tid)
{
	uvm_failures_lock();
	struct uvm_told *t = uvm_told_find(tid);
	bool yes = t && t->state != UVM_TOLD_SWALLOWED;
	uvm_failures_unlock();
	return yes;
}

int uvm_failure_take(struct uvm_failure *out)
{
	uvm_failures_lock();
	struct uvm_told *t = uvm_told_find(sys_gettid());
	if (t && t->state == UVM_TOLD_UNKNOWN)
		t = NULL;
	if (t) {
		*out = t->failure;
		uvm_told_disown(t);
		t->state = UVM_TOLD_FREE;
	}
	uvm_failures_unlock();
	if (!t)
		return 0;
	uvm_ph_sweep_unowned();
	uvm_ph_wait_removed();
	return 1;
}

/* --- delivery ---------------------------------------------------------------------------------- */
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
static struct uvm_placeholder *ph_oldest(void)
{
	struct uvm_placeholder *oldest = NULL;

	for (uint32_t i = 0; i < uvm_failures.nr_ph; i++) {
		struct uvm_placeholder *ph = &uvm_failures.ph[i];
		if (ph->state == UVM_PH_COVERED && !ph->nr_open &&
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
	struct uvm_placeholder *ph = uvm_ph_find(f->region, index);
	enum delivery d = DELIVERED;

	struct uvm_told *t = told_get(tid, f);
	if (!t || (ph && ph->state == UVM_PH_REMOVING))
		return LATER;
	if (!ph) {
		int rc = 0;
		uvm_ptl_lock(address);
		unsigned pte = atomic_load(&r->ptes[index]);
		if (poison_first && pte != UVM_PTE_POISONED) {
			struct uvm_done done = uvm_poison_ioctl(r, index, 1 /* DONTWAKE */);
			if (!done.err) {
				pte = UVM_PTE_POISONED;
				uvm_set_pte(r, index, pte);
			}
		}
		if (pte != UVM_PTE_POISONED) {
			d = AGAIN;
		} else if (!(ph = uvm_ph_alloc())) {
			rc = -ENOSPC;
		} else {
			uint64_t n = uvm_ph_run_poison(r, index, t->run);
			rc = uvm_ph_cover(r, index, n, &ph->shadow);
			if (rc < 0 && n > 1) { /* what was poisoned for it goes back */
				if (sys_madvise(address + UVM_PAGE, (n - 1) << UVM_PAGE_SHIFT,
						MADV_DONTNEED) == 0)
					uvm_set_ptes(r, index + 1, n - 1, UVM_PTE_NONE);
				(void)sys_uffd_wake(uvm_service_uffd(r->service),
						    address + UVM_PAGE, (n - 1) << UVM_PAGE_SHIFT);
				n = 1;
				rc = uvm_ph_cover(r, index, 1, &ph->shadow);
			}
			if (rc == 0) {
				ph->region = f->region;
				ph->index = index;
				ph->address = address;
				ph->nr_pages = (uint32_t)n;
				ph->state = UVM_PH_COVERED;
				atomic_fetch_add(&uvm_nr_placeholders, 1);
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
	uint16_t slot = (uint16_t)(t - uvm_failures.told);
	int k = 0;
	while (k < ph->nr_owners && ph->owners[k] != slot)
		k++;
	if (k == ph->nr_owners) {
		if (k < UVM_MAX_OWNERS)
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
static void told_unknown(struct uvm_told *t)
{
	uint16_t slot = (uint16_t)(t - uvm_failures.told);

	t->state = UVM_TOLD_UNKNOWN;
	t->t_ns = sys_now_ns();
	for (uint32_t i = 0; i < uvm_failures.nr_ph; i++) {
		struct uvm_placeholder *ph = &uvm_failures.ph[i];
		for (int k = 0; ph->state == UVM_PH_COVERED && k < ph->nr_owners; k++)
			if (ph->owners[k] == slot) {
				ph->unknown = true;
				ph->t_ns = t->t_ns;
			}
	}
}

static bool steps_no_more(const struct uvm_told *t)
{
	return !UVM_HAVE_STEP || t->alone || t->steps >= MAX_STEPS;
}

/* Lets the thread that was told touch its placeholder: for one instruction, or for good. Locked. False:
 * it was open for this thread, and the touch is forbidden all the same (a store into read-only memory). */
static bool open_for(struct uvm_told *t, struct uvm_placeholder *ph, struct uvm_region *r)
{
	bool for_good = steps_no_more(t) || t->nr_open == UVM_MAX_OPEN;
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
	t->open[t->nr_open].ph = (uint16_t)(ph - uvm_failures.ph);
	t->open[t->nr_open++].serial = ph->serial;
	return true;
}

/* After the instruction. Locked. */
static void close_for(struct uvm_told *t)
{
	for (uint32_t i = 0; i < t->nr_open; i++) {
		struct uvm_placeholder *ph = &uvm_failures.ph[t->open[i].ph];
		if (ph->state == UVM_PH_COVERED && ph->serial == t->open[i].serial &&
		    !--ph->nr_open && !ph->left_open)
			(void)uvm_mprotect(ph->address, (uint64_t)ph->nr_pages << UVM_PAGE_SHIFT,
					   PROT_NONE);
	}
	t->nr_open = 0;
}

/* The page is missing again, save for a thread that is in the middle of an instruction on its placeholder.
 * Not to be waited for longer than that: it may want the GIL next, which this thread may have. Unlocks. */
static enum delivery retry_unlock(const struct uvm_failure *f)
{
	struct uvm_placeholder *ph = uvm_ph_find(f->region, f->index);
	bool remove = ph && ph->state == UVM_PH_COVERED && !ph->nr_open && !ph->left_open;

	if (!ph)
		uvm_poison_lift(f->region, f->index);
	if (remove)
		uvm_ph_begin_remove(ph);
	uvm_failures_unlock();
	if (remove)
		uvm_ph_remove(ph);
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
	bool again = uvm_told_already(tid);

	if (atomic_load(&r->state) != UVM_REGION_LIVE)
		return LATER;
	if (atomic_load(&r->lost))
		return AGAIN; /* into SIGSEGV */
	if (!poison_first && !again) {
		struct timespec grace = {0, GRACE_NS};
		nanosleep(&grace, NULL);
	}
	uvm_failures_lock();
	struct uvm_told *told = uvm_told_find(tid);
	again = told && told->state != UVM_TOLD_SWALLOWED; /* the janitor may have let go of it */
	struct uvm_failure *known = uvm_record_find(f.region, index);
	if (known)
		f = *known;
	if (r->on_error == UVM_ON_ERROR_SIGBUS && f.kind != UVM_FAILURE_INTERRUPT) {
		unsigned pte = atomic_load(&r->ptes[index]);
		uvm_failures_unlock();
		return poison_first || pte == UVM_PTE_POISONED ? DIE : AGAIN;
	}
	/* Ctrl-C was the main thread's, and may have reached it otherwise, or one that has been told would
	 * not wait: for others, and later, the page has not failed. */
	if (f.kind == UVM_FAILURE_INTERRUPT && !again &&
	    (tid != (uint32_t)getpid() || !uvm_interrupt_held()))
		return retry_unlock(&f);
	enum delivery d = cover_for(r, index, &f, tid, poison_first);
	for (int tries = 0; d == FULL; tries++) {
		struct uvm_placeholder *oldest = ph_oldest();
		if (oldest)
			uvm_ph_begin_remove(oldest);
		uvm_failures_unlock();
		if (oldest)
			uvm_ph_remove(oldest);
		else
			wait_a_little();
		uvm_failures_lock();
		if (atomic_load(&r->state) != UVM_REGION_LIVE) {
			d = LATER; /* its closer waits for this thread */
		} else if (tries == 2 * UVM_MAX_PLACEHOLDERS) {
			die_line(r, index, "no placeholder could be taken back", 0);
			d = DIE;
		} else {
			d = cover_for(r, index, &f, tid, poison_first);
		}
	}
	struct uvm_told *t = uvm_told_find(tid);
	if (t && again)
		f.kind = t->failure.kind; /* one call, one reason: the first */
	uvm_failures_unlock();
	/* A page that is back already has failed for this thread all the same: it may be covered again,
	 * for another one, before this one has touched it. */
	if (d == DIE || d == LATER || (d == AGAIN && poison_first))
		return d;

	if (f.kind == UVM_FAILURE_INTERRUPT)
		uvm_interrupt_taken();
	unsigned long ident = 0;
	bool alone = again && t && t->alone;
	bool raised = uvm_raise_here(f.kind, &ident, &alone);
	uvm_failures_lock();
	t = uvm_told_find(tid);
	if (raised && t) {
		t->ident = ident;
		t->alone = alone;
		t->state = UVM_TOLD_SET;
	} else if (t) {
		make_sticky(r, &f);
		told_unknown(t);
	}
	uvm_failures_unlock();
	if (raised) {
		if (!again)
			uvm_helper_kick(
				&uvm_raiser); /* it looks now and then whether that was swallowed */
	} else {
		if (f.kind == UVM_FAILURE_INTERRUPT)
			sys_tgkill((uint32_t)getpid(), SIGINT);
		uvm_janitor_ensure();
		uvm_helper_kick(&uvm_janitor);
	}
	if (d == DELIVERED || !again)
		looked(tid);
	return again ? d : DELIVERED; /* though the placeholder be gone again: the touch says so */
}

/* --- the instruction --------------------------------------------------------------------------- */
/* The instruction runs again, and this thread only then stops: uvm_sigtrap_handler(). A signal of the program's may
 * come first: the flag waits in the context that its handler returns to. Locked. */
static void trap(struct uvm_told *t, void *context)
{
#if UVM_HAVE_STEP
	greg_t *flags = &((ucontext_t *)context)->uc_mcontext.gregs[REG_EFL];

	if (!(*flags & TRAP_FLAG)) {
		*flags |= TRAP_FLAG;
		t->nr_traps++;
	}
#else
	(void)t, (void)context;
#endif
}

static bool traps(const void *context)
{
#if UVM_HAVE_STEP
	return ((const ucontext_t *)context)->uc_mcontext.gregs[REG_EFL] & TRAP_FLAG;
#else
	(void)context;
	return false;
#endif
}

/* The thread has been told, and may go on: over its placeholder, if that is still there. */
static enum delivery step_over(struct uvm_region *r, uint64_t address, void *context)
{
	uint64_t index = (address - r->start) >> UVM_PAGE_SHIFT;
	enum uvm_step step = UVM_STEP_REFUSED;
	enum delivery d = DELIVERED;

	uvm_failures_lock();
	struct uvm_told *t = uvm_told_find(sys_gettid());
	struct uvm_placeholder *ph = uvm_ph_find(uvm_region_handle(r), index);
	if (t && ph && ph->state == UVM_PH_COVERED && !ph->left_open) {
		t->stepping = true;
		/* Not in a handler of the program's that interrupted such an instruction: its registers wait. */
		bool nested = t->nr_traps && !traps(context);
		if (!steps_no_more(t) && !nested && t->nr_over < UVM_SHIFTS) {
			uint64_t shadow = ph->shadow + (address - ph->address);
			t->over[t->nr_over++] = (uint16_t)(ph - uvm_failures.ph);
			ph->nr_steps++;
			t->steps++;
			uvm_failures_unlock();
			step = uvm_step_begin(context, address, shadow, &t->shift);
			uvm_failures_lock();
			if (step != UVM_STEP_TRAP)
				uvm_ph_step_done(&uvm_failures.ph[t->over[--t->nr_over]]);
			ph = uvm_ph_find(uvm_region_handle(r), index);
		}
		if (step == UVM_STEP_REFUSED && ph && ph->state == UVM_PH_COVERED &&
		    !ph->left_open && !open_for(t, ph, r))
			d = DIE;
		if (t->nr_open || t->shift.nr)
			trap(t, context);
		t->stepping = false;
	}
	uvm_failures_unlock();
	return d;
}

/* --- the handlers ------------------------------------------------------------------------------ */
void uvm_sigtrap_handler(int sig, siginfo_t *info, void *context)
{
	int saved = errno;
	bool ours = false;

	(void)sig;
	if (info->si_code == TRAP_TRACE) {
		uvm_failures_lock();
		struct uvm_told *t = uvm_told_find(sys_gettid());
		ours = t && t->nr_traps;
		if (ours) {
			if (!--t->nr_traps) {
				uvm_step_end(context, &t->shift);
				while (t->nr_over)
					uvm_ph_step_done(&uvm_failures.ph[t->over[--t->nr_over]]);
			}
			close_for(t);
		}
		uvm_failures_unlock();
	}
#if UVM_HAVE_STEP
	if (ours)
		((ucontext_t *)context)->uc_mcontext.gregs[REG_EFL] &= ~(greg_t)TRAP_FLAG;
#endif
	if (!ours)
		uvm_chain(SIGTRAP, info, context);
	errno = saved;
}

/* The end of both handlers, with nothing held: the instruction runs again, or the signal is another's. */
static void conclude(enum delivery d, int sig, siginfo_t *info, void *context)
{
	if (d == LATER)
		wait_a_little();
	else if (d == AGAIN && !look_again(sys_gettid(), (uint64_t)(uintptr_t)info->si_addr))
		d = DIE;
	if (d == DIE)
		uvm_chain(sig, info, context);
}

void uvm_sigbus_handler(int sig, siginfo_t *info, void *context)
{
	int saved = errno;
	uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
	enum delivery d = DIE;
	bool ours = info->si_code > 0 && atomic_load(&uvm_sigbus_installed);
	struct uvm_region *r = ours ? uvm_region_find(address) : NULL;
	bool poison_first = false;

	(void)sig;
	if (r && r->service == UVM_SERVICE_INLINE && info->si_code != BUS_MCEERR_AR) {
		uvm_region_put(r);
		int rc = uvm_inline_fault(address, uvm_is_write(context));
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
	conclude(d, SIGBUS, info, context);
	errno = saved;
}

/* A touch of a placeholder that is not open. */
static enum delivery touch_placeholder(struct uvm_region *r, uint64_t index)
{
	bool told = uvm_told_already(sys_gettid());

	if (atomic_load(&r->state) != UVM_REGION_LIVE)
		return LATER;
	uvm_failures_lock();
	struct uvm_placeholder *ph = uvm_ph_find(uvm_region_handle(r), index);
	/* Covered ahead for another thread: this one gets a try of its own. */
	bool remove = ph && ph->state == UVM_PH_COVERED && !told && index != ph->index;
	if (remove)
		uvm_ph_begin_remove(ph);
	bool covered = ph && ph->state == UVM_PH_COVERED;
	uvm_failures_unlock();
	if (remove) {
		uvm_ph_remove(ph);
		return DELIVERED;
	}
	return covered ? deliver(r, index, false) : ph ? LATER : AGAIN;
}

void uvm_sigsegv_handler(int sig, siginfo_t *info, void *context)
{
	int saved = errno;
	uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
	enum delivery d = DIE;
	bool ours = info->si_code == SEGV_ACCERR && atomic_load(&uvm_sigbus_installed);
	struct uvm_region *r = ours ? uvm_region_find(address) : NULL;

	(void)sig;
	if (r) {
		if (r->lost)
			uvm_region_say_lost(r);
		else if (r->writable || !uvm_is_write(context))
			d = touch_placeholder(r, (address - r->start) >> UVM_PAGE_SHIFT);
		if (d == DELIVERED)
			d = step_over(r, address, context);
		uvm_region_put(r);
	}
	conclude(d, SIGSEGV, info, context);
	errno = saved;
}
