/* SIGBUS, SIGSEGV and SIGTRAP: our handlers (told.c), and the program's before them.
 *
 * Facts -> what follows from them.
 * - A program may have handlers of its own, and install some over ours, which give back to us. What is not ours goes
 *   to the handler before ours, as the kernel would call it; what comes back from there ends the process.
 * - A handler that was installed over ours keeps us in its chain for good: ours then pass everything on. */
#include "failure.h"

#include <ucontext.h>

struct chained {
	int sig;
	void (*handler)(int sig, siginfo_t *info, void *context);
	struct sigaction before[2];
	_Atomic int slot;
	_Atomic uint32_t chaining; /* tid that is inside the handler before ours */
};

static struct chained chains[] = {
	{.sig = SIGBUS, .handler = uvm_sigbus_handler},
	{.sig = SIGSEGV, .handler = uvm_sigsegv_handler},
	{.sig = SIGTRAP, .handler = uvm_sigtrap_handler},
};
enum { NR_CHAINS = UVM_HAVE_STEP ? 3 : 2 };
_Atomic int uvm_sigbus_installed;

/* As the kernel would call it: a handler that asked for SA_NODEFER may raise its signal again (faulthandler
 * does, to end the process) and counts on it being delivered before it returns. */
void uvm_call_action(const struct sigaction *sa, int sig, siginfo_t *info, void *context)
{
	sigset_t one, before;
	bool open = sa->sa_flags & SA_NODEFER;

	sigemptyset(&one);
	sigaddset(&one, sig);
	if (open)
		pthread_sigmask(SIG_UNBLOCK, &one, &before);
	if (sa->sa_flags & SA_SIGINFO)
		sa->sa_sigaction(sig, info, context);
	else if (sa->sa_handler != SIG_IGN && sa->sa_handler != SIG_DFL)
		sa->sa_handler(sig);
	if (open)
		pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void default_action(int sig, const siginfo_t *info)
{
	struct sigaction sa = {.sa_handler = SIG_DFL};

	sigaction(sig, &sa, NULL);
	if (info->si_code <= 0) /* sent by somebody: it does not come back by itself */
		sys_tgkill(sys_gettid(), sig);
}

static struct chained *chain_of(int sig)
{
	struct chained *c = chains;

	while (c->sig != sig)
		c++;
	return c;
}

void uvm_chain(int sig, siginfo_t *info, void *context)
{
	struct chained *c = chain_of(sig);
	const struct sigaction *before = &c->before[atomic_load(&c->slot)];
	uint32_t tid = sys_gettid(), nobody = 0;

	if (before->sa_flags & SA_SIGINFO ||
	    (before->sa_handler != SIG_DFL && before->sa_handler != SIG_IGN)) {
		/* A handler that was installed over ours and gives back to us: end of the chain. */
		if (atomic_load(&c->chaining) == tid) {
			default_action(c->sig, info);
			return;
		}
		bool first = atomic_compare_exchange_strong(&c->chaining, &nobody, tid);
		uvm_call_action(before, c->sig, info, context);
		if (first)
			atomic_store(&c->chaining, 0);
		return;
	}
	if (before->sa_handler == SIG_IGN && info->si_code <= 0)
		return;
	default_action(c->sig, info);
}

bool uvm_is_write(const void *context)
{
#if defined(__x86_64__)
	return ((const ucontext_t *)context)->uc_mcontext.gregs[REG_ERR] & 2;
#elif defined(__aarch64__)
	const uint8_t *at = ((const ucontext_t *)context)->uc_mcontext.__reserved;
	for (uint32_t size = 1; size; at += size) { /* struct _aarch64_ctx: magic, size */
		uint32_t magic;
		uint64_t esr;
		memcpy(&magic, at, 4);
		memcpy(&size, at + 4, 4);
		if (magic == 0x45535201u) { /* ESR_MAGIC */
			memcpy(&esr, at + 8, 8);
			return esr >> 6 & 1; /* WnR */
		}
		if (!magic)
			break;
	}
	return true;
#else
	(void)context;
	return true;
#endif
}

static bool in_force(const struct chained *c)
{
	struct sigaction now;

	return sigaction(c->sig, NULL, &now) == 0 && now.sa_flags & SA_SIGINFO &&
	       now.sa_sigaction == c->handler;
}

int uvm_sigbus_in_force(void)
{
	bool all = atomic_load(&uvm_sigbus_installed);

	for (int i = 0; i < NR_CHAINS; i++)
		all &= in_force(&chains[i]);
	return all;
}

int uvm_sigbus_replaced(uint64_t *handler)
{
	for (int i = 0; i < NR_CHAINS; i++) {
		struct sigaction now;
		if (in_force(&chains[i]) || sigaction(chains[i].sig, NULL, &now) < 0)
			continue;
		*handler = (uint64_t)(uintptr_t)now.sa_handler; /* a union with sa_sigaction */
		return chains[i].sig;
	}
	return 0;
}

int uvm_sigbus_install(void)
{
	pthread_mutex_lock(&uvm_helpers_mutex);
	int rc = 0;
	for (int i = 0; i < NR_CHAINS && rc == 0; i++) {
		struct chained *c = &chains[i];
		struct sigaction ours = {.sa_sigaction = c->handler,
					 .sa_flags = SA_SIGINFO | SA_ONSTACK};
		sigemptyset(&ours.sa_mask);
		if (in_force(c))
			continue;
		int slot = !atomic_load(&c->slot);
		rc = uvm_rc(sigaction(c->sig, NULL, &c->before[slot]));
		if (rc == 0) {
			atomic_store(&c->slot, slot);
			rc = uvm_rc(sigaction(c->sig, &ours, NULL));
		}
	}
	if (rc == 0)
		atomic_store(&uvm_sigbus_installed, 1);
	pthread_mutex_unlock(&uvm_helpers_mutex);
	return rc < 0 ? rc : 1;
}

void uvm_sigbus_remove(void)
{
	pthread_mutex_lock(&uvm_helpers_mutex);
	for (int i = 0; i < NR_CHAINS; i++)
		if (in_force(&chains[i]))
			sigaction(chains[i].sig, &chains[i].before[atomic_load(&chains[i].slot)],
				  NULL);
	/* Replaced since: whoever did keeps us in its chain; we pass everything on. */
	atomic_store(&uvm_sigbus_installed, 0);
	pthread_mutex_unlock(&uvm_helpers_mutex);
}
