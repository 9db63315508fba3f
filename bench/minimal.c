/*
 * The smallest program that runs a guest on KVM: what any VMM has to do, and nothing else. The measure that
 * vmm's start and its exits are held against.
 *
 *   minimal [MEM_MIB [FILE]]
 *
 * One memory slot of MEM_MIB (256), the in-kernel interrupt chip, one vCPU in real mode at 0x7c00 with FILE (or a
 * payload that writes '!') loaded there. It runs until the guest's first byte on the serial port 0x3f8, which
 * goes to stdout. Writes to other ports are ignored, reads give ones. Status: 0, or 1 with words on stderr.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define LOAD_ADDRESS 0x7c00
#define SERIAL_PORT  0x3f8

static int fail(const char *what)
{
	fprintf(stderr, "minimal: %s: %s\n", what, strerror(errno));
	return 1;
}

/* Run until the first byte on the serial port. */
static int run(int vcpu, struct kvm_run *r)
{
	for (;;) {
		char *data = (char *)r + r->io.data_offset;

		if (ioctl(vcpu, KVM_RUN, 0) < 0)
			return fail("KVM_RUN");
		if (r->exit_reason != KVM_EXIT_IO) {
			fprintf(stderr, "minimal: exit reason %u\n", r->exit_reason);
			return 1;
		}
		data = (char *)r + r->io.data_offset;
		if (r->io.direction == KVM_EXIT_IO_IN)
			memset(data, 0xff, (size_t)r->io.size * r->io.count);
		else if (r->io.port == SERIAL_PORT)
			return write(STDOUT_FILENO, data, 1) == 1 ? 0 : fail("write");
	}
}

int main(int argc, char **argv)
{
	/* mov dx, 0x3f8; mov al, '!'; out dx, al; hlt */
	static const unsigned char hello[] = { 0xba, 0xf8, 0x03, 0xb0, '!', 0xee, 0xf4 };
	size_t size = (argc > 1 ? strtoul(argv[1], NULL, 10) : 256) << 20;
	struct kvm_userspace_memory_region slot = { .memory_size = size };
	struct kvm_regs regs = { .rip = LOAD_ADDRESS, .rflags = 2 };
	struct kvm_sregs sregs;
	struct kvm_run *r;
	int kvm, vm, vcpu, file, run_size;
	char *ram;

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		return fail("/dev/kvm");
	if (size < 1 << 20)
		return errno = EINVAL, fail("memory size");
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0)
		return fail("KVM_CREATE_VM");
	if (ioctl(vm, KVM_CREATE_IRQCHIP, 0) < 0)
		return fail("KVM_CREATE_IRQCHIP");
	ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (ram == MAP_FAILED)
		return fail("guest memory");
	if (argc > 2) {
		file = open(argv[2], O_RDONLY | O_CLOEXEC);
		if (file < 0 || read(file, ram + LOAD_ADDRESS, size - LOAD_ADDRESS) <= 0)
			return fail(argv[2]);
	} else {
		memcpy(ram + LOAD_ADDRESS, hello, sizeof(hello));
	}
	slot.userspace_addr = (unsigned long)ram;
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) < 0)
		return fail("KVM_SET_USER_MEMORY_REGION");
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	if (vcpu < 0)
		return fail("KVM_CREATE_VCPU");
	run_size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (run_size < 0)
		return fail("KVM_GET_VCPU_MMAP_SIZE");
	r = mmap(NULL, (size_t)run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (r == MAP_FAILED)
		return fail("kvm_run");
	if (ioctl(vcpu, KVM_GET_SREGS, &sregs) < 0)
		return fail("KVM_GET_SREGS");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	if (ioctl(vcpu, KVM_SET_SREGS, &sregs) < 0 || ioctl(vcpu, KVM_SET_REGS, &regs) < 0)
		return fail("registers");
	return run(vcpu, r);
}
