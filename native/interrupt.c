/* Ctrl-C while the main thread waits in a fault.
 *
 * The main thread waits in a fault; Python's own handler would only set a flag that nobody looks at. So
 * ours notes the signal and holds it back; the fault thread fails the page with the kind INTERRUPT,
 * and the exception set then is a KeyboardInterrupt (whose making calls a handler of the user's, if
 * there is one). A signal that no fault takes up is given to the handler before us. */
#include "failure.h"

#include <stdlib.h>

#define INTERRUPT_TTL_NS 1000000000ull

enum interrupt { INT_NONE, INT_NOTED, INT_USED, INT_IN_SYSCALL };

static _Atomic int interrupt_state, interrupt_pass;
static _Atomic uint64_t interrupt_t;
static struct sigaction sigint_before;
static bool sigint_watched;
static unsigned sigint_watchers; /* a bit a service */
static pthread_mutex_t sigint_mutex = PTHREAD_MUTEX_INITIALIZER;

static void sigint_handler(int sig, siginfo_t *info, void *context)
{
	int saved = errno;
	bool pass = atomic_exchange(&interrupt_pass, 0) || sys_gettid() != (uint32_t)getpid();

	if (!pass && atomic_load(&interrupt_state) == INT_IN_SYSCALL) {
		atomic_store(&interrupt_state, INT_NONE);
		pass = true;
	}
	if (pass) {
		uvm_call_action(&sigint_before, sig, info, context);
	} else {
		int none = INT_NONE;
		atomic_store(&interrupt_t, sys_now_ns());
		atomic_compare_exchange_strong(&interrupt_state, &none, INT_NOTED);
		uvm_helper_kick(&uvm_janitor);
	}
	errno = saved;
}

/* Gives a signal that was held back to the handler that it was meant for. */
static void interrupt_hand_on(int from)
{
	if (atomic_compare_exchange_strong(&interrupt_state, &from, INT_NONE)) {
		atomic_store(&interrupt_pass, 1);
		sys_tgkill((uint32_t)getpid(), SIGINT);
	}
}

/* The exception has been made, and calls the user's handler by raising the signal again. */
void uvm_interrupt_pass(void)
{
	atomic_store(&interrupt_pass, 1);
}

/* The kernel holds that signal, and delivers it when the system call has ended. */
static void interrupt_forget_syscall(void)
{
	int held = INT_IN_SYSCALL;
	atomic_compare_exchange_strong(&interrupt_state, &held, INT_NONE);
}

/* By service: one that has nobody waiting any more does not look away for the others. */
void uvm_interrupt_watch(int service, bool on)
{
	unsigned who = 1u << service;
	struct sigaction now;

	if (on == !!(__atomic_load_n(&sigint_watchers, __ATOMIC_RELAXED) & who))
		return;
	pthread_mutex_lock(&sigint_mutex);
	unsigned left = on ? sigint_watchers | who : sigint_watchers & ~who;
	__atomic_store_n(&sigint_watchers, left, __ATOMIC_RELAXED);
	if (on && !sigint_watched && sigaction(SIGINT, NULL, &now) == 0 &&
	    (now.sa_flags & SA_SIGINFO ||
	     (now.sa_handler != SIG_DFL && now.sa_handler != SIG_IGN))) {
		struct sigaction ours = {.sa_sigaction = sigint_handler, .sa_mask = now.sa_mask};
		ours.sa_flags = (now.sa_flags & ~SA_RESETHAND) | SA_SIGINFO;
		sigint_before = now;
		atomic_store(&interrupt_pass, 0);
		__atomic_store_n(&sigint_watched, sigaction(SIGINT, &ours, NULL) == 0,
				 __ATOMIC_RELAXED);
	} else if (!left && sigint_watched) {
		if (sigaction(SIGINT, NULL, &now) == 0 && now.sa_flags & SA_SIGINFO &&
		    now.sa_sigaction == sigint_handler)
			sigaction(SIGINT, &sigint_before, NULL);
		__atomic_store_n(&sigint_watched, false, __ATOMIC_RELAXED);
		interrupt_hand_on(INT_NOTED);
		interrupt_forget_syscall();
	}
	pthread_mutex_unlock(&sigint_mutex);
	if (on)
		uvm_janitor_ensure(); /* it hands on what no fault takes up */
}

void uvm_interrupt_used(void)
{
	int noted = INT_NOTED;
	atomic_compare_exchange_strong(&interrupt_state, &noted, INT_USED);
}

/* A thread that waits inside a system call runs no handler: the signal stays pending in the kernel. */
static bool sigint_in_kernel(void)
{
	char text[4096];
	int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
	if (fd >= 0)
		close(fd);
	text[n > 0 ? n : 0] = 0;
	bool pending = false;
	static const char *const words[] = {"\nSigPnd:", "\nShdPnd:"};
	for (int i = 0; i < 2; i++) {
		const char *at = strstr(text, words[i]);
		if (at)
			pending |= strtoull(at + 8, NULL, 16) >> (SIGINT - 1) & 1;
	}
	return pending;
}

/* Seen there twice, some time apart: it does not just arrive. */
static bool sigint_stuck(void)
{
	static _Atomic uint64_t looked;
	static _Atomic int seen;
	uint64_t now = sys_now_ns(), last = atomic_load(&looked);

	if (now - last < 20000000u || !atomic_compare_exchange_strong(&looked, &last, now))
		return false;
	if (!sigint_in_kernel()) {
		atomic_store(&seen, 0);
		return false;
	}
	return atomic_fetch_add(&seen, 1) >= 1;
}

/* Also for a thread that has been told of a failure and is still in its C call: what it reads is
 * worth nothing, so it does not wait for the next page. */
bool uvm_interrupt_pending(uint32_t tid)
{
	if (uvm_told_already(tid))
		return true;
	if (tid != (uint32_t)getpid())
		return false;
	int held = atomic_load(&interrupt_state);
	if (held == INT_IN_SYSCALL && !sigint_in_kernel()) {
		interrupt_forget_syscall(); /* delivered since */
		return false;
	}
	if (held != INT_NONE)
		return true;
	if (!__atomic_load_n(&sigint_watched, __ATOMIC_RELAXED) || !sigint_stuck())
		return false;
	int none = INT_NONE;
	atomic_store(&interrupt_t, sys_now_ns());
	atomic_compare_exchange_strong(&interrupt_state, &none, INT_IN_SYSCALL);
	return true;
}

bool uvm_interrupt_held(void)
{
	return atomic_load(&interrupt_state) != INT_NONE;
}

/* The exception is about to be set. */
void uvm_interrupt_taken(void)
{
	atomic_store(&interrupt_state, INT_NONE);
}

/* Hands on what no fault took up; returns how long until it is to be looked at again, `next` at most. */
uint64_t uvm_interrupt_round(uint64_t now, uint64_t next)
{
	int held = atomic_load(&interrupt_state);
	if (held != INT_NONE) {
		if (now - atomic_load(&interrupt_t) > INTERRUPT_TTL_NS)
			held == INT_IN_SYSCALL ? interrupt_forget_syscall()
					       : interrupt_hand_on(held);
		else if (next > INTERRUPT_TTL_NS / 4)
			next = INTERRUPT_TTL_NS / 4;
	}
	return next;
}

/* --- fork --------------------------------------------------------------------------------------- */
void uvm_interrupt_prepare(void)
{
	pthread_mutex_lock(&sigint_mutex);
}

void uvm_interrupt_parent(void)
{
	pthread_mutex_unlock(&sigint_mutex);
}

void uvm_interrupt_child(void)
{
	pthread_mutex_init(&sigint_mutex, NULL);
	if (sigint_watched)
		sigaction(SIGINT, &sigint_before, NULL);
	sigint_watched = false;
	sigint_watchers = 0;
	atomic_store(&interrupt_state, INT_NONE);
}
