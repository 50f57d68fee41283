/* One instruction of a thread over a page that it cannot have, without that page being opened to anybody.
 *
 * The thread's C call has to end before its exception can be raised, so each instruction that touches the
 * placeholder must complete somehow. All threads see the same mapping, so the instruction is sent elsewhere: the
 * register that holds its address is moved by the distance to the placeholder's shadow (the same memory,
 * mapped where nobody looks; what the call stores it reads again), the trap flag is set, and after the
 * instruction the register is moved back. A string instruction with a count is done a page at a time, since
 * it would trap at each byte.
 *
 * Only what must be known of an instruction is decoded: which register it addresses memory by (Intel SDM
 * volume 2, chapter 2: prefixes, ModRM, SIB, VEX, EVEX). What has no such register, or has it twice, is refused:
 * the caller then opens the placeholder for it. */
#include "failure.h"

#if defined(__x86_64__)
#include <ucontext.h>

enum { DIRECTION_FLAG = 0x400 };

/* The general registers in the order of their numbers in ModRM and SIB. */
static const int gregs_of[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
				 REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
				 REG_R12, REG_R13, REG_R14, REG_R15};

struct insn {
	const uint8_t *next;
	bool rep, operand16, wide;
	unsigned map;         /* 0: one byte, 1: 0F, 2: 0F 38, 3: 0F 3A */
	unsigned base, index; /* their high bits, from the prefix */
	uint8_t opcode;
};

/* Up to and with the opcode; false: a prefix that changes how the address is made. */
static bool decode_opcode(struct insn *in)
{
	for (;; in->next++) {
		uint8_t b = *in->next;
		if (b == 0x66)
			in->operand16 = true;
		else if (b == 0xf2 || b == 0xf3)
			in->rep = true;
		else if (b != 0xf0 && b != 0x2e && b != 0x36 && b != 0x3e && b != 0x26)
			break;
	}
	const uint8_t *p = in->next;
	if (p[0] == 0xc5) { /* VEX, two bytes: map 1 */
		in->map = 1;
		p += 2;
	} else if (p[0] == 0xc4 || p[0] == 0x62) { /* VEX, EVEX: X and B inverted */
		in->index = p[1] & 0x40 ? 0 : 8;
		in->base = p[1] & 0x20 ? 0 : 8;
		in->map = p[1] & (p[0] == 0xc4 ? 0x1f : 7);
		p += p[0] == 0xc4 ? 3 : 4;
	} else {
		if ((p[0] & 0xf0) == 0x40) { /* REX */
			in->wide = p[0] & 8;
			in->index = p[0] & 2 ? 8 : 0;
			in->base = p[0] & 1 ? 8 : 0;
			p++;
		}
		if (p[0] == 0x0f) {
			in->map = p[1] == 0x38 ? 2 : p[1] == 0x3a ? 3 : 1;
			p += in->map == 1 ? 1 : 2;
		}
	}
	in->opcode = *p++;
	in->next = p;
	return in->map <= 3;
}

static bool has_modrm(const struct insn *in)
{
	uint8_t op = in->opcode;
	if (in->map) /* gathers, scatters and tile loads have many addresses */
		return !(in->map == 2 &&
			 ((op >= 0x90 && op <= 0x93) || (op >= 0xa0 && op <= 0xa3) || op == 0x4b));
	return (op < 0x40 && (op & 7) < 4) || op == 0x63 || op == 0x69 || op == 0x6b ||
	       (op >= 0x80 && op <= 0x8e) || op == 0xc0 || op == 0xc1 || op == 0xc6 || op == 0xc7 ||
	       (op >= 0xd0 && op <= 0xd3) || (op >= 0xd8 && op <= 0xdf) || op == 0xf6 ||
	       op == 0xf7 || op == 0xfe;
}

/* The number of the register that the instruction's address begins with, or -1. */
static int decode_base(const struct insn *in)
{
	unsigned mod = in->next[0] >> 6, base = in->next[0] & 7, index = 4;

	if (mod == 3)
		return -1;
	if (base == 4) {
		base = in->next[1] & 7;
		index = (in->next[1] >> 3 & 7) | in->index;
	}
	if (base == 5 && mod == 0) /* an address relative to the instruction, or absolute */
		return -1;
	base |= in->base;
	/* A signal's frame would be pushed below the moved stack; an index is scaled. */
	return base == 4 || base == index ? -1 : (int)base;
}

static bool is_string(const struct insn *in)
{
	return !in->map && ((in->opcode >= 0xa4 && in->opcode <= 0xa7) ||
			    (in->opcode >= 0xaa && in->opcode <= 0xaf));
}

/* rep movs and rep stos as far as the page reaches. What then is left of the count (perhaps nothing) the instruction
 * does when it runs again. False: not such an instruction. */
static bool do_string(const struct insn *in, greg_t *regs, uint64_t address, uint64_t shadow)
{
	bool movs = (in->opcode & 0xfe) == 0xa4, stos = (in->opcode & 0xfe) == 0xaa;
	uint64_t size = !(in->opcode & 1) ? 1 : in->wide ? 8 : in->operand16 ? 2 : 4;
	uint64_t n = (UVM_PAGE - address % UVM_PAGE) / size, count = (uint64_t)regs[REG_RCX];

	if (!in->rep || !(movs || stos) || regs[REG_EFL] & DIRECTION_FLAG)
		return false;
	n = n < count ? n : count;
	struct iovec here = {(void *)(uintptr_t)shadow, n * size}, there = {NULL, n * size};
	if (movs) {
		/* By system calls: where the other side cannot be had there is no second signal in this one. */
		bool load = (uint64_t)regs[REG_RSI] == address;
		there.iov_base = (void *)(uintptr_t)regs[load ? REG_RDI : REG_RSI];
		if (!load && (uint64_t)regs[REG_RDI] != address)
			return false;
		int64_t done = load ? sys_process_vm_writev(&here, &there)
				    : sys_process_vm_readv(&here, &there);
		n = done < 0 ? 0 : (uint64_t)done / size;
	} else if ((uint64_t)regs[REG_RDI] == address) {
		for (uint64_t i = 0; i < n; i++)
			memcpy((char *)here.iov_base + i * size, &regs[REG_RAX], size);
	} else {
		return false;
	}
	if (!n)
		return false;
	regs[REG_RCX] -= (greg_t)n;
	regs[REG_RDI] += (greg_t)(n * size);
	if (movs)
		regs[REG_RSI] += (greg_t)(n * size);
	return true;
}

enum uvm_step uvm_step_begin(void *context, uint64_t address, uint64_t shadow,
			     struct uvm_shift *shift)
{
	greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
	struct insn in = {.next = (const uint8_t *)(uintptr_t)regs[REG_RIP]};
	int base = -1;

	if (!decode_opcode(&in))
		return UVM_STEP_REFUSED;
	if (is_string(&in)) {
		if (do_string(&in, regs, address, shadow))
			return UVM_STEP_DONE;
		/* Perhaps the second half of its element. */
		base = address - (uint64_t)regs[REG_RSI] < 8   ? 6
		       : address - (uint64_t)regs[REG_RDI] < 8 ? 7
							       : -1;
	} else if (has_modrm(&in)) {
		base = decode_base(&in);
	}
	for (uint32_t i = 0; i < shift->nr; i++) /* it was moved, and faults all the same */
		if (shift->reg[i] == base)
			return UVM_STEP_REFUSED;
	if (base < 0 || shift->nr == UVM_SHIFTS)
		return UVM_STEP_REFUSED;
	greg_t *reg = &regs[gregs_of[base]];
	shift->reg[shift->nr] = base;
	shift->string = is_string(&in);
	shift->by[shift->nr] = shadow - address;
	*reg += (greg_t)(shadow - address);
	shift->moved[shift->nr++] = (uint64_t)*reg;
	return UVM_STEP_TRAP;
}

void uvm_step_end(void *context, struct uvm_shift *shift)
{
	greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;

	for (uint32_t i = 0; i < shift->nr; i++) {
		greg_t *reg = &regs[gregs_of[shift->reg[i]]];
		/* A load may have been into the very register; a string instruction moves it on. */
		if (shift->string || (uint64_t)*reg == shift->moved[i])
			*reg -= (greg_t)shift->by[i];
	}
	shift->nr = 0;
}

#else
enum uvm_step uvm_step_begin(void *context, uint64_t address, uint64_t shadow,
			     struct uvm_shift *shift)
{
	(void)context, (void)address, (void)shadow, (void)shift;
	return UVM_STEP_REFUSED;
}

void uvm_step_end(void *context, struct uvm_shift *shift)
{
	(void)context, (void)shift;
}
#endif
