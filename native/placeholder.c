/* Placeholders: private pages of all-ones bytes in the place of poisoned ones, so that a C call can end.
 *
 * Facts -> what follows from them.
 * - mremap() over a page replaces it in one step for all threads: no thread sees a hole. With EVENT_REMAP a
 *   moved mapping stays registered, and the caller waits until the event is read: so a placeholder is
 *   taken away with no lock held that the fault thread could want. UFFDIO_POISON refuses a page that is
 *   there (EEXIST), so poison before cover also proves that no content is thrown away.
 * - A placeholder is PROT_NONE: who gets over it, and how, is in told.c. */
#include "failure.h"

int uvm_failure_nr_placeholders(void)
{
	return atomic_load(&uvm_nr_placeholders);
}

struct uvm_placeholder *uvm_ph_find(int64_t region, uint64_t index) /* locked */
{
	for (uint32_t i = 0; i < uvm_failures.nr_ph; i++) {
		struct uvm_placeholder *ph = &uvm_failures.ph[i];
		if (ph->state != UVM_PH_FREE && ph->region == region && index >= ph->index &&
		    index - ph->index < ph->nr_pages)
			return ph;
	}
	return NULL;
}

struct uvm_placeholder *uvm_ph_alloc(void) /* locked */
{
	for (uint32_t i = 0; i < UVM_MAX_PLACEHOLDERS; i++) {
		if (uvm_failures.ph[i].state != UVM_PH_FREE || uvm_failures.ph[i].nr_steps)
			continue;
		if (i >= uvm_failures.nr_ph)
			uvm_failures.nr_ph = i + 1;
		memset(&uvm_failures.ph[i], 0, sizeof uvm_failures.ph[i]);
		uvm_failures.ph[i].serial = ++uvm_failures.serial;
		return &uvm_failures.ph[i];
	}
	return NULL;
}

static void shadow_unmap(struct uvm_placeholder *ph) /* locked */
{
	if (ph->shadow)
		sys_munmap(ph->shadow - UVM_PAGE, ((uint64_t)ph->nr_pages + 2) << UVM_PAGE_SHIFT);
	ph->shadow = 0;
}

void uvm_ph_free(struct uvm_placeholder *ph) /* locked */
{
	if (ph->state == UVM_PH_FREE)
		return;
	ph->state = UVM_PH_FREE;
	if (!ph->nr_steps)
		shadow_unmap(ph);
	atomic_fetch_sub(&uvm_nr_placeholders, 1);
	while (uvm_failures.nr_ph && uvm_failures.ph[uvm_failures.nr_ph - 1].state == UVM_PH_FREE)
		uvm_failures.nr_ph--;
}

static bool is_shared(const struct uvm_region *r)
{
	return r->backing == UVM_BACKING_SHARED_FILE;
}

/* How many pages from index on, which is poisoned, can be poisoned and covered at once: `want` at most,
 * nothing that is there or being fetched, and within the 2 MiB of the page-table lock that is held.
 * Sleepers are not woken: they would read the placeholder. */
uint64_t uvm_ph_run_poison(struct uvm_region *r, uint64_t index, uint64_t want)
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
int uvm_ph_cover(struct uvm_region *r, uint64_t index, uint64_t nr_pages, uint64_t *shadow)
{
	uint64_t len = nr_pages << UVM_PAGE_SHIFT, all = len + 2 * UVM_PAGE, first, again = 0;
	int rc = sys_mmap(0, all, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE,
			  -1, 0, &first);
	if (rc < 0)
		return rc;
	memset((void *)(uintptr_t)first, 0xff, all);
	rc = sys_madvise(first, all, MADV_DONTFORK); /* as the region around it; see fork.c */
	if (rc == 0)
		rc = sys_mremap_copy(first + UVM_PAGE, len, &again);
	if (rc == 0)
		rc = sys_madvise(again, len, MADV_DONTFORK);
	if (rc == 0)
		rc = uvm_mprotect(again, len, PROT_NONE);
	if (rc == 0)
		rc = sys_mremap_over(again, len, uvm_region_addr(r, index));
	if (rc < 0) {
		if (again)
			sys_munmap(again, len);
		sys_munmap(first, all);
		return rc;
	}
	*shadow = first + UVM_PAGE;
	return 0;
}

void uvm_ph_step_done(struct uvm_placeholder *ph) /* locked */
{
	if (!--ph->nr_steps && ph->state == UVM_PH_FREE)
		shadow_unmap(ph);
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

/* Takes a placeholder (UVM_PH_REMOVING) away, with no lock held: the move waits until the service has read
 * an event. On failure it stays, nobody's, for the janitor to try again. */
void uvm_ph_remove(struct uvm_placeholder *ph)
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
	uvm_failures_lock();
	if (ph->state == UVM_PH_REMOVING) {
		if (rc == 0 || !r || lost) {
			uvm_ph_free(ph);
		} else {
			ph->state = UVM_PH_COVERED;
			ph->unknown = true;
			ph->t_ns = sys_now_ns();
			ph->serial =
				++uvm_failures
					  .serial; /* now the youngest: others are tried first */
		}
	}
	uvm_failures.nr_removing--;
	uvm_failures_unlock();
	if (r)
		uvm_region_put(r);
}

void uvm_ph_begin_remove(struct uvm_placeholder *ph) /* locked */
{
	ph->state = UVM_PH_REMOVING;
	ph->nr_owners = 0;
	ph->removal = ++uvm_failures.removals;
	uvm_failures.nr_removing++;
}

/* Removals that other threads have begun: until they end, a touch would read the placeholder. */
void uvm_ph_wait_removed(void)
{
	uint64_t begun = 0;
	bool busy = true;

	while (busy) {
		busy = false;
		uvm_failures_lock();
		begun = begun ? begun : uvm_failures.removals;
		for (uint32_t i = 0; i < uvm_failures.nr_ph; i++)
			busy |= uvm_failures.ph[i].state == UVM_PH_REMOVING &&
				uvm_failures.ph[i].removal <= begun;
		uvm_failures_unlock();
		if (busy)
			usleep(20);
	}
}

/* Removes, one at a time, every placeholder that `due` selects. */
static void ph_sweep(bool (*due)(const struct uvm_placeholder *ph, uint64_t arg), uint64_t arg)
{
	for (uint32_t i = 0;; i++) {
		uvm_failures_lock();
		while (i < uvm_failures.nr_ph && !(uvm_failures.ph[i].state == UVM_PH_COVERED &&
						   due(&uvm_failures.ph[i], arg)))
			i++;
		if (i >= uvm_failures.nr_ph) {
			uvm_failures_unlock();
			return;
		}
		uvm_ph_begin_remove(&uvm_failures.ph[i]);
		uvm_failures_unlock();
		uvm_ph_remove(&uvm_failures.ph[i]);
	}
}

static bool due_unowned(const struct uvm_placeholder *ph, uint64_t arg)
{
	(void)arg;
	return ph->nr_owners == 0 && !ph->unknown;
}

static bool due_now(const struct uvm_placeholder *ph, uint64_t now)
{
	return ph->wanted || (ph->unknown && now - ph->t_ns >= UVM_PLACEHOLDER_TTL_NS);
}

static bool due_all(const struct uvm_placeholder *ph, uint64_t arg)
{
	(void)ph, (void)arg;
	return true;
}

void uvm_ph_sweep_unowned(void)
{
	ph_sweep(due_unowned, 0);
}

void uvm_ph_sweep_due(bool all, uint64_t now)
{
	ph_sweep(all ? due_all : due_now, now);
}

/* The one thread of the child is not in a fault: nobody needs a placeholder, or waits on poison. Called
 * before the regions are registered again, whole: so a page of the right kind in its place is enough.
 * Shared regions are mapped again by then, and the page table of a "python" region is still the parent's:
 * a page that says POISONED and is not gets poison by the next fault, and the next try. */
void uvm_ph_child_page(int64_t region, uint64_t index, uint64_t nr_pages)
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
