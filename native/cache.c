/* Page caches: a memfd with the content, folio states in shared memory, a cap, reclaim, write-back.
 *
 * A folio word changes by compare-and-swap only, so that forked processes which share the cache agree:
 *   ABSENT -> FILLING -> UPTODATE -> DIRTY -> WRITEBACK -> UPTODATE, and UPTODATE|WRITEBACK -> EVICTING
 *   -> ABSENT. FILLING and EVICTING name their owner; if that process is dead whoever meets the page
 *   takes it over.
 * Invariant clean_means_protected: a folio that is not DIRTY or WRITEBACK is writable in no page
 * table. So a clean folio may be dropped without looking, and a write to it faults first. */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>

static struct uvm_cache caches[UVM_MAX_CACHES];
static int nr_slots; /* high-water mark; under space.mutex */

enum { WRITE_BACK_PAGES = 64, CHARGE_TRIES = 1000, RECOUNT_TRIES = 20 };

/* ---- who is alive ------------------------------------------------------------------------------------ */
/* What we take a process for that shares a cache decides who owns its pages, so "dead" must be known. Facts:
 * a zombie whose other threads run (its main thread returned) lives: it writes its memory;
 * /proc may tell nothing (no descriptor left, hidepid): then whoever kill() finds lives. */
enum { UNKNOWN_START = 0 };

/* Reads /proc/PID/stat: 1 it lives, 0 it is dead, -1 not to be known. */
static int process_stat(int pid, uint64_t *start_time)
{
	char path[32], buf[1024];
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t n = read(fd, buf, sizeof buf - 1);
	close(fd);
	if (n <= 0)
		return n < 0 && errno == ESRCH ? 0 : -1;
	buf[n] = 0;
	char *p = strrchr(buf, ')'); /* the name may hold anything */
	unsigned long long start = 0;
	long nr_threads = 0;
	char state = 'X';
	if (!p || sscanf(p + 1,
			 " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %ld "
			 "%*d %llu",
			 &state, &nr_threads, &start) != 3)
		return -1;
	*start_time = start;
	return (state != 'Z' && state != 'X') || nr_threads > 1;
}

static bool process_lives(int pid, uint64_t start_time)
{
	uint64_t found = UNKNOWN_START;
	if (kill(pid, 0) < 0 && errno == ESRCH)
		return false;
	int lives = process_stat(pid, &found);
	if (lives <= 0)
		return lives < 0;
	return start_time == UNKNOWN_START || found == start_time;
}

static bool slot_alive(struct uvm_cache_slot *s)
{
	int pid = atomic_load(&s->pid);
	if (pid < 0) /* being attached: its start time does not stand here yet */
		return process_lives(-pid, UNKNOWN_START);
	return pid && process_lives(pid, atomic_load(&s->start_time));
}

/* Those behind it are neither read nor backed by memory. */
static void raise_nr_slots(struct uvm_cache *c, uint32_t to)
{
	uint32_t now = atomic_load(&c->shared->nr_slots);
	while (now < to && !atomic_compare_exchange_weak(&c->shared->nr_slots, &now, to))
		;
}

/* Takes a slot for this process: a free one or a dead one's; the epoch tells its folios from ours. */
static int slot_attach(struct uvm_cache *c)
{
	int me = (int)getpid();
	for (int pass = 0; pass < 2; pass++) {
		for (uint32_t i = 0; i < UVM_CACHE_SLOTS; i++) {
			struct uvm_cache_slot *s = &c->shared->slots[i];
			int32_t pid = atomic_load(&s->pid);
			if (pid && (pass == 0 || slot_alive(s)))
				continue;
			raise_nr_slots(c, i + 1);
			if (!atomic_compare_exchange_strong(&s->pid, &pid, -me))
				continue;
			if (!pid)
				__atomic_fetch_add(&c->shared->ctl.nr_attached, 1,
						   __ATOMIC_ACQ_REL);
			uint32_t epoch = atomic_fetch_add(&s->epoch, 1) + 1;
			uint64_t start_time = UNKNOWN_START;
			(void)process_stat(me, &start_time);
			atomic_store(&s->start_time, start_time);
			atomic_store(&s->pid, me); /* last: now the slot can be judged */
			c->owner = i | epoch % UVM_CACHE_EPOCHS << UVM_CACHE_SLOT_BITS;
			return 0;
		}
	}
	return -EUSERS;
}

static void slot_detach(struct uvm_cache *c)
{
	struct uvm_cache_slot *s = &c->shared->slots[uvm_owner_slot(c->owner)];
	int32_t me = (int32_t)getpid();
	if (atomic_compare_exchange_strong(&s->pid, &me, 0))
		__atomic_fetch_sub(&c->shared->ctl.nr_attached, 1, __ATOMIC_ACQ_REL);
}

/* Other living processes that map this cache: their page tables are out of our reach. */
static bool others_attached(struct uvm_cache *c)
{
	if (c->child_rc < 0) /* the slot that we know is our parent's */
		return true;
	for (uint32_t i = 0; i < atomic_load(&c->shared->nr_slots); i++) {
		struct uvm_cache_slot *s = &c->shared->slots[i];
		int32_t pid = atomic_load(&s->pid);
		if (!pid || i == uvm_owner_slot(c->owner))
			continue;
		if (slot_alive(s))
			return true;
		if (atomic_compare_exchange_strong(&s->pid, &pid, 0))
			__atomic_fetch_sub(&c->shared->ctl.nr_attached, 1, __ATOMIC_ACQ_REL);
	}
	return false;
}

bool uvm_cache_has(struct uvm_cache *c, uint64_t index)
{
	off_t at = (off_t)(index << UVM_PAGE_SHIFT);
	return uvm_fd_is(c->data_fd, &c->data_id) && lseek(c->data_fd, at, SEEK_DATA) == at;
}

/* A folio that a dead process left FILLING or EVICTING. True if its state moved on. */
bool uvm_cache_take_over_dead(struct uvm_cache *c, uint64_t index)
{
	uint32_t word = atomic_load(&c->folios[index]);
	unsigned state = uvm_folio_state(word), to;
	if (state != UVM_FOLIO_FILLING && state != UVM_FOLIO_EVICTING &&
	    state != UVM_FOLIO_WRITEBACK)
		return true;
	struct uvm_cache_slot *s = &c->shared->slots[uvm_owner_slot(word >> 8)];
	if (atomic_load(&s->epoch) % UVM_CACHE_EPOCHS == uvm_owner_epoch(word >> 8) &&
	    slot_alive(s))
		return false;
	if (state == UVM_FOLIO_WRITEBACK)
		to = UVM_FOLIO_DIRTY;
	else if (!uvm_cache_has(c, index))
		to = UVM_FOLIO_ABSENT;
	else /* whole pages only ever get in; of a writable one we cannot tell whether it was written */
		to = c->writable ? UVM_FOLIO_DIRTY : UVM_FOLIO_UPTODATE;
	if (!atomic_compare_exchange_strong(&c->folios[index], &word, to))
		return true;
	if (to == UVM_FOLIO_ABSENT)
		uvm_cache_uncharge(c, 1);
	else if (state != UVM_FOLIO_WRITEBACK)
		uvm_cache_note_extent(c, index, 1);
	if (to == UVM_FOLIO_DIRTY && state != UVM_FOLIO_WRITEBACK)
		__atomic_fetch_add(&c->shared->ctl.nr_dirty, 1, __ATOMIC_RELAXED);
	return true;
}

/* The message may be older than an eviction, so what is there now counts. Nobody fills an ABSENT folio
 * without moving its word first, which makes ours fail. */
void uvm_cache_adopt(struct uvm_cache *c, uint64_t index)
{
	unsigned to = c->writable ? UVM_FOLIO_DIRTY : UVM_FOLIO_UPTODATE;
	if (uvm_folio_state(atomic_load(&c->folios[index])) != UVM_FOLIO_ABSENT ||
	    !uvm_cache_has(c, index) || !uvm_folio_move(c, index, UVM_FOLIO_ABSENT, to))
		return;
	__atomic_fetch_add(&c->shared->ctl.nr_used, 1, __ATOMIC_RELAXED);
	if (to == UVM_FOLIO_DIRTY)
		__atomic_fetch_add(&c->shared->ctl.nr_dirty, 1, __ATOMIC_RELAXED);
	uvm_cache_note_extent(c, index, 1);
}

/* The other way round: our word says that the page is there, and the kernel that it is not. */
void uvm_cache_disown(struct uvm_cache *c, uint64_t index)
{
	if (uvm_cache_has(c, index) ||
	    !uvm_folio_move(c, index, UVM_FOLIO_UPTODATE, UVM_FOLIO_EVICTING))
		return;
	/* Now it is held: was it evicted and filled again between question and answer? */
	bool here = uvm_cache_has(c, index);
	uvm_folio_move(c, index, UVM_FOLIO_EVICTING, here ? UVM_FOLIO_UPTODATE : UVM_FOLIO_ABSENT);
	if (!here)
		uvm_cache_uncharge(c, 1);
}

/* ---- life ---------------------------------------------------------------------------------------------- */
static int shared_map(struct uvm_cache *c, uint64_t cap_pages)
{
	uint64_t p;
	pthread_mutexattr_t attr;
	int rc;

	/* Room for the worst case, a page an extent; what is not used is not touched. */
	uint64_t most = cap_pages < c->nr_pages ? cap_pages : c->nr_pages;
	uint64_t fifo_size = 2 * most + 64;
	size_t fifo_at = (UVM_CACHE_CTL_BYTES + c->nr_pages * sizeof(uint32_t) + 15) & ~(size_t)15;
	size_t pins_at = fifo_at + fifo_size * sizeof *c->fifo;
	c->shared_bytes = (pins_at + UVM_CACHE_PINS * sizeof *c->pins + UVM_PAGE - 1) &
			  ~(size_t)(UVM_PAGE - 1);
	if (ftruncate(c->ctl_fd, (off_t)c->shared_bytes) < 0)
		return -errno;
	rc = sys_mmap(0, c->shared_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, c->ctl_fd, 0, &p);
	if (rc < 0)
		return rc;
	c->shared = (void *)(uintptr_t)p;
	c->folios = (void *)(uintptr_t)(p + UVM_CACHE_CTL_BYTES);
	c->fifo = (void *)(uintptr_t)(p + fifo_at);
	c->pins = (void *)(uintptr_t)(p + pins_at);
	c->shared->ctl.pins_at = pins_at;
	c->shared->fifo_size = fifo_size;
	for (int i = 0; i < UVM_RECENT; i++)
		c->shared->recent[i] = UVM_NO_INDEX;
	c->shared->ctl.nr_pages = c->nr_pages;
	c->shared->ctl.cap_pages = cap_pages;
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
	pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&c->shared->fifo_lock, &attr);
	pthread_mutex_init(&c->shared->wb_lock, &attr);
	pthread_mutexattr_destroy(&attr);
	return 0;
}

/* ---- descriptors that the program closed: see keeper.c ----------------------------------------------------- */
static void forget(int *fd, const struct uvm_file_id *id)
{
	if (*fd >= 0 && !uvm_fd_is(*fd, id))
		*fd = -1;
}

void uvm_caches_lose(void)
{
	for (int id = 0; id < nr_slots; id++) {
		struct uvm_cache *c = &caches[id];
		if (!atomic_load(&c->in_use))
			continue;
		forget(&c->file_fd, &c->file_id);
		forget(&c->data_fd, &c->data_id);
		forget(&c->ctl_fd, &c->ctl_id);
	}
}

bool uvm_cache_data_ours(struct uvm_cache *c)
{
	return uvm_fd_is(c->data_fd, &c->data_id);
}

int uvm_cache_check(int id)
{
	struct uvm_cache *c = uvm_cache_get(id);
	if (!c)
		return -EINVAL;
	uvm_services_check();
	return uvm_fd_is(c->file_fd, &c->file_id) && uvm_cache_data_ours(c) &&
			       uvm_fd_is(c->ctl_fd, &c->ctl_id)
		       ? 0
		       : -EBADFD;
}

static void close_fds(struct uvm_cache *c)
{
	if (c->file_fd >= 0)
		close(c->file_fd);
	if (c->data_fd >= 0)
		close(c->data_fd);
	if (c->ctl_fd >= 0)
		close(c->ctl_fd);
}

static int cache_make(struct uvm_cache *c, int file_fd, uint64_t size, int64_t mtime_ns,
		      uint64_t cap_bytes, int writable)
{
	int rc;
	c->ctl_fd = c->data_fd = -1;
	c->file_fd = fcntl(file_fd, F_DUPFD_CLOEXEC, 3);
	if (c->file_fd < 0)
		return -errno;
	c->nr_pages = (size + UVM_PAGE - 1) >> UVM_PAGE_SHIFT;
	c->writable = writable;
	c->child_rc = 0;
	memset(c->alias, 0, sizeof c->alias);
	c->seen_wb_err = 0;
	c->data_fd = rc = sys_memfd_create("uffd_vm-cache");
	if (rc < 0)
		return rc;
	if (ftruncate(c->data_fd, (off_t)(c->nr_pages << UVM_PAGE_SHIFT)) < 0)
		return -errno;
	c->ctl_fd = rc = sys_memfd_create("uffd_vm-folios");
	if (rc < 0)
		return rc;
	if ((rc = uvm_file_id(c->file_fd, &c->file_id)) < 0 ||
	    (rc = uvm_file_id(c->data_fd, &c->data_id)) < 0 ||
	    (rc = uvm_file_id(c->ctl_fd, &c->ctl_id)) < 0)
		return rc;
	uint64_t cap_pages = cap_bytes >> UVM_PAGE_SHIFT;
	rc = shared_map(c, cap_pages > UVM_MIN_CAP_PAGES ? cap_pages : UVM_MIN_CAP_PAGES);
	if (rc < 0)
		return rc;
	c->shared->ctl.size = size;
	c->shared->ctl.mtime_ns = mtime_ns;
	rc = slot_attach(c);
	if (rc < 0)
		sys_munmap((uint64_t)(uintptr_t)c->shared, c->shared_bytes);
	return rc;
}

int uvm_cache_create(int file_fd, uint64_t size, int64_t mtime_ns, uint64_t cap_bytes, int writable)
{
	int rc = -ENOSPC;
	if (!size)
		return -EINVAL;
	pthread_mutex_lock(&uvm_space.mutex);
	for (int id = 0; id < UVM_MAX_CACHES; id++) {
		struct uvm_cache *c = &caches[id];
		if (atomic_load(&c->in_use))
			continue;
		rc = cache_make(c, file_fd, size, mtime_ns, cap_bytes, writable);
		if (rc < 0) {
			close_fds(c);
			break;
		}
		c->id = id;
		atomic_store(&c->in_use, 1);
		c->created = true;
		atomic_store(&c->refs, 1);
		if (id >= nr_slots)
			nr_slots = id + 1;
		uvm_space.nr_caches++;
		rc = id;
		break;
	}
	pthread_mutex_unlock(&uvm_space.mutex);
	return rc;
}

struct uvm_cache *uvm_cache_get(int id)
{
	if (id < 0 || id >= UVM_MAX_CACHES || !atomic_load(&caches[id].refs))
		return NULL;
	return &caches[id];
}

void uvm_cache_ref(struct uvm_cache *c)
{
	atomic_fetch_add(&c->refs, 1);
}

/* A fork waits for it: half of it would be done again in the child. */
static pthread_mutex_t free_lock = PTHREAD_MUTEX_INITIALIZER;

void uvm_caches_prepare(void)
{
	pthread_mutex_lock(&free_lock);
}
void uvm_caches_parent(void)
{
	pthread_mutex_unlock(&free_lock);
}

static void cache_free(struct uvm_cache *c)
{
	pthread_mutex_lock(&free_lock);
	for (int s = 0; s < 3; s++)
		if (c->alias[s])
			sys_munmap(c->alias[s], c->nr_pages << UVM_PAGE_SHIFT);
	slot_detach(c);
	sys_munmap((uint64_t)(uintptr_t)c->shared, c->shared_bytes);
	close_fds(c);
	__atomic_fetch_sub(&uvm_space.nr_caches, 1, __ATOMIC_RELAXED);
	atomic_store(&c->in_use, 0); /* last: now the slot may be taken again */
	pthread_mutex_unlock(&free_lock);
}

void uvm_cache_unref(struct uvm_cache *c)
{
	if (atomic_fetch_sub(&c->refs, 1) == 1)
		cache_free(c);
}

int uvm_cache_put(int id)
{
	struct uvm_cache *c = uvm_cache_get(id);
	if (!c)
		return -EINVAL;
	c->created = false;
	uvm_cache_unref(c);
	return 0;
}

int uvm_cache_data_fd(int id)
{
	struct uvm_cache *c = uvm_cache_get(id);
	return c ? c->data_fd : -EINVAL;
}
int uvm_cache_ctl_fd(int id)
{
	struct uvm_cache *c = uvm_cache_get(id);
	return c ? c->ctl_fd : -EINVAL;
}
int uvm_cache_file_fd(int id)
{
	struct uvm_cache *c = uvm_cache_get(id);
	return c ? c->file_fd : -EINVAL;
}
struct uvm_cache_ctl *uvm_cache_ctl(int id)
{
	struct uvm_cache *c = uvm_cache_get(id);
	return c ? &c->shared->ctl : NULL;
}
uint32_t *uvm_cache_folios(int id)
{
	struct uvm_cache *c = uvm_cache_get(id);
	return c ? (uint32_t *)c->folios : NULL;
}

/* Inaccessible, since nobody reads or writes it: COPY does not ask. What is touched in all of memory
 * (mlockall(), a dump) passes it by; a fault here would be nobody's (uvm_is_alias()). */
static int alias_map(struct uvm_cache *c, int service)
{
	uint64_t bytes = c->nr_pages << UVM_PAGE_SHIFT;
	if (!uvm_cache_data_ours(c))
		return -EBADF;
	int rc = sys_mmap(0, bytes, PROT_NONE, MAP_SHARED | MAP_NORESERVE, c->data_fd, 0,
			  &c->alias[service]);
	if (rc < 0) {
		c->alias[service] = 0;
		return rc;
	}
	(void)sys_madvise(c->alias[service], bytes, MADV_NOHUGEPAGE);
	(void)sys_madvise(c->alias[service], bytes, MADV_DONTDUMP);
	rc = sys_madvise(c->alias[service], bytes, MADV_DONTFORK);
	c->alias_epoch[service] = uvm_service_epoch(service);
	if (rc == 0)
		rc = sys_uffd_register(uvm_service_uffd(service), c->alias[service], bytes,
				       UFFDIO_REGISTER_MODE_MISSING, NULL);
	if (rc < 0) {
		sys_munmap(c->alias[service], bytes);
		c->alias[service] = 0;
	}
	return rc;
}

bool uvm_is_alias(uint64_t address)
{
	for (int id = 0; id < nr_slots; id++)
		for (int s = 0; s < 3; s++)
			if (atomic_load(&caches[id].in_use) && caches[id].alias[s] &&
			    address - caches[id].alias[s] < caches[id].nr_pages << UVM_PAGE_SHIFT)
				return true;
	return false;
}

int uvm_cache_alias(struct uvm_cache *c, int service)
{
	/* The uffd of an earlier run of the service took the registration along when it closed. */
	if (c->alias[service] && c->alias_epoch[service] != uvm_service_epoch(service)) {
		sys_munmap(c->alias[service], c->nr_pages << UVM_PAGE_SHIFT);
		c->alias[service] = 0;
	}
	return c->alias[service] ? 0 : alias_map(c, service);
}

/* In a forked child, before its regions are counted: references of the parent's threads are nobody's. */
void uvm_caches_child_begin(void)
{
	for (int id = 0; id < nr_slots; id++)
		if (atomic_load(&caches[id].in_use))
			atomic_store(&caches[id].refs, caches[id].created);
}

void uvm_caches_child_end(void)
{
	for (int id = 0; id < nr_slots; id++)
		if (atomic_load(&caches[id].in_use) && !atomic_load(&caches[id].refs)) {
			/* The aliases were not inherited: there is something else by now. */
			memset(caches[id].alias, 0, sizeof caches[id].alias);
			cache_free(&caches[id]);
		}
}

/* In a forked child: the parent's slot is the parent's; the aliases were not inherited. */
void uvm_cache_child_attach(struct uvm_cache *c)
{
	int rc = slot_attach(c);
	for (int s = 0; rc == 0 && s < 3; s++) {
		if (!c->alias[s])
			continue;
		c->alias[s] = 0;
		if (uvm_service_uffd(s) >= 0)
			rc = alias_map(c, s);
	}
	c->child_rc = rc;
}

/* In a forked child: the parent's Python service fills the cache by rules of its own (no slots, plain stores,
 * a queue that we cannot see), so nobody else may. The child begins an empty one, of the same version. A
 * writable file is not ours to write any more, nor its lock to hold. */
void uvm_cache_child_own(struct uvm_cache *c)
{
	struct uvm_cache parents = *c;
	const struct uvm_cache_ctl *ctl = &parents.shared->ctl;
	int rc = cache_make(c, parents.file_fd, ctl->size, ctl->mtime_ns,
			    ctl->cap_pages << UVM_PAGE_SHIFT, parents.writable);
	if (rc < 0) {
		close_fds(c);
		*c = parents; /* for their end, save what was not inherited */
		memset(c->alias, 0, sizeof c->alias);
	} else {
		sys_munmap((uint64_t)(uintptr_t)parents.shared, parents.shared_bytes);
		close_fds(&parents);
	}
	c->child_rc = rc;
	if (c->writable) {
		close(c->file_fd);
		c->file_fd = -1;
	}
}

uint64_t uvm_cache_next_touched(struct uvm_cache *c, uint64_t index)
{
	off_t from = (off_t)(UVM_CACHE_CTL_BYTES + index * sizeof(uint32_t));
	if (!uvm_fd_is(c->ctl_fd, &c->ctl_id)) /* it would move what another file is read from */
		return c->nr_pages;
	off_t at = lseek(c->ctl_fd, from, SEEK_DATA);
	if (at < 0)
		return c->nr_pages;
	if (at > from)
		index = ((uint64_t)at - UVM_CACHE_CTL_BYTES) / sizeof(uint32_t);
	return index < c->nr_pages ? index : c->nr_pages;
}

/* ---- reading -------------------------------------------------------------------------------------------- */
/* What these guard is consistent after every single store, so a dead holder leaves nothing to mend. */
static void fifo_lock(struct uvm_cache *c)
{
	if (pthread_mutex_lock(&c->shared->fifo_lock) == EOWNERDEAD)
		pthread_mutex_consistent(&c->shared->fifo_lock);
}

static void fifo_unlock(struct uvm_cache *c)
{
	pthread_mutex_unlock(&c->shared->fifo_lock);
}

static int64_t mtime_ns(const struct stat *st)
{
	return (int64_t)st->st_mtim.tv_sec * 1000000000 + st->st_mtim.tv_nsec;
}

/* What is there now is our version, also after half a write. */
static int version_adopt(struct uvm_cache *c)
{
	struct stat st;
	int rc = sys_fstat(c->file_fd, &st);
	if (rc == 0)
		__atomic_store_n(&c->shared->ctl.mtime_ns, mtime_ns(&st), __ATOMIC_RELEASE);
	return rc;
}

/* One write-back at a time. A holder that died in it (a forked child that exits while a worker of its writes)
 * has moved the mtime on and not said so; its pages are WRITEBACK still, and are written again. */
static void wb_lock(struct uvm_cache *c)
{
	if (pthread_mutex_lock(&c->shared->wb_lock) != EOWNERDEAD)
		return;
	if (c->shared->wb_writing)
		(void)version_adopt(c);
	c->shared->wb_writing = 0;
	pthread_mutex_consistent(&c->shared->wb_lock);
}

static void wb_unlock(struct uvm_cache *c)
{
	pthread_mutex_unlock(&c->shared->wb_lock);
}

/* Is the file still the version that was mapped? -ENODATA: it is shorter; -ESTALE: it was changed. */
static int version_check(struct uvm_cache *c)
{
	const struct uvm_cache_ctl *ctl = &c->shared->ctl;
	struct stat st;
	int rc = sys_fstat(c->file_fd, &st);
	if (rc < 0)
		return rc;
	if (st.st_dev != c->file_id.dev || st.st_ino != c->file_id.ino)
		return -EBADF; /* another file, which has our number now */
	if ((uint64_t)st.st_size < ctl->size)
		return -ENODATA;
	bool same = (uint64_t)st.st_size == ctl->size &&
		    mtime_ns(&st) == __atomic_load_n(&ctl->mtime_ns, __ATOMIC_ACQUIRE);
	return same ? 0 : -ESTALE;
}

/* Reads whole pages of the file, zeros behind its end, and makes sure that they are of the version that
 * was mapped. nowait: -EAGAIN when a disk would have to be waited for.
 * -ENODATA: the file is shorter now; -ESTALE: it was changed. */
int uvm_cache_read(struct uvm_cache *c, uint64_t index, uint64_t nr_pages, void *buf, bool nowait)
{
	struct uvm_cache_ctl *ctl = &c->shared->ctl;
	uint64_t off = index << UVM_PAGE_SHIFT, len = nr_pages << UVM_PAGE_SHIFT, want = len,
		 got = 0;

	if (off + want > ctl->size)
		want = ctl->size - off;
	while (got < want) {
		int64_t n = nowait ? sys_pread_nowait(c->file_fd, (char *)buf + got, want - got,
						      (int64_t)(off + got))
				   : sys_pread(c->file_fd, (char *)buf + got, want - got,
					       (int64_t)(off + got));
		if (n == -EINTR)
			continue;
		if (nowait && (n == -EOPNOTSUPP || n == -ENOSYS))
			return -EAGAIN;
		if (n < 0)
			return (int)n;
		if (n == 0) {
			if (nowait)
				return -EAGAIN;
			break;
		}
		got += (uint64_t)n;
	}
	int rc = version_check(c);
	if (rc == -ESTALE && c->writable) {
		/* Our own write-back moves the mtime, and says so under its lock. */
		if (nowait)
			return -EAGAIN;
		wb_lock(c);
		rc = version_check(c);
		wb_unlock(c);
	}
	if (rc < 0)
		return rc;
	if (got < want)
		return -ENODATA;
	if (want < len)
		memset((char *)buf + want, 0, len - want);
	return 0;
}

/* ---- pins ------------------------------------------------------------------------------------------------- */
/* A page that the kernel has pinned for a device is written to behind every page table. Facts: write
 * protection does not see it, and a hole punched into the memfd takes the page from the file, not from the
 * device, which goes on writing where nobody reads. So a pinned page stays DIRTY, which is never evicted.
 *
 * Who pins first registers the pin and then makes its pages dirty. A write-back that began before either
 * has protected them, and then that store is seen by it, or looks at the pins again before it says clean. */
static bool pin_current(struct uvm_cache *c, const struct uvm_cache_pin *p)
{
	uint32_t owner = (uint32_t)atomic_load(&p->owner);
	const struct uvm_cache_slot *s = &c->shared->slots[uvm_owner_slot(owner)];
	return atomic_load(&s->pid) &&
	       atomic_load(&s->epoch) % UVM_CACHE_EPOCHS == uvm_owner_epoch(owner);
}

bool uvm_cache_pinned(struct uvm_cache *c, uint64_t index)
{
	uint64_t n = __atomic_load_n(&c->shared->ctl.nr_pins, __ATOMIC_ACQUIRE);
	for (uint64_t i = 0; i < n; i++) {
		const struct uvm_cache_pin *p = &c->pins[i];
		uint64_t nr_pages = atomic_load(&p->nr_pages);
		if (nr_pages && index - atomic_load(&p->index) < nr_pages && pin_current(c, p))
			return true;
	}
	return false;
}

static bool pin_lives(struct uvm_cache *c, const struct uvm_cache_pin *p)
{
	uint32_t owner = (uint32_t)atomic_load(&p->owner);
	return atomic_load(&p->nr_pages) && pin_current(c, p) &&
	       (owner == c->owner || slot_alive(&c->shared->slots[uvm_owner_slot(owner)]));
}

/* Half of the cap is always left to take from, and more than reclaim spares, where not all of the file fits. */
int uvm_cache_pin(struct uvm_cache *c, uint64_t index, uint64_t nr_pages)
{
	struct uvm_cache_ctl *ctl = &c->shared->ctl;
	uint64_t sum = nr_pages, at = UVM_CACHE_PINS;
	if (c->child_rc < 0) /* the slot that we know is our parent's */
		return c->child_rc;
	fifo_lock(c);
	for (uint64_t i = 0; i < UVM_CACHE_PINS; i++) {
		if (pin_lives(c, &c->pins[i])) {
			sum += atomic_load(&c->pins[i].nr_pages);
			continue;
		}
		if (i < at)
			at = i;
		if (i >= ctl->nr_pins)
			break;
	}
	uint64_t spared = sum > UVM_RECENT + 1 ? sum : UVM_RECENT + 1;
	bool too_much = c->nr_pages > ctl->cap_pages && sum + spared > ctl->cap_pages;
	int rc = at == UVM_CACHE_PINS ? -EMFILE : too_much ? -ENOBUFS : (int)at;
	if (rc >= 0) {
		struct uvm_cache_pin *p = &c->pins[at];
		atomic_store(&p->nr_pages, 0); /* a dead process's pin may stand there */
		atomic_store(&p->index, index);
		atomic_store(&p->owner, c->owner);
		atomic_store(&p->nr_pages, nr_pages);
		if (at >= ctl->nr_pins)
			__atomic_store_n(&ctl->nr_pins, at + 1, __ATOMIC_SEQ_CST);
	}
	fifo_unlock(c);
	return rc;
}

void uvm_cache_unpin(struct uvm_cache *c, int pin)
{
	fifo_lock(c);
	/* A forked child that leaves its parent's `with` ends nothing. */
	if (c->child_rc == 0 && pin >= 0 && pin < UVM_CACHE_PINS &&
	    atomic_load(&c->pins[pin].owner) == c->owner)
		atomic_store(&c->pins[pin].nr_pages, 0);
	fifo_unlock(c);
}

/* ---- the cap ---------------------------------------------------------------------------------------------- */
static bool fifo_pop(struct uvm_cache *c, struct uvm_extent *e)
{
	struct uvm_cache_shared *s = c->shared;
	fifo_lock(c);
	bool some = s->fifo_head != s->fifo_tail;
	if (some) {
		*e = c->fifo[s->fifo_head % s->fifo_size];
		s->fifo_head++;
	}
	fifo_unlock(c);
	return some;
}

static bool fifo_push(struct uvm_cache *c, uint64_t index, uint64_t nr_pages)
{
	struct uvm_cache_shared *s = c->shared;
	fifo_lock(c);
	bool room = s->fifo_tail - s->fifo_head < s->fifo_size;
	if (room) {
		c->fifo[s->fifo_tail % s->fifo_size] = (struct uvm_extent){index, nr_pages};
		s->fifo_tail++;
	}
	fifo_unlock(c);
	return room;
}

/* What of the extent is still in the cache: bit 0 some page, bit 1 one that is clean once it is written. */
enum { KEPT = 1, KEPT_DIRTY = 2 };
static unsigned extent_kept(struct uvm_cache *c, const struct uvm_extent *e)
{
	unsigned kept = 0;
	for (uint64_t i = e->index; i < e->index + e->nr_pages; i++) {
		if (uvm_folio_begins_page(i) &&
		    (i = uvm_cache_next_touched(c, i)) >= e->index + e->nr_pages)
			break;
		unsigned state = uvm_folio_state(atomic_load(&c->folios[i]));
		kept |= state != UVM_FOLIO_ABSENT ? KEPT : 0;
		kept |= state == UVM_FOLIO_DIRTY && !uvm_cache_pinned(c, i) ? KEPT_DIRTY : 0;
	}
	return kept;
}

/* Writes the queue anew: what is in the cache, each page once, in the order of the file. Behind a full queue
 * the last extent takes in all the rest. */
static void fifo_rebuild(struct uvm_cache *c)
{
	struct uvm_cache_shared *s = c->shared;
	struct uvm_extent *last = NULL;
	fifo_lock(c);
	s->fifo_head = s->fifo_tail;
	for (uint64_t i = 0; i < c->nr_pages; i++) {
		if (uvm_folio_begins_page(i) && (i = uvm_cache_next_touched(c, i)) >= c->nr_pages)
			break;
		if (uvm_folio_state(atomic_load(&c->folios[i])) == UVM_FOLIO_ABSENT)
			continue;
		bool room = s->fifo_tail - s->fifo_head < s->fifo_size;
		bool next =
			last && last->index + last->nr_pages == i && last->nr_pages < UVM_PMD_PAGES;
		if (next || !room) {
			last->nr_pages = i + 1 - last->index;
		} else {
			last = &c->fifo[s->fifo_tail % s->fifo_size];
			*last = (struct uvm_extent){i, 1};
			s->fifo_tail++;
		}
	}
	fifo_unlock(c);
}

/* Every page in the cache is in the queue, so none is forgotten. Entries of pages that were evicted out of
 * turn stay until reclaim meets them; when they fill the queue it is written anew, from the folio words. It
 * has room for twice the cap, so that is rare. (Nothing is evicted here to make room: the oldest entry may
 * be an old one of the page that has just come, and then each fault would take away what it brought.) */
static void queue_extent(struct uvm_cache *c, uint64_t index, uint64_t nr_pages)
{
	if (!fifo_push(c, index, nr_pages))
		fifo_rebuild(c);
}

/* One instruction may need four pages at once (a move from one page border to another). If each of them
 * were taken for the next, none would ever be there together: so the last ones that came stay. */
static bool is_recent(struct uvm_cache *c, const struct uvm_extent *e)
{
	for (int i = 0; i < UVM_RECENT; i++) {
		uint64_t index = __atomic_load_n(&c->shared->recent[i], __ATOMIC_RELAXED);
		if (index - e->index < e->nr_pages)
			return true;
	}
	return false;
}

void uvm_cache_note_extent(struct uvm_cache *c, uint64_t index, uint64_t nr_pages)
{
	uint64_t n = __atomic_fetch_add(&c->shared->nr_recent, 1, __ATOMIC_RELAXED);
	__atomic_store_n(&c->shared->recent[n % UVM_RECENT], index, __ATOMIC_RELAXED);
	queue_extent(c, index, nr_pages);
}

/* Drops clean pages of [index, index + nr_pages), run by run; the memory goes at once, everywhere. */
int64_t uvm_cache_evict(struct uvm_cache *c, uint64_t index, uint64_t nr_pages)
{
	uint64_t end = index + nr_pages;
	int64_t done = 0;
	if (nr_pages > UVM_PMD_PAGES)
		index = uvm_cache_next_touched(c, index);
	while (index < end) {
		uint64_t run = index;
		while (run < end && run - index < UVM_PMD_PAGES &&
		       uvm_folio_move(c, run, UVM_FOLIO_UPTODATE, UVM_FOLIO_EVICTING))
			run++;
		if (run > index) {
			int rc = -EBADF;
			if (uvm_cache_data_ours(c))
				rc = sys_punch_hole(c->data_fd, (int64_t)(index << UVM_PAGE_SHIFT),
						    (int64_t)((run - index) << UVM_PAGE_SHIFT));
			for (uint64_t i = index; i < run; i++)
				uvm_folio_move(c, i, UVM_FOLIO_EVICTING,
					       rc < 0 ? UVM_FOLIO_UPTODATE : UVM_FOLIO_ABSENT);
			if (rc < 0)
				return rc;
			uvm_cache_uncharge(c, run - index);
			done += (int64_t)(run - index);
			index = run;
		} else {
			index++;
		}
		if (uvm_folio_begins_page(index))
			index = uvm_cache_next_touched(c, index);
	}
	return done;
}

enum { LOOK_AT_MOST = 1024 };

/* Takes back at least nr_pages, oldest first. Returns what it got. */
static uint64_t reclaim(struct uvm_cache *c, uint64_t nr_pages, bool may_write_back)
{
	struct uvm_extent e;
	uint64_t got = 0, left;
	fifo_lock(c);
	left = c->shared->fifo_tail - c->shared->fifo_head; /* each extent once */
	fifo_unlock(c);
	if (!may_write_back && left > LOOK_AT_MOST) /* dirty ones may be all there is */
		left = LOOK_AT_MOST;
	while (got < nr_pages && left-- > 0 && fifo_pop(c, &e)) {
		if (is_recent(c, &e)) {
			queue_extent(c, e.index, e.nr_pages);
			continue;
		}
		int64_t n = uvm_cache_evict(c, e.index, e.nr_pages);
		unsigned kept = extent_kept(c, &e);
		if (kept & KEPT_DIRTY && may_write_back) {
			(void)uvm_cache_write_back(c, e.index, e.nr_pages, false);
			int64_t more = uvm_cache_evict(c, e.index, e.nr_pages);
			kept = extent_kept(c, &e);
			n = (n > 0 ? n : 0) + (more > 0 ? more : 0);
		}
		if (kept) /* another thread may have taken the place of what we popped */
			queue_extent(c, e.index, e.nr_pages);
		got += n > 0 ? (uint64_t)n : 0;
	}
	return got;
}

/* What killed processes leave behind, so that less and less fits under the cap. Folios in the middle of something,
 * which no queue holds, are taken over. Where one was killed between moving folio words and counting them,
 * nr_used is off: no lock keeps others out of that gap, but they are in it for microseconds, so an
 * excess that was there at each of many looks is a dead process's. Pages that are filled or evicted just
 * now count or not, as it may be. Returns the excess that is still in question. */
static int64_t settle_the_dead(struct uvm_cache *c, int64_t excess, bool believe)
{
	uint64_t *nr_used = &c->shared->ctl.nr_used, settled = 0, busy = 0;
	uint32_t alive = c->owner; /* the last one that proved to be */
	if (atomic_load(&c->shared->nr_slots) < 2)
		return excess;
	int64_t before = (int64_t)__atomic_load_n(nr_used, __ATOMIC_ACQUIRE);
	for (uint64_t i = 0; i < c->nr_pages; i++) {
		if (uvm_folio_begins_page(i) && (i = uvm_cache_next_touched(c, i)) >= c->nr_pages)
			break;
		uint32_t word = atomic_load(&c->folios[i]);
		unsigned state = uvm_folio_state(word);
		if (state != UVM_FOLIO_ABSENT && word >> 8 != c->owner && word >> 8 != alive &&
		    !uvm_cache_take_over_dead(c, i))
			alive = word >> 8;
		busy += state == UVM_FOLIO_FILLING || state == UVM_FOLIO_EVICTING;
		settled += state == UVM_FOLIO_UPTODATE || state == UVM_FOLIO_DIRTY ||
			   state == UVM_FOLIO_WRITEBACK;
	}
	int64_t after = (int64_t)__atomic_load_n(nr_used, __ATOMIC_ACQUIRE);
	int64_t least = before < after ? before : after, most = before < after ? after : before;
	int64_t over = least - (int64_t)(settled + busy), under = (int64_t)settled - most;
	excess = over < excess ? over : excess;
	if (under > 0) {
		__atomic_fetch_add(nr_used, (uint64_t)under, __ATOMIC_RELAXED);
	} else if (believe && excess > 0 &&
		   !others_attached(c)) { /* who may be stopped in that gap */
		__atomic_fetch_sub(nr_used, (uint64_t)excess, __ATOMIC_RELAXED);
		excess = INT64_MAX;
	}
	return excess;
}

/* memcg charge before commit: reclaim first when it would go over the cap. False: no room without
 * writing back, and the caller may not wait for that. A caller that may goes over the cap when nothing
 * can be taken back (all pages dirty in processes out of our reach): late memory beats a hang. */
bool uvm_cache_charge(struct uvm_cache *c, uint64_t nr_pages, bool may_write_back)
{
	struct uvm_cache_ctl *ctl = &c->shared->ctl;
	bool give_way = false, write_back = may_write_back;
	int64_t excess = INT64_MAX;
	for (int tries = 0;; tries++) {
		uint64_t used = __atomic_add_fetch(&ctl->nr_used, nr_pages, __ATOMIC_RELAXED);
		if (used <= ctl->cap_pages || give_way) {
			uint64_t peak = __atomic_load_n(&ctl->nr_peak, __ATOMIC_RELAXED);
			while (used > peak &&
			       !__atomic_compare_exchange_n(&ctl->nr_peak, &peak, used, true,
							    __ATOMIC_RELAXED, __ATOMIC_RELAXED))
				;
			return true;
		}
		__atomic_fetch_sub(&ctl->nr_used, nr_pages, __ATOMIC_RELAXED);
		/* What a forked child may write to stays dirty, however often it is written back. */
		if (write_back && others_attached(c))
			write_back = false;
		/* A little more than asked, so that not every fault comes here. */
		uint64_t want = used - ctl->cap_pages + ctl->cap_pages / 64;
		if (reclaim(c, want, write_back))
			continue;
		if (!may_write_back)
			return false;
		excess = settle_the_dead(c, excess, tries >= RECOUNT_TRIES);
		/* Nothing to take: other threads are filling what is charged (wait for them), or all of it
		 * is dirty and a forked child may write to it. */
		give_way = tries >= CHARGE_TRIES || (tries > 2 && !write_back);
		usleep(500);
	}
}

void uvm_cache_uncharge(struct uvm_cache *c, uint64_t nr_pages)
{
	uint64_t *nr_used = &c->shared->ctl.nr_used;
	uint64_t used = __atomic_load_n(nr_used, __ATOMIC_RELAXED), left;
	do /* not below zero: what a killed child was filling may not have been charged yet */
		left = used > nr_pages ? used - nr_pages : 0;
	while (!__atomic_compare_exchange_n(nr_used, &used, left, true, __ATOMIC_RELAXED,
					    __ATOMIC_RELAXED));
}

/* ---- write-back --------------------------------------------------------------------------------------------- */
struct protect_arg {
	struct uvm_cache *c;
	uint64_t index, nr_pages;
	int rc;
};

/* Write-protects a run of folios in one region of this process, as page_mkclean() does by rmap. */
static void protect_in_region(struct uvm_region *r, void *data)
{
	struct protect_arg *a = data;
	uint64_t first = a->index, end = a->index + a->nr_pages;
	if (r->cache != a->c || !r->writable || r->backing != UVM_BACKING_SHARED_FILE ||
	    a->rc < 0 || atomic_load(&r->state) == UVM_REGION_FREE)
		return;
	if (first < r->pgoff)
		first = r->pgoff;
	if (end > r->pgoff + r->nr_pages)
		end = r->pgoff + r->nr_pages;
	while (first < end && a->rc == 0) {
		uint64_t index = first - r->pgoff, addr = uvm_region_addr(r, index);
		uint64_t n = end - first,
			 to_pmd = UVM_PMD_PAGES - (addr >> UVM_PAGE_SHIFT) % UVM_PMD_PAGES;
		if (n > to_pmd)
			n = to_pmd;
		uvm_ptl_lock(addr);
		a->rc = sys_uffd_writeprotect(uvm_service_uffd(r->service), addr,
					      n << UVM_PAGE_SHIFT, UFFDIO_WRITEPROTECT_MODE_WP);
		for (uint64_t i = index; i < index + n && a->rc == 0; i++)
			if (atomic_load(&r->ptes[i]) == UVM_PTE_PRESENT)
				uvm_set_pte(r, i, UVM_PTE_WRITE_PROTECTED);
		uvm_ptl_unlock(addr);
		first += n;
	}
	if (a->rc ==
	    -ENOENT) /* being closed, or a placeholder stands in it: its pages stay dirty */
		a->rc = -EBUSY;
}

static int copy_out(struct uvm_cache *c, uint64_t index, uint64_t nr_pages, char *buf)
{
	uint64_t off = index << UVM_PAGE_SHIFT, len = nr_pages << UVM_PAGE_SHIFT, done = 0;
	if (off + len > c->shared->ctl.size)
		len = c->shared->ctl.size - off;
	while (done < len) {
		int64_t n = sys_pread(c->data_fd, buf + done, len - done, (int64_t)(off + done));
		if (n <= 0 && n != -EINTR)
			return n < 0 ? (int)n : -EIO;
		done += n > 0 ? (uint64_t)n : 0;
	}
	/* Never over a version that is not ours, and never past the end of a file that was cut. */
	int rc = uvm_cache_data_ours(c) ? version_check(c) : -EBADF;
	if (rc < 0)
		return rc;
	c->shared->wb_writing = 1;
	for (done = 0; done < len && rc == 0;) {
		int64_t n = sys_pwrite(c->file_fd, buf + done, len - done, (int64_t)(off + done));
		if (n <= 0 && n != -EINTR)
			rc = n < 0 ? (int)n : -EIO;
		done += n > 0 ? (uint64_t)n : 0;
	}
	int adopted = version_adopt(c);
	c->shared->wb_writing = 0;
	return rc ? rc : adopted;
}

struct written_arg {
	struct uvm_cache *c;
	uint64_t nr_pages;
};

/* Counted once, for the first region that maps the cache. */
static void count_written(struct uvm_region *r, void *data)
{
	struct written_arg *a = data;
	if (r->cache != a->c || !a->nr_pages || atomic_load(&r->state) == UVM_REGION_FREE)
		return;
	uvm_count(r, UVM_COUNTER_WRITEBACK, a->nr_pages);
	uvm_count(r, UVM_COUNTER_BYTES_WRITTEN, a->nr_pages << UVM_PAGE_SHIFT);
	a->nr_pages = 0;
}

/* One run of dirty folios from index on, at most to end: take, protect, copy, and clean unless written
 * again meanwhile. Under wb_lock: an older copy must never land in the file over a newer one.
 *
 * Whether other processes are attached is asked after the run was taken: one that attaches later starts
 * with empty page tables, and its first store finds WRITEBACK and makes the folio dirty again. Page
 * tables of one that was there cannot be protected from here, so its pages are written but stay dirty:
 * nothing is lost, some is written twice. So are those that are pinned, and they stay writable, too: a
 * run is of pinned pages or of others. Returns the pages taken; *rc tells the first error. */
static uint64_t write_back_run(struct uvm_cache *c, uint64_t index, uint64_t end, char *buf,
			       int *rc)
{
	struct protect_arg a = {c, index, 0, 0};
	bool of_pinned = uvm_cache_pinned(c, index);
	while (index + a.nr_pages < end && a.nr_pages < WRITE_BACK_PAGES &&
	       uvm_cache_pinned(c, index + a.nr_pages) == of_pinned &&
	       uvm_folio_move(c, index + a.nr_pages, UVM_FOLIO_DIRTY, UVM_FOLIO_WRITEBACK))
		a.nr_pages++;
	if (!a.nr_pages)
		return 0;
	bool clean = !of_pinned && !others_attached(c);
	if (clean)
		uvm_for_each_region(protect_in_region, &a);
	int copied = copy_out(c, index, a.nr_pages, buf);
	if (copied < 0) {
		__atomic_store_n(&c->shared->ctl.wb_err, -copied, __ATOMIC_RELEASE);
		__atomic_fetch_add(&c->shared->ctl.wb_err_seq, 1, __ATOMIC_ACQ_REL);
		if (*rc == 0)
			*rc = copied;
	}
	struct written_arg written = {c, copied == 0 ? a.nr_pages : 0};
	uvm_for_each_region(count_written, &written);
	clean = clean && copied == 0 && a.rc == 0;
	for (uint64_t i = index; i < index + a.nr_pages; i++) {
		unsigned to =
			clean && !uvm_cache_pinned(c, i) ? UVM_FOLIO_UPTODATE : UVM_FOLIO_DIRTY;
		if (uvm_folio_move(c, i, UVM_FOLIO_WRITEBACK, to) && to == UVM_FOLIO_UPTODATE)
			__atomic_fetch_sub(&c->shared->ctl.nr_dirty, 1, __ATOMIC_RELAXED);
	}
	return a.nr_pages;
}

/* A forked child lets a store in before it says that the folio it filled is dirty: wait for it. */
static bool being_filled_elsewhere(struct uvm_cache *c, uint64_t index)
{
	uint32_t word = atomic_load(&c->folios[index]);
	return uvm_folio_state(word) == UVM_FOLIO_FILLING && word >> 8 != c->owner &&
	       !uvm_cache_take_over_dead(c, index);
}

/* Writes the dirty pages of the range to the file; with `wait` also those that are pinned, which reclaim
 * has no use for. Returns the first error; what failed stays dirty. */
int uvm_cache_write_back(struct uvm_cache *c, uint64_t index, uint64_t nr_pages, bool wait)
{
	uint64_t p, end = index + nr_pages;
	int first = 0;
	int rc = sys_mmap(0, WRITE_BACK_PAGES << UVM_PAGE_SHIFT, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, &p);
	if (rc < 0)
		return rc;
	if (nr_pages > UVM_PMD_PAGES)
		index = uvm_cache_next_touched(c, index);
	while (index < end) {
		unsigned state = uvm_folio_state(atomic_load(&c->folios[index]));
		if ((state == UVM_FOLIO_DIRTY || state == UVM_FOLIO_WRITEBACK) &&
		    (wait || !uvm_cache_pinned(c, index))) {
			wb_lock(c);
			/* Still WRITEBACK, with the lock in our hand: its writer died. */
			uvm_folio_move(c, index, UVM_FOLIO_WRITEBACK, UVM_FOLIO_DIRTY);
			index += write_back_run(c, index, end, (char *)(uintptr_t)p, &first);
			wb_unlock(c);
			/* 0: written and cleaned by the one we waited for; look again. */
			continue;
		}
		if (wait && being_filled_elsewhere(c, index)) {
			usleep(200);
			continue;
		}
		index++;
		if (uvm_folio_begins_page(index))
			index = uvm_cache_next_touched(c, index);
	}
	sys_munmap(p, WRITE_BACK_PAGES << UVM_PAGE_SHIFT);
	return first;
}
