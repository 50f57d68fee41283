/* What failure.c gives beside internal.h's part: to load() and to the agent. */
#ifndef UVM_FAILURE_H
#define UVM_FAILURE_H

#include "internal.h"

/* The page is tried again by the caller: its poison, or its placeholder, is taken away. No lock held;
 * waits until the service has read an event, so never in a thread that serves. */
void uvm_failure_lift(struct uvm_region *r, uint64_t index);
/* The serving process poisons the page itself: the janitor is to lift that. */
void uvm_failure_note_poison(struct uvm_region *r, uint64_t index);

/* step.c: one instruction, which faulted at `address`, without that page. DONE: return to it, as it is now. TRAP:
 * return to it with the trap flag set, and call uvm_step_end() when it has trapped. REFUSED: not this one.
 * In a signal handler, with no lock held (it may fault); `shift` is the thread's, all zeros at first. */
enum uvm_step { UVM_STEP_REFUSED, UVM_STEP_DONE, UVM_STEP_TRAP };
enum { UVM_SHIFTS = 2 };
struct uvm_shift {
	uint32_t nr; /* registers that are moved */
	int reg[UVM_SHIFTS];
	uint64_t by[UVM_SHIFTS], moved[UVM_SHIFTS];
	bool string;
};
int uvm_step_init(void);
enum uvm_step uvm_step_begin(void *context, uint64_t address, bool write, struct uvm_shift *shift);
void uvm_step_end(void *context, struct uvm_shift *shift);

/* Sets an exception (a class) for a thread of Python's (a PyThreadState). Under the GIL. */
struct _ts;
bool uvm_raise_in(struct _ts *ts, void *exc);
/* The exception of the calling thread is set again after fork, also in the child: it is still being told. */
extern _Thread_local bool uvm_raise_is_put_off;

void uvm_agent_child(void); /* after fork: there is no agent any more */

#endif
