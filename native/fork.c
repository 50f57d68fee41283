/* fork(): the child goes on using its regions, by its own uffds, its own tables and its own threads.
 *
 * Facts: without an event the child's copy of a registered range is plain memory: a missing page reads
 * as zeros, write protection is gone, and no thread of ours exists. The inherited uffd is the parent's.
 *   -> The child handler opens uffds, maps shared regions again (they are MADV_DONTFORK), registers and
 *      re-arms everything before fork() returns. Until then only this one thread runs.
 *   -> What cannot be made good is made inaccessible: SIGSEGV is a crash, zeros are data loss.
 * _Fork() and raw clone() run no handlers: all regions are MADV_DONTFORK, so they are absent there. Private
 * ones are MADV_DOFORK just while an ordinary fork() copies them: nothing else could. */
#include "internal.h"

#include <stdio.h>

/* First of all: whatever else the child maps (tables, aliases, stacks) may land in the gap of a region. */
static void child_map(struct uvm_region *r, void *arg)
{
	(void)arg;
	if (atomic_load(&r->state) == UVM_REGION_LIVE)
		uvm_region_child_map(r);
}

const char *uvm_lost_reason(int err)
{
	switch (err) {
	case EUSERS:
		return "4096 living processes share its file's cache; fork fewer, or map it in "
		       "each";
	case EMFILE:
	case ENFILE:
		return "too many open files; raise `ulimit -n`";
	case ENOMEM:
		return "no memory, or vm.max_map_count is reached";
	case EAGAIN:
		return "no thread could be started; raise `ulimit -u`";
	case -UVM_LOST_TO_SERVICE:
		return "mode \"r+\" of service='python' stays with the parent; map it with "
		       "service='native'";
	case -UVM_LOST_TO_CLOSE:
		return "the process closed the descriptors of uffd_vm; do not close descriptors "
		       "that you did not open, or do it before uv.map()";
	default:
		return "a kernel call failed";
	}
}

/* No malloc(), no stdio streams: another thread of the parent may have held their locks. */
void uvm_region_say_lost(const struct uvm_region *r)
{
	char text[400];
	int err = -atomic_load(&r->lost);
	int n = snprintf(text, sizeof text,
			 "uffd_vm: the region at 0x%llx (%llu bytes) %s %d and was made "
			 "inaccessible there: %s (errno %d)\n",
			 (unsigned long long)r->start, (unsigned long long)r->len,
			 err == -UVM_LOST_TO_CLOSE ? "can no longer be served in process"
						   : "could not be served in the forked child",
			 (int)getpid(), uvm_lost_reason(err), err);
	(void)!write(STDERR_FILENO, text, (size_t)n < sizeof text ? (size_t)n : sizeof text - 1);
}
_Static_assert(UVM_CACHE_SLOTS == 4096, "the text of EUSERS, and docs/guide.md");

static void child_region(struct uvm_region *r, void *arg)
{
	int rc = *(int *)arg;
	r->shared = r->cache ? r->cache->shared : NULL;
	if (atomic_load(&r->state) != UVM_REGION_LIVE)
		return; /* perhaps unmapped already: the range may be somebody else's */
	atomic_store(&r->in_flight, 0);
	if (r->lost) {
		/* Programs fork for much else, so who touches it is told; or now, where no handler of
		 * ours will see that. */
		if (r->service == UVM_SERVICE_PYTHON) {
			(void)uvm_region_child_to_native(r);
			if (!uvm_sigbus_in_force())
				uvm_region_say_lost(r);
		}
		return;
	}
	if (rc == 0 && r->cache)
		rc = r->cache->child_rc;
	if (rc == 0)
		rc = uvm_region_child(r);
	r->lost = rc < 0 ? rc : 0;
	if (rc < 0) {
		uvm_region_say_lost(r);
		if (r->service == UVM_SERVICE_PYTHON)
			(void)uvm_region_child_to_native(r);
		if (r->child_rc == 0) /* else there is nothing of ours at its address */
			(void)mprotect((void *)(uintptr_t)r->start, r->len, PROT_NONE);
	}
}

static struct uvm_cache *seen[UVM_MAX_CACHES];
static int nr_seen;

static void child_cache(struct uvm_region *r, void *arg)
{
	(void)arg;
	if (!r->cache)
		return;
	uvm_cache_ref(r->cache);
	for (int i = 0; i < nr_seen; i++)
		if (seen[i] == r->cache)
			return;
	seen[nr_seen++] = r->cache;
	if (r->service == UVM_SERVICE_PYTHON && uvm_region_in_cache(r))
		uvm_cache_child_own(r->cache);
	else
		uvm_cache_child_attach(r->cache);
}

static void count_closing(struct uvm_region *r, void *arg)
{
	*(int *)arg += atomic_load(&r->state) == UVM_REGION_CLOSING;
}

static bool any_closing(void)
{
	int n = 0;
	uvm_for_each_region(count_closing, &n);
	return n > 0;
}

/* Private memory is copied by this fork, and by no other. */
static void let_copy(struct uvm_region *r, void *arg)
{
	if (r->backing != UVM_BACKING_SHARED_FILE && atomic_load(&r->state) == UVM_REGION_LIVE)
		(void)sys_madvise(r->start, r->len, *(const int *)arg);
}
static const int do_fork = MADV_DOFORK, dont_fork = MADV_DONTFORK;

enum { CLOSING_TRIES = 2000 };

static void before(void)
{
	pthread_mutex_lock(&uvm_space.mutex);
	/* A region that is being closed is neither mapped nor gone: let its closer get through. (Of a
	 * closer that needs the GIL, which os.fork() holds, mm/mapping.py takes care.) */
	for (int i = 0; i < CLOSING_TRIES && any_closing(); i++) {
		pthread_mutex_unlock(&uvm_space.mutex);
		usleep(1000);
		pthread_mutex_lock(&uvm_space.mutex);
	}
	uvm_services_check(); /* the child would map what has our numbers now */
	uvm_failure_prepare();
	uvm_spans_lock();
	uvm_ptl_lock_all(); /* no commit is half published in what the child inherits */
	uvm_service_prepare();
	uvm_caches_prepare();
	uvm_for_each_region_locked(let_copy, (void *)(uintptr_t)&do_fork);
}

static void in_parent(void)
{
	uvm_for_each_region_locked(let_copy, (void *)(uintptr_t)&dont_fork);
	uvm_caches_parent();
	uvm_service_parent();
	uvm_ptl_unlock_all();
	uvm_spans_unlock();
	uvm_failure_parent();
	pthread_mutex_unlock(&uvm_space.mutex);
}

static void in_child(void)
{
	int rc;
	uvm_caches_parent();
	uvm_for_each_region_locked(child_map, NULL);
	uvm_threads_child();
	uvm_failure_child();
	if (uvm_space.pagemap_fd >= 0)
		close(uvm_space.pagemap_fd);
	uvm_space.pagemap_fd = -1;
	uvm_ptl_unlock_all();
	if (uvm_space.nr_regions) {
		rc = uvm_service_child_uffds();
		nr_seen = 0;
		uvm_caches_child_begin();
		uvm_for_each_region_locked(child_cache, NULL);
		uvm_caches_child_end();
		uvm_for_each_region_locked(child_region, &rc);
		if (uvm_service_child_threads() < 0) {
			rc = -EAGAIN;
			uvm_for_each_region_locked(child_region, &rc);
		}
		(void)uvm_pagemap_open();
		uvm_space.nr_forked++;
	} else {
		uvm_service_parent();
	}
	uvm_spans_unlock();
	pthread_mutex_unlock(&uvm_space.mutex);
}

int uvm_fork_handlers_install(void)
{
	static bool installed;
	if (installed)
		return 0;
	int rc = pthread_atfork(before, in_parent, in_child);
	installed = rc == 0;
	return -rc;
}
