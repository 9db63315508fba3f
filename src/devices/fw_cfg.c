/*
 * QEMU's firmware configuration device (docs/specs/fw_cfg of QEMU): selector and data ports at 0x510 and
 * 0x511, DMA at 0x514. It tells kernels about CPUs, memory and what was loaded.
 *
 * How this works. Selecting a key only notes which item is read and where; an item is a length and a few
 * bytes made on the spot, a piece of guest RAM, or a piece of the kernel file, read with pread() where and
 * when it is asked for. Nothing is copied whole, nothing grows. Past an item's end there are zeroes.
 */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "devices/pc.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/gmem.h"
#include "vmm/loader.h"

enum {
	KEY_SIGNATURE = 0x00,
	KEY_ID = 0x01,
	KEY_RAM_SIZE = 0x03,
	KEY_NB_CPUS = 0x05,
	KEY_KERNEL_ADDR = 0x07,
	KEY_KERNEL_SIZE = 0x08,
	KEY_INITRD_ADDR = 0x0a,
	KEY_INITRD_SIZE = 0x0b,
	KEY_MAX_CPUS = 0x0f,
	KEY_KERNEL_ENTRY = 0x10,
	KEY_KERNEL_DATA = 0x11,
	KEY_INITRD_DATA = 0x12,
	KEY_CMDLINE_ADDR = 0x13,
	KEY_CMDLINE_SIZE = 0x14,
	KEY_CMDLINE_DATA = 0x15,
	KEY_SETUP_ADDR = 0x16,
	KEY_SETUP_SIZE = 0x17,
	KEY_SETUP_DATA = 0x18,
	KEY_FILE_DIR = 0x19,
	KEY_FILE_E820 = 0x20,
};
#define ID_TRADITIONAL 1u
#define ID_DMA         2u

#define DMA_ERROR      0x01u
#define DMA_READ       0x02u
#define DMA_SKIP       0x04u
#define DMA_SELECT     0x08u
#define DMA_WRITE      0x10u
#define DMA_SIGNATURE  0x51454d5520434647ull    /* "QEMU CFG" */

/* Most zeroes that one DMA request past an item's end is filled with; more is refused. */
#define ZERO_MAX       (1u << 20)

#define SETUP_ADDR     0x10000u         /* where QEMU's own loader puts these */
#define CMDLINE_ADDR   0x20000u

struct e820_entry {
	uint64_t addr, len;
	uint32_t type;
} __attribute__((packed));
#define E820_RAM 1

struct dir_entry {
	uint32_t size;                  /* big-endian, as the next */
	uint16_t select, reserved;
	char name[56];
} __attribute__((packed));

struct dma_request {
	uint32_t control, length;       /* big-endian, all three */
	uint64_t address;
};

/* Where the bytes of the selected item are. */
struct item {
	uint64_t len;
	int fd;                         /* >= 0: at `base` of this file */
	const uint8_t *mem;             /* else here, if not NULL, else in `small` */
	uint64_t base;
	uint8_t small[128];
};

struct fw_cfg {
	struct pc_device pc;
	/* under pc.lock */
	struct item item;
	uint64_t at;                    /* next byte of the item */
	uint32_t dma_high;
	uint64_t requests, errors;
};

static void set_small(struct item *it, const void *src, size_t len)
{
	memcpy(it->small, src, len);
	it->len = len;
}

static void set_le16(struct item *it, uint16_t val)
{
	val = htole16(val);
	set_small(it, &val, sizeof(val));
}

static void set_le32(struct item *it, uint64_t val)
{
	uint32_t v = htole32((uint32_t)MIN(val, UINT32_MAX));

	set_small(it, &v, sizeof(v));
}

/*
 * A bzImage is given in two parts, as firmware expects: the real-mode setup (boot protocol, 2.1: setup_sects,
 * 0 means 4, and the boot sector), and the rest. Any other kernel has no setup.
 */
static uint64_t setup_len(int fd, uint64_t size)
{
	uint8_t head[0x206 - 0x1f1];
	uint64_t len;

	if (fd < 0 || pread(fd, head, sizeof(head), 0x1f1) != sizeof(head) ||
		memcmp(head + 0x202 - 0x1f1, "HdrS", 4))
		return 0;
	len = ((head[0] ? head[0] : 4) + 1) * 512ull;
	return MIN(len, size);
}

static void set_kernel(struct fw_cfg *f, uint16_t key)
{
	struct item *it = &f->item;
	uint64_t size = 0, setup;
	int fd = f->pc.vm->loader ? loader_kernel_fd(f->pc.vm->loader, &size) : -1;

	if (fd < 0)
		size = 0;
	setup = setup_len(fd, size);
	switch (key) {
	case KEY_KERNEL_SIZE:
		set_le32(it, size - setup);
		return;
	case KEY_SETUP_SIZE:
		set_le32(it, setup);
		return;
	case KEY_KERNEL_DATA:
		it->len = size - setup;
		it->base = setup;
		break;
	case KEY_SETUP_DATA:
		it->len = setup;
		break;
	}
	it->fd = fd;
}

/* The initrd as it lies in guest RAM, all files together. */
static void set_initrd(struct fw_cfg *f)
{
	const struct boot_image *b = &f->pc.vm->boot;

	f->item.mem = gmem_at(&f->pc.vm->mem, b->initrd, b->initrd_len);
	f->item.len = f->item.mem ? b->initrd_len : 0;
}

static unsigned e820_len(const struct gmem *m)
{
	return m->nr * sizeof(struct e820_entry);
}

static void set_e820(struct item *it, const struct gmem *m)
{
	for (unsigned i = 0; i < m->nr; i++) {
		struct e820_entry e = { htole64(m->region[i].base), htole64(m->region[i].size),
			htole32(E820_RAM) };

		memcpy(it->small + i * sizeof(e), &e, sizeof(e));
	}
	it->len = e820_len(m);
}

static void set_directory(struct item *it, const struct gmem *m)
{
	uint32_t count = htobe32(1);
	struct dir_entry e = {
		.size = htobe32(e820_len(m)), .select = htobe16(KEY_FILE_E820), .name = "etc/e820"
	};

	memcpy(it->small, &count, sizeof(count));
	memcpy(it->small + sizeof(count), &e, sizeof(e));
	it->len = sizeof(count) + sizeof(e);
}

_Static_assert(sizeof(((struct item *)0)->small) >= sizeof(uint32_t) + sizeof(struct dir_entry) &&
	       sizeof(((struct item *)0)->small) >= GMEM_REGIONS * sizeof(struct e820_entry),
	"the items made on the spot fit");

static void select_key(struct fw_cfg *f, uint16_t key)
{
	struct vm *vm = f->pc.vm;
	const char *cmdline = vm->boot.cmdline ? vm->boot.cmdline : "";
	struct item *it = &f->item;

	*it = (struct item){ .fd = -1 };
	f->at = 0;
	switch (key) {
	case KEY_SIGNATURE:
		set_small(it, "QEMU", 4);
		break;
	case KEY_ID:
		set_le32(it, ID_TRADITIONAL | ID_DMA);
		break;
	case KEY_RAM_SIZE: {
		uint64_t total = htole64(gmem_total(&vm->mem));

		set_small(it, &total, sizeof(total));
		break;
	}
	case KEY_NB_CPUS:
	case KEY_MAX_CPUS:
		set_le16(it, vm->cfg->cpus);
		break;
	case KEY_KERNEL_ADDR:
		set_le32(it, vm->boot.load_start);
		break;
	case KEY_KERNEL_ENTRY:
		set_le32(it, vm->boot.entry);
		break;
	case KEY_KERNEL_SIZE:
	case KEY_KERNEL_DATA:
	case KEY_SETUP_SIZE:
	case KEY_SETUP_DATA:
		set_kernel(f, key);
		break;
	case KEY_INITRD_ADDR:
		set_le32(it, vm->boot.initrd);
		break;
	case KEY_INITRD_SIZE:
		set_le32(it, vm->boot.initrd_len);
		break;
	case KEY_INITRD_DATA:
		set_initrd(f);
		break;
	case KEY_SETUP_ADDR:
		set_le32(it, SETUP_ADDR);
		break;
	case KEY_CMDLINE_ADDR:
		set_le32(it, CMDLINE_ADDR);
		break;
	case KEY_CMDLINE_SIZE:
		set_le32(it, strlen(cmdline) + 1);
		break;
	case KEY_CMDLINE_DATA:
		it->mem = (const uint8_t *)cmdline;
		it->len = strlen(cmdline) + 1;
		break;
	case KEY_FILE_DIR:
		set_directory(it, &vm->mem);
		break;
	case KEY_FILE_E820:
		set_e820(it, &vm->mem);
		break;
	}                               /* others: empty, read as zeroes */
}

/* n bytes of the item from f->at on, all of them inside it. False: the file gave less. */
static bool copy_item(struct fw_cfg *f, uint8_t *dst, uint64_t n)
{
	const struct item *it = &f->item;

	if (it->fd < 0) {
		memmove(dst, (it->mem ? it->mem : it->small) + f->at, n);
		return true;
	}
	for (uint64_t done = 0; done < n;) {
		ssize_t r = pread(it->fd, dst + done, n - done, (off_t)(it->base + f->at + done));

		if (r < 0 && errno == EINTR)
			continue;
		if (r <= 0)
			return false;
		done += (uint64_t)r;
	}
	return true;
}

static uint64_t bytes_left(const struct fw_cfg *f)
{
	return f->at < f->item.len ? f->item.len - f->at : 0;
}

static bool dma_read(struct fw_cfg *f, gpa_t gpa, uint32_t len)
{
	uint8_t *dst = gmem_at(&f->pc.vm->mem, gpa, len);
	uint64_t real = MIN(bytes_left(f), len);

	if (!dst || len - real > ZERO_MAX || !copy_item(f, dst, real))
		return false;
	memset(dst + real, 0, len - real);
	f->at += real;
	return true;
}

/* One request at gpa; its control word says how it went. A request that is not in RAM cannot be answered. */
static void dma_run(struct fw_cfg *f, gpa_t gpa)
{
	const struct gmem *m = &f->pc.vm->mem;
	struct dma_request rq;
	uint32_t control, len, result = 0;

	f->requests++;
	if (gmem_read(m, gpa, &rq, sizeof(rq))) {
		f->errors++;
		return;
	}
	control = be32toh(rq.control);
	len = be32toh(rq.length);
	if (control & DMA_SELECT)
		select_key(f, control >> 16);
	if (control & DMA_READ) {
		if (len && !dma_read(f, be64toh(rq.address), len))
			result = DMA_ERROR;
	} else if (control & DMA_WRITE) {
		result = DMA_ERROR;     /* no item is writable */
	} else if (control & DMA_SKIP) {
		f->at += MIN(bytes_left(f), len);
	}
	f->errors += !!result;
	result = htobe32(result);
	/* RAM regions do not change while the guest runs: what could be read can be written. */
	gmem_write(m, gpa, &result, sizeof(result));
}

static uint64_t ports_read(void *dev, uint64_t off, unsigned size)
{
	struct fw_cfg *f = dev;
	uint8_t byte = 0;

	if (off != 1 || size != 1)
		return 0;
	if (bytes_left(f)) {
		if (!copy_item(f, &byte, 1))
			f->errors++;
		f->at++;
	}
	return byte;
}

static void ports_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	if (off == 0 && size == 2)
		select_key(dev, val);
}

/* Reads tell that DMA is there. Both halves are big-endian; the low one starts the request. */
static uint64_t dma_port_read(void *dev, uint64_t off, unsigned size)
{
	(void)dev, (void)size;
	if (off == 0)
		return htobe32((uint32_t)(DMA_SIGNATURE >> 32));
	if (off == 4)
		return htobe32((uint32_t)DMA_SIGNATURE);
	return 0;
}

static void dma_port_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct fw_cfg *f = dev;
	uint32_t word = be32toh((uint32_t)val);
	gpa_t gpa;

	(void)size;
	if (off == 0)
		f->dma_high = word;
	if (off != 4)
		return;
	gpa = (gpa_t)f->dma_high << 32 | word;
	f->dma_high = 0;
	dma_run(f, gpa);
}

static void fw_cfg_reset(void *dev)
{
	struct fw_cfg *f = dev;

	f->dma_high = 0;
	select_key(f, KEY_SIGNATURE);
}

static void fw_cfg_describe(void *dev, struct facts *facts)
{
	struct fw_cfg *f = dev;

	facts_u64(facts, "dma_requests", f->requests);
	facts_u64(facts, "errors", f->errors);
}

static const struct bus_ops ports_ops = { ports_read, ports_write, 1, 2 };
static const struct bus_ops dma_ops = { dma_port_read, dma_port_write, 4, 4 };
static const struct pc_class fw_cfg_class = {
	.name = "fw_cfg",
	.range = { { 0x510, 2, &ports_ops }, { 0x514, 8, &dma_ops } },
	.reset = fw_cfg_reset,
	.describe = fw_cfg_describe,
};

int fw_cfg_new(struct vm *vm, struct error *err)
{
	struct fw_cfg *f = calloc(1, sizeof(*f));

	if (!f)
		return error_set(err, ENOMEM, "no memory for fw_cfg");
	return pc_device_add(vm, &f->pc, &fw_cfg_class, 0, err);
}
