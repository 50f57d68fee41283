/* Commits: the one ioctl that makes a decision true, for one page or a run, and what its errno means by
 * the settle table. The caller holds the page-table lock of the run and publishes what was done. */
#include "internal.h"

#include "commit.h"

static struct uvm_done commit_none(const struct uvm_commit *a, uint64_t index, uint64_t len)
{
	(void)a, (void)index, (void)len;
	return (struct uvm_done){0, (int64_t)len};
}

static struct uvm_done commit_wake(const struct uvm_commit *a, uint64_t index, uint64_t len)
{
	int rc = sys_uffd_wake(a->uffd, uvm_region_addr(a->region, index), len);
	/* No out field here: EAGAIN means a changing layout, never half a job. */
	return (struct uvm_done){rc < 0 ? -rc : 0, rc < 0 ? UVM_DONE_UNTOUCHED : (int64_t)len};
}

static struct uvm_done commit_zeropage(const struct uvm_commit *a, uint64_t index, uint64_t len)
{
	return sys_uffd_zeropage(a->uffd, uvm_region_addr(a->region, index), len, 0);
}

static uint64_t source(const struct uvm_commit *a, uint64_t index)
{
	return (uint64_t)(uintptr_t)a->buf + ((index - a->buf_index) << UVM_PAGE_SHIFT);
}

static struct uvm_done commit_copy(const struct uvm_commit *a, uint64_t index, uint64_t len)
{
	return sys_uffd_copy(a->uffd, uvm_region_addr(a->region, index), source(a, index), len, 0);
}

static struct uvm_done commit_copy_wp(const struct uvm_commit *a, uint64_t index, uint64_t len)
{
	return sys_uffd_copy(a->uffd, uvm_region_addr(a->region, index), source(a, index), len,
			     UVM_COPY_MODE_WP);
}

/* Into the page cache, by the alias: nobody waits there, so the faulters are woken by hand. */
static struct uvm_done commit_copy_cache(const struct uvm_commit *a, uint64_t index, uint64_t len)
{
	struct uvm_region *r = a->region;
	uint64_t alias = r->cache->alias[r->service] + ((r->pgoff + index) << UVM_PAGE_SHIFT);
	struct uvm_done d =
		sys_uffd_copy(a->uffd, alias, source(a, index), len, UFFDIO_COPY_MODE_DONTWAKE);
	if (d.err == 0 || d.done > 0)
		(void)sys_uffd_wake(a->uffd, uvm_region_addr(r, index),
				    d.err == 0 ? len : (uint64_t)d.done);
	return d;
}

static struct uvm_done commit_continue(const struct uvm_commit *a, uint64_t index, uint64_t len)
{
	return sys_uffd_continue(a->uffd, uvm_region_addr(a->region, index), len, 0);
}

static struct uvm_done commit_continue_wp(const struct uvm_commit *a, uint64_t index, uint64_t len)
{
	return sys_uffd_continue(a->uffd, uvm_region_addr(a->region, index), len,
				 UVM_CONTINUE_MODE_WP);
}

static struct uvm_done commit_unprotect(const struct uvm_commit *a, uint64_t index, uint64_t len)
{
	int rc = sys_uffd_writeprotect(a->uffd, uvm_region_addr(a->region, index), len, 0);
	/* No out field here: EAGAIN means a changing layout, never half a job. */
	return (struct uvm_done){rc < 0 ? -rc : 0, rc < 0 ? UVM_DONE_UNTOUCHED : (int64_t)len};
}

static struct uvm_done commit_refuse(const struct uvm_commit *a, uint64_t index, uint64_t len)
{
	(void)a, (void)index, (void)len;
	return (struct uvm_done){EINVAL, UVM_DONE_UNTOUCHED}; /* settles loudly */
}

typedef struct uvm_done (*commit_fn)(const struct uvm_commit *, uint64_t index, uint64_t len);

/* POISON is uvm_poison_page(); MOVE and blocks land with swap and huge pages. */
static const commit_fn commits[UVM_NR_COMMIT] = {
	[UVM_COMMIT_NONE] = commit_none,
	[UVM_COMMIT_WAKE] = commit_wake,
	[UVM_COMMIT_ZEROPAGE] = commit_zeropage,
	[UVM_COMMIT_COPY] = commit_copy,
	[UVM_COMMIT_COPY_WP] = commit_copy_wp,
	[UVM_COMMIT_COPY_CACHE] = commit_copy_cache,
	[UVM_COMMIT_COPY_CACHE_WP] = commit_refuse,
	[UVM_COMMIT_CONTINUE] = commit_continue,
	[UVM_COMMIT_CONTINUE_WP] = commit_continue_wp,
	[UVM_COMMIT_UNPROTECT] = commit_unprotect,
	[UVM_COMMIT_POISON] = commit_refuse,
	[UVM_COMMIT_MOVE] = commit_refuse,
};

/* A page in the memfd of a folio that we are filling: left by a process that died in between, or made by
 * somebody who read a hole behind our back, and then it is zeros. What was read is right either way. */
void uvm_rewrite_folio(struct uvm_region *r, uint64_t index, const uint8_t *content)
{
	if (r->cache && !r->cache->writable && uvm_cache_data_ours(r->cache))
		(void)sys_pwrite(r->cache->data_fd, content, UVM_PAGE,
				 (int64_t)((r->pgoff + index) << UVM_PAGE_SHIFT));
}

enum { CHANGING_TRIES = 200 };

/* Runs the commit over [index, index + nr_pages) until the table says how it ended. Returns the pages
 * that are done from the front; *out tells why it stopped. */
uint64_t uvm_commit(const struct uvm_commit *a, uint64_t index, uint64_t nr_pages,
		    struct uvm_commit_end *out)
{
	uint64_t done = 0;
	int changing = 0;
	commit_fn fn = commits[a->commit] ? commits[a->commit] : commit_refuse;

	for (;;) {
		uint64_t len = (nr_pages - done) << UVM_PAGE_SHIFT;
		struct uvm_done d = fn(a, index + done, len);
		int class = uvm_classify(d);
		const struct uvm_settled *s = uvm_settlement(a->commit, class);
		out->settlement = s->settlement;
		out->result = s->result;
		out->row = s->row;
		out->err = d.err;
		switch (s->settlement) {
		case UVM_SETTLEMENT_DONE:
			if (!d.err)
				return nr_pages;
			/* The first page is there already, which was the aim; EEXIST never wakes. */
			out->found = true;
			uvm_rewrite_folio(a->region, index + done,
					  (const uint8_t *)(uintptr_t)source(a, index + done));
			(void)sys_uffd_wake(a->uffd, uvm_region_addr(a->region, index + done),
					    UVM_PAGE);
			if (++done == nr_pages)
				return nr_pages;
			continue;
		case UVM_SETTLEMENT_ADVANCE:
			if (d.done > 0)
				done += (uint64_t)d.done >> UVM_PAGE_SHIFT;
			if (done >= nr_pages)
				return nr_pages;
			continue;
		case UVM_SETTLEMENT_RETRY:
			/* The layout is changing: an event that our own thread must read first. */
			if (++changing > CHANGING_TRIES)
				return done;
			sched_yield();
			continue;
		default:
			return done;
		}
	}
}
