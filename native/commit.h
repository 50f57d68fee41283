#ifndef UVM_COMMIT_H
#define UVM_COMMIT_H

#include "internal.h"

struct uvm_commit {
	struct uvm_region *region;
	int uffd;
	int commit;         /* UVM_COMMIT_* */
	const uint8_t *buf; /* content of page buf_index and on, for COPY */
	uint64_t buf_index;
};

struct uvm_commit_end {
	int settlement;  /* UVM_SETTLEMENT_* of the last ioctl */
	uint32_t result; /* VM_FAULT_* that the settlement gives */
	int row;         /* that it ends in; 0xff: none */
	int err;
	bool found; /* set when a page was there already: nothing was brought. The caller clears it */
};

void uvm_rewrite_folio(struct uvm_region *r, uint64_t index, const uint8_t *content);
uint64_t uvm_commit(const struct uvm_commit *a, uint64_t index, uint64_t nr_pages,
		    struct uvm_commit_end *out);

#endif
