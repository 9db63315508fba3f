#include "exit.h"
#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include "vmm/arch.h"
#include "vmm/bus.h"
#include "vmm/vcpu.h"
#include "vmm/vm.h"

static void handle_pio(struct vcpu *c)
{
	struct kvm_run *run = c->run;
	struct bus *bus = &c->vm->pio;
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	unsigned size = run->io.size;
	bool home = true;

	for (uint32_t i = 0; i < run->io.count; i++, data += size) {
		uint64_t val = 0;

		if (run->io.direction == KVM_EXIT_IO_IN) {
			home = bus_read(bus, run->io.port, size, &val);
			memcpy(data, &val, size);       /* little-endian host and guest */
		} else {
			memcpy(&val, data, size);
			home = bus_write(bus, run->io.port, size, val);
		}
	}
	c->exits[home ? EXIT_PIO : EXIT_PIO_UNCLAIMED]++;
}

static void handle_mmio(struct vcpu *c)
{
	struct kvm_run *run = c->run;
	unsigned len = run->mmio.len;
	uint64_t val = 0;
	bool home;

	if (run->mmio.is_write) {
		memcpy(&val, run->mmio.data, len);
		home = bus_write(&c->vm->mmio, run->mmio.phys_addr, len, val);
	} else {
		home = bus_read(&c->vm->mmio, run->mmio.phys_addr, len, &val);
		memcpy(run->mmio.data, &val, len);
	}
	c->exits[home ? EXIT_MMIO : EXIT_MMIO_UNCLAIMED]++;
}

/* Registers and instruction bytes are kept for main to print once the guest's own output is out. */
static void keep_autopsy(struct vcpu *c)
{
	struct vm *vm = c->vm;
	char *text = NULL;
	size_t len = 0;
	FILE *out = open_memstream(&text, &len);

	if (!out)
		return;
	fprintf(out, "vCPU %u:\n", c->index);
	arch_vcpu_dump(c, out);
	fclose(out);
	pthread_mutex_lock(&vm->stop_lock);
	if (!vm->autopsy) {
		vm->autopsy = text;
		text = NULL;
		vm->autopsy_insn_len = arch_vcpu_insn(c, vm->autopsy_insn, sizeof(vm->autopsy_insn),
			&vm->autopsy_rip);
	}
	pthread_mutex_unlock(&vm->stop_lock);
	free(text);
}

static const char *suberror_words(uint32_t suberror)
{
	switch (suberror) {
	case KVM_INTERNAL_ERROR_EMULATION:
		return "an instruction that KVM cannot emulate";
	case KVM_INTERNAL_ERROR_SIMUL_EX:
		return "simultaneous exceptions";
	case KVM_INTERNAL_ERROR_DELIVERY_EV:
		return "an exit while an event was delivered";
	case KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON:
		return "an unexpected exit reason";
	default:
		return "an unknown suberror";
	}
}

static bool fail(struct vcpu *c)
{
	keep_autopsy(c);
	return false;
}

void vcpu_run_failed(struct vcpu *c, int error)
{
	vm_request_stop(c->vm, STOP_KVM, error, "KVM_RUN failed on vCPU %u: %s", c->index,
		strerrordesc_np(error));
	keep_autopsy(c);
}

bool vcpu_handle_exit(struct vcpu *c)
{
	struct kvm_run *run = c->run;
	struct vm *vm = c->vm;

	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		handle_pio(c);
		return true;
	case KVM_EXIT_MMIO:
		handle_mmio(c);
		return true;
	case KVM_EXIT_INTR:
		c->exits[EXIT_INTR]++;
		return true;
	case KVM_EXIT_HLT:
		c->exits[EXIT_HLT]++;
		return true;
	case KVM_EXIT_IRQ_WINDOW_OPEN:
	case KVM_EXIT_SET_TPR:
	case KVM_EXIT_NMI:
		c->exits[EXIT_OTHER]++;
		return true;
	case KVM_EXIT_SHUTDOWN:
		vm_request_stop(vm, STOP_TRIPLE_FAULT, 0, "triple fault on vCPU %u", c->index);
		return false;
	case KVM_EXIT_SYSTEM_EVENT:
		if (run->system_event.type == KVM_SYSTEM_EVENT_RESET)
			vm_request_stop(vm, STOP_RESET, 0, "guest reset (system event)");
		else if (run->system_event.type == KVM_SYSTEM_EVENT_CRASH)
			vm_request_stop(vm, STOP_PANIC, 0, "guest panic (system event)");
		else
			vm_request_stop(vm, STOP_POWEROFF, 0, "guest powered off (system event)");
		return false;
	case KVM_EXIT_INTERNAL_ERROR:
		vm_request_stop(vm, STOP_KVM, (int)run->internal.suberror,
			"KVM internal error %u on vCPU %u: %s", run->internal.suberror, c->index,
			suberror_words(run->internal.suberror));
		return fail(c);
	case KVM_EXIT_FAIL_ENTRY:
		vm_request_stop(vm, STOP_KVM, 0, "KVM could not enter the guest on vCPU %u: hardware reason %#llx",
			c->index, (unsigned long long)run->fail_entry.hardware_entry_failure_reason);
		return fail(c);
	default:
		if (arch_vcpu_exit(c, run) == 0)
			return true;
		vm_request_stop(vm, STOP_KVM, (int)run->exit_reason,
			"KVM stopped vCPU %u with exit reason %u, which vmm does not know", c->index,
			run->exit_reason);
		return fail(c);
	}
}
