/* The region table (the kernel's VMA tree), the page-table bytes, and what a user asks of a region
 * outside a fault.
 *
 * Look-ups come from fault threads and from a SIGBUS handler, so they take no lock: a sequence count
 * guards the sorted span array, and slots are type-stable, so that a look-up that lost a race reads a
 * slot that is valid memory and sees by state and range that it lost. */
#include "failure.h"

#include <stdlib.h>

enum { PAGEMAP_ENTRIES = 512 }; /* read at a time */

struct span {
	_Atomic uint64_t start, end;
	_Atomic uint32_t slot;
};

struct uvm_space uvm_space = {.mutex = PTHREAD_MUTEX_INITIALIZER, .pagemap_fd = -1};

static struct uvm_region *slots;
static struct span *spans;
static _Atomic uint32_t nr_spans;
static _Atomic uint32_t spans_seq; /* odd while the array changes */
static uint32_t nr_slots;          /* high-water mark */
static pthread_mutex_t spans_lock =
	PTHREAD_MUTEX_INITIALIZER; /* writers, and whoever walks the list */
static pthread_mutex_t ptls[UVM_PTL_SHARDS];

#define MADV_OR_IGNORE(addr, len, advice) ((void)sys_madvise(addr, len, advice))

static int table_init(void) /* space.mutex held */
{
	uint64_t p;
	int rc;

	if (slots)
		return 0;
	rc = sys_mmap(0, UVM_MAX_REGIONS * sizeof *spans, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0, &p);
	if (rc < 0)
		return rc;
	spans = (void *)(uintptr_t)p;
	rc = sys_mmap(0, UVM_MAX_REGIONS * sizeof *slots, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0, &p);
	if (rc < 0)
		return rc;
	for (int i = 0; i < UVM_PTL_SHARDS; i++)
		pthread_mutex_init(&ptls[i], NULL);
	slots = (void *)(uintptr_t)p;
	return uvm_fork_handlers_install();
}

/* ---- look-up --------------------------------------------------------------------------------------- */
struct uvm_region *uvm_region_find(uint64_t address)
{
	for (;;) {
		uint32_t seq = atomic_load_explicit(&spans_seq, memory_order_acquire);
		if (seq & 1) {
			sched_yield();
			continue;
		}
		uint32_t lo = 0, hi = atomic_load_explicit(&nr_spans, memory_order_relaxed);
		while (lo < hi) { /* the first span that ends behind address */
			uint32_t mid = lo + (hi - lo) / 2;
			if (atomic_load_explicit(&spans[mid].end, memory_order_relaxed) <= address)
				lo = mid + 1;
			else
				hi = mid;
		}
		bool hit = lo < atomic_load_explicit(&nr_spans, memory_order_relaxed) &&
			   atomic_load_explicit(&spans[lo].start, memory_order_relaxed) <= address;
		uint32_t slot =
			hit ? atomic_load_explicit(&spans[lo].slot, memory_order_relaxed) : 0;
		atomic_thread_fence(memory_order_acquire);
		if (atomic_load_explicit(&spans_seq, memory_order_relaxed) != seq)
			continue;
		if (!hit)
			return NULL;
		struct uvm_region *r = &slots[slot];
		atomic_fetch_add(&r->in_flight, 1);
		/* Taken: from here on close waits for us. Was it closed before? */
		if (atomic_load(&spans_seq) == seq && atomic_load(&r->state) != UVM_REGION_FREE)
			return r;
		uvm_region_put(r);
	}
}

struct uvm_region *uvm_region_by_handle(int64_t handle)
{
	uint32_t slot = (uint32_t)((uint64_t)handle & 0xffffffffu) - 1;
	if (handle <= 0 || !slots || slot >= UVM_MAX_REGIONS)
		return NULL;
	struct uvm_region *r = &slots[slot];
	atomic_fetch_add(&r->in_flight, 1);
	if (atomic_load(&r->generation) == (uint32_t)((uint64_t)handle >> 32) &&
	    atomic_load(&r->state) != UVM_REGION_FREE)
		return r;
	uvm_region_put(r);
	return NULL;
}

void uvm_region_put(struct uvm_region *r)
{
	atomic_fetch_sub(&r->in_flight, 1);
}

void uvm_spans_lock(void)
{
	pthread_mutex_lock(&spans_lock);
}
void uvm_spans_unlock(void)
{
	pthread_mutex_unlock(&spans_lock);
}

void uvm_for_each_region(void (*fn)(struct uvm_region *r, void *arg), void *arg)
{
	uvm_spans_lock();
	uvm_for_each_region_locked(fn, arg);
	uvm_spans_unlock();
}

void uvm_for_each_region_locked(void (*fn)(struct uvm_region *r, void *arg), void *arg)
{
	uint32_t n = atomic_load(&nr_spans);
	for (uint32_t i = 0; i < n; i++)
		fn(&slots[atomic_load(&spans[i].slot)], arg);
}

/* ---- page-table locks and bytes ---------------------------------------------------------------------- */
static pthread_mutex_t *ptl_of(uint64_t address)
{
	uint64_t pmd = address >> 21;
	return &ptls[(pmd ^ pmd >> 6) % UVM_PTL_SHARDS];
}
void uvm_ptl_lock(uint64_t address)
{
	pthread_mutex_lock(ptl_of(address));
}
void uvm_ptl_unlock(uint64_t address)
{
	pthread_mutex_unlock(ptl_of(address));
}
void uvm_ptl_lock_all(void)
{
	for (int i = 0; i < UVM_PTL_SHARDS; i++)
		pthread_mutex_lock(&ptls[i]);
}
void uvm_ptl_unlock_all(void)
{
	for (int i = UVM_PTL_SHARDS - 1; i >= 0; i--)
		pthread_mutex_unlock(&ptls[i]);
}

static bool pte_present(unsigned pte)
{
	return pte == UVM_PTE_PRESENT || pte == UVM_PTE_WRITE_PROTECTED || pte == UVM_PTE_ZERO ||
	       pte == UVM_PTE_ZERO_WP;
}

void uvm_set_pte(struct uvm_region *r, uint64_t index, unsigned to)
{
	uvm_set_ptes(r, index, 1, to);
}

void uvm_set_ptes(struct uvm_region *r, uint64_t index, uint64_t nr_pages, unsigned to)
{
	int64_t delta = 0;
	for (uint64_t i = index; i < index + nr_pages; i++) {
		unsigned from = atomic_load_explicit(&r->ptes[i], memory_order_relaxed);
		/* The kernel's marker stands until the poison is lifted, whatever else came of the page: a
		 * fill through the alias, say, of a page that a told thread did not wait for. */
		if (from == to || (from == UVM_PTE_POISONED && to != UVM_PTE_NONE))
			continue;
		delta += (int)pte_present(to) - (int)pte_present(from);
		if (r->touched)
			atomic_store_explicit(&r->touched[i / UVM_PAGE], 1, memory_order_relaxed);
		atomic_store_explicit(&r->ptes[i], (uint8_t)to, memory_order_release);
	}
	if (delta)
		__atomic_fetch_add(&r->ctl->nr_present, (uint64_t)delta, __ATOMIC_RELAXED);
}

/* From index on, the next of the bytes at `offset` of the region's memfd that may ever have been written. */
static uint64_t next_data(const struct uvm_region *r, size_t offset, uint64_t index)
{
	off_t at = lseek(r->ctl_fd, (off_t)(offset + index), SEEK_DATA);
	if (at < 0)
		return r->nr_pages;
	if ((uint64_t)at - offset > index)
		index = (uint64_t)at - offset;
	return index < r->nr_pages ? index : r->nr_pages;
}

uint64_t uvm_next_touched(struct uvm_region *r, uint64_t index)
{
	if (r->touched) {
		while (index < r->nr_pages &&
		       !atomic_load_explicit(&r->touched[index / UVM_PAGE], memory_order_relaxed))
			index = (index / UVM_PAGE + 1) * UVM_PAGE;
	} else {
		return next_data(r, UVM_REGION_CTL_BYTES, index);
	}
	return index < r->nr_pages ? index : r->nr_pages;
}

static int pagemap_fd(void)
{
	int fd = __atomic_load_n(&uvm_space.pagemap_fd, __ATOMIC_ACQUIRE);
	if (fd < 0) {
		fd = sys_pagemap_open();
		if (fd < 0)
			return fd;
		int expected = -1;
		if (!__atomic_compare_exchange_n(&uvm_space.pagemap_fd, &expected, fd, false,
						 __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
			close(fd);
			fd = expected;
		}
	}
	return fd;
}

int uvm_pagemap_open(void)
{
	int rc = pagemap_fd();
	return rc == -EMFILE || rc == -ENFILE ? rc : 0;
}

static void pagemap_close_after_last(void) /* space.mutex held */
{
	if (!uvm_space.nr_regions && uvm_space.pagemap_fd >= 0) {
		close(uvm_space.pagemap_fd);
		uvm_space.pagemap_fd = -1;
	}
}

static int pagemap_read(struct uvm_region *r, uint64_t index, uint64_t *entries, uint64_t nr_pages)
{
	int fd = pagemap_fd();
	return fd < 0 ? fd : sys_pagemap_read(fd, uvm_region_addr(r, index), entries, nr_pages);
}

/* From index on, the next pages that may be private ones: by PAGEMAP_SCAN, or all where that is not to be had
 * (before Linux 6.7). A table of a terabyte would take a second to read. */
static uint64_t next_private(struct uvm_region *r, uint64_t index, uint64_t *end)
{
	struct uvm_pm_region run;
	struct uvm_pm_scan_arg arg = {
		.size = sizeof arg,
		.start = uvm_region_addr(r, index),
		.end = r->start + r->len,
		.vec = (uint64_t)(uintptr_t)&run,
		.vec_len = 1,
		.category_inverted = UVM_PAGE_IS_FILE,
		.category_mask = UVM_PAGE_IS_FILE,
		.category_anyof_mask = UVM_PAGE_IS_PRESENT | UVM_PAGE_IS_SWAPPED,
		.return_mask = UVM_PAGE_IS_FILE,
	};
	int fd = pagemap_fd();
	int64_t nr = fd < 0 ? fd : sys_pagemap_scan(fd, &arg);

	*end = nr > 0 ? (run.end - r->start) >> UVM_PAGE_SHIFT : r->nr_pages;
	return nr > 0 ? (run.start - r->start) >> UVM_PAGE_SHIFT : nr < 0 ? index : r->nr_pages;
}

int uvm_kernel_truth(struct uvm_region *r, uint64_t index)
{
	uint64_t entry;
	unsigned shadow = atomic_load(&r->ptes[index]);
	int rc = pagemap_read(r, index, &entry, 1);
	if (rc < 0)
		return rc;
	bool swapped = entry & UVM_PM_SWAP, wp = entry & UVM_PM_UFFD_WP;
	if (entry & UVM_PM_PRESENT)
		return wp ? UVM_TRUTH_PRESENT_WP : UVM_TRUTH_PRESENT;
	if (!swapped)
		return wp ? UVM_TRUTH_MARKER : UVM_TRUTH_ABSENT;
	/* Real swap and markers (write-protected hole, poison, guard) look alike here: our own entry tells
	 * them apart. */
	if (shadow == UVM_PTE_POISONED)
		return UVM_TRUTH_POISONED;
	if (shadow == UVM_PTE_GUARD)
		return UVM_TRUTH_GUARDED;
	if (wp) /* a shared page that is swapped out leaves no entry but the marker */
		return pte_present(shadow) && r->backing != UVM_BACKING_SHARED_FILE
			       ? UVM_TRUTH_PRESENT_WP
			       : UVM_TRUTH_MARKER;
	return UVM_TRUTH_PRESENT;
}

/* ---- life ------------------------------------------------------------------------------------------- */
/* Behind the entries in the table of a region that another process serves: a byte a page, where that process
 * armed what had been written and nobody took note yet (uvm_region_written()). */
static size_t written_offset(const struct uvm_region *r)
{
	return UVM_REGION_CTL_BYTES + ((r->nr_pages + UVM_PAGE - 1) & ~(size_t)(UVM_PAGE - 1));
}

static _Atomic uint8_t *written_bytes(const struct uvm_region *r)
{
	return (_Atomic uint8_t *)r->ctl + written_offset(r);
}

static int ctl_map(struct uvm_region *r)
{
	uint64_t p;
	int rc, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, fd = -1;

	uint64_t touched = r->nr_pages / UVM_PAGE + 1;
	r->ctl_bytes = (UVM_REGION_CTL_BYTES + r->nr_pages + touched + UVM_PAGE - 1) &
		       ~(size_t)(UVM_PAGE - 1);
	if (r->service == UVM_SERVICE_PYTHON) { /* two processes read and write it */
		r->ctl_bytes = written_offset(r) + written_offset(r) - UVM_REGION_CTL_BYTES;
		fd = sys_memfd_create("uffd_vm-region");
		if (fd < 0)
			return fd;
		if (ftruncate(fd, (off_t)r->ctl_bytes) < 0) {
			rc = -errno;
			close(fd);
			return rc;
		}
		flags = MAP_SHARED;
	}
	rc = sys_mmap(0, r->ctl_bytes, PROT_READ | PROT_WRITE, flags, fd, 0, &p);
	if (rc < 0) {
		if (fd >= 0)
			close(fd);
		return rc;
	}
	r->ctl_fd = fd;
	r->ctl = (void *)(uintptr_t)p;
	r->ptes = (void *)(uintptr_t)(p + UVM_REGION_CTL_BYTES);
	r->touched = fd < 0 ? r->ptes + r->nr_pages : NULL;
	return 0;
}

static uint64_t next_written(const struct uvm_region *r, uint64_t index)
{
	return r->ctl_fd < 0 ? r->nr_pages : next_data(r, written_offset(r), index);
}

static void ctl_unmap(struct uvm_region *r)
{
	sys_munmap((uint64_t)(uintptr_t)r->ctl, r->ctl_bytes);
	if (r->ctl_fd >= 0)
		close(r->ctl_fd);
	r->ctl = NULL;
	r->ptes = NULL;
	r->touched = NULL;
	r->ctl_fd = -1;
}

static uint64_t register_mode(const struct uvm_region *r)
{
	bool wp = r->flags & UVM_FLAG_TRACKED;
	/* "r+": a page that another mapping filled must not map itself writable behind our back: MINOR. */
	if (r->backing == UVM_BACKING_SHARED_FILE && r->writable)
		return UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP |
		       UFFDIO_REGISTER_MODE_MINOR;
	return UFFDIO_REGISTER_MODE_MISSING | (wp ? UFFDIO_REGISTER_MODE_WP : 0);
}

/* The place of the first span that starts at or behind address; space.mutex held. */
static uint32_t span_place(uint64_t address)
{
	uint32_t i = 0, n = atomic_load(&nr_spans);
	while (i < n && atomic_load(&spans[i].start) < address)
		i++;
	return i;
}

static void span_copy(uint32_t to, uint32_t from)
{
	atomic_store_explicit(&spans[to].start, atomic_load(&spans[from].start),
			      memory_order_relaxed);
	atomic_store_explicit(&spans[to].end, atomic_load(&spans[from].end), memory_order_relaxed);
	atomic_store_explicit(&spans[to].slot, atomic_load(&spans[from].slot),
			      memory_order_relaxed);
}

static void span_insert(struct uvm_region *r)
{
	uvm_spans_lock();
	uint32_t at = span_place(r->start), n = atomic_load(&nr_spans);
	atomic_fetch_add(&spans_seq, 1);
	for (uint32_t i = n; i > at; i--)
		span_copy(i, i - 1);
	atomic_store(&spans[at].start, r->start);
	atomic_store(&spans[at].end, r->start + r->len);
	atomic_store(&spans[at].slot, r->slot);
	atomic_store(&nr_spans, n + 1);
	atomic_fetch_add(&spans_seq, 1);
	uvm_spans_unlock();
}

static void span_remove(struct uvm_region *r)
{
	uvm_spans_lock();
	uint32_t at = span_place(r->start), n = atomic_load(&nr_spans);
	atomic_fetch_add(&spans_seq, 1);
	for (uint32_t i = at; i + 1 < n; i++)
		span_copy(i, i + 1);
	atomic_store(&nr_spans, n - 1);
	atomic_fetch_add(&spans_seq, 1);
	uvm_spans_unlock();
}

static bool span_overlaps(uint64_t start, uint64_t len)
{
	uint32_t at = span_place(start + len);
	return at > 0 && atomic_load(&spans[at - 1].end) > start;
}

static struct uvm_region *slot_take(void)
{
	for (uint32_t i = 0; i < nr_slots; i++)
		if (atomic_load(&slots[i].state) == UVM_REGION_FREE &&
		    atomic_load(&slots[i].in_flight) == 0)
			return &slots[i];
	if (nr_slots == UVM_MAX_REGIONS)
		return NULL;
	slots[nr_slots].slot = nr_slots;
	atomic_store(&slots[nr_slots].generation, 1);
	return &slots[nr_slots++];
}

static int args_check(const struct uvm_region_args *a)
{
	if (!a->len || (a->start | a->len) & (UVM_PAGE - 1))
		return -EINVAL;
	if (a->service < UVM_SERVICE_NATIVE || a->service > UVM_SERVICE_INLINE)
		return -EINVAL;
	if (a->backing != UVM_BACKING_ANON && a->backing != UVM_BACKING_PRIVATE_FILE &&
	    a->backing != UVM_BACKING_SHARED_FILE)
		return -EOPNOTSUPP; /* decided, not yet executable */
	if ((a->backing == UVM_BACKING_ANON) != (a->cache < 0))
		return -EINVAL;
	if ((a->flags & UVM_FLAG_HOOK) && a->service != UVM_SERVICE_PYTHON)
		return -EOPNOTSUPP; /* a hook written in Python cannot run beside a held GIL */
	if (a->flags & ~(UVM_FLAG_TRACKED | UVM_FLAG_HOOK))
		return -EOPNOTSUPP;
	if (!a->fault_around_pages || a->fault_around_pages & (a->fault_around_pages - 1))
		return -EINVAL;
	return 0;
}

/* A span of a region that is being closed may still cover the address that the kernel has just given
 * out again: its owner is about to say close_end. */
static int wait_no_overlap(uint64_t start, uint64_t len)
{
	for (int i = 0; span_overlaps(start, len); i++) {
		if (i == 2000)
			return -EEXIST;
		pthread_mutex_unlock(&uvm_space.mutex);
		usleep(500);
		pthread_mutex_lock(&uvm_space.mutex);
	}
	return 0;
}

static int region_create_locked(const struct uvm_region_args *a, struct uvm_region **ret)
{
	struct uvm_cache *c = NULL;
	int rc = table_init();
	if (rc < 0)
		return rc;
	if (a->cache >= 0) {
		c = uvm_cache_get(a->cache);
		if (!c || a->pgoff + (a->len >> UVM_PAGE_SHIFT) > c->nr_pages)
			return -EINVAL;
		if (c->child_rc < 0) /* a forked child that has no slot in it */
			return c->child_rc;
	}
	rc = wait_no_overlap(a->start, a->len);
	if (rc < 0)
		return rc;
	struct uvm_region *r = slot_take();
	if (!r)
		return -ENOSPC;
	r->start = a->start;
	r->len = a->len;
	r->nr_pages = a->len >> UVM_PAGE_SHIFT;
	r->pgoff = a->pgoff;
	r->backing = a->backing;
	r->service = a->service;
	r->writable = a->writable;
	r->prot = PROT_READ | (a->writable ? PROT_WRITE : 0);
	r->on_error = a->on_error;
	r->flags = (unsigned)a->flags;
	if (r->backing == UVM_BACKING_SHARED_FILE && r->writable)
		r->flags |=
			UVM_FLAG_TRACKED; /* dirty pages are found by write-protection, always */
	r->register_mode = register_mode(r);
	r->fault_around_pages =
		a->fault_around_pages > UVM_PMD_PAGES ? UVM_PMD_PAGES : a->fault_around_pages;
	r->readahead_pages =
		a->readahead_pages > UVM_PMD_PAGES ? UVM_PMD_PAGES : a->readahead_pages;
	r->deadline_ns = a->deadline_ns;
	atomic_store(&r->ra_prev, UVM_NO_INDEX);
	atomic_store(&r->ra_start, UVM_NO_INDEX);
	atomic_store(&r->ra_end, 0);
	atomic_store(&r->ra_block, r->fault_around_pages);
	memset(&r->sticky, 0, sizeof r->sticky);
	r->cache = c;
	r->shared = c ? c->shared : NULL;
	atomic_store(&r->lost, 0);

	rc = ctl_map(r);
	if (rc < 0)
		return rc;
	rc = uvm_pagemap_open();
	if (rc < 0)
		goto unmap;
	rc = uvm_service_start(r->service);
	if (rc < 0)
		goto unmap;
	if (r->backing == UVM_BACKING_PRIVATE_FILE && uvm_region_in_cache(r) &&
	    r->service != UVM_SERVICE_PYTHON) {
		rc = uvm_cache_alias(c, r->service);
		if (rc < 0)
			goto stop;
	}
	/* Before the first touch and before registration: a huge page would hide holes from us, and
	 * khugepaged would fill them with zeros. A fork that runs no handlers must find no copy: it would
	 * read zeros, and in a private mapping of a memfd put pages of zeros there for everybody. fork.c
	 * lifts that for private memory while an ordinary fork() copies it. */
	MADV_OR_IGNORE(r->start, r->len, MADV_NOHUGEPAGE);
	rc = sys_madvise(r->start, r->len, MADV_DONTFORK);
	if (rc < 0)
		goto stop;
	rc = sys_uffd_register(uvm_service_uffd(r->service), r->start, r->len, r->register_mode,
			       NULL);
	if (rc < 0)
		goto stop;
	if (c)
		uvm_cache_ref(c);
	atomic_store(&r->state, UVM_REGION_LIVE);
	span_insert(r);
	uvm_space.nr_regions++;
	*ret = r;
	if (!uvm_service_check(r->service)) /* lost before it stood in the list */
		uvm_region_lose(r);
	return 0;
stop:
	uvm_service_stop(r->service);
unmap:
	pagemap_close_after_last();
	ctl_unmap(r);
	return rc;
}

int64_t uvm_region_create(const struct uvm_region_args *args)
{
	struct uvm_region *r;
	int rc = args_check(args);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&uvm_space.mutex);
	rc = region_create_locked(args, &r);
	int64_t handle = rc < 0 ? rc : uvm_region_handle(r);
	pthread_mutex_unlock(&uvm_space.mutex);
	return handle;
}

/* A forked child is to find it so, too. */
static void make_inaccessible(const struct uvm_region *r)
{
	(void)sys_mprotect(r->start, r->len, PROT_NONE);
	(void)sys_madvise(r->start, r->len, MADV_DOFORK);
}

void uvm_region_lose(struct uvm_region *r)
{
	int not_yet = 0;
	if (!atomic_compare_exchange_strong(&r->lost, &not_yet, UVM_LOST_TO_CLOSE))
		return;
	r->ctl_fd = -1;
	if (atomic_load(&r->state) == UVM_REGION_LIVE)
		make_inaccessible(r);
	if (!uvm_sigbus_in_force()) /* else who touches it is told */
		uvm_region_say_lost(r);
}

int uvm_region_close_begin(int64_t handle)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	int expected = UVM_REGION_LIVE;
	if (!r)
		return -ESTALE;
	if (!atomic_compare_exchange_strong(&r->state, &expected, UVM_REGION_CLOSING)) {
		uvm_region_put(r);
		return -EBUSY; /* somebody else is closing it */
	}
	uvm_queue_drop(handle);
	/* Executors hold a region for an ioctl or two, never across a wait for a file (they let go of
	 * it first), save load() and the inline service in threads of the caller's own. */
	while (atomic_load(&r->in_flight) > 1)
		usleep(50);
	uvm_region_put(r);
	return 0;
}

int uvm_region_close_abort(int64_t handle)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	int expected = UVM_REGION_CLOSING;
	bool was = atomic_compare_exchange_strong(&r->state, &expected, UVM_REGION_LIVE);
	if (was && atomic_load(&r->lost) == UVM_LOST_TO_CLOSE)
		make_inaccessible(r); /* which was put off, since it might have been unmapped */
	uvm_region_put(r);
	return was ? 0 : -EINVAL;
}

int uvm_region_close_end(int64_t handle)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	if (atomic_load(&r->state) != UVM_REGION_CLOSING) {
		uvm_region_put(r);
		return -EINVAL;
	}
	pthread_mutex_lock(&uvm_space.mutex);
	uvm_failure_forget(r);
	span_remove(r);
	atomic_store(&r->state, UVM_REGION_FREE);
	atomic_fetch_add(&r->generation, 1);
	uvm_region_put(r);
	while (atomic_load(&r->in_flight) > 0) /* look-ups that lost the race */
		usleep(20);
	struct uvm_cache *c = r->cache;
	int service = r->service;
	ctl_unmap(r);
	r->cache = NULL;
	uvm_space.nr_regions--;
	if (c)
		uvm_cache_unref(c);
	uvm_service_stop(service);
	pagemap_close_after_last();
	pthread_mutex_unlock(&uvm_space.mutex);
	return 0;
}

/* ---- after fork -------------------------------------------------------------------------------------- */
/* A python-served region's tables are shared with the parent's service: the child gets its own copy,
 * of what was ever written. */
static int ctl_child_copy(struct uvm_region *r)
{
	struct uvm_region old = {.ctl = r->ctl,
				 .ptes = r->ptes,
				 .ctl_bytes = r->ctl_bytes,
				 .ctl_fd = r->ctl_fd,
				 .nr_pages = r->nr_pages};
	int rc = ctl_map(r);
	if (rc < 0)
		return rc;
	memcpy(r->ctl, old.ctl, sizeof *r->ctl);
	r->ctl->nr_present = 0;
	for (uint64_t i = uvm_next_touched(&old, 0); i < r->nr_pages;
	     i = uvm_next_touched(&old, i + 1)) {
		unsigned pte = atomic_load(&old.ptes[i]);
		/* Also where nothing is yet: a page may have come that is not published (believe_pagemap()). */
		atomic_store_explicit(&r->touched[i / UVM_PAGE], 1, memory_order_relaxed);
		if (pte != UVM_PTE_NONE && pte != UVM_PTE_BUSY)
			uvm_set_pte(r, i, pte);
	}
	/* Written, armed, and not told yet: here it is as if it had not been armed. */
	for (uint64_t i = next_written(&old, 0); i < r->nr_pages; i = next_written(&old, i + 1))
		if (atomic_load(&written_bytes(&old)[i]) && pte_present(atomic_load(&r->ptes[i])))
			uvm_set_pte(r, i, UVM_PTE_PRESENT);
	ctl_unmap(&old);
	return 0;
}

/* The parent's service went on changing its table while fork() copied the memory: where a private region's
 * copy of the two differs, the memory is right. What the table does not know counts as written. */
static int believe_pagemap(struct uvm_region *r)
{
	uint64_t entries[PAGEMAP_ENTRIES];
	int rc = 0;
	for (uint64_t at = uvm_next_touched(r, 0); at < r->nr_pages && rc == 0;
	     at = uvm_next_touched(r, at + PAGEMAP_ENTRIES)) {
		uint64_t left = r->nr_pages - at;
		uint64_t n = left < PAGEMAP_ENTRIES ? left : PAGEMAP_ENTRIES;
		rc = pagemap_read(r, at, entries, n);
		for (uint64_t i = 0; i < n && rc == 0; i++) {
			unsigned pte = atomic_load(&r->ptes[at + i]);
			bool here = entries[i] & (UVM_PM_PRESENT | UVM_PM_SWAP);
			if (pte_present(pte) && !here)
				uvm_set_pte(r, at + i, UVM_PTE_NONE);
			else if (here && (pte == UVM_PTE_NONE || pte == UVM_PTE_BUSY))
				uvm_set_pte(r, at + i, UVM_PTE_PRESENT);
		}
	}
	return rc;
}

/* Write protection does not survive fork without an event: arm it again, run by run. */
static int rearm(struct uvm_region *r)
{
	for (uint64_t i = uvm_next_touched(r, 0); i < r->nr_pages;) {
		unsigned pte = atomic_load(&r->ptes[i]);
		uint64_t run = i + 1;
		if (pte == UVM_PTE_WRITE_PROTECTED || pte == UVM_PTE_ZERO_WP) {
			while (run < r->nr_pages && atomic_load(&r->ptes[run]) == pte)
				run++;
			int rc = sys_uffd_writeprotect(
				uvm_service_uffd(r->service), uvm_region_addr(r, i),
				(run - i) << UVM_PAGE_SHIFT, UFFDIO_WRITEPROTECT_MODE_WP);
			if (rc < 0)
				return rc;
		} else if (pte == UVM_PTE_BUSY) {
			uvm_set_pte(r, i, UVM_PTE_NONE); /* its filler is a thread of the parent */
		}
		i = uvm_next_touched(r, run);
	}
	return 0;
}

void uvm_region_child_map(struct uvm_region *r)
{
	uint64_t p;
	bool shared = r->backing == UVM_BACKING_SHARED_FILE;
	if (r->lost)
		return; /* a child's child: what is there was inherited */
	if (shared && r->writable && r->service == UVM_SERVICE_PYTHON)
		r->lost = UVM_LOST_TO_SERVICE;
	/* MADV_DONTFORK left a gap here; nothing is mapped in this address space yet. */
	if (!shared)
		r->child_rc = 0;
	else if (!uvm_cache_data_ours(r->cache))
		r->child_rc = -EBADF;
	else if (r->service == UVM_SERVICE_PYTHON) /* a place for a cache of the child's own */
		r->child_rc =
			sys_mmap(r->start, r->len, PROT_NONE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE,
				 -1, 0, &p);
	else
		r->child_rc =
			sys_mmap(r->start, r->len, r->prot, MAP_SHARED | MAP_FIXED_NOREPLACE,
				 r->cache->data_fd, (int64_t)(r->pgoff << UVM_PAGE_SHIFT), &p);
}

/* The parent's Python service has no say here. */
int uvm_region_child_to_native(struct uvm_region *r)
{
	int rc = uvm_service_child_move(UVM_SERVICE_PYTHON, UVM_SERVICE_NATIVE);
	r->service = UVM_SERVICE_NATIVE;
	return rc < 0 ? rc : ctl_child_copy(r);
}

/* Copies the private pages of r to the same places of a mapping at temp. Others are not there, or the parent's
 * cache's, which the child does not use. */
static int copy_private_pages(struct uvm_region *r, uint64_t temp)
{
	uint64_t entries[PAGEMAP_ENTRIES];
	uint64_t at = 0, end = 0, n;
	int rc = 0;
	for (; at < r->nr_pages && rc == 0; at += n) {
		if (at == end && (at = next_private(r, at, &end)) == r->nr_pages)
			break;
		n = end - at < PAGEMAP_ENTRIES ? end - at : PAGEMAP_ENTRIES;
		rc = pagemap_read(r, at, entries, n);
		for (uint64_t i = 0; i < n && rc == 0; i++) {
			if (!(entries[i] & (UVM_PM_PRESENT | UVM_PM_SWAP)) ||
			    entries[i] & UVM_PM_FILE)
				continue;
			/* Looks like a page that is swapped out. */
			if (atomic_load(&r->ptes[at + i]) == UVM_PTE_POISONED)
				continue;
			uint64_t offset = (at + i) << UVM_PAGE_SHIFT;
			struct uvm_done copied =
				sys_uffd_copy(uvm_service_uffd(r->service), temp + offset,
					      r->start + offset, UVM_PAGE, 0);
			rc = -copied.err;
			if (rc == 0)
				uvm_set_pte(r, at + i, UVM_PTE_PRESENT);
		}
	}
	return rc;
}

/* In place of the parent's cache its own: mapped elsewhere first, filled with the private pages (by COPY, since
 * a store into a hole would put a page of zeros into the cache), and moved over what was inherited. The uffd
 * lets go of it before: it would have somebody wait for its event, whom there is not yet. */
static int map_own_cache_private(struct uvm_region *r)
{
	uint64_t temp;
	int uffd = uvm_service_uffd(r->service);
	int rc = sys_mmap(0, r->len, r->prot, MAP_PRIVATE | MAP_NORESERVE, r->cache->data_fd,
			  (int64_t)(r->pgoff << UVM_PAGE_SHIFT), &temp);
	if (rc < 0)
		return rc;
	MADV_OR_IGNORE(temp, r->len, MADV_NOHUGEPAGE);
	rc = sys_uffd_register(uffd, temp, r->len, UFFDIO_REGISTER_MODE_MISSING, NULL);
	if (rc == 0)
		rc = copy_private_pages(r, temp);
	if (rc == 0)
		rc = sys_uffd_unregister(uffd, temp, r->len);
	if (rc == 0)
		rc = sys_mremap_over(temp, r->len, r->start);
	if (rc < 0)
		sys_munmap(temp, r->len);
	return rc;
}

static int map_own_cache(struct uvm_region *r)
{
	uint64_t p;
	for (uint64_t i = uvm_next_touched(r, 0); i < r->nr_pages; i = uvm_next_touched(r, i + 1))
		if (atomic_load(&r->ptes[i]) != UVM_PTE_POISONED)
			uvm_set_pte(r, i, UVM_PTE_NONE);
	if (r->backing == UVM_BACKING_SHARED_FILE)
		return sys_mmap(r->start, r->len, r->prot, MAP_SHARED | MAP_FIXED,
				r->cache->data_fd, (int64_t)(r->pgoff << UVM_PAGE_SHIFT), &p);
	int rc = map_own_cache_private(r);
	for (uint64_t i = uvm_next_touched(r, 0); i < r->nr_pages; i = uvm_next_touched(r, i + 1))
		if (atomic_load(&r->ptes[i]) == UVM_PTE_POISONED)
			uvm_set_pte(r, i, UVM_PTE_NONE); /* not in the new mapping */
	return rc < 0 ? rc : uvm_cache_alias(r->cache, r->service);
}

int uvm_region_child(struct uvm_region *r)
{
	int rc = r->child_rc;
	bool shared = r->backing == UVM_BACKING_SHARED_FILE;
	bool served_by_python = r->service == UVM_SERVICE_PYTHON;
	bool own = served_by_python && uvm_region_in_cache(r); /* its service's was the parent's */

	if (rc < 0)
		return rc;
	if (served_by_python)
		rc = uvm_region_child_to_native(r);
	if (rc == 0 && own)
		rc = map_own_cache(r);
	else if (rc == 0 && served_by_python && !shared)
		rc = believe_pagemap(r);
	if (rc < 0)
		return rc;
	if (shared) {
		MADV_OR_IGNORE(r->start, r->len, MADV_NOHUGEPAGE);
		for (uint64_t i = uvm_next_touched(r, 0); i < r->nr_pages;
		     i = uvm_next_touched(r, i + 1))
			uvm_set_pte(r, i, UVM_PTE_NONE);
	}
	/* Private memory was let through for this one fork (fork.c); a child of the child by _Fork() must not
	 * find it. */
	rc = sys_madvise(r->start, r->len, MADV_DONTFORK);
	if (rc == 0)
		rc = sys_uffd_register(uvm_service_uffd(r->service), r->start, r->len,
				       r->register_mode, NULL);
	if (rc == 0 && !shared)
		rc = rearm(r);
	return rc;
}

/* ---- what users ask ---------------------------------------------------------------------------------- */
struct uvm_region_ctl *uvm_region_ctl(int64_t handle)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return NULL;
	struct uvm_region_ctl *ctl = r->ctl;
	uvm_region_put(r);
	return ctl;
}

uint8_t *uvm_region_ptes(int64_t handle)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return NULL;
	uint8_t *ptes = (uint8_t *)r->ptes;
	uvm_region_put(r);
	return ptes;
}

int uvm_region_ctl_fd(int64_t handle)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	int fd = r->ctl_fd;
	uvm_region_put(r);
	return fd >= 0 ? fd : -EINVAL;
}

int uvm_region_check(int64_t handle)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	(void)uvm_service_check(r->service);
	int rc = atomic_load(&r->lost);
	uvm_region_put(r);
	return rc;
}

int uvm_region_settle(int64_t handle)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	/* Not for each other, and not in the way of who closes it, who waits for us. */
	atomic_fetch_add(&r->nr_settling, 1);
	for (int i = 0; i < 400 && atomic_load(&r->state) == UVM_REGION_LIVE &&
			atomic_load(&r->in_flight) > atomic_load(&r->nr_settling);
	     i++)
		usleep(i < 10 ? 5 : 50);
	atomic_fetch_sub(&r->nr_settling, 1);
	uvm_region_put(r);
	return 0;
}

int uvm_region_advise(int64_t handle, int advice)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	bool known = advice >= UVM_ADVICE_NORMAL && advice <= UVM_ADVICE_RANDOM;
	if (known) {
		__atomic_store_n(&r->ctl->advice, (uint64_t)advice, __ATOMIC_RELAXED);
		atomic_store(&r->ra_prev, UVM_NO_INDEX);
		atomic_store(&r->ra_start, UVM_NO_INDEX);
	}
	uvm_region_put(r);
	return known ? 0 : -EINVAL;
}

static int range_check(const struct uvm_region *r, uint64_t index, uint64_t nr_pages)
{
	return index > r->nr_pages || nr_pages > r->nr_pages - index ? -EINVAL : 0;
}

int uvm_region_load(int64_t handle, uint64_t index, uint64_t nr_pages, uint64_t *failed_index)
{
	struct uvm_executor x;
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	int64_t rc = range_check(r, index, nr_pages);
	if (rc == 0) {
		uvm_executor_init(&x, true, r->service);
		rc = x.buf ? uvm_fill_range(&x, &r, index, nr_pages, true, failed_index) : -ENOMEM;
		uvm_executor_deinit(&x);
	}
	if (r)
		uvm_region_put(r);
	return rc < 0 ? (int)rc : 0;
}

int uvm_region_unpoison(int64_t handle, uint64_t index, uint64_t nr_pages)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	int rc = range_check(r, index, nr_pages);
	for (uint64_t i = uvm_next_touched(r, index); rc == 0 && i < index + nr_pages;
	     i = uvm_next_touched(r, i + 1))
		if (atomic_load(&r->ptes[i]) == UVM_PTE_POISONED)
			uvm_failure_lift(r, i);
	uvm_region_put(r);
	return rc;
}

void uvm_touch(uint64_t start, uint64_t nr_pages, int write)
{
	uint32_t tid = sys_gettid();

	for (uint64_t i = 0; i < nr_pages; i++) {
		_Atomic uint8_t *byte = (void *)(uintptr_t)(start + (i << UVM_PAGE_SHIFT));
		uint8_t there = atomic_load(byte);
		/* Whatever other threads store meanwhile stays as it is. */
		while (write && !atomic_compare_exchange_strong(byte, &there, there))
			;
		if (uvm_interrupt_pending(tid))
			return;
	}
}

int uvm_region_prefetch(int64_t handle, uint64_t index, uint64_t nr_pages)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	int rc = range_check(r, index, nr_pages);
	uvm_region_put(r);
	/* In pieces of a window, so that demand comes between them. */
	for (uint64_t end = index + nr_pages; rc == 0 && index < end;) {
		uint64_t n = end - index < UVM_PMD_PAGES ? end - index : UVM_PMD_PAGES;
		rc = uvm_queue_fill(handle, index, n);
		index += n;
	}
	return rc;
}

/* Only pages of the shared cache are evicted. Anonymous pages and private copies are content that lives
 * nowhere else (taking those back is swap's work), and a page that protect() armed looks clean but may
 * hold what was written before. */
int64_t uvm_region_evict(int64_t handle, uint64_t index, uint64_t nr_pages)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	int64_t rc = range_check(r, index, nr_pages);
	if (rc == 0 && r->cache && r->service != UVM_SERVICE_PYTHON)
		rc = uvm_cache_evict(r->cache, r->pgoff + index, nr_pages);
	if (rc > 0)
		uvm_count(r, UVM_COUNTER_PGSTEAL, (uint64_t)rc);
	uvm_region_put(r);
	return rc;
}

int uvm_region_pin(int64_t handle, uint64_t index, uint64_t nr_pages)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	int rc = range_check(r, index, nr_pages);
	if (rc == 0 && (!nr_pages || !r->writable || r->backing != UVM_BACKING_SHARED_FILE))
		rc = -EINVAL; /* nothing of it is ever taken away, or stored to */
	if (rc == 0)
		rc = uvm_cache_pin(r->cache, r->pgoff + index, nr_pages);
	uvm_region_put(r);
	return rc;
}

int uvm_region_unpin(int64_t handle, int pin)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	if (r->cache)
		uvm_cache_unpin(r->cache, pin);
	uvm_region_put(r);
	return 0;
}

int uvm_region_flush(int64_t handle, uint64_t index, uint64_t nr_pages)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	int rc = range_check(r, index, nr_pages);
	if (rc == 0 && r->cache && r->cache->writable) {
		struct uvm_cache *c = r->cache;
		/* A commit wakes the storing thread before it publishes that the page is dirty, both under
		 * a page-table lock: once we had them all, every store made before this call is known. */
		uvm_ptl_lock_all();
		uvm_ptl_unlock_all();
		rc = uvm_cache_write_back(c, r->pgoff + index, nr_pages, true);
		int sync = sys_fsync(c->file_fd);
		if (rc == 0)
			rc = sync;
		/* As errseq_t: an error of a write-back that nobody waited for is told once. */
		uint64_t seq = __atomic_load_n(&c->shared->ctl.wb_err_seq, __ATOMIC_ACQUIRE);
		uint64_t told = atomic_exchange(&c->seen_wb_err, seq);
		if (rc == 0 && seq != told)
			rc = -(int)__atomic_load_n(&c->shared->ctl.wb_err, __ATOMIC_ACQUIRE);
	}
	uvm_region_put(r);
	return rc;
}

/* A device may store to it at any time, unseen. */
static bool page_pinned(const struct uvm_region *r, uint64_t index)
{
	return r->backing == UVM_BACKING_SHARED_FILE &&
	       uvm_cache_pinned(r->cache, r->pgoff + index);
}

/* Takes back what was armed of [index, end), so that what was written of it is still known as such. */
static void unprotect(struct uvm_region *r, uint64_t index, uint64_t end, const uint8_t *written)
{
	for (uint64_t i = uvm_next_touched(r, index); i < end; i = uvm_next_touched(r, i + 1))
		if (written[i - index] && atomic_load(&r->ptes[i]) == UVM_PTE_WRITE_PROTECTED &&
		    sys_uffd_writeprotect(uvm_service_uffd(r->service), uvm_region_addr(r, i),
					  UVM_PAGE, 0) >= 0)
			uvm_set_pte(r, i, UVM_PTE_PRESENT);
}

/* Write tracking: from here on a store to any present page faults, save pinned ones, which go on counting as
 * written. Commits are kept out while the range is armed (all page-table locks), so that no page is armed in
 * the kernel and published as writable; and what was writable until it was armed is `written`: a store comes
 * before the arming of its page, or faults. */
int64_t uvm_region_protect(int64_t handle, uint64_t index, uint64_t nr_pages, uint8_t *written)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	int64_t rc = range_check(r, index, nr_pages);
	int64_t armed = 0;
	if (rc == 0 && !(r->register_mode & UFFDIO_REGISTER_MODE_WP))
		rc = -EOPNOTSUPP;
	if (rc < 0) {
		uvm_region_put(r);
		return rc;
	}
	int uffd = uvm_service_uffd(r->service);
	uint64_t end = index + nr_pages;
	uvm_ptl_lock_all();
	for (uint64_t i = uvm_next_touched(r, index); i < end;) {
		unsigned pte = atomic_load(&r->ptes[i]);
		unsigned to = pte == UVM_PTE_PRESENT ? UVM_PTE_WRITE_PROTECTED : UVM_PTE_ZERO_WP;
		uint64_t run = i + 1;
		bool armable =
			(pte == UVM_PTE_PRESENT || pte == UVM_PTE_ZERO) && !page_pinned(r, i);
		while (armable && run < end && atomic_load(&r->ptes[run]) == pte &&
		       !page_pinned(r, run))
			run++;
		if (armable) {
			rc = sys_uffd_writeprotect(uffd, uvm_region_addr(r, i),
						   (run - i) << UVM_PAGE_SHIFT,
						   UFFDIO_WRITEPROTECT_MODE_WP);
			if (rc < 0)
				break;
			uvm_set_ptes(r, i, run - i, to);
			armed += (int64_t)(run - i);
		}
		if (written && pte == UVM_PTE_PRESENT)
			memset(&written[i - index], 1, run - i);
		i = uvm_next_touched(r, run);
	}
	if (rc < 0 && written)
		unprotect(r, index, end, written);
	uvm_ptl_unlock_all();
	uvm_region_put(r);
	return rc < 0 ? rc : armed;
}

int uvm_region_written(int64_t handle, uint64_t index, uint64_t nr_pages, uint8_t *written,
		       int clear)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	int rc = range_check(r, index, nr_pages);
	_Atomic uint8_t *bytes = written_bytes(r);
	for (uint64_t i = next_written(r, index); rc == 0 && i < index + nr_pages; i++) {
		if ((uintptr_t)&bytes[i] % UVM_PAGE == 0) {
			i = next_written(r, i);
			if (i >= index + nr_pages)
				break;
		}
		/* The process may set it again meanwhile. */
		if (atomic_load(&bytes[i]) && (!clear || atomic_exchange(&bytes[i], 0)) && written)
			written[i - index] = 1;
	}
	uvm_region_put(r);
	return rc;
}

/* Entries alone, of pages about whose folios nothing was ever said. */
static void walk_entries(struct uvm_region *r, uint64_t index, uint64_t end, uint8_t *states)
{
	for (uint64_t i = uvm_next_touched(r, index); i < end; i++) {
		unsigned pte = atomic_load(&r->ptes[i]);
		if (pte != UVM_PTE_NONE)
			states[i - index] = (uint8_t)pte;
		if ((i + 1) % UVM_PAGE == 0)
			i = uvm_next_touched(r, i + 1) - 1;
	}
}

/* Folio words that were never written are not read: that would put a page into their memfd, a gibibyte for
 * a look at a tebibyte. */
static void walk_folios(struct uvm_region *r, uint64_t index, uint64_t end, uint8_t *states)
{
	uint64_t i = index;
	while (i < end) {
		uint64_t touched = uvm_cache_next_touched(r->cache, r->pgoff + i) - r->pgoff;
		uint64_t stop = touched < end ? touched : end;
		walk_entries(r, i, stop, states + (i - index));
		for (i = stop; i < end; i++) {
			unsigned flags = 0;
			if (i > stop && uvm_folio_begins_page(r->pgoff + i))
				break;
			unsigned pte = uvm_walk(r, i, UVM_KIND_MISSING, &flags);
			if (pte == UVM_PTE_NONE && flags & UVM_FLAG_CACHED)
				pte = UVM_PTE_CACHED;
			states[i - index] = (uint8_t)pte;
		}
	}
}

int uvm_region_walk(int64_t handle, uint64_t index, uint64_t nr_pages, uint8_t *states)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	int rc = range_check(r, index, nr_pages);
	if (rc == 0) {
		memset(states, UVM_PTE_NONE, nr_pages);
		if (uvm_region_in_cache(r))
			walk_folios(r, index, index + nr_pages, states);
		else
			walk_entries(r, index, index + nr_pages, states);
	}
	uvm_region_put(r);
	return rc;
}

int64_t uvm_region_resident(int64_t handle)
{
	struct uvm_region *r = uvm_region_by_handle(handle);
	if (!r)
		return -ESTALE;
	int64_t n = (int64_t)__atomic_load_n(&r->ctl->nr_present, __ATOMIC_RELAXED);
	if (uvm_region_in_cache(r)) {
		n = 0;
		for (uint64_t i = uvm_cache_next_touched(r->cache, r->pgoff);
		     i < r->pgoff + r->nr_pages; i++) {
			if (uvm_folio_begins_page(i))
				i = uvm_cache_next_touched(r->cache, i);
			if (i >= r->pgoff + r->nr_pages)
				break;
			unsigned state = uvm_folio_state(atomic_load(&r->cache->folios[i]));
			n += state == UVM_FOLIO_UPTODATE || state == UVM_FOLIO_DIRTY ||
			     state == UVM_FOLIO_WRITEBACK;
		}
	}
	uvm_region_put(r);
	return n;
}
