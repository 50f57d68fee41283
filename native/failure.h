/* What failure.c gives beside internal.h's part: to load() and to the agent. And what it shares with placeholder.c,
 * told.c, signals.c, raise.c, interrupt.c, callback.c and step.c, with which it is one thing: nobody else uses that. */
#ifndef UVM_FAILURE_H
#define UVM_FAILURE_H

#include "internal.h"

#include <signal.h>

/* The page is tried again by the caller: its poison, or its placeholder, is taken away. No lock held;
 * waits until the service has read an event, so never in a thread that serves. */
void uvm_failure_lift(struct uvm_region *r, uint64_t index);
/* The serving process poisons the page itself: the janitor is to lift that. */
void uvm_failure_note_poison(struct uvm_region *r, uint64_t index);

/* ---- one instruction (step.c) ---------------------------------------------------------------------- */
/* One instruction, which faulted at `address`, on the byte at `shadow` instead; the page before and the page
 * behind that one are accessible too. DONE: return to it, as it is now. TRAP: return to it with the trap flag
 * set, and call uvm_step_end() when it has trapped. REFUSED: not this one. In a signal handler, with no lock held
 * (it may fault); `shift` is the thread's, all zeros at first. */
enum uvm_step { UVM_STEP_REFUSED, UVM_STEP_DONE, UVM_STEP_TRAP };
enum { UVM_SHIFTS = 2 };
struct uvm_shift {
	uint32_t nr; /* registers that are moved */
	int reg[UVM_SHIFTS];
	uint64_t by[UVM_SHIFTS], moved[UVM_SHIFTS];
	bool string;
};
enum uvm_step uvm_step_begin(void *context, uint64_t address, uint64_t shadow,
			     struct uvm_shift *shift);
void uvm_step_end(void *context, struct uvm_shift *shift);

/* ---- state (failure.c) ---------------------------------------------------------------------------- */
enum {
	UVM_MAX_PLACEHOLDERS = 4096, /* each may split a mapping in three; the oldest makes room */
	/* threads with a failure that they have not taken yet; the oldest makes room */
	UVM_MAX_TOLD = 512,
	UVM_MAX_OWNERS = 6,
	UVM_MAX_POISONED = 4096,
	UVM_MAX_OPEN = 16, /* pages that one instruction may touch (a gather) */
};

#define UVM_PLACEHOLDER_TTL_NS 250000000ull /* of a thread that no exception can reach */

#if defined(__x86_64__)
#define UVM_HAVE_STEP 1
#else
#define UVM_HAVE_STEP 0
#endif

enum uvm_placeholder_state { UVM_PH_FREE, UVM_PH_COVERED, UVM_PH_REMOVING };

struct uvm_placeholder {
	int64_t region;
	uint64_t index;
	uint64_t t_ns;
	uint64_t removal; /* UVM_PH_REMOVING: which one, of all removals */
	uint64_t address;
	uint32_t serial;  /* a slot is used again */
	uint16_t nr_open; /* threads that run an instruction on it, which step.c refused */
	uint16_t
		nr_steps; /* threads that run one on its shadow; the slot is not used again before they end */
	uint64_t
		shadow; /* the same memory where step.c sends them, a page more on either side; 0: none */
	bool left_open;
	uint32_t nr_pages;
	uint8_t state, nr_owners;
	bool wanted;  /* a thread sleeps on one of its pages: take it away soon */
	bool unknown; /* no exception says when it may go: UVM_PLACEHOLDER_TTL_NS */
	uint16_t owners[UVM_MAX_OWNERS]; /* slots of told[] */
};

/* UNKNOWN: to Python; the region is sticky-failed instead. */
enum uvm_told_state { UVM_TOLD_FREE, UVM_TOLD_SET, UVM_TOLD_SWALLOWED, UVM_TOLD_UNKNOWN };

struct uvm_told {
	uint32_t tid;
	int state;
	unsigned long ident; /* Python's number of the thread */
	struct uvm_failure failure;
	uint64_t t_ns;
	bool alone;   /* Python has no other thread */
	uint64_t run; /* pages that the next placeholder covers */
	uint32_t steps, nr_open;
	bool stepping; /* in step_over() of told.c */
	struct uvm_shift shift;
	uint16_t over[UVM_SHIFTS], nr_over; /* placeholders: ph[].nr_steps counts this thread */
	/* Trap flags set, in this context and in those that a handler interrupted. */
	uint32_t nr_traps;
	struct {
		uint32_t serial;
		uint16_t ph;
	} open[UVM_MAX_OPEN]; /* for the one instruction */
};

struct uvm_poisoned {
	int64_t region;
	uint64_t index;
	uint64_t t_ns;
};

/* The state of all of it. */
struct uvm_failures {
	pthread_mutex_t mutex;
	struct uvm_placeholder ph[UVM_MAX_PLACEHOLDERS];
	uint32_t nr_ph; /* high-water mark */
	uint32_t nr_removing, serial;
	uint64_t removals; /* begun so far */
	struct uvm_told told[UVM_MAX_TOLD];
	struct uvm_poisoned poisoned[UVM_MAX_POISONED]; /* a ring, oldest first */
	uint64_t poison_head, poison_tail;
	/* Why: the newest overwrites the oldest, whose page is not poisoned any more by then. */
	struct uvm_failure records[UVM_MAX_POISONED];
	uint64_t nr_records;
};
extern struct uvm_failures uvm_failures;
extern _Atomic int uvm_nr_placeholders;
void uvm_failures_lock(void);
void uvm_failures_unlock(void);

/* One native thread: signals blocked, sleeps on `kick`. */
struct uvm_helper {
	pthread_t thread;
	bool running; /* under uvm_helpers_mutex */
	_Atomic uint32_t
		run; /* counts starts and stops: a thread ends when it is not its own any more */
	_Atomic uint32_t kick;
};
extern struct uvm_helper uvm_janitor, uvm_raiser;
extern pthread_mutex_t uvm_helpers_mutex;
void uvm_helper_kick(struct uvm_helper *h);
void uvm_helper_sleep(struct uvm_helper *h, uint32_t seen, uint64_t ns);
void uvm_janitor_ensure(void);

/* All three locked. */
struct uvm_failure *uvm_record_find(int64_t region, uint64_t index);
/* The page is missing again. False: not now (the region is just being closed). */
bool uvm_poison_lift(int64_t region, uint64_t index);
/* And under the page's ptl. */
struct uvm_done uvm_poison_ioctl(struct uvm_region *r, uint64_t index, uint64_t mode);

/* ---- placeholders (placeholder.c) ----------------------------------------------------------------- */
struct uvm_placeholder *uvm_ph_find(int64_t region, uint64_t index); /* locked */
struct uvm_placeholder *uvm_ph_alloc(void);                          /* locked */
void uvm_ph_free(struct uvm_placeholder *ph);                        /* locked */
/* Locked: a thread that nr_steps counts has run its instruction. */
void uvm_ph_step_done(struct uvm_placeholder *ph);
/* Both under the page's ptl. */
uint64_t uvm_ph_run_poison(struct uvm_region *r, uint64_t index, uint64_t want);
int uvm_ph_cover(struct uvm_region *r, uint64_t index, uint64_t nr_pages, uint64_t *shadow);
/* Taken away in two steps: one locked, one with no lock held. */
void uvm_ph_begin_remove(struct uvm_placeholder *ph);
void uvm_ph_remove(struct uvm_placeholder *ph);
void uvm_ph_wait_removed(void);
void uvm_ph_sweep_unowned(void);
void uvm_ph_sweep_due(bool all, uint64_t now); /* the janitor's */
void uvm_ph_child_page(int64_t region, uint64_t index, uint64_t nr_pages);

/* ---- the thread that is told (told.c) -------------------------------------------------------------- */
struct uvm_told *uvm_told_find(uint32_t tid); /* locked */
void uvm_told_disown(struct uvm_told *t);     /* locked */
bool uvm_told_in_step(const struct uvm_told *t);
bool uvm_told_already(uint32_t tid);
void uvm_sigbus_handler(int sig, siginfo_t *info, void *context);
void uvm_sigsegv_handler(int sig, siginfo_t *info, void *context);
void uvm_sigtrap_handler(int sig, siginfo_t *info, void *context);

/* ---- signals (signals.c) --------------------------------------------------------------------------- */
extern _Atomic int uvm_sigbus_installed; /* 0: pass everything on */
void uvm_call_action(const struct sigaction *sa, int sig, siginfo_t *info, void *context);
void uvm_chain(int sig, siginfo_t *info, void *context); /* to the handler before ours */
bool uvm_is_write(const void *context);

/* ---- Python (raise.c) ------------------------------------------------------------------------------ */
extern _Atomic int uvm_raiser_up;
void *uvm_raiser_main(void *arg);
bool uvm_raise_here(int kind, unsigned long *ident, bool *alone);
void uvm_raise_child(void);

/* ---- Ctrl-C (interrupt.c) -------------------------------------------------------------------------- */
bool uvm_interrupt_held(void);
void uvm_interrupt_used(void);
void uvm_interrupt_taken(void);
uint64_t uvm_interrupt_round(uint64_t now, uint64_t next); /* the janitor's */
void uvm_interrupt_prepare(void);
void uvm_interrupt_parent(void);
void uvm_interrupt_child(void);

/* ---- callbacks, the agent (callback.c, agent.c) ------------------------------------------------------------------------- */
/* Sets an exception (a class) for a thread of Python's (a PyThreadState). Under the GIL. */
struct _ts;
bool uvm_raise_in(struct _ts *ts, void *exc);
/* The exception of the calling thread is set again after fork, also in the child: it is still being told. */
extern _Thread_local bool uvm_raise_is_put_off;

void uvm_agent_child(void); /* after fork: there is no agent any more */

#endif
