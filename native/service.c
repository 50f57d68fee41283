/* The native fault service: a thread that reads the uffd and resolves faults, worker threads for what
 * has to wait for a file, and the faults that are parked meanwhile.
 *
 * Rules of these threads, each with its reason:
 * - no Python, no GIL: the toucher may hold it (a[0] does) for as long as its fault is pending;
 * - no touch of lazy memory: nobody else would resolve it;
 * - no allocation after start: malloc may map, and its lock may be held by a toucher;
 * - all signals blocked: handlers belong to the program's threads;
 * - the fault thread never waits for a file, never takes space.mutex (stop joins it with that held);
 * - state is published before anybody is woken by hand.
 *
 * Facts about waking (2-core VM, 6.18): a handler asleep on another, idle CPU costs 65-130 us a fault,
 * one on the toucher's CPU 10-13 us, one that spins on another CPU 15-20 us.
 *   -> a toucher pinned to one CPU is followed there; else we spin for spin_ns after each fault before
 *      we sleep. An idle process sleeps in ppoll(), but for a look once a second. */
#include "internal.h"

#include <poll.h>
#include <sys/eventfd.h>

enum {
	TICK_MS = 10,
	LOOK_MS = 1000, /* when idle: a number that is another file's may never become readable */
	BATCH = 64,
	AFFINITY_EVERY = 32,
	TRUST_NS = 100000,
	NR_INLINE = 16
};

struct service {
	int uffd; /* -1 while not running, and when it was lost */
	struct uvm_file_id id;
	int users;
	uint64_t epoch;
	pthread_t thread;
	bool has_thread;
};

static struct service services[3] = {{.uffd = -1}, {.uffd = -1}, {.uffd = -1}};
static int event_fd = -1; /* wakes the fault thread: stop, parked faults to run again */
static struct uvm_file_id event_id;
static _Atomic int stopping[3];

/* ---- descriptors that the program closed ---------------------------------------------------------------- */
static bool runs(int service)
{
	return uvm_service_uffd(service) >= 0;
}

static bool still_ours(int service)
{
	return uvm_fd_is(uvm_service_uffd(service), &services[service].id);
}

/* -1 where there is none, or its number is another file's. (Other eventfds have the same inode.) */
static int event_of_ours(void)
{
	int fd = __atomic_load_n(&event_fd, __ATOMIC_ACQUIRE);
	return fd >= 0 && uvm_fd_is(fd, &event_id) ? fd : -1;
}

static void lose_region(struct uvm_region *r, void *arg)
{
	if (r->service == *(const int *)arg)
		uvm_region_lose(r);
}

/* The numbers that are somebody else's by now are forgotten, not closed. The events' one cannot be told from
 * others; without it the fault thread of another service is woken by its tick. */
static void lose(int service)
{
	__atomic_store_n(&event_fd, -1, __ATOMIC_RELEASE);
	int uffd = __atomic_exchange_n(&services[service].uffd, -1, __ATOMIC_ACQ_REL);
	if (uffd < 0)
		return;
	uvm_for_each_region(lose_region, &service);
	uvm_caches_lose();
	__atomic_store_n(&uvm_space.pagemap_fd, -1, __ATOMIC_RELEASE);
	uvm_keeper_drain(service);
}

bool uvm_service_check(int service)
{
	if (runs(service) && !still_ours(service))
		lose(service);
	return runs(service);
}

/* For each fault: fstat() is a tenth of one. So a number is trusted for a moment; who sleeps longer than that, and
 * whoever becomes a daemon does, looks. */
static bool checked_lately(int service)
{
	static _Atomic uint64_t looked_ns[3];
	uint64_t now = sys_now_ns();
	if (now - atomic_load_explicit(&looked_ns[service], memory_order_relaxed) < TRUST_NS)
		return runs(service);
	atomic_store_explicit(&looked_ns[service], now, memory_order_relaxed);
	return uvm_service_check(service);
}

void uvm_services_check(void)
{
	for (int i = 0; i < 3; i++)
		(void)uvm_service_check(i);
}

/* ---- parked faults ------------------------------------------------------------------------------------- */
static pthread_mutex_t parked_lock = PTHREAD_MUTEX_INITIALIZER;
static struct uvm_fault parked[UVM_MAX_PARKED];
static _Atomic int nr_parked;

static bool same_fault(const struct uvm_fault *a, const struct uvm_fault *b)
{
	return a->address == b->address && a->tid == b->tid && a->kind == b->kind;
}

/* A signal handler that ran while the thread waited makes it fault again: one entry is enough. */
int uvm_park(const struct uvm_fault *f)
{
	int rc = 0;
	pthread_mutex_lock(&parked_lock);
	int n = atomic_load(&nr_parked), i = 0;
	while (i < n && !same_fault(&parked[i], f))
		i++;
	if (i == n && n == UVM_MAX_PARKED) {
		rc = -EAGAIN; /* the caller wakes the thread: it will fault again */
	} else if (i == n) {
		parked[i] = *f;
		if (parked[i].tries < 255)
			parked[i].tries++;
		atomic_store(&nr_parked, n + 1);
	}
	pthread_mutex_unlock(&parked_lock);
	return rc;
}

static void parked_remove(int i) /* parked_lock held */
{
	int n = atomic_load(&nr_parked) - 1;
	parked[i] = parked[n];
	atomic_store(&nr_parked, n);
}

/* The pages were committed, which woke who waits on them in this mapping: their faults are over. */
void uvm_unpark_range(struct uvm_region *r, uint64_t index, uint64_t nr_pages, uint32_t result,
		      const struct uvm_fault *own)
{
	uint64_t start = uvm_region_addr(r, index), end = start + (nr_pages << UVM_PAGE_SHIFT);
	bool more = false;
	if (!atomic_load(&nr_parked))
		return;
	pthread_mutex_lock(&parked_lock);
	for (int i = 0; i < atomic_load(&nr_parked);) {
		struct uvm_fault *f = &parked[i];
		if (f->address >= start && f->address < end && f->kind == UVM_KIND_MISSING &&
		    f->access == 0) {
			uint64_t waited = sys_now_ns() - f->t_ns;
			if (!own || !same_fault(f, own)) {
				uvm_mm_account_fault(r, result & ~(uint32_t)UVM_VM_FAULT_RETRY,
						     true);
				__atomic_fetch_add(&r->ctl->latency[uvm_latency_bucket(waited)], 1,
						   __ATOMIC_RELAXED);
			}
			parked_remove(i);
		} else {
			more = true;
			i++;
		}
	}
	pthread_mutex_unlock(&parked_lock);
	if (more)
		uvm_poke_fault_thread();
}

void uvm_poke_fault_thread(void)
{
	uint64_t one = 1;
	int fd = event_of_ours();
	if (fd >= 0)
		(void)!write(fd, &one, sizeof one);
}

/* While the main thread waits long: Ctrl-C is looked for. Whether it is. */
static bool watch_interrupts(int service)
{
	bool on = uvm_waits_long(service);
	uvm_interrupt_watch(service, on);
	return on;
}

/* Starts every parked fault again from the top. */
static void run_parked(struct uvm_executor *x)
{
	static struct uvm_fault again[UVM_MAX_PARKED]; /* the fault thread's own */
	int mine = 0;

	pthread_mutex_lock(&parked_lock);
	for (int i = 0; i < atomic_load(&nr_parked);) {
		if (parked[i].service != UVM_SERVICE_NATIVE) {
			i++;
			continue;
		}
		again[mine++] = parked[i];
		parked_remove(i);
	}
	pthread_mutex_unlock(&parked_lock);
	for (int i = 0; i < mine; i++)
		uvm_long_wait(&again[i]);
	watch_interrupts(UVM_SERVICE_NATIVE);
	for (int i = 0; i < mine; i++)
		uvm_handle_mm_fault(x, &again[i]);
}

/* ---- work that waits for files ------------------------------------------------------------------------- */
struct job {
	int64_t region; /* read-ahead: fill [index, index + nr_pages) */
	uint64_t index, nr_pages;
	struct uvm_fault fault; /* demand: start this fault again, allowed to wait */
	bool demand;
};

static pthread_mutex_t queue_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t queue_cond = PTHREAD_COND_INITIALIZER;
static struct job queue[2][UVM_MAX_JOBS]; /* [0] demand, [1] read-ahead: rings */
static uint64_t queue_head[2], queue_tail[2];
static pthread_t workers[UVM_MAX_WORKERS];
static struct uvm_executor worker_executors[UVM_MAX_WORKERS];
static int nr_workers;
static bool workers_stop;
static _Atomic int nr_jobs; /* queued or under way */

/* Before the thread starts: one that has nowhere to read into would serve nobody, and say so to nobody. */
static int executor_get(struct uvm_executor *x, bool may_block, int service)
{
	if (!x->buf)
		uvm_executor_init(x, may_block, service);
	return x->buf ? 0 : -ENOMEM;
}

static int queue_push(const struct job *job)
{
	int rc = 0, which = job->demand ? 0 : 1;
	pthread_mutex_lock(&queue_lock);
	if (queue_tail[which] - queue_head[which] == UVM_MAX_JOBS || nr_workers == 0) {
		rc = -EAGAIN;
	} else {
		queue[which][queue_tail[which]++ % UVM_MAX_JOBS] = *job;
		atomic_fetch_add(&nr_jobs, 1);
		pthread_cond_signal(&queue_cond);
	}
	pthread_mutex_unlock(&queue_lock);
	return rc;
}

int uvm_queue_fill(int64_t region, uint64_t index, uint64_t nr_pages)
{
	struct job job = {.region = region, .index = index, .nr_pages = nr_pages};
	return queue_push(&job);
}

/* The fault stays parked until a worker has served it, so that its deadline is watched meanwhile. */
int uvm_queue_fault(const struct uvm_fault *f)
{
	struct job job = {.fault = *f, .demand = true};
	if (job.fault.tries < 255)
		job.fault.tries++;
	bool queued = false; /* parked before, and started again: is it already on its way? */
	pthread_mutex_lock(&queue_lock);
	for (uint64_t i = queue_head[0]; i != queue_tail[0] && !queued; i++)
		queued = same_fault(&queue[0][i % UVM_MAX_JOBS].fault, f);
	pthread_mutex_unlock(&queue_lock);
	int rc = uvm_park(f);
	if (rc == 0 && !queued)
		(void)queue_push(&job); /* full: the next tick starts the fault again */
	return rc;
}

void uvm_queue_drop(int64_t region)
{
	pthread_mutex_lock(&queue_lock);
	for (uint64_t i = queue_head[1]; i != queue_tail[1]; i++)
		if (queue[1][i % UVM_MAX_JOBS].region == region)
			queue[1][i % UVM_MAX_JOBS].nr_pages = 0;
	pthread_mutex_unlock(&queue_lock);
}

static void run_job(struct uvm_executor *x, const struct job *job)
{
	if (job->demand) {
		struct uvm_fault f = job->fault;
		(void)uvm_service_check(f.service);
		x->service = f.service;
		uint32_t result = uvm_handle_mm_fault(x, &f);
		if (!(result & UVM_VM_FAULT_RETRY)) {
			pthread_mutex_lock(&parked_lock);
			for (int i = 0; i < atomic_load(&nr_parked); i++)
				if (same_fault(&parked[i], &f)) {
					parked_remove(i);
					break;
				}
			pthread_mutex_unlock(&parked_lock);
		}
		if (atomic_load(&nr_parked))
			uvm_poke_fault_thread();
		return;
	}
	struct uvm_region *r = job->nr_pages ? uvm_region_by_handle(job->region) : NULL;
	if (!r)
		return;
	(void)uvm_service_check(r->service);
	x->service = r->service == UVM_SERVICE_INLINE ? UVM_SERVICE_NATIVE : r->service;
	(void)uvm_fill_range(x, &r, job->index, job->nr_pages, false, NULL);
	if (r)
		uvm_region_put(r);
	if (atomic_load(&nr_parked))
		uvm_poke_fault_thread();
}

static void *worker_main(void *arg)
{
	struct uvm_executor *x = arg;
	pthread_mutex_lock(&queue_lock);
	while (!workers_stop) {
		int which = queue_head[0] != queue_tail[0]   ? 0
			    : queue_head[1] != queue_tail[1] ? 1
							     : -1;
		if (which < 0) {
			pthread_cond_wait(&queue_cond, &queue_lock);
			continue;
		}
		struct job job = queue[which][queue_head[which]++ % UVM_MAX_JOBS];
		pthread_mutex_unlock(&queue_lock);
		run_job(x, &job);
		atomic_fetch_sub(&nr_jobs, 1);
		pthread_mutex_lock(&queue_lock);
	}
	pthread_mutex_unlock(&queue_lock);
	return NULL;
}

static int workers_start(void)
{
	int want = uvm_space.config.nr_workers;
	workers_stop = false;
	while (nr_workers < want) {
		pthread_t t;
		struct uvm_executor *x = &worker_executors[nr_workers];
		int rc = executor_get(x, true, UVM_SERVICE_NATIVE);
		if (rc < 0)
			return rc;
		rc = uvm_thread_create(&t, "uvm-io", worker_main, x);
		if (rc < 0)
			return nr_workers ? 0 : rc;
		pthread_mutex_lock(&queue_lock);
		workers[nr_workers++] = t;
		pthread_mutex_unlock(&queue_lock);
	}
	return 0;
}

static void workers_end(void)
{
	pthread_mutex_lock(&queue_lock);
	workers_stop = true;
	int n = nr_workers;
	nr_workers = 0;
	atomic_fetch_sub(&nr_jobs,
			 (int)(queue_tail[0] - queue_head[0] + queue_tail[1] - queue_head[1]));
	queue_head[0] = queue_tail[0] = queue_head[1] = queue_tail[1] = 0;
	pthread_cond_broadcast(&queue_cond);
	pthread_mutex_unlock(&queue_lock);
	for (int i = 0; i < n; i++)
		pthread_join(workers[i], NULL);
	for (int i = 0; i < UVM_MAX_WORKERS; i++)
		uvm_executor_deinit(&worker_executors[i]);
}

/* ---- the fault thread ------------------------------------------------------------------------------------ */
static struct uvm_executor fault_executor;

struct follower {
	cpu_set_t home; /* the mask we started with */
	int pinned;     /* CPU we follow a toucher to, -1 */
	int seen;       /* last answer: one CPU, or -1 */
	unsigned faults;
};

/* Where the toucher runs: a thread that is bound to one CPU is followed, when two looks agree. */
static void follow(struct follower *fo, uint32_t tid)
{
	cpu_set_t set;
	int cpu = -1;
	if (fo->faults++ % AFFINITY_EVERY > 1)
		return;
	CPU_ZERO(&set);
	if (tid && sched_getaffinity((pid_t)tid, sizeof set, &set) == 0 && CPU_COUNT(&set) == 1)
		for (int i = 0; i < CPU_SETSIZE && cpu < 0; i++)
			if (CPU_ISSET(i, &set))
				cpu = i;
	bool agree = cpu == fo->seen;
	fo->seen = cpu;
	if (!agree || cpu == fo->pinned)
		return;
	if (cpu >= 0 && CPU_ISSET(cpu, &fo->home)) {
		if (sched_setaffinity(0, sizeof set, &set) == 0)
			fo->pinned = cpu;
	} else if (fo->pinned >= 0) {
		if (sched_setaffinity(0, sizeof fo->home, &fo->home) == 0)
			fo->pinned = -1;
	}
}

static void serve_message(struct uvm_executor *x, const struct uffd_msg *m, uint64_t now,
			  struct follower *fo)
{
	if (m->event != UFFD_EVENT_PAGEFAULT)
		return; /* p1: reading REMAP is the acknowledgement; our own mremap waits for it */
	uint64_t bits = m->arg.pagefault.flags;
	struct uvm_fault f = {
		.address = m->arg.pagefault.address & ~(uint64_t)(UVM_PAGE - 1),
		.t_ns = now,
		.tid = m->arg.pagefault.feat.ptid,
		.kind = bits & UFFD_PAGEFAULT_FLAG_WP      ? UVM_KIND_WP
			: bits & UFFD_PAGEFAULT_FLAG_MINOR ? UVM_KIND_MINOR
							   : UVM_KIND_MISSING,
		.access = bits & (UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP) ? 1 : 0,
		.service = UVM_SERVICE_NATIVE,
	};
	uvm_chain_continue(&f);
	if (f.refault)
		watch_interrupts(UVM_SERVICE_NATIVE);
	uvm_handle_mm_fault(x, &f);
	follow(fo, f.tid);
}

/* Serves what there is to read. Returns messages served. */
static int serve(struct uvm_executor *x, int uffd, struct follower *fo)
{
	struct uffd_msg msgs[BATCH];
	ssize_t n = read(uffd, msgs, sizeof msgs);
	if (n <= 0)
		return 0;
	uint64_t now = sys_now_ns();
	int count = (int)(n / (ssize_t)sizeof msgs[0]);
	for (int i = 0; i < count; i++)
		serve_message(x, &msgs[i], now, fo);
	return count;
}

static void wait_for_work(int uffd, bool tick)
{
	int event = __atomic_load_n(&event_fd, __ATOMIC_ACQUIRE);
	struct pollfd fds[2] = {{.fd = uffd, .events = POLLIN}, {.fd = event, .events = POLLIN}};
	int ms = tick ? TICK_MS : LOOK_MS;
	struct timespec ts = {ms / 1000, ms % 1000 * 1000000};
	ppoll(fds, 2, &ts, NULL);
	if (!fds[1].revents)
		return;
	uint64_t count;
	if (event_of_ours() != event)
		event_fd = -1; /* the tick has to do */
	else if (fds[1].revents & POLLIN)
		(void)!read(event, &count, sizeof count);
}

static void *fault_main(void *arg)
{
	struct uvm_executor *x = arg;
	struct follower fo = {.pinned = -1, .seen = -1};
	int uffd = services[UVM_SERVICE_NATIVE].uffd;

	sched_getaffinity(0, sizeof fo.home, &fo.home);
	uint64_t spin_ns = CPU_COUNT(&fo.home) > 1 ? uvm_space.config.spin_ns : 0;
	memset(x->buf, 0, 256 * UVM_PAGE); /* resident before the first fault */
	uint64_t spin_until = 0, next_tick = 0;
	bool watching = false, served = false;
	while (!atomic_load_explicit(&stopping[UVM_SERVICE_NATIVE], memory_order_relaxed)) {
		/* A number that just had messages is trusted for a moment; one that had none is looked at. */
		if (!(served ? checked_lately(UVM_SERVICE_NATIVE)
			     : uvm_service_check(UVM_SERVICE_NATIVE)))
			break;
		served = serve(x, uffd, &fo) > 0;
		if (served) {
			/* On the toucher's own CPU spinning would only keep it from running, and next to
			 * busy workers it would keep one of them from it. */
			bool spin = spin_ns && fo.pinned < 0 && !atomic_load(&nr_jobs);
			spin_until = spin ? sys_now_ns() + spin_ns : 0;
		}
		/* Whether more has come for a pinned toucher, ppoll() says: it waits for our CPU meanwhile. */
		if (served ? fo.pinned >= 0 && !atomic_load(&nr_parked)
			   : !spin_until || sys_now_ns() > spin_until) {
			spin_until = 0;
			wait_for_work(uffd, atomic_load(&nr_parked) > 0 || watching);
			if (atomic_load(&nr_parked))
				run_parked(x);
			watching = watch_interrupts(UVM_SERVICE_NATIVE);
			next_tick = 0;
			continue;
		}
		if (atomic_load_explicit(&nr_parked, memory_order_relaxed)) {
			uint64_t now = sys_now_ns();
			if (now > next_tick) {
				run_parked(x);
				next_tick = now + TICK_MS * 1000000;
			}
		}
	}
	uvm_interrupt_watch(UVM_SERVICE_NATIVE, false);
	return NULL;
}

/* ---- inline: the touching thread itself -------------------------------------------------------------------- */
static struct uvm_executor inline_executors[NR_INLINE];
static _Atomic int inline_busy[NR_INLINE];

/* A uffd in SIGBUS mode has no fault messages, but an mremap of ours waits until its event is read. */
static void *inline_events_main(void *arg)
{
	struct uffd_msg m;
	int uffd = services[UVM_SERVICE_INLINE].uffd;
	(void)arg;
	while (!atomic_load(&stopping[UVM_SERVICE_INLINE])) {
		struct pollfd fds[1] = {{.fd = uffd, .events = POLLIN}};
		ppoll(fds, 1, &(struct timespec){0, 200000000}, NULL);
		while (uvm_service_check(UVM_SERVICE_INLINE) && read(uffd, &m, sizeof m) > 0)
			;
		if (uvm_service_uffd(UVM_SERVICE_INLINE) < 0)
			break;
		watch_interrupts(UVM_SERVICE_INLINE);
	}
	uvm_interrupt_watch(UVM_SERVICE_INLINE, false);
	return NULL;
}

static struct uvm_executor *inline_take(int *slot)
{
	for (;;) {
		for (int i = 0; i < NR_INLINE; i++) {
			int free_ = 0;
			if (atomic_compare_exchange_strong(&inline_busy[i], &free_, 1)) {
				*slot = i;
				return &inline_executors[i];
			}
		}
		usleep(50);
	}
}

/* Where the kernel does not say (a process that gave up its uid may not read its own pagemap) it is what
 * we believe. */
static bool is_protected(struct uvm_region *r, uint64_t index, unsigned entry)
{
	int truth = uvm_kernel_truth(r, index);
	if (truth < 0)
		return entry == UVM_PTE_WRITE_PROTECTED || entry == UVM_PTE_ZERO_WP;
	return truth == UVM_TRUTH_PRESENT_WP;
}

int uvm_inline_fault(uint64_t address, bool write)
{
	int slot;
	struct uvm_region *r = uvm_region_find(address);
	if (!r)
		return 0;
	bool ours = r->service == UVM_SERVICE_INLINE;
	if (ours && !checked_lately(UVM_SERVICE_INLINE)) {
		uvm_region_put(r);
		return 1; /* the instruction runs again, into memory that is inaccessible */
	}
	uint64_t index = (address - r->start) >> UVM_PAGE_SHIFT;
	/* SIGBUS does not say what kind of fault it was; the tables do: a write to a page that we keep
	 * write-protected, a page of the cache that is not mapped here, or a missing one. */
	unsigned flags = 0, pte = uvm_walk(r, index, UVM_KIND_MISSING, &flags);
	unsigned entry = atomic_load(&r->ptes[index]);
	int kind = UVM_KIND_MISSING;
	bool present = entry == UVM_PTE_WRITE_PROTECTED || entry == UVM_PTE_ZERO_WP ||
		       entry == UVM_PTE_PRESENT || entry == UVM_PTE_ZERO;
	if (r->register_mode & UFFDIO_REGISTER_MODE_MINOR) {
		/* Cached as far as we know: somebody may have dropped it from the memfd by hand. */
		if (flags & UVM_FLAG_CACHED && write && present && is_protected(r, index, entry))
			kind = UVM_KIND_WP;
		else if (flags & UVM_FLAG_CACHED && uvm_cache_has(r->cache, r->pgoff + index))
			kind = UVM_KIND_MINOR;
	} else if (write && present && r->register_mode & UFFDIO_REGISTER_MODE_WP) {
		/* Of a page that we do not protect the kernel is asked: it may have been dropped. */
		bool armed = entry == UVM_PTE_WRITE_PROTECTED || entry == UVM_PTE_ZERO_WP;
		kind = armed || is_protected(r, index, entry) ? UVM_KIND_WP : UVM_KIND_MISSING;
	}
	(void)pte;
	uvm_region_put(r);
	if (!ours)
		return 0;
	struct uvm_fault f = {
		.address = address & ~(uint64_t)(UVM_PAGE - 1),
		.t_ns = sys_now_ns(),
		.tid = sys_gettid(),
		.kind = (uint8_t)kind,
		.access = write,
		.service = UVM_SERVICE_INLINE,
	};
	uvm_chain_continue(&f);
	struct uvm_executor *x = inline_take(&slot);
	x->failed = false;
	uvm_handle_mm_fault(x, &f);
	bool failed = x->failed;
	atomic_store(&inline_busy[slot], 0);
	return failed ? -1 : 1;
}

/* ---- starting and stopping ------------------------------------------------------------------------------------ */
static int uffd_open(int service)
{
	const struct uvm_config *c = &uvm_space.config;
	uint64_t features = c->uffd_features, ioctls;
	if (service == UVM_SERVICE_INLINE)
		features |= UFFD_FEATURE_SIGBUS;
	int fd = c->uffd_from_device ? sys_uffd_from_device(c->uffd_flags)
				     : sys_userfaultfd(c->uffd_flags);
	if (fd < 0)
		return fd;
	int rc = sys_uffd_api(fd, &features, &ioctls);
	if (rc == 0)
		rc = uvm_file_id(fd, &services[service].id);
	if (rc < 0) {
		close(fd);
		return rc;
	}
	return fd;
}

int uvm_service_uffd(int service)
{
	return __atomic_load_n(&services[service].uffd, __ATOMIC_ACQUIRE);
}

uint64_t uvm_service_epoch(int service)
{
	return services[service].epoch;
}

int uvm_python_uffd(void)
{
	pthread_mutex_lock(&uvm_space.mutex);
	int fd = services[UVM_SERVICE_PYTHON].uffd;
	pthread_mutex_unlock(&uvm_space.mutex);
	return fd >= 0 ? fd : -ENOENT;
}

static int threads_start(int service)
{
	struct service *s = &services[service];
	int rc = uvm_keeper_start(service, s->uffd);
	if (service == UVM_SERVICE_PYTHON || rc < 0)
		return rc;
	if (event_fd < 0)
		event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	if (event_fd < 0 || uvm_file_id(event_fd, &event_id) < 0)
		return -errno;
	atomic_store(&stopping[service], 0);
	rc = workers_start();
	if (service == UVM_SERVICE_INLINE) {
		for (int i = 0; rc == 0 && i < NR_INLINE; i++) {
			rc = executor_get(&inline_executors[i], true, service);
			atomic_store(&inline_busy[i], 0);
		}
		if (rc == 0)
			rc = uvm_thread_create(&s->thread, "uvm-events", inline_events_main, NULL);
	} else {
		if (rc == 0)
			rc = executor_get(&fault_executor, false, service);
		if (rc == 0)
			rc = uvm_thread_create(&s->thread, "uvm-fault", fault_main,
					       &fault_executor);
	}
	s->has_thread = rc == 0;
	return rc;
}

static void executors_put(int service)
{
	if (service == UVM_SERVICE_NATIVE)
		uvm_executor_deinit(&fault_executor);
	else if (service == UVM_SERVICE_INLINE)
		for (int i = 0; i < NR_INLINE; i++)
			uvm_executor_deinit(&inline_executors[i]);
}

static void threads_stop(int service)
{
	struct service *s = &services[service];
	if (s->has_thread) {
		atomic_store(&stopping[service], 1);
		uvm_poke_fault_thread();
		pthread_join(s->thread, NULL);
		s->has_thread = false;
	}
	uvm_keeper_stop(service);
	executors_put(service);
	if (!services[UVM_SERVICE_NATIVE].has_thread && !services[UVM_SERVICE_INLINE].has_thread) {
		workers_end();
		pthread_mutex_lock(&parked_lock);
		atomic_store(&nr_parked, 0);
		pthread_mutex_unlock(&parked_lock);
		if (event_fd >= 0)
			close(event_fd);
		event_fd = -1;
	}
}

int uvm_service_start(int service)
{
	struct service *s = &services[service];
	(void)uvm_service_check(service);
	if (s->users++ && s->uffd >= 0)
		return 0;
	if (!uvm_space.configured) {
		s->users--;
		return -ENOTCONN;
	}
	if (s->users > 1)
		threads_stop(service); /* its regions are inaccessible; a new one begins */
	int fd = uffd_open(service);
	if (fd < 0) {
		s->users--;
		return fd;
	}
	s->uffd = fd;
	s->epoch++;
	int rc = threads_start(service);
	if (rc < 0) {
		threads_stop(service);
		close(fd);
		s->uffd = -1;
		s->users--;
	}
	return rc;
}

void uvm_service_stop(int service)
{
	struct service *s = &services[service];
	if (--s->users)
		return;
	(void)uvm_service_check(service);
	threads_stop(service);
	/* No region is registered any more: this close can let nobody read zeros. */
	if (s->uffd >= 0)
		close(s->uffd);
	s->uffd = -1;
}

/* ---- fork --------------------------------------------------------------------------------------------------------- */
void uvm_service_prepare(void)
{
	pthread_mutex_lock(&queue_lock);
	pthread_mutex_lock(&parked_lock);
}

void uvm_service_parent(void)
{
	pthread_mutex_unlock(&parked_lock);
	pthread_mutex_unlock(&queue_lock);
}

int uvm_service_child_uffds(void)
{
	int first = 0;
	uvm_keepers_child();
	nr_workers = 0;
	queue_head[0] = queue_tail[0] = queue_head[1] = queue_tail[1] = 0;
	atomic_store(&nr_jobs, 0);
	atomic_store(&nr_parked, 0);
	pthread_cond_init(&queue_cond, NULL);
	pthread_mutex_unlock(&parked_lock);
	pthread_mutex_unlock(&queue_lock);
	if (event_fd >= 0)
		close(event_fd);
	event_fd = -1;
	for (int i = 0; i < 3; i++) {
		struct service *s = &services[i];
		s->has_thread = false;
		if (s->uffd < 0)
			continue;
		close(s->uffd); /* the parent's memory; a copy here would keep its faulters waiting */
		s->uffd = -1;
		if (i == UVM_SERVICE_PYTHON)
			continue; /* its regions move to the native service */
		s->uffd = uffd_open(i);
		s->epoch++;
		if (s->uffd < 0 && first == 0)
			first = s->uffd;
	}
	return first;
}

int uvm_service_child_move(int from, int to)
{
	services[from].users--;
	if (services[to].users++ == 0) {
		services[to].uffd = uffd_open(to);
		services[to].epoch++;
	}
	return services[to].uffd < 0 ? services[to].uffd : 0;
}

int uvm_service_child_threads(void)
{
	int first = 0;
	for (int i = 0; i < UVM_MAX_WORKERS; i++)
		uvm_executor_deinit(&worker_executors[i]);
	for (int i = 0; i < 3; i++) {
		executors_put(i); /* copies of the parent's */
		if (services[i].uffd < 0)
			continue;
		int rc = threads_start(i);
		if (rc < 0 && first == 0)
			first = rc;
	}
	return first;
}

/* ---- configuration, statistics ---------------------------------------------------------------------------------- */
int uvm_configure(const struct uvm_config *config)
{
	if (config->nr_workers < 1 || config->nr_workers > UVM_MAX_WORKERS)
		return -EINVAL;
	pthread_mutex_lock(&uvm_space.mutex);
	uvm_space.config = *config;
	uvm_space.configured = true;
	pthread_mutex_unlock(&uvm_space.mutex);
	return 0;
}

void uvm_process_stats(struct uvm_process_stats *out)
{
	memset(out, 0, sizeof *out);
	pthread_mutex_lock(&uvm_space.mutex);
	out->nr_regions = uvm_space.nr_regions;
	out->nr_caches = uvm_space.nr_caches;
	out->nr_forked = uvm_space.nr_forked;
	out->nr_threads = (uint64_t)(nr_workers + uvm_nr_keepers());
	for (int i = 0; i < 3; i++) {
		out->nr_threads += services[i].has_thread;
		out->nr_fds += services[i].uffd >= 0;
	}
	out->nr_fds += (uvm_space.pagemap_fd >= 0) + (event_fd >= 0);
	out->nr_placeholders = (uint64_t)uvm_failure_nr_placeholders();
	pthread_mutex_unlock(&uvm_space.mutex);
}
