/* The one header of the native part. What stands between the two markers is fed to cffi's cdef as it
 * is, so it keeps to declarations that cffi's parser knows; everything else comes after.
 *
 * Conventions: functions return >= 0 or -errno. Addresses and lengths are bytes, `pgoff`, `index` and
 * `nr_pages` are pages. A region handle carries the slot and its generation: a handle kept past close
 * answers -ESTALE. */
#ifndef UFFD_VM_H
#define UFFD_VM_H

#include <stdint.h>

/* cdef begin */

/* ---- results ---------------------------------------------------------------------------------- */
struct uvm_done {
	int err;      /* errno of the call, 0 if it succeeded */
	int64_t done; /* the ioctl's out field: bytes done, -errno, or untouched (see below) */
};
#define UVM_DONE_UNTOUCHED -4611686018427387904

/* ---- fault injection: the operations that can be made to fail (see sys.h) ---------------------- */
enum uvm_op {
	UVM_OP_USERFAULTFD,
	UVM_OP_API,
	UVM_OP_REGISTER,
	UVM_OP_UNREGISTER,
	UVM_OP_WAKE,
	UVM_OP_WRITEPROTECT,
	UVM_OP_COPY,
	UVM_OP_ZEROPAGE,
	UVM_OP_CONTINUE,
	UVM_OP_POISON,
	UVM_OP_MOVE,
	UVM_OP_PAGEMAP_SCAN,
	UVM_OP_PREAD,
	UVM_OP_PREAD_NOWAIT,
	UVM_OP_PWRITE,
	UVM_OP_FSYNC,
	UVM_OP_PUNCH,
	UVM_OP_MADVISE,
	UVM_OP_MMAP,
	UVM_OP_MEMFD,
	UVM_OP_FSTAT,
	UVM_OP_NR
};
/* From the skip-th call of `op` on, `count` calls return -err after delay_ns (err 0: only the delay). */
int uvm_inject(int op, uint64_t skip, uint64_t count, int err, uint64_t delay_ns);
void uvm_inject_clear(void);
uint64_t uvm_inject_calls(int op); /* calls of op seen since uvm_inject() armed it */

/* ---- the kernel face, one call each: used by uffd_vm/kernel and the Python fault service -------- */
int uvm_userfaultfd(int flags);      /* the syscall */
int uvm_uffd_from_device(int flags); /* /dev/userfaultfd */
int uvm_uffd_api(int fd, uint64_t *features, uint64_t *ioctls);
int uvm_uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls);
int uvm_uffd_unregister(int fd, uint64_t start, uint64_t len);
int uvm_uffd_wake(int fd, uint64_t start, uint64_t len);
int uvm_uffd_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode);
struct uvm_done uvm_uffd_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode);
struct uvm_done uvm_uffd_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode);
struct uvm_done uvm_uffd_continue(int fd, uint64_t start, uint64_t len, uint64_t mode);
struct uvm_done uvm_uffd_poison(int fd, uint64_t start, uint64_t len, uint64_t mode);
struct uvm_done uvm_uffd_move(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode);
struct uvm_pm_region {
	uint64_t start, end, categories;
};
/* One PAGEMAP_SCAN step of this process: fills at most vec_len entries, returns how many, and where
 * the walk ended. category_* select as in the kernel's struct pm_scan_arg (inverted = 0). */
int uvm_pagemap_scan(int pagemap_fd, uint64_t start, uint64_t end, uint64_t flags,
		     uint64_t category_mask, uint64_t category_anyof_mask, uint64_t return_mask,
		     uint64_t max_pages, struct uvm_pm_region *vec, uint64_t vec_len,
		     uint64_t *walk_end);
int uvm_mmap_populates(void); /* 1: mlockall(MCL_FUTURE) is in force, without MCL_ONFAULT */
int uvm_madvise(uint64_t start, uint64_t len, int advice);
int uvm_mprotect(uint64_t start, uint64_t len, int prot);
/* Touches each page in user mode: reads a byte, or stores the byte that is there. For uffds that send no
 * fault of a system call (UFFD_FEATURE_SIGBUS, UFFD_USER_MODE_ONLY), MADV_POPULATE_* included. Ends at the
 * first page whose failure this thread is to be told. */
void uvm_touch(uint64_t start, uint64_t nr_pages, int write);

/* ---- fault records ---------------------------------------------------------------------------- */
/* One resolved (or failed) fault, as the kernel's words name it; the ring is written by the executor
 * and read without locks (seq is written last; a reader skips a torn record). */
struct uvm_trace_record {
	uint64_t seq; /* 1, 2, 3 ...; 0 = never written */
	uint64_t t_ns;
	uint64_t index;
	uint32_t tid;
	uint32_t latency_ns; /* message read -> thread woken */
	uint32_t result;     /* VM_FAULT_* */
	int32_t err;         /* errno of what failed, 0 */
	uint32_t nr_pages;   /* committed for this fault, fault-around included */
	uint16_t flags;      /* FaultFlag */
	uint8_t kind, access, backing, pte, row, action, commit, next_pte;
	uint8_t settlement, tries;
};

enum { UVM_TRACE_RECORDS = 1024, UVM_LATENCY_BUCKETS = 512, UVM_MAX_COUNTERS = 64 };

/* What a region's executor publishes and the owner reads: trace, counters, latency. The page-table
 * bytes follow at offset UVM_REGION_CTL_BYTES, for a small region in the page of the counters: what a
 * fault touches lies together, or the thousandth region would be slower than the first. For
 * service="python" this lies in a memfd that both processes map; else it is private memory, of which a
 * forked child has its own copy. */
struct uvm_region_ctl {
	struct uvm_trace_record trace[1024]; /* 14 whole pages */
	uint64_t counters[64];
	uint64_t
		nr_present; /* pages with pte PRESENT, WRITE_PROTECTED, ZERO*: this address space */
	uint64_t trace_head;   /* records written so far */
	uint64_t advice;       /* enum uvm_advice: how far its executor reads ahead */
	uint32_t latency[512]; /* log-linear, see uvm_latency_bucket() */
};
enum { UVM_REGION_CTL_BYTES = 59968 };

/* The shared state of a page cache, in its control memfd at UVM_CACHE_CTL_OFFSET; folio words follow at
 * UVM_CACHE_CTL_BYTES: one uint32_t a page, state | owner << 8 (owner: slot | epoch << 12). */
struct uvm_cache_ctl {
	uint64_t nr_pages;
	uint64_t size;    /* bytes of the file when it was mapped */
	int64_t mtime_ns; /* of the version mapped; our own write-back moves it on */
	uint64_t cap_pages;
	uint64_t nr_used; /* pages charged: FILLING, UPTODATE, DIRTY, WRITEBACK */
	uint64_t nr_dirty;
	uint64_t nr_peak;     /* highest nr_used seen */
	uint64_t nr_attached; /* processes that fill it: the owner and its forked children */
	uint64_t wb_err_seq; /* counts failed write-backs (errseq_t): each flusher sees each once */
	int64_t wb_err;      /* errno of the last one */
	uint64_t nr_writing; /* writes of the Python service under way: mtime is moving */
	uint64_t nr_pins;    /* places of the table of pins that were ever in use */
	uint64_t pins_at;    /* bytes from the start of the memfd: index, nr_pages, owner each */
};
/* The least that a cap can be: one instruction may need several pages at once. */
enum { UVM_MIN_CAP_PAGES = 8 };
enum { UVM_CACHE_CTL_OFFSET = 65536, UVM_CACHE_CTL_BYTES = 66560 };

/* ---- page caches ------------------------------------------------------------------------------ */
/* Makes a cache over an open regular file of `size` bytes. Takes ownership of neither fd: it dups
 * file_fd. Returns a cache id. */
int uvm_cache_create(int file_fd, uint64_t size, int64_t mtime_ns, uint64_t cap_bytes,
		     int writable);
int uvm_cache_put(int cache);     /* drops the creator's reference; freed with its last region */
int uvm_cache_data_fd(int cache); /* the memfd that regions map; owned by the cache */
int uvm_cache_ctl_fd(int cache);
int uvm_cache_file_fd(int cache);
struct uvm_cache_ctl *uvm_cache_ctl(int cache);
uint32_t *uvm_cache_folios(int cache);
int uvm_cache_check(int cache); /* -EBADFD: the program closed its descriptors */

/* ---- regions ---------------------------------------------------------------------------------- */
enum uvm_service_kind { UVM_SERVICE_NATIVE, UVM_SERVICE_PYTHON, UVM_SERVICE_INLINE };
enum uvm_on_error { UVM_ON_ERROR_RAISE, UVM_ON_ERROR_SIGBUS };
enum uvm_advice { UVM_ADVICE_NORMAL, UVM_ADVICE_SEQUENTIAL, UVM_ADVICE_RANDOM };

struct uvm_region_args {
	uint64_t start, len;         /* an existing mapping, page-aligned */
	uint64_t pgoff;              /* of its first page in the cache */
	int backing;                 /* Backing */
	int service;                 /* enum uvm_service_kind */
	int cache;                   /* cache id, -1 for anonymous memory */
	int writable;                /* stores are allowed */
	int flags;                   /* FaultFlag of every fault here: TRACKED, HOOK */
	int on_error;                /* enum uvm_on_error */
	uint32_t fault_around_pages; /* 1 = off; a power of two */
	uint32_t readahead_pages;    /* 0 = off; largest window */
	uint64_t deadline_ns;        /* a fault older than this is poisoned */
};

int64_t uvm_region_create(const struct uvm_region_args *args); /* handle */
/* Close: begin stops the service for it and waits for what is in flight; then the caller unmaps, and
 * says end; or abort, when views still live. */
int uvm_region_close_begin(int64_t region);
int uvm_region_close_abort(int64_t region);
int uvm_region_close_end(int64_t region);
struct uvm_region_ctl *uvm_region_ctl(int64_t region); /* NULL if stale */
uint8_t *uvm_region_ptes(int64_t region);
/* Where the Python service armed pages that had been written ("collect"): sets written[i], a byte a page,
 * NULL for none; `clear`: this is told then, and forgotten. Elsewhere there are none. */
int uvm_region_written(int64_t region, uint64_t index, uint64_t nr_pages, uint8_t *written,
		       int clear);
/* 0; -ESTALE; or why it was made inaccessible in this process, and what to say: one of these, or in a forked
 * child the -errno for which it could not be served there. */
enum uvm_lost {
	UVM_LOST_TO_SERVICE = -66, /* -EREMOTE: the parent's Python service writes its pages back */
	UVM_LOST_TO_CLOSE =
		-77 /* -EBADFD: the program closed the descriptors that it is served by */
};
int uvm_region_check(int64_t region);
const char *uvm_lost_reason(int err);
/* Waits (20 ms at most) for executors that are inside the region. A commit wakes the toucher before the
 * executor has counted and traced the fault: after this call the toucher's own faults are counted. */
int uvm_region_settle(int64_t region);
int uvm_region_advise(int64_t region, int advice);

/* Synchronous work of the calling thread on pages [index, index + nr_pages): no fault is taken.
 * On failure *failed_index tells which page. */
int uvm_region_load(int64_t region, uint64_t index, uint64_t nr_pages, uint64_t *failed_index);
/* The caller is about to try again: what is poisoned is missing again. service="python", before a load. */
int uvm_region_unpoison(int64_t region, uint64_t index, uint64_t nr_pages);
int uvm_region_prefetch(int64_t region, uint64_t index,
			uint64_t nr_pages); /* queued; -EAGAIN: queue full */
int64_t uvm_region_evict(int64_t region, uint64_t index, uint64_t nr_pages); /* pages given back */
/* Of a writable shared mapping: from here on these pages are never made clean, nor evicted, once they are
 * dirty; the caller makes them so, and again before unpin. Returns the number of the pin; -ENOBUFS: too
 * much of the cap would be pinned; -EMFILE: too many pins. */
int uvm_region_pin(int64_t region, uint64_t index, uint64_t nr_pages);
int uvm_region_unpin(int64_t region, int pin); /* of this process; another's is left alone */
int uvm_region_flush(int64_t region, uint64_t index, uint64_t nr_pages); /* durable on return */
/* Returns pages armed; written[i], unless it is NULL: 1 if page index + i was writable until then. */
int64_t uvm_region_protect(int64_t region, uint64_t index, uint64_t nr_pages, uint8_t *written);
/* One PteState byte a page, as the next fault would find it (page-table entry joined with the folio). */
int uvm_region_walk(int64_t region, uint64_t index, uint64_t nr_pages, uint8_t *states);
int64_t uvm_region_resident(int64_t region); /* pages that take memory for this region's range */

/* ---- failure ---------------------------------------------------------------------------------- */
enum uvm_failure_kind {
	UVM_FAILURE_NONE,
	UVM_FAILURE_SOURCE,  /* the source said an errno */
	UVM_FAILURE_TIMEOUT, /* the region's deadline passed */
	UVM_FAILURE_CHANGED, /* size or mtime of the file is not what was mapped */
	UVM_FAILURE_PAGER,   /* the serving process died */
	UVM_FAILURE_OOM,
	UVM_FAILURE_BUG,       /* a decision that no executor can carry out */
	UVM_FAILURE_INTERRUPT, /* Ctrl-C while waiting: no exception of ours is set */
	UVM_FAILURE_NR
};
struct uvm_failure {
	int64_t region; /* handle, 0 = none */
	uint64_t index;
	int kind; /* enum uvm_failure_kind */
	int err;
};
/* Installs the SIGBUS handler (idempotent). Says whether ours is in force: 1 yes, 0 replaced since. */
int uvm_sigbus_install(void);
int uvm_sigbus_in_force(void);
/* The first signal of ours (SIGBUS, SIGSEGV, SIGTRAP) that somebody else handles now, and where their
 * handler is (0: SIG_DFL, 1: SIG_IGN); 0: all are in force. */
int uvm_sigbus_replaced(uint64_t *handler);
void uvm_sigbus_remove(void);
/* The exception class (a PyObject *, borrowed: kept alive by the caller) for a kind of failure. */
void uvm_failure_set_class(int kind, uintptr_t py_class);
/* Details of the failure that the calling thread's exception is about; its placeholders are removed,
 * so that the next touch tries again. Returns 1 and fills out, or 0. */
int uvm_failure_take(struct uvm_failure *out);
/* The failure that nobody could be told (a thread unknown to Python): sticky until cleared. */
int uvm_region_failed(int64_t region, struct uvm_failure *out, int clear);
/* The next SIGINT is for the handler before ours, which may stand there for a while yet. */
void uvm_interrupt_pass(void);
int uvm_janitor_start(void);
int uvm_janitor_stop(void);

/* ---- our Python that CPython runs in the middle of other code (callback.c) ---------------------- */
/* An exception set for the calling thread is put off between these two: raised in such a callback, it
 * would be dropped. May be nested. */
void uvm_callback_begin(void);
void uvm_callback_end(void);
/* As these, around os.fork() and its hooks; they take a threading.RLock (a PyObject *, kept alive by the
 * caller), and Ctrl-C waits. */
void uvm_fork_begin(uintptr_t py_lock);
void uvm_fork_end(uintptr_t py_lock);
/* The __del__ of this class (a PyTypeObject *) is such a callback. */
void uvm_callback_is_finalizer(uintptr_t py_type);

/* ---- a fault service in another process (service="python") ------------------------------------- */
/* The uffd that a "python" region is registered with (owned here); the service process gets a dup. */
int uvm_python_uffd(void);
int uvm_region_ctl_fd(int64_t region);
/* The agent: a native thread of the owner that does for the service process what only the owner of
 * the memory can do, and that fails every fault (typed: PagerDied) once `pidfd` is readable. */
int uvm_agent_start(int socket_fd, int pidfd);
int uvm_agent_stop(void);
/* Around a wait for a reply of the process (1, then -1): as for a fault, it is asked for a sign of life,
 * and killed when it is silent for too long. Then the reply is end of file. */
void uvm_agent_await(int more);
/* 0: it lives; EPIPE: it has ended; ETIMEDOUT: it was silent, and killed. */
int uvm_agent_ended(void);
enum uvm_agent_op {
	UVM_AGENT_DONTNEED = 1,
	UVM_AGENT_PROTECT_READ,
	UVM_AGENT_FAILED,
	UVM_AGENT_EVICT,
	UVM_AGENT_INTERRUPTED, /* did Ctrl-C arrive while thread `index` (a tid) waits? nr_pages 0: stop looking */
	UVM_AGENT_ALIVE /* the answer to UVM_AGENT_ASK; has no reply */
};
struct uvm_agent_request { /* 40 bytes, one per message */
	uint32_t op;
	int32_t kind; /* enum uvm_failure_kind, for FAILED */
	int64_t region;
	uint64_t index, nr_pages;
	int32_t err;
	uint32_t seq;
};
struct uvm_agent_reply {
	uint32_t seq; /* of the request, which is never 0 */
	int32_t rc;
};
/* As seq: no reply, the agent asks for a sign of life. The first one says: begin to read faults. */
enum { UVM_AGENT_ASK = 0 };

/* ---- this process ----------------------------------------------------------------------------- */
struct uvm_config {
	uint64_t uffd_features; /* asked for at the handshake: probed by the caller */
	int uffd_flags;         /* O_CLOEXEC | O_NONBLOCK [| UFFD_USER_MODE_ONLY] */
	int uffd_from_device;   /* open through /dev/userfaultfd */
	int nr_workers;
	uint64_t spin_ns; /* how long the fault thread looks for the next fault before it sleeps */
};
int uvm_configure(const struct uvm_config *config);
struct uvm_process_stats {
	uint64_t nr_regions, nr_caches, nr_threads, nr_fds, nr_placeholders, nr_forked;
};
void uvm_process_stats(struct uvm_process_stats *out);

/* ---- the compiled policy, for tests and for uffd-vm table -------------------------------------- */
const uint8_t *uvm_table(int which,
			 uint64_t *len); /* 0 cells 1 admit 2 rows 3 settle 4 legal_pte 5 truth */

/* cdef end */

#endif
