/*
 * What kernel unit tests written for QEMU's pc-testdev use: ports 0xe0-0xe7 that give back what was written
 * (a four-byte write to 0xe4 also makes KVM forget its mapping of the page at that address), interrupt
 * lines at 0x2000 + n, and 64 KiB of memory at 0xff000000 that every access leaves the guest for.
 */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "arch/x86_64/layout.h"
#include "devices/pc.h"
#include "vmm/error.h"
#include "vmm/irq.h"

#define FLUSH      4
#define MEMORY_LEN 0x10000

struct pc_testdev {
	struct pc_device pc;
	struct irq line[IRQ_LINES];
	struct bus_region memory_region;
	/* under pc.lock */
	uint8_t echo[8], memory[MEMORY_LEN];
};

static uint64_t load(const uint8_t *src, unsigned size)
{
	uint64_t val = 0;

	memcpy(&val, src, size);
	return le64toh(val);
}

static void store(uint8_t *dst, unsigned size, uint64_t val)
{
	val = htole64(val);
	memcpy(dst, &val, size);
}

static uint64_t echo_read(void *dev, uint64_t off, unsigned size)
{
	return load(((struct pc_testdev *)dev)->echo + off, size);
}

/* The page stays in the memfd; only the mappings of it go, ours and with it KVM's. */
static void flush_page(struct pc_testdev *t, gpa_t gpa)
{
	void *page = gmem_at(&t->pc.vm->mem, gpa & ~0xfffull, 4096);

	if (page)
		madvise(page, 4096, MADV_DONTNEED);
}

static void echo_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct pc_testdev *t = dev;

	store(t->echo + off, size, val);
	if (off == FLUSH && size == 4)
		flush_page(t, val);
}

static void line_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	(void)size;
	irq_set(&((struct pc_testdev *)dev)->line[off], val);
}

static uint64_t memory_read(void *dev, uint64_t off, unsigned size)
{
	return load(((struct pc_testdev *)dev)->memory + off, size);
}

static void memory_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	store(((struct pc_testdev *)dev)->memory + off, size, val);
}

static void testdev_reset(void *dev)
{
	struct pc_testdev *t = dev;

	memset(t->echo, 0, sizeof(t->echo));
	memset(t->memory, 0, sizeof(t->memory));
	for (unsigned i = 0; i < IRQ_LINES; i++)
		irq_set(&t->line[i], false);
}

static void testdev_done(void *dev)
{
	struct pc_testdev *t = dev;

	bus_del(&t->pc.vm->mmio, &t->memory_region);
	for (unsigned i = 0; i < IRQ_LINES; i++)
		irq_done(&t->line[i]);
}

static const struct bus_ops echo_ops = { echo_read, echo_write, 1, 4 };
static const struct bus_ops line_ops = { NULL, line_write, 1, 1 };
static const struct bus_ops memory_ops = { memory_read, memory_write, 1, 8 };
static const struct pc_class testdev_class = {
	.name = "pc-testdev",
	.range = { { 0xe0, 8, &echo_ops }, { 0x2000, IRQ_LINES, &line_ops } },
	.reset = testdev_reset,
	.done = testdev_done,
};

int pc_testdev_new(struct vm *vm, struct error *err)
{
	struct pc_testdev *t = calloc(1, sizeof(*t));
	int r = 0;

	if (!t)
		return error_set(err, ENOMEM, "no memory for pc-testdev");
	for (unsigned i = 0; i < IRQ_LINES; i++)
		r = r ? r : irq_line_init(&t->line[i], &vm->irqs, i, true, err);
	t->memory_region = (struct bus_region){
		.name = "pc-testdev",
		.base = TESTDEV_RAM,
		.size = MEMORY_LEN,
		.ops = &memory_ops,
		.dev = t,
		.lock = &t->pc.lock,
	};
	if (r) {
		free(t);        /* level lines hold no resources yet */
		return r;
	}
	r = pc_device_add(vm, &t->pc, &testdev_class, 0, err);
	return r ? r : bus_add(&vm->mmio, &t->memory_region, err);
}
