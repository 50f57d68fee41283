/* Racing touchers, eviction, write-back, protection, loads and closes, for every kind of region.
 *
 * Threads of one run, all over the same NR pages:
 *   touchers  each owns one word of every page, in which it counts; an array outside says what it must be.
 *             Reads of the other words may see any value up to what their owner has stored.
 *   churner   evict, flush, protect, prefetch and load of random ranges
 *   mapper    makes and closes other regions beside it
 * Invariants: an owner reads what it stored last; no word ever goes back, or is zero in a file region;
 * afterwards memory, and the file in mode "r+", have the last values; nothing is left behind.
 * Modes without stores that stay (r) only check the file's words. */
#include "harness.h"

enum { NR = 384, NR_TOUCHERS = 4, ROUNDS = 20000 };

struct race {
	struct region r;
	_Atomic bool stop;
	_Atomic uint64_t stored[NR_TOUCHERS][NR];
	int rounds;
};
static struct race race;

static uint64_t base_word(uint64_t page)
{
	return untouched_word(&race.r, page);
}

static void *toucher_main(void *arg)
{
	int me = (int)(intptr_t)arg;
	unsigned seed = (unsigned)me * 77 + 5;
	for (int n = 0; n < race.rounds; n++) {
		uint64_t p = (uint64_t)rand_r(&seed) % NR;
		uint64_t mine = atomic_load(&race.stored[me][p]);
		CHECK_EQ(peek(&race.r, p, me), base_word(p) + mine);
		CHECK_EQ(peek(&race.r, p, 100 + me), base_word(p));
		if (kind_writable(race.r.kind) && rand_r(&seed) % 2) {
			atomic_store(&race.stored[me][p], mine + 1);
			poke(&race.r, p, me, base_word(p) + mine + 1);
		}
		int other = (me + 1) % NR_TOUCHERS;
		uint64_t got = peek(&race.r, p, other) - base_word(p);
		CHECK(got <= atomic_load(&race.stored[other][p]));
	}
	return NULL;
}

static void *churner_main(void *arg)
{
	unsigned seed = 99;
	uint64_t failed;
	(void)arg;
	while (!atomic_load(&race.stop)) {
		uint64_t p = (uint64_t)rand_r(&seed) % NR,
			 n = 1 + (uint64_t)rand_r(&seed) % (NR - p);
		int64_t h = race.r.handle, rc;
		switch (rand_r(&seed) % 5) {
		case 0:
			CHECK(uvm_region_evict(h, p, n) >= 0);
			break;
		case 1:
			CHECK_EQ(uvm_region_flush(h, p, n), 0);
			break;
		case 2:
			rc = uvm_region_protect(h, p, n, NULL);
			CHECK(kind_tracked(race.r.kind) ? rc >= 0 : rc == -EOPNOTSUPP);
			break;
		case 3:
			rc = uvm_region_prefetch(h, p, n);
			CHECK(rc == 0 || rc == -EAGAIN);
			break;
		default:
			CHECK_EQ(uvm_region_load(h, p, n, &failed), 0);
		}
	}
	return NULL;
}

static void *mapper_main(void *arg)
{
	int fd = *(int *)arg;
	while (!atomic_load(&race.stop)) {
		struct region r = region_make(FILE_R, fd, 8, (struct options){.fault_around = 4});
		CHECK_EQ(peek(&r, 3, 300), word_of(3, 0));
		region_close(&r);
		struct region a = region_make(ANON, -1, 3, (struct options){0});
		poke(&a, 1, 1, 4);
		CHECK_EQ(peek(&a, 1, 1), 4);
		region_close(&a);
	}
	return NULL;
}

static void run(int kind, uint64_t cap_pages)
{
	int fd = file_make(NR * (uint64_t)UVM_PAGE), others = file_make(8 * (uint64_t)UVM_PAGE);
	pthread_t touchers[NR_TOUCHERS], churner, mapper;

	memset(race.stored, 0, sizeof race.stored);
	atomic_store(&race.stop, false);
	race.rounds = ROUNDS;
	race.r = region_make(kind, fd, NR,
			     (struct options){.fault_around = 4,
					      .readahead = 64,
					      .cap_bytes = cap_pages * UVM_PAGE});
	CHECK_EQ(pthread_create(&churner, NULL, churner_main, NULL), 0);
	CHECK_EQ(pthread_create(&mapper, NULL, mapper_main, &others), 0);
	for (intptr_t i = 0; i < NR_TOUCHERS; i++)
		CHECK_EQ(pthread_create(&touchers[i], NULL, toucher_main, (void *)i), 0);
	for (int i = 0; i < NR_TOUCHERS; i++)
		CHECK_EQ(pthread_join(touchers[i], NULL), 0);
	atomic_store(&race.stop, true);
	CHECK_EQ(pthread_join(churner, NULL), 0);
	CHECK_EQ(pthread_join(mapper, NULL), 0);

	CHECK_EQ(uvm_region_flush(race.r.handle, 0, NR), 0);
	for (uint64_t p = 0; p < NR; p++)
		for (int i = 0; i < NR_TOUCHERS; i++) {
			uint64_t want = base_word(p) + atomic_load(&race.stored[i][p]);
			CHECK_EQ(peek(&race.r, p, i), want);
			if (kind == FILE_RW)
				CHECK_EQ(file_word(fd, p, i), want);
		}
	CHECK_EQ(counter(&race.r, UVM_COUNTER_PGFAULT_FAILED), 0);
	EVENTUALLY(counter(&race.r, UVM_COUNTER_PGFAULT) ==
		   counter(&race.r, UVM_COUNTER_PGMAJFAULT) +
			   counter(&race.r, UVM_COUNTER_PGMINFAULT));
	if (kind_of_file(kind) && kind != FILE_C_TRACKED) { /* charged if and only if there */
		struct uvm_cache_ctl *ctl = uvm_cache_ctl(race.r.cache);
		for (int i = 0;
		     i < 2000 && LOAD(ctl->nr_used) != (uint64_t)uvm_region_resident(race.r.handle);
		     i++)
			usleep(1000);
		CHECK_EQ(LOAD(ctl->nr_used), uvm_region_resident(race.r.handle));
	}
	region_close(&race.r);
	close(fd);
	close(others);
}

int main(int argc, char **argv)
{
	alarm(115);
	configure(20000);
	for (int kind = 0; kind < NR_REGION_KINDS; kind++) {
		if (argc > 1 && kind != atoi(argv[1]))
			continue;
		printf("%s\n", region_kind_names[kind]);
		run(kind, NR * 2);
		if (kind_of_file(kind))
			run(kind, 96);
		nothing_is_left();
	}
	return 0;
}
