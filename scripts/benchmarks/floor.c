/*
 * C floors: the least that any pager has to do, so that the library is compared with the machine
 * and not with itself. One shared object, loaded by ctypes, so that library and floor are touched by
 * the same function, in the same process, in turn.
 *
 * A floor over files:       a shared memfd each, side by side, registered MISSING; a fault is pread() +
 *                           UFFDIO_COPY.
 * A floor over write bits:  private memory, registered WP; a fault is UFFDIO_WRITEPROTECT(0).
 * Who resolves a fault:     a thread (sleeping, or spinning for a while first), the touching thread
 *                           in its SIGBUS handler, or nobody (memory filled by floor_fill).
 *
 * Anything unexpected ends the process with a message: a floor that limps measures nothing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL

enum handler { HANDLER_NONE = 0, HANDLER_THREAD = 1, HANDLER_SIGBUS = 2 };

struct floor {
	char *base;
	size_t nbytes; /* what is touched; one page more is mapped: touching it stops the thread */
	size_t block;  /* bytes brought in by one fault */
	char *buffer;  /* one block, resident, outside every registered range */
	int uffd;
	size_t nr_parts; /* files and their memory; 0: a write-protect floor */
	size_t part;     /* bytes of each */
	int *files, *memfds;
	enum handler handler;
	uint64_t spin_ns;
	pthread_t thread;
	struct sigaction previous;
	_Atomic uint64_t faults;
};

static struct floor *in_thread; /* whose faults our SIGBUS handler answers */

static _Noreturn void die(const char *what)
{
	fprintf(stderr, "benchmark floor: %s: %s\n", what, strerror(errno));
	abort();
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ULL + (uint64_t)t.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#endif
}

/* ---- touching: the same code for the library, the floors and the peers ---- */

/* One read (or write) at each offset; what each took, in ns. Returns the sum of the words read. */
uint64_t bench_touch(char *base, const uint64_t *offsets, size_t count, uint64_t *latencies_ns,
		     int write)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < count; i++) {
		volatile uint32_t *word = (volatile uint32_t *)(base + offsets[i]);
		uint64_t start = now_ns();

		if (write)
			*word = (uint32_t)i;
		else
			sum += *word;
		latencies_ns[i] = now_ns() - start;
	}
	return sum;
}

/* One read per step, in order. Returns the sum of the words read. */
uint64_t bench_scan(char *base, size_t nbytes, size_t step, uint64_t *elapsed_ns)
{
	uint64_t sum = 0, start = now_ns();

	for (size_t offset = 0; offset < nbytes; offset += step)
		sum += *(volatile uint32_t *)(base + offset);
	*elapsed_ns = now_ns() - start;
	return sum;
}

/* Make sure the kernel has `nbytes` of free memory that the host really backs (see README.md). */
int bench_warm(size_t nbytes)
{
	char *p = mmap(NULL, nbytes, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	return p == MAP_FAILED ? -1 : munmap(p, nbytes);
}

/* How many of these pages are in memory now (mincore): a latency round must start from none. */
long bench_present(char *base, const uint64_t *offsets, size_t count)
{
	long present = 0;

	for (size_t i = 0; i < count; i++) {
		uintptr_t page = (uintptr_t)(base + offsets[i]) & ~(PAGE - 1);
		unsigned char state;

		if (mincore((void *)page, PAGE, &state) < 0)
			return -1;
		present += state & 1;
	}
	return present;
}

/* ---- resolving one fault ---- */

static void copy_in(struct floor *f, uint64_t address, size_t length)
{
	size_t done = 0;

	while (done < length) {
		struct uffdio_copy copy = {
			.dst = address + done,
			.src = (uintptr_t)f->buffer + done,
			.len = length - done,
		};

		if (ioctl(f->uffd, UFFDIO_COPY, &copy) == 0)
			return;
		if (errno == EAGAIN && copy.copy > 0) {
			done += (size_t)copy.copy;
		} else if (errno == EEXIST) {
			struct uffdio_range page = {.start = address + done, .len = PAGE};

			if (ioctl(f->uffd, UFFDIO_WAKE, &page) < 0)
				die("UFFDIO_WAKE");
			done += PAGE;
		} else if (errno != EAGAIN) {
			die("UFFDIO_COPY");
		}
	}
}

static void fill_block(struct floor *f, uint64_t offset)
{
	int file = f->files[offset / f->part];
	uint64_t at = offset % f->part;
	size_t length = f->part - at < f->block ? f->part - at : f->block;
	size_t done = 0;

	while (done < length) {
		ssize_t n = pread(file, f->buffer + done, length - done, (off_t)(at + done));

		if (n <= 0)
			die("pread");
		done += (size_t)n;
	}
	copy_in(f, (uintptr_t)f->base + offset, length);
}

static void protect(struct floor *f, uint64_t address, size_t length, uint64_t mode)
{
	struct uffdio_writeprotect wp = {{address, length}, mode};

	while (ioctl(f->uffd, UFFDIO_WRITEPROTECT, &wp) < 0)
		if (errno != EAGAIN)
			die("UFFDIO_WRITEPROTECT");
}

static void resolve(struct floor *f, uint64_t address)
{
	uint64_t offset = address - (uintptr_t)f->base;

	/* Before the page is there: once it is, the toucher may go on and ask for the count. */
	atomic_fetch_add_explicit(&f->faults, 1, memory_order_relaxed);
	if (f->nr_parts)
		fill_block(f, offset & ~((uint64_t)f->block - 1));
	else
		protect(f, address & ~(PAGE - 1), PAGE, 0);
}

/* ---- the thread ---- */

static void next_message(struct floor *f, struct uffd_msg *message)
{
	uint64_t deadline = now_ns() + f->spin_ns;

	for (;;) {
		if (read(f->uffd, message, sizeof(*message)) == sizeof(*message))
			return;
		if (errno != EAGAIN && errno != EINTR)
			die("read of the userfaultfd");
		if (!f->spin_ns)
			continue; /* a blocking descriptor: the read itself sleeps */
		if (now_ns() < deadline) {
			relax();
			continue;
		}
		struct pollfd p = {.fd = f->uffd, .events = POLLIN};

		if (poll(&p, 1, -1) < 0 && errno != EINTR)
			die("poll");
	}
}

static void *serve(void *arg)
{
	struct floor *f = arg;
	uint64_t stop = (uintptr_t)f->base + f->nbytes;

	for (;;) {
		struct uffd_msg message;

		next_message(f, &message);
		if (message.event != UFFD_EVENT_PAGEFAULT)
			continue;
		if (message.arg.pagefault.address >= stop) {
			if (f->nr_parts) {
				struct uffdio_zeropage zero = {{stop, PAGE}, 0, 0};

				if (ioctl(f->uffd, UFFDIO_ZEROPAGE, &zero) < 0)
					die("UFFDIO_ZEROPAGE");
			} else {
				protect(f, stop, PAGE, 0);
			}
			return NULL;
		}
		resolve(f, message.arg.pagefault.address);
	}
}

/* cpu < 0: wherever the kernel likes. */
int floor_pin(struct floor *f, int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	for (int i = 0; i < CPU_SETSIZE; i++)
		if (cpu < 0 || i == cpu)
			CPU_SET(i, &set);
	if (f->handler != HANDLER_THREAD)
		return 0;
	errno = pthread_setaffinity_np(f->thread, sizeof(set), &set);
	return errno ? -1 : 0;
}

/* ---- the touching thread ---- */

static void on_sigbus(int signo, siginfo_t *info, void *context)
{
	struct floor *f = in_thread;
	uintptr_t address = (uintptr_t)info->si_addr;
	int saved = errno;

	(void)context;
	if (!f || address < (uintptr_t)f->base || address >= (uintptr_t)f->base + f->nbytes) {
		signal(signo, SIG_DFL); /* not ours: let it happen again, for real */
		return;
	}
	resolve(f, address);
	errno = saved;
}

/* Around each round, so that a SIGBUS handler of the library is neither slowed nor replaced. */
int floor_enter(struct floor *f)
{
	struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};

	if (f->handler != HANDLER_SIGBUS)
		return 0;
	in_thread = f;
	sigemptyset(&action.sa_mask);
	return sigaction(SIGBUS, &action, &f->previous);
}

int floor_leave(struct floor *f)
{
	if (f->handler != HANDLER_SIGBUS)
		return 0;
	in_thread = NULL;
	return sigaction(SIGBUS, &f->previous, NULL);
}

/* ---- life ---- */

static int open_uffd(const struct floor *f)
{
	int flags = O_CLOEXEC | (f->spin_ns ? O_NONBLOCK : 0);
	int uffd = (int)syscall(SYS_userfaultfd, flags);
	struct uffdio_api api = {.api = UFFD_API};

	if (uffd < 0)
		return -1;
	api.features = f->nr_parts ? UFFD_FEATURE_MISSING_SHMEM : UFFD_FEATURE_PAGEFAULT_FLAG_WP;
	if (f->handler == HANDLER_SIGBUS)
		api.features |= UFFD_FEATURE_SIGBUS;
	if (ioctl(uffd, UFFDIO_API, &api) < 0) {
		close(uffd);
		return -1;
	}
	return uffd;
}

static int map_memory(struct floor *f)
{
	size_t mapped = f->nbytes + PAGE;

	if (!f->nr_parts) {
		f->base = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			       -1, 0);
		if (f->base == MAP_FAILED || madvise(f->base, mapped, MADV_NOHUGEPAGE) < 0)
			return -1;
		memset(f->base, 1, mapped);
		return 0;
	}
	f->base = mmap(NULL, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (f->base == MAP_FAILED)
		return -1;
	for (size_t i = 0; i < f->nr_parts; i++) {
		size_t bytes = i + 1 < f->nr_parts ? f->part : f->part + PAGE;

		f->memfds[i] = memfd_create("benchmark floor", MFD_CLOEXEC);
		if (f->memfds[i] < 0 || ftruncate(f->memfds[i], (off_t)bytes) < 0)
			return -1;
		if (mmap(f->base + i * f->part, bytes, PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_FIXED | MAP_NORESERVE, f->memfds[i], 0) == MAP_FAILED)
			return -1;
	}
	return 0;
}

void floor_close(struct floor *f)
{
	if (f->handler == HANDLER_THREAD && f->thread) {
		*(volatile char *)(f->base + f->nbytes) = 1;
		pthread_join(f->thread, NULL);
	}
	if (f->base && f->base != MAP_FAILED)
		munmap(f->base, f->nbytes + PAGE);
	if (f->uffd >= 0)
		close(f->uffd);
	for (size_t i = 0; i < f->nr_parts; i++) {
		if (f->memfds && f->memfds[i] >= 0)
			close(f->memfds[i]);
		if (f->files && f->files[i] >= 0)
			close(f->files[i]);
	}
	free(f->memfds);
	free(f->files);
	free(f->buffer);
	free(f);
}

static int open_files(struct floor *f, const char *const *paths)
{
	f->files = malloc(f->nr_parts * sizeof(*f->files));
	f->memfds = malloc(f->nr_parts * sizeof(*f->memfds));
	if (!f->files || !f->memfds)
		return -1;
	for (size_t i = 0; i < f->nr_parts; i++)
		f->files[i] = f->memfds[i] = -1;
	for (size_t i = 0; i < f->nr_parts; i++)
		if ((f->files[i] = open(paths[i], O_RDONLY | O_CLOEXEC)) < 0)
			return -1;
	return 0;
}

/* nbytes of each of nr_paths files; none: a write-protect floor of nbytes. block: a power of two.
 * Returns NULL and sets errno. */
struct floor *floor_open(const char *const *paths, size_t nr_paths, size_t nbytes, size_t block,
			 int handler, unsigned int spin_us)
{
	struct floor *f = calloc(1, sizeof(*f));
	int error;

	if (!f)
		return NULL;
	f->uffd = -1;
	f->nr_parts = nr_paths;
	f->part = nbytes;
	f->nbytes = nr_paths ? nr_paths * nbytes : nbytes;
	f->block = block;
	f->handler = (enum handler)handler;
	f->spin_ns = spin_us * 1000ULL;
	error = posix_memalign((void **)&f->buffer, PAGE, block);
	if (error) {
		f->buffer = NULL;
		goto failed;
	}
	memset(f->buffer, 1, block);
	error = -1;
	if (nr_paths && open_files(f, paths) < 0)
		goto failed;
	if (map_memory(f) < 0 || (f->uffd = open_uffd(f)) < 0)
		goto failed;

	struct uffdio_register reg = {
		.range = {(uintptr_t)f->base, f->nbytes + PAGE},
		.mode = nr_paths ? UFFDIO_REGISTER_MODE_MISSING : UFFDIO_REGISTER_MODE_WP,
	};

	if (ioctl(f->uffd, UFFDIO_REGISTER, &reg) < 0)
		goto failed;
	if (!nr_paths)
		protect(f, (uintptr_t)f->base, nbytes + PAGE, UFFDIO_WRITEPROTECT_MODE_WP);
	if (f->handler == HANDLER_THREAD) {
		error = pthread_create(&f->thread, NULL, serve, f);
		if (error) {
			f->thread = 0;
			goto failed;
		}
	}
	return f;

failed:
	if (error < 0)
		error = errno;
	floor_close(f);
	errno = error;
	return NULL;
}

char *floor_base(struct floor *f)
{
	return f->base;
}

uint64_t floor_faults(struct floor *f)
{
	return atomic_load_explicit(&f->faults, memory_order_relaxed);
}

/* Back to where every touch faults. */
int floor_reset(struct floor *f)
{
	for (size_t i = 0; i < f->nr_parts; i++)
		if (fallocate(f->memfds[i], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
			      (off_t)f->part) < 0)
			return -1;
	if (!f->nr_parts)
		protect(f, (uintptr_t)f->base, f->nbytes, UFFDIO_WRITEPROTECT_MODE_WP);
	return 0;
}

/* pread + UFFDIO_COPY of a range of whole blocks, without a fault. */
void floor_fill(struct floor *f, size_t offset, size_t length)
{
	for (size_t end = offset + length; offset < end; offset += f->block)
		fill_block(f, offset);
}

/* ---- a plain mapping of tmpfs ---- */

void *plain_map(int fd, size_t nbytes, int private_copy)
{
	void *p = mmap(NULL, nbytes, private_copy ? PROT_READ | PROT_WRITE : PROT_READ,
		       private_copy ? MAP_PRIVATE | MAP_NORESERVE : MAP_SHARED, fd, 0);

	return p == MAP_FAILED ? NULL : p;
}

int plain_unmap(void *base, size_t nbytes)
{
	return munmap(base, nbytes);
}
