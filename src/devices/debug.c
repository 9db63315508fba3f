/* What a guest talks to its developer with: POST codes, debugcon, pvpanic, debug-exit. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include "devices/pc.h"
#include "vmm/chardev.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/log.h"

/* ---- POST codes, port 0x80 ---- */

#define POST_KEPT  8
#define POST_LINES 256          /* debug lines of one run: Linux also writes here to pass time */

struct post {
	struct pc_device pc;
	uint64_t count;
	uint8_t last[POST_KEPT];        /* ring, next at count % POST_KEPT */
	unsigned lines;
};

static uint64_t post_read(void *dev, uint64_t off, unsigned size)
{
	struct post *p = dev;

	(void)off, (void)size;
	return p->count ? p->last[(p->count - 1) % POST_KEPT] : 0;
}

static void post_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct post *p = dev;

	(void)off, (void)size;
	if (p->lines < POST_LINES && (!p->count || p->last[(p->count - 1) % POST_KEPT] != val)) {
		p->lines++;
		log_debug("POST code %02x", (unsigned)val);
	}
	p->last[p->count++ % POST_KEPT] = val;
}

static void post_reset(void *dev)
{
	((struct post *)dev)->count = 0;
}

static void post_describe(void *dev, struct facts *f)
{
	struct post *p = dev;
	char text[3 * POST_KEPT + 1] = "";
	uint64_t first = p->count > POST_KEPT ? p->count - POST_KEPT : 0;
	int n = 0;

	for (uint64_t i = first; i < p->count; i++)
		n += snprintf(text + n, sizeof(text) - n, i == first ? "%02x" : " %02x",
			p->last[i % POST_KEPT]);
	facts_u64(f, "writes", p->count);
	facts_str(f, "last", text);
}

static const struct bus_ops post_ops = { post_read, post_write, 1, 1 };
static const struct pc_class post_class = {
	.name = "post",
	.range = { { 0x80, 1, &post_ops } },
	.reset = post_reset,
	.describe = post_describe,
};

int post_new(struct vm *vm, struct error *err)
{
	struct post *p = calloc(1, sizeof(*p));

	if (!p)
		return error_set(err, ENOMEM, "no memory for the POST port");
	return pc_device_add(vm, &p->pc, &post_class, 0, err);
}

/* ---- debugcon, port 0xe9 ---- */

struct debugcon {
	struct pc_device pc;
	struct chardev *host;           /* const after build */
};

/* Software finds the port by reading its own number from it. */
static uint64_t debugcon_read(void *dev, uint64_t off, unsigned size)
{
	(void)dev, (void)off, (void)size;
	return 0xe9;
}

static void debugcon_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct debugcon *d = dev;
	uint8_t byte = val;

	(void)off, (void)size;
	chardev_write(d->host, &byte, 1);
}

static void debugcon_describe(void *dev, struct facts *f)
{
	chardev_describe(((struct debugcon *)dev)->host, f);
}

static void debugcon_done(void *dev)
{
	chardev_free(((struct debugcon *)dev)->host);
}

static const struct bus_ops debugcon_ops = { debugcon_read, debugcon_write, 1, 1 };
static const struct pc_class debugcon_class = {
	.name = "debugcon",
	.range = { { 0xe9, 1, &debugcon_ops } },
	.lockless = true,
	.describe = debugcon_describe,
	.done = debugcon_done,
};

int debugcon_new(struct vm *vm, const char *spec, struct error *err)
{
	auto_free struct debugcon *d = calloc(1, sizeof(*d));
	int r;

	if (!d)
		return error_set(err, ENOMEM, "no memory for debugcon");
	r = chardev_open(&d->host, spec, "port 0xe9", vm->io, err);
	if (r) {
		error_prefix(err, "--debugcon: ");
		return r;
	}
	return pc_device_add(vm, &TAKE_PTR(d)->pc, &debugcon_class, 0, err);
}

/* ---- pvpanic, port 0x505 ---- */

#define PVPANIC_PANICKED     0x01
#define PVPANIC_CRASH_LOADED 0x02       /* it crashed, and a crash kernel takes over */

struct pvpanic {
	struct pc_device pc;
	uint64_t panicked, crash_loaded;
};

static uint64_t pvpanic_read(void *dev, uint64_t off, unsigned size)
{
	(void)dev, (void)off, (void)size;
	return PVPANIC_PANICKED | PVPANIC_CRASH_LOADED;
}

static void pvpanic_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct pvpanic *p = dev;

	(void)off, (void)size;
	if (val & PVPANIC_CRASH_LOADED)
		p->crash_loaded++;
	if (!(val & PVPANIC_PANICKED))
		return;
	p->panicked++;
	if (!p->pc.vm->cfg->ignore_panic)
		vm_panic_seen(p->pc.vm, "pvpanic");
}

static void pvpanic_describe(void *dev, struct facts *f)
{
	struct pvpanic *p = dev;

	facts_u64(f, "panicked", p->panicked);
	facts_u64(f, "crash_loaded", p->crash_loaded);
}

static const struct bus_ops pvpanic_ops = { pvpanic_read, pvpanic_write, 1, 1 };
static const struct pc_class pvpanic_class = {
	.name = "pvpanic",
	.range = { { 0x505, 1, &pvpanic_ops } },
	.describe = pvpanic_describe,
};

int pvpanic_new(struct vm *vm, struct error *err)
{
	struct pvpanic *p = calloc(1, sizeof(*p));

	if (!p)
		return error_set(err, ENOMEM, "no memory for pvpanic");
	return pc_device_add(vm, &p->pc, &pvpanic_class, 0, err);
}

/* ---- debug-exit, four ports ---- */

static uint64_t debug_exit_read(void *dev, uint64_t off, unsigned size)
{
	(void)dev, (void)off, (void)size;
	return 0;
}

static void debug_exit_write(void *dev, uint64_t off, unsigned size, uint64_t val)
{
	struct vm *vm = ((struct pc_device *)dev)->vm;

	(void)off, (void)size;
	if (vm->cfg->debug_exit_mode == DEBUG_EXIT_QEMU)
		val = val << 1 | 1;
	vm_guest_value(vm, val, "debug-exit");
}

static const struct bus_ops debug_exit_ops = { debug_exit_read, debug_exit_write, 1, 4 };
static const struct pc_class debug_exit_class = {
	.name = "debug-exit", .range = { { 0, 4, &debug_exit_ops } }, .lockless = true
};

int debug_exit_new(struct vm *vm, struct error *err)
{
	struct pc_device *d = calloc(1, sizeof(*d));
	int r;

	if (!d)
		return error_set(err, ENOMEM, "no memory for debug-exit");
	r = pc_device_add(vm, d, &debug_exit_class, vm->cfg->debug_exit_port, err);
	if (r)
		error_prefix(err, "--debug-exit: ");
	return r;
}
