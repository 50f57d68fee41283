/* The only place that enters the kernel. Every wrapper returns >= 0 or -errno, never the global errno
 * (cffi calls run without the GIL, so another thread's errno would be seen). A call that may stop half
 * way returns struct uvm_done: the errno and the bytes done, apart (UFFDIO_COPY may fail without
 * writing its out field, and EAGAIN has two meanings: see uvm_done.done).
 *
 * This header is also the seam for fault injection: uvm_inject_take() is asked before each call, and
 * answers at the cost of one predictable branch while nothing is armed. */
#ifndef UVM_SYS_H
#define UVM_SYS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "uapi.h"
#include "uffd_vm.h"

/* --- fault injection --------------------------------------------------------------------------- */
extern _Atomic int uvm_inject_armed;
/* 0: make the call; else -errno to return instead. May sleep (an injected delay). */
int uvm_inject_hit(int op);

static inline int uvm_inject_take(int op)
{
	if (__builtin_expect(atomic_load_explicit(&uvm_inject_armed, memory_order_relaxed) == 0, 1))
		return 0;
	return uvm_inject_hit(op);
}

#define UVM_SYS_INJECT(op)                                                                         \
	do {                                                                                       \
		int inject_rc_ = uvm_inject_take(op);                                              \
		if (inject_rc_)                                                                    \
			return inject_rc_;                                                         \
	} while (0)

#define UVM_SYS_INJECT_DONE(op)                                                                    \
	do {                                                                                       \
		int inject_rc_ = uvm_inject_take(op);                                              \
		if (inject_rc_)                                                                    \
			return (struct uvm_done){-inject_rc_, UVM_DONE_UNTOUCHED};                 \
	} while (0)

static inline int uvm_rc(long rc)
{
	return rc < 0 ? -errno : (int)rc;
}

/* --- userfaultfd ------------------------------------------------------------------------------- */
static inline int sys_userfaultfd(int flags)
{
	UVM_SYS_INJECT(UVM_OP_USERFAULTFD);
	return uvm_rc(syscall(SYS_userfaultfd, flags));
}

static inline int sys_uffd_from_device(int flags)
{
	int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (dev < 0)
		return -errno;
	int fd = ioctl(dev, USERFAULTFD_IOC_NEW, flags);
	int rc = fd < 0 ? -errno : fd;
	close(dev);
	return rc;
}

static inline int sys_uffd_api(int fd, uint64_t *features, uint64_t *ioctls)
{
	struct uffdio_api api = {.api = UFFD_API, .features = *features};
	UVM_SYS_INJECT(UVM_OP_API);
	if (ioctl(fd, UFFDIO_API, &api) < 0)
		return -errno;
	*features = api.features;
	*ioctls = api.ioctls;
	return 0;
}

static inline int sys_uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode,
				    uint64_t *ioctls)
{
	struct uffdio_register r = {.range = {start, len}, .mode = mode};
	UVM_SYS_INJECT(UVM_OP_REGISTER);
	if (ioctl(fd, UFFDIO_REGISTER, &r) < 0)
		return -errno;
	if (ioctls)
		*ioctls = r.ioctls;
	return 0;
}

static inline int sys_uffd_unregister(int fd, uint64_t start, uint64_t len)
{
	struct uffdio_range r = {start, len};
	UVM_SYS_INJECT(UVM_OP_UNREGISTER);
	return uvm_rc(ioctl(fd, UFFDIO_UNREGISTER, &r));
}

static inline int sys_uffd_wake(int fd, uint64_t start, uint64_t len)
{
	struct uffdio_range r = {start, len};
	UVM_SYS_INJECT(UVM_OP_WAKE);
	return uvm_rc(ioctl(fd, UFFDIO_WAKE, &r));
}

static inline int sys_uffd_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	struct uffdio_writeprotect wp = {.range = {start, len}, .mode = mode};
	UVM_SYS_INJECT(UVM_OP_WRITEPROTECT);
	return uvm_rc(ioctl(fd, UFFDIO_WRITEPROTECT, &wp));
}

/* The out field is a union of "bytes done" and "-errno"; both are kept: done < 0 is the kernel's
 * -errno there, UVM_DONE_UNTOUCHED says that the kernel never wrote it. */
static inline struct uvm_done uvm_done_make(int rc, int64_t out)
{
	return (struct uvm_done){rc < 0 ? errno : 0, out};
}

static inline struct uvm_done sys_uffd_copy(int fd, uint64_t dst, uint64_t src, uint64_t len,
					    uint64_t mode)
{
	struct uffdio_copy c = {
		.dst = dst, .src = src, .len = len, .mode = mode, .copy = UVM_DONE_UNTOUCHED};
	UVM_SYS_INJECT_DONE(UVM_OP_COPY);
	int rc = ioctl(fd, UFFDIO_COPY, &c);
	return uvm_done_make(rc, c.copy);
}

static inline struct uvm_done sys_uffd_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	struct uffdio_zeropage z = {
		.range = {start, len}, .mode = mode, .zeropage = UVM_DONE_UNTOUCHED};
	UVM_SYS_INJECT_DONE(UVM_OP_ZEROPAGE);
	int rc = ioctl(fd, UFFDIO_ZEROPAGE, &z);
	return uvm_done_make(rc, z.zeropage);
}

static inline struct uvm_done sys_uffd_continue(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	struct uffdio_continue c = {
		.range = {start, len}, .mode = mode, .mapped = UVM_DONE_UNTOUCHED};
	UVM_SYS_INJECT_DONE(UVM_OP_CONTINUE);
	int rc = ioctl(fd, UFFDIO_CONTINUE, &c);
	return uvm_done_make(rc, c.mapped);
}

static inline struct uvm_done sys_uffd_poison(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	struct uvm_uffdio_poison p = {
		.start = start, .len = len, .mode = mode, .updated = UVM_DONE_UNTOUCHED};
	UVM_SYS_INJECT_DONE(UVM_OP_POISON);
	int rc = ioctl(fd, UVM_UFFDIO_POISON, &p);
	return uvm_done_make(rc, p.updated);
}

static inline struct uvm_done sys_uffd_move(int fd, uint64_t dst, uint64_t src, uint64_t len,
					    uint64_t mode)
{
	struct uvm_uffdio_move m = {
		.dst = dst, .src = src, .len = len, .mode = mode, .move = UVM_DONE_UNTOUCHED};
	UVM_SYS_INJECT_DONE(UVM_OP_MOVE);
	int rc = ioctl(fd, UVM_UFFDIO_MOVE, &m);
	return uvm_done_make(rc, m.move);
}

static inline int64_t sys_pagemap_scan(int pagemap_fd, struct uvm_pm_scan_arg *arg)
{
	UVM_SYS_INJECT(UVM_OP_PAGEMAP_SCAN);
	long rc = ioctl(pagemap_fd, UVM_PAGEMAP_SCAN, arg);
	return rc < 0 ? -errno : rc;
}

/* --- files and memory -------------------------------------------------------------------------- */
static inline int64_t sys_pread(int fd, void *buf, size_t len, int64_t off)
{
	UVM_SYS_INJECT(UVM_OP_PREAD);
	ssize_t n = pread(fd, buf, len, off);
	return n < 0 ? -errno : n;
}

/* Reads what the kernel's page cache holds without waiting for a disk: -EAGAIN says "it would wait".
 * File systems that cannot tell say -EOPNOTSUPP. */
static inline int64_t sys_pread_nowait(int fd, void *buf, size_t len, int64_t off)
{
	struct iovec iov = {buf, len};
	UVM_SYS_INJECT(UVM_OP_PREAD_NOWAIT);
	ssize_t n = preadv2(fd, &iov, 1, off, RWF_NOWAIT);
	return n < 0 ? -errno : n;
}

static inline int64_t sys_pwrite(int fd, const void *buf, size_t len, int64_t off)
{
	UVM_SYS_INJECT(UVM_OP_PWRITE);
	ssize_t n = pwrite(fd, buf, len, off);
	return n < 0 ? -errno : n;
}

static inline int sys_pagemap_open(void)
{
	return uvm_rc(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
}

/* The entries (UVM_PM_*) of nr_pages pages from address on: all of them, or -errno. */
static inline int sys_pagemap_read(int fd, uint64_t address, uint64_t *entries, uint64_t nr_pages)
{
	size_t len = nr_pages * sizeof *entries;
	off_t off = (off_t)(address / (uint64_t)getpagesize() * sizeof *entries);
	ssize_t n = pread(fd, entries, len, off);
	return n < 0 ? -errno : (size_t)n == len ? 0 : -EIO;
}

static inline int sys_fsync(int fd)
{
	UVM_SYS_INJECT(UVM_OP_FSYNC);
	return uvm_rc(fsync(fd));
}

static inline int sys_punch_hole(int fd, int64_t off, int64_t len)
{
	UVM_SYS_INJECT(UVM_OP_PUNCH);
	return uvm_rc(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off, len));
}

static inline int sys_madvise(uint64_t start, uint64_t len, int advice)
{
	UVM_SYS_INJECT(UVM_OP_MADVISE);
	return uvm_rc(madvise((void *)(uintptr_t)start, len, advice));
}

static inline int sys_mprotect(uint64_t start, uint64_t len, int prot)
{
	return uvm_rc(mprotect((void *)(uintptr_t)start, len, prot));
}

static inline int sys_mmap(uint64_t addr, uint64_t len, int prot, int flags, int fd, int64_t off,
			   uint64_t *ret)
{
	*ret = 0;
	UVM_SYS_INJECT(UVM_OP_MMAP);
	void *p = mmap((void *)(uintptr_t)addr, len, prot, flags, fd, off);
	if (p == MAP_FAILED)
		return -errno;
	*ret = (uint64_t)(uintptr_t)p;
	return 0;
}

static inline int sys_mremap_over(uint64_t from, uint64_t len, uint64_t to)
{
	void *p = mremap((void *)(uintptr_t)from, len, len, MREMAP_MAYMOVE | MREMAP_FIXED,
			 (void *)(uintptr_t)to);
	return p == MAP_FAILED ? -errno : 0;
}

/* A second mapping of shared memory. */
static inline int sys_mremap_copy(uint64_t from, uint64_t len, uint64_t *ret)
{
	void *p = mremap((void *)(uintptr_t)from, 0, len, MREMAP_MAYMOVE);
	*ret = p == MAP_FAILED ? 0 : (uint64_t)(uintptr_t)p;
	return p == MAP_FAILED ? -errno : 0;
}

static inline int sys_munmap(uint64_t addr, uint64_t len)
{
	return uvm_rc(munmap((void *)(uintptr_t)addr, len));
}

static inline int sys_memfd_create(const char *name)
{
	UVM_SYS_INJECT(UVM_OP_MEMFD);
	return uvm_rc(memfd_create(name, MFD_CLOEXEC));
}

static inline int sys_fstat(int fd, struct stat *st)
{
	UVM_SYS_INJECT(UVM_OP_FSTAT);
	return uvm_rc(fstat(fd, st));
}

static inline int sys_futex_wait(_Atomic uint32_t *word, uint32_t expected,
				 const struct timespec *timeout)
{
	return uvm_rc(syscall(SYS_futex, word, FUTEX_WAIT, expected, timeout, NULL, 0));
}

static inline int sys_futex_wake(_Atomic uint32_t *word, int count)
{
	return uvm_rc(syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0));
}

/* Into this process: where `to` may not be written to it says so, and no signal does. */
static inline int64_t sys_process_vm_writev(const struct iovec *from, const struct iovec *to)
{
	ssize_t n = process_vm_writev(getpid(), from, 1, to, 1, 0);
	return n < 0 ? -errno : n;
}

static inline int64_t sys_process_vm_readv(const struct iovec *to, const struct iovec *from)
{
	ssize_t n = process_vm_readv(getpid(), to, 1, from, 1, 0);
	return n < 0 ? -errno : n;
}

static inline int sys_tgkill(uint32_t tid, int sig)
{
	return uvm_rc(syscall(SYS_tgkill, getpid(), (pid_t)tid, sig));
}

static inline uint32_t sys_gettid(void)
{
	return (uint32_t)syscall(SYS_gettid);
}

static inline int sys_close_range(unsigned first, unsigned last, unsigned flags)
{
	return uvm_rc(syscall(SYS_close_range, first, last, flags));
}

static inline uint64_t sys_now_ns(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

#endif
