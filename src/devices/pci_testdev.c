/*
 * QEMU's pci-testdev (docs/specs/pci-testdev of QEMU), which kernel unit tests measure exits with: BAR 0 is
 * memory, BAR 1 is ports. Writing a test's number to byte 0 starts it; the header then says where and what to
 * write, and counts the writes that matched. Two of three tests have an ioeventfd behind that place.
 */
#include <endian.h>
#include <errno.h>
#include <linux/kvm.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include "devices/pc.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/pci.h"

enum { TEST_NO_EVENTFD, TEST_WILDCARD, TEST_DATAMATCH, TESTS };
enum { BAR_MMIO, BAR_PORTS, BARS };

#define DATA_MATCH    0xfa
#define DATA_WILDCARD 0xce
#define MMIO_SIZE     4096
#define PORTS_SIZE    256

struct header {
	uint8_t test, width, pad0[2];
	uint32_t offset;
	uint8_t data, pad1[3];
	uint32_t count;
	char name[32];
};

struct pci_testdev {
	struct vm *vm;
	struct pci_device pci;
	int efd;
	pthread_mutex_t lock;           /* leaf: guards all below */
	struct {
		bool mapped;
		uint64_t base;
	} bar[BARS];
	int current;                    /* -1: none; else the BAR whose test runs */
	struct header header;
	struct kvm_ioeventfd armed;     /* len and addr as they were given to KVM */
	bool is_armed;
};

static bool matches_data(const struct pci_testdev *t)
{
	return t->header.test % TESTS != TEST_WILDCARD;
}

static void disarm(struct pci_testdev *t)
{
	if (!t->is_armed)
		return;
	t->armed.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN;
	ioctl(t->vm->vm_fd, KVM_IOEVENTFD, &t->armed);
	t->is_armed = false;
}

/* Where KVM takes no ioeventfd, the writes come by exit and are counted there. */
static void arm(struct pci_testdev *t)
{
	int b = t->current;

	if (b < 0 || !t->bar[b].mapped || t->header.test % TESTS == TEST_NO_EVENTFD)
		return;
	t->armed = (struct kvm_ioeventfd){
		.addr = t->bar[b].base + le32toh(t->header.offset),
		.len = b == BAR_MMIO && !matches_data(t) ? 0 : 1,
		.fd = t->efd,
		.flags = (b == BAR_PORTS ? KVM_IOEVENTFD_FLAG_PIO : 0) |
			 (matches_data(t) ? KVM_IOEVENTFD_FLAG_DATAMATCH : 0),
		.datamatch = matches_data(t) ? t->header.data : 0,
	};
	t->is_armed = t->vm->vm_fd >= 0 && !ioctl(t->vm->vm_fd, KVM_IOEVENTFD, &t->armed);
}

static void add_count(struct pci_testdev *t, uint64_t n)
{
	t->header.count = htole32((uint32_t)(le32toh(t->header.count) + n));
}

static void collect(struct pci_testdev *t)
{
	uint64_t n;

	if (read(t->efd, &n, sizeof(n)) == sizeof(n))
		add_count(t, n);
}

static void start_test(struct pci_testdev *t, int b, uint8_t test)
{
	static const char *const names[BARS][TESTS] = {
		{ "mmio-no-eventfd", "mmio-wildcard-eventfd", "mmio-datamatch-eventfd" },
		{ "portio-no-eventfd", "portio-wildcard-eventfd", "portio-datamatch-eventfd" },
	};
	unsigned number = b * TESTS + test;

	disarm(t);
	collect(t);
	t->current = -1;
	t->header = (struct header){ 0 };
	if (test >= TESTS)
		return;
	t->current = b;
	t->header.test = number;
	t->header.width = 1;
	t->header.offset = htole32((b == BAR_MMIO ? MMIO_SIZE : PORTS_SIZE) / 2 + number);
	t->header.data = matches_data(t) ? DATA_MATCH : DATA_WILDCARD;
	strcpy(t->header.name, names[b][test]);
	arm(t);
}

static uint64_t testdev_read(void *dev, uint64_t off, unsigned size)
{
	struct pci_testdev *t = dev;
	uint8_t image[sizeof(struct header)];
	uint64_t val = 0;

	if (t->current < 0)
		return 0;
	collect(t);
	memcpy(image, &t->header, sizeof(image));
	for (unsigned i = 0; i < size && off + i < sizeof(image); i++)
		val |= (uint64_t)image[off + i] << 8 * i;
	return val;
}

static void write_byte(struct pci_testdev *t, int b, uint64_t off, uint8_t val)
{
	if (off == offsetof(struct header, test))
		start_test(t, b, val);
	else if (t->current >= 0 && off == le32toh(t->header.offset) &&
		 (!matches_data(t) || val == t->header.data))
		add_count(t, 1);
}

static void mmio_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	for (unsigned i = 0; i < size; i++)
		write_byte(dev, BAR_MMIO, off + i, val >> 8 * i);
}

static void ports_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	for (unsigned i = 0; i < size; i++)
		write_byte(dev, BAR_PORTS, off + i, val >> 8 * i);
}

static void bar_moved(struct pci_device *d, unsigned bar, bool mapped)
{
	struct pci_testdev *t = container_of(d, struct pci_testdev, pci);

	if (bar >= BARS)
		return;
	pthread_mutex_lock(&t->lock);
	t->bar[bar].mapped = mapped;
	t->bar[bar].base = d->bar[bar].region.base;
	if (t->current == (int)bar) {
		disarm(t);
		arm(t);
	}
	pthread_mutex_unlock(&t->lock);
}

static void testdev_reset(void *dev)
{
	struct pci_testdev *t = dev;

	pthread_mutex_lock(&t->lock);
	start_test(t, BAR_MMIO, TESTS);
	pthread_mutex_unlock(&t->lock);
}

static void testdev_free(void *dev)
{
	struct pci_testdev *t = dev;

	pci_del(&t->pci);
	disarm(t);
	close(t->efd);
	pthread_mutex_destroy(&t->lock);
	free(t);
}

static const struct bus_ops mmio_ops = { testdev_read, mmio_write, 1, 8 };
static const struct bus_ops ports_ops = { testdev_read, ports_write, 1, 4 };

int pci_testdev_new(struct vm *vm, struct error *err)
{
	auto_free struct pci_testdev *t = calloc(1, sizeof(*t));
	struct pci_testdev *made;
	int r;

	if (!t)
		return error_set(err, ENOMEM, "no memory for pci-testdev");
	t->vm = vm;
	t->current = -1;
	t->pci = (struct pci_device){
		.name = "pci-testdev",
		.vendor = 0x1b36,       /* Red Hat; the id is QEMU's */
		.device = 0x0005,
		.sub_vendor = 0x1af4,
		.sub_device = 0x1100,
		.class_code = 0xff0000,
		.bar_moved = bar_moved,
	};
	pthread_mutex_init(&t->lock, NULL);
	t->pci.bar[BAR_MMIO] = (struct pci_bar){ .size = MMIO_SIZE };
	t->pci.bar[BAR_MMIO].region =
		(struct bus_region){ .name = "pci-testdev", .ops = &mmio_ops, .dev = t, .lock = &t->lock };
	t->pci.bar[BAR_PORTS] = (struct pci_bar){ .size = PORTS_SIZE, .io = true };
	t->pci.bar[BAR_PORTS].region =
		(struct bus_region){ .name = "pci-testdev", .ops = &ports_ops, .dev = t, .lock = &t->lock };
	t->efd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (t->efd < 0)
		return error_errno(err, errno, "cannot create an eventfd");
	r = pci_add(vm->pci, &t->pci, err);
	if (r) {
		close(t->efd);
		return r;
	}
	made = TAKE_PTR(t);
	r = vm_add_device(vm, "pci-testdev", made, testdev_reset, NULL, testdev_free, err);
	if (r)
		testdev_free(made);
	return r;
}
