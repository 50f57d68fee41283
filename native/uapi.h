/* Kernel constants and structs that Debian 12's <linux/userfaultfd.h> and <linux/fs.h> (6.1) do not have yet.
 * The one place where they are written down; a test compares each with the kernel's own header where
 * that is new enough, and with the running kernel's answers. */
#ifndef UVM_UAPI_H
#define UVM_UAPI_H

#include <linux/ioctl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>

/* <linux/userfaultfd.h>, 6.1 to 6.8 */
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#define UVM_FEATURE_WP_HUGETLBFS_SHMEM (1ull << 12)
#define UVM_FEATURE_WP_UNPOPULATED (1ull << 13)
#define UVM_FEATURE_POISON (1ull << 14)
#define UVM_FEATURE_WP_ASYNC (1ull << 15)
#define UVM_FEATURE_MOVE (1ull << 16)
#define UVM_COPY_MODE_WP (1ull << 1)
#define UVM_CONTINUE_MODE_WP (1ull << 1)
#define UVM_MOVE_MODE_DONTWAKE (1ull << 0)
#define UVM_MOVE_MODE_ALLOW_SRC_HOLES (1ull << 1)

struct uvm_uffdio_poison {
	uint64_t start, len, mode;
	int64_t updated;
};
struct uvm_uffdio_move {
	uint64_t dst, src, len, mode;
	int64_t move;
};
#define UVM_UFFDIO_MOVE _IOWR(0xAA, 0x05, struct uvm_uffdio_move)
#define UVM_UFFDIO_POISON _IOWR(0xAA, 0x08, struct uvm_uffdio_poison)
_Static_assert(sizeof(struct uvm_uffdio_poison) == 32, "struct uffdio_poison");
_Static_assert(sizeof(struct uvm_uffdio_move) == 40, "struct uffdio_move");
_Static_assert(UVM_UFFDIO_POISON == 0xc020aa08u, "UFFDIO_POISON");
_Static_assert(UVM_UFFDIO_MOVE == 0xc028aa05u, "UFFDIO_MOVE");

/* <linux/fs.h>, 6.7 */
struct uvm_pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define UVM_PAGEMAP_SCAN _IOWR('f', 16, struct uvm_pm_scan_arg)
_Static_assert(sizeof(struct uvm_pm_scan_arg) == 96, "struct pm_scan_arg");
_Static_assert(UVM_PAGEMAP_SCAN == 0xc0606610u, "PAGEMAP_SCAN");

#define UVM_PAGE_IS_FILE (1ull << 2)
#define UVM_PAGE_IS_PRESENT (1ull << 3)
#define UVM_PAGE_IS_SWAPPED (1ull << 4)

/* fs/proc/task_mmu.c: an entry of /proc/self/pagemap */
#define UVM_PM_UFFD_WP (1ull << 57)
#define UVM_PM_FILE (1ull << 61)
#define UVM_PM_SWAP (1ull << 62)
#define UVM_PM_PRESENT (1ull << 63)

/* <linux/close_range.h>, 5.9 */
#ifndef CLOSE_RANGE_UNSHARE
#define CLOSE_RANGE_UNSHARE (1u << 1)
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

/* <asm-generic/mman-common.h>, 6.13 */
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif

#endif
