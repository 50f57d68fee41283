/* The agent: a native thread of the process that owns the memory. It does for the fault-service process
 * what only the owner can (DONTNEED, mprotect, telling a thread why its page failed), and it is who is
 * left when that process dies.
 *
 * Facts -> what follows.
 * - A request carries a region's handle and pages: a stale handle or a range outside is refused; the other
 *   process may be wrong, or late.
 * - The death of a reader leaves its threads asleep: messages that it had read are gone. So first
 *   everything is woken, which makes every waiter fault again; then each fault is failed by poison, until
 *   uvm_agent_stop(). The uffd stays open all the time: closing it would let waiters read zeros.
 * - Our own mremap() (failure.c) waits until its event is read: from then on, here.
 *
 * Rules of this thread: no Python, no allocation after start, no touch of lazy memory, signals blocked. */
#include "failure.h"

#include <poll.h>
#include <sys/socket.h>

_Static_assert(sizeof(struct uvm_agent_request) == 40, "agent.py packs 40 bytes");
_Static_assert(sizeof(struct uvm_agent_reply) == 8, "agent.py unpacks 8 bytes");

static struct {
	pthread_mutex_t mutex; /* of start and stop */
	pthread_t thread;
	bool running;
	int socket_fd, pidfd, uffd; /* our own copies */
	int stop[2];                /* a pipe: its end of file means stop */
} agent = {.mutex = PTHREAD_MUTEX_INITIALIZER,
	   .socket_fd = -1,
	   .pidfd = -1,
	   .uffd = -1,
	   .stop = {-1, -1}};

/* --- requests ----------------------------------------------------------------------------------- */
static int agent_dontneed(struct uvm_region *r, uint64_t index, uint64_t nr_pages)
{
	int rc = sys_madvise(uvm_region_addr(r, index), nr_pages << UVM_PAGE_SHIFT, MADV_DONTNEED);
	if (rc == 0)
		(void)sys_uffd_wake(agent.uffd, uvm_region_addr(r, index),
				    nr_pages << UVM_PAGE_SHIFT);
	return rc;
}

static int agent_protect_read(struct uvm_region *r, uint64_t index, uint64_t nr_pages)
{
	uint64_t start = uvm_region_addr(r, index), len = nr_pages << UVM_PAGE_SHIFT;
	int rc = uvm_mprotect(start, len, PROT_READ);
	(void)sys_uffd_wake(agent.uffd, start, len);
	return rc;
}

static int agent_failed(struct uvm_region *r, const struct uvm_agent_request *q)
{
	if (q->kind <= UVM_FAILURE_NONE || q->kind >= UVM_FAILURE_NR || q->nr_pages != 1)
		return -EINVAL;
	uvm_failure_record(r, q->index, q->kind, q->err);
	uvm_failure_note_poison(r, q->index);
	return 0;
}

static int agent_execute(const struct uvm_agent_request *q)
{
	int rc;

	if (q->op == UVM_AGENT_INTERRUPTED) { /* of a thread, not of a region */
		uvm_interrupt_watch(q->nr_pages > 0);
		return q->nr_pages && uvm_interrupt_pending((uint32_t)q->index);
	}
	struct uvm_region *r = uvm_region_by_handle(q->region);
	if (!r)
		return -ESTALE;
	if (atomic_load(&r->state) != UVM_REGION_LIVE)
		rc = -ESTALE; /* its memory may be gone, and the address another's */
	else if (!q->nr_pages || q->index >= r->nr_pages || q->nr_pages > r->nr_pages - q->index)
		rc = -EINVAL;
	else if (q->op == UVM_AGENT_DONTNEED)
		rc = agent_dontneed(r, q->index, q->nr_pages);
	else if (q->op == UVM_AGENT_PROTECT_READ)
		rc = agent_protect_read(r, q->index, q->nr_pages);
	else if (q->op == UVM_AGENT_FAILED)
		rc = agent_failed(r, q);
	else if (q->op == UVM_AGENT_EVICT)
		rc = r->cache ? (int)uvm_cache_evict(r->cache, r->pgoff + q->index, q->nr_pages)
			      : 0;
	else
		rc = -EINVAL;
	uvm_region_put(r);
	return rc;
}

/* One request; false: the other side has gone. */
static bool agent_serve(void)
{
	struct uvm_agent_request q;
	ssize_t n = recv(agent.socket_fd, &q, sizeof q, MSG_DONTWAIT | MSG_TRUNC);

	if (n < 0)
		return errno == EAGAIN || errno == EINTR;
	if (n == 0)
		return false;
	struct uvm_agent_reply reply = {n >= (ssize_t)sizeof q ? q.seq : 0, -EINVAL};
	if (n == sizeof q)
		reply.rc = agent_execute(&q);
	n = send(agent.socket_fd, &reply, sizeof reply, MSG_NOSIGNAL);
	return n == sizeof reply || errno == EAGAIN;
}

/* --- after the death of the service -------------------------------------------------------------- */
static void wake_region(struct uvm_region *r, void *arg)
{
	(void)arg;
	if (r->service == UVM_SERVICE_PYTHON)
		(void)sys_uffd_wake(agent.uffd, r->start, r->len);
}

static void fail_fault(uint64_t address)
{
	struct uvm_region *r = uvm_region_find(address);

	if (r && r->service == UVM_SERVICE_PYTHON && atomic_load(&r->state) == UVM_REGION_LIVE) {
		uint64_t index = (address - r->start) >> UVM_PAGE_SHIFT;
		uvm_failure_record(r, index, UVM_FAILURE_PAGER, EPIPE);
		struct uvm_done d = uvm_poison_page(r, index);
		if (d.err && d.err != EEXIST)
			(void)sys_uffd_wake(agent.uffd, address, UVM_PAGE);
	} else {
		(void)sys_uffd_wake(agent.uffd, address, UVM_PAGE);
	}
	if (r)
		uvm_region_put(r);
}

/* A store that waits for write protection has its page, and nobody will ever allow it. What a shared
 * mapping shows lives on in its memfd: the page is let go of here, and poisoned. A private page is all
 * there is: it is made read-only, and the store is SIGSEGV. Not a wait for ever, and nothing is lost. */
static void fail_store(uint64_t page)
{
	struct uvm_region *r = uvm_region_find(page);

	if (r && atomic_load(&r->state) == UVM_REGION_LIVE) {
		uint64_t index = (page - r->start) >> UVM_PAGE_SHIFT;
		uvm_failure_record(r, index, UVM_FAILURE_PAGER, EPIPE);
		if (r->backing == UVM_BACKING_SHARED_FILE &&
		    sys_madvise(page, UVM_PAGE, MADV_DONTNEED) == 0)
			(void)uvm_poison_page(r, index);
		else
			(void)uvm_mprotect(page, UVM_PAGE, PROT_READ);
	}
	(void)sys_uffd_wake(agent.uffd, page, UVM_PAGE);
	if (r)
		uvm_region_put(r);
}

/* The content is there, in the cache, and only to be mapped: reading needs no service. */
static void map_cached(uint64_t page)
{
	struct uvm_done d = sys_uffd_continue(agent.uffd, page, UVM_PAGE, UVM_CONTINUE_MODE_WP);

	if (d.err == EFAULT)
		fail_fault(page); /* it has gone meanwhile */
	else if (d.err)
		(void)sys_uffd_wake(agent.uffd, page, UVM_PAGE);
}

static void fail_faults(void)
{
	struct uffd_msg messages[16];
	ssize_t n = read(agent.uffd, messages, sizeof messages);

	for (ssize_t i = 0; i < n / (ssize_t)sizeof messages[0]; i++) {
		const struct uffd_msg *m = &messages[i];
		uint64_t page = m->arg.pagefault.address & ~(uint64_t)(UVM_PAGE - 1);
		if (m->event != UFFD_EVENT_PAGEFAULT)
			continue; /* reading it is the acknowledgement */
		if (m->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP)
			fail_store(page);
		else if (m->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR)
			map_cached(page);
		else
			fail_fault(page);
	}
}

static void *agent_main(void *arg)
{
	bool dead = false;

	(void)arg;
	pthread_setname_np(pthread_self(), "uvm-agent");
	for (;;) {
		struct pollfd fds[] = {
			{agent.stop[0], POLLIN, 0},
			{dead ? agent.uffd : agent.socket_fd, POLLIN, 0},
			{dead ? -1 : agent.pidfd, POLLIN, 0},
		};
		if (poll(fds, 3, -1) < 0)
			continue;
		if (fds[0].revents)
			return NULL;
		if (dead) {
			if (fds[1].revents)
				fail_faults();
			continue;
		}
		/* What it asked for before its death is still done. */
		if (fds[1].revents & POLLIN ? !agent_serve() : fds[1].revents != 0)
			dead = true;
		else if (!fds[1].revents && fds[2].revents)
			dead = true;
		if (dead)
			uvm_for_each_region(wake_region, NULL);
	}
}

/* --- life --------------------------------------------------------------------------------------- */
static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void agent_deinit(void)
{
	close_fd(&agent.stop[0]);
	close_fd(&agent.stop[1]);
	close_fd(&agent.socket_fd);
	close_fd(&agent.pidfd);
	close_fd(&agent.uffd);
}

static int agent_init(int socket_fd, int pidfd)
{
	sigset_t all, before;
	int uffd = uvm_python_uffd();

	if (uffd < 0)
		return uffd;
	if (pipe2(agent.stop, O_CLOEXEC) < 0)
		return -errno;
	agent.socket_fd = fcntl(socket_fd, F_DUPFD_CLOEXEC, 0);
	agent.pidfd = fcntl(pidfd, F_DUPFD_CLOEXEC, 0);
	agent.uffd = fcntl(uffd, F_DUPFD_CLOEXEC, 0);
	if (agent.socket_fd < 0 || agent.pidfd < 0 || agent.uffd < 0)
		return -errno;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int rc = pthread_create(&agent.thread, NULL, agent_main, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return -rc;
}

/* Keeps its own copies of both descriptors. */
int uvm_agent_start(int socket_fd, int pidfd)
{
	pthread_mutex_lock(&agent.mutex);
	int rc = agent.running ? -EBUSY : agent_init(socket_fd, pidfd);
	if (rc == 0)
		agent.running = true;
	else if (rc != -EBUSY)
		agent_deinit();
	pthread_mutex_unlock(&agent.mutex);
	return rc;
}

int uvm_agent_stop(void)
{
	pthread_mutex_lock(&agent.mutex);
	if (agent.running) {
		close_fd(&agent.stop[1]);
		pthread_join(agent.thread, NULL);
		agent.running = false;
		agent_deinit();
	}
	pthread_mutex_unlock(&agent.mutex);
	return 0;
}

/* In a forked child there is no such thread; its copies of the descriptors are the parent's business. */
void uvm_agent_child(void)
{
	pthread_mutex_init(&agent.mutex, NULL);
	if (agent.running)
		agent_deinit();
	agent.running = false;
}
