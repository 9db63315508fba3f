#include "transport.h"
#include <linux/kvm.h>
#include <sys/ioctl.h>

void virtio_bell_bind(const struct vm *vm, struct virtio *v, unsigned qi, gpa_t addr, unsigned len,
	bool match, bool on)
{
	struct kvm_ioeventfd e = {
		.addr = addr,
		.len = len,
		.fd = v->bell[qi].event.fd,
		.datamatch = match ? qi : 0,
		.flags = (match ? KVM_IOEVENTFD_FLAG_DATAMATCH : 0) |
			(on ? 0 : KVM_IOEVENTFD_FLAG_DEASSIGN),
	};

	if (vm->vm_fd >= 0 && ioctl(vm->vm_fd, KVM_IOEVENTFD, &e))
		return;
}
