/* What a running VM, or an image tool, may ask of the kernel: src/filter.h, and what only x86-64 has. */
#include "filter.h"
#include <asm/termbits.h>
#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/fs.h>
#include <linux/io_uring.h>
#include <linux/kvm.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include "vmm/arch.h"
#include "vmm/cleanup.h"

/* A reset puts the vCPUs and chips back; a failure is dumped; main looks whether the guest is dead. */
#define STATE_REQUESTS                                                                             \
	IS(KVM_GET_REGS), IS(KVM_SET_REGS), IS(KVM_GET_SREGS), IS(KVM_SET_SREGS),                  \
	IS(KVM_TRANSLATE), IS(KVM_SET_MSRS), IS(KVM_SET_LAPIC), IS(KVM_SET_XSAVE),                 \
	IS(KVM_SET_XCRS), IS(KVM_SET_DEBUGREGS), IS(KVM_SET_IRQCHIP), IS(KVM_SET_PIT2)

/* x32 calls have numbers of their own, and none is here. */
static const struct call_rule rules[] = {
	CALL_IF(ioctl, ARG(1), IS(KVM_RUN), COMMON_REQUESTS, STATE_REQUESTS),
	LOOP_CALLS,
	DATA_CALLS,
	MEMORY_CALLS,
	THREAD_CALLS,
	SIGNAL_CALLS,
	OTHER_CALLS,
	CALL(epoll_wait), CALL(poll), CALL(time),       /* libc's, where the generic one is another */
};

static const struct call_rule tool_rules[] = {
	CALL_IF(ioctl, ARG(1), TOOL_REQUESTS),
	TOOL_CALLS,
	MEMORY_CALLS,
	THREAD_CALLS,
	SIGNAL_CALLS,
};

const struct call_rule *arch_call_rules(bool tool, unsigned *n, uint32_t *audit_arch)
{
	*n = tool ? ARRAY_LEN(tool_rules) : ARRAY_LEN(rules);
	*audit_arch = AUDIT_ARCH_X86_64;
	return tool ? tool_rules : rules;
}
