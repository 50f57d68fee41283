/* Every kind of region by itself: what is read, written, counted; what evict, flush, protect, load and
 * close leave behind. One thread touches, so all numbers are exact. */
#include "harness.h"

enum { NR = 200 }; /* pages; the file ends inside the last one */
static const uint64_t file_bytes = NR * (uint64_t)UVM_PAGE - 96;

static void read_all(const struct region *r)
{
	for (uint64_t p = 0; p < NR; p++)
		for (int i = 0; i < WORDS; i += 63) {
			bool beyond = kind_of_file(r->kind) &&
				      p * UVM_PAGE + (uint64_t)i * 8 >= file_bytes;
			CHECK_EQ(peek(r, p, i), beyond ? 0 : untouched_word(r, p));
		}
}

static void pages_come_when_touched(int kind)
{
	int fd = file_make(file_bytes);
	for (uint32_t around = 1; around <= 16; around *= 16) {
		struct region r =
			region_make(kind, fd, NR, (struct options){.fault_around = around});
		CHECK_EQ(uvm_region_resident(r.handle), 0);
		read_all(&r);
		EVENTUALLY(counter(&r, UVM_COUNTER_PGFAULT) ==
			   counter(&r, UVM_COUNTER_PGMAJFAULT) +
				   counter(&r, UVM_COUNTER_PGMINFAULT));
		CHECK_EQ(counter(&r, UVM_COUNTER_PGFAULT_FAILED), 0);
		if (around == 1 && kind_of_file(kind) && kind != FILE_C)
			EVENTUALLY(counter(&r, UVM_COUNTER_BYTES_READ) == NR * (uint64_t)UVM_PAGE);
		EVENTUALLY(uvm_region_resident(r.handle) == NR);
		region_close(&r);
	}
	close(fd);
}

static void stores_stay(int kind)
{
	int fd = file_make(file_bytes);
	struct region r = region_make(kind, fd, NR, (struct options){.fault_around = 4});
	for (uint64_t p = 0; p < NR; p += 3) {
		if (p % 2)
			CHECK_EQ(peek(&r, p, 7), untouched_word(&r, p));
		poke(&r, p, 5, p + 1);
	}
	for (uint64_t p = 0; p < NR; p++) {
		CHECK_EQ(peek(&r, p, 5), p % 3 ? untouched_word(&r, p) : p + 1);
		CHECK_EQ(peek(&r, p, 6), untouched_word(&r, p));
	}
	if (kind == FILE_RW) {
		struct uvm_cache_ctl *ctl = uvm_cache_ctl(r.cache);
		EVENTUALLY(LOAD(ctl->nr_dirty) == (NR + 2) / 3);
		CHECK_EQ(uvm_region_flush(r.handle, 0, NR), 0);
		CHECK_EQ(LOAD(ctl->nr_dirty), 0);
		for (uint64_t p = 0; p < NR; p++)
			CHECK_EQ(file_word(fd, p, 5), p % 3 ? word_of(p, 0) : p + 1);
		poke(&r, 3, 5, 77); /* clean again, so it is seen again */
		EVENTUALLY(LOAD(ctl->nr_dirty) == 1);
		CHECK_EQ(uvm_region_flush(r.handle, 0, NR), 0);
		CHECK_EQ(file_word(fd, 3, 5), 77);
	} else if (kind_of_file(kind)) {
		CHECK_EQ(uvm_region_flush(r.handle, 0, NR), 0);
		CHECK_EQ(file_word(fd, 0, 5), word_of(0, 0));
	}
	/* What evict gives back can be read again: the file's, or a private copy that stayed. */
	int64_t evicted = uvm_region_evict(r.handle, 0, NR);
	CHECK(evicted >= 0);
	if (kind == FILE_RW)
		CHECK_EQ(evicted, NR);
	for (uint64_t p = 0; p < NR; p += 3)
		CHECK_EQ(peek(&r, p, 5), kind == FILE_RW && p == 3 ? 77 : p + 1);
	region_close(&r);
	close(fd);
}

static void protect_finds_stores(int kind)
{
	int fd = file_make(file_bytes);
	struct region r = region_make(kind, fd, NR, (struct options){.fault_around = 1});
	for (uint64_t p = 0; p < 50; p++)
		(void)peek(&r, p, 0);
	for (uint64_t p = 50; p < 60; p++)
		poke(&r, p, 0, 1);
	EVENTUALLY(counter(&r, UVM_COUNTER_PGFAULT) == 60); /* counted last */
	CHECK(uvm_region_protect(r.handle, 0, NR, NULL) >= 10);
	uint64_t dirtied = counter(&r, UVM_COUNTER_DIRTIED);
	for (uint64_t p = 0; p < 60; p += 2)
		poke(&r, p, 0, p + 1000);
	EVENTUALLY(counter(&r, UVM_COUNTER_DIRTIED) == dirtied + 30);
	CHECK(uvm_region_protect(r.handle, 0, 0, NULL) == 0); /* waits until all is published */
	const uint8_t *ptes = uvm_region_ptes(r.handle);
	for (uint64_t p = 0; p < 60; p++)
		CHECK_EQ(ptes[p] == UVM_PTE_PRESENT, p % 2 == 0);
	for (uint64_t p = 0; p < 60; p++)
		CHECK_EQ(peek(&r, p, 0), p % 2 == 0 ? p + 1000
					 : p >= 50  ? 1
						    : untouched_word(&r, p));
	region_close(&r);
	close(fd);
}

static void load_takes_no_fault(int kind)
{
	int fd = file_make(file_bytes);
	uint64_t failed;
	struct region r = region_make(kind, fd, NR, (struct options){.fault_around = 1});
	CHECK_EQ(uvm_region_load(r.handle, 10, NR - 10, &failed), 0);
	CHECK_EQ(uvm_region_resident(r.handle), NR - 10);
	CHECK_EQ(counter(&r, UVM_COUNTER_PGFAULT), 0);
	CHECK_EQ(uvm_region_load(r.handle, 0, NR + 1, &failed), -EINVAL);
	CHECK_EQ(uvm_region_prefetch(r.handle, 0, 10), 0);
	EVENTUALLY(uvm_region_resident(r.handle) == NR);
	read_all(&r);
	region_close(&r);
	CHECK_EQ(uvm_region_load(r.handle, 0, 1, &failed), -ESTALE);
	CHECK_EQ(uvm_region_evict(r.handle, 0, 1), -ESTALE);
	CHECK(uvm_region_ctl(r.handle) == NULL);
	close(fd);
}

static void sequential_reads_run_ahead(int kind)
{
	enum { MANY = 4096 };
	int fd = file_make(MANY * (uint64_t)UVM_PAGE);
	struct region r =
		region_make(kind, fd, MANY, (struct options){.fault_around = 16, .readahead = 128});
	for (uint64_t p = 0; p < MANY; p++)
		CHECK_EQ(peek(&r, p, 9), word_of(p, 0));
	CHECK(counter(&r, UVM_COUNTER_READAHEAD) > 0);
	/* What was asked for: of a block that the reader has reached meanwhile the rest is asked for again. */
	CHECK(counter(&r, UVM_COUNTER_READAHEAD) <= 2 * MANY);
	CHECK(counter(&r, UVM_COUNTER_PGFAULT) < MANY / 16);
	region_close(&r);
	close(fd);
}

static void two_regions_share_a_cache(void)
{
	int fd = file_make(file_bytes);
	int cache = cache_make_(fd, UINT64_MAX >> 1, 1);
	struct region a = region_map(FILE_RW, cache, NR, (struct options){.fault_around = 2});
	struct region b = region_map(FILE_RW, cache, 50, (struct options){.pgoff = 20});
	CHECK_EQ(uvm_cache_put(cache), 0);
	for (uint64_t p = 0; p < 50; p++) {
		if (p % 2)
			CHECK_EQ(peek(&b, p, 1), word_of(p + 20, 0));
		poke(&a, p + 20, 2, p + 5);
		CHECK_EQ(peek(&b, p, 2), p + 5);
		poke(&b, p, 3, p + 6);
		CHECK_EQ(peek(&a, p + 20, 3), p + 6);
	}
	CHECK_EQ(uvm_region_flush(b.handle, 0, 50), 0); /* protects in a too */
	CHECK_EQ(file_word(fd, 20, 2), 5);
	poke(&a, 20, 2, 99);
	EVENTUALLY(LOAD(uvm_cache_ctl(cache)->nr_dirty) == 1);
	region_close(&b);
	CHECK_EQ(peek(&a, 20, 2), 99);
	CHECK_EQ(uvm_region_flush(a.handle, 0, NR), 0);
	CHECK_EQ(file_word(fd, 20, 2), 99);
	region_close(&a);
	close(fd);
}

static void wrong_arguments_are_refused(void)
{
	struct uvm_region_args args = {.start = 4096,
				       .len = 4096,
				       .backing = UVM_BACKING_ANON,
				       .cache = -1,
				       .fault_around_pages = 3};
	CHECK_EQ(uvm_region_create(&args), -EINVAL);
	args.fault_around_pages = 1;
	args.len = 100;
	CHECK_EQ(uvm_region_create(&args), -EINVAL);
	args.len = 4096;
	args.backing = UVM_BACKING_SHARED_FILE; /* and no cache */
	CHECK_EQ(uvm_region_create(&args), -EINVAL);
	CHECK_EQ(uvm_region_check(0), -ESTALE);
	CHECK_EQ(uvm_region_check(-1), -ESTALE);
	CHECK_EQ(uvm_region_close_begin(INT64_MAX), -ESTALE);
	CHECK_EQ(uvm_cache_put(12345), -EINVAL);
	CHECK_EQ(uvm_cache_create(0, 0, 0, 0, 0), -EINVAL);
}

/* A span that ends where the next one starts; many of them, closed in another order. */
static void neighbours_are_told_apart(void)
{
	enum { MANY = 300 };
	static struct region regions[MANY];
	for (int i = 0; i < MANY; i++)
		regions[i] = region_make(ANON, -1, 2, (struct options){0});
	for (int i = 0; i < MANY; i++)
		poke(&regions[i], 1, 511, (uint64_t)i + 1);
	for (int i = 0; i < MANY; i += 2)
		region_close(&regions[i]);
	for (int i = 1; i < MANY; i += 2) {
		CHECK_EQ(peek(&regions[i], 1, 511), i + 1);
		CHECK_EQ(peek(&regions[i], 0, 0), 0);
		region_close(&regions[i]);
	}
}

int main(void)
{
	alarm(100);
	configure(20000);
	for (int kind = 0; kind < NR_REGION_KINDS; kind++) {
		printf("%s\n", region_kind_names[kind]);
		pages_come_when_touched(kind);
		if (kind_writable(kind))
			stores_stay(kind);
		if (kind_tracked(kind))
			protect_finds_stores(kind);
		load_takes_no_fault(kind);
		if (kind_of_file(kind))
			sequential_reads_run_ahead(kind);
		nothing_is_left();
	}
	two_regions_share_a_cache();
	wrong_arguments_are_refused();
	neighbours_are_told_apart();
	nothing_is_left();
	return 0;
}
