/* Faults that bring nothing. A commit that fails, or a race that was lost, wakes the toucher, which faults
 * again and most often finds its page then. Where it never does, each of these faults is young, and the
 * deadline of none would ever come: so faults of one thread at one page, none of which brought a page, one
 * right after the other, are a chain, and have the deadline of the first.
 *
 * No lock: a SIGBUS handler comes here too. An entry is its thread's own, and a thread has one fault at a
 * time; what a lost race of two threads for one free entry costs is a chain that begins later. */
#include "internal.h"

enum { NR_CHAINS = 256, NR_LOOKS = 8 };
static const uint64_t gap_ns =
	1000000000; /* a thread that comes back later had the page meanwhile */

struct chain {
	_Atomic uint32_t tid; /* 0: free */
	_Atomic uint32_t kind;
	_Atomic uint64_t address, first_ns, last_ns;
};

static struct chain chains[NR_CHAINS];
static _Atomic int nr_chains;

static _Atomic uint64_t long_wait_ns[3]; /* by service: when it was seen last */

void uvm_long_wait(const struct uvm_fault *f)
{
	uint64_t now = sys_now_ns();
	if (f->tid == (uint32_t)getpid() && now - f->first_ns > UVM_LONG_WAIT_NS)
		atomic_store(&long_wait_ns[f->service], now);
}

bool uvm_waits_long(int service)
{
	uint64_t seen = atomic_load_explicit(&long_wait_ns[service], memory_order_relaxed);
	return seen && sys_now_ns() - seen < gap_ns;
}

/* The i-th place where the thread's chain may be. */
static struct chain *place_of(uint32_t tid, uint32_t i)
{
	return &chains[(tid * 2654435761u >> 16 ^ i) % NR_CHAINS];
}

static struct chain *chain_of(uint32_t tid)
{
	for (uint32_t i = 0; i < NR_LOOKS; i++) {
		struct chain *c = place_of(tid, i);
		if (atomic_load(&c->tid) == tid)
			return c;
	}
	return NULL;
}

/* A worker may note the end of a fault when the next message has been read: last_ns > now. */
static bool within_gap(const struct chain *c, uint64_t now)
{
	return (int64_t)(now - atomic_load(&c->last_ns)) < (int64_t)gap_ns;
}

static struct chain *chain_take(uint32_t tid, uint64_t now)
{
	for (uint32_t i = 0; i < NR_LOOKS; i++) {
		struct chain *c = place_of(tid, i);
		uint32_t holder = atomic_load(&c->tid);
		if (holder && within_gap(c, now))
			continue;
		if (!atomic_compare_exchange_strong(&c->tid, &holder, tid))
			continue;
		if (!holder)
			atomic_fetch_add(&nr_chains, 1);
		return c;
	}
	return NULL;
}

static bool continues(const struct chain *c, const struct uvm_fault *f, uint64_t now)
{
	return atomic_load(&c->address) == f->address && atomic_load(&c->kind) == f->kind &&
	       within_gap(c, now);
}

void uvm_chain_continue(struct uvm_fault *f)
{
	f->first_ns = f->t_ns;
	if (!atomic_load_explicit(&nr_chains, memory_order_relaxed))
		return;
	struct chain *c = chain_of(f->tid);
	if (!c || !continues(c, f, f->t_ns))
		return;
	f->first_ns = atomic_load(&c->first_ns);
	f->refault = true;
	uvm_long_wait(f);
}

void uvm_chain_note(const struct uvm_fault *f, bool brought)
{
	if (brought && !atomic_load_explicit(&nr_chains, memory_order_relaxed))
		return;
	struct chain *c = chain_of(f->tid);
	if (brought) {
		uint32_t tid = f->tid;
		if (c && atomic_compare_exchange_strong(&c->tid, &tid, 0))
			atomic_fetch_sub(&nr_chains, 1);
		return;
	}
	uint64_t now = sys_now_ns(), first_ns = f->first_ns;
	/* What was woken early (by another's commit) may have faulted again before this was noted. */
	if (c && continues(c, f, now) && atomic_load(&c->first_ns) < first_ns)
		first_ns = atomic_load(&c->first_ns);
	if (!c)
		c = chain_take(f->tid, now);
	if (!c)
		return;
	atomic_store(&c->address, f->address);
	atomic_store(&c->kind, f->kind);
	atomic_store(&c->first_ns, first_ns);
	atomic_store(&c->last_ns, now);
}
