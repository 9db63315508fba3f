#include "vmm/kvm.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"

int kvm_open(struct error *err)
{
	auto_close int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int version;

	if (fd < 0 && errno == ENOENT)
		return error_set(err, ENOENT,
			"/dev/kvm is missing: load the module (modprobe kvm_intel or kvm_amd) after "
			"enabling virtualization in the firmware; in a container, start it with "
			"--device /dev/kvm");
	if (fd < 0 && (errno == EACCES || errno == EPERM))
		return error_set(err, EACCES,
			"/dev/kvm: permission denied: join its group (sudo usermod -aG kvm $USER, then log in "
			"again) or, on a CI machine, sudo chmod 666 /dev/kvm");
	if (fd < 0)
		return error_errno(err, errno, "/dev/kvm");
	version = ioctl(fd, KVM_GET_API_VERSION, 0);
	if (version != KVM_API_VERSION)
		return error_set(err, ENOTSUP, "/dev/kvm speaks API version %d, not %d", version,
			KVM_API_VERSION);
	return TAKE_FD(fd);
}

int kvm_check(int kvm_fd, struct error *err)
{
	static const struct {
		int cap;
		const char *name;
	} needed[] = {
		{ KVM_CAP_IRQCHIP, "an in-kernel irqchip" },
		{ KVM_CAP_USER_MEMORY, "user memory regions" },
		{ KVM_CAP_IRQFD, "irqfd" },
		{ KVM_CAP_IOEVENTFD, "ioeventfd" },
		{ KVM_CAP_IMMEDIATE_EXIT, "immediate_exit" },
		{ KVM_CAP_IRQ_ROUTING, "interrupt routing" },
		{ KVM_CAP_SIGNAL_MSI, "MSI" },
	};

	for (unsigned i = 0; i < ARRAY_LEN(needed); i++)
		if (ioctl(kvm_fd, KVM_CHECK_EXTENSION, needed[i].cap) <= 0)
			return error_set(err, ENOTSUP, "this KVM lacks %s: a newer host kernel is needed",
				needed[i].name);
	return 0;
}

bool kvm_is_software(void)
{
	return access("/sys/module/kvm_pvm", F_OK) == 0;
}
