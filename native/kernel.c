/* The kernel face of the library: one exported function for each call of sys.h, for uffd_vm/kernel and
 * for the Python fault service, and the state behind fault injection.
 *
 * Invariant: nothing here keeps state between calls except what uvm_inject() armed. */
#include "sys.h"

#include <pthread.h>

/* --- fault injection --------------------------------------------------------------------------- */

/* What is armed for one operation. Read by any thread, also in a signal handler, without a lock; a
 * thread that races with arming sees the operation armed with all of the new values, or not armed. */
struct injection {
	_Atomic int armed;
	_Atomic uint64_t calls; /* seen since arming */
	_Atomic uint64_t skip, count, delay_ns;
	_Atomic int err;
};

static struct injection injections[UVM_OP_NR];
static pthread_mutex_t inject_lock = PTHREAD_MUTEX_INITIALIZER; /* of those who arm */
_Atomic int uvm_inject_armed;                                   /* number of armed operations */

static void inject_delay(uint64_t ns)
{
	struct timespec left = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};

	while (nanosleep(&left, &left) < 0 && errno == EINTR)
		;
}

int uvm_inject_hit(int op)
{
	struct injection *inj = &injections[op];

	if (!atomic_load_explicit(&inj->armed, memory_order_acquire))
		return 0;
	uint64_t n = atomic_fetch_add(&inj->calls, 1);
	uint64_t skip = atomic_load(&inj->skip);
	if (n < skip || n - skip >= atomic_load(&inj->count))
		return 0;
	uint64_t delay_ns = atomic_load(&inj->delay_ns);
	int err = atomic_load(&inj->err);
	if (delay_ns)
		inject_delay(delay_ns);
	return -err;
}

static void inject_disarm(struct injection *inj)
{
	if (atomic_exchange(&inj->armed, 0))
		atomic_fetch_sub(&uvm_inject_armed, 1);
}

int uvm_inject(int op, uint64_t skip, uint64_t count, int err, uint64_t delay_ns)
{
	if (op < 0 || op >= UVM_OP_NR || err < 0)
		return -EINVAL;
	struct injection *inj = &injections[op];

	pthread_mutex_lock(&inject_lock);
	inject_disarm(inj);
	atomic_store(&inj->calls, 0);
	atomic_store(&inj->skip, skip);
	atomic_store(&inj->count, count);
	atomic_store(&inj->err, err);
	atomic_store(&inj->delay_ns, delay_ns);
	atomic_store_explicit(&inj->armed, 1, memory_order_release);
	atomic_fetch_add(&uvm_inject_armed, 1);
	pthread_mutex_unlock(&inject_lock);
	return 0;
}

void uvm_inject_clear(void)
{
	pthread_mutex_lock(&inject_lock);
	for (int op = 0; op < UVM_OP_NR; op++)
		inject_disarm(&injections[op]);
	pthread_mutex_unlock(&inject_lock);
}

uint64_t uvm_inject_calls(int op)
{
	return op < 0 || op >= UVM_OP_NR ? 0 : atomic_load(&injections[op].calls);
}

/* --- userfaultfd ------------------------------------------------------------------------------- */

int uvm_userfaultfd(int flags)
{
	return sys_userfaultfd(flags);
}

int uvm_uffd_from_device(int flags)
{
	return sys_uffd_from_device(flags);
}

int uvm_uffd_api(int fd, uint64_t *features, uint64_t *ioctls)
{
	return sys_uffd_api(fd, features, ioctls);
}

int uvm_uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls)
{
	return sys_uffd_register(fd, start, len, mode, ioctls);
}

int uvm_uffd_unregister(int fd, uint64_t start, uint64_t len)
{
	return sys_uffd_unregister(fd, start, len);
}

int uvm_uffd_wake(int fd, uint64_t start, uint64_t len)
{
	return sys_uffd_wake(fd, start, len);
}

int uvm_uffd_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	return sys_uffd_writeprotect(fd, start, len, mode);
}

struct uvm_done uvm_uffd_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode)
{
	return sys_uffd_copy(fd, dst, src, len, mode);
}

struct uvm_done uvm_uffd_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	return sys_uffd_zeropage(fd, start, len, mode);
}

struct uvm_done uvm_uffd_continue(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	return sys_uffd_continue(fd, start, len, mode);
}

struct uvm_done uvm_uffd_poison(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	return sys_uffd_poison(fd, start, len, mode);
}

struct uvm_done uvm_uffd_move(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode)
{
	return sys_uffd_move(fd, dst, src, len, mode);
}

/* --- memory ------------------------------------------------------------------------------------ */

_Static_assert(sizeof(struct uvm_pm_region) == 24, "struct page_region");

int uvm_pagemap_scan(int pagemap_fd, uint64_t start, uint64_t end, uint64_t flags,
		     uint64_t category_mask, uint64_t category_anyof_mask, uint64_t return_mask,
		     uint64_t max_pages, struct uvm_pm_region *vec, uint64_t vec_len,
		     uint64_t *walk_end)
{
	struct uvm_pm_scan_arg arg = {
		.size = sizeof(arg),
		.flags = flags,
		.start = start,
		.end = end,
		.vec = (uint64_t)(uintptr_t)vec,
		.vec_len = vec_len,
		.max_pages = max_pages,
		.category_mask = category_mask,
		.category_anyof_mask = category_anyof_mask,
		.return_mask = return_mask,
	};
	int64_t nr = sys_pagemap_scan(pagemap_fd, &arg);

	if (walk_end)
		*walk_end = arg.walk_end;
	return (int)nr;
}

int uvm_madvise(uint64_t start, uint64_t len, int advice)
{
	return sys_madvise(start, len, advice);
}

/* Does mmap() fill what it maps at once, as after mlockall(MCL_FUTURE)? A page that it did not lock says no. */
int uvm_mmap_populates(void)
{
	unsigned char resident = 0;
	uint64_t page;
	int rc = sys_mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0,
			  &page);
	if (rc < 0)
		return rc;
	if (mincore((void *)(uintptr_t)page, 4096, &resident) < 0)
		rc = -errno;
	(void)sys_munmap(page, 4096);
	return rc < 0 ? rc : resident & 1;
}

int uvm_mprotect(uint64_t start, uint64_t len, int prot)
{
	return uvm_rc(mprotect((void *)(uintptr_t)start, len, prot));
}
