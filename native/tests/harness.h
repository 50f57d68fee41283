/* What the programs in here share: checks that say where, files and mappings, regions by one call.
 * They drive the C API of ../uffd_vm.h as the Python side does, so that the sanitizers see all of native
 * code and nothing else.
 *
 * Content: page p of a file (as of generation g) holds the 64-bit word word_of(p, g) throughout; no such
 * word is zero, so zeros read from a file region are always an error. */
#ifndef UVM_TESTS_HARNESS_H
#define UVM_TESTS_HARNESS_H

#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>

/* TSan's deadlock detector knows at most 64 locks held at once (it aborts beyond), and
 * uvm_ptl_lock_all() holds that many. A child that goes on with threads is what fork.c is for. */
const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
	return "detect_deadlocks=0:die_after_fork=0";
}

#define CHECK(cond)                                                                                \
	do {                                                                                       \
		if (!(cond)) {                                                                     \
			fprintf(stderr, "%s:%d: pid %d: not so: %s\n", __FILE__, __LINE__,         \
				(int)getpid(), #cond);                                             \
			_exit(1);                                                                  \
		}                                                                                  \
	} while (0)

#define CHECK_EQ(a, b)                                                                             \
	do {                                                                                       \
		long long a_ = (long long)(a), b_ = (long long)(b);                                \
		if (a_ != b_) {                                                                    \
			fprintf(stderr, "%s:%d: pid %d: %s is %lld, not %s (%lld)\n", __FILE__,    \
				__LINE__, (int)getpid(), #a, a_, #b, b_);                          \
			_exit(1);                                                                  \
		}                                                                                  \
	} while (0)

enum { WORDS = UVM_PAGE / 8 };

/* A touch that fails says by which decision, before it kills. */
static inline void on_sigbus_(int sig, siginfo_t *si, void *context)
{
	struct uvm_region *r = uvm_region_find((uint64_t)(uintptr_t)si->si_addr);
	struct uvm_region_ctl *ctl = r ? r->ctl : NULL;
	(void)context;
	usleep(50000); /* the record is written after the poison */
	fprintf(stderr, "pid %d: signal %d, code %d, at %p, page %lld\n", (int)getpid(), sig,
		si->si_code, si->si_addr,
		r ? ((long long)(uintptr_t)si->si_addr - (long long)r->start) / UVM_PAGE : -1);
	for (int i = 0; ctl && i < UVM_TRACE_RECORDS; i++) {
		struct uvm_trace_record *t = &ctl->trace[i];
		if (t->seq && (t->err || t->result & UVM_VM_FAULT_SIGBUS))
			fprintf(stderr,
				"  fault %llu: page %llu kind %d access %d pte %d flags %#x row %d "
				"action %d "
				"commit %d result %#x err %d tries %d\n",
				(unsigned long long)t->seq, (unsigned long long)t->index, t->kind,
				t->access, t->pte, t->flags, t->row, t->action, t->commit,
				t->result, t->err, t->tries);
	}
	if (r) {
		uint64_t page = ((uint64_t)(uintptr_t)si->si_addr - r->start) / UVM_PAGE;
		fprintf(stderr, "  its entry is %d, in the kernel's truth %d\n", r->ptes[page],
			uvm_kernel_truth(r, page));
	}
	signal(sig, SIG_DFL);
}

static inline uint64_t word_of(uint64_t page, uint64_t generation)
{
	return (page + 1) * 0x9e3779b97f4a7c15u + generation * 2 + 1;
}

static inline void configure(uint64_t spin_ns)
{
	struct uvm_config config = {
		.uffd_features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_EVENT_REMAP |
				 UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_THREAD_ID |
				 UFFD_FEATURE_MINOR_SHMEM | UVM_FEATURE_WP_HUGETLBFS_SHMEM |
				 UVM_FEATURE_WP_UNPOPULATED | UVM_FEATURE_POISON,
		.uffd_flags = O_CLOEXEC | O_NONBLOCK,
		.nr_workers = 2,
		.spin_ns = spin_ns,
	};
	uint64_t features = config.uffd_features, ioctls;
	struct sigaction fatal = {.sa_sigaction = on_sigbus_, .sa_flags = SA_SIGINFO};
	setvbuf(stdout, NULL, _IOLBF, 0);
	sigaction(SIGBUS, &fatal, NULL);
	int fd = uvm_userfaultfd(config.uffd_flags);
	if (fd < 0) {
		printf("no userfaultfd here (%s); run as root, or sysctl "
		       "vm.unprivileged_userfaultfd=1\n",
		       strerror(-fd));
		exit(77);
	}
	int rc = uvm_uffd_api(fd, &features, &ioctls);
	close(fd);
	if (rc < 0) {
		printf("this kernel lacks features that these tests need; use Linux 6.6 or "
		       "later\n");
		exit(77);
	}
	CHECK_EQ(uvm_configure(&config), 0);
}

/* ---- files ----------------------------------------------------------------------------------------- */
static inline int file_make(uint64_t bytes)
{
	char path[] = "/tmp/uffd_vm-test-XXXXXX";
	uint64_t page[WORDS];
	int fd = mkstemp(path);
	CHECK(fd >= 0);
	unlink(path);
	for (uint64_t p = 0; p * UVM_PAGE < bytes; p++) {
		for (int i = 0; i < WORDS; i++)
			page[i] = word_of(p, 0);
		uint64_t left = bytes - p * UVM_PAGE;
		size_t n = left < UVM_PAGE ? left : UVM_PAGE;
		CHECK_EQ(pwrite(fd, page, n, (off_t)(p * UVM_PAGE)), n);
	}
	return fd;
}

static inline uint64_t file_word(int fd, uint64_t page, int i)
{
	uint64_t word = 0;
	CHECK(pread(fd, &word, sizeof word, (off_t)(page * UVM_PAGE + (uint64_t)i * 8)) > 0);
	return word;
}

static inline int cache_make_(int fd, uint64_t cap_bytes, int writable)
{
	struct stat st;
	CHECK_EQ(fstat(fd, &st), 0);
	int id = uvm_cache_create(fd, (uint64_t)st.st_size,
				  (int64_t)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec,
				  cap_bytes, writable);
	CHECK(id >= 0);
	return id;
}

/* ---- regions --------------------------------------------------------------------------------------- */
enum region_kind { ANON, ANON_TRACKED, FILE_R, FILE_C, FILE_C_TRACKED, FILE_RW, NR_REGION_KINDS };

static const char *const region_kind_names[NR_REGION_KINDS] = {
	"anonymous", "anonymous, tracked", "r", "c", "c, tracked", "r+"};

struct options {
	uint64_t cap_bytes;               /* 0: none */
	uint32_t fault_around, readahead; /* pages; fault_around 0: 1 */
	uint64_t deadline_ns;             /* 0: 30 s */
	int on_error;                     /* enum uvm_on_error */
	uint64_t pgoff;                   /* of a further region over a cache */
};

struct region {
	int kind, cache;
	int64_t handle;
	volatile uint64_t *mem;
	uint64_t nr_pages;
};

static inline bool kind_writable(int kind)
{
	return kind != FILE_R;
}
static inline bool kind_of_file(int kind)
{
	return kind >= FILE_R;
}
static inline bool kind_tracked(int kind)
{
	return kind == ANON_TRACKED || kind == FILE_C_TRACKED || kind == FILE_RW;
}

/* Maps nr_pages of a cache (-1: anonymous) and registers them. */
static inline struct region region_map(int kind, int cache, uint64_t nr_pages, struct options o)
{
	static const int backings[] = {UVM_BACKING_ANON,         UVM_BACKING_ANON,
				       UVM_BACKING_SHARED_FILE,  UVM_BACKING_PRIVATE_FILE,
				       UVM_BACKING_PRIVATE_FILE, UVM_BACKING_SHARED_FILE};
	int prot = PROT_READ | (kind_writable(kind) ? PROT_WRITE : 0);
	int flags = cache < 0                                   ? MAP_PRIVATE | MAP_ANONYMOUS
		    : backings[kind] == UVM_BACKING_SHARED_FILE ? MAP_SHARED
								: MAP_PRIVATE;
	void *p = mmap(NULL, nr_pages * UVM_PAGE, prot, flags | MAP_NORESERVE,
		       cache < 0 ? -1 : uvm_cache_data_fd(cache), (off_t)(o.pgoff * UVM_PAGE));
	CHECK(p != MAP_FAILED);
	struct uvm_region_args args = {
		.start = (uint64_t)(uintptr_t)p,
		.len = nr_pages * UVM_PAGE,
		.pgoff = o.pgoff,
		.backing = backings[kind],
		.service = UVM_SERVICE_NATIVE,
		.cache = cache,
		.writable = kind_writable(kind),
		.flags = kind_tracked(kind) ? UVM_FLAG_TRACKED : 0,
		.on_error = o.on_error ? o.on_error : UVM_ON_ERROR_SIGBUS,
		.fault_around_pages = o.fault_around ? o.fault_around : 1,
		.readahead_pages = o.readahead,
		.deadline_ns = o.deadline_ns ? o.deadline_ns : 30000000000u,
	};
	int64_t handle = uvm_region_create(&args);
	if (handle < 0)
		fprintf(stderr, "%s: %s\n", region_kind_names[kind], strerror((int)-handle));
	CHECK(handle > 0);
	return (struct region){kind, cache, handle, p, nr_pages};
}

/* A region with a cache of its own over the whole file (which anonymous memory ignores). */
static inline struct region region_make(int kind, int fd, uint64_t nr_pages, struct options o)
{
	if (!kind_of_file(kind))
		return region_map(kind, -1, nr_pages, o);
	int cache = cache_make_(fd, o.cap_bytes ? o.cap_bytes : UINT64_MAX >> 1, kind == FILE_RW);
	struct region r = region_map(kind, cache, nr_pages, o);
	CHECK_EQ(uvm_cache_put(cache), 0); /* the region holds it from here on */
	return r;
}

static inline void region_close(struct region *r)
{
	CHECK_EQ(uvm_region_close_begin(r->handle), 0);
	CHECK_EQ(munmap((void *)(uintptr_t)r->mem, r->nr_pages * UVM_PAGE), 0);
	CHECK_EQ(uvm_region_close_end(r->handle), 0);
	CHECK_EQ(uvm_region_check(r->handle), -ESTALE);
}

static inline uint64_t counter(const struct region *r, int which)
{
	return __atomic_load_n(&uvm_region_ctl(r->handle)->counters[which], __ATOMIC_RELAXED);
}

/* Of what other threads count. */
#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)

static inline uint64_t peek(const struct region *r, uint64_t page, int i)
{
	return __atomic_load_n(&r->mem[page * WORDS + (uint64_t)i], __ATOMIC_RELAXED);
}
static inline void poke(const struct region *r, uint64_t page, int i, uint64_t word)
{
	__atomic_store_n(&r->mem[page * WORDS + (uint64_t)i], word, __ATOMIC_RELAXED);
}

static inline uint64_t untouched_word(const struct region *r, uint64_t page)
{
	return kind_of_file(r->kind) ? word_of(page, 0) : 0;
}

/* A woken thread may run before the service has published what it did: wait for it. */
#define EVENTUALLY(cond)                                                                           \
	do {                                                                                       \
		for (int tries_ = 0; !(cond) && tries_ < 5000; tries_++)                           \
			usleep(1000);                                                              \
		CHECK(cond);                                                                       \
	} while (0)

static inline void nothing_is_left(void)
{
	struct uvm_process_stats s;
	EVENTUALLY((uvm_process_stats(&s), s.nr_caches == 0));
	CHECK_EQ(s.nr_regions, 0);
	CHECK_EQ(s.nr_threads, 0);
	CHECK_EQ(s.nr_fds, 0);
}

/* Runs fn in a forked child; its exit status must be 0. */
static inline void wait_child(pid_t pid)
{
	int status;
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	if (status)
		fprintf(stderr, "child %d: wait status %#x\n", (int)pid, status);
	CHECK_EQ(status, 0);
}

#endif
