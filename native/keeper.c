/* The keepers: what keeps a userfaultfd open when the program closes descriptors that are not its own.
 *
 * Facts:
 * - A program that becomes a daemon closes every number that it finds (os.closerange(3, n)), ours too. With
 *   the last reference to a userfaultfd the kernel forgets the registration, and a missing page of a shared
 *   memfd is then a page of zeros, for the parent of that process as well, and in mode "r+" for the file.
 * - A thread may have a table of descriptors of its own, which no close() of the others reaches.
 *   close_range(CLOSE_RANGE_UNSHARE) makes it, and leaves out what it is to close.
 *   -> A thread for each userfaultfd, which holds that and nothing else. Whoever touches a missing page
 *      then waits, until somebody has noticed (uvm_service_check()) and made the memory inaccessible.
 * - The number may be another file's by then. A userfaultfd has an inode of its own, so fstat() tells.
 *
 * XXX Between the look at a number and its use the program may close it and open another file there. */
#include "internal.h"

#include <poll.h>

enum { DRAIN_MS = 100 };
enum keeper_state { NOTHING, STARTING, HOLDS, DRAINS, ENDS };

struct keeper {
	_Atomic uint32_t state; /* enum keeper_state; a futex */
	int service, uffd;
	pthread_t thread;
	bool has_thread;
};
static struct keeper keepers[3];

static void state_set(struct keeper *k, uint32_t state)
{
	atomic_store(&k->state, state);
	(void)sys_futex_wake(&k->state, INT32_MAX);
}

/* ---- which file a number stands for ------------------------------------------------------------------- */
int uvm_file_id(int fd, struct uvm_file_id *id)
{
	struct stat st;
	if (fstat(fd, &st) < 0)
		return -errno;
	*id = (struct uvm_file_id){st.st_dev, st.st_ino};
	return 0;
}

bool uvm_fd_is(int fd, const struct uvm_file_id *id)
{
	struct uvm_file_id found;
	int rc = uvm_file_id(fd, &found);
	return rc < 0 ? rc != -EBADF : found.dev == id->dev && found.ino == id->ino;
}

/* ---- one keeper ------------------------------------------------------------------------------------------ */
/* A table with the userfaultfd alone. What lies behind it was opened before it, where a number was free: few,
 * most often none. These are copied and closed, which may wait (a network file system writes back), so not
 * before the start is reported. */
static int table_unshare(int uffd)
{
	unsigned first = uffd ? 0 : 1, last = uffd ? (unsigned)uffd - 1 : ~0u;
	if (sys_close_range(first, last, CLOSE_RANGE_UNSHARE) == 0)
		return 0;
	if (unshare(CLONE_FILES) < 0) /* a sandbox that does not know close_range() */
		return -errno;
	for (int fd = 0; fd < uffd; fd++)
		close(fd);
	return 0;
}

static void wake_region(struct uvm_region *r, void *arg)
{
	const struct keeper *k = arg;
	if (r->service == k->service && r->lost && atomic_load(&r->state) == UVM_REGION_LIVE)
		(void)sys_uffd_wake(k->uffd, r->start, r->len);
}

/* The service lost the number: what waits here is woken, into memory that is inaccessible by now; events are
 * read, for which an mremap() of ours may wait. */
static void drain(struct keeper *k)
{
	struct uffd_msg messages[16];
	uvm_for_each_region(wake_region, k);
	while (atomic_load(&k->state) == DRAINS) {
		struct pollfd fd = {k->uffd, POLLIN, 0};
		(void)poll(&fd, 1, DRAIN_MS);
		ssize_t n = read(k->uffd, messages, sizeof messages);
		for (ssize_t i = 0; i < n / (ssize_t)sizeof messages[0]; i++) {
			uint64_t page =
				messages[i].arg.pagefault.address & ~(uint64_t)(UVM_PAGE - 1);
			if (messages[i].event == UFFD_EVENT_PAGEFAULT)
				(void)sys_uffd_wake(k->uffd, page, UVM_PAGE);
		}
	}
}

static void *keeper_main(void *arg)
{
	struct keeper *k = arg;
	uint32_t state;
	int rc = table_unshare(k->uffd);

	state_set(k, rc < 0 ? NOTHING : HOLDS);
	if (rc < 0)
		return NULL; /* a sandbox forbids it: the program's own descriptors are all there is */
	(void)sys_close_range((unsigned)k->uffd + 1, ~0u, 0);
	while ((state = atomic_load(&k->state)) == HOLDS)
		(void)sys_futex_wait(&k->state, HOLDS, NULL);
	if (state == DRAINS)
		drain(k);
	return NULL; /* the table goes with the thread */
}

/* Returns when the userfaultfd is held, or cannot be. */
int uvm_keeper_start(int service, int uffd)
{
	struct keeper *k = &keepers[service];
	k->service = service;
	k->uffd = uffd;
	atomic_store(&k->state, STARTING);
	int rc = uvm_thread_create(&k->thread, "uvm-keeper", keeper_main, k);
	if (rc < 0)
		return rc;
	k->has_thread = true;
	while (atomic_load(&k->state) == STARTING)
		(void)sys_futex_wait(&k->state, STARTING, NULL);
	if (atomic_load(&k->state) == NOTHING)
		uvm_keeper_stop(service);
	return 0;
}

void uvm_keeper_stop(int service)
{
	struct keeper *k = &keepers[service];
	if (!k->has_thread)
		return;
	state_set(k, ENDS);
	pthread_join(k->thread, NULL);
	k->has_thread = false;
}

/* Whoever waits has somewhere to go: the regions are inaccessible. */
void uvm_keeper_drain(int service)
{
	struct keeper *k = &keepers[service];
	uint32_t holds = HOLDS;
	if (atomic_compare_exchange_strong(&k->state, &holds, DRAINS))
		(void)sys_futex_wake(&k->state, INT32_MAX);
}

int uvm_nr_keepers(void)
{
	int n = 0;
	for (int i = 0; i < 3; i++)
		n += keepers[i].has_thread;
	return n;
}

/* After fork there are none. */
void uvm_keepers_child(void)
{
	for (int i = 0; i < 3; i++) {
		keepers[i].has_thread = false;
		atomic_store(&keepers[i].state, NOTHING);
	}
}
