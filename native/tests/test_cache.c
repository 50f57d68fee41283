/* The page cache under pressure: the cap, eviction, write-back, and the order of two write-backs. */
#include "harness.h"

enum { NR = 4096, CAP = 1024 }; /* pages */

/* A pass over a file four times the cap: right bytes, and memory stays below the cap (1 % over it at
 * most: a window that was charged while another one was). */
static void cap_holds(int kind)
{
	int fd = file_make(NR * (uint64_t)UVM_PAGE);
	struct region r = region_make(kind, fd, NR,
				      (struct options){.cap_bytes = CAP * (uint64_t)UVM_PAGE,
						       .fault_around = 16,
						       .readahead = 128});
	struct uvm_cache_ctl *ctl = uvm_cache_ctl(r.cache);
	for (int pass = 0; pass < 2; pass++)
		for (uint64_t p = 0; p < NR; p++)
			CHECK_EQ(peek(&r, p, 11), word_of(p, 0));
	CHECK(LOAD(ctl->nr_peak) <= CAP + CAP / 100);
	if (kind == FILE_RW) {
		for (uint64_t p = 0; p < NR; p++)
			poke(&r, p, 3, p + 1);
		for (uint64_t p = 0; p < NR; p++) {
			CHECK_EQ(peek(&r, p, 3), p + 1);
			CHECK_EQ(peek(&r, p, 4), word_of(p, 0));
		}
		CHECK(LOAD(ctl->nr_peak) <= CAP + CAP / 100);
		CHECK_EQ(uvm_region_flush(r.handle, 0, NR), 0);
		for (uint64_t p = 0; p < NR; p++)
			CHECK_EQ(file_word(fd, p, 3), p + 1);
		EVENTUALLY(LOAD(ctl->nr_dirty) == 0);
	}
	EVENTUALLY(LOAD(ctl->nr_used) <= CAP);
	region_close(&r);
	close(fd);
}

static void smallest_cap_still_serves(int kind)
{
	int fd = file_make(64 * (uint64_t)UVM_PAGE);
	struct region r = region_make(kind, fd, 64,
				      (struct options){.cap_bytes = UVM_PAGE, .fault_around = 1});
	for (int pass = 0; pass < 3; pass++)
		for (uint64_t p = 0; p < 64; p++) {
			if (kind == FILE_RW)
				poke(&r, p, 1, p + (uint64_t)pass);
			CHECK_EQ(peek(&r, p, 0), word_of(p, 0));
		}
	if (kind == FILE_RW) {
		CHECK_EQ(uvm_region_flush(r.handle, 0, 64), 0);
		for (uint64_t p = 0; p < 64; p++)
			CHECK_EQ(file_word(fd, p, 1), p + 2);
	}
	region_close(&r);
	close(fd);
}

/* ---- two write-backs of one page ------------------------------------------------------------------- */
static void *flush_main(void *arg)
{
	const struct region *r = arg;
	CHECK_EQ(uvm_region_flush(r->handle, 0, 1), 0);
	return NULL;
}

static void join(pthread_t t)
{
	CHECK_EQ(pthread_join(t, NULL), 0);
}

/* The first write-back has copied the page, and is late with pwrite; meanwhile the page is stored to and
 * written back again. What was stored later must be what the file says in the end. */
static void later_bytes_win(void)
{
	int fd = file_make(4 * (uint64_t)UVM_PAGE);
	struct region r = region_make(FILE_RW, fd, 4, (struct options){0});
	pthread_t slow;

	poke(&r, 0, 0, 1);
	EVENTUALLY(LOAD(uvm_cache_ctl(r.cache)->nr_dirty) == 1);
	CHECK_EQ(uvm_inject(UVM_OP_PWRITE, 0, 1, 0, 300000000), 0);
	CHECK_EQ(pthread_create(&slow, NULL, flush_main, &r), 0);
	EVENTUALLY(uvm_inject_calls(UVM_OP_PWRITE) == 1); /* it sleeps before its pwrite */
	poke(&r, 0, 0, 2);
	CHECK_EQ(uvm_region_flush(r.handle, 0, 1), 0);
	CHECK_EQ(file_word(fd, 0, 0), 2); /* durable on return */
	join(slow);
	uvm_inject_clear();
	CHECK_EQ(uvm_region_flush(r.handle, 0, 1), 0);
	CHECK_EQ(file_word(fd, 0, 0), 2);
	CHECK(uvm_region_evict(r.handle, 0, 1) == 1);
	CHECK_EQ(peek(&r, 0, 0), 2);
	CHECK_EQ(LOAD(uvm_cache_ctl(r.cache)->nr_dirty), 0);
	region_close(&r);
	close(fd);
}

/* A store during write-back: the page stays dirty, and its store is not lost to an eviction. */
static void store_during_write_back_stays_dirty(void)
{
	int fd = file_make(4 * (uint64_t)UVM_PAGE);
	struct region r = region_make(FILE_RW, fd, 4, (struct options){0});
	pthread_t slow;

	poke(&r, 0, 0, 1);
	EVENTUALLY(LOAD(uvm_cache_ctl(r.cache)->nr_dirty) == 1);
	CHECK_EQ(uvm_inject(UVM_OP_PWRITE, 0, 1, 0, 200000000), 0);
	CHECK_EQ(pthread_create(&slow, NULL, flush_main, &r), 0);
	EVENTUALLY(uvm_inject_calls(UVM_OP_PWRITE) == 1);
	poke(&r, 0, 1, 2);
	CHECK_EQ(uvm_region_evict(r.handle, 0, 1), 0);
	join(slow);
	uvm_inject_clear();
	CHECK_EQ(LOAD(uvm_cache_ctl(r.cache)->nr_dirty), 1);
	CHECK_EQ(uvm_region_evict(r.handle, 0, 1), 0);
	CHECK_EQ(uvm_region_flush(r.handle, 0, 1), 0);
	CHECK_EQ(file_word(fd, 0, 0), 1);
	CHECK_EQ(file_word(fd, 0, 1), 2);
	region_close(&r);
	close(fd);
}

static void failed_write_back_keeps_the_page_dirty(void)
{
	int fd = file_make(4 * (uint64_t)UVM_PAGE);
	struct region r = region_make(FILE_RW, fd, 4, (struct options){0});
	struct uvm_cache_ctl *ctl = uvm_cache_ctl(r.cache);

	poke(&r, 2, 0, 5);
	EVENTUALLY(LOAD(ctl->nr_dirty) == 1);
	CHECK_EQ(uvm_inject(UVM_OP_PWRITE, 0, 1, ENOSPC, 0), 0);
	CHECK_EQ(uvm_region_flush(r.handle, 0, 4), -ENOSPC);
	CHECK_EQ(LOAD(ctl->nr_dirty), 1);
	CHECK_EQ(uvm_region_evict(r.handle, 0, 4), 0);
	CHECK_EQ(peek(&r, 2, 0), 5);
	uvm_inject_clear();
	CHECK_EQ(uvm_region_flush(r.handle, 0, 4), 0);
	CHECK_EQ(file_word(fd, 2, 0), 5);
	CHECK_EQ(uvm_inject(UVM_OP_FSYNC, 0, 1, EIO, 0), 0);
	CHECK_EQ(uvm_region_flush(r.handle, 0, 4), -EIO);
	uvm_inject_clear();
	region_close(&r);
	close(fd);
}

/* Eviction that cannot punch gives nothing back, and the page is still there. */
static void failed_punch_keeps_the_page(void)
{
	int fd = file_make(4 * (uint64_t)UVM_PAGE);
	struct region r = region_make(FILE_R, fd, 4, (struct options){0});
	for (uint64_t p = 0; p < 4; p++)
		CHECK_EQ(peek(&r, p, 0), word_of(p, 0));
	EVENTUALLY(uvm_region_resident(r.handle) == 4);
	CHECK_EQ(uvm_inject(UVM_OP_PUNCH, 0, 1, ENOMEM, 0), 0);
	CHECK_EQ(uvm_region_evict(r.handle, 0, 4), -ENOMEM);
	uvm_inject_clear();
	CHECK_EQ(LOAD(uvm_cache_ctl(r.cache)->nr_used), 4);
	CHECK_EQ(uvm_region_evict(r.handle, 0, 4), 4);
	CHECK_EQ(peek(&r, 1, 0), word_of(1, 0));
	region_close(&r);
	close(fd);
}

int main(void)
{
	alarm(100);
	configure(20000);
	store_during_write_back_stays_dirty();
	failed_write_back_keeps_the_page_dirty();
	failed_punch_keeps_the_page();
	for (int kind = FILE_R; kind < NR_REGION_KINDS; kind++)
		if (kind != FILE_C_TRACKED) { /* its private copies are not the cache's */
			printf("%s\n", region_kind_names[kind]);
			cap_holds(kind);
			smallest_cap_still_serves(kind);
		}
	later_bytes_win();
	nothing_is_left();
	return 0;
}
