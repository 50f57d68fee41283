/* The compiled policy: byte tables made from uffd_vm/fault/ at build time, and their look-up. Nothing
 * here decides anything. */
#include "internal.h"

const struct uvm_row *uvm_row(int id)
{
	return (const struct uvm_row *)(const void *)uvm_rows + id;
}

/* handle_mm_fault(): the prologue first, in the order of its rows; then the product of the inputs. */
const struct uvm_row *uvm_decide(int kind, int access, int backing, int pte, unsigned flags)
{
	unsigned admit = uvm_admit[kind * 128 + (int)(flags >> 6 & 127)];
	if (admit != 0xff)
		return uvm_row((int)admit);
	int cell = (((kind * 2 + access) * 6 + backing) * 19 + pte) * 64 + (int)(flags & 63);
	return uvm_row(uvm_cells[cell]);
}

const struct uvm_settled *uvm_settlement(int commit, int errno_class)
{
	return (const struct uvm_settled *)(const void *)uvm_settle + commit * 17 + errno_class;
}

const struct uvm_settled *uvm_settle_truth(int commit, int truth, int backing)
{
	return (const struct uvm_settled *)(const void *)uvm_truth +
	       ((commit * UVM_NR_TRUTH + truth) * UVM_NR_BACKING + backing);
}

/* What an ioctl's errno and out field mean together; the twin of fault/settle.py classify_errno(). */
int uvm_classify(struct uvm_done d)
{
	switch (d.err) {
	case 0:
		return UVM_ERR_OK;
	case EEXIST:
		return UVM_ERR_EEXIST;
	case ENOENT:
		return UVM_ERR_ENOENT;
	case EAGAIN:
	case EINTR:
		return d.done > 0 ? UVM_ERR_PARTIAL : UVM_ERR_CHANGING;
	case ESRCH:
	case ENOSPC: /* what 4.11 and 4.12 said for ESRCH */
		return UVM_ERR_ESRCH;
	case EFAULT:
		return UVM_ERR_EFAULT;
	case ENOMEM:
		return UVM_ERR_ENOMEM;
	case EBUSY:
		return UVM_ERR_EBUSY;
	case EINVAL:
		return UVM_ERR_EINVAL;
	case EIO:
	case EHWPOISON:
		return UVM_ERR_EIO;
	case ETIMEDOUT:
		return UVM_ERR_TIMEDOUT;
	default:
		return UVM_ERR_OTHER;
	}
}

const uint8_t *uvm_table(int which, uint64_t *len)
{
	static const struct {
		const void *data;
		uint64_t len;
	} tables[] = {
		{uvm_cells, sizeof uvm_cells},         {uvm_admit, sizeof uvm_admit},
		{uvm_rows, sizeof uvm_rows},           {uvm_settle, sizeof uvm_settle},
		{uvm_legal_pte, sizeof uvm_legal_pte}, {uvm_truth, sizeof uvm_truth},
	};
	if (which < 0 || which >= (int)(sizeof tables / sizeof tables[0]))
		return NULL;
	*len = tables[which].len;
	return tables[which].data;
}
