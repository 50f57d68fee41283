/* One fault, from the message to the woken thread: walk, decide, act, settle, account. Reads like
 * handle_mm_fault() and what is below it, except that what to do comes from the tables: a function here
 * is one Action, and none of them asks what kind of fault or region it is.
 *
 * Rules of the threads that run this (service.c has the whole list): no Python, no allocation, no touch
 * of lazy memory; the region is not used after it was let go of, and it is let go of before any wait
 * for a file. */
#include "commit.h"
#include "failure.h"

/* Internal outcome of an action, beside the VM_FAULT_* bits (which end at 0xf0000): start again now. */
#define RESTART 0x80000000u

#define FAULT_ERROR                                                                                \
	(UVM_VM_FAULT_OOM | UVM_VM_FAULT_SIGBUS | UVM_VM_FAULT_SIGSEGV | UVM_VM_FAULT_HWPOISON)

static const uint8_t zero_page[UVM_PAGE] __attribute__((aligned(4096)));

/* The const part: which fault, in which region; then what the steps find out. */
struct vm_fault {
	struct uvm_executor *x;
	const struct uvm_fault *f;
	struct uvm_region *region; /* NULL once let go of */
	int64_t handle;
	uint64_t index;
	unsigned flags; /* FaultFlag, prologue bits included */
	unsigned orig_pte;
	const struct uvm_row *row;

	uint32_t nr_pages;
	bool found; /* a page was there already: the fault itself brought none */
	int err;
	int settlement;
};

/* ---- the walk ---------------------------------------------------------------------------------------- */
/* A folio that a dead process left busy, if the page's state is a folio's: taken over, look again. */
static bool take_over_dead(struct uvm_region *r, uint64_t index)
{
	return uvm_region_in_cache(r) && uvm_cache_take_over_dead(r->cache, r->pgoff + index);
}

/* The page-table entry joined with the folio, as this kind of fault proves it: the kernel's truth wins.
 * MISSING proves that no page is mapped here and, over a memfd, that there was none in the cache; MINOR
 * that the entry is empty and the cache has the page; WP that the page is mapped write-protected. */
unsigned uvm_walk(struct uvm_region *r, uint64_t index, int kind, unsigned *flags)
{
	unsigned pte = atomic_load_explicit(&r->ptes[index], memory_order_acquire);

	if (!uvm_region_in_cache(r))
		return pte;
	if (pte == UVM_PTE_POISONED || pte == UVM_PTE_GUARD || pte == UVM_PTE_BUSY)
		return pte;
	switch (uvm_folio_state(
		atomic_load_explicit(&r->cache->folios[r->pgoff + index], memory_order_acquire))) {
	case UVM_FOLIO_ABSENT:
	case UVM_FOLIO_ERROR:
		return UVM_PTE_NONE;
	case UVM_FOLIO_FILLING:
	case UVM_FOLIO_EVICTING:
		return UVM_PTE_BUSY;
	case UVM_FOLIO_WRITEBACK:
		*flags |= UVM_FLAG_CACHED;
		return kind == UVM_KIND_WP      ? UVM_PTE_EVICTING
		       : kind == UVM_KIND_MINOR ? UVM_PTE_CACHED
						: UVM_PTE_NONE;
	case UVM_FOLIO_DIRTY:
		*flags |= UVM_FLAG_CACHED;
		if (kind == UVM_KIND_WP)
			return pte == UVM_PTE_PRESENT ? UVM_PTE_PRESENT : UVM_PTE_WRITE_PROTECTED;
		break;
	default: /* UPTODATE: writable in no page table */
		*flags |= UVM_FLAG_CACHED;
		if (kind == UVM_KIND_WP)
			return UVM_PTE_WRITE_PROTECTED;
	}
	return kind == UVM_KIND_MINOR ? UVM_PTE_CACHED : UVM_PTE_NONE;
}

/* vmf_pte_changed(): under the page-table lock, is the page what it was when we decided? */
static bool pte_same(struct vm_fault *v)
{
	unsigned flags = v->flags & ~UVM_FLAG_CACHED;
	unsigned pte = uvm_walk(v->region, v->index, v->f->kind, &flags);
	return pte == v->orig_pte && (flags & UVM_FLAG_CACHED) == (v->flags & UVM_FLAG_CACHED);
}

static uint64_t fault_page(const struct vm_fault *v)
{
	return uvm_region_addr(v->region, v->index);
}

static int fault_uffd(const struct vm_fault *v)
{
	return uvm_service_uffd(v->f->service);
}

static uint32_t wake(struct vm_fault *v)
{
	(void)sys_uffd_wake(fault_uffd(v), v->f->address & ~(uint64_t)(UVM_PAGE - 1), UVM_PAGE);
	return UVM_VM_FAULT_NOPAGE;
}

static int failure_kind(int err)
{
	switch (err) {
	case EHWPOISON:
		return UVM_FAILURE_NONE; /* poisoned before, for a reason that is known */
	case ENODATA:
	case ESTALE:
		return UVM_FAILURE_CHANGED;
	case ETIMEDOUT:
		return UVM_FAILURE_TIMEOUT;
	case EINTR:
		return UVM_FAILURE_INTERRUPT;
	case ENOMEM:
		return UVM_FAILURE_OOM;
	case EINVAL:
	case ENOTRECOVERABLE:
		return UVM_FAILURE_BUG;
	default:
		return UVM_FAILURE_SOURCE;
	}
}

/* The page fails: the reason first, then the poison that wakes. Inline, the touching thread is this
 * one, and is told by the handler that runs around us, once nothing is held any more. */
static uint32_t fail_page(struct vm_fault *v, int err, uint32_t result)
{
	uvm_failure_record(v->region, v->index, failure_kind(err), err);
	v->err = err == EHWPOISON ? EIO : err;
	if (v->x->service == UVM_SERVICE_INLINE) {
		v->x->failed = true;
		return result;
	}
	struct uvm_done d = uvm_poison_page(v->region, v->index);
	if (d.err && d.err != EEXIST)
		(void)wake(v); /* it will fault again, until its deadline */
	return result;
}

/* A page is there, which poison would be refused for: the access fails instead, by SIGSEGV. */
static uint32_t deny(struct vm_fault *v, int err, uint32_t result)
{
	uvm_failure_record(v->region, v->index, failure_kind(err), err);
	v->err = err;
	(void)sys_mprotect(fault_page(v), UVM_PAGE, PROT_READ);
	(void)wake(v);
	return result;
}

/* Later: parked, or (the touching thread being this one) by running the instruction again. */
static uint32_t try_again(struct vm_fault *v)
{
	if (v->f->service == UVM_SERVICE_INLINE) {
		usleep(100);
		return UVM_VM_FAULT_RETRY;
	}
	return uvm_park(v->f) == 0 ? UVM_VM_FAULT_RETRY : wake(v);
}

static uint32_t settle_failed(struct vm_fault *v, const struct uvm_commit_end *end)
{
	v->settlement = end->settlement;
	v->err = end->err;
	switch (end->settlement) {
	case UVM_SETTLEMENT_RECLAIM: /* the kernel's own memory: nothing of ours to reclaim would help */
		if (end->row != 0xff && uvm_row(end->row)->action == UVM_ACTION_DENY_WRITE)
			return try_again(v); /* it may have some later; p7wp ends it */
		return fail_page(v, ENOMEM, end->result);
	case UVM_SETTLEMENT_POISON:
		return fail_page(v, end->err ? end->err : ENOMEM, end->result);
	case UVM_SETTLEMENT_DENY:
		return deny(v, end->err, end->result);
	case UVM_SETTLEMENT_RETRY:
		return try_again(v);
	default: /* VERIFY, DROP, ORDER0 of a single page; DETACH, since its thread is there: run it again */
		return wake(v);
	}
}

/* ---- single pages -------------------------------------------------------------------------------------- */
static uint32_t act_wake(struct vm_fault *v)
{
	wake(v);
	return v->row->result;
}

/* p5: the region is read-only; p7wp: tried for too long. */
static uint32_t act_deny_write(struct vm_fault *v)
{
	return deny(v, v->flags & UVM_FLAG_DEADLINE ? ETIMEDOUT : EACCES, v->row->result);
}

static uint32_t act_join(struct vm_fault *v)
{
	if (v->f->tries > 1 && take_over_dead(v->region, v->index))
		return RESTART;
	if (v->x->service == UVM_SERVICE_INLINE) {
		/* The touching thread is this one: nobody else would watch its deadline. */
		const struct uvm_region *r = v->region;
		while (!r->deadline_ns || sys_now_ns() - v->f->first_ns < r->deadline_ns) {
			unsigned flags = 0;
			if (uvm_walk(v->region, v->index, v->f->kind, &flags) != v->orig_pte ||
			    atomic_load(&r->state) != UVM_REGION_LIVE ||
			    take_over_dead(v->region, v->index))
				return UVM_VM_FAULT_RETRY; /* the instruction runs again */
			uvm_long_wait(v->f);
			if (uvm_interrupt_pending(v->f->tid))
				return fail_page(v, EINTR, UVM_VM_FAULT_SIGBUS);
			usleep(100);
		}
		return fail_page(v, ETIMEDOUT, UVM_VM_FAULT_SIGBUS);
	}
	return uvm_park(v->f) == 0 ? UVM_VM_FAULT_RETRY : wake(v);
}

static uint32_t act_poison(struct vm_fault *v)
{
	int err = ENOTRECOVERABLE; /* unreachable: a bug, and it is said loudly */
	if (v->flags & UVM_FLAG_DEADLINE)
		err = uvm_interrupt_pending(v->f->tid) ? EINTR : ETIMEDOUT;
	else if (v->flags & UVM_FLAG_BEYOND_SIZE)
		err = ENODATA;
	else if (v->orig_pte == UVM_PTE_POISONED)
		err = EHWPOISON;
	return fail_page(v, err, v->row->result);
}

/* p2. Only under space.mutex can we be sure that no region is just being registered here. A debugger that reads
 * an alias waits for ever: unregistered, a hole of the memfd would become a page of zeros for everybody. */
static uint32_t act_unregister_stray(struct vm_fault *v)
{
	uint64_t page = v->f->address & ~(uint64_t)(UVM_PAGE - 1);
	bool alias = false;
	if (pthread_mutex_trylock(&uvm_space.mutex) == 0) {
		struct uvm_region *r = uvm_region_find(page);
		alias = uvm_is_alias(page);
		if (r)
			uvm_region_put(r);
		else if (!alias)
			(void)sys_uffd_unregister(fault_uffd(v), page, UVM_PAGE);
		pthread_mutex_unlock(&uvm_space.mutex);
	}
	if (!alias)
		wake(v);
	return v->row->result;
}

/* settle_truth(): publishes what the kernel has, and says how to go on. Under the lock or not at all:
 * the entry is only changed if it still is what we decided on. */
static uint32_t settle_truth(struct vm_fault *v, int commit, bool locked)
{
	int truth = uvm_kernel_truth(v->region, v->index);
	/* A page that is swapped out looks like a marker, but it does not fault as missing. */
	if (!locked && v->f->kind == UVM_KIND_MISSING && truth == UVM_TRUTH_PRESENT_WP)
		truth = UVM_TRUTH_MARKER;
	if (truth < 0)
		return wake(v); /* the kernel did not say: run the instruction again */
	const struct uvm_settled *s = uvm_settle_truth(commit, truth, v->region->backing);
	const struct uvm_row *found = s->row != 0xff ? uvm_row(s->row) : NULL;

	v->settlement = s->settlement;
	if (!locked)
		uvm_ptl_lock(fault_page(v));
	if (found && found->next_pte != UVM_PTE_KEEP && pte_same(v))
		uvm_set_pte(v->region, v->index, found->next_pte);
	if (!locked)
		uvm_ptl_unlock(fault_page(v));
	if (found)
		uvm_count_row(v->region, found);
	if (s->settlement == UVM_SETTLEMENT_RETRY)
		return RESTART;
	wake(v);
	return s->result;
}

static uint32_t act_scan(struct vm_fault *v)
{
	return settle_truth(v, v->row->commit, false);
}

/* Lock, compare with what was decided on, commit, publish: the leaf of every single-page action. */
static uint32_t commit_page(struct vm_fault *v, int commit, const uint8_t *buf)
{
	struct uvm_commit a = {v->region, fault_uffd(v), commit, buf, v->index};
	struct uvm_commit_end end = {0};

	uvm_ptl_lock(fault_page(v));
	if (!pte_same(v)) {
		uvm_ptl_unlock(fault_page(v));
		uvm_count(v->region, UVM_COUNTER_RACE_LOST, 1);
		return wake(v);
	}
	uint64_t done = uvm_commit(&a, v->index, 1, &end);
	if (done == 1) {
		if (v->row->next_pte != UVM_PTE_KEEP)
			uvm_set_pte(v->region, v->index, v->row->next_pte);
		v->nr_pages = 1;
		v->found = end.found;
	} else if (end.settlement == UVM_SETTLEMENT_VERIFY) {
		uint32_t result = settle_truth(v, commit, true);
		uvm_ptl_unlock(fault_page(v));
		return result;
	}
	uvm_ptl_unlock(fault_page(v));
	return done == 1 ? v->row->result : settle_failed(v, &end);
}

static uint32_t act_zero_fill(struct vm_fault *v)
{
	return commit_page(v, v->row->commit, zero_page);
}

static uint32_t act_reuse(struct vm_fault *v)
{
	return commit_page(v, v->row->commit, NULL);
}

/* page_mkwrite and dirty before the write is let through. Regions with a hook are served by the Python
 * service (uvm_region_create() sees to it), so here the only hook is the folio's state. */
static bool folio_mkdirty(struct uvm_cache *c, uint64_t index)
{
	for (;;) {
		switch (uvm_folio_state(atomic_load(&c->folios[index]))) {
		case UVM_FOLIO_DIRTY:
			return true;
		case UVM_FOLIO_UPTODATE:
			if (!uvm_folio_move(c, index, UVM_FOLIO_UPTODATE, UVM_FOLIO_DIRTY))
				continue;
			__atomic_fetch_add(&c->shared->ctl.nr_dirty, 1, __ATOMIC_RELAXED);
			return true;
		case UVM_FOLIO_WRITEBACK:
			if (!uvm_folio_move(c, index, UVM_FOLIO_WRITEBACK, UVM_FOLIO_DIRTY))
				continue;
			return true;
		default:
			return false;
		}
	}
}

static uint32_t act_mkwrite(struct vm_fault *v)
{
	struct uvm_region *r = v->region;
	struct uvm_commit a = {r, fault_uffd(v), v->row->commit, NULL, 0};
	struct uvm_commit_end end = {0};

	uvm_ptl_lock(fault_page(v));
	/* Dirty first, under the lock that write-back takes to protect: so a page is never writable
	 * and clean. */
	if (!pte_same(v) || !folio_mkdirty(r->cache, r->pgoff + v->index)) {
		uvm_ptl_unlock(fault_page(v));
		return RESTART;
	}
	uint64_t done = uvm_commit(&a, v->index, 1, &end);
	if (done == 1) {
		uvm_set_pte(r, v->index, v->row->next_pte);
		v->nr_pages = 1;
	}
	uvm_ptl_unlock(fault_page(v));
	return done == 1 ? v->row->result : settle_failed(v, &end);
}

/* map_pages: the folio, and around it those that are in the cache and not mapped here. Never reads. */
static uint32_t act_map_cached(struct vm_fault *v)
{
	struct uvm_region *r = v->region;
	struct uvm_commit a = {r, fault_uffd(v), v->row->commit, NULL, 0};
	struct uvm_commit_end end = {0};
	uint64_t around = r->fault_around_pages, first = v->index & ~(around - 1);
	uint64_t last = first + around < r->nr_pages ? first + around : r->nr_pages;
	uint64_t start = v->index, stop = v->index + 1;

	if (v->row->commit == UVM_COMMIT_WAKE) {
		wake(v); /* the kernel maps what is in the memfd, and its neighbours, by itself */
		return v->row->result;
	}
	uvm_ptl_lock(fault_page(v));
	if (!pte_same(v)) {
		uvm_ptl_unlock(fault_page(v));
		return wake(v);
	}
	while (start > first && atomic_load(&r->ptes[start - 1]) == UVM_PTE_NONE &&
	       uvm_folio_state(atomic_load(&r->cache->folios[r->pgoff + start - 1])) ==
		       UVM_FOLIO_UPTODATE)
		start--;
	while (stop < last && atomic_load(&r->ptes[stop]) == UVM_PTE_NONE &&
	       uvm_folio_state(atomic_load(&r->cache->folios[r->pgoff + stop])) ==
		       UVM_FOLIO_UPTODATE)
		stop++;
	uint64_t done = uvm_commit(&a, start, stop - start, &end);
	uvm_set_ptes(r, start, done, v->row->next_pte);
	if (start + done <= v->index) { /* a neighbour was in the way: the page itself */
		done = uvm_commit(&a, v->index, 1, &end);
		uvm_set_ptes(r, v->index, done, v->row->next_pte);
		start = v->index;
	}
	uvm_ptl_unlock(fault_page(v));
	if (start + done > v->index) {
		v->nr_pages = (uint32_t)done;
		uvm_count(r, UVM_COUNTER_MAP_AROUND, done - 1);
		return v->row->result;
	}
	if (end.settlement ==
	    UVM_SETTLEMENT_VERIFY) { /* mapped already: publish what the kernel has */
		uvm_ptl_lock(fault_page(v));
		if (pte_same(v))
			uvm_set_pte(r, v->index, v->row->next_pte);
		uvm_ptl_unlock(fault_page(v));
	}
	return settle_failed(v, &end);
}

/* ---- filling from the file -------------------------------------------------------------------------------- */
struct window {
	uint64_t index, nr_pages;     /* pages of the region */
	uint64_t demand;              /* the page that is waited for, UVM_NO_INDEX for read-ahead */
	const struct uvm_row *row;    /* of the demanded page */
	const struct uvm_row *around; /* of its neighbours: what a read of them would decide */
};

static bool page_take(struct uvm_region *r, uint64_t index)
{
	if (uvm_region_in_cache(r))
		return atomic_load(&r->ptes[index]) != UVM_PTE_POISONED &&
		       uvm_folio_move(r->cache, r->pgoff + index, UVM_FOLIO_ABSENT,
				      UVM_FOLIO_FILLING);
	uint8_t pte = atomic_load(&r->ptes[index]); /* a marker is a hole too */
	bool taken = (pte == UVM_PTE_NONE || pte == UVM_PTE_NONE_WP) &&
		     atomic_compare_exchange_strong(&r->ptes[index], &pte, UVM_PTE_BUSY);
	if (taken && r->touched)
		atomic_store_explicit(&r->touched[index / UVM_PAGE], 1, memory_order_relaxed);
	return taken;
}

/* Takes the absent pages around w->demand (or from w->index on) that are next to each other. */
static bool window_take(struct uvm_region *r, struct window *w)
{
	uint64_t at = w->demand == UVM_NO_INDEX ? w->index : w->demand;
	uint64_t first = w->index, last = w->index + w->nr_pages;

	if (!page_take(r, at))
		return false;
	w->index = at;
	w->nr_pages = 1;
	while (w->index > first && page_take(r, w->index - 1)) {
		w->index--;
		w->nr_pages++;
	}
	while (w->index + w->nr_pages < last && page_take(r, w->index + w->nr_pages))
		w->nr_pages++;
	return true;
}

/* Gives pages of the window back, absent: all of it, or those behind what was committed. */
static void window_release(struct uvm_region *r, struct uvm_cache *c, uint64_t pgoff, bool private,
			   uint64_t index, uint64_t nr_pages)
{
	uint64_t released = 0;
	for (uint64_t i = index; i < index + nr_pages; i++) {
		if (!private) {
			released +=
				uvm_folio_move(c, pgoff + i, UVM_FOLIO_FILLING, UVM_FOLIO_ABSENT);
		} else if (r) {
			uint8_t busy = UVM_PTE_BUSY;
			atomic_compare_exchange_strong(&r->ptes[i], &busy, UVM_PTE_NONE);
		}
	}
	if (released)
		uvm_cache_uncharge(c, released);
}

/* Clamped to the 2 MiB of the page, as the kernel clamps fault-around to a page table: so one lock
 * covers the window. */
static void window_clamp(const struct uvm_region *r, uint64_t at, struct window *w)
{
	uint64_t in_pmd = (uvm_region_addr(r, at) >> UVM_PAGE_SHIFT) % UVM_PMD_PAGES;
	uint64_t lo = at > in_pmd ? at - in_pmd : 0, hi = at + (UVM_PMD_PAGES - in_pmd);
	uint64_t end = w->index + w->nr_pages;
	/* A window is a small part of the cap: several are under way at a time. */
	uint64_t most = r->cache ? r->cache->shared->ctl.cap_pages / 16 : UVM_PMD_PAGES;
	if (hi > r->nr_pages)
		hi = r->nr_pages;
	if (r->cache && end - at > (most ? most : 1))
		end = at + (most ? most : 1);
	if (r->cache && at - w->index > most)
		w->index = at - most;
	if (w->index < lo)
		w->index = lo;
	w->nr_pages = (end < hi ? end : hi) - w->index;
}

static void publish_folio(struct uvm_cache *c, uint64_t index, bool dirty)
{
	if (dirty)
		__atomic_fetch_add(&c->shared->ctl.nr_dirty, 1, __ATOMIC_RELAXED);
	uvm_folio_move(c, index, UVM_FOLIO_FILLING, dirty ? UVM_FOLIO_DIRTY : UVM_FOLIO_UPTODATE);
}

/* finish_fault() over a run with one commit. Under the lock. Pages that turn out present keep what they
 * are; pages that cannot be reached (a placeholder stands there) are given back. Returns pages done. */
static uint64_t finish_run(const struct uvm_commit *a, uint64_t index, uint64_t nr_pages,
			   unsigned next_pte, bool dirty, struct uvm_commit_end *end)
{
	struct uvm_region *r = a->region;
	bool private = !uvm_region_in_cache(r);
	uint64_t i = index, stop = index + nr_pages, done = 0;
	/* COPY wakes before we publish: what the woken thread does next finds FILLING, and joins. */
	while (i < stop) {
		uint64_t n = uvm_commit(a, i, stop - i, end);
		uvm_set_ptes(r, i, n, next_pte);
		for (uint64_t k = i; k < i + n && !private; k++)
			publish_folio(r->cache, r->pgoff + k, dirty);
		i += n;
		done += n;
		if (i >= stop)
			break;
		switch (end->settlement) {
		case UVM_SETTLEMENT_VERIFY:
			end->found = true;
			if (private) { /* present, by whom we do not know: as if written */
				uvm_set_pte(r, i, UVM_PTE_PRESENT);
			} else if (!uvm_cache_has(r->cache, r->pgoff + i)) {
				window_release(r, r->cache, r->pgoff, private, i, 1);
			} else { /* in the memfd already; whoever needs it maps it */
				uvm_rewrite_folio(r, i,
						  a->buf + ((i - a->buf_index) << UVM_PAGE_SHIFT));
				publish_folio(r->cache, r->pgoff + i, dirty);
			}
			(void)sys_uffd_wake(a->uffd, uvm_region_addr(r, i), UVM_PAGE);
			i++;
			done++;
			break;
		case UVM_SETTLEMENT_ORDER0:
		case UVM_SETTLEMENT_DROP:
			if (stop - i > 1) { /* page by page: which one is it? */
				uint64_t one = 0;
				for (; i < stop; i++)
					one += finish_run(a, i, 1, next_pte, dirty, end);
				return done + one;
			}
			/* fall through */
		default:
			window_release(r, r->cache, r->pgoff, private, i, stop - i);
			return done;
		}
	}
	return done;
}

/* Commits a window that was read into buf. Returns pages done; demand_ok says whether the demanded
 * page is among them. */
static uint64_t window_commit(struct uvm_region *r, const struct window *w, const uint8_t *buf,
			      int uffd, struct uvm_commit_end *end, bool *demand_ok)
{
	struct uvm_commit around = {r, uffd, w->around->commit, buf, w->index};
	uint64_t addr = uvm_region_addr(r, w->index), stop = w->index + w->nr_pages, done = 0;

	*demand_ok = true;
	uvm_ptl_lock(addr);
	if (w->demand != UVM_NO_INDEX && w->row != w->around) {
		struct uvm_commit demand = {r, uffd, w->row->commit, buf, w->index};
		struct uvm_commit_end other = {0};
		bool dirty = w->row->action == UVM_ACTION_MKWRITE_FOLIO;
		/* Neighbours first: the woken thread would only fault on them. */
		if (w->demand > w->index)
			done += finish_run(&around, w->index, w->demand - w->index,
					   w->around->next_pte, false, &other);
		if (w->demand + 1 < stop)
			done += finish_run(&around, w->demand + 1, stop - w->demand - 1,
					   w->around->next_pte, false, &other);
		uint64_t n = finish_run(&demand, w->demand, 1, w->row->next_pte, dirty, end);
		*demand_ok = n == 1;
		done += n;
	} else {
		done = finish_run(&around, w->index, w->nr_pages, w->around->next_pte, false, end);
		if (w->demand != UVM_NO_INDEX && done < w->nr_pages) {
			unsigned flags = 0;
			unsigned pte = uvm_walk(r, w->demand, UVM_KIND_MISSING, &flags);
			*demand_ok = pte != UVM_PTE_NONE || flags & UVM_FLAG_CACHED;
		}
	}
	uvm_ptl_unlock(addr);
	return done;
}

enum { READ_TRIES = 3 };

static bool worth_retry(int rc)
{
	return rc == -EIO || rc == -EAGAIN || rc == -ETIMEDOUT || rc == -ENOMEM || rc == -ENOBUFS;
}

/* Reads the window's pages. With x->may_block the region is let go of meanwhile: nothing of it may be
 * used before it was found again. -EAGAIN: a thread that may block has to do it, or to try again what
 * failed here, where nobody may wait in between. */
static int window_read(struct uvm_executor *x, struct uvm_cache *c, uint64_t index,
		       uint64_t nr_pages)
{
	int rc = uvm_cache_read(c, index, nr_pages, x->buf, !x->may_block);
	if (!x->may_block)
		return worth_retry(rc) ? -EAGAIN : rc;
	for (int i = 1; worth_retry(rc) && i < READ_TRIES; i++) {
		usleep(5000u << i);
		rc = uvm_cache_read(c, index, nr_pages, x->buf, false);
	}
	return rc;
}

/* Fills one window: take, charge, read, commit, publish. *region may come back NULL (closed meanwhile).
 * Returns pages done, 0 if the first page was not there to take, or -errno:
 * -EAGAIN a blocking thread must do it, -ESTALE... the file changed, -EBADF the region is gone. */
static int64_t fill_window(struct uvm_executor *x, const struct uvm_fault *f,
			   struct uvm_region **region, struct window *w, struct uvm_commit_end *end,
			   bool *demand_ok)
{
	struct uvm_region *r = *region;
	struct uvm_cache *c = r->cache;
	uint64_t pgoff = r->pgoff;
	bool private = !uvm_region_in_cache(r);
	int64_t handle = uvm_region_handle(r);
	int uffd = uvm_service_uffd(r->service);

	if (!window_take(r, w))
		return 0;
	if (!private && !uvm_cache_charge(c, w->nr_pages, x->may_block)) {
		for (uint64_t i = w->index; i < w->index + w->nr_pages; i++)
			uvm_folio_move(c, pgoff + i, UVM_FOLIO_FILLING, UVM_FOLIO_ABSENT);
		return -EAGAIN;
	}
	bool let_go = x->may_block && x->service != UVM_SERVICE_INLINE;
	uvm_cache_ref(c);
	uint64_t head = __atomic_load_n(&r->ctl->trace_head, __ATOMIC_RELAXED);
	__builtin_prefetch(&r->ctl->trace[head % UVM_TRACE_RECORDS], 1);
	if (let_go) {
		uvm_region_put(r);
		*region = r = NULL;
	}
	int rc = window_read(x, c, pgoff + w->index, w->nr_pages);
	if (let_go) {
		*region = r = uvm_region_by_handle(handle);
		if (!r || atomic_load(&r->state) != UVM_REGION_LIVE)
			rc = -EBADF;
	}
	int64_t done = rc;
	if (rc < 0) {
		window_release(r, c, pgoff, private, w->index, w->nr_pages);
	} else {
		done = (int64_t)window_commit(r, w, x->buf, uffd, end, demand_ok);
		if (!private)
			uvm_cache_note_extent(c, pgoff + w->index, w->nr_pages);
		uvm_count(r, UVM_COUNTER_BYTES_READ, w->nr_pages << UVM_PAGE_SHIFT);
		if (done == (int64_t)w->nr_pages)
			uvm_unpark_range(r, w->index, w->nr_pages,
					 w->row ? w->row->result : UVM_VM_FAULT_MAJOR, f);
		else /* who waits for a page that did not come was not woken, and starts again */
			uvm_poke_fault_thread();
	}
	uvm_cache_unref(c);
	return done;
}

/* How many blocks are kept on their way ahead of the one that is being read: while the toucher waits for
 * one, the next keeps the other worker at work. */
enum { READAHEAD_BLOCKS = 2 };

enum reader { READS_ANYWHERE, READS_UP, READS_DOWN };

/* The page where the block of `nr_pages` (a power of two) that holds `index` starts. Blocks are aligned in
 * the address space, so that none crosses a page-table lock; the first one of a region may be cut. */
static uint64_t block_start(const struct uvm_region *r, uint64_t index, uint64_t nr_pages)
{
	uint64_t into = uvm_region_addr(r, index) >> UVM_PAGE_SHIFT & (nr_pages - 1);
	return index > into ? index - into : 0;
}

/* The page behind that block. */
static uint64_t block_end(const struct uvm_region *r, uint64_t index, uint64_t nr_pages)
{
	uint64_t vpn = uvm_region_addr(r, index) >> UVM_PAGE_SHIFT;
	return index + nr_pages - (vpn & (nr_pages - 1));
}

/* Whoever reads on: the next page behind what was brought or asked for, or one inside that the workers have
 * not come to yet, such as a marker. Downwards too: memmove() copies from the end where that suits it. */
static enum reader reader_of(const struct uvm_region *r, uint64_t index, uint64_t advice)
{
	uint64_t prev = atomic_load_explicit(&r->ra_prev, memory_order_relaxed);
	if (r->readahead_pages <= 1 || advice == UVM_ADVICE_RANDOM)
		return READS_ANYWHERE;
	if (advice == UVM_ADVICE_SEQUENTIAL ||
	    (index > prev && index <= atomic_load_explicit(&r->ra_end, memory_order_relaxed)))
		return READS_UP;
	if (index < prev && index + 1 >= atomic_load_explicit(&r->ra_start, memory_order_relaxed))
		return READS_DOWN;
	return READS_ANYWHERE;
}

/* ondemand_readahead(): what a fault brings by itself (fault-around), and whether it is one of a sequential
 * reader: then *block says how much to read ahead at a time, twice as much as the last time. */
static enum reader plan_window(struct uvm_region *r, uint64_t index, struct window *w,
			       uint64_t *block)
{
	uint64_t around = r->fault_around_pages;
	uint64_t advice = __atomic_load_n(&r->ctl->advice, __ATOMIC_RELAXED);
	enum reader reader = reader_of(r, index, advice);

	if (advice == UVM_ADVICE_RANDOM)
		around = 1;
	w->index = index & ~(around - 1);
	w->nr_pages = around;
	*block = around;
	if (reader != READS_ANYWHERE) {
		uint64_t size = 2 * atomic_load_explicit(&r->ra_block, memory_order_relaxed);
		uint64_t most = r->readahead_pages;
		if (r->cache->shared->ctl.cap_pages / 16 <
		    most) /* several are under way at a time */
			most = r->cache->shared->ctl.cap_pages / 16;
		if (size > most || advice == UVM_ADVICE_SEQUENTIAL)
			size = most;
		*block = size > 1 ? 1ull << (63 - __builtin_clzll(size)) : 1;
	}
	atomic_store_explicit(&r->ra_block, (uint32_t)*block, memory_order_relaxed);
	window_clamp(r, index, w);
	return reader;
}

static bool queue_ahead(struct uvm_region *r, uint64_t first, uint64_t stop)
{
	if (first >= stop)
		return true;
	if (uvm_queue_fill(uvm_region_handle(r), first, stop - first) < 0)
		return false; /* enough to do already */
	uvm_count(r, UVM_COUNTER_READAHEAD, stop - first);
	return true;
}

/* Queues the rest of the block and the next ones. The page of each block that the reader comes to first stays
 * absent as a marker (PG_readahead): its cheap fault keeps the blocks behind it on their way. */
static void plan_next(struct uvm_region *r, uint64_t index, const struct window *w,
		      enum reader reader, uint64_t block)
{
	uint64_t start = w->index, end = w->index + w->nr_pages;

	if (reader == READS_UP) {
		uint64_t asked = atomic_load_explicit(&r->ra_end, memory_order_relaxed);
		uint64_t stop = block_end(r, index, block) + READAHEAD_BLOCKS * block;
		if (stop > r->nr_pages)
			stop = r->nr_pages;
		if (end < asked)
			end = asked;
		while (end < stop) {
			uint64_t next = block_end(r, end, block);
			bool marker = end == block_start(r, end, block);
			if (next > stop)
				next = stop;
			if (!queue_ahead(r, end + marker, next))
				break;
			end = next;
		}
		start = index;
	} else if (reader == READS_DOWN) {
		uint64_t asked = atomic_load_explicit(&r->ra_start, memory_order_relaxed);
		uint64_t stop = block_start(r, index, block);
		stop = stop > READAHEAD_BLOCKS * block ? stop - READAHEAD_BLOCKS * block : 0;
		if (start > asked)
			start = asked;
		while (start > stop) {
			uint64_t next = block_start(r, start - 1, block);
			bool marker = start == block_end(r, start - 1, block);
			if (!queue_ahead(r, next, start - marker))
				break;
			start = next;
		}
		end = index;
	}
	atomic_store_explicit(&r->ra_prev, index, memory_order_relaxed);
	atomic_store_explicit(&r->ra_start, start, memory_order_relaxed);
	atomic_store_explicit(&r->ra_end, end, memory_order_relaxed);
}

static const struct uvm_row *around_row(const struct uvm_region *r)
{
	return uvm_decide(UVM_KIND_MISSING, 0, r->backing, UVM_PTE_NONE, r->flags);
}

/* __do_fault() and finish_fault(): rows 10 to 13 and their variants. */
static uint32_t act_read_folio(struct vm_fault *v)
{
	struct window w;
	struct uvm_commit_end end = {0};
	bool demand_ok = false;
	uint64_t block;

	if (v->f->kind == UVM_KIND_MINOR)
		return RESTART; /* the cache had it when the kernel asked; look again */
	enum reader reader = plan_window(v->region, v->index, &w, &block);
	w.demand = v->index;
	w.row = v->row;
	w.around = around_row(v->region);
	int64_t done = fill_window(v->x, v->f, &v->region, &w, &end, &demand_ok);
	if (!v->region)
		return wake(
			v); /* X-GONE: closed while we read, so nobody else will wake this thread */
	if (done < 0 && done != -EAGAIN && done != -EBADF && w.nr_pages > 1) {
		/* The page itself may be good where a neighbour is not. */
		w.index = v->index;
		w.nr_pages = 1;
		reader = READS_ANYWHERE;
		done = fill_window(v->x, v->f, &v->region, &w, &end, &demand_ok);
		if (!v->region)
			return wake(v);
	}
	if (done == -EAGAIN)
		return uvm_queue_fault(v->f) == 0 ? UVM_VM_FAULT_RETRY : act_join(v);
	if (done == -EBADF)
		return wake(v);
	if (done == 0 && !demand_ok && !end.settlement)
		return RESTART; /* somebody else took it first */
	if (done < 0) {
		v->settlement = UVM_SETTLEMENT_POISON;
		uvm_count(v->region, UVM_COUNTER_IO_ERROR, 1);
		return fail_page(v, (int)-done, UVM_VM_FAULT_SIGBUS);
	}
	if (!demand_ok)
		return settle_failed(v, &end);
	v->nr_pages = (uint32_t)done;
	v->found = end.found;
	if (w.nr_pages > 1)
		uvm_count(v->region, UVM_COUNTER_MAP_AROUND, w.nr_pages - 1);
	plan_next(v->region, v->index, &w, reader, block);
	return v->row->result;
}

/* A write to a page of a shared mapping: MISSING fills it dirty, MINOR maps it dirty. */
static uint32_t act_mkwrite_folio(struct vm_fault *v)
{
	return v->flags & UVM_FLAG_CACHED ? act_mkwrite(v) : act_read_folio(v);
}

static uint32_t act_refuse(struct vm_fault *v)
{
	return fail_page(v, ENOTRECOVERABLE, UVM_VM_FAULT_SIGBUS);
}

typedef uint32_t (*action_fn)(struct vm_fault *v);

static const action_fn actions[UVM_NR_ACTION] = {
	[UVM_ACTION_WAKE] = act_wake,
	[UVM_ACTION_READ_EVENT] = act_wake, /* events never get here: the fault thread reads them */
	[UVM_ACTION_UNREGISTER_STRAY] = act_unregister_stray,
	[UVM_ACTION_JOIN] = act_join,
	[UVM_ACTION_POISON] = act_poison,
	[UVM_ACTION_DENY_WRITE] = act_deny_write,
	[UVM_ACTION_SCAN] = act_scan,
	[UVM_ACTION_ZERO_FILL] = act_zero_fill,
	[UVM_ACTION_MAP_CACHED] = act_map_cached,
	[UVM_ACTION_READ_FOLIO] = act_read_folio,
	[UVM_ACTION_COW_FOLIO] = act_read_folio,
	[UVM_ACTION_MKWRITE_FOLIO] = act_mkwrite_folio,
	[UVM_ACTION_REUSE] = act_reuse,
	[UVM_ACTION_MKWRITE] = act_mkwrite,
	[UVM_ACTION_CANCEL_EVICT] = act_mkwrite,
	[UVM_ACTION_UNPROTECT_AGAIN] = act_reuse,
};

/* ---- entry ------------------------------------------------------------------------------------------------- */
enum { EXPECTED_LATENCY_BUCKET = 84 }; /* 5 to 16 us: a line of the histogram */

/* A region that is one of thousands is in no cache: what the fault will need of it is asked for at once, to
 * arrive while the file is read. */
static void prefetch_region(const struct uvm_region *r, uint64_t index)
{
	const struct uvm_region_ctl *ctl = r->ctl;
	const struct uvm_cache_shared *s = r->shared;

	__builtin_prefetch(&r->ra_prev, 1);
	__builtin_prefetch((const void *)&r->ptes[index], 1);
	__builtin_prefetch(&ctl->trace_head, 1);
	__builtin_prefetch(&ctl->counters[UVM_COUNTER_PGFAULT], 1);
	__builtin_prefetch(&ctl->counters[UVM_COUNTER_BYTES_READ], 1);
	__builtin_prefetch(&ctl->latency[EXPECTED_LATENCY_BUCKET], 1);
	if (!s)
		return;
	__builtin_prefetch(r->cache, 1);
	__builtin_prefetch(&r->cache->owner, 1);
	__builtin_prefetch((const char *)s + UVM_CACHE_CTL_BYTES + 4 * (r->pgoff + index), 1);
	__builtin_prefetch(&s->ctl, 1);
	__builtin_prefetch(&s->fifo_lock, 1);
}

static unsigned prologue(struct vm_fault *v)
{
	struct uvm_region *r = v->region;
	unsigned flags = r->flags;

	v->index = (v->f->address - r->start) >> UVM_PAGE_SHIFT;
	prefetch_region(r, v->index);
	if (atomic_load(&r->state) != UVM_REGION_LIVE || atomic_load(&r->lost))
		flags |= UVM_FLAG_CLOSING;
	if (v->f->access == 1 && !r->writable)
		flags |= UVM_FLAG_WRITE_DENIED;
	if (r->cache && r->pgoff + v->index >= r->cache->nr_pages)
		flags |= UVM_FLAG_BEYOND_SIZE;
	if (r->deadline_ns && (v->f->tries || v->f->refault) &&
	    (sys_now_ns() - v->f->first_ns > r->deadline_ns || uvm_interrupt_pending(v->f->tid)))
		flags |= UVM_FLAG_DEADLINE;
	if (v->f->kind == UVM_KIND_MINOR && r->cache)
		uvm_cache_adopt(r->cache, r->pgoff + v->index);
	v->orig_pte = uvm_walk(r, v->index, v->f->kind, &flags);
	if (v->f->kind == UVM_KIND_MISSING && flags & UVM_FLAG_CACHED) {
		/* Filled meanwhile, or lost from the memfd behind our back: then it is absent. */
		uvm_cache_disown(r->cache, r->pgoff + v->index);
		flags &= ~(unsigned)UVM_FLAG_CACHED;
		v->orig_pte = uvm_walk(r, v->index, v->f->kind, &flags);
	}
	if (v->orig_pte == UVM_PTE_BUSY)
		flags |= UVM_FLAG_PAGE_BUSY;
	return flags;
}

enum { MAX_RESTARTS = 1000 };

uint32_t uvm_handle_mm_fault(struct uvm_executor *x, struct uvm_fault *f)
{
	uint32_t result = RESTART;

	for (int restarts = 0; result == RESTART; restarts++) {
		struct vm_fault v = {.x = x, .f = f, .orig_pte = UVM_PTE_NONE};
		v.region = uvm_region_find(f->address);
		v.flags = v.region ? prologue(&v) : (unsigned)UVM_FLAG_NO_REGION;
		v.row = uvm_decide(f->kind, f->access, v.region ? v.region->backing : 0,
				   (int)v.orig_pte, v.flags);
		if (restarts == MAX_RESTARTS && v.region) { /* cannot be; never spin for ever */
			result = fail_page(&v, ENOTRECOVERABLE, UVM_VM_FAULT_SIGBUS);
		} else {
			action_fn act =
				actions[v.row->action] ? actions[v.row->action] : act_refuse;
			if (!v.region && v.row->action != UVM_ACTION_UNREGISTER_STRAY)
				act = act_wake;
			result = act(&v);
		}
		/* The epilogue; after it the region must not be used without being found again. */
		if (v.region && result != RESTART) {
			if (v.nr_pages || v.row->commit == UVM_COMMIT_WAKE ||
			    v.row->action == UVM_ACTION_JOIN || v.row->action == UVM_ACTION_POISON)
				uvm_count_row(v.region, v.row);
			bool again = result & UVM_VM_FAULT_RETRY;
			if (!again || f->service == UVM_SERVICE_INLINE)
				uvm_chain_note(f, (v.nr_pages && !v.found) || result & FAULT_ERROR);
			uvm_mm_account_fault(v.region, result, f->tries > 0);
			uvm_trace(v.region, f, v.index, v.orig_pte, v.flags, v.row, result, v.err,
				  v.nr_pages, v.settlement);
		}
		if (v.region)
			uvm_region_put(v.region);
	}
	return result;
}

/* ---- ahead of faults ----------------------------------------------------------------------------------------- */
static int fill_anonymous(struct uvm_executor *x, struct uvm_region *r, uint64_t index,
			  uint64_t *done)
{
	/* As a read of each page would: one commit a run of holes. */
	const struct uvm_row *row =
		uvm_decide(UVM_KIND_MISSING, 0, r->backing, UVM_PTE_NONE, r->flags);
	struct uvm_commit a = {r, uvm_service_uffd(r->service), row->commit, x->buf, index};
	struct uvm_commit_end end = {0};
	uint64_t addr = uvm_region_addr(r, index), n = 0;

	uvm_ptl_lock(addr);
	while (n < *done && atomic_load(&r->ptes[index + n]) == UVM_PTE_NONE)
		n++;
	if (n == 0) {
		uvm_ptl_unlock(addr);
		*done = 1; /* there already */
		return 0;
	}
	uint64_t got = uvm_commit(&a, index, n, &end);
	uvm_set_ptes(r, index, got, row->next_pte);
	if (got < n && end.settlement == UVM_SETTLEMENT_VERIFY) {
		int truth = uvm_kernel_truth(r, index + got);
		const struct uvm_settled *s = uvm_settle_truth(
			row->commit, truth < 0 ? UVM_TRUTH_PRESENT : truth, r->backing);
		if (s->row != 0xff && uvm_row(s->row)->next_pte != UVM_PTE_KEEP)
			uvm_set_pte(r, index + got, uvm_row(s->row)->next_pte);
		got++; /* a marker: the next touch decides on it */
	}
	uvm_ptl_unlock(addr);
	*done = got;
	return got ? 0 : -(end.err ? end.err : EAGAIN);
}

/* Cached pages of a tracked shared mapping are mapped too, so that a syscall finds them. */
static void map_cached(struct uvm_region *r, uint64_t index)
{
	struct uvm_commit a = {r, uvm_service_uffd(r->service), UVM_COMMIT_CONTINUE_WP, NULL, 0};
	struct uvm_commit_end end = {0};
	uint64_t addr = uvm_region_addr(r, index);
	if (!(r->register_mode & UFFDIO_REGISTER_MODE_MINOR))
		return;
	uvm_ptl_lock(addr);
	if (atomic_load(&r->ptes[index]) == UVM_PTE_NONE && uvm_commit(&a, index, 1, &end) == 1)
		uvm_set_pte(r, index, UVM_PTE_WRITE_PROTECTED);
	uvm_ptl_unlock(addr);
}

int64_t uvm_fill_range(struct uvm_executor *x, struct uvm_region **region, uint64_t index,
		       uint64_t nr_pages, bool wait, uint64_t *failed_index)
{
	uint64_t end_index = index + nr_pages, total = 0;
	uint64_t waited_from = 0;

	if ((*region)->backing == UVM_BACKING_ANON)
		memset(x->buf, 0, UVM_BUFFER_BYTES);
	while (index < end_index && *region) {
		struct uvm_region *r = *region;
		struct window w = {
			.index = index, .nr_pages = end_index - index, .demand = UVM_NO_INDEX};
		if (atomic_load(&r->state) != UVM_REGION_LIVE || atomic_load(&r->lost))
			break;
		window_clamp(r, index, &w);
		if (r->backing == UVM_BACKING_ANON) {
			uint64_t n = w.nr_pages;
			int rc = fill_anonymous(x, r, index, &n);
			if (rc < 0) {
				if (failed_index)
					*failed_index = index;
				return rc;
			}
			index += n;
			total += n;
			continue;
		}
		unsigned flags = 0;
		unsigned pte = uvm_walk(r, index, UVM_KIND_MISSING, &flags);
		if (flags & UVM_FLAG_CACHED)
			map_cached(r, index);
		if (pte == UVM_PTE_BUSY && wait) {
			uint64_t now = sys_now_ns();
			if (!waited_from)
				waited_from = now;
			if (r->deadline_ns && now - waited_from > r->deadline_ns) {
				if (failed_index)
					*failed_index = index;
				return -ETIMEDOUT;
			}
			if (take_over_dead(r, index))
				continue;
			usleep(100);
			continue;
		}
		waited_from = 0;
		if (pte == UVM_PTE_POISONED && wait) { /* this call is a new try: lift the poison */
			uvm_failure_lift(r, index);
			continue;
		}
		if (pte != UVM_PTE_NONE || flags & UVM_FLAG_CACHED) {
			index++;
			continue;
		}
		struct uvm_commit_end end = {0};
		bool ok;
		w.around = around_row(r);
		int64_t n = fill_window(x, NULL, region, &w, &end, &ok);
		if (n == -EBADF || !*region)
			return -EBADF;
		if (n < 0) {
			if (failed_index)
				*failed_index = index;
			return n;
		}
		if (n == 0 && end.settlement && w.demand == UVM_NO_INDEX && end.err) {
			if (failed_index)
				*failed_index = index;
			return -end.err;
		}
		index += n > 0 ? w.nr_pages : (wait ? 0 : 1);
		total += (uint64_t)n;
	}
	return *region ? (int64_t)total : -EBADF;
}

/* ---- executors --------------------------------------------------------------------------------------------------- */
void uvm_executor_init(struct uvm_executor *x, bool may_block, int service)
{
	uint64_t p;
	x->may_block = may_block;
	x->service = service;
	x->buf = NULL;
	if (sys_mmap(0, UVM_BUFFER_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		     0, &p) == 0)
		x->buf = (void *)(uintptr_t)p;
}

void uvm_executor_deinit(struct uvm_executor *x)
{
	if (x->buf)
		sys_munmap((uint64_t)(uintptr_t)x->buf, UVM_BUFFER_BYTES);
	x->buf = NULL;
}
