/* The threads of this library: how they start, which they are, and the end of a process that has no
 * others left.
 *
 * Facts:
 * - pthread_create() hands the mask of its caller on. So signals are blocked around it, and a handler of the
 *   program's never runs in one of our threads, not even at its first instruction.
 * - A process ends by exit(0) when its last thread returns; ours never return by themselves. The main
 *   thread of a program returns into exit(), but a child that was forked by another thread (os.fork() in a
 *   threading.Thread) begins in that one: when its function ends, nobody is left but us, and the parent's
 *   waitpid() would wait for ever.
 *   -> A thread that leads its process says when it ends (a key's destructor). From then on somebody looks
 *      whether threads of the program are left, and ends the process as the C library would have. */
#include "internal.h"

#include <dirent.h>
#include <stdlib.h>
#include <sys/prctl.h>

enum { MAX_THREADS = UVM_MAX_WORKERS + 16, LOOK_EVERY_US = 50000 };

struct thread {
	_Atomic int taken;
	_Atomic uint32_t tid; /* 0: not begun, or about to end */
	const char *name;
	void *(*fn)(void *arg);
	void *arg;
};
static struct thread threads[MAX_THREADS];

static void thread_release(void *arg)
{
	struct thread *t = arg;
	atomic_store(&t->tid, 0);
	atomic_store(&t->taken, 0);
}

static void *thread_main(void *arg)
{
	struct thread *t = arg;
	void *ret;
	prctl(PR_SET_NAME, t->name);
	atomic_store(&t->tid, sys_gettid());
	pthread_cleanup_push(thread_release, t);
	ret = t->fn(t->arg);
	pthread_cleanup_pop(1);
	return ret;
}

int uvm_thread_create(pthread_t *ret, const char *name, void *(*fn)(void *arg), void *arg)
{
	sigset_t all, before;
	struct thread *t = NULL;

	for (int i = 0; !t && i < MAX_THREADS; i++) {
		int unused = 0;
		if (atomic_compare_exchange_strong(&threads[i].taken, &unused, 1))
			t = &threads[i];
	}
	if (!t)
		return -EAGAIN;
	t->name = name;
	t->fn = fn;
	t->arg = arg;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int rc = pthread_create(ret, NULL, thread_main, t);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (rc)
		thread_release(t);
	else
		uvm_thread_mark_leader();
	return -rc;
}

/* ---- the last thread of a program ------------------------------------------------------------------------- */
static bool is_ours(uint32_t tid)
{
	for (int i = 0; i < MAX_THREADS; i++)
		if (atomic_load(&threads[i].tid) == tid)
			return true;
	return false;
}

/* Is there a thread that is neither ours nor the leader, which has ended? One that is just being made is in
 * the list behind the one that makes it. */
static bool program_lives(void)
{
	uint32_t leader = (uint32_t)getpid();
	DIR *dir = opendir("/proc/self/task");
	bool lives = !dir; /* not to be known now */
	for (struct dirent *e; dir && !lives && (e = readdir(dir));) {
		uint32_t tid = (uint32_t)strtoul(e->d_name, NULL, 10);
		lives = tid && tid != leader && !is_ours(tid);
	}
	if (dir)
		closedir(dir);
	return lives;
}

/* As the C library does for the last thread: handlers of atexit() run, and find their lazy memory served. */
static void *last_main(void *arg)
{
	(void)arg;
	while (program_lives())
		usleep(LOOK_EVERY_US);
	exit(EXIT_SUCCESS);
}

static void leader_ended(void *arg)
{
	pthread_t t;
	(void)arg;
	/* Others may wait for this thread's end, so it does not wait for theirs. */
	if (program_lives() && uvm_thread_create(&t, "uvm-last", last_main, NULL) == 0)
		pthread_detach(t);
	else
		last_main(NULL);
}

static pthread_key_t leader_key;
static pthread_once_t leader_once = PTHREAD_ONCE_INIT;
static bool leader_key_made;

static void make_leader_key(void)
{
	leader_key_made = pthread_key_create(&leader_key, leader_ended) == 0;
}

void uvm_thread_mark_leader(void)
{
	if (sys_gettid() != (uint32_t)getpid())
		return;
	pthread_once(&leader_once, make_leader_key);
	if (leader_key_made)
		(void)pthread_setspecific(leader_key, &leader_key);
}

/* After fork there are none; the thread that forked leads. */
void uvm_threads_child(void)
{
	for (int i = 0; i < MAX_THREADS; i++)
		thread_release(&threads[i]);
	uvm_thread_mark_leader();
}
