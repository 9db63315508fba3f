/*
 * How this works: when a filter is loaded, the kernel runs it once for every number there is to learn which
 * calls are allowed whatever their arguments, and never runs it for those again (a bitmap, since 5.11). So the
 * program is a search tree: a chain of comparisons makes loading five times as slow. The first rule of the
 * table stands before the tree: it is ioctl, the one frequent call whose arguments count.
 */
#include "filter.h"
#include <assert.h>
#include <errno.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "vmm/arch.h"

#define PROGRAM_MOST 512        /* instructions */
#define RULES_MOST   128
#define LEAF_MOST    8          /* rules tried one after the other */

struct program {
	struct sock_filter code[PROGRAM_MOST];
	unsigned n;
	uint32_t otherwise;     /* what becomes of calls that nothing allows */
};

static void emit(struct program *p, struct sock_filter f)
{
	assert(p->n < PROGRAM_MOST);
	p->code[p->n++] = f;
}

static void emit_jump(struct program *p, unsigned op, uint32_t k, unsigned if_true, unsigned if_false)
{
	assert(if_true < TO_YES && if_false < TO_YES);
	emit(p, (struct sock_filter)BPF_JUMP((uint16_t)(BPF_JMP | op | BPF_K), k, (uint8_t)if_true,
		(uint8_t)if_false));
}

static void emit_verdict(struct program *p, uint32_t verdict)
{
	emit(p, (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, verdict));
}

/* A call's test, "no" and "yes" behind it; all is skipped for other calls. */
static void emit_test(struct program *p, const struct call_rule *r)
{
	emit_jump(p, BPF_JEQ, r->nr, 0, r->n + 2);
	for (unsigned i = 0; i < r->n; i++) {
		struct sock_filter f = r->test[i];

		if (BPF_CLASS(f.code) == BPF_JMP) {
			f.jt = f.jt == TO_YES ? (uint8_t)(r->n - i) : f.jt;
			f.jf = f.jf == TO_YES ? (uint8_t)(r->n - i) : f.jf;
			f.k = f.k == OWN_PID ? (uint32_t)getpid() : f.k;
		}
		emit(p, f);
	}
	emit_verdict(p, p->otherwise);
	emit_verdict(p, SECCOMP_RET_ALLOW);
}

/* Calls with a test, then calls without, then "no" and "yes". */
static void emit_leaf(struct program *p, const struct call_rule *const *rule, unsigned n)
{
	unsigned plain = 0;

	for (unsigned i = 0; i < n; i++) {
		plain += !rule[i]->n;
		if (rule[i]->n)
			emit_test(p, rule[i]);
	}
	for (unsigned i = 0; i < n; i++)
		if (!rule[i]->n)
			emit_jump(p, BPF_JEQ, rule[i]->nr, plain--, 0);
	emit_verdict(p, p->otherwise);
	emit_verdict(p, SECCOMP_RET_ALLOW);
}

/* n rules in the order of their numbers. Recurses as deep as the logarithm of n. */
static void emit_tree(struct program *p, const struct call_rule *const *rule, unsigned n)
{
	unsigned half = n / 2, jump;

	if (n <= LEAF_MOST) {
		emit_leaf(p, rule, n);
		return;
	}
	emit_jump(p, BPF_JGE, rule[half]->nr, 0, 1);
	jump = p->n;
	emit(p, (struct sock_filter)BPF_STMT(BPF_JMP | BPF_JA, 0));
	emit_tree(p, rule, half);
	p->code[jump].k = p->n - jump - 1;
	emit_tree(p, rule + half, n - half);
}

/* By insertion: the tables are short, and libc's qsort() may ask for the size of the host's memory. */
static unsigned sort_rules(const struct call_rule **sorted, const struct call_rule *rule, unsigned n)
{
	assert(n <= RULES_MOST);
	for (unsigned i = 0; i < n; i++) {
		unsigned at = i;

		for (; at > 0 && sorted[at - 1]->nr > rule[i].nr; at--)
			sorted[at] = sorted[at - 1];
		sorted[at] = &rule[i];
	}
	return n;
}

static void build(struct program *p, enum filter_of which)
{
	const struct sock_filter load_arch = ARG_AT(offsetof(struct seccomp_data, arch));
	const struct sock_filter load_nr = ARG_AT(offsetof(struct seccomp_data, nr));
	const struct call_rule *sorted[RULES_MOST], *rule;
	uint32_t audit_arch;
	unsigned n;

	rule = arch_call_rules(which == FILTER_TOOL, &n, &audit_arch);
	emit(p, load_arch);
	emit_jump(p, BPF_JEQ, audit_arch, 1, 0);
	emit_verdict(p, p->otherwise);
	emit(p, load_nr);
	emit_test(p, &rule[0]);
	emit_tree(p, sorted, sort_rules(sorted, rule + 1, n - 1));
}

int filter_load(enum filter_of which, bool log)
{
	struct program p = { .otherwise = log ? SECCOMP_RET_LOG : SECCOMP_RET_KILL_PROCESS };
	struct sock_fprog prog = { .filter = p.code };
	long r;

	build(&p, which);
	prog.len = (unsigned short)p.n;
	r = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &prog);
	return r < 0 ? -errno : r ? -EBUSY : 0; /* positive: the thread that could not follow */
}
