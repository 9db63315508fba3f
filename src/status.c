/* The status contract: why a VM stopped, as a process status and as a word. */
#include "vmm/vm.h"

int vm_stop_status(const struct vm_stop *s)
{
	switch (s->cause) {
	case STOP_POWEROFF:
		return 0;
	case STOP_VALUE:
		return s->value;
	case STOP_RESET:
		return 100;
	case STOP_PANIC:
		return 101;
	case STOP_TRIPLE_FAULT:
		return 102;
	case STOP_HALTED:
		return 103;
	case STOP_WATCHDOG:
		return 104;
	case STOP_KVM:
		return 105;
	case STOP_TIMEOUT:
		return 124;
	case STOP_SIGNAL:
		return 128 + s->value;
	case STOP_NONE:
	case STOP_HOST:
		break;
	}
	return 125;
}

const char *vm_stop_name(enum stop_cause cause)
{
	switch (cause) {
	case STOP_NONE:
		return "none";
	case STOP_POWEROFF:
		return "poweroff";
	case STOP_VALUE:
		return "guest-value";
	case STOP_RESET:
		return "reset";
	case STOP_PANIC:
		return "panic";
	case STOP_TRIPLE_FAULT:
		return "triple-fault";
	case STOP_HALTED:
		return "halted";
	case STOP_WATCHDOG:
		return "watchdog";
	case STOP_KVM:
		return "kvm-failure";
	case STOP_TIMEOUT:
		return "timeout";
	case STOP_HOST:
		return "host-error";
	case STOP_SIGNAL:
		return "signal";
	}
	return "unknown";
}
