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
 * - A process that reads faults before it knows the regions only wakes the threads, which fault again, and
 *   one of them may hold the GIL that telling it of the regions needs. So it begins when we ask it for the
 *   first time, which is when it has all of them; until then the dead one's faults are failed.
 * - Our own mremap() (placeholder.c) waits until its event is read: from then on, here.
 * - A process may live and say nothing (SIGSTOP, a hung file system): whoever waits for it would wait for
 *   ever. So while anybody waits it is asked for a sign of life; silent for as long as the shortest
 *   deadline of its regions (a second at least) it is killed, and from there on it is dead. Killed first:
 *   one that wakes up late must not go on where it was. Ctrl-C ends the patience after half a second.
 * - This process may be stopped too, together with the service (Ctrl-Z): then nobody was silent. So
 *   silence is counted in ticks of ours, not by the clock.
 *
 * Rules of this thread: no Python, no allocation after start, no touch of lazy memory, signals blocked. */
#include "failure.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

enum {
	TICK_MS = 100,
	WATCH_MS = 200,     /* of silence: from here on Ctrl-C is watched ... */
	INTERRUPT_MS = 500, /* ... and here it ends the wait */
	LOOK_MS = 1000,     /* while there is nothing to do */
	GRACE_MS = 2000,    /* for a killed process to end: inside a system call it may take long */
	NR_BETWEEN = 3,     /* ticks without a waiter that may come back at once */
	NR_QUIET = 10,      /* ticks without a waiter, then Ctrl-C is Python's own again */
};
#define SILENT_MIN_NS 1000000000ull  /* a slow machine is no dead process */
#define SILENT_MAX_NS 30000000000ull /* where no region says less */

_Static_assert(sizeof(struct uvm_agent_request) == 40, "agent.py packs 40 bytes");
_Static_assert(sizeof(struct uvm_agent_reply) == 8, "agent.py unpacks 8 bytes");

struct agent_fds {
	int socket_fd, pidfd, uffd; /* our own copies */
	int stop[2];                /* a pipe: its end of file means stop */
	struct uvm_file_id id;      /* of the uffd */
};

static const struct agent_fds NO_FDS = {-1, -1, -1, {-1, -1}, {0, 0}};

static struct {
	pthread_mutex_t mutex; /* of start and stop */
	pthread_t thread;
	bool running;
	struct agent_fds fds;

	/* Of the thread. */
	uint64_t looked_ns, silent_ns, killed_ns;
	bool asked;    /* for a sign of life, and no answer yet */
	bool watching; /* Ctrl-C, because the service does not */
	int quiet;     /* ticks since anybody waited */
} agent = {.mutex = PTHREAD_MUTEX_INITIALIZER, .fds = {-1, -1, -1, {-1, -1}, {0, 0}}};

/* The program closed our descriptors, and the numbers may be others' now: nothing is done with them. */
static bool is_lost(void)
{
	if (uvm_fd_is(agent.fds.uffd, &agent.fds.id))
		return false;
	agent.fds = NO_FDS;
	(void)uvm_service_check(UVM_SERVICE_PYTHON);
	return true;
}

static _Atomic int nr_awaiting; /* threads that wait for a reply of the process */
static _Atomic int ended;       /* uvm_agent_ended() */

/* --- requests ----------------------------------------------------------------------------------- */
static int agent_dontneed(struct uvm_region *r, uint64_t index, uint64_t nr_pages)
{
	int rc = sys_madvise(uvm_region_addr(r, index), nr_pages << UVM_PAGE_SHIFT, MADV_DONTNEED);
	if (rc == 0)
		(void)sys_uffd_wake(agent.fds.uffd, uvm_region_addr(r, index),
				    nr_pages << UVM_PAGE_SHIFT);
	return rc;
}

static int agent_protect_read(struct uvm_region *r, uint64_t index, uint64_t nr_pages)
{
	uint64_t start = uvm_region_addr(r, index), len = nr_pages << UVM_PAGE_SHIFT;
	int rc = uvm_mprotect(start, len, PROT_READ);
	(void)sys_uffd_wake(agent.fds.uffd, start, len);
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
		uvm_interrupt_watch(UVM_SERVICE_PYTHON, q->nr_pages > 0);
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
	ssize_t n = recv(agent.fds.socket_fd, &q, sizeof q, MSG_DONTWAIT | MSG_TRUNC);

	if (n < 0)
		return errno == EAGAIN || errno == EINTR;
	if (n == 0)
		return false;
	agent.asked = false;
	agent.silent_ns = 0;
	if (n == sizeof q && q.op == UVM_AGENT_ALIVE)
		return true;
	struct uvm_agent_reply reply = {n >= (ssize_t)sizeof q ? q.seq : 0, -EINVAL};
	if (n == sizeof q)
		reply.rc = agent_execute(&q);
	n = send(agent.fds.socket_fd, &reply, sizeof reply, MSG_NOSIGNAL);
	return n == sizeof reply || errno == EAGAIN;
}

/* --- after the death of the service -------------------------------------------------------------- */
static void wake_region(struct uvm_region *r, void *arg)
{
	(void)arg;
	if (r->service == UVM_SERVICE_PYTHON)
		(void)sys_uffd_wake(agent.fds.uffd, r->start, r->len);
}

static void record(struct uvm_region *r, uint64_t index, uint32_t tid)
{
	if (tid == (uint32_t)getpid() && uvm_interrupt_pending(tid))
		uvm_failure_record(r, index, UVM_FAILURE_INTERRUPT, EINTR);
	else
		uvm_failure_record(r, index, UVM_FAILURE_PAGER, atomic_load(&ended));
}

static void fail_fault(uint64_t address, uint32_t tid)
{
	struct uvm_region *r = uvm_region_find(address);

	if (r && r->service == UVM_SERVICE_PYTHON && atomic_load(&r->state) == UVM_REGION_LIVE) {
		uint64_t index = (address - r->start) >> UVM_PAGE_SHIFT;
		record(r, index, tid);
		struct uvm_done d = uvm_poison_page(r, index);
		if (d.err && d.err != EEXIST)
			(void)sys_uffd_wake(agent.fds.uffd, address, UVM_PAGE);
	} else {
		(void)sys_uffd_wake(agent.fds.uffd, address, UVM_PAGE);
	}
	if (r)
		uvm_region_put(r);
}

/* A store that waits for write protection has its page, and nobody will ever allow it. What a shared
 * mapping shows lives on in its memfd: the page is let go of here, and poisoned. A private page is all
 * there is: it is made read-only, and the store is SIGSEGV. Not a wait for ever, and nothing is lost. */
static void fail_store(uint64_t page, uint32_t tid)
{
	struct uvm_region *r = uvm_region_find(page);

	if (r && atomic_load(&r->state) == UVM_REGION_LIVE) {
		uint64_t index = (page - r->start) >> UVM_PAGE_SHIFT;
		record(r, index, tid);
		if (r->backing == UVM_BACKING_SHARED_FILE &&
		    sys_madvise(page, UVM_PAGE, MADV_DONTNEED) == 0)
			(void)uvm_poison_page(r, index);
		else
			(void)uvm_mprotect(page, UVM_PAGE, PROT_READ);
	}
	(void)sys_uffd_wake(agent.fds.uffd, page, UVM_PAGE);
	if (r)
		uvm_region_put(r);
}

/* The content is there, in the cache, and only to be mapped: reading needs no service. */
static void map_cached(uint64_t page, uint32_t tid)
{
	struct uvm_done d = sys_uffd_continue(agent.fds.uffd, page, UVM_PAGE, UVM_CONTINUE_MODE_WP);

	if (d.err == EFAULT)
		fail_fault(page, tid); /* it has gone meanwhile */
	else if (d.err)
		(void)sys_uffd_wake(agent.fds.uffd, page, UVM_PAGE);
}

static void fail_faults(void)
{
	struct uffd_msg messages[16];
	ssize_t n = read(agent.fds.uffd, messages, sizeof messages);

	for (ssize_t i = 0; i < n / (ssize_t)sizeof messages[0]; i++) {
		const struct uffd_msg *m = &messages[i];
		uint64_t page = m->arg.pagefault.address & ~(uint64_t)(UVM_PAGE - 1);
		uint32_t tid = m->arg.pagefault.feat.ptid;
		if (m->event != UFFD_EVENT_PAGEFAULT)
			continue; /* reading it is the acknowledgement */
		if (m->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP)
			fail_store(page, tid);
		else if (m->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR)
			map_cached(page, tid);
		else
			fail_fault(page, tid);
	}
}

/* --- a service that says nothing -------------------------------------------------------------------- */
/* Threads that wait in a fault, also those whose message was read: the kernel's own count. */
static bool has_waiters(void)
{
	char path[64], text[512];

	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", agent.fds.uffd);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
	if (fd >= 0)
		close(fd);
	text[n > 0 ? n : 0] = 0;
	const char *total = strstr(text, "total:");
	return !total || strtoul(total + 6, NULL, 10) > 0; /* it does not say: then look always */
}

static void ask_for_life(void)
{
	struct uvm_agent_reply ask = {UVM_AGENT_ASK, 0};

	/* Also if there is no room: then it has not read for long. */
	(void)!send(agent.fds.socket_fd, &ask, sizeof ask, MSG_DONTWAIT | MSG_NOSIGNAL);
	agent.asked = true;
}

static void watch(bool on)
{
	if (on != agent.watching)
		uvm_interrupt_watch(UVM_SERVICE_PYTHON, agent.watching = on);
}

static void shortest_deadline(struct uvm_region *r, void *arg)
{
	uint64_t *limit = arg;
	if (r->service == UVM_SERVICE_PYTHON && r->deadline_ns && r->deadline_ns < *limit)
		*limit = r->deadline_ns;
}

/* Once a tick: has it been silent for too long, while somebody waits for it? */
static bool is_silent(void)
{
	uint64_t limit = SILENT_MAX_NS, now = sys_now_ns(), step = now - agent.looked_ns;

	if (step < TICK_MS * 1000000ull)
		return false;
	agent.looked_ns = now;
	/* A fault that nobody has read, an event that our own mremap() waits for; a fault that was read. A
	 * thread with a signal pending, inside a system call, goes in and out of its fault all the time. */
	struct pollfd fd = {agent.fds.uffd, POLLIN, 0};
	agent.quiet = poll(&fd, 1, 0) > 0 || has_waiters() ? 0 : agent.quiet + 1;
	bool in_fault = agent.quiet < NR_BETWEEN;
	if (!agent.asked || agent.quiet > NR_QUIET)
		watch(false);
	if (!in_fault && !atomic_load(&nr_awaiting))
		return false;
	if (!agent.asked) {
		ask_for_life();
		return false;
	}
	agent.silent_ns += step < 2 * TICK_MS * 1000000ull ? step : TICK_MS * 1000000ull;
	if (agent.silent_ns > WATCH_MS * 1000000ull && in_fault)
		watch(true);
	if (agent.silent_ns > INTERRUPT_MS * 1000000ull && agent.watching &&
	    uvm_interrupt_pending((uint32_t)getpid()))
		return true;
	uvm_for_each_region(shortest_deadline, &limit);
	return agent.silent_ns > (limit > SILENT_MIN_NS ? limit : SILENT_MIN_NS);
}

static void kill_service(void)
{
	atomic_store(&ended, ETIMEDOUT);
	agent.killed_ns = sys_now_ns();
	(void)syscall(SYS_pidfd_send_signal, agent.fds.pidfd, SIGKILL, NULL, 0);
}

/* --- the loop ------------------------------------------------------------------------------------- */
/* Until the process has ended. false: asked to stop. */
static bool serve_the_living(void)
{
	for (;;) {
		struct pollfd fds[] = {
			{agent.fds.stop[0], POLLIN, 0},
			{agent.fds.socket_fd, POLLIN, 0},
			{agent.fds.pidfd, POLLIN, 0},
		};
		int n = poll(fds, 3, TICK_MS);
		if (is_lost())
			return false;
		if (n < 0)
			continue;
		if (fds[0].revents)
			return false;
		/* What it asked for before its death is still done. */
		if (fds[1].revents & POLLIN ? !agent_serve() : fds[1].revents != 0)
			return true;
		if (!fds[1].revents && fds[2].revents)
			return true;
		/* Past the grace it runs no code of its own any more, but may end a system call late. */
		if (!agent.killed_ns && is_silent())
			kill_service();
		else if (agent.killed_ns && sys_now_ns() - agent.killed_ns > GRACE_MS * 1000000ull)
			return true;
	}
}

static void fail_for_the_dead(void)
{
	int alive = 0;

	atomic_compare_exchange_strong(&ended, &alive, EPIPE);
	uvm_for_each_region(wake_region, NULL);
	for (;;) {
		struct pollfd fds[] = {{agent.fds.stop[0], POLLIN, 0}, {agent.fds.uffd, POLLIN, 0}};
		int n = poll(fds, 2, agent.watching ? INTERRUPT_MS : LOOK_MS);
		if (fds[0].revents || is_lost())
			return;
		if (n == 0)
			watch(false); /* whoever waited has been told */
		else if (n > 0)
			fail_faults();
	}
}

static void *agent_main(void *arg)
{
	(void)arg;
	ask_for_life(); /* the first one: from here on it reads faults */
	if (serve_the_living())
		fail_for_the_dead();
	watch(false);
	return NULL;
}

/* --- life --------------------------------------------------------------------------------------- */
static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void fds_close(struct agent_fds *fds)
{
	close_fd(&fds->stop[0]);
	close_fd(&fds->stop[1]);
	close_fd(&fds->socket_fd);
	close_fd(&fds->pidfd);
	close_fd(&fds->uffd);
}

static int fds_open(struct agent_fds *fds, int socket_fd, int pidfd)
{
	int uffd = uvm_python_uffd();

	*fds = NO_FDS;
	if (uffd < 0)
		return uffd;
	if (pipe2(fds->stop, O_CLOEXEC) < 0)
		return -errno;
	fds->socket_fd = fcntl(socket_fd, F_DUPFD_CLOEXEC, 0);
	fds->pidfd = fcntl(pidfd, F_DUPFD_CLOEXEC, 0);
	fds->uffd = fcntl(uffd, F_DUPFD_CLOEXEC, 0);
	if (fds->socket_fd < 0 || fds->pidfd < 0 || fds->uffd < 0)
		return -errno;
	return uvm_file_id(fds->uffd, &fds->id);
}

static int thread_start(void)
{
	atomic_store(&ended, 0);
	agent.looked_ns = sys_now_ns();
	agent.silent_ns = agent.killed_ns = 0;
	agent.asked = agent.watching = false;
	agent.quiet = NR_QUIET;
	int rc = uvm_thread_create(&agent.thread, "uvm-agent", agent_main, NULL);
	agent.running = rc == 0;
	return rc;
}

static void agent_stop(void)
{
	if (!agent.running)
		return;
	(void)is_lost();
	close_fd(&agent.fds.stop[1]);
	pthread_join(agent.thread, NULL);
	agent.running = false;
	fds_close(&agent.fds);
}

static bool process_ended(void)
{
	struct pollfd fd = {agent.fds.pidfd, POLLIN, 0};
	if (is_lost())
		return true;
	return poll(&fd, 1, 0) > 0;
}

/* Keeps its own copies of both descriptors. The agent of a dead process goes on failing faults until
 * here, and also if this fails. */
int uvm_agent_start(int socket_fd, int pidfd)
{
	struct agent_fds fds = NO_FDS;

	pthread_mutex_lock(&agent.mutex);
	int rc = agent.running && !process_ended() ? -EBUSY : fds_open(&fds, socket_fd, pidfd);
	if (rc == 0) {
		agent_stop();
		agent.fds = fds;
		rc = thread_start();
		if (rc < 0)
			fds_close(&agent.fds);
	} else {
		fds_close(&fds);
	}
	pthread_mutex_unlock(&agent.mutex);
	return rc;
}

int uvm_agent_stop(void)
{
	pthread_mutex_lock(&agent.mutex);
	agent_stop();
	pthread_mutex_unlock(&agent.mutex);
	return 0;
}

void uvm_agent_await(int more)
{
	atomic_fetch_add(&nr_awaiting, more);
}

int uvm_agent_ended(void)
{
	return atomic_load(&ended);
}

/* In a forked child there is no such thread; its copies of the descriptors are the parent's business. */
void uvm_agent_child(void)
{
	pthread_mutex_init(&agent.mutex, NULL);
	if (agent.running && uvm_fd_is(agent.fds.uffd, &agent.fds.id))
		fds_close(&agent.fds);
	agent.running = false;
	atomic_store(&nr_awaiting, 0);
}
