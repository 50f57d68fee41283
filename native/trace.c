/* Counters, latency histogram and the trace ring of a region: written by executors, read by anybody
 * without locks. Counting is mm_account_fault(): a RETRY counts nothing, an error is a fault that
 * failed, a fault that waited for a read (MAJOR, or TRIED) is major. */
#include "internal.h"

void uvm_count_row(struct uvm_region *r, const struct uvm_row *row)
{
	uint64_t set = row->counters;
	while (set) {
		uvm_count(r, __builtin_ctzll(set), 1);
		set &= set - 1;
	}
}

void uvm_mm_account_fault(struct uvm_region *r, uint32_t result, bool tried)
{
	if (result & UVM_VM_FAULT_RETRY)
		return;
	uvm_count(r, UVM_COUNTER_PGFAULT, 1);
	if (result & UVM_VM_FAULT_ERROR)
		uvm_count(r, UVM_COUNTER_PGFAULT_FAILED, 1);
	else if ((result & UVM_VM_FAULT_MAJOR) || tried)
		uvm_count(r, UVM_COUNTER_PGMAJFAULT, 1);
	else
		uvm_count(r, UVM_COUNTER_PGMINFAULT, 1);
}

/* Log-linear: 8 steps an octave, exact below 8 ns; stats.py has the inverse. */
unsigned uvm_latency_bucket(uint64_t ns)
{
	if (ns < 8)
		return (unsigned)ns;
	unsigned e = 63 - (unsigned)__builtin_clzll(ns);
	unsigned bucket = (e - 2) * 8 + (unsigned)(ns >> (e - 3) & 7);
	return bucket < UVM_LATENCY_BUCKETS ? bucket : UVM_LATENCY_BUCKETS - 1;
}

void uvm_trace(struct uvm_region *r, const struct uvm_fault *f, uint64_t index, unsigned pte,
	       unsigned flags, const struct uvm_row *row, uint32_t result, int err,
	       uint32_t nr_pages, int settlement)
{
	uint64_t now = sys_now_ns();
	uint64_t latency = now - f->t_ns;
	uint64_t seq = __atomic_add_fetch(&r->ctl->trace_head, 1, __ATOMIC_RELAXED);
	struct uvm_trace_record *t = &r->ctl->trace[(seq - 1) % UVM_TRACE_RECORDS];

	if (!(result & UVM_VM_FAULT_RETRY))
		__atomic_fetch_add(&r->ctl->latency[uvm_latency_bucket(latency)], 1,
				   __ATOMIC_RELAXED);
	__atomic_store_n(&t->seq, 0, __ATOMIC_RELEASE);
	t->t_ns = f->t_ns;
	t->index = index;
	t->tid = f->tid;
	t->latency_ns = latency > UINT32_MAX ? UINT32_MAX : (uint32_t)latency;
	t->result = result;
	t->err = err;
	t->nr_pages = nr_pages;
	t->flags = (uint16_t)flags;
	t->kind = f->kind;
	t->access = f->access;
	t->backing = (uint8_t)r->backing;
	t->pte = (uint8_t)pte;
	t->row = row->id;
	t->action = row->action;
	t->commit = row->commit;
	t->next_pte = row->next_pte;
	t->settlement = (uint8_t)settlement;
	t->tries = f->tries;
	__atomic_store_n(&t->seq, seq, __ATOMIC_RELEASE);
}
