/* What the native files share with each other, and nobody else: the objects, and who may touch them.
 *
 * Lock order, outermost first: space.mutex > spans lock > ptl (one per 2 MiB of address space, as the kernel's
 * split page-table locks) > cache.fifo_lock > parked.mutex, queue.mutex. No lock is held across file
 * I/O; a ptl is held across exactly the ioctl that commits and the store that publishes it. */
#ifndef UVM_INTERNAL_H
#define UVM_INTERNAL_H

#include "sys.h"

#include <pthread.h>

#include "policy_tables.h"

enum {
	UVM_PAGE_SHIFT = 12,
	UVM_PAGE = 1 << UVM_PAGE_SHIFT,
	UVM_PTL_SHARDS = 64,
	UVM_PMD_PAGES = 512,
	UVM_MAX_REGIONS = 65536,
	UVM_MAX_CACHES = 65536,
	UVM_CACHE_SLOT_BITS = 12, /* of the owner in a folio word; 12 bits more are its epoch */
	/* processes that may fill one cache at a time */
	UVM_CACHE_SLOTS = 1 << UVM_CACHE_SLOT_BITS,
	UVM_CACHE_EPOCHS = 1 << 12,
	UVM_CACHE_PINS = 1024, /* of one cache at a time */
	UVM_MAX_PARKED = 4096,
	UVM_MAX_JOBS = 1024,
	UVM_RECENT = UVM_MIN_CAP_PAGES / 2,
	UVM_MAX_WORKERS = 32,
	UVM_BUFFER_BYTES = UVM_PMD_PAGES * UVM_PAGE,
};

#define UVM_NO_INDEX UINT64_MAX

/* ---- descriptors of ours ------------------------------------------------------------------------- */
/* The program may close any number, and open another file there. */
struct uvm_file_id {
	uint64_t dev, ino;
};
int uvm_file_id(int fd, struct uvm_file_id *id);
bool uvm_fd_is(int fd, const struct uvm_file_id *id);

/* ---- policy rows: the layout that fault/table.py packs ------------------------------------------ */
struct uvm_row {
	uint8_t id, action, commit, next_pte; /* next_pte may be UVM_PTE_KEEP */
	uint32_t result;
	uint16_t nr_charge, part4;
	uint16_t may_add; /* VM_FAULT_* bits that only the executor can know */
	uint8_t fallback, pad;
	uint64_t counters;
};
_Static_assert(sizeof(struct uvm_row) == 24, "fault/table.py packs 24 bytes a row");
struct uvm_settled {
	uint8_t settlement;
	uint8_t row; /* that it ends in; 0xff: none */
	uint8_t pad[2];
	uint32_t result;
};
_Static_assert(sizeof(struct uvm_settled) == 8, "fault/table.py packs 8 bytes a settle cell");

const struct uvm_row *uvm_row(int id);
const struct uvm_row *uvm_decide(int kind, int access, int backing, int pte, unsigned flags);
const struct uvm_settled *uvm_settlement(int commit, int errno_class);
/* What the kernel's own answer (UVM_TRUTH_*) means after VERIFY, or for Action SCAN (commit WAKE). */
const struct uvm_settled *uvm_settle_truth(int commit, int truth, int backing);
int uvm_classify(struct uvm_done done);

/* ---- page cache ---------------------------------------------------------------------------------- */
/* One process that fills a shared cache. A folio word names its filler by slot and epoch, so that
 * FILLING of a dead process is recognised (and taken over) and never confused with a new one. */
struct uvm_cache_slot {
	_Atomic int32_t pid;
	_Atomic uint32_t epoch;
	_Atomic uint64_t start_time; /* field 22 of /proc/pid/stat */
};

/* Extents in the order they were filled: what reclaim takes first (recency is not visible to us). */
struct uvm_extent {
	uint64_t index;
	uint64_t nr_pages;
};

/* Pages that a device may write to, seen by nobody: never clean while the pin lasts, so never evicted. It
 * ends with its process. Behind the queue of extents in the control memfd, at ctl.pins_at. */
struct uvm_cache_pin {
	_Atomic uint64_t index, nr_pages; /* nr_pages 0: free */
	_Atomic uint64_t owner;           /* as in a folio word */
};
_Static_assert(sizeof(struct uvm_cache_pin) == 24, "filemap.py reads three words");

/* The start of the control memfd; folio words, the queue of extents and the pins follow. What a fault of a
 * small cache touches lies in one page. */
struct uvm_cache_shared {
	struct uvm_cache_slot slots[UVM_CACHE_SLOTS];
	struct uvm_cache_ctl ctl;
	pthread_mutex_t fifo_lock;                /* process-shared, robust */
	uint64_t fifo_head, fifo_tail, fifo_size; /* extents */
	/* Folios of the last fills: reclaim passes over them. */
	uint64_t recent[UVM_RECENT], nr_recent;
	pthread_mutex_t wb_lock;   /* as fifo_lock: one write-back of this cache at a time */
	int wb_writing;            /* under wb_lock: the file is being written, mtime is moving */
	_Atomic uint32_t nr_slots; /* high-water mark: those behind it were never taken */
};
_Static_assert(offsetof(struct uvm_cache_shared, ctl) == UVM_CACHE_CTL_OFFSET, "cache header");
_Static_assert(sizeof(struct uvm_cache_shared) <= UVM_CACHE_CTL_BYTES, "cache header");

struct uvm_cache {
	int id;
	int file_fd, data_fd, ctl_fd;
	struct uvm_file_id file_id, data_id, ctl_id;
	bool created; /* its creator still holds it; under space.mutex */
	int writable;
	_Atomic int in_use;
	_Atomic int refs; /* creator, regions, reads in flight; the last one frees */
	uint64_t nr_pages;
	struct uvm_cache_shared *shared;
	_Atomic uint32_t *folios;
	struct uvm_extent *fifo;
	struct uvm_cache_pin *pins;
	size_t shared_bytes;
	/* Registered shared mappings of the data memfd, one a service: they exist only to fill under
	 * private mappings, where UFFDIO_COPY would make anonymous pages instead. */
	uint64_t alias[3];
	uint64_t alias_epoch[3]; /* of the uffd it is registered with */
	uint32_t owner;          /* slot | epoch << UVM_CACHE_SLOT_BITS of this process */
	int child_rc;            /* in a forked child: how attaching to it ended */
	_Atomic uint64_t seen_wb_err;
	_Atomic int reclaiming;
};

static inline unsigned uvm_folio_state(uint32_t word)
{
	return word & 0xff;
}
static inline uint32_t uvm_owner_slot(uint32_t owner)
{
	return owner % UVM_CACHE_SLOTS;
}
static inline uint32_t uvm_owner_epoch(uint32_t owner)
{
	return owner >> UVM_CACHE_SLOT_BITS;
}
static inline bool uvm_folio_move(struct uvm_cache *c, uint64_t index, unsigned from, unsigned to)
{
	uint32_t word = atomic_load_explicit(&c->folios[index], memory_order_acquire);
	while (uvm_folio_state(word) == from)
		if (atomic_compare_exchange_weak(&c->folios[index], &word, to | c->owner << 8))
			return true;
	return false;
}

struct uvm_cache *uvm_cache_get(int id); /* NULL when there is none */
void uvm_cache_ref(struct uvm_cache *c);
void uvm_cache_unref(struct uvm_cache *c);
int uvm_cache_alias(struct uvm_cache *c, int service); /* makes it; space.mutex held */
bool uvm_is_alias(uint64_t address);                   /* space.mutex held */
bool uvm_cache_charge(struct uvm_cache *c, uint64_t nr_pages, bool may_write_back);
void uvm_cache_uncharge(struct uvm_cache *c, uint64_t nr_pages);
void uvm_cache_note_extent(struct uvm_cache *c, uint64_t index, uint64_t nr_pages);
bool uvm_cache_take_over_dead(struct uvm_cache *c, uint64_t index);
/* The kernel says (a MINOR fault) that it has a page where our word says absent: its truth wins. */
void uvm_cache_adopt(struct uvm_cache *c, uint64_t index);
/* Whether the memfd has the page; and what follows from a MISSING fault where it has not. */
bool uvm_cache_has(struct uvm_cache *c, uint64_t index);
void uvm_cache_disown(struct uvm_cache *c, uint64_t index);
int64_t uvm_cache_evict(struct uvm_cache *c, uint64_t index, uint64_t nr_pages);
/* The number of the pin, or -ENOBUFS: the rest of the cap could not serve; -EMFILE: UVM_CACHE_PINS. */
int uvm_cache_pin(struct uvm_cache *c, uint64_t index, uint64_t nr_pages);
void uvm_cache_unpin(struct uvm_cache *c, int pin);
bool uvm_cache_pinned(struct uvm_cache *c, uint64_t index);
/* wait: also for pages that another process is filling, as flush() must; reclaim, which holds pages that
 * it is filling itself, must not. */
int uvm_cache_write_back(struct uvm_cache *c, uint64_t index, uint64_t nr_pages, bool wait);
int uvm_cache_read(struct uvm_cache *c, uint64_t index, uint64_t nr_pages, void *buf, bool nowait);
/* The first index >= index whose folio words were ever written; nr_pages if none. */
uint64_t uvm_cache_next_touched(struct uvm_cache *c, uint64_t index);
/* Where a walk over folio words has to ask again: what was never written is not read either. */
static inline bool uvm_folio_begins_page(uint64_t index)
{
	return (UVM_CACHE_CTL_BYTES + index * sizeof(uint32_t)) % UVM_PAGE == 0;
}
void uvm_cache_child_attach(struct uvm_cache *c);
/* Before a write to the memfd by its number, or a mapping of it. */
bool uvm_cache_data_ours(struct uvm_cache *c);
void uvm_caches_lose(void);    /* forgets the numbers that are not ours any more */
void uvm_caches_prepare(void); /* around fork; parent: also in the child */
void uvm_caches_parent(void);
void uvm_cache_child_own(struct uvm_cache *c);
void uvm_caches_child_begin(void);
void uvm_caches_child_end(void);

/* ---- regions ------------------------------------------------------------------------------------- */
enum uvm_region_state { UVM_REGION_FREE, UVM_REGION_LIVE, UVM_REGION_CLOSING };

struct uvm_region {
	/* Slots are type-stable: a look-up may read a freed one, and sees that by state and generation. */
	_Alignas(64) _Atomic int state;
	_Atomic uint32_t generation;
	_Atomic int in_flight;   /* executors inside it; close waits for 0 */
	_Atomic int nr_settling; /* of these: who only wait for the others */
	uint32_t slot;

	/* Constant while the region lives. */
	uint64_t start, len, nr_pages, pgoff;
	int backing, service, writable, on_error;
	unsigned flags; /* FaultFlag */
	int prot;
	uint64_t register_mode;
	int child_rc;                          /* in a forked child: how mapping it again ended */
	_Atomic int lost;                      /* why it is inaccessible: -errno; UVM_LOST_* */
	struct uvm_cache *cache;               /* NULL: anonymous */
	const struct uvm_cache_shared *shared; /* the cache's */
	uint32_t fault_around_pages, readahead_pages;
	uint64_t deadline_ns;
	struct uvm_region_ctl *ctl;
	_Atomic uint8_t *ptes;
	size_t ctl_bytes;
	int ctl_fd; /* -1: private memory */
	/* One byte per UVM_PAGE of ptes: something was ever set there. NULL where the memfd knows. */
	_Atomic uint8_t *touched;

	/* Read-ahead, as struct file_ra_state; racy updates only cost speed. */
	_Atomic uint64_t ra_prev; /* the last fault that was answered from the file */
	/* Of what it brought and what was asked for ahead of it. */
	_Atomic uint64_t ra_start, ra_end;
	_Atomic uint32_t ra_block; /* pages at a time */

	struct uvm_failure sticky; /* region != 0: nobody could be told. Under failures.mutex */
};

static inline int64_t uvm_region_handle(const struct uvm_region *r)
{
	return (int64_t)((uint64_t)atomic_load(&r->generation) << 32 | (r->slot + 1));
}
static inline uint64_t uvm_region_addr(const struct uvm_region *r, uint64_t index)
{
	return r->start + (index << UVM_PAGE_SHIFT);
}

/* Both return with in_flight taken, or NULL; put gives it back. A CLOSING region is found too: its
 * faults are woken, not served. */
struct uvm_region *uvm_region_find(uint64_t address);
struct uvm_region *uvm_region_by_handle(int64_t handle);
void uvm_region_put(struct uvm_region *r);
/* Calls fn for every region, CLOSING ones too, in address order, with the span list held still. */
void uvm_for_each_region(void (*fn)(struct uvm_region *r, void *arg), void *arg);
void uvm_spans_lock(void);
void uvm_spans_unlock(void);
void uvm_for_each_region_locked(void (*fn)(struct uvm_region *r, void *arg), void *arg);
/* After fork: map it again, all regions before anything else is mapped; then register and arm it. */
void uvm_region_child_map(struct uvm_region *r);
int uvm_region_child(struct uvm_region *r);
int uvm_region_child_to_native(struct uvm_region *r);
void uvm_region_say_lost(const struct uvm_region *r); /* on stderr; also in a signal handler */
/* Its content is in folios of the cache. Else in private pages: anonymous memory, and tracked copies, which
 * are filled by UFFDIO_COPY, since a page of the cache cannot be armed in one mapping alone. */
static inline bool uvm_region_in_cache(const struct uvm_region *r)
{
	return r->cache && !(r->backing == UVM_BACKING_PRIVATE_FILE && r->flags & UVM_FLAG_TRACKED);
}
_Static_assert(UVM_LOST_TO_SERVICE == -EREMOTE && UVM_LOST_TO_CLOSE == -EBADFD, "uffd_vm.h");
void uvm_region_lose(struct uvm_region *r); /* LOST_TO_CLOSE */

/* The page-table lock of the 2 MiB that hold address. */
void uvm_ptl_lock(uint64_t address);
void uvm_ptl_unlock(uint64_t address);
void uvm_ptl_lock_all(void);
void uvm_ptl_unlock_all(void);
void uvm_set_pte(struct uvm_region *r, uint64_t index, unsigned to); /* ptl held */
/* The first index >= index whose table page was ever written; nr_pages if none: walks over a 1 TiB
 * region cost what was touched. */
uint64_t uvm_next_touched(struct uvm_region *r, uint64_t index);
void uvm_set_ptes(struct uvm_region *r, uint64_t index, uint64_t nr_pages, unsigned to);

/* ---- the services' uffds ------------------------------------------------------------------------- */
int uvm_service_uffd(int service); /* -1: not started, or lost */
/* Before anything is done with descriptors of a service, or of its caches: are they ours still? If not, its
 * regions are made inaccessible (uvm_region_lose()) and their numbers forgotten. No lock held but space.mutex. */
bool uvm_service_check(int service);
void uvm_services_check(void);
uint64_t uvm_service_epoch(int service); /* counts its uffds */
int uvm_service_start(int service);      /* space.mutex held; counts users */
void uvm_service_stop(int service);      /* space.mutex held */
/* Around fork: prepare holds the queue still; in the child there is no thread of ours any more, so the
 * uffds are made first, then (when the regions are registered again) the threads. */
void uvm_service_prepare(void);
void uvm_service_parent(void);
int uvm_service_child_uffds(void);
int uvm_service_child_threads(void);
/* Moves a user from one service to another: a python-served region continues natively in a child. */
int uvm_service_child_move(int from, int to);

/* ---- keepers (keeper.c) ------------------------------------------------------------------------------ */
int uvm_keeper_start(int service, int uffd); /* it is held when this returns, if it can be */
void uvm_keeper_stop(int service);
void uvm_keeper_drain(int service); /* the service has lost it: wakes whoever waits there */
int uvm_nr_keepers(void);
void uvm_keepers_child(void);

/* ---- our threads (thread.c) ------------------------------------------------------------------------ */
/* With all signals blocked; name: 15 characters, constant. 0 or -errno. */
int uvm_thread_create(pthread_t *ret, const char *name, void *(*fn)(void *arg), void *arg);
/* If the caller leads this process: its end must not leave the process to our threads alone. */
void uvm_thread_mark_leader(void);
void uvm_threads_child(void);

/* ---- one fault ----------------------------------------------------------------------------------- */
struct uvm_fault {
	uint64_t address;
	uint64_t t_ns;     /* when the message was read */
	uint64_t first_ns; /* of the first fault of its chain (chain.c): t_ns, most often */
	uint32_t tid;
	uint8_t kind, access, tries;
	uint8_t service;
	bool refault; /* of a chain, and not its first */
};

/* Faults that bring nothing (chain.c). continue: a new fault; note: how it ended. */
void uvm_chain_continue(struct uvm_fault *f);
void uvm_chain_note(const struct uvm_fault *f, bool brought);
/* The main thread has waited long: its service looks whether Ctrl-C arrived meanwhile. */
enum { UVM_LONG_WAIT_NS = 200000000 };
void uvm_long_wait(const struct uvm_fault *f);
bool uvm_waits_long(int service);

/* What an executing thread brings along. */
struct uvm_executor {
	uint8_t *buf;   /* UVM_BUFFER_BYTES, resident, never inside a region */
	bool may_block; /* file reads may wait here (workers, inline, load) */
	bool failed;    /* inline: the page is to fail, in this thread */
	int service;
};

/* mm/memory.c handle_mm_fault(): prologue, decide, act, settle, account. Returns VM_FAULT_* bits;
 * RETRY: the fault is parked (or queued) and will be started again from the top. */
uint32_t uvm_handle_mm_fault(struct uvm_executor *x, struct uvm_fault *f);
unsigned uvm_walk(struct uvm_region *r, uint64_t index, int kind, unsigned *flags);
/* Fills absent pages of [index, index+nr) of a file region, or zero-fills anonymous ones, without a
 * fault. `wait`: pages that somebody else is filling are waited for, else left to them. The region
 * is let go of while a read waits: *region is NULL if it was closed meanwhile (-ESTALE).
 * Returns pages done or -errno of the first page that failed. */
int64_t uvm_fill_range(struct uvm_executor *x, struct uvm_region **region, uint64_t index,
		       uint64_t nr_pages, bool wait, uint64_t *failed_index);
void uvm_executor_init(struct uvm_executor *x, bool may_block, int service);
void uvm_executor_deinit(struct uvm_executor *x);

/* Read-ahead and prefetch jobs of the worker threads. -EAGAIN: the queue is full. */
int uvm_queue_fill(int64_t region, uint64_t index, uint64_t nr_pages);
int uvm_queue_fault(const struct uvm_fault *f); /* parks it too */
void uvm_queue_drop(int64_t region);
int uvm_park(const struct uvm_fault *f);
/* `own`: the fault that the caller itself will account, or NULL. */
void uvm_unpark_range(struct uvm_region *r, uint64_t index, uint64_t nr_pages, uint32_t result,
		      const struct uvm_fault *own);
void uvm_poke_fault_thread(void);

/* ---- failure (failure.c, interrupt.c) ------------------------------------------------------------- */
/* Records why a page failed; the caller poisons it. */
void uvm_failure_record(struct uvm_region *r, uint64_t index, int kind, int err);
/* Poisons one page of r so that its waiters get SIGBUS (or EFAULT in a syscall); ptl NOT held. The
 * janitor makes it missing again after UVM_POISON_TTL_NS, so that the next access tries again. */
struct uvm_done uvm_poison_page(struct uvm_region *r, uint64_t index);
/* Drops what failure.c holds of a closing region (placeholders, poison timers). */
void uvm_failure_forget(struct uvm_region *r);
void uvm_failure_child(void); /* after fork */
void uvm_failure_prepare(void);
void uvm_failure_parent(void);
int uvm_failure_nr_placeholders(void);
/* Inline service: resolves a SIGBUS at address in the touching thread. 1: return and retry; 0: not ours;
 * -1: the page failed, as recorded. */
int uvm_inline_fault(uint64_t address, bool write);
/* The fault thread's question while a fault of tid waits long: did Ctrl-C arrive meanwhile? */
void uvm_interrupt_watch(int service, bool on);
bool uvm_interrupt_pending(uint32_t tid);

/* ---- counters, trace (trace.c) -------------------------------------------------------------------- */
static inline void uvm_count(struct uvm_region *r, int counter, uint64_t n)
{
	__atomic_fetch_add(&r->ctl->counters[counter], n, __ATOMIC_RELAXED);
}
void uvm_count_row(struct uvm_region *r, const struct uvm_row *row);
/* mm_account_fault() */
void uvm_mm_account_fault(struct uvm_region *r, uint32_t result, bool tried);
unsigned uvm_latency_bucket(uint64_t ns);
void uvm_trace(struct uvm_region *r, const struct uvm_fault *f, uint64_t index, unsigned pte,
	       unsigned flags, const struct uvm_row *row, uint32_t result, int err,
	       uint32_t nr_pages, int settlement);

/* ---- this process ---------------------------------------------------------------------------------- */
struct uvm_space {
	pthread_mutex_t mutex; /* the mmap_lock of our table: create, close, fork */
	struct uvm_config config;
	bool configured;
	int pagemap_fd; /* /proc/self/pagemap while there are regions; -1: may not be opened */
	uint64_t nr_regions, nr_caches, nr_forked;
};
extern struct uvm_space uvm_space;
int uvm_fork_handlers_install(void); /* idempotent */
/* With the first region: a fault that needs it may find no descriptor left, and nobody to tell. Fails for
 * want of descriptors alone: without a pagemap (its uid was changed) a process does as well as it can. */
int uvm_pagemap_open(void);
/* What the kernel's page table says of one page: UVM_TRUTH_*, or -errno. */
int uvm_kernel_truth(struct uvm_region *r, uint64_t index);

#endif
