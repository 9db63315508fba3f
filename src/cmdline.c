#include "cmdline.h"
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "vmm/arch.h"
#include "vmm/error.h"
#include "vmm/virtio.h"
#include "vmm/vm.h"

__attribute__((format(printf, 2, 3)))
static int add(struct vm *vm, const char *fmt, ...)
{
	size_t n = strlen(vm->cmdline);
	va_list ap;
	int r;

	if (n)
		vm->cmdline[n++] = ' ';
	va_start(ap, fmt);
	r = vsnprintf(vm->cmdline + n, sizeof(vm->cmdline) - n, fmt, ap);
	va_end(ap);
	return r < 0 || (size_t)r >= sizeof(vm->cmdline) - n ? -E2BIG : 0;
}

/* Does the line hold a parameter of this name ("console=")? */
static bool has(const char *line, const char *name)
{
	size_t n = strlen(name);

	for (const char *p = line; (p = strstr(p, name)); p += n)
		if (p == line || p[-1] == ' ' || p[-1] == '\t')
			return true;
	return false;
}

static const struct virtio *first(const struct vm *vm, const char *name)
{
	for (unsigned i = 0; i < vm->nr_virtio; i++)
		if (!strcmp(vm->virtio[i]->ops->name, name))
			return vm->virtio[i];
	return NULL;
}

static int add_defaults(struct vm *vm)
{
	const struct vm_config *cfg = vm->cfg;
	const char *given = cfg->boot.cmdline;
	int r = 0;

	if (!has(given, "console=")) {
		if (cfg->serial[0])
			r = add(vm, "console=ttyS0");
		else if (first(vm, "console"))
			r = add(vm, "console=hvc0");
	}
	if (!r && !has(given, "root=") && !cfg->boot.nr_initrds && first(vm, "blk"))
		r = add(vm, "root=/dev/vda rw");
	if (cfg->machine != MACHINE_MICROVM)
		return r;
	for (unsigned i = 0; !r && i < vm->nr_virtio; i++) {
		unsigned gsi;
		gpa_t base;

		arch_virtio_mmio_slot(i, &base, &gsi);
		r = add(vm, "virtio_mmio.device=4K@0x%llx:%u", (unsigned long long)base, gsi);
	}
	return r;
}

/*
 * What enters by the Linux protocol is Linux. What enters by PVH may be anything: a Linux kernel carries its
 * banner, "Linux version …".
 */
bool cmdline_is_linux(const struct vm *vm)
{
	static const char banner[] = "Linux version ";
	const struct boot_image *b = &vm->boot;
	const void *image;

	if (b->protocol == BOOT_LINUX64 || b->protocol == BOOT_LINUX32)
		return true;
	if (b->protocol != BOOT_PVH)
		return false;
	image = gmem_at(&vm->mem, b->load_start, b->load_end - b->load_start);
	return image && memmem(image, b->load_end - b->load_start, banner, sizeof(banner) - 1);
}

int cmdline_complete(struct vm *vm, struct error *err)
{
	int r = 0;

	vm->cmdline[0] = '\0';
	if (*vm->cfg->boot.cmdline)
		r = add(vm, "%s", vm->cfg->boot.cmdline);
	if (!r && cmdline_is_linux(vm))
		r = add_defaults(vm);
	if (r)
		return error_set(err, E2BIG, "--cmdline: with what vmm adds it is longer than %d bytes",
			BOOT_CMDLINE_MAX - 1);
	vm->boot.cmdline = vm->cmdline;
	return 0;
}
