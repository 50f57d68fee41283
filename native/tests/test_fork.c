/* fork(): a child reads bytes and never zeros, serves itself, and loses nothing, whatever its parent's
 * threads were doing at that moment; and a child that dies in the middle of a fill is taken over from. */
#include "harness.h"

#include <sys/prctl.h>

enum { NR = 512 };

/* Half of the pages were there before the fork, some written; the child needs the rest too. */
static void child_serves_itself(int kind)
{
	int fd = file_make(NR * (uint64_t)UVM_PAGE);
	struct region r = region_make(kind, fd, NR, (struct options){.fault_around = 8});
	for (uint64_t p = 0; p < NR / 2; p++)
		(void)peek(&r, p, 0);
	if (kind_writable(kind))
		for (uint64_t p = 0; p < NR; p += 7)
			poke(&r, p, 1, p + 1);

	pid_t pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		alarm(30);
		for (uint64_t p = 0; p < NR; p++) {
			bool written = kind_writable(kind) && p % 7 == 0;
			CHECK_EQ(peek(&r, p, 0), untouched_word(&r, p));
			CHECK_EQ(peek(&r, p, 1), written ? p + 1 : untouched_word(&r, p));
		}
		if (kind_writable(kind))
			for (uint64_t p = 3; p < NR; p += 7)
				poke(&r, p, 2, p + 2);
		if (kind == FILE_RW) {
			CHECK_EQ(uvm_region_flush(r.handle, 0, NR), 0);
			CHECK_EQ(file_word(fd, 3, 2), 5);
		}
		pid_t grandchild = fork();
		if (grandchild == 0) {
			alarm(30);
			for (uint64_t p = 0; p < NR; p++)
				CHECK_EQ(peek(&r, p, 2), kind_writable(kind) && p % 7 == 3
								 ? p + 2
								 : untouched_word(&r, p));
			region_close(&r);
			nothing_is_left();
			_exit(0);
		}
		wait_child(grandchild);
		region_close(&r);
		nothing_is_left();
		_exit(0);
	}
	wait_child(pid);
	for (uint64_t p = 0; p < NR; p++) {
		bool childs = kind == FILE_RW && p % 7 == 3;
		CHECK_EQ(peek(&r, p, 2), childs ? p + 2 : untouched_word(&r, p));
		CHECK_EQ(peek(&r, p, 3), untouched_word(&r, p));
	}
	if (kind == FILE_RW) {
		CHECK_EQ(uvm_region_flush(r.handle, 0, NR), 0);
		CHECK_EQ(file_word(fd, 7, 1), 8);
		CHECK_EQ(LOAD(uvm_cache_ctl(r.cache)->nr_dirty), 0);
	}
	region_close(&r);
	close(fd);
}

/* Write protection does not survive a fork: the child arms again what was armed. */
static void tracking_goes_on_in_the_child(int kind)
{
	int fd = file_make(NR * (uint64_t)UVM_PAGE);
	struct region r = region_make(kind, fd, NR, (struct options){0});
	for (uint64_t p = 0; p < NR; p++)
		poke(&r, p, 0, p);
	CHECK_EQ(uvm_region_protect(r.handle, 0, NR, NULL), NR);
	pid_t pid = fork();
	if (pid == 0) {
		alarm(30);
		const uint8_t *ptes = uvm_region_ptes(r.handle);
		for (uint64_t p = 0; p < NR; p += 2)
			poke(&r, p, 1, 1);
		CHECK_EQ(uvm_region_protect(r.handle, 0, 0, NULL), 0);
		for (uint64_t p = 0; p < NR; p++)
			CHECK_EQ(ptes[p] == UVM_PTE_PRESENT, p % 2 == 0);
		_exit(0);
	}
	wait_child(pid);
	const uint8_t *ptes = uvm_region_ptes(r.handle);
	for (uint64_t p = 0; p < NR; p++)
		CHECK(ptes[p] != UVM_PTE_PRESENT); /* its stores are its own */
	region_close(&r);
	close(fd);
}

/* Dirty pages of both sides, more than the cap holds. */
static void nothing_is_lost_under_the_cap(void)
{
	int fd = file_make(NR * (uint64_t)UVM_PAGE);
	struct region r = region_make(
		FILE_RW, fd, NR,
		(struct options){.cap_bytes = 64 * (uint64_t)UVM_PAGE, .fault_around = 4});
	pid_t pid = fork();
	for (uint64_t p = pid ? 0 : 1; p < NR; p += 2)
		poke(&r, p, 0, p + 10);
	for (uint64_t p = pid ? 0 : 1; p < NR; p += 2)
		CHECK_EQ(peek(&r, p, 0), p + 10);
	if (pid == 0) {
		CHECK_EQ(uvm_region_flush(r.handle, 0, NR), 0);
		_exit(0);
	}
	wait_child(pid);
	CHECK_EQ(uvm_region_flush(r.handle, 0, NR), 0);
	for (uint64_t p = 0; p < NR; p++) {
		CHECK_EQ(peek(&r, p, 0), p + 10);
		CHECK_EQ(peek(&r, p, 1), word_of(p, 0));
		CHECK_EQ(file_word(fd, p, 0), p + 10);
	}
	region_close(&r);
	close(fd);
}

/* A child is killed while it reads a page: whoever needs the page next takes it over. */
static void dead_filler_is_taken_over_from(int kind)
{
	int fd = file_make(NR * (uint64_t)UVM_PAGE);
	struct region r = region_make(kind, fd, NR, (struct options){.fault_around = 1});
	int ready[2];
	char byte;
	CHECK_EQ(pipe(ready), 0);
	pid_t pid = fork();
	if (pid == 0) {
		uint64_t failed;
		CHECK_EQ(uvm_inject(UVM_OP_PREAD, 0, 1, 0, 60000000000u), 0);
		CHECK_EQ(write(ready[1], "x", 1), 1);
		(void)uvm_region_load(r.handle, 0, NR, &failed);
		_exit(1);
	}
	CHECK_EQ(read(ready[0], &byte, 1), 1);
	EVENTUALLY(uvm_folio_state(LOAD(uvm_cache_folios(r.cache)[0])) == UVM_FOLIO_FILLING);
	CHECK_EQ(kill(pid, SIGKILL), 0);
	CHECK_EQ(waitpid(pid, NULL, 0), pid);
	for (uint64_t p = 0; p < NR; p++)
		CHECK_EQ(peek(&r, p, 0), word_of(p, 0));
	EVENTUALLY(LOAD(uvm_cache_ctl(r.cache)->nr_used) == NR);
	region_close(&r);
	close(ready[0]);
	close(ready[1]);
	close(fd);
}

/* ---- forks while threads fault, evict, write back and protect ----------------------------------------- */
struct busy {
	struct region r;
	_Atomic bool stop;
	_Atomic int nr_running; /* a fork while ASan starts a thread would hang the child, not us */
	pthread_t threads[3];
};

static void *touch_main(void *arg)
{
	struct busy *b = arg;
	unsigned seed = (unsigned)(uintptr_t)&seed;
	atomic_fetch_add(&b->nr_running, 1);
	while (!atomic_load(&b->stop)) {
		uint64_t p = (uint64_t)rand_r(&seed) % NR;
		CHECK_EQ(peek(&b->r, p, 8), untouched_word(&b->r, p));
		if (kind_writable(b->r.kind))
			poke(&b->r, p, 9, p + 1);
	}
	return NULL;
}

static void *churn_main(void *arg)
{
	struct busy *b = arg;
	uint64_t failed;
	atomic_fetch_add(&b->nr_running, 1);
	while (!atomic_load(&b->stop)) {
		CHECK(uvm_region_evict(b->r.handle, 0, NR) >= 0);
		CHECK_EQ(uvm_region_flush(b->r.handle, 0, NR), 0);
		if (kind_tracked(b->r.kind))
			CHECK(uvm_region_protect(b->r.handle, 0, NR, NULL) >= 0);
		CHECK_EQ(uvm_region_load(b->r.handle, 0, 64, &failed), 0);
	}
	return NULL;
}

static void fork_while_busy(int kind, int nr_forks)
{
	int fd = file_make(NR * (uint64_t)UVM_PAGE);
	static struct busy b;
	b.r = region_make(kind, fd, NR,
			  (struct options){.fault_around = 4,
					   .readahead = 32,
					   .cap_bytes = 200 * (uint64_t)UVM_PAGE});
	atomic_store(&b.stop, false);
	atomic_store(&b.nr_running, 0);
	for (int i = 0; i < 3; i++)
		CHECK_EQ(pthread_create(&b.threads[i], NULL, i < 2 ? touch_main : churn_main, &b),
			 0);
	EVENTUALLY(atomic_load(&b.nr_running) == 3);
	for (int n = 0; n < nr_forks; n++) {
		pid_t pid = fork();
		CHECK(pid >= 0);
		if (pid == 0) {
			alarm(30);
			for (uint64_t p = 0; p < NR; p++) {
				CHECK_EQ(peek(&b.r, p, 8), untouched_word(&b.r, p));
				uint64_t got = peek(&b.r, p, 9);
				CHECK(got == untouched_word(&b.r, p) ||
				      (kind_writable(kind) && got == p + 1));
			}
			CHECK_EQ(uvm_region_flush(b.r.handle, 0, NR), 0);
			_exit(0);
		}
		wait_child(pid);
	}
	atomic_store(&b.stop, true);
	for (int i = 0; i < 3; i++)
		CHECK_EQ(pthread_join(b.threads[i], NULL), 0);
	region_close(&b.r);
	close(fd);
}

int main(int argc, char **argv)
{
#ifdef __SANITIZE_THREAD__
	(void)argc, (void)argv;
	puts("TSan gives up on children that start threads (\"dup thread with used id\"); ASan "
	     "runs this");
	return 77;
#endif
	alarm(110);
	configure(20000);
	for (int kind = 0; kind < NR_REGION_KINDS; kind++) {
		if (argc > 1 && kind != atoi(argv[1]))
			continue;
		printf("%s\n", region_kind_names[kind]);
		child_serves_itself(kind);
		if (kind_tracked(kind) && kind != FILE_RW)
			tracking_goes_on_in_the_child(kind);
		if (kind == FILE_R || kind == FILE_C || kind == FILE_RW)
			dead_filler_is_taken_over_from(kind);
		fork_while_busy(kind, 20);
		nothing_is_left();
	}
	nothing_is_lost_under_the_cap();
	nothing_is_left();
	return 0;
}
